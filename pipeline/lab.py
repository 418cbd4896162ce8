"""What is measured away from the run's own device: boards, phones, emulators.

In: a run's artifacts, and the places that they are measured at. Out: for every place the latencies
of every artifact, and how what they compute there compares with what they compute here. Places
know nothing of each other: those that are not this host work at the same time.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError

from calib.images import select
from calib.preprocess import some_pixels
from pipeline.compare import parity
from pipeline.errors import ArtifactError, DeviceError, WorkerError
from pipeline.measure import Timing
from pipeline.recipe import NONE
from pipeline.records import Parity, Place
from pipeline.store import Stage, file_stem
from pipeline.worker import end_all, silent
from targets import base

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from pipeline.data import Chosen
    from pipeline.exports import Exports
    from pipeline.records import Artifact, Breakdown, Export, Latency, Preprocessing
    from pipeline.stages import Stages
    from pipeline.worker import Progress
    from targets.base import Device, DeviceInfo, Image, Logits

PLACES = "devices.json"
"""Of a run folder: where its artifacts were measured, beside the recipe's own device."""
PARITIES = "parity.json"
MOST_AT_ONCE = 16
REFERENCE = "reference"
LOCAL = "local"

_Found = TypeVar("_Found")


def kept_places(file: Path) -> tuple[Place, ...]:
    """Read where a run folder's artifacts were measured before; nowhere where there is no file.

    Raises:
        ArtifactError: The file is damaged.
    """
    if not file.exists():
        return ()
    try:
        return TypeAdapter(tuple[Place, ...]).validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise ArtifactError(
            f"{file} names no devices ({type(error).__name__})",
            allowed="what `convnext-edge bench --device` of this version wrote",
            do="Remove the file: `bench RUN_DIR --device NAME` writes it again",
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What outputs are compared on.

    Attributes:
        evaluation: The images.
        preprocessing: Of them.
        images: How many of them.
        exports: What a reference artifact is exported with.
        model: Folder with the integers.
    """

    evaluation: Chosen
    preprocessing: Preprocessing
    images: int
    exports: Exports
    model: Path


class Lab:
    """Measures artifacts at places.

    Args:
        stages: Where results are kept.
        places: Where to measure.
        asked: Those of them at which what is missing is measured; at the others what was finished
            before is taken over.
        image_shape: NCHW of one input.
    """

    def __init__(
        self,
        stages: Stages,
        places: Sequence[Place],
        *,
        asked: Sequence[Place],
        image_shape: tuple[int, int, int, int],
    ) -> None:
        self.stages = stages
        self.asked = frozenset(asked)
        self.image_shape = image_shape
        self.places = [(place, base.device(place.device)) for place in places]

    def latencies(self, artifacts: Sequence[Artifact], *, asked: bool) -> list[list[Latency]]:
        """Return for every artifact its latency at every place.

        Args:
            artifacts: Of the run.
            asked: Whether times are asked for at all in this run.
        """

        def time(place: Place, device: Device) -> list[Latency]:
            return self._timing(place, device, asked=asked).run(artifacts)

        rows = self._everywhere(time)
        return [[row[index] for row in rows] for index in range(len(artifacts))]

    def breakdowns(
        self, artifacts: Sequence[Artifact], model: Path, *, asked: bool
    ) -> list[Breakdown]:
        """Return where artifacts' time goes at those places that say so.

        Args:
            artifacts: Of the run.
            model: Folder with params.json and tensors.safetensors.
            asked: Whether times are asked for at all in this run.
        """

        def take(place: Place, device: Device) -> list[Breakdown]:
            return self._timing(place, device, asked=asked).breakdowns(artifacts, model)

        return [row for rows in self._everywhere(take) for row in rows]

    def _timing(self, place: Place, device: Device, *, asked: bool) -> Timing:
        return Timing(
            self.stages,
            device,
            threads=place.threads,
            image_shape=self.image_shape,
            asked=asked and place in self.asked,
        )

    def parities(
        self, artifacts: Sequence[Artifact], outputs: Outputs, *, asked: bool
    ) -> list[Parity]:
        """Return how what artifacts compute at the places compares with what they compute here.

        Args:
            artifacts: Of the run.
            outputs: On what.
            asked: Whether outputs are asked for at all in this run.
        """

        def compare(place: Place, device: Device) -> list[Parity]:
            info = device.probe()
            if isinstance(info, base.NotRun):
                return []  # its latencies say so
            found: list[Parity] = []
            for artifact in artifacts:
                if device.can_run(base.runtime(artifact.export.runtime)) is None:
                    one = _Comparison(self.stages, device, info, place.threads, outputs)
                    found += one.of(artifact, asked=asked and place in self.asked)
            return found

        return [row for rows in self._everywhere(compare) for row in rows]

    def _everywhere(self, function: Callable[[Place, Device], _Found]) -> list[_Found]:
        """Apply a function at every place, in order.

        Those on this host come one after the other, while nothing else runs here; then all others
        at the same time.
        """
        pool = ThreadPoolExecutor(max_workers=MOST_AT_ONCE)
        try:
            pairs = dict(enumerate(self.places))
            done = {i: function(*pair) for i, pair in pairs.items() if _on_host(pair[1])}
            others = {i: pool.submit(function, *p) for i, p in pairs.items() if i not in done}
            done |= {i: future.result() for i, future in others.items()}
            return [done[i] for i in pairs]
        except BaseException:
            # Ctrl-C included: the threads wait for workers, which know nothing of it.
            end_all()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _on_host(device: Device) -> bool:
    info = device.probe()
    return isinstance(info, base.DeviceInfo) and info.kind == "host"


@dataclass(frozen=True, slots=True)
class _Comparison:
    """Outputs of one device."""

    stages: Stages
    device: Device
    info: DeviceInfo
    threads: int
    outputs: Outputs

    def of(self, artifact: Artifact, *, asked: bool) -> list[Parity]:
        """Return an artifact's rows: against this host and against the reference."""
        evaluation, wanted = self.outputs.evaluation, artifact.export
        stage = Stage(
            name=f"parity-{file_stem(self.info.name)}-{artifact.name}",
            modules=("pipeline.lab", type(self.device).__module__),
            inputs={**artifact.files, "images": evaluation.source.sha256},
            settings={
                "device": asdict(self.info),
                "threads": self.threads,
                "images": self.outputs.images,
                "preprocessing": asdict(self.outputs.preprocessing),
            },
            libraries=base.runtime(wanted.runtime).capabilities.distributions,
        )
        if not asked and not self.stages.is_done(stage):
            return []
        said = partial(Parity, device=self.info.name, runtime=wanted.runtime, scheme=wanted.scheme)
        try:
            folder = self.stages.do_here(stage, partial(self._make, artifact))
        except (WorkerError, ArtifactError, DeviceError) as error:
            return [said(outcome="failed", reason=str(error))]
        rows = TypeAdapter(list[Parity]).validate_json((folder / PARITIES).read_bytes())
        return [replace(row, device=self.info.name, kind=self.info.kind) for row in rows]

    def _make(self, artifact: Artifact, folder: Path, progress: Progress) -> None:
        wanted, images = artifact.export, self._images()

        def run(device: Device, one: Artifact, progress: Progress) -> Logits:
            batch = wanted.batch if isinstance(wanted.batch, int) else 1
            job = base.Job(
                label=one.name, runtime=one.export.runtime, path=self.stages.out / one.path
            )
            return device.infer(job, images, batch=batch, threads=self.threads, progress=progress)

        here, there = base.device(LOCAL), run(self.device, artifact, progress)
        np.save(folder / "logits.npy", there)
        exact = run(here, self._reference(wanted), silent)
        plain = exact
        if wanted.scheme != "float":
            plain = run(here, self._reference(_in_float(wanted)), silent)
        lost = exact - plain
        rows = [parity(wanted, there, exact, error=lost, against="reference")]
        if here.can_run(base.runtime(wanted.runtime)) is None:
            same = run(here, artifact, silent)
            rows.append(parity(wanted, there, same, error=lost, against="host"))
        (folder / PARITIES).write_bytes(TypeAdapter(list[Parity]).dump_json(rows, indent=1))

    def _images(self) -> Image:
        """Return the pixels of images drawn from those of the evaluation."""
        chosen = select(self.outputs.evaluation.selection)
        return some_pixels(chosen, self.outputs.preprocessing, self.outputs.images)

    def _reference(self, wanted: Export) -> Artifact:
        """Return what the reference makes of the same integers."""
        target = base.runtime(REFERENCE)
        form = target.capabilities.graph_forms[0]
        same = replace(wanted, runtime=REFERENCE, graph_form=form)
        return self.outputs.exports.one(self.stages, self.outputs.model, same)


def _in_float(wanted: Export) -> Export:
    return replace(wanted, scheme="float", placement=NONE, profile=None)
