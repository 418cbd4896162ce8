"""Two runs' latencies beside each other: significance and factor together, on planted samples."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter
from rich.console import Console

from pipeline.benchmark import PER_ROUND, ROUNDS
from pipeline.errors import ArtifactError
from pipeline.statistics import change
from reports import comparison
from reports.comparison import _tested, compare_runs
from reports.document import read_report
from targets.base import Samples

FILE = "samples/local-onnx/samples.json"


def samples(label: str, ms: float, *, noise: float = 0.01, seed: int = 0) -> Samples:
    drawn = np.random.default_rng(seed).lognormal(0, noise, ROUNDS * PER_ROUND)
    times = tuple(float(ms * value) for value in drawn)
    return Samples(
        label=label,
        wall_ms=tuple(2 * value for value in times),
        cpu_ms=times,
        load_ms=1.0,
        first_ms=1.0,
        peak_memory_bytes=1,
        versions={},
    )


def described(text: str, **versions: str) -> list[dict[str, Any]]:
    return [{
        "name": "board", "kind": "device", "description": text, "isa": [], "cores": 4,
        "versions": versions,
    }]  # fmt: skip


def run_folder(
    folder: Path,
    item: Samples,
    *,
    cpu: str = "a cpu",
    devices: Sequence[dict[str, Any]] = (),
    **latency: Any,
) -> Path:
    (folder / FILE).parent.mkdir(parents=True)
    (folder / FILE).write_bytes(TypeAdapter(list[Samples]).dump_json([item]))
    row = {
        "device": "local", "outcome": "measured", "kind": "host", "threads": 1,
        "n": len(item.cpu_ms), "cpu_p50_ms": float(np.median(item.cpu_ms)),
        "wall_p50_ms": float(np.median(item.wall_ms)), "samples_file": FILE,
    }  # fmt: skip
    report = {
        "schema": 1,
        "host": {"cpu": cpu, "isa": [], "os": "os", "python": "3", "packages": {}},
        "model": {
            "checkpoint_sha256": "c", "dialect": "own", "variant": "custom", "params": 1,
            "macs": 1, "input_size": 32, "classes": 10,
        },
        "data": {"calibration": None, "evaluation": None},
        "float": {"top1": None, "n": None},
        "artifacts": [{
            "runtime": "onnx", "scheme": item.label, "placement": "all", "graph_form": "f",
            "path": "p", "sha256": "0", "size_bytes": 1,
            "accuracy": {"outcome": "not_run", "reason": "not asked"}, "latency": [row | latency],
        }],
        "agreement": [],
        "gate": {"outcome": "not_run", "checks": []},
        "devices": devices,
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))
    read_report(folder)
    return folder


@pytest.mark.parametrize(
    ("factor", "noise", "verdict"),
    [
        (1.5, 0.01, "slower"),
        (0.5, 0.01, "faster"),
        (1.02, 0.001, "no change shown"),  # significant, and too small to matter
        (1.2, 0.6, "no change shown"),  # large, and no more than noise
        (1.0, 0.01, "no change shown"),
    ],
)
def test_a_change_needs_significance_and_a_factor(
    factor: float, noise: float, verdict: str, tmp_path: Path
) -> None:
    before = run_folder(tmp_path / "a", samples("w8a8", 4.0, noise=noise))
    after = run_folder(tmp_path / "b", samples("w8a8", 4.0 * factor, noise=noise, seed=1))
    (found,) = compare_runs(before, after, "cpu")
    assert found.verdict == verdict
    assert found.unit == "cpu ms"
    assert found.factor is not None
    assert found.ci95 is not None
    if noise <= 0.01:
        assert found.factor == pytest.approx(factor, rel=0.01)
        assert found.ci95[0] <= found.factor <= found.ci95[1]
    if verdict in {"slower", "faster"}:
        assert found.p_value is not None
        assert found.p_value < 0.01


@pytest.mark.parametrize(
    ("factor", "ci95", "p_value", "verdict"),
    [
        (1.2, (1.1, 1.3), 0.001, "slower"),
        (1.2, (1.1, 1.3), 0.01, "no change shown"),
        (1.2, (0.9, 1.5), 0.001, "no change shown"),
        (1.05, (1.01, 1.1), 0.001, "no change shown"),
        (0.9, (0.8, 0.95), 0.001, "faster"),
    ],
)
def test_test_interval_and_factor_must_all_say_so(
    factor: float, ci95: tuple[float, float], p_value: float, verdict: str
) -> None:
    assert comparison._tested(factor, ci95, p_value)[0] == verdict


def test_what_only_one_of_them_has_is_said(tmp_path: Path) -> None:
    before = run_folder(tmp_path / "a", samples("w8a8", 4.0))
    after = run_folder(tmp_path / "b", samples("float", 8.0))
    found = compare_runs(before, after, "wall")
    assert [(one.scheme, one.verdict, one.why) for one in found] == [
        ("float", "not comparable", "the earlier run has no such row"),
        ("w8a8", "not comparable", "the later run has no such row"),
    ]


def test_the_same_file_did_not_change_by_itself(tmp_path: Path) -> None:
    before = run_folder(tmp_path / "a", samples("w8a8", 4.0, noise=0.01))
    after = run_folder(tmp_path / "b", samples("w8a8", 8.0, noise=0.01, seed=1))
    (found,) = compare_runs(before, after, "cpu")
    assert found.verdict == "slower"
    assert "the file is the same" in found.why
    text = (after / "report.json").read_text()
    (after / "report.json").write_text(text.replace('"sha256": "0"', '"sha256": "1"'))
    (found,) = compare_runs(before, after, "cpu")
    assert "the file is the same" not in found.why


def test_what_keeps_a_change_from_being_shown_is_said() -> None:
    assert _tested(1.2, (0.9, 1.5), 0.007)[1] == "p = 0.007, but the factor's interval contains 1"
    assert "noise" in _tested(1.2, (1.1, 1.3), 0.02)[1]
    assert _tested(1.2, (1.1, 1.3), 0.001)[0] == "slower"


def test_a_count_that_one_run_lacks_keeps_its_place_in_the_table(tmp_path: Path) -> None:
    before = run_folder(tmp_path / "a", samples("w8a8", 4.0))
    counted: dict[str, Any] = {"device": "board", "instructions": 1000, "threads": None}
    after = run_folder(tmp_path / "b", samples("w8a8", 4.0), **counted)
    shown = io.StringIO()
    comparison.show(compare_runs(before, after, "wall"), Console(width=40, file=shown))
    (row,) = (line for line in shown.getvalue().splitlines() if "board" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[1:4] == ["board", "—", "—"]
    assert cells[6:] == ["not comparable", "the earlier run has no such row"]


def test_another_cpu_is_not_comparable(tmp_path: Path) -> None:
    before = run_folder(tmp_path / "a", samples("w8a8", 4.0))
    after = run_folder(tmp_path / "b", samples("w8a8", 8.0), cpu="another")
    (found,) = compare_runs(before, after, "wall")
    assert (found.verdict, found.p_value) == ("not comparable", None)
    assert "another" in found.why


def test_another_board_of_the_same_name_is_not_comparable(tmp_path: Path) -> None:
    board: dict[str, Any] = {"device": "board", "kind": "device"}
    folders = [
        run_folder(tmp_path / text, samples("w8a8", 4.0), devices=described(text), **board)
        for text in ("Pi 4", "Pi 5")
    ]
    (found,) = compare_runs(folders[0], folders[1], "wall")
    assert (found.verdict, found.why) == ("not comparable", "board was Pi 4, and is Pi 5")


def test_a_board_whose_system_was_upgraded_is_the_same_board(tmp_path: Path) -> None:
    board: dict[str, Any] = {"device": "board", "kind": "device"}
    devices = [
        [{**described(f"Pi 5, Debian {version}")[0], "hardware": "Pi 5"}] for version in (12, 13)
    ]
    before = run_folder(tmp_path / "a", samples("w8a8", 4.0), devices=devices[0], **board)
    after = run_folder(tmp_path / "b", samples("w8a8", 8.0), devices=devices[1], **board)
    (found,) = compare_runs(before, after, "wall")
    assert found.verdict == "slower"


def test_other_versions_there_are_named(tmp_path: Path) -> None:
    board: dict[str, Any] = {"device": "board", "kind": "device", "versions": {"onnxruntime": "1"}}
    before = run_folder(
        tmp_path / "a", samples("w8a8", 4.0), devices=described("Pi", qemu="7", numpy="2"), **board
    )
    board["versions"] = {"onnxruntime": "2"}
    after = run_folder(
        tmp_path / "b", samples("w8a8", 8.0), devices=described("Pi", qemu="8", numpy="2"), **board
    )
    (found,) = compare_runs(before, after, "wall")
    assert found.verdict == "slower"
    assert found.why.endswith("; onnxruntime 1 then, 2 now; qemu 7 then, 8 now")
    assert "numpy" not in found.why


@pytest.mark.parametrize(
    ("count", "verdict"),
    [(1011, "slower"), (1010, "no change shown"), (991, "no change shown"), (980, "faster")],
)
def test_counts_need_no_test(count: int, verdict: str, tmp_path: Path) -> None:
    nothing = replace(samples("w8a8", 1.0), wall_ms=(), cpu_ms=())
    how: dict[str, Any] = {"kind": "emulated", "cpu_p50_ms": None, "wall_p50_ms": None}
    before = run_folder(tmp_path / "a", nothing, cpu="one host", **how, instructions=1000)
    after = run_folder(tmp_path / "b", nothing, cpu="another", **how, instructions=count)
    (found,) = compare_runs(before, after, "cpu")
    assert (found.verdict, found.unit, found.factor) == (verdict, "instructions", count / 1000)


def test_what_one_run_did_not_measure_is_said(tmp_path: Path) -> None:
    before = run_folder(tmp_path / "a", samples("w8a8", 4.0))
    after = run_folder(
        tmp_path / "b", samples("w8a8", 4.0), outcome="not_run", reason="no board", cpu_p50_ms=None
    )
    (found,) = compare_runs(before, after, "cpu")
    assert found.verdict == "not comparable"
    assert "the later run did not measure it: no board" in found.why


def test_lost_samples_are_one_line(tmp_path: Path) -> None:
    before = run_folder(tmp_path / "a", samples("w8a8", 4.0))
    after = run_folder(tmp_path / "b", samples("w8a8", 4.0))
    (after / FILE).write_text("[")
    with pytest.raises(ArtifactError, match="holds no raw samples"):
        compare_runs(before, after, "cpu")


def test_samples_of_a_round_count_once() -> None:
    # Nine copies of each round's value are no more evidence than one.
    rounds = np.random.default_rng(0).normal(1, 0.1, (2, 8))
    few = change(*(np.repeat(r, 9).tolist() for r in rounds), per_round=9)
    many = change(*(np.repeat(r, 90).tolist() for r in rounds), per_round=90)
    assert few is not None
    assert many is not None
    assert few[2] == many[2]
