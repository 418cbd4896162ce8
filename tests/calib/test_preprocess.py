"""One image file in, the artifact's pixels out."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from calib.images import open_images
from calib.preprocess import batches, decode, preprocess
from pipeline.errors import DataError
from pipeline.records import Interpolation, Preprocessing

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


def test_grey_and_palette_become_rgb() -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    found = preprocess(_file(grey), "x", PLAIN)
    assert (found == grey[None]).all()
    palette = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), (255, 0, 0), np.uint8)).convert("P").save(palette, "GIF")
    assert preprocess(palette.getvalue(), "x", PLAIN)[:, 0, 0].tolist() == [255, 0, 0]


def test_the_exif_orientation_is_followed() -> None:
    image = Image.fromarray(_noise(4, 6))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    found = decode(buffer.getvalue(), "x")
    assert found.shape == (6, 4, 3)
    assert (found == np.rot90(np.asarray(image), -1)).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_a_truncated_image_is_a_data_error(kind: str, share: float) -> None:
    whole = _file(_noise(64, 64), kind)
    with pytest.raises(DataError, match=r"cat/1\.png is not a readable image"):
        decode(whole[: int(len(whole) * share)], "cat/1.png")


def test_text_is_a_data_error() -> None:
    with pytest.raises(DataError, match="UnidentifiedImageError"):
        decode(b"<html>not found</html>", "x")


@pytest.mark.parametrize("side", [9_000, 40_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side: int) -> None:
    small = _file(_noise(2, 2))
    header = b"IHDR" + struct.pack(">II", side, side) + small[24:29]
    bomb = small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]
    with pytest.raises(DataError, match="would decode to"):
        decode(bomb, "bomb.png")


def test_batches_come_in_order_and_whole() -> None:
    found = open_images("digits", "evaluation").sample(7, 1)
    parts = list(batches(found, PLAIN, 3))
    assert [len(entries) for entries, _ in parts] == [3, 3, 1]
    assert [entry for entries, _ in parts for entry in entries] == list(found.entries)
    assert [pixels.shape for _, pixels in parts] == [(3, 3, 8, 8), (3, 3, 8, 8), (1, 3, 8, 8)]
    last = found.entries[-1]
    assert (parts[-1][1][0] == preprocess(found.read(last), last.name, PLAIN)).all()


def test_an_extreme_aspect_ratio_is_refused_before_it_is_resized() -> None:
    how = Preprocessing(input_size=224)
    with pytest.raises(DataError, match="when resized"):
        preprocess(_file(np.zeros((1, 10_000, 3), np.uint8)), "sliver.png", how)
