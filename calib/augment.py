"""The images of training, augmented, in an order that can be repeated.

In: an `ImageSet`, a `Preprocessing`, an `Augmentation`, a seed and the epoch's number. Out: batches
of float32 pixels in [0, 255], CHW, as every artifact takes them, with their labels.

What is drawn for an image depends on the seed, the epoch and the image's index in the set, and the
order of the images on the seed and the epoch. So a training that is resumed, or divided among
several processes, sees the pixels that one process sees in one go.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from calib.batches import check_readable
from calib.preprocess import RGB, check, cropped, decoded, fitted
from calib.sources.base import Unreadable
from pipeline.errors import DataError, MissingRuntimeError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

    from calib.images import Entry, ImageSet
    from calib.preprocess import Pixels
    from pipeline.records import Augmentation, Preprocessing

TRIES = 10
"""Of a random part, before it is the centre: a narrow image may have no part that is meant."""
RATIO = (3 / 4, 4 / 3)
"""Of a part's width to its height."""
UNLABELLED = -1
WHITE = 255
LUMA = np.array([0.299, 0.587, 0.114], np.float32).reshape(RGB, 1, 1)
"""What red, green and blue are in grey, as Pillow has it."""
SEEDS = 2**64
"""Numpy takes no seed below 0."""


class _Drawn(NamedTuple):
    """One image's pixels and label, and the names of the unreadable ones that it stands for."""

    pixels: Pixels
    label: int
    unreadable: tuple[str, ...]


