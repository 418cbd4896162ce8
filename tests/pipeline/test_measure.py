"""What measurements are turned into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.display import Display
from pipeline.measure import Timing, time_saved
from pipeline.records import Artifact, Export, Latency, Proof, Scheme
from pipeline.stages import Stages
from targets.base import HOST, DeviceInfo, NotRun


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


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (HOST, "only macOS runs it"),
        # Far away: it is not asked, and what it would say is not known.
        ("", "not asked in this run: `convnext-edge bench RUN_DIR --device board` asks it again"),
    ],
)
def test_a_device_of_this_machine_says_why_it_measured_nothing_whoever_asks(
    machine: str, reason: str, tmp_path: Path
) -> None:
    class Board:
        name = "board"

        def can_run(self, wanted: object) -> NotRun:
            assert machine == HOST, "it is far away, and nobody asked"
            return NotRun(reason="only macOS runs it")

    board: Any = Board()
    info = DeviceInfo(name="board", kind="host", isa=(), description="", cores=1, machine=machine)
    timing = Timing(
        Stages(tmp_path, Display(), cores=1), board, threads=1, image_shape=(1, 3, 8, 8),
        asked=False, info=info,
    )  # fmt: skip
    (row,) = timing.run([artifact("coreml", "w8a8")])
    assert (row.outcome, row.reason) == ("not_run", reason)
