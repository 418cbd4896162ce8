"""Figures from raw samples, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.benchmark import HARNESS, latencies
from targets.base import DeviceInfo, Samples

INFO = DeviceInfo(name="local", kind="host", isa=("avx2",), description="a CPU", cores=2)


def _samples(label: str, wall: float, cpu: float, n: int = 72) -> Samples:
    return Samples(
        label=label,
        wall_ms=(wall,) * n,
        cpu_ms=(cpu,) * n,
        load_ms=30.0,
        first_ms=9.0,
        peak_memory_bytes=1000,
        versions={"runtime": "1"},
    )


def test_a_ratio_is_of_the_artifact_over_its_float() -> None:
    samples = [_samples(HARNESS, 0.1, 0.1), _samples("float", 4, 3), _samples("w8a8", 2, 1)]
    rows = latencies(INFO, samples, threads=1, samples_file="samples.json")
    assert set(rows) == {"float", "w8a8"}
    row = rows["w8a8"]
    assert (row.wall_p50_ms, row.cpu_p50_ms, row.wall_p90_ms, row.n) == (2, 1, 2, 72)
    assert (row.float_wall_p50_ms, row.float_cpu_p50_ms) == (4, 3)
    assert (row.speedup, row.wall_ratio, row.cpu_ratio) == (2, 0.5, 1 / 3)
    assert row.harness_wall_p50_ms == 0.1
    assert rows["float"].speedup == 1


def test_a_row_keeps_what_the_runtime_s_plan_puts_where() -> None:
    plan = {"CPU": 3, "GPU": 9}
    samples = [_samples(HARNESS, 0.1, 0.1), _samples("float", 4, 3), _samples("w8a8", 2, 1)]
    samples[-1] = replace(samples[-1], operations_on=plan)
    rows = latencies(INFO, samples, threads=1, samples_file="samples.json")
    assert rows["w8a8"].operations_on == plan
    assert rows["float"].operations_on is None


def test_few_samples_give_no_percentile_and_no_ratio() -> None:
    samples = [_samples(HARNESS, 1, 1, 9), _samples("float", 4, 3, 9), _samples("w8a8", 2, 1, 9)]
    row = latencies(INFO, samples, threads=1, samples_file="samples.json")["w8a8"]
    assert row.n == 9
    assert (row.wall_p50_ms, row.wall_p90_ms, row.speedup, row.wall_ratio) == (None,) * 4


def test_without_a_float_artifact_there_is_nothing_to_compare_with() -> None:
    samples = [_samples(HARNESS, 1, 1), _samples("w8a8", 2, 1)]
    row = latencies(INFO, samples, threads=1, samples_file="samples.json")["w8a8"]
    assert row.wall_p50_ms == 2
    assert row.speedup is None


@pytest.mark.parametrize("lost", ["float", "w8a8"])
def test_an_artifact_that_failed_is_a_row_beside_the_others(lost: str) -> None:
    samples = [_samples(HARNESS, 1, 1), _samples("float", 4, 3), _samples("w8a8", 2, 1)]
    gave = [Samples(label=lost, error="it broke") if s.label == lost else s for s in samples]
    rows = latencies(INFO, gave, threads=1, samples_file="samples.json")
    assert (rows[lost].outcome, rows[lost].reason, rows[lost].device) == (
        "failed",
        "it broke",
        "local",
    )
    other = rows["float" if lost == "w8a8" else "w8a8"]
    assert other.outcome == "measured"
    assert other.speedup == (1 if lost == "w8a8" else None)


def test_rows_say_whether_something_else_than_the_cpu_computed() -> None:
    samples = [_samples(HARNESS, 1, 1), _samples("float", 4, 3)]
    for accelerated in (False, True):
        info = replace(INFO, accelerated=accelerated)
        row = latencies(info, samples, threads=1, samples_file="samples.json")["float"]
        assert row.accelerated is accelerated
