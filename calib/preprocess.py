"""One preprocessing, shared by calibration, evaluation, latency and `predict`.

In: an image file's bytes and a `Preprocessing`. Out: float32 pixels in [0, 255], RGB, CHW, which is
what every artifact takes; mean and std are folded into the stem.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch import Tensor

    from calib.images import Entry, ImageSet
    from pipeline.records import Preprocessing

    Pixels = NDArray[np.float32]

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
MAX_PIXELS = 64 * 2**20
"""Above this an image is refused before it is decoded (a decompression bomb)."""
# What Pillow's decoders and its EXIF reader raise on damage.
UNREADABLE = (
    UnidentifiedImageError,
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    struct.error,
    zlib.error,
)


def decode(data: bytes, name: str) -> NDArray[np.uint8]:
    """Decode an image file to RGB.

    Args:
        data: The file's bytes.
        name: For messages.

    Returns:
        uint8 of shape (H, W, 3), turned as its EXIF orientation says.

    Raises:
        DataError: It is not an image, is damaged, or has too many pixels.
    """
    try:
        with warnings.catch_warnings():
            # Pillow only warns up to twice its own limit; ours is lower and an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise _bomb(name, f"{image.width} x {image.height} pixels")
                return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Image.DecompressionBombError as error:
        raise _bomb(name, str(error)) from error
    except UNREADABLE as error:
        raise DataError(
            f"{name} is not a readable image ({type(error).__name__})",
            allowed="whole JPEG, PNG, BMP, GIF, WebP, TIFF or PNM files",
            do="Take it out of the data or save it again",
        ) from error


def preprocess(data: bytes, name: str, preprocessing: Preprocessing) -> Pixels:
    """Turn an image file into the artifact's input.

    The shorter side is resized to input_size / crop_ratio (half-pixel centres, align_corners off),
    then the centre is cropped.

    Args:
        data: The file's bytes.
        name: For messages.
        preprocessing: How.

    Returns:
        float32 of shape (3, input_size, input_size), pixels in [0, 255].

    Raises:
        DataError: As `decode`.
    """
    import torch

    size = preprocessing.input_size
    pixels = torch.from_numpy(decode(data, name).copy()).permute(2, 0, 1)[None].float()
    height, width = pixels.shape[2:]
    shorter = round(size / preprocessing.crop_ratio)
    scale = shorter / min(height, width)
    target = [max(size, round(height * scale)), max(size, round(width * scale))]
    if target[0] * target[1] > MAX_PIXELS:
        raise _bomb(name, f"{target[1]} x {target[0]} pixels when resized")
    if target != [height, width]:
        pixels = _resize(pixels, target, preprocessing)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    cropped = pixels[0, :, top : top + size, left : left + size].clamp(0, 255)
    return np.ascontiguousarray(cropped.numpy())


def _resize(pixels: Tensor, size: list[int], preprocessing: Preprocessing) -> Tensor:
    from torch.nn import functional

    mode = preprocessing.interpolation
    if mode == "nearest":
        return functional.interpolate(pixels, size, mode="nearest-exact")
    return functional.interpolate(
        pixels, size, mode=mode, antialias=preprocessing.antialias, align_corners=False
    )


def batches(
    images: ImageSet, preprocessing: Preprocessing, batch: int
) -> Iterator[tuple[tuple[Entry, ...], Pixels]]:
    """Yield the set's images in order, `batch` at a time.

    Yields:
        The entries and their pixels, float32 of shape (N, 3, input_size, input_size).

    Raises:
        DataError: As `decode`, with the name of the image.
    """
    for start in range(0, len(images.entries), batch):
        entries = images.entries[start : start + batch]
        pixels = [preprocess(images.read(e), e.name, preprocessing) for e in entries]
        yield entries, np.stack(pixels)


def _bomb(name: str, what: str) -> DataError:
    return DataError(
        f"{name} would decode to {what}",
        allowed=f"images of at most {MAX_PIXELS} pixels",
        do="Take it out of the data",
    )
