"""What an artifact computes on a device, beside what is computed here from the same images.

In: an artifact, a device, images. Out: a `Parity` against the reference on the same integers and,
where this host can run the artifact, one against this host.
"""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from pydantic import TypeAdapter

from calib.batches import some_pixels
from calib.images import select
from pipeline.errors import ArtifactError, DeviceError, WorkerError
from pipeline.exports import MODEL_FILES
from pipeline.logits import parity
from pipeline.recipe import NONE
from pipeline.records import Parity
from pipeline.store import Stage, file_stem, sha256_file
from pipeline.worker import silent
from targets import base
from targets.devices.local import isa_flags

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.data import Chosen
    from pipeline.exports import Exports
    from pipeline.records import Artifact, Export, Preprocessing
    from pipeline.stages import Stages
    from pipeline.worker import Progress
    from targets.base import Device, DeviceInfo, Image, Logits

PARITIES = "parity.json"
REFERENCE = "reference"
LOCAL = "local"

_exporting = threading.Lock()
"""Every place wants the same references; one makes them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What outputs are compared on.

    Attributes:
        evaluation: The images.
        preprocessing: Of them.
        exports: What a reference artifact is exported with.
        model: Folder with the integers.
    """

    evaluation: Chosen
    preprocessing: Preprocessing
    exports: Exports
    model: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Outputs of one device.

    Attributes:
        stages: Where results are kept.
        device: It.
        info: What it is.
        threads: For the runtimes.
        outputs: What is compared.
        images: How many of the images.
        asked: Whether to run what is missing, or only to take over what was finished before.
    """

    stages: Stages
    device: Device
    info: DeviceInfo
    threads: int
    outputs: Outputs
    images: int
    asked: bool

    def of(self, artifact: Artifact) -> list[Parity]:
        """Return an artifact's rows; one that says why where it was asked and not run."""
        wanted, stage = artifact.export, self._stage(artifact)
        said = partial(
            Parity,
            device=self.info.name,
            runtime=wanted.runtime,
            scheme=wanted.scheme,
            kind=self.info.kind,
        )
        if not self.stages.is_done(stage):
            if not self.asked:
                return []
            if (cannot := self.device.can_run(base.runtime(wanted.runtime))) is not None:
                return [said(outcome="not_run", reason=cannot.reason)]
        try:
            folder = self.stages.do_here(stage, partial(self._make, artifact))
        except (WorkerError, ArtifactError, DeviceError) as error:
            return [said(outcome="failed", reason=str(error))]
        rows = TypeAdapter(list[Parity]).validate_json((folder / PARITIES).read_bytes())
        return [replace(row, device=self.info.name, kind=self.info.kind) for row in rows]

    def _stage(self, artifact: Artifact) -> Stage:
        target, outputs = base.runtime(artifact.export.runtime), self.outputs
        modules = [type(one).__module__ for one in (self.device, target, base.runtime(REFERENCE))]
        model = {name: sha256_file(outputs.model / name) for name in MODEL_FILES}
        return Stage(
            name=f"parity-{file_stem(self.info.name)}-{artifact.name}",
            modules=("pipeline.parity", *modules),
            inputs={**artifact.files, **model, "evaluation": outputs.evaluation.source.sha256},
            settings={
                "device": asdict(self.info),
                "threads": self.threads,
                "images": self.images,
                "preprocessing": asdict(outputs.preprocessing),
                "host": isa_flags(),
            },
            libraries=("torch", "numpy", "pillow", *target.capabilities.distributions),
        )

    def _make(self, artifact: Artifact, folder: Path, progress: Progress) -> None:
        wanted, images = artifact.export, self._images()
        here, there = base.device(LOCAL), self._run(self.device, artifact, images, progress)
        np.save(folder / "logits.npy", there)
        exact = self._run(here, self._reference(wanted), images, silent)
        plain = exact
        if wanted.scheme != "float":
            plain = self._run(here, self._reference(_in_float(wanted)), images, silent)
        if there.shape != exact.shape:
            raise DeviceError(
                f"{self.info.name}: logits of shape {there.shape}",
                allowed=f"{exact.shape}: an image a row, a class a column",
                do="Look whether the artifact that it runs is this one",
            )
        lost = exact - plain
        rows = [parity(wanted, there, exact, error=lost, against="reference")]
        if here.can_run(base.runtime(wanted.runtime)) is None:
            same = self._run(here, artifact, images, silent)
            rows.append(parity(wanted, there, same, error=lost, against="host"))
        (folder / PARITIES).write_bytes(TypeAdapter(list[Parity]).dump_json(rows, indent=1))

    def _run(self, device: Device, one: Artifact, images: Image, progress: Progress) -> Logits:
        batch = one.export.batch if isinstance(one.export.batch, int) else 1
        job = base.Job(label=one.name, runtime=one.export.runtime, path=self.stages.out / one.path)
        return device.infer(job, images, batch=batch, threads=self.threads, progress=progress)

    def _images(self) -> Image:
        """Return the pixels of images drawn from those of the evaluation."""
        chosen = select(self.outputs.evaluation.selection)
        return some_pixels(chosen, self.outputs.preprocessing, self.images)

    def _reference(self, wanted: Export) -> Artifact:
        """Return what the reference makes of the same integers."""
        target = base.runtime(REFERENCE)
        form = target.capabilities.graph_forms[0]
        same = replace(wanted, runtime=REFERENCE, graph_form=form)
        with _exporting:
            return self.outputs.exports.one(self.stages, self.outputs.model, same)


def _in_float(wanted: Export) -> Export:
    return replace(wanted, scheme="float", placement=NONE, profile=None, float_stages=())
