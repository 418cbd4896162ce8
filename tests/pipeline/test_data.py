"""Which images calibrate and which evaluate: never the same ones unasked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import checkpoint
from pipeline.data import choose
from pipeline.errors import DataError
from pipeline.recipe import Recipe
from pipeline.records import Checkpoint
from pipeline.run import EMBEDDED
from pipeline.worker import silent


@pytest.fixture(scope="module")
def model() -> Checkpoint:
    return checkpoint.load(EMBEDDED).record


def folder(where: Path, *, seeds: dict[str, range]) -> Path:
    """Write images of noise, by split; one seed is one image."""
    for split, drawn in seeds.items():
        for seed in drawn:
            at = where / split / str(seed % 10)
            at.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(noise).save(at / f"{split}{seed}.png")
    return where


def chosen(where: Path, model: Checkpoint, *, allow_overlap: bool = False) -> tuple[int, int]:
    recipe = Recipe(checkpoint=str(EMBEDDED), data=str(where), allow_overlap=allow_overlap)
    found = choose(recipe, model, silent)
    assert found.evaluation is not None
    return found.calibration.source.n, found.evaluation.source.n


def test_an_image_that_would_do_both_is_refused_unless_that_is_allowed(
    model: Checkpoint, tmp_path: Path
) -> None:
    where = folder(tmp_path / "data", seeds={"train": range(12), "val": range(10, 20)})
    with pytest.raises(DataError, match="2 images are used both to calibrate and to evaluate"):
        chosen(where, model)
    assert chosen(where, model, allow_overlap=True) == (12, 10)


def test_empty_files_are_damaged_and_not_the_same_image(model: Checkpoint, tmp_path: Path) -> None:
    where = folder(tmp_path / "data", seeds={"train": range(12), "val": range(20, 30)})
    for split in ("train", "val"):
        (where / split / "3" / "empty.png").touch()
    assert chosen(where, model) == (13, 11)
