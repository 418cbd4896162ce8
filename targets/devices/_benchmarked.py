"""A device without Python: LiteRT's benchmark_model times artifacts there.

In: a `Workspace` on the device and the tool, here or there. Out: `Benchmarked`, a
`targets.base.Device` that runs tflite only and tells wall time only, on inputs of the tool's own;
for outputs it is started anew for every batch.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import DeviceError, EdgeError
from pipeline.store import sha256_file
from pipeline.worker import silent
from targets.base import DeviceInfo, NotRun, OpTime, Samples, settled
from targets.devices import _benchmark_model as tool
from targets.devices._workspace import Program, scratch
from targets.devices.local import ISA_FLAGS, WARM_UP
from targets.runtimes import tflite

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from pipeline.worker import Progress
    from targets.base import Image, Job, Logits, Runtime
    from targets.devices._workspace import Workspace

NAME, VARIABLE = "benchmark_model", "CONVNEXT_EDGE_BENCHMARK_MODEL"
"""The tool, and the environment variable with its path on this machine."""
SCRIPT, ARTIFACT, PROFILE = "steps.sh", "0.tflite", "profile.csv"
SHOWN = 12
"""Digits of a hash that tell two builds of the tool apart."""
KNOWN = re.compile(r"sha256 ?(?P<sha256>\w*).*\ncores (?P<cores>\d+)\n(?P<cpuinfo>(?:.*\n)*)")


class Benchmarked:
    """One device with LiteRT's benchmark_model.

    Args:
        workspace: This project's folder there.
        there: Where the tool lies on the device.
        pushed: The tool here, which is pushed; None takes the one there.
        prefix: Goes before a command there, such as `taskset f0 `.
        cpu: The core whose clock is looked at.
        delegate: One of `_benchmark_model.DELEGATES`.
    """

    def __init__(
        self,
        workspace: Workspace,
        *,
        there: str,
        pushed: Path | None,
        prefix: str = "",
        cpu: int = 0,
        delegate: str = tool.XNNPACK,
    ) -> None:
        self.name = workspace.name
        self.workspace = workspace
        self.there, self.pushed = there, pushed
        self.prefix, self.cpu = prefix, cpu
        self.delegate = delegate

    def probe(self) -> DeviceInfo | NotRun:
        """Look for the tool, and at the processor."""
        try:
            sha256, known = self._known()
        except DeviceError as error:
            return NotRun(reason=str(error))
        flags = known["cpuinfo"].split()
        return DeviceInfo(
            name=self.name,
            kind="device",
            isa=tuple(flag for flag in ISA_FLAGS if flag in flags),
            description=f"{NAME} {sha256[:SHOWN]}, delegate {self.delegate}",
            cores=int(known["cores"]),
            accelerated=self.delegate not in {tool.XNNPACK, tool.NONE},
        )

    def can_run(self, wanted: Runtime) -> NotRun | None:
        """Return None for tflite."""
        if wanted.name == tflite.RUNTIME.name:
            return None
        reason = f"{NAME} runs {tflite.RUNTIME.name} only; others need Python with numpy there"
        return NotRun(reason=reason)

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
        """Time the jobs in turn, on inputs of the tool's own; see `targets.base.Device`."""
        timed = {job.label: job.path for job in jobs if job.path is not None}
        files = {f"{index}.tflite": path for index, path in enumerate(timed.values())}
        sha256, _ = self._known()
        steps = tool.turns(
            [self._command(name, threads) for name in files],
            rounds=rounds,
            per_round=per_round,
            warm_up=WARM_UP,
        )
        with scratch() as folder:
            parts = self._perform(steps, files, folder, progress)
        gave: dict[str, Samples | EdgeError] = {job.label: Samples(label=job.label) for job in jobs}
        for index, label in enumerate(timed):
            try:
                gave[label] = self._samples(label, parts, index, sha256)
            except DeviceError as error:
                gave[label] = error
        found, states = settled(jobs, gave), dict(parts)
        before, after = (tool.read_state(states[when]) for when in ("before", "after"))
        return [replace(one, before=before, after=after) for one in found]

    def infer(
        self, job: Job, images: Image, *, batch: int, threads: int, progress: Progress
    ) -> Logits:
        """Run images through an artifact, a process for each batch; see `targets.base.Device`."""
        assert job.path is not None
        filled = np.concatenate([images, np.repeat(images[-1:], -len(images) % batch, axis=0)])
        pixels = np.ascontiguousarray(filled.transpose(0, 2, 3, 1), np.float32)
        command, shape = self._command(ARTIFACT, threads), (batch, *pixels.shape[1:])
        steps = [tool.inferring(command, shape, index=i) for i in range(len(filled) // batch)]
        with scratch() as folder:
            pixels.tofile(folder / tool.IMAGES)
            files = {ARTIFACT: job.path, tool.IMAGES: folder / tool.IMAGES}

            def tell(done: int, total: int, note: str = "") -> None:
                progress(len(images) * done // total, len(images), note)

            self._runs(self._perform(steps, files, folder, tell, tool.LOGITS), 0)
            logits: Logits = np.fromfile(folder / tool.LOGITS, np.float32)
        if not logits.size or logits.size % len(filled):
            raise self._garbage(f"{logits.size} logits of {len(filled)} images")
        return logits.reshape(len(filled), -1)[: len(images)]

    def op_times(self, job: Job, *, threads: int, inferences: int) -> list[OpTime] | NotRun:
        """Ask the tool's own profiler; see `targets.base.Profiled`."""
        if job.path is None or job.runtime != tflite.RUNTIME.name:
            return NotRun(reason=f"{NAME} profiles {tflite.RUNTIME.name} only")
        command = self._command(ARTIFACT, threads)
        step = tool.profiling(command, PROFILE, inferences=inferences, warm_up=WARM_UP)
        with scratch() as folder:
            self._runs(self._perform([step], {ARTIFACT: job.path}, folder, silent, PROFILE), 0)
            text = (folder / PROFILE).read_text(errors="replace")
        try:
            rows = tool.read_profile(text)
        except tool.NoAnswerError as error:
            raise self._garbage(error) from error
        if any(row.is_delegate for row in rows):
            return NotRun(reason=f"the delegate {self.delegate} keeps no profile of its operations")
        known = tflite.kinds(job.path, [row.op for row in rows])
        if known is None:
            return NotRun(reason=f"{NAME} tells other operations than the file has")
        return [
            OpTime(
                kind=kind,
                op=row.op,
                name=name,
                ms=row.ms,
                is_fallback=self.delegate != tool.NONE and tflite.is_own_kernel(row.op),
            )
            for row, (kind, name) in zip(rows, known, strict=True)
        ]

    def _known(self) -> tuple[str, re.Match[str]]:
        """Return the tool's hash, and what is known of the processor."""
        said = self.workspace.do(
            "look for the tool",
            f"echo sha256 $(sha256sum {self.there} 2>/dev/null); "
            f"echo cores $({self.prefix}nproc); cat /proc/cpuinfo",
        )
        known = KNOWN.fullmatch(said)
        if known is None:
            raise self._garbage(said.strip()[-80:])
        sha256 = sha256_file(self.pushed) if self.pushed else known["sha256"]
        if not sha256:
            raise DeviceError(
                f"{self.name} has no {NAME}",
                allowed=f"LiteRT's {NAME} at {self.there}, or Python 3 with numpy there",
                do=f"Download the tool for Android and push it, or name the file in {VARIABLE}",
            )
        return sha256, known

    def _command(self, graph: str, threads: int) -> str:
        where = f"./{NAME}" if self.pushed else self.there
        return f"{self.prefix}{where} " + tool.flags(graph, threads=threads, delegate=self.delegate)

    def _perform(
        self,
        steps: Sequence[str],
        given: Mapping[str, Path],
        folder: Path,
        progress: Progress,
        *outputs: str,
    ) -> list[tuple[str, str]]:
        """Run a script there; return its parts."""
        files = dict(given)
        # What is fetched is there even where the tool failed: what it said is in a part.
        before = f"touch {' '.join([tool.OUT, *outputs])}"
        if self.pushed is not None:
            files[NAME], before = self.pushed, f"{before}; chmod 755 {NAME}"
        files[SCRIPT] = folder / SCRIPT
        files[SCRIPT].write_text(tool.script(steps, before=before, cpu=self.cpu))
        program = Program(
            command=f"sh {SCRIPT}", needs="shell", files=files, outputs=(tool.OUT, *outputs)
        )
        self.workspace.perform(program, folder, progress)
        try:
            return tool.sections((folder / tool.OUT).read_text(errors="replace"))
        except tool.NoAnswerError as error:
            raise self._garbage(error) from error

    def _samples(
        self, label: str, parts: Sequence[tuple[str, str]], index: int, sha256: str
    ) -> Samples:
        runs = self._runs(parts, index)
        return Samples(
            label=label,
            wall_ms=tuple(ms for run in runs for ms in run.singles),
            load_ms=runs[0].load_ms,
            first_ms=runs[0].first_ms,
            versions={NAME: sha256[:SHOWN]},
        )

    def _runs(self, parts: Sequence[tuple[str, str]], index: int) -> list[tool.Run]:
        """Return what the processes of a job said."""
        try:
            return [tool.read_run(text) for title, text in parts if title == f"job {index}"]
        except tool.NoAnswerError as error:
            raise self._garbage(error) from error

    def _garbage(self, got: object) -> DeviceError:
        return DeviceError(
            f"{self.name}: {NAME} gives no times: {got}",
            allowed="what LiteRT's tool prints, for an artifact and a delegate that go together",
            do="Run it there by hand and look",
        )
