"""Which images calibrate and which evaluate.

In: what a recipe says of its data. Out: two disjoint selections with their hashes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from calib.images import DIGITS, digest, select, select_labelled
from pipeline.errors import DataError, UsageError
from pipeline.recipe import NONE
from pipeline.records import Selection
from pipeline.store import sha256_bytes
from reports.document import DataSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calib.images import ImageSet, Purpose
    from pipeline.recipe import Recipe
    from pipeline.records import Checkpoint
    from pipeline.worker import Progress

NO_LABELS = "the data has no labels: give labelled images with --eval"
NOT_ASKED = "not asked: --eval none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A selection and the hash of its images, in order."""

    selection: Selection
    source: DataSource

    def without(self, skipped: Sequence[str]) -> Chosen:
        """Return the same images with more names of those that could not be used."""
        names = dict.fromkeys((*self.source.skipped, *skipped))
        return replace(self, source=self.source.model_copy(update={"skipped": tuple(names)}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The images of a run; where `evaluation` is None, `why_not` says why.

    `training` is None where nothing is trained.
    """

    calibration: Chosen
    evaluation: Chosen | None
    why_not: str
    training: Chosen | None = None

    def without(self, *, calibration: Sequence[str] = (), evaluation: Sequence[str] = ()) -> Data:
        """Return the same images with the names of those that could not be decoded."""
        return replace(
            self,
            calibration=self.calibration.without(calibration),
            evaluation=self.evaluation and self.evaluation.without(evaluation),
        )


def choose(recipe: Recipe, model: Checkpoint, progress: Progress) -> Data:
    """Select the images that a recipe asks for and hash them.

    Args:
        recipe: Where they lie, how many, and the seed.
        model: Its classes are what evaluation labels count in.
        progress: Called as the two selections are read.

    Raises:
        UsageError: The recipe names no data.
        DataError: There are none, they are unreadable, their classes are not the model's, or the
            same image would calibrate and evaluate.
    """
    where = recipe.data or (None if recipe.checkpoint else DIGITS)
    if where is None:
        raise UsageError(
            "a checkpoint without data",
            allowed="--data with a folder, a .zip, or the words digits or none",
            do="Give --data; a few hundred images of the kind the model will see are enough",
        )
    calibration = _selection(recipe, where, "calibration", recipe.calibration_images)
    pool = select(calibration)
    hashes = pool.hashes()
    progress(1, 2)
    evaluation = _evaluation(recipe, where)
    exam = select(evaluation, model) if evaluation else None
    held_out = exam.hashes() if exam else []
    lessons = _training(recipe, where)
    learnt_from = _learnt_from(recipe, lessons, model) if lessons else None
    learnt = learnt_from.hashes() if learnt_from else []
    progress(2, 2)
    # Empty files are damaged ones, and left out later.
    for seen, verb in ((hashes, "calibrate"), (learnt, "train")):
        shared = len(set(seen) & set(held_out) - {sha256_bytes(b"")})
        if not shared or recipe.allow_overlap:
            continue
        raise DataError(
            f"{shared} images are used both to {verb} and to evaluate",
            allowed="disjoint sets: train/ and val/ in --data, another --eval, or `--eval none`",
            do="Separate them, or give --allow-overlap and mistrust the accuracy",
        )
    return Data(
        calibration=_chosen(calibration, pool, hashes),
        evaluation=_chosen(evaluation, exam, held_out) if evaluation and exam else None,
        why_not=NOT_ASKED if recipe.eval == NONE else NO_LABELS,
        training=_chosen(lessons, learnt_from, learnt) if lessons and learnt_from else None,
    )


def _learnt_from(recipe: Recipe, lessons: Selection, model: Checkpoint) -> ImageSet:
    assert recipe.finetune is not None
    return select_labelled(lessons, model, needed=recipe.finetune.label_weight > 0)


def _training(recipe: Recipe, data: str) -> Selection | None:
    how = recipe.finetune
    if how is None:
        return None
    selection = _selection(recipe, recipe.train or data, "calibration", how.images)
    # Labels are of use here; calibration looks at none.
    return replace(selection, seed=how.seed, class_order=recipe.class_order)


def _evaluation(recipe: Recipe, data: str) -> Selection | None:
    if recipe.eval == NONE:
        return None
    selection = _selection(recipe, recipe.eval or data, "evaluation", recipe.eval_images)
    if recipe.eval is None and select(selection).classes is None:
        return None
    return selection


def _selection(recipe: Recipe, where: str, purpose: Purpose, n: int | None) -> Selection:
    evaluates = purpose == "evaluation"
    return Selection(
        where=where,
        purpose=purpose,
        n=n,
        seed=recipe.seed,
        label_file=recipe.label_file if evaluates else None,
        class_order=recipe.class_order if evaluates else None,
    )


def _chosen(selection: Selection, images: ImageSet, hashes: Sequence[str]) -> Chosen:
    source = DataSource(
        source=selection.where,
        n=len(hashes),
        sha256=digest(images, hashes),
        skipped=images.skipped,
    )
    return Chosen(selection=selection, source=source)
