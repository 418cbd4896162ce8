"""One image file in, the artifact's pixels out."""

from __future__ import annotations

import importlib
import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from calib.batches import batches
from calib.images import open_images
from calib.preprocess import decode, preprocess
from calib.sources.base import Unreadable
from pipeline.errors import DataError
from pipeline.records import CropMode, Interpolation, Preprocessing

PLAIN = Preprocessing(input_size=8, crop_ratio=1.0, interpolation="bilinear", antialias=False)


def _file(pixels: NDArray[np.uint8], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def _noise(height: int, width: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_an_image_of_the_right_size_is_left_alone() -> None:
    image = _noise(8, 8)
    found = preprocess(_file(image), "x", PLAIN)
    assert found.dtype == np.float32
    assert found.flags["C_CONTIGUOUS"]
    assert (found == image.transpose(2, 0, 1)).all()


def test_the_centre_is_cropped_after_the_resize() -> None:
    image = _noise(16, 16)
    half = Preprocessing(input_size=8, crop_ratio=0.5)
    found = preprocess(_file(image), "x", half)
    assert (found == image[4:12, 4:12].transpose(2, 0, 1)).all()


def test_the_longer_side_loses_its_ends() -> None:
    image = _noise(8, 20)
    found = preprocess(_file(image), "x", PLAIN)
    assert (found == image[:, 6:14].transpose(2, 0, 1)).all()


def test_half_pixel_centres_by_hand() -> None:
    row = np.array([0, 100], np.uint8)
    image = np.broadcast_to(row[None, :, None], (2, 2, 3)).astype(np.uint8)
    four = Preprocessing(input_size=4, crop_ratio=1.0, interpolation="bilinear", antialias=False)
    found = preprocess(_file(image), "x", four)
    assert found[0, 0].tolist() == [0, 25, 75, 100]


def test_nearest_repeats_pixels() -> None:
    image = _noise(4, 4)
    nearest = Preprocessing(input_size=8, crop_ratio=1.0, interpolation="nearest")
    found = preprocess(_file(image), "x", nearest)
    assert (found == image.transpose(2, 0, 1).repeat(2, axis=1).repeat(2, axis=2)).all()


def test_nearest_without_antialias_takes_the_pixel_at_the_centre() -> None:
    row = np.arange(5, dtype=np.uint8)
    image = np.broadcast_to(row[None, :, None], (5, 5, 3)).astype(np.uint8)
    how = Preprocessing(input_size=3, crop_ratio=1.0, interpolation="nearest", antialias=False)
    assert preprocess(_file(image), "x", how)[0, 0].tolist() == [0, 2, 4]


def test_antialias_averages_what_it_leaves_out() -> None:
    board = (np.indices((32, 32)).sum(axis=0) % 2 * 255).astype(np.uint8)
    image = np.repeat(board[..., None], 3, axis=2)
    smooth = Preprocessing(input_size=8, crop_ratio=1.0, interpolation="bilinear", antialias=True)
    found = preprocess(_file(image), "x", smooth)
    assert np.abs(found - 127.5).max() < 16


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(5, 9), (31, 17), (3, 100), (1, 1)])
def test_pixels_are_of_the_size_and_range(
    height: int, width: int, interpolation: Interpolation
) -> None:
    image = np.where(_noise(height, width) > 127, 255, 0).astype(np.uint8)
    chosen = Preprocessing(input_size=16, interpolation=interpolation)
    found = preprocess(_file(image), "x", chosen)
    assert found.shape == (3, 16, 16)
    assert found.min() >= 0
    assert found.max() <= 255


def test_an_extreme_aspect_ratio_is_refused_before_it_is_resized() -> None:
    how = Preprocessing(input_size=224)
    with pytest.raises(DataError, match="when resized"):
        preprocess(_file(np.zeros((1, 10_000, 3), np.uint8)), "sliver.png", how)


