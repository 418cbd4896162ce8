"""What a run prints: what was asked for and nothing else, and why what is missing is."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.records import Accuracy, Latency, Layout, Parity, Place
from pipeline.results import Asked, print_results, unreached
from reports.document import Report

AVX2 = Place(device="cpu:avx2", threads=1)
MEASURED = Accuracy(outcome="measured", kind="host", n=10, top1=0.9, sqnr_db=40.0)


def times(device: str, wall_ms: float, **more: Any) -> Latency:
    return Latency(
        device=device,
        outcome="measured",
        threads=1,
        wall_p50_ms=wall_ms,
        cpu_p50_ms=wall_ms,
        **more,
    )


def report(
    *latency: Latency, parity: tuple[Parity, ...] = (), layouts: tuple[Layout, ...] = ()
) -> Report:
    return Report.model_validate(
        {
            "host": {"cpu": "a cpu", "isa": [], "os": "os", "python": "3", "packages": {}},
            "model": {
                "checkpoint_sha256": "c", "dialect": "own", "variant": "custom", "params": 1,
                "macs": 1, "input_size": 32, "classes": 10,
            },
            "data": {"calibration": None, "evaluation": None},
            "float": {"top1": None, "n": None},
            "artifacts": [{
                "runtime": "onnx", "scheme": "w8a8", "placement": "all", "graph_form": "f",
                "path": "p", "sha256": "0", "size_bytes": 1_500_000, "profile": "full",
                "accuracy": MEASURED, "latency": latency,
            }],
            "agreement": [],
            "gate": {"outcome": "not_run", "checks": []},
            "parity": parity,
            "layouts": layouts,
        }
    )  # fmt: skip


def printed(found: Report, asked: Asked) -> str:
    stream = io.StringIO()
    print_results(found, Path("run"), Console(file=stream, width=100), asked)
    return stream.getvalue()


def test_the_run_s_own_device_is_named_under_its_times() -> None:
    said = printed(report(times("local", 12.0), times("cpu:avx2", 34.0)), Asked())
    assert "12.00" in said
    assert "ms: median wall time on local, 1 thread" in said
    assert "34.00" not in said


def test_times_that_something_else_made_longer_are_warned_of() -> None:
    waited = Latency(
        device="local", outcome="measured", threads=1, wall_p50_ms=22.5, cpu_p50_ms=10.0
    )
    said = printed(report(waited), Asked())
    assert "wall over CPU time is onnx w8a8 2.25" in said
    assert "bench RUN_DIR --again" in said
    assert "disturbed" not in printed(report(times("local", 12.0)), Asked())


def test_another_device_s_times_are_its_own_and_stand_alone() -> None:
    ratio = {"cpu_ratio": 0.5, "cpu_ratio_ci95": (0.4, 0.6), "speedup": 2.0}
    found = report(times("local", 12.0), times("cpu:avx2", 34.0, **ratio))
    said = printed(found, Asked(here=False, places=(AVX2,)))
    assert "cpu:avx2, 1 thread" in said
    assert "34.00" in said
    assert "0.50 (0.40 to 0.60)" in said
    assert "12.00" not in said
    assert "SQNR" not in said


def test_the_units_that_a_plan_uses_are_told() -> None:
    row = times("coreml:cpu-ne", 3.0, operations_on={"Neural Engine": 12, "CPU": 30})
    said = printed(report(row), Asked(here=False, places=(Place(device="coreml:cpu-ne"),)))
    assert "operations of onnx w8a8: 30 on CPU, 12 on Neural Engine" in said
    said = printed(report(times("local", 12.0)), Asked(here=False, places=(Place(device="local"),)))
    assert "operations of" not in said


def test_threads_tell_the_places_of_one_device_apart() -> None:
    two = Latency(device="cpu:avx2", outcome="measured", threads=2, wall_p50_ms=9.0)
    found = report(times("local", 12.0), times("cpu:avx2", 34.0), two)
    said = printed(found, Asked(here=False, places=(Place(device="cpu:avx2", threads=2),)))
    assert "cpu:avx2, 2 threads" in said
    assert "9.00" in said
    assert "34.00" not in said


def test_where_instructions_are_counted_no_time_is_told() -> None:
    counted = Latency(
        device="emulated-arm64:pi5", outcome="measured", kind="emulated", threads=1,
        instructions=1_234_567, instruction_ratio=0.431, instruction_spread=0.0,
    )  # fmt: skip
    asked = Asked(here=False, places=(Place(device="emulated-arm64:pi5"),))
    said = printed(report(times("local", 12.0), counted), asked)
    assert "1,234,567" in said
    assert "0.431" in said
    assert "ms" not in said


def outputs(diff_over_error: float | None, device: str = "cpu:avx2") -> Parity:
    return Parity(
        device=device, runtime="onnx", scheme="w8a8", outcome="measured", against="reference",
        n=100, top1_agreement=0.97, max_abs_logit_diff=0.14, diff_over_error=diff_over_error,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("device", "error", "warns", "advises"),
    [
        ("cpu:avx2", 2.43, 1, 1),
        ("cpu:avx2", 0.99, 0, 0),
        ("cpu:avx2", None, 0, 0),
        ("ssh:pi", 2.43, 1, 0),  # an ARM board does not saturate
    ],
)
def test_outputs_of_a_device_are_told_and_more_than_quantizing_is_warned_of(
    device: str, error: float | None, warns: int, advises: int
) -> None:
    found = report(times("local", 12.0), parity=(outputs(error, device),))
    said = printed(found, Asked(here=False, places=(Place(device=device),), what="parity"))
    assert "97.00%" in said
    assert "12.00" not in said
    assert said.count("changes as much as quantization does") == warns
    assert said.count("--isa avx2") == advises


def test_integers_that_keep_headroom_are_warned_of_without_advice_to_keep_it() -> None:
    found = report(times("local", 12.0), parity=(outputs(7.0),))
    (row,) = found.artifacts
    found = found.model_copy(update={"artifacts": (row.model_copy(update={"profile": "avx2"}),)})
    said = printed(found, Asked(here=False, places=(AVX2,), what="parity"))
    assert "onnx w8a8: cpu:avx2 changes as much" in said
    assert "--isa avx2" not in said


def test_outputs_of_a_device_are_told_once_whatever_its_threads() -> None:
    found = report(parity=(outputs(0.5),))
    places = (AVX2, Place(device="cpu:avx2", threads=2))
    said = printed(found, Asked(here=False, places=places, what="parity"))
    assert said.count("outputs on cpu:avx2") == 1


def test_a_device_that_gave_nothing_is_a_failure_and_no_table() -> None:
    away = Latency(device="cpu:avx2", outcome="not_run", threads=1, reason="it is away")
    asked = Asked(here=False, places=(AVX2,))
    assert unreached(report(times("local", 1.0), away), asked) == [
        "cpu:avx2 measured nothing: it is away"
    ]
    assert "away" not in printed(report(times("local", 1.0), away), asked)
    assert unreached(report(times("local", 1.0), times("cpu:avx2", 2.0)), asked) == []
    gone = Parity(device="cpu:avx2", runtime="onnx", scheme="w8a8", outcome="not_run", reason="no")
    found = report(times("cpu:avx2", 1.0), parity=(gone,))
    assert unreached(found, Asked(here=False, places=(AVX2,), what="parity")) == [
        "cpu:avx2 measured nothing: no"
    ]


def test_every_reason_for_nothing_is_told_once() -> None:
    found = report(
        Latency(device="cpu:avx2", outcome="not_run", threads=1, reason="not installed"),
        Latency(device="cpu:avx2", outcome="not_run", threads=1, reason="macOS only"),
        Latency(device="cpu:avx2", outcome="not_run", threads=1, reason="macOS only"),
    )
    assert unreached(found, Asked(here=False, places=(AVX2,))) == [
        "cpu:avx2 measured nothing: not installed; macOS only"
    ]


def layout(runtime: str, reason: str) -> Layout:
    return Layout(
        runtime=runtime, source="default", reason=reason, isa="vnni", scheme="w8a8",
        placement="pointwise", graph_form="f", float_form="f",
    )  # fmt: skip


def test_a_default_says_why_it_was_not_measured_once_for_all_runtimes() -> None:
    why = "its artifacts are for vnni, and cpu:avx2 has avx2"
    layouts = (layout("onnx", why), layout("openvino", why), layout("tflite", "--tune off"))
    said = printed(report(layouts=layouts), Asked())
    assert f"onnx, openvino: default form and placement ({why})" in said.replace("\n", " ")
    assert "tflite" not in said
