"""A device with Python over a link: it runs the on-device runner.

In: a `Transport` and jobs. Out: `Remote`, a `targets.base.Device` over it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.errors import DeviceError
from pipeline.worker import silent
from targets.base import DeviceInfo, NotRun
from targets.devices import _exchange as exchange
from targets.devices import _runner
from targets.devices._workspace import Program, Workspace, scratch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pipeline.worker import Progress
    from targets.base import Image, Job, Logits, Runtime, Samples
    from targets.devices._workspace import Patience, Transport

RUNNER = "runner.py"
MODULES = {
    "onnx": ("onnxruntime",),
    "openvino": ("openvino",),
    "tflite": tuple(_runner.TFLITE),
}
"""Runtime to the packages that run it; one is enough."""


class Remote:
    """One device over a transport.

    Args:
        transport: The way there.
        root: Folder for this project's files there: absolute, or relative as `Transport.run` says.
        python: Command that starts Python there, as the shell reads it.
        patience: How long it is waited for.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        root: str,
        python: str = "python3",
        patience: Patience | None = None,
    ) -> None:
        self.name = transport.name
        self.workspace = Workspace(transport, root, patience)
        self.python = python
        self._machine: exchange.Machine | None = None

    def probe(self) -> DeviceInfo | NotRun:
        """Ask the device what it is."""
        try:
            machine = self._known()
        except DeviceError as error:
            return NotRun(reason=str(error))
        return DeviceInfo(
            name=self.name,
            kind="device",
            isa=machine.known_isa,
            description=f"{machine.description}, {machine.os}, Python {machine.python}",
            cores=machine.cores,
            hardware=machine.description,
            machine=machine.whole,
            versions=machine.packages,
        )

    def can_run(self, wanted: Runtime) -> NotRun | None:
        """Look whether the runtime's package is there."""
        modules = MODULES.get(wanted.name)
        if modules is None:
            return NotRun(reason=f"{wanted.name} runs on no device that is reached over a link")
        try:
            there = self._known().packages
        except DeviceError as error:
            return NotRun(reason=str(error))
        for choice in (("numpy",), modules):
            names = [name for module in choice for name in _runner.DISTRIBUTIONS[module]]
            if not any(name in there for name in names):
                return NotRun(reason=str(exchange.lacks(self.name, names[0])))
        return None

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
        """Time the jobs in turn on the device; see `targets.base.Device`."""
        with scratch() as folder:
            task = exchange.timing(
                jobs, image, folder, rounds=rounds, per_round=per_round, threads=threads
            )
            return exchange.samples(self._perform(task, folder, progress), jobs, self.name)

    def infer(
        self, job: Job, images: Image, *, batch: int, threads: int, progress: Progress
    ) -> Logits:
        """Run images through an artifact on the device; see `targets.base.Device`."""
        with scratch() as folder:
            task = exchange.inferring(job, images, folder, batch=batch, threads=threads)
            result = self._perform(task, folder, progress)
            return exchange.read_logits(folder, result, len(images), self.name)

    def _known(self) -> exchange.Machine:
        if self._machine is None:
            with scratch() as folder:
                self._machine = self._perform(exchange.PROBE, folder, silent).machine
        return self._machine

    def _perform(self, task: exchange.Task, folder: Path, progress: Progress) -> exchange.Result:
        """Run a task there, leave what it wrote in `folder`, and remove its traces."""
        # What is fetched is there even where the task failed: why it did is in the result.
        empty = "".join(f": >{name}; " for name in task.outputs)
        program = Program(
            command=f"{empty}{self.python} {RUNNER} {exchange.JOBS} {exchange.RESULT}",
            needs="Python 3",
            files={RUNNER: exchange.RUNNER, exchange.JOBS: task.write(folder), **task.files},
            outputs=(exchange.RESULT, *task.outputs),
        )
        self.workspace.perform(program, folder, progress)
        return exchange.read_result((folder / exchange.RESULT).read_bytes(), task, self.name)
