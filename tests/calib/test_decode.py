"""Every kind of image file becomes eight bits of RGB or grey, or says that it cannot."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from calib.preprocess import decode, preprocess
from calib.sources.base import Unreadable
from pipeline.errors import DataError
from pipeline.records import Preprocessing

PLAIN = Preprocessing(input_size=8, crop_ratio=1.0, interpolation="bilinear", antialias=False)


def _file(pixels: NDArray[np.uint8], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def _noise(height: int, width: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


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


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_of_grey_are_scaled(kind: str) -> None:
    deep = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    deep[0, :3] = (128, 129, 65535)
    found = decode(_saved(Image.fromarray(deep), kind), "x")
    assert found[0, :3, 0].tolist() == [0, 1, 255]
    expected = np.arange(256).reshape(16, 16)
    assert (found[1:, :, 0] == expected[1:]).all()
    assert (found == found[..., :1]).all()


def test_sixteen_bits_of_grey_in_big_endian_are_scaled() -> None:
    deep = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024).astype(">u2")
    entries = [
        (256, 3, 8), (257, 3, 8), (258, 3, 16), (259, 3, 1), (262, 3, 1),
        (273, 4, 8 + 2 + 9 * 12 + 4), (277, 3, 1), (278, 3, 8), (279, 4, 128),
    ]  # fmt: skip
    head = b"MM\0*" + struct.pack(">IH", 8, len(entries))
    for tag, kind, value in entries:
        head += struct.pack(">HHI", tag, kind, 1)
        head += struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value)
    data = head + bytes(4) + deep.tobytes()
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "I;16B"
    assert (decode(data, "x")[..., 0] == np.round(deep / 257).astype(np.uint8)).all()


def _png_of(kind: int, depth: int, rows: list[bytes], side: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", side, side, depth, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def test_sixteen_bits_of_colour_keep_their_levels() -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (8, 8, 3)).astype(">u2")
    found = decode(_png_of(2, 16, [row.tobytes() for row in deep], 8), "x")
    assert np.abs(found.astype(float) - deep / 257).max() <= 1


@pytest.mark.parametrize("kind", ["CMYK", "YCCK"])
def test_print_colours_become_rgb(kind: str) -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    data = bytearray(_saved(image, "JPEG", quality=100))
    at = data.index(b"Adobe")
    if kind == "YCCK":
        # The same bytes read as luma and chroma: Adobe's marker says which they are.
        data[at + 11] = 2
    with Image.open(io.BytesIO(bytes(data))) as opened:
        assert opened.mode == "CMYK"
        expected = np.asarray(opened.convert("RGB"))
    found = decode(bytes(data), "x")
    assert (found == expected).all()
    red = found.reshape(-1, 3).mean(axis=0)
    assert (np.abs(red - [255, 0, 0]).max() < 4) == (kind == "CMYK")


def test_alpha_is_dropped_and_not_blended() -> None:
    image = np.dstack([_noise(8, 8), np.zeros((8, 8, 1), np.uint8)])
    for kind in ("PNG", "TIFF"):
        assert (decode(_file(image, kind), "x") == image[..., :3]).all()
    grey = np.stack([image[..., 0], image[..., 3]], axis=-1)
    found = decode(_saved(Image.fromarray(grey), "PNG"), "x")
    assert (found == image[..., :1]).all()


def test_grey_multiplied_by_its_alpha_is_divided_by_it() -> None:
    data = _saved(Image.new("LA", (4, 4), (60, 128)), "TIFF")
    # ExtraSamples: 2 is alpha beside the grey, 1 is alpha that the grey was multiplied by.
    tag, multiplied = struct.pack("<HHIH", 338, 3, 1, 2), struct.pack("<HHIH", 338, 3, 1, 1)
    assert data.count(tag) == 1
    assert decode(data, "x")[0, 0].tolist() == [60, 60, 60]
    assert decode(data.replace(tag, multiplied), "x")[0, 0].tolist() == [119, 119, 119]


@pytest.mark.parametrize("transparency", [0, bytes([0, 128])])
def test_a_palette_with_transparency_keeps_its_colours(transparency: int | bytes) -> None:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    found = decode(_saved(image, "PNG", transparency=transparency), "x")
    assert found[0, :2].tolist() == [[10, 20, 30], [40, 50, 60]]


def test_two_levels_are_black_and_white() -> None:
    image = Image.fromarray(_noise(8, 8)[..., 0] > 127)
    for kind in ("PNG", "TIFF", "PPM"):
        found = decode(_saved(image, kind), "x")
        assert (found[..., 0] == np.asarray(image) * 255).all()


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "PNG", "TIFF"):
        data = _saved(frames[0], kind, save_all=True, append_images=frames[1:])
        assert decode(data, "x")[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_pixels_without_a_range_are_unreadable(kind: type) -> None:
    data = _saved(Image.fromarray(np.ones((4, 4), kind)), "TIFF")
    with pytest.raises(Unreadable, match="its pixels are"):
        decode(data, "x.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_deep_grey_is_followed(orientation: int) -> None:
    deep = np.arange(6, dtype=np.uint16).reshape(2, 3) * 257
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(_saved(Image.fromarray(deep), "PNG", exif=exif), "x")
    upright = np.arange(6).reshape(2, 3)
    turned = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.T, 6: np.rot90(upright, -1), 7: upright[::-1, ::-1].T, 8: np.rot90(upright),
    }  # fmt: skip
    assert (found[..., 0] == turned[orientation]).all()
