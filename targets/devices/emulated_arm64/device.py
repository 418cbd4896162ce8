"""ARM64 boards, emulated: the runtimes' real ARM builds under QEMU's user mode.

In: artifacts and images. Out: logits, and guest instructions per inference, by kind and by symbol.
An emulator's clock says nothing of a board's, so no time comes out, and no count is made into one.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pipeline.errors import DeviceError, EdgeError, UsageError
from pipeline.store import sha256_file
from pipeline.worker import end_all, ended_with_all, ending, silent
from targets.base import DeviceInfo, NotRun, Samples, settled
from targets.devices._exchange import (
    RESULT,
    RUNNER,
    Result,
    Task,
    failed,
    inferring,
    read_logits,
    read_result,
    tell,
    timing,
)
from targets.devices._workspace import Patience
from targets.devices.emulated_arm64 import guest, plugin, sysroot
from targets.devices.emulated_arm64.counts import read_counts
from targets.devices.emulated_arm64.profiles import PROFILES, Profile
from targets.devices.emulated_arm64.symbols import Symbols, parse_maps
from targets.devices.local import ISA_FLAGS, available_cores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.worker import Progress
    from targets.base import Image, Job, Logits, Runtime

NAME = "emulated-arm64"
RUNTIMES = frozenset({"onnx", "openvino", "tflite"})
COUNTED = 3
"""Inferences; a first one is not."""
MOST_GUESTS = 4
"""At a time: each holds a network and its runtime."""
WARM_UPS = {32: 40, 96: 8}
"""Up to so many pixels along a side, so many more go before: Python's own code takes that long to
settle, which shows beside a few million instructions."""
SILENCE = Patience().silence
"""Seconds that a guest may say nothing: it does after every inference."""
MOST_BYTES = 1 << 16
COUNTS, LOG = "counts.txt", "guest.log"


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedArm64:
    """The device `emulated-arm64:PROFILE`."""

    profile: Profile

    @property
    def name(self) -> str:
        """What it is called."""
        return f"{NAME}:{self.profile.name}"

    def probe(self) -> DeviceInfo | NotRun:
        """Describe the board, or say what must be set up first."""
        try:
            guest.require_tools(tuple(guest.TOOLS))
        except DeviceError as error:
            return NotRun(reason=str(error))
        root = sysroot.find()
        if root is None:
            return NotRun(reason=f"its sysroot is not built; run: {sysroot.SETUP_COMMAND}")
        return DeviceInfo(
            name=self.name,
            kind="emulated",
            isa=tuple(flag for flag in ISA_FLAGS if flag in self.profile.features.split()),
            description=f"{self.profile.describes}, emulated by QEMU",
            cores=1,  # what several execute while they wait does not repeat
            versions={
                "qemu": guest.version(),
                "sysroot": root.name,
                "plugin": sha256_file(plugin.SOURCE),
            },
        )

    def can_run(self, wanted: Runtime) -> NotRun | None:
        """Say whether the sysroot has this runtime."""
        if wanted.name in RUNTIMES:
            return None
        return NotRun(
            reason=f"{self.name} has no {wanted.name}, only {', '.join(sorted(RUNTIMES))}"
        )

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
        """Count each job's instructions in a process of its own; see `targets.base.Device`.

        Counts repeat, so one inference per round will do, `COUNTED` at most, whatever `per_round`
        says. They do not depend on what else runs, so jobs run on all cores.

        Raises:
            DeviceError: As the protocol says; and where more than one thread is asked.
        """
        if threads != 1:
            raise DeviceError(
                f"{self.name} does not count {threads} threads",
                allowed="1 thread: what several execute while they wait does not repeat",
                do="Say --threads 1",
            )
        inferences = min(rounds, COUNTED)
        gave: dict[str, Samples | EdgeError] = {}
        with ThreadPoolExecutor(max_workers=min(available_cores(), MOST_GUESTS)) as pool:
            counts = [pool.submit(self._count, job, image, inferences) for job in jobs]
            try:
                for index, (job, count) in enumerate(zip(jobs, counts, strict=True)):
                    progress(index, len(jobs), job.label)
                    try:
                        gave[job.label] = count.result()
                    except DeviceError as error:
                        gave[job.label] = error
            except BaseException as error:
                pool.shutdown(wait=False, cancel_futures=True)
                if isinstance(error, KeyboardInterrupt):
                    end_all()  # the threads wait for guests, which know nothing of it
                raise
        progress(len(jobs), len(jobs))
        return settled(jobs, gave)

    def infer(
        self, job: Job, images: Image, *, batch: int, threads: int, progress: Progress
    ) -> Logits:
        """Run images through an artifact; see `targets.base.Device`."""
        with TemporaryDirectory(prefix="convnext-edge-") as name:
            folder = Path(name)
            task = inferring(job, images, folder, batch=batch, threads=threads)
            result = self._run(task, folder, progress=progress)
            return read_logits(folder, result, len(images), self.name)

    def _count(self, job: Job, image: Image, inferences: int) -> Samples:
        with TemporaryDirectory(prefix="convnext-edge-") as name:
            folder = Path(name)
            task = timing(
                [job],
                image,
                folder,
                rounds=inferences,
                per_round=1,
                threads=1,
                processes=False,
                marks=True,
            )
            side = max(image.shape[2:])
            warm_up = next((count for most, count in WARM_UPS.items() if side <= most), 0)
            task = replace(task, what={**task.what, "warm_up": warm_up})
            result = self._run(task, folder, counter=plugin.built())
            (row,) = result.jobs
            if row.error is not None:
                raise failed(self.name, job.label, row.error)
            symbols = Symbols(parse_maps(result.maps or ""))
            counts = read_counts((folder / COUNTS).read_text(), symbols.name)
        return Samples(
            label=job.label,
            versions=row.versions,
            instructions=counts.instructions,
            instruction_kinds=counts.kinds,
            symbols=counts.symbols,
        )

    def _run(
        self,
        task: Task,
        folder: Path,
        *,
        progress: Progress = silent,
        counter: Path | None = None,
    ) -> Result:
        """Run a task in the guest; its files and what it writes lie in `folder`."""
        root = sysroot.find()
        if root is None:
            raise DeviceError(
                f"{self.name} is not set up",
                allowed="a sysroot as it was built",
                do=f"Run: {sysroot.SETUP_COMMAND}",
            )
        guest.require_tools((guest.QEMU,))
        for place, source in task.files.items():
            if source != folder / place:
                (folder / place).symlink_to(source.absolute())
        jobs = task.write(folder)
        words = guest.command(
            root,
            self.profile,
            [str(RUNNER), str(jobs), str(folder / RESULT)],
            plugin=counter,
            counts=folder / COUNTS,
        )
        if ending.is_set():
            raise DeviceError(
                f"{self.name}: interrupted", allowed="a run to the end", do="Start it again"
            )
        with (
            (folder / LOG).open("w") as log,
            subprocess.Popen(
                words,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=guest.environment(root),
                # Ctrl-C is this process's to handle.
                start_new_session=True,
            ) as process,
            ended_with_all(process),
        ):
            try:
                if not _ends(process, progress):
                    raise DeviceError(
                        f"{self.name}: the guest has said nothing for {SILENCE:.0f} s",
                        allowed="an inference in that time, with what goes before the first",
                        do="Choose a smaller network or input, or look what else runs here",
                    )
            finally:
                if process.returncode is None:  # else its number may be another's by now
                    os.killpg(process.pid, signal.SIGKILL)
        if process.returncode:
            said = (folder / LOG).read_text(errors="replace").split("\n")
            raise DeviceError(
                f"{self.name}: the guest ended with {process.returncode} ({_last(said)})",
                allowed="an artifact that the runtime's ARM build runs",
                do="Try another artifact or another profile",
            )
        return read_result((folder / RESULT).read_bytes(), task, self.name)


def _ends(process: subprocess.Popen[str], progress: Progress) -> bool:
    """Pass on what a process says until it ends; return False where it falls silent."""
    assert process.stdout is not None
    said, tail = process.stdout.fileno(), b""
    while select.select([said], [], [], SILENCE)[0]:
        data = os.read(said, MOST_BYTES)
        if not data:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SILENCE)
            return process.returncode is not None
        *lines, tail = (tail + data).split(b"\n")
        for line in lines:
            tell(line.decode(errors="replace"), progress)
    return False


def _last(lines: Sequence[str]) -> str:
    return next((line.strip() for line in reversed(lines) if line.strip()), "silent")


class Family:
    """The emulated boards, by profile."""

    name = NAME

    def found(self) -> tuple[str, ...]:
        """Return every profile: none has to be plugged in."""
        return tuple(PROFILES)

    def at(self, address: str) -> EmulatedArm64:
        """Return the board with this profile; see `targets.base.DeviceFamily`."""
        if address not in PROFILES:
            raise UsageError(
                f"{NAME} has no profile {address or 'without a name'}",
                allowed=", ".join(PROFILES),
                do="Correct --device",
            )
        return EmulatedArm64(profile=PROFILES[address])

    def setup(self, progress: Progress) -> str:
        """Build what the boards need, once.

        Raises:
            DeviceError: A tool is missing, or a download failed.
            OutputError: The cache cannot be written.
        """
        plugin.built()
        return str(sysroot.setup(progress))


DEVICES = Family()
