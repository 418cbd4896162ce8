"""Where artifacts' time goes on a device that says so itself.

In: artifacts and a `targets.base.Profiled`. Out: a `Breakdown` of each. There is no floor and no
roofline in it: those are of this machine.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from pipeline.errors import ArtifactError, DeviceError
from pipeline.records import Breakdown
from pipeline.store import Stage, file_stem
from targets import base
from targets.breakdown import INFERENCES, by_kind

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pipeline.records import Artifact
    from pipeline.stages import Stages
    from pipeline.worker import Progress

FOUND = "breakdown.json"


def told(
    stages: Stages,
    device: base.Profiled,
    info: base.DeviceInfo,
    artifacts: Sequence[Artifact],
    *,
    asked: bool,
) -> list[Breakdown]:
    """Return what a device says of artifacts that it can run.

    Args:
        stages: Where results are kept.
        device: It.
        info: What it is.
        artifacts: Of a run.
        asked: Whether to ask for what is missing, or only to take over what was finished before.
    """
    rows = (_told(stages, device, info, one, asked=asked) for one in artifacts)
    return [row for row in rows if row is not None]


def _told(
    stages: Stages,
    device: base.Profiled,
    info: base.DeviceInfo,
    artifact: Artifact,
    *,
    asked: bool,
) -> Breakdown | None:
    wanted = artifact.export
    stage = Stage(
        name=f"breakdown-{file_stem(info.name)}-{artifact.name}",
        modules=("targets.breakdown", type(device).__module__),
        inputs=artifact.files,
        settings={"device": asdict(info)},
        libraries=(),
    )
    if not stages.is_done(stage) and (not asked or device.can_run(base.runtime(wanted.runtime))):
        return None

    def make(folder: Path, progress: Progress) -> None:
        progress(0, 1)
        job = base.Job(label=artifact.name, runtime=wanted.runtime, path=stages.out / artifact.path)
        found = device.op_times(job, threads=1, inferences=INFERENCES)
        said: dict[str, Any] = {"outcome": "not_run"}
        if isinstance(found, base.NotRun):
            said["reason"] = found.reason
        else:
            method = (
                f"{wanted.runtime}'s profiler there, means of {INFERENCES} inferences, 1 thread"
            )
            said = {"outcome": "measured", "method": method, **by_kind(found)}
        (folder / FOUND).write_bytes(TypeAdapter(dict[str, Any]).dump_json(said, indent=1))

    who = {"runtime": wanted.runtime, "scheme": wanted.scheme, "device": info.name}
    try:
        text = (stages.do_here(stage, make) / FOUND).read_bytes()
    except (ArtifactError, DeviceError) as error:
        return TypeAdapter(Breakdown).validate_python(
            {**who, "outcome": "failed", "reason": str(error)}
        )
    said = TypeAdapter(dict[str, Any]).validate_json(text)
    return TypeAdapter(Breakdown).validate_python({**who, **said})