def _photo(height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """Smooth colours with hard edges of black and white, where bicubic overshoots."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [
        np.sin(x * rng.uniform(0.01, 0.4) + rng.uniform(0, 6)) * np.cos(y * rng.uniform(0.01, 0.4))
        for _ in range(3)
    ]
    image = np.stack(waves, axis=-1) * 90 + 128 + rng.normal(0, 8, (height, width, 3))
    image[height // 3 : height // 2, width // 4 :] = 255
    image[height // 2 : 2 * height // 3, : width // 2] = 0
    return image.clip(0, 255).astype(np.uint8)


def _reference(image: NDArray[np.uint8], how: Preprocessing, size: int, ratio: float) -> Any:
    module = importlib.import_module("transformers.models.convnext.image_processing_pil_convnext")
    processor = module.ConvNextImageProcessorPil(
        size={"shortest_edge": size},
        crop_pct=ratio,
        resample=Image.Resampling[how.interpolation.upper()],
        do_rescale=False,
        do_normalize=False,
    )
    return np.asarray(processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0])


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "nearest"])
@pytest.mark.parametrize(
    ("size", "ratio", "mode"),
    [(224, 224 / 256, "center"), (96, 0.95, "center"), (384, 1.0, "squash"), (416, 1.0, "squash")],
)
def test_pixels_are_those_of_transformers_processor(
    size: int, ratio: float, mode: CropMode, interpolation: Interpolation
) -> None:
    how = Preprocessing(
        input_size=size, crop_ratio=ratio, crop_mode=mode, interpolation=interpolation
    )
    for seed, shape in enumerate([(375, 500), (501, 333), (257, 1023), (97, 113), (256, 256)]):
        image = _photo(*shape, seed)
        found = preprocess(_file(image), "x", how)
        assert (found == _reference(image, how, size, ratio)).all(), shape


@given(height=st.integers(8, 90), width=st.integers(8, 90), size=st.integers(8, 40))
@settings(max_examples=40, deadline=None)
def test_any_geometry_is_that_of_transformers_processor(height: int, width: int, size: int) -> None:
    image = _photo(height, width, 0)
    how = Preprocessing(input_size=size)
    found = preprocess(_file(image), "x", how)
    assert (found == _reference(image, how, size, 0.875)).all()


def test_resize_size_states_the_shorter_side() -> None:
    data = _file(_photo(90, 120, 1))
    stated = Preprocessing(input_size=32, resize_size=40, crop_ratio=1.0)
    assert (
        preprocess(data, "x", stated)
        == preprocess(data, "x", Preprocessing(input_size=32, crop_ratio=0.8))
    ).all()


def test_floats_are_interpolated_as_before() -> None:
    image = _photo(61, 83, 2)
    how = Preprocessing(input_size=48, crop_ratio=0.75, interpolation="bicubic", antialias=False)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    whole = torch.nn.functional.interpolate(
        pixels, [64, int(64 * 83 / 61)], mode="bicubic", align_corners=False
    )
    expected = whole[0, :, 8:56, 19 : 19 + 48].clamp(0, 255).numpy()
    left = (int(64 * 83 / 61) - 48) // 2
    assert left == 19
    assert (preprocess(_file(image), "x", how) == expected).all()


def test_settings_that_contradict_are_refused() -> None:
    data = _file(_noise(9, 9))
    for how, message in (
        (Preprocessing(input_size=32, resize_size=31), "the crop is larger than the image"),
        (Preprocessing(input_size=32, interpolation="lanczos", antialias=False), "lanczos"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            preprocess(data, "x", how)
        assert not isinstance(caught.value, Unreadable)
        with pytest.raises(DataError, match=message):
            next(batches(open_images("digits", "evaluation"), how, 1))


def test_one_channel_is_grey() -> None:
    image = _noise(8, 8)
    for antialias in (False, True):
        how = Preprocessing(
            input_size=8, crop_ratio=1.0, antialias=antialias, mean=(0.5,), std=(0.5,)
        )
        found = preprocess(_file(image), "x", how)
        assert found.shape == (1, 8, 8)
        assert (found[0] == np.asarray(Image.fromarray(image).convert("L"))).all()
    assert decode(_file(image), "x", channels=1).shape == (8, 8, 1)
