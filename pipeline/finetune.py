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

from pipeline.exports import MODEL_FILES
from pipeline.recorder import METRICS
from pipeline.records import CurvePoint, Training
from pipeline.store import Stage, sha256_file
from pipeline.training_loop import CHECKPOINT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pipeline.data import Chosen
    from pipeline.records import Accuracy, Checkpoint, Finetuning, Preprocessing, Profile
    from pipeline.stages import Done, Stages

TRAINING = "training"
"""The place of unfinished trainings in a run folder."""
PATIENCE_SECONDS = 60.0
"""That a training has to save what it has learnt when it is stopped."""
LIBRARIES = {"own": ("torch", "numpy", "pillow"), "nncf": ("torch", "numpy", "pillow", "nncf")}
ENGINES = {"own": "pipeline.student", "nncf": "pipeline.nncf_student"}


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
        profile: Whose integers are judged before and after.
    """

    base: Path
    images: Chosen
    workers: int
    checkpoint: Checkpoint
    preprocessing: Preprocessing
    how: Finetuning
    profile: Profile


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
            modules=("pipeline.training", ENGINES[course.how.engine]),
            inputs={**parents, "images": course.images.source.sha256},
            settings={
                "preprocessing": asdict(course.preprocessing),
                # How often it is saved changes nothing.
                "how": {name: value for name, value in how.items() if name != "save_minutes"},
                "labels": course.checkpoint.labels,
            },
            libraries=LIBRARIES[course.how.engine],
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
        (keep / CHECKPOINT).unlink(missing_ok=True)
        return done

    def _judged(self, name: str, model: Path) -> Accuracy | None:
        if self.judge is None:
            return None
        done = self.stages.do(
            Stage(
                name=name,
                modules=("pipeline.assign",),
                inputs={file: sha256_file(model / file) for file in MODEL_FILES},
                settings={"profile": self.course.profile},
                libraries=("torch", "numpy"),
            ),
            "pipeline.assign:candidate_stage",
            model=str(model),
            float_layers=[],
            profile=self.course.profile,
        )
        return self.judge(name, done.folder / done.value["path"], done.value["sha256"])
