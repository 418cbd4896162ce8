"""Quantization-aware training: it picks up where calibration stops.

In: a quantized model and training images. Out: the folder of the same model with learnt integers,
and the `Training` that tells how that went. Training is one stage; what it had learnt outlives an
interruption in RUN_DIR/training, and the next run goes on from there.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from pipeline.errors import MissingRuntimeError
from pipeline.exports import MODEL_FILES
from pipeline.recorder import CHECKPOINT, METRICS
from pipeline.records import STRICTEST, CurvePoint, Training
from pipeline.store import Stage, library_versions, sha256_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pipeline.data import Chosen
    from pipeline.records import Accuracy, Checkpoint, Finetuning, Preprocessing
    from pipeline.stages import Done, Stages

TRAINING = "training"
"""The place of unfinished trainings in a run folder."""
PATIENCE_SECONDS = 600.0
"""That a training has to save what it has learnt when it is stopped: an update of a large network
takes minutes. A second Ctrl-C does not wait."""
LIBRARIES = ("torch", "numpy", "pillow")


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What is to be learnt, and from what.

    Attributes:
        base: Folder of the quantized model.
        images: To train on.
        workers: Processes that decode them ahead.
        checkpoint: Its order of classes is what labels count in.
        preprocessing: Of the images.
        how: All that can be set.
    """

    base: Path
    images: Chosen
    workers: int
    checkpoint: Checkpoint
    preprocessing: Preprocessing
    how: Finetuning


def needs(how: Finetuning) -> dict[str, str]:
    """Return what a training needs beyond this project's own: extra to distribution."""
    wanted = {"nncf": "nncf"} if how.engine == "nncf" else {}
    return wanted | ({"train": "kornia"} if how.augmentation.randaugment else {})


def require_trainable(how: Finetuning) -> None:
    """Check that what a training needs is installed.

    Raises:
        MissingRuntimeError: It is not; the message names the extra.
    """
    for extra, distribution in needs(how).items():
        if library_versions([distribution])[distribution] is None:
            raise MissingRuntimeError(
                f"{distribution} is not installed, and this training needs it",
                allowed=f"an environment with the extra [{extra}]",
                do=f"Run: pip install 'convnext-edge[{extra}]'",
            )


class Finetuner:
    """Trains, and holds what was learnt against what it began with.

    Args:
        stages: Where results are kept.
        course: What to learn.
        judge: Returns the accuracy of a reference artifact on the evaluation images, given a name,
            its path and its sha256; None where there are no such images.
        restart: Whether an unfinished training is thrown away.
    """

    def __init__(
        self,
        stages: Stages,
        course: Course,
        *,
        judge: Callable[[str, Path, str], Accuracy] | None,
        restart: bool,
    ) -> None:
        self.stages = stages
        self.course = course
        self.judge = judge
        self.restart = restart

    def run(self) -> tuple[Path, Training]:
        """Return a folder with params.json, tensors.safetensors and metrics.jsonl.

        Raises:
            TrainingError: The loss is not finite, or training was stopped.
        """
        before = self._judged("before-training", self.course.base)
        done = self._trained()
        course, found = self.course, done.value
        lines = (done.folder / METRICS).read_text().splitlines()
        source = course.images.source
        training = Training(
            settings=course.how,
            source=source.source,
            n=source.n,
            sha256=source.sha256,
            updates=found["updates"],
            seconds=found["seconds"],
            resumed_at=found["resumed_at"],
            images_per_second=found["images_per_second"],
            device=found["device"],
            processes=found["processes"],
            skipped=tuple(found["skipped"]),
            before=before,
            after=self._judged("after-training", done.folder),
            curve=TypeAdapter(tuple[CurvePoint, ...]).validate_python([*map(json.loads, lines)]),
        )
        return done.folder, training

    def _trained(self) -> Done:
        course = self.course
        parents = {name: sha256_file(course.base / name) for name in MODEL_FILES}
        how = asdict(course.how)
        stage = Stage(
            name="finetune",
            modules=("pipeline.training",),
            inputs={**parents, "images": course.images.source.sha256},
            settings={
                "preprocessing": asdict(course.preprocessing),
                # How often it is saved changes nothing.
                "how": {name: value for name, value in how.items() if name != "save_minutes"},
                "labels": course.checkpoint.labels,
            },
            libraries=(*LIBRARIES, *needs(course.how).values()),
        )
        keep = self.stages.out / TRAINING / stage.key()[:16]
        if self.restart:
            shutil.rmtree(keep, ignore_errors=True)
        with self.stages.worker(stage.name, PATIENCE_SECONDS) as worker:
            done = self.stages.do(
                stage,
                "pipeline.training:training_stage",
                worker=worker,
                shared=True,
                model=str(course.base),
                images={
                    "selection": asdict(course.images.selection),
                    "preprocessing": asdict(course.preprocessing),
                    "checkpoint": asdict(course.checkpoint),
                },
                how=how,
                parents={
                    "quantized": parents[MODEL_FILES[1]],
                    "training": course.images.source.sha256,
                },
                keep=str(keep),
                workers=course.workers,
            )
        # What a process that was killed had begun to write goes as well.
        for file in keep.glob(f"*{CHECKPOINT}"):
            file.unlink()
        return done

    def _judged(self, name: str, model: Path) -> Accuracy | None:
        if self.judge is None:
            return None
        done = self.stages.do(
            Stage(
                name=name,
                modules=("pipeline.assign",),
                inputs={file: sha256_file(model / file) for file in MODEL_FILES},
                settings={"profile": STRICTEST},
                libraries=("torch", "numpy"),
            ),
            "pipeline.assign:candidate_stage",
            model=str(model),
            float_layers=[],
            # Training begins with these.
            profile=STRICTEST,
        )
        return self.judge(name, done.folder / done.value["path"], done.value["sha256"])
