"""What measurements are turned into."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.display import Display
from pipeline.errors import DeviceError
from pipeline.measure import Timing, time_saved
from pipeline.records import Artifact, Export, Latency, Proof, Scheme
from pipeline.stages import Stages
from targets.base import DeviceInfo, Job, NotRun, Samples


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


class Board:
    """A device that is far away."""

    name = "board"

    def can_run(self, wanted: object) -> NotRun:
        pytest.fail("nobody asked it")


class Process(Board):
    """A device of this machine."""

    def environment(self) -> dict[str, str]:
        return {}

    def can_run(self, wanted: object) -> NotRun:
        return NotRun(reason="only macOS runs it")


def measure_nothing(*_: Any, **__: Any) -> Any:
    pytest.fail("nobody asked for it")


for method in ("probe", "measure", "infer"):
    setattr(Board, method, measure_nothing)

ASK = "not asked in this run: `convnext-edge bench RUN_DIR --device board{}` asks again"


@pytest.mark.parametrize(
    ("device", "threads", "reason"),
    [
        (Process(), 1, "only macOS runs it"),
        (Board(), 1, ASK.format("")),
        (Board(), 2, ASK.format(" --threads 2")),
    ],
)
def test_a_device_of_this_machine_says_why_it_measured_nothing_whoever_asks(
    device: Any, threads: int, reason: str, tmp_path: Path
) -> None:
    info = DeviceInfo(name="board", kind="host", isa=(), description="", cores=2)
    timing = Timing(
        Stages(tmp_path, Display(), cores=1), device, threads=threads, image_shape=(1, 3, 8, 8),
        asked=False, info=info,
    )  # fmt: skip
    (row,) = timing.run([artifact("coreml", "w8a8")])
    assert (row.outcome, row.reason) == ("not_run", reason)


class Failing(Board):
    """A board on which integers fail as often as it is told."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def can_run(self, wanted: object) -> Any:
        return None

    def measure(self, jobs: Sequence[Job], image: Any, **_: Any) -> list[Samples]:
        self.failures -= 1
        return [
            Samples(label=job.label, error="it broke")
            if job.label == "w8a8" and self.failures >= 0
            else Samples(label=job.label, wall_ms=(1.0,) * 72, cpu_ms=(1.0,) * 72)
            for job in jobs
        ]


def test_what_failed_beside_others_is_tried_again_when_it_is_asked_for(tmp_path: Path) -> None:
    board: Any = Failing(failures=1)
    info = DeviceInfo(name="board", kind="device", isa=(), description="", cores=2)

    def outcomes(*, asked: bool) -> list[str]:
        timing = Timing(
            Stages(tmp_path, Display(), cores=1), board, threads=1, image_shape=(1, 3, 8, 8),
            asked=asked, info=info,
        )  # fmt: skip
        rows = timing.run([artifact("onnx", "float"), artifact("onnx", "w8a8")])
        return [row.outcome for row in rows]

    assert outcomes(asked=True) == ["measured", "failed"]
    assert outcomes(asked=False) == ["measured", "failed"]
    assert outcomes(asked=True) == ["measured", "measured"]
    assert board.failures == -1
    assert outcomes(asked=True) == ["measured", "measured"]
    assert board.failures == -1


def test_a_retry_that_fails_leaves_what_was_measured(tmp_path: Path) -> None:
    class Once(Failing):
        """It is there for one call."""

        def measure(self, jobs: Sequence[Job], image: Any, **how: Any) -> list[Samples]:
            if self.failures < 1:
                raise DeviceError("it is off", allowed="a board that is on", do="Switch it on")
            return super().measure(jobs, image, **how)

    board: Any = Once(failures=1)
    info = DeviceInfo(name="board", kind="device", isa=(), description="", cores=2)
    for _ in range(2):
        timing = Timing(
            Stages(tmp_path, Display(), cores=1), board, threads=1, image_shape=(1, 3, 8, 8),
            asked=True, info=info,
        )  # fmt: skip
        rows = timing.run([artifact("onnx", "float"), artifact("onnx", "w8a8")])
        assert [row.outcome for row in rows] == ["measured", "failed"]
