"""The pixels of a set of images, a batch at a time, and what is left out of it.

In: an `ImageSet` and a `Preprocessing`. Out: entries and their pixels, in order; the names of those
that cannot be read.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from calib.preprocess import preprocess
from calib.sources.base import Unreadable
from pipeline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from calib.images import Entry, ImageSet
    from calib.preprocess import Pixels
    from pipeline.records import Preprocessing

WORTHWHILE = 1000
"""Images below which a process that decodes ahead does not earn its start."""
MAX_WORKERS = 4
"""For each process that infers; more only wait for it."""
FEW, AT_A_TIME = 3, 8


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
    attempt = partial(_attempt, images, preprocessing)
    if workers > 0:
        from calib.loader import done_ahead  # torch is slow to import

        found = done_ahead(attempt, range(len(images.entries)), batch, workers)
        return zip(images.entries, found, strict=True)
    return ((entry, attempt(index)) for index, entry in enumerate(images.entries))


def _attempt(images: ImageSet, preprocessing: Preprocessing, index: int) -> Pixels | Unreadable:
    """Return an image's pixels, or what makes it unreadable."""
    entry = images.entries[index]
    try:
        return preprocess(images.read(entry), entry.name, preprocessing)
    except Unreadable as error:
        return error
