"""What measurements are turned into."""

from __future__ import annotations

from typing import Any

from pipeline.measure import time_saved
from pipeline.records import Artifact, Export, Latency, Proof, Scheme


def artifact(runtime: str, scheme: Scheme) -> Artifact:
    export = Export(
        runtime=runtime, scheme=scheme, placement="all", graph_form="f", gelu="erf", profile=None
    )
    proof = Proof(
        method="", integer_layers=0, expected_integer_layers=0, weighted_layers=0,
        transposes_per_block=0, quantize_ops_per_block=0, op_counts={},
    )  # fmt: skip
    return Artifact(
        export=export, path="p", sha256="s", size_bytes=1, sites=(), proof=proof, files={},
        export_seconds=0, export_peak_memory_bytes=0,
    )  # fmt: skip


def timed(**values: Any) -> Latency:
    return Latency(device="local", outcome="measured", **values)


def test_what_is_saved_is_float_less_integers() -> None:
    rows = [
        (artifact("onnx", "float"), timed(wall_p50_ms=5.0, float_wall_p50_ms=5.0)),
        (artifact("onnx", "w8a8"), timed(wall_p50_ms=2.0, float_wall_p50_ms=5.0)),
        (artifact("tflite", "w8a8"), timed(wall_p50_ms=4.0, float_wall_p50_ms=3.0)),
        (artifact("coreml", "w8a8"), Latency(device="local", outcome="not_run", reason="no")),
    ]
    assert time_saved(rows) == {"onnx": 3.0, "tflite": -1.0}
