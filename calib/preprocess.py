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
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from calib.images import Entry, ImageSet
    from pipeline.records import Preprocessing

    Pixels = NDArray[np.float32]

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
MAX_PIXELS = 64 * 2**20
"""Above this an image is refused before it is decoded (a decompression bomb)."""
WORTHWHILE = 1000
"""Images below which a process that decodes ahead does not earn its start."""
MAX_WORKERS = 4
"""For each process that infers; more only wait for it."""
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
FEW, AT_A_TIME = 3, 8


class Unreadable(DataError):  # noqa: N818 - it says what the image is
    """An image that is no image or is damaged; `batches` can leave it out."""


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


def batches(
    images: ImageSet,
    preprocessing: Preprocessing,
    batch: int,
    *,
    workers: int = 0,
    skipped: list[str] | None = None,
) -> Iterator[tuple[tuple[Entry, ...], Pixels]]:
    """Yield the set's readable images in order, `batch` at a time.

    Args:
        images: The set.
        preprocessing: How.
        batch: How many at a time; only the last may be fewer.
        workers: Processes that decode ahead, with the same result; 0 decodes here.
        skipped: Takes the names of unreadable images, in order; None makes one an error.

    Yields:
        The entries and their pixels, float32 of shape (N, channels, input_size, input_size).

    Raises:
        DataError: As `preprocess`, of unreadable images only where `skipped` is None.
        WorkerError: A process that decodes ahead died.
    """
    entries: list[Entry] = []
    pixels: list[Pixels] = []
    for entry, found in _stream(images, preprocessing, batch, workers):
        if isinstance(found, Unreadable):
            if skipped is None:
                # A worker's caller knows the errors of pipeline.errors and no others.
                raise DataError(found.got, allowed=found.allowed, do=found.do) from found
            skipped.append(entry.name)
            continue
        entries.append(entry)
        pixels.append(found)
        if len(entries) == batch:
            yield tuple(entries), np.stack(pixels)
            entries, pixels = [], []
    if entries:
        yield tuple(entries), np.stack(pixels)


def some_pixels(
    images: ImageSet, preprocessing: Preprocessing, n: int, *, after: int = 0
) -> Pixels:
    """Return the pixels of images drawn from a set, the same ones every time.

    Args:
        images: The set.
        preprocessing: How.
        n: How many; fewer where there are fewer, or where some cannot be decoded.
        after: Leaves out those that another call draws as its first `after`, where enough remain.

    Returns:
        float32 (N, channels, input_size, input_size), as of `preprocess`, in the set's order.

    Raises:
        DataError: Not one can be decoded.
    """
    # A set that was not drawn itself is in the order of its classes.
    order = np.random.default_rng(0).permutation(len(images.entries))
    drawn = sorted(order[max(0, min(after, len(order) - n)) :][:n])
    images = replace(images, entries=tuple(images.entries[index] for index in drawn))
    skipped: list[str] = []
    taken = [pixels for _, pixels in batches(images, preprocessing, AT_A_TIME, skipped=skipped)]
    if not taken:
        check_readable(images.label, len(images.entries), skipped)
    return np.concatenate(taken)


def check_readable(label: str, total: int, skipped: Sequence[str]) -> None:
    """Check that most images of a whole set, however it was divided, could be decoded.

    Raises:
        DataError: More than half could not.
    """
    if 2 * len(skipped) > total:
        raise DataError(
            f"{label}: more than half of {total} images are unreadable, as "
            + ", ".join(skipped[:FEW]),
            allowed="a few damaged images, which are left out",
            do="Check the data",
        )


def spare_workers(images: int, cores: int, *, beside: int = 1) -> int:
    """Return how many processes to decode ahead in; 0 decodes in the process that infers.

    Args:
        images: How many there are: for a few, starting a process costs more than it gives.
        cores: Of the machine.
        beside: How many processes infer side by side.
    """
    if images < WORTHWHILE:
        return 0
    return max(0, min(MAX_WORKERS, cores // beside - 1))


def _stream(
    images: ImageSet, preprocessing: Preprocessing, batch: int, workers: int
) -> Iterable[tuple[Entry, Pixels | Unreadable]]:
    if workers > 0:
        from calib.loader import ahead

        return ahead(images, preprocessing, batch, workers)
    return ((entry, attempt(images, entry, preprocessing)) for entry in images.entries)


def attempt(images: ImageSet, entry: Entry, preprocessing: Preprocessing) -> Pixels | Unreadable:
    """Return an image's pixels, or what makes it unreadable.

    Raises:
        DataError: As `preprocess`, where the image is not merely unreadable.
    """
    try:
        return preprocess(images.read(entry), entry.name, preprocessing)
    except Unreadable as error:
        return error


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
