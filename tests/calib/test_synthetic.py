"""Images out of nothing are reproducible, and look like something."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from calib.images import open_images
from calib.sources.synthetic import IMAGES, SIDE, Synthetic


def pixels(name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.asarray(Image.open(io.BytesIO(Synthetic().read(name))), np.float64)


def test_they_calibrate_and_do_not_evaluate() -> None:
    images = open_images("none", "calibration")
    assert len(images.entries) == IMAGES
    assert images.classes is None
    assert Image.open(io.BytesIO(images.read(images.entries[0]))).size == (SIDE, SIDE)


def test_the_same_name_is_the_same_image_and_another_is_another() -> None:
    assert Synthetic().read("0001.png") == Synthetic().read("0001.png")
    assert Synthetic().read("0001.png") != Synthetic().read("0002.png")


def test_they_have_edges_and_smooth_parts() -> None:
    """Neighbours are mostly alike, as in photographs, and now and then far apart."""
    steps = np.concatenate(
        [np.abs(np.diff(pixels(f"{i:04d}.png"), axis=1)).ravel() for i in range(8)]
    )
    assert np.median(steps) < 6
    assert np.quantile(steps, 0.995) > 30
