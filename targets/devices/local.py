"""This machine's CPU.

In: artifacts and one image. Out: raw times. Every artifact is timed in a process of its own; the
processes take turns, so that a float and an int8 artifact see the same noise.
"""

from __future__ import annotations

import pkgutil
import platform
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import EdgeError
from pipeline.records import DeviceState
from pipeline.store import installed_versions
from pipeline.worker import NOTHING, Worker
from targets.base import (
    HOST,
    DeviceInfo,
    Job,
    NotRun,
    Samples,
    kind_here,
    run_padded,
    runtime,
    settled,
)
from targets.devices._runner import cores, energy_uj, spent_mj, state

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from pipeline.records import Isa
    from pipeline.worker import Progress, Reply
    from targets.base import Image, Logits, Runtime, Session

WARM_UP = 4
ISA_FLAGS = [
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_fp16",
    "avx_vnni",
    "avx10_1",
    "amx_int8",
    "neon",
    "asimd",
    "asimdhp",
    "asimddp",
    "i8mm",
    "sve",
    "sve2",
    "fp16",
]
ARM_FLAGS = frozenset({"neon", "asimd"})
VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "avx10_1"})


class Local:
    """The device `local`; another that runs artifacts in this machine's processes refines it.

    Attributes:
        loader: `module:function` that loads an artifact in a worker process; it takes what
            `load_artifact` takes.
    """

    name = "local"
    loader = f"{__name__}:load_artifact"

    def environment(self) -> Mapping[str, str]:
        """Return variables of the worker processes."""
        return NOTHING

    def probe(self) -> DeviceInfo | NotRun:
        """Describe this machine."""
        return DeviceInfo(
            name=self.name,
            kind="host",
            isa=isa_flags(),
            description=cpu_name(),
            cores=available_cores(),
            machine=HOST,
        )

    def can_run(self, wanted: Runtime) -> NotRun | None:
        """Ask the runtime, which runs in this very environment; interpreting is no running."""
        cannot = wanted.can_run()
        if cannot is None and kind_here(wanted) == "interpreted":
            system = wanted.capabilities.native_on
            return NotRun(reason=f"interpreted here, which tells no time: {system} runs it")
        return cannot

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
        """Time the jobs in turn; see `targets.base.Device`."""
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="convnext-edge-")))
            np.save(folder / "image.npy", image)
            workers = [
                stack.enter_context(Worker(folder / f"{i}.log", environment=self.environment()))
                for i in range(len(jobs))
            ]
            gave: dict[str, Samples | EdgeError] = {}
            before = DeviceState(**state())
            for worker, job in zip(workers, jobs, strict=True):
                with _noted(gave, job):
                    loaded = worker.call(
                        f"{__name__}:load_job",
                        name=job.runtime,
                        path=str(job.path) if job.path else None,
                        image=str(folder / "image.npy"),
                        threads=threads,
                        loader=self.loader,
                    ).value
                    gave[job.label] = Samples(label=job.label, energy_mj=0.0, **loaded)
            for turn in range(rounds * len(jobs)):
                job, worker = jobs[turn % len(jobs)], workers[turn % len(jobs)]
                known = gave[job.label]
                if isinstance(known, Samples):
                    with _noted(gave, job):
                        reply = worker.call(f"{__name__}:time_job", inferences=per_round)
                        gave[job.label] = _added(known, reply, rounds * per_round)
                progress(turn + 1, rounds * len(jobs))
            after = DeviceState(**state())
        return [replace(one, before=before, after=after) for one in settled(jobs, gave)]

    def infer(
        self, job: Job, images: Image, *, batch: int, threads: int, progress: Progress
    ) -> Logits:
        """Run images through an artifact in a process of its own; see `targets.base.Device`."""
        with TemporaryDirectory(prefix="convnext-edge-") as name:
            folder = Path(name)
            np.save(folder / "images.npy", images)
            with Worker(folder / "worker.log", environment=self.environment()) as worker:
                worker.call(
                    f"{__name__}:infer_job",
                    progress=progress,
                    name=job.runtime,
                    path=str(job.path),
                    images=str(folder / "images.npy"),
                    batch=batch,
                    threads=threads,
                    logits=str(folder / "logits.npy"),
                    loader=self.loader,
                )
            logits: Logits = np.load(folder / "logits.npy")
        return logits


@contextmanager
def _noted(gave: dict[str, Samples | EdgeError], job: Job) -> Iterator[None]:
    """Note what goes wrong with a job in place of what it gave."""
    try:
        yield
    except EdgeError as error:
        gave[job.label] = error


def _added(known: Samples, turn: Reply, inferences: int) -> Samples:
    """Add a turn to what a job gave; its energy is the mean of so many inferences."""
    said = turn.value
    lacks = known.energy_mj is None or said["energy_mj"] is None
    return replace(
        known,
        wall_ms=(*known.wall_ms, *said["wall_ms"]),
        cpu_ms=(*known.cpu_ms, *said["cpu_ms"]),
        energy_mj=None if lacks else known.energy_mj + said["energy_mj"] / inferences,
        peak_memory_bytes=turn.peak_memory_bytes,
    )


