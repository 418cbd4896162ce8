"""CoreML on this Mac, with the compute units that it may use.

In: CoreML artifacts and images. Out: raw times and logits, as of `local`, which leaves CoreML all
units; and how many operations CoreML's plan puts on each: it need not use a unit that it may use.
"""

from __future__ import annotations

import contextlib
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pipeline.errors import EdgeError, UsageError
from pipeline.worker import Worker
from targets.base import DeviceInfo, NotRun
from targets.devices.local import Local
from targets.runtimes._coreml_units import ALL, VARIABLE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipeline.worker import Progress
    from targets.base import Image, Job, Runtime, Samples

COREML = "coreml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """Compute units: coremltools' word for them, and a person's."""

    word: str
    named: str


UNITS = {
    "all": Units(word=ALL, named="any unit"),
    "cpu": Units(word="CPU_ONLY", named="the CPU alone"),
    "cpu-gpu": Units(word="CPU_AND_GPU", named="CPU and GPU"),
    "cpu-ne": Units(word="CPU_AND_NE", named="CPU and Neural Engine"),
}


class OnUnits(Local):
    """A device `coreml:UNITS`."""

    def __init__(self, name: str, units: Units) -> None:
        self.name = name
        self.units = units

    def environment(self) -> Mapping[str, str]:
        """Return what tells a process its units."""
        return {VARIABLE: self.units.word}

    def probe(self) -> DeviceInfo | NotRun:
        """Describe this Mac with these units; CoreML is part of the system."""
        system = platform.system()
        if system != "Darwin":
            return NotRun(reason=f"CoreML is on macOS only, and this is {system}")
        info = super().probe()
        if isinstance(info, NotRun):
            return info
        return replace(
            info,
            name=self.name,
            description=f"{info.description}, CoreML on {self.units.named}",
            versions={"macOS": platform.mac_ver()[0]},
        )

    def can_run(self, wanted: Runtime) -> NotRun | None:
        """Take coreml alone."""
        if wanted.name != COREML:
            return NotRun(reason=f"{wanted.name} does not run through CoreML")
        return super().can_run(wanted)

    def measure(
        self,
        jobs: Sequence[Job],
        image: Image,
        *,
        rounds: int,
        per_round: int,
        threads: int,
        progress: Progress,
    ) -> list[Samples]:
        """Time the jobs as `local` does, and say what CoreML's plan puts where."""
        found = super().measure(
            jobs, image, rounds=rounds, per_round=per_round, threads=threads, progress=progress
        )
        with (
            TemporaryDirectory(prefix="convnext-edge-") as folder,
            Worker(Path(folder) / "plan.log", environment=self.environment()) as worker,
        ):
            for index, job in enumerate(jobs):
                if job.path is not None and found[index].error is None:
                    # Before macOS 14.4 there is no plan: the times are the same without.
                    with contextlib.suppress(EdgeError):
                        plan = worker.call(f"{__name__}:planned", path=str(job.path)).value
                        found[index] = replace(found[index], operations_on=plan)
        return found


def planned(path: str, progress: Progress) -> dict[str, int]:
    """Return, in a worker, how many operations of an artifact CoreML's plan puts on each unit.

    Args:
        path: The artifact.
        progress: Called once.
    """
    from targets.runtimes._coreml_plan import preferred_units

    found = dict(preferred_units(Path(path)))
    progress(1, 1)
    return found


class Family:
    """The family `coreml`."""

    name = COREML

    def found(self) -> tuple[str, ...]:
        """Return every choice of units: off macOS each says why it cannot be used."""
        return tuple(UNITS)

    def at(self, address: str) -> OnUnits:
        """Return this Mac with these units; see `targets.base.DeviceFamily`."""
        if address not in UNITS:
            raise UsageError(
                f"unknown compute units: {address or 'none named'}",
                allowed=", ".join(f"{self.name}:{name}" for name in UNITS),
                do="Correct --device",
            )
        return OnUnits(f"{self.name}:{address}", UNITS[address])


DEVICES = Family()
