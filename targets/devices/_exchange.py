"""What is asked of the on-device runner, and what it answers.

In: jobs and images. Out: a `Task`, the JSON that `_runner.py` reads with the files it names; and
from the runner's result, validated, `Samples`, logits or one line that says what went wrong there.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from pipeline.errors import DeviceError, EdgeError
from pipeline.records import DeviceState
from pipeline.store import sha256_bytes
from targets.base import Job, Samples, runtime, settled
from targets.devices import _runner
from targets.devices.local import ISA_FLAGS, WARM_UP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.worker import Progress
    from targets.base import Image, Logits

DIGITS = 16
RUNNER = Path(_runner.__file__)
JOBS, RESULT, LOGITS = "JOBS.json", "RESULT.json", "logits.npy"
IMAGES = "images.npy"

_Ms = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Line = Annotated[str, Field(max_length=2000)]


class Machine(BaseModel):
    """What a device is, as the runner sees it."""

    description: _Line
    machine: _Line
    id: _Line
    cores: Annotated[int, Field(gt=0)]
    isa: list[_Line]
    python: _Line
    os: _Line
    packages: dict[str, _Line]

    @property
    def whole(self) -> str:
        """What it is called by every address it has; empty where it does not tell.

        Source: machine-id(5), which asks that the id itself be shown to nobody.
        """
        return sha256_bytes(f"convnext-edge {self.id}".encode())[:DIGITS] if self.id else ""

    @property
    def known_isa(self) -> tuple[str, ...]:
        """The flags that decide which integer kernels a runtime may use."""
        return tuple(flag for flag in ISA_FLAGS if flag in self.isa)


class Timed(BaseModel):
    """One job's row."""

    label: str
    wall_ms: list[_Ms]
    cpu_ms: list[_Ms]
    load_ms: _Ms | None
    first_ms: _Ms | None
    peak_memory_bytes: Annotated[int, Field(gt=0)] | None
    versions: dict[str, str]
    error: str | None
    energy_mj: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