_job: list[tuple[Session, Image]] = []
"""The one job of this worker process."""


def load_artifact(name: str, path: Path, threads: int) -> Session:
    """Load an artifact for this machine's CPU.

    Args:
        name: The runtime.
        path: The artifact.
        threads: For the runtime.
    """
    return runtime(name).load(path, threads)


def load_job(
    name: str, path: str | None, image: str, threads: int, loader: str, progress: Progress
) -> dict[str, Any]:
    """Load an artifact in a worker and run it for the first time, then warm it up.

    Args:
        name: The runtime.
        path: The artifact; None loads the null session, which does nothing.
        image: An .npy file with one input.
        threads: For the runtime.
        loader: The device's.
        progress: Called once.

    Returns:
        `load_ms`, `first_ms` and the `versions` of the runtime's distributions.
    """
    pixels = np.load(image)
    started = time.perf_counter()
    session = _null_session if path is None else _loaded(loader, name, path, threads)
    load_ms = 1000 * (time.perf_counter() - started)
    started = time.perf_counter()
    session(pixels)
    first_ms = 1000 * (time.perf_counter() - started)
    for _ in range(WARM_UP):
        session(pixels)
    _job[:] = [(session, pixels)]
    progress(1, 1)
    wanted = () if path is None else runtime(name).capabilities.distributions
    return {"load_ms": load_ms, "first_ms": first_ms, "versions": installed_versions(wanted)}


def time_job(inferences: int, progress: Progress) -> dict[str, Any]:
    """Run the loaded job and take the time of every inference.

    Args:
        inferences: How many.
        progress: Called once.

    Returns:
        `wall_ms` and `cpu_ms` (all threads of the process), one value per inference; `energy_mj`,
        of all of them, None where no counter tells.
    """
    session, pixels = _job[0]
    wall, cpu, energy = [], [], energy_uj()
    for _ in range(inferences):
        wall_before, cpu_before = time.perf_counter_ns(), time.process_time_ns()
        session(pixels)
        cpu.append((time.process_time_ns() - cpu_before) / 1e6)
        wall.append((time.perf_counter_ns() - wall_before) / 1e6)
    spent = spent_mj(energy, energy_uj())
    progress(1, 1)
    return {"wall_ms": wall, "cpu_ms": cpu, "energy_mj": spent}


def infer_job(
    name: str,
    path: str,
    images: str,
    batch: int,
    threads: int,
    logits: str,
    loader: str,
    progress: Progress,
) -> None:
    """Run images through an artifact in a worker.

    Args:
        name: The runtime.
        path: The artifact.
        images: An .npy file, float32 (N, C, H, W).
        batch: What the artifact takes.
        threads: For the runtime.
        logits: Takes the .npy file with float32 (N, classes).
        loader: The device's.
        progress: Called per batch.
    """
    pixels, session = np.load(images), _loaded(loader, name, path, threads)
    found = []
    for start in range(0, len(pixels), batch):
        found.append(run_padded(session, pixels[start : start + batch], batch))
        progress(min(start + batch, len(pixels)), len(pixels))
    np.save(logits, np.concatenate(found))


def _loaded(loader: str, name: str, path: str, threads: int) -> Session:
    session: Session = pkgutil.resolve_name(loader)(name, Path(path), threads)
    return session


def _null_session(image: Image) -> Logits:
    return image[:, 0, 0, :1]


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(cores())


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string")
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def isa_flags() -> tuple[str, ...]:
    """Return the flags that decide which integer kernels a runtime may use."""
    if sys.platform == "darwin":
        features = _sysctl("machdep.cpu.leaf7_features").lower()
        found = (
            {"neon", "asimdhp", "asimddp"}
            if platform.machine() == "arm64"
            else set(features.split())
        )
        return tuple(flag for flag in ISA_FLAGS if flag in found)
    info = _cpuinfo()
    words = set(f"{info.get('flags', '')} {info.get('Features', '')}".split())
    return tuple(flag for flag in ISA_FLAGS if flag in words)


def host_isa() -> Isa:
    """Return this machine's ISA; an x86 that does not say so is taken to lack VNNI."""
    silent: Isa = "arm" if platform.machine().lower() in {"arm64", "aarch64"} else "avx2"
    return isa_of(isa_flags()) or silent


def isa_of(flags: Collection[str]) -> Isa | None:
    """Return the ISA that a device's flags are of; None where they do not say."""
    known = set(flags)
    if ARM_FLAGS & known:
        return "arm"
    if VNNI_FLAGS & known:
        return "vnni"
    return "avx2" if "avx2" in known else None


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _sysctl(name: str) -> str:
    answer = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=False)
    return answer.stdout.strip()


DEVICE = Local()
