"""One preprocessing, shared by calibration, evaluation, latency and `predict`.

In: an image file's bytes and a `Preprocessing`. Out: float32 pixels in [0, 255], CHW, RGB or grey,
which is what every artifact takes; mean and std are folded into the stem.

With antialias the resize is Pillow's on 8-bit pixels: the result is, grey level for grey level,
that of transformers' ConvNeXt image processor. Without, it is torch's interpolate on floats.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from calib.sources.base import Unreadable
from pipeline.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
RGB = 3
DEEP_TO_BYTE = 257
"""65535 / 255."""
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def decode(data: bytes, name: str, channels: int = RGB) -> NDArray[np.uint8]:
    """Decode an image file.

    The first frame counts. 16-bit grey is scaled to 8 bits. An alpha channel or a transparent
    colour is dropped, as the field's tools do, not blended with a background.

    Args:
        data: The file's bytes.
        name: For messages.
        channels: 3 for RGB, 1 for grey.

    Returns:
        uint8 of shape (H, W, channels), turned as its EXIF orientation says.

    Raises:
        Unreadable: It is not an image, is damaged, or its values have no range (floats).
        DataError: It has too many pixels.
    """
    pixels = np.array(decoded(data, name, channels))
    return pixels if channels == RGB else pixels[..., None]


def preprocess(data: bytes, name: str, preprocessing: Preprocessing) -> Pixels:
    """Turn an image file into the artifact's input.

    `center`: the shorter side is resized to resize_size (or input_size / crop_ratio, rounded
    down) and the longer with it, rounded down; then the centre is cropped, its offsets rounded
    down. `squash`: both sides are resized to input_size.

    Args:
        data: The file's bytes.
        name: For messages.
        preprocessing: How.

    Returns:
        float32 of shape (channels, input_size, input_size), pixels in [0, 255].

    Raises:
        Unreadable: As `decode`.
        DataError: As `decode` and `check`.
    """
    check(preprocessing)
    return fitted(decoded(data, name, preprocessing.channels), name, preprocessing)


def fitted(image: Image.Image, name: str, preprocessing: Preprocessing) -> Pixels:
    """Return what `preprocess` does of an image that is decoded.

    Raises:
        DataError: It has too many pixels when resized.
    """
    width, height = resized = _resized(image.width, image.height, preprocessing)
    if width * height > MAX_PIXELS:
        raise _bomb(name, f"{width} x {height} pixels when resized")
    size = preprocessing.input_size
    left, top = (width - size) // 2, (height - size) // 2
    if resized == image.size or preprocessing.antialias:
        image = image.resize(resized, FILTERS[preprocessing.interpolation])
        return _planes(image.crop((left, top, left + size, top + size)), preprocessing.channels)
    pixels = _interpolated(image, resized, preprocessing)
    return np.ascontiguousarray(pixels[:, top : top + size, left : left + size].clip(0, 255))


def cropped(
    image: Image.Image, box: tuple[int, int, int, int], preprocessing: Preprocessing
) -> Pixels:
    """Resize a part of a decoded image to the input, with the preprocessing's interpolation.

    Args:
        image: As of `decoded`.
        box: The part's left, top, right and bottom, in the image's pixels.
        preprocessing: How; its own crop has no part in it.

    Returns:
        As `preprocess`.
    """
    size = (preprocessing.input_size, preprocessing.input_size)
    if preprocessing.antialias:
        image = image.resize(size, FILTERS[preprocessing.interpolation], box=box)
        return _planes(image, preprocessing.channels)
    pixels = _interpolated(image.crop(box), size, preprocessing)
    return np.ascontiguousarray(pixels.clip(0, 255))


def check(preprocessing: Preprocessing) -> None:
    """Refuse a preprocessing whose settings contradict each other.

    Raises:
        DataError: The crop is larger than what it is cut from, or the filter needs antialias.
    """
    size, resize = preprocessing.input_size, preprocessing.resize_size
    if preprocessing.crop_mode == "center" and resize is not None and resize < size:
        raise DataError(
            f"resize_size is {resize} and input_size {size}: the crop is larger than the image",
            allowed="a resize_size of at least input_size",
            do="Correct the preprocessing",
        )
    if preprocessing.interpolation == "lanczos" and not preprocessing.antialias:
        raise DataError(
            "interpolation lanczos without antialias",
            allowed="nearest, bilinear or bicubic without antialias",
            do="Correct the preprocessing",
        )


def decoded(data: bytes, name: str, channels: int) -> Image.Image:
    """Return what `decode` does as Pillow's image, its mode RGB or L.

    Raises:
        Unreadable: As `decode`.
        DataError: As `decode`.
    """
    try:
        with warnings.catch_warnings():
            # Bombs are an error here, below Pillow's own limit; transparency is dropped knowingly.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise _bomb(name, f"{image.width} x {image.height} pixels")
                deep = _eight_bits(ImageOps.exif_transpose(image), image.format, name)
                return deep.convert("RGB" if channels == RGB else "L")
    except Image.DecompressionBombError as error:
        raise _bomb(name, str(error)) from error
    except UNREADABLE as error:
        raise Unreadable(
            f"{name} is not a readable image ({type(error).__name__})",
            allowed="whole JPEG, PNG, BMP, GIF, WebP, TIFF or PNM files of 1 to 16 bits",
            do="Take it out of the data or save it again",
        ) from error


def _eight_bits(image: Image.Image, kind: str | None, name: str) -> Image.Image:
    """Scale 16-bit grey to 8 bits: Pillow's own conversion would clip it at 255.

    Raises:
        Unreadable: The pixels are floats or 32-bit integers, whose white is anywhere.
    """
    if image.mode == "La":
        return image.convert("LA")
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PPM"):
        deep = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((deep + DEEP_TO_BYTE // 2) // DEEP_TO_BYTE).astype(np.uint8))
    if image.mode in {"I", "F"}:
        raise Unreadable(
            f"{name} is not a readable image (its pixels are"
            f" {'floats' if image.mode == 'F' else '32-bit integers'})",
            allowed="images of 1 to 16 bits per channel",
            do="Take it out of the data or save it with 8 bits",
        )
    return image


def _resized(width: int, height: int, preprocessing: Preprocessing) -> tuple[int, int]:
    size = preprocessing.input_size
    if preprocessing.crop_mode == "squash":
        return size, size
    shorter = preprocessing.shorter_side
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def _planes(image: Image.Image, channels: int) -> Pixels:
    pixels = np.asarray(image, np.float32).reshape(image.height, image.width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _interpolated(image: Image.Image, size: tuple[int, int], how: Preprocessing) -> Pixels:
    """Resize float pixels with half-pixel centres and without a filter: (C, H, W)."""
    import torch
    from torch.nn import functional

    array = np.array(image).reshape(image.height, image.width, how.channels)
    pixels = torch.from_numpy(array).permute(2, 0, 1)[None].float()
    target = [size[1], size[0]]
    if how.interpolation == "nearest":
        found = functional.interpolate(pixels, target, mode="nearest-exact")
    else:
        found = functional.interpolate(
            pixels, target, mode=how.interpolation, align_corners=False, antialias=False
        )
    return found[0].numpy()


def _bomb(name: str, what: str) -> DataError:
    return DataError(
        f"{name} would decode to {what}",
        allowed=f"images of at most {MAX_PIXELS} pixels",
        do="Take it out of the data",
    )