class Result(BaseModel):
    """All of RESULT.json."""

    runner: Literal[1]
    machine: Machine
    before: DeviceState
    after: DeviceState
    jobs: list[Timed]
    error: str | None
    maps: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One call of the runner.

    Attributes:
        what: JOBS.json.
        files: What must lie in the same folder, by name there.
        outputs: What the runner leaves there beside its result.
        labels: Of the rows that the answer must have.
        samples: That each of them must have.
    """

    what: dict[str, Any]
    files: dict[str, Path] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    samples: int = 0

    def write(self, folder: Path) -> Path:
        """Write JOBS.json into a folder and return its path."""
        path = folder / JOBS
        path.write_text(json.dumps(self.what))
        return path


PROBE = Task(what={"task": "probe"})


def timing(
    jobs: Sequence[Job],
    image: Image,
    folder: Path,
    *,
    rounds: int,
    per_round: int,
    threads: int,
    processes: bool = True,
    marks: bool = False,
) -> Task:
    """Ask for times.

    Args:
        jobs: In the order in which they take turns.
        image: One input: float32 pixels, NCHW.
        folder: Takes the input as a file.
        rounds: Turns of each.
        per_round: Inferences of a turn.
        threads: For the runtime.
        processes: Whether each job gets a process of its own on the device.
        marks: Whether inferences are marked for who counts from outside.
    """
    files = {IMAGES: _written(image, folder)}
    wanted = [_wanted(index, job, files) for index, job in enumerate(jobs)]
    what = {
        "task": "measure",
        "image": IMAGES,
        "threads": threads,
        "rounds": rounds,
        "per_round": per_round,
        "warm_up": WARM_UP,
        "processes": processes,
        "marks": marks,
        "jobs": wanted,
    }
    labels = tuple(job.label for job in jobs)
    return Task(what=what, files=files, labels=labels, samples=rounds * per_round)


def inferring(job: Job, images: Image, folder: Path, *, batch: int, threads: int) -> Task:
    """Ask for logits, which the runner leaves in `LOGITS`; see `targets.base.Device.infer`."""
    files = {IMAGES: _written(images, folder)}
    what = {
        "task": "infer",
        "images": IMAGES,
        "batch": batch,
        "threads": threads,
        "job": _wanted(0, job, files),
        "logits": LOGITS,
    }
    return Task(what=what, files=files, outputs=(LOGITS,), labels=(job.label,))


def read_result(data: bytes, task: Task, device: str) -> Result:
    """Read what the runner answered to a task.

    Args:
        data: RESULT.json.
        task: What it was asked.
        device: Its name, for the message.

    Raises:
        DeviceError: It is no answer to the task, or says that something went wrong there.
    """
    try:
        result = Result.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise garbage(device, f"{where or RESULT}: {first['msg']}") from error
    if result.error:
        raise failed(device, "the task", result.error)
    if tuple(row.label for row in result.jobs) != task.labels:
        raise garbage(device, f"rows {[row.label for row in result.jobs]}")
    for row in result.jobs:
        if row.error is None and not len(row.wall_ms) == len(row.cpu_ms) == task.samples:
            raise garbage(device, f"{len(row.wall_ms)} samples of {row.label}")
    return result


def samples(result: Result, jobs: Sequence[Job], device: str) -> list[Samples]:
    """Return what the jobs of a validated result gave.

    Raises:
        DeviceError: As `targets.base.settled`.
    """
    gave: dict[str, Samples | EdgeError] = {}
    for row in result.jobs:
        gave[row.label] = (
            Samples(
                label=row.label,
                wall_ms=tuple(row.wall_ms),
                cpu_ms=tuple(row.cpu_ms),
                load_ms=row.load_ms,
                first_ms=row.first_ms,
                peak_memory_bytes=row.peak_memory_bytes,
                energy_mj=None if row.energy_mj is None else row.energy_mj / len(row.wall_ms),
                versions=row.versions,
            )
            if row.error is None
            else failed(device, row.label, row.error)
        )
    found = settled(jobs, gave)
    return [replace(one, before=result.before, after=result.after) for one in found]


def read_logits(folder: Path, result: Result, images: int, device: str) -> Logits:
    """Read the logits that the runner wrote.

    Raises:
        DeviceError: There are none, or they are not one row of float32 per image.
    """
    for row in result.jobs:
        if row.error is not None:
            raise failed(device, row.label, row.error)
    try:
        logits: Logits = np.load(folder / LOGITS, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise garbage(device, f"logits that are no array ({error})") from error
    if logits.dtype != np.float32 or logits.ndim != 2 or len(logits) != images:  # noqa: PLR2004
        raise garbage(device, f"logits {logits.dtype} {logits.shape} of {images} images")
    return logits


def tell(line: str, progress: Progress) -> None:
    """Pass a line of the runner's progress on; a line cut off in the middle is none."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        said = json.loads(line)
        progress(int(said["done"]), int(said["total"]))


def garbage(device: str, got: str) -> DeviceError:
    """Return the error that says that a device answers something else than what is asked."""
    return DeviceError(
        f"{device} does not answer as the runner does: {got}",
        allowed="what the runner of this version writes, and a login that prints nothing itself",
        do="Look at what a login there prints, and try again",
    )


def failed(device: str, what: str, why: str) -> DeviceError:
    """Return the error that says that something went wrong in the runner."""
    if "ModuleNotFoundError" in why:
        missing = why.partition("'")[2].partition("'")[0] or why
        return lacks(device, missing)
    return DeviceError(
        f"{device}: {what} failed: {why}",
        allowed="an artifact and a runtime that go together there",
        do="Compare the runtime's version there with constraints.txt",
    )


def lacks(device: str, what: str) -> DeviceError:
    """Return the error that says that a package is missing on a device."""
    return DeviceError(
        f"{device} has no {what}",
        allowed="Python 3.9 or later there, with numpy and the runtime's package",
        do=f"Install {what} there",
    )


def _written(images: Image, folder: Path) -> Path:
    """Write images to a file; pixels that are whole take a byte each."""
    path, small = folder / IMAGES, images.astype(np.uint8)
    np.save(path, small if np.array_equal(small, images) else images)
    return path


def _wanted(index: int, job: Job, files: dict[str, Path]) -> dict[str, Any]:
    """Return a job in the runner's words; its files get names of their own."""
    name = None
    if job.path is not None:
        name = f"{index}{job.path.suffix}"
        files[name] = job.path
        weights = job.path.with_suffix(".bin")  # OpenVINO's lie beside the .xml
        if job.path.suffix == ".xml" and weights.is_file():
            files[f"{index}.bin"] = weights
    layout = runtime(job.runtime).capabilities.layout
    return {"label": job.label, "runtime": job.runtime, "path": name, "layout": layout}