def batches_per_epoch(n: int, batch: int) -> int:
    """Return how many batches an epoch has: its last images, too few for a batch, are dropped.

    A set that is smaller than one batch is a batch itself.

    Args:
        n: How many images the set has.
        batch: How many are taken at a time.
    """
    return max(n // batch, min(n, 1))


def training_batches(  # noqa: PLR0913 - each is a choice of its own
    images: ImageSet,
    preprocessing: Preprocessing,
    how: Augmentation,
    *,
    batch: int,
    seed: int,
    epoch: int,
    start: int = 0,
    share: tuple[int, int] = (0, 1),
    workers: int = 0,
    skipped: set[str] | None,
) -> Iterator[tuple[Pixels, NDArray[np.int64]]]:
    """Yield one epoch's batches: `batches_per_epoch` of them, less those already behind.

    An unreadable image is replaced by the next in the set that can be read, as that one would look
    in its own place. A source that is sequential is read in the order of the epoch all the same.

    Args:
        images: The set.
        preprocessing: How images become inputs.
        how: How they vary.
        batch: How many at a time, over all processes; of a smaller set, all.
        seed: Of the order and of all that is drawn.
        epoch: Which one, from 0.
        start: How many of its batches are behind; their images are not read.
        share: This process's rank and the number of processes. Each takes one contiguous part of
            every batch; one after the other they are the batch of a single process.
        workers: Processes that decode ahead, with the same result; 0 decodes here.
        skipped: Takes the names of unreadable images of this process's share; None makes one an
            error.

    Yields:
        Pixels, float32 of shape (N, channels, input_size, input_size) in [0, 255], and labels,
        int64 of shape (N,), -1 for an image without one.

    Raises:
        DataError: As `preprocess`, of unreadable images where `skipped` is None or holds more than
            half of the set.
        MissingRuntimeError: RandAugment is wanted, and kornia is not installed.
        UsageError: A batch cannot be divided among the processes.
        WorkerError: A process that decodes ahead died.
    """
    check(preprocessing)
    if how.randaugment:
        _randaugment(how.randaugment, how.magnitude)
    n = len(images.entries)
    rank, ranks = share
    size = min(batch, n)
    if batch % ranks or size % ranks:
        raise UsageError(
            f"batches of {batch if batch % ranks else size} images among {ranks} processes",
            allowed="a batch, and a set where it is smaller, that divides into equal parts",
            do=f"Take a batch that is a multiple of {ranks}, or another number of processes",
        )
    count, part = batches_per_epoch(n, batch), size // ranks
    order = _generator(seed, epoch).permutation(n)[: count * size]
    indices = order.reshape(count, ranks, part)[start:, rank].ravel().tolist()
    draw = _Draw(images, preprocessing, how, seed, epoch, replaces=skipped is not None)
    found: Iterable[_Drawn] = map(draw, indices)
    if workers > 0:
        from calib.loader import done_ahead

        found = done_ahead(draw, indices, part, workers)
    return _batched(iter(found), part, images, skipped)


def crop_box(
    width: int, height: int, least: float, generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw a part of an image: its area evenly, its aspect ratio evenly on a logarithmic scale.

    Args:
        width: Of the image, in pixels.
        height: Of the image, in pixels.
        least: The part's least area, as a share of the image's.
        generator: What draws.

    Returns:
        Its left, top, right and bottom, in whole pixels. Where no draw fits into the image, it is
        the largest part in the centre whose aspect ratio is allowed.
    """
    narrowest, widest = RATIO
    for _ in range(TRIES):
        area = width * height * generator.uniform(least, 1)
        ratio = math.exp(generator.uniform(math.log(narrowest), math.log(widest)))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left = int(generator.integers(width - across, endpoint=True))
            top = int(generator.integers(height - down, endpoint=True))
            return left, top, left + across, top + down
    across = min(width, max(1, round(height * widest)))
    down = min(height, max(1, round(width / narrowest)))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


@dataclass(frozen=True, slots=True)
class _Draw:
    """What an epoch makes of the image with a given index; it pickles."""

    images: ImageSet
    preprocessing: Preprocessing
    how: Augmentation
    seed: int
    epoch: int
    replaces: bool

    def __call__(self, index: int) -> _Drawn:
        """Return the image, or the next that is readable.

        Raises:
            DataError: As `training_batches`.
        """
        entries = self.images.entries
        unreadable: list[str] = []
        while True:
            entry = entries[index]
            try:
                pixels = self._pixels(entry, index)
            except Unreadable as error:
                if not self.replaces:
                    # As `batches`: a caller knows the errors of pipeline.errors and no others.
                    raise DataError(error.got, allowed=error.allowed, do=error.do) from error
                unreadable.append(entry.name)
                # The search ends here at the latest: by then it has seen half of the set.
                check_readable(self.images.label, len(entries), unreadable)
                index = (index + 1) % len(entries)
            else:
                label = UNLABELLED if entry.label is None else entry.label
                return _Drawn(pixels, label, tuple(unreadable))

    def _pixels(self, entry: Entry, index: int) -> Pixels:
        how, preprocessing = self.how, self.preprocessing
        image = decoded(self.images.read(entry), entry.name, preprocessing.channels)
        generator = _generator(self.seed, self.epoch, index)
        mirrored = generator.random() < how.flip
        factors = generator.uniform(1 - how.colour, 1 + how.colour, 3).tolist()
        seed = int(generator.integers(2**63))
        if how.crop < 1:
            box = crop_box(image.width, image.height, how.crop, generator)
            pixels = cropped(image, box, preprocessing)
        else:
            pixels = fitted(image, entry.name, preprocessing)
        if mirrored:
            pixels = np.ascontiguousarray(pixels[:, :, ::-1])
        if how.colour > 0:
            pixels = _coloured(pixels, *factors)
        if how.randaugment:
            pixels = _randaugmented(pixels, how, seed)
        return pixels


def _generator(seed: int, *where: int) -> np.random.Generator:
    """Return what draws for one place in training, whatever was drawn elsewhere."""
    return np.random.default_rng(np.random.SeedSequence(seed % SEEDS, spawn_key=where))


def _batched(
    found: Iterator[_Drawn], size: int, images: ImageSet, skipped: set[str] | None
) -> Iterator[tuple[Pixels, NDArray[np.int64]]]:
    while batch := list(islice(found, size)):
        unreadable = {name for drawn in batch for name in drawn.unreadable}
        if unreadable and skipped is not None:
            skipped |= unreadable
            check_readable(images.label, len(images.entries), sorted(skipped))
        labels = np.array([drawn.label for drawn in batch], np.int64)
        yield np.stack([drawn.pixels for drawn in batch]), labels


def _coloured(pixels: Pixels, brightness: float, contrast: float, saturation: float) -> Pixels:
    pixels = (pixels * brightness).clip(0, WHITE)
    pixels = _apart(pixels, _grey(pixels).mean(keepdims=True), contrast)
    return _apart(pixels, _grey(pixels), saturation)


def _apart(pixels: Pixels, middle: Pixels, factor: float) -> Pixels:
    return ((pixels - middle) * factor + middle).clip(0, WHITE)


def _grey(pixels: Pixels) -> Pixels:
    return (pixels * LUMA).sum(axis=0, keepdims=True) if len(pixels) == RGB else pixels


def _randaugmented(pixels: Pixels, how: Augmentation, seed: int) -> Pixels:
    """Return pixels as RandAugment leaves them: the same for the same seed, whatever is around.

    One image at a time: on a whole batch kornia would choose the operations once for all of it,
    and what it draws would depend on the batch's size. With two operations an image alone takes
    2.1 ms at 64 px and 6 ms at 224 px; in a batch of 64 it takes 0.6 and 9 ms (one thread of two
    cores that others used as well). Workers share that out; each imports kornia anew in every
    epoch (0.3 s).
    """
    import torch

    augment = _randaugment(how.randaugment, how.magnitude)
    # kornia draws from the global generator. It is the CPU's alone that is seeded and restored:
    # torch.manual_seed would also seed those of all devices.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        # Saturation is defined for colours only: grey is shown as one and stays grey.
        unit = torch.from_numpy(pixels / WHITE).expand(1, RGB, -1, -1)
        found: Pixels = augment(unit)[0, : len(pixels)].clamp(0, 1).numpy()
    return found * WHITE


@cache
def _randaugment(operations: int, magnitude: int) -> Callable[[Any], Any]:
    try:
        from kornia.augmentation.auto import RandAugment
    except ImportError as error:
        raise MissingRuntimeError(
            "RandAugment is kornia's, and kornia is not installed",
            allowed="an environment with the extra [train]",
            do="Run: pip install 'convnext-edge[train]'",
        ) from error
    return RandAugment(operations, magnitude, transformation_matrix_mode="skip")
