"""Images decoded ahead, in processes of their own.

In: an `ImageSet`, a `Preprocessing`, a number of processes. Out: the same entries and pixels, in
the same order, as decoding one by one gives; a few batches wait in memory at any time.
"""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Dataset

from calib.preprocess import Unreadable, attempt
from pipeline.errors import DataError, WorkerError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from calib.images import Entry, ImageSet
    from calib.preprocess import Pixels
    from pipeline.records import Preprocessing

# A fork of a process whose threads have run torch can hang. A server that has imported torch but
# computed nothing is forked from instead. On two cores its first start takes 1.6 s and a process
# 0.25 s from then on; spawn takes 1.5 to 2 s for every process, each time.
METHOD = "forkserver"
PRELOAD = ("torch.utils.data", "calib.loader")
PREFETCH = 2
MAX_CHUNK = 16
"""Images per message; MAX_CHUNK * PREFETCH * workers of them wait at most."""
DIED = "DataLoader worker"


class _Decoded(Dataset["tuple[int, Pixels | DataError]"]):
    """Every image's pixels, or its error: torch would raise one as a traceback in a message."""

    def __init__(self, images: ImageSet, preprocessing: Preprocessing) -> None:
        self.images = images
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.images.entries)

    def __getitem__(self, index: int) -> tuple[int, Pixels | DataError]:
        try:
            return index, attempt(self.images, self.images.entries[index], self.preprocessing)
        except DataError as error:
            return index, error


def ahead(
    images: ImageSet, preprocessing: Preprocessing, batch: int, workers: int
) -> Iterator[tuple[Entry, Pixels | Unreadable]]:
    """Yield every image's pixels, or what makes it unreadable, in order.

    Args:
        images: The set.
        preprocessing: How.
        batch: How many the caller takes at a time.
        workers: How many processes, each with one thread (torch's loader sees to that).

    Raises:
        DataError: As `attempt` raises it in the process.
        WorkerError: A process died.
    """
    context = multiprocessing.get_context(METHOD)
    context.set_forkserver_preload(list(PRELOAD))
    loader = DataLoader(
        _Decoded(images, preprocessing),
        batch_size=min(batch, MAX_CHUNK),
        num_workers=workers,
        prefetch_factor=PREFETCH,
        collate_fn=_as_they_are,
        multiprocessing_context=context,
        # Its own: drawing a seed would move the state of the global one.
        generator=torch.Generator(),
    )
    try:
        for chunk in loader:
            for index, found in chunk:
                if isinstance(found, DataError) and not isinstance(found, Unreadable):
                    raise found
                yield images.entries[index], found
    except RuntimeError as error:
        if DIED not in str(error):
            raise
        raise WorkerError(
            "a process that decodes images died",
            allowed="enough memory for the images of all processes",
            do="Decode with fewer workers",
        ) from error


def _as_they_are(
    items: list[tuple[int, Pixels | DataError]],
) -> list[tuple[int, Pixels | DataError]]:
    return items
