"""A set of images, a batch at a time: in order, without those that cannot be read."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from calib.batches import batches, check_readable, some_pixels
from calib.images import open_images
from calib.preprocess import preprocess
from calib.sources.base import Unreadable
from pipeline.errors import DataError
from pipeline.records import Preprocessing

PLAIN = Preprocessing(input_size=8, crop_ratio=1.0, interpolation="bilinear", antialias=False)


def _file(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _set_of(tmp_path: Path, bad: set[int], count: int = 7) -> Path:
    for i in range(count):
        data = _file(np.full((8, 8, 3), i, np.uint8))
        (tmp_path / f"{i}.png").write_bytes(data[: len(data) // 2] if i in bad else data)
    return tmp_path


def test_batches_come_in_order_and_whole() -> None:
    found = open_images("digits", "evaluation").sample(7, 1)
    parts = list(batches(found, PLAIN, 3))
    assert [len(entries) for entries, _ in parts] == [3, 3, 1]
    assert [entry for entries, _ in parts for entry in entries] == list(found.entries)
    assert [pixels.shape for _, pixels in parts] == [(3, 3, 8, 8), (3, 3, 8, 8), (1, 3, 8, 8)]
    last = found.entries[-1]
    assert (parts[-1][1][0] == preprocess(found.read(last), last.name, PLAIN)).all()


def test_unreadable_images_are_left_out_and_named(tmp_path: Path) -> None:
    found = open_images(str(_set_of(tmp_path, {0, 3, 6})), "calibration")
    skipped: list[str] = []
    parts = list(batches(found, PLAIN, 3, skipped=skipped))
    assert skipped == ["0.png", "3.png", "6.png"]
    assert [[e.name for e in entries] for entries, _ in parts] == [
        ["1.png", "2.png", "4.png"],
        ["5.png"],
    ]
    values = [float(p[0, 0, 0]) for _, pixels in parts for p in pixels]
    assert values == [1, 2, 4, 5]
    with pytest.raises(DataError, match=r"0\.png is not a readable image"):
        list(batches(found, PLAIN, 3))


@pytest.mark.parametrize("bad", [{0, 1, 2, 3}, set(range(7))])
def test_a_set_that_is_mostly_unreadable_is_refused(tmp_path: Path, bad: set[int]) -> None:
    found = open_images(str(_set_of(tmp_path, bad)), "calibration")
    skipped: list[str] = []
    message = r"more than half of 7 images are unreadable, as 0\.png, 1\.png, 2\.png"
    assert sum(len(entries) for entries, _ in batches(found, PLAIN, 2, skipped=skipped)) < 4
    with pytest.raises(DataError, match=message):
        check_readable(found.label, len(found.entries), skipped)


def test_a_bomb_is_an_error_and_is_not_left_out(tmp_path: Path) -> None:
    root = _set_of(tmp_path, set())
    data = (root / "5.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 40_000, 40_000) + data[24:29]
    checked = header + struct.pack(">I", zlib.crc32(header))
    (root / "5.png").write_bytes(data[:12] + checked + data[33:])
    found = open_images(str(root), "calibration")
    with pytest.raises(DataError, match=r"5\.png would decode to") as caught:
        list(batches(found, PLAIN, 2, skipped=[]))
    assert not isinstance(caught.value, Unreadable)


def test_some_images_are_of_all_classes_and_others_are_others(tmp_path: Path) -> None:
    """A folder is in the order of its classes: its first images would be of one class."""
    for index in range(60):
        kind = tmp_path / f"class{index // 20}"
        kind.mkdir(exist_ok=True)
        image = Image.new("RGB", (8, 8), (4 * index, 0, 0))
        image.save(kind / f"{index:02}.png")
    images = open_images(str(tmp_path), "calibration")

    def indices(n: int, after: int = 0) -> list[int]:
        return [int(p[0, 0, 0]) // 4 for p in some_pixels(images, PLAIN, n, after=after)]

    first, others = indices(24), indices(12, after=24)
    assert len(set(first)) == 24
    assert {index // 20 for index in first} == {0, 1, 2}
    assert first == sorted(first)
    assert not set(first) & set(others)
    assert len(others) == 12
    # Too few remain: then they are not others.
    assert len(indices(12, after=55)) == 12
    assert len(indices(100)) == 60


def test_not_one_image_to_draw_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="unreadable"):
        some_pixels(open_images(str(tmp_path), "calibration"), PLAIN, 3)
