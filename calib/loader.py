"""Work on images done ahead, in processes of its own.

In: what to do with each of many indices, and a number of processes. Out: the same, in the same
order, as doing one after the other here gives; a few batches wait in memory at any time.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from pipeline.errors import EdgeError, WorkerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# A fork of a process whose threads have run torch can hang. A server that has imported torch but
# computed nothing is forked from instead. On two cores its first start takes 1.6 s and a process
# 0.25 s from then on; spawn takes 1.5 to 2 s for every process, each time.
METHOD = "forkserver"
PRELOAD = ("torch.utils.data", "calib.loader", "calib.preprocess")
PREFETCH = 2
MAX_CHUNK = 16
"""Images per message; MAX_CHUNK * PREFETCH * workers of them wait at most."""
DIED = "DataLoader worker"

_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True)
class _Raised:
    """An error on its way here: torch would raise it as a traceback in a message."""

    error: EdgeError


class _Done(Dataset["_Found | _Raised"], Generic[_Found]):
    """What is found of each index, or the error."""

    def __init__(self, do: Callable[[int], _Found]) -> None:
        self.do = do

    def __getitem__(self, index: int) -> _Found | _Raised:
        try:
            return self.do(index)
        except EdgeError as error:
            return _Raised(error)


def done_ahead(
    do: Callable[[int], _Found], indices: Sequence[int], batch: int, workers: int
) -> Iterator[_Found]:
    """Yield do(index) for every index, in order, done in other processes.

    Args:
        do: What pickles and needs no more than the index.
        indices: Of images.
        batch: How many the caller takes at a time.
        workers: How many processes, each with one thread (torch's loader sees to that).

    Raises:
        EdgeError: As `do` raises it in the process.
        WorkerError: A process died.
    """
    context = multiprocessing.get_context(METHOD)
    context.set_forkserver_preload(list(PRELOAD))
    loader = DataLoader(
        _Done(do),
        batch_size=min(batch, MAX_CHUNK),
        sampler=indices,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        collate_fn=_as_they_are,
        multiprocessing_context=context,
        # Its own: drawing a seed would move the state of the global one.
        generator=torch.Generator(),
    )
    try:
        for chunk in loader:
            for found in chunk:
                if isinstance(found, _Raised):
                    raise found.error
                yield found
    except RuntimeError as error:
        if DIED not in str(error):
            raise
        raise WorkerError(
            "a process that decodes images died",
            allowed="enough memory for the images of all processes",
            do="Decode with fewer workers",
        ) from error


def _as_they_are(items: list[_Found]) -> list[_Found]:
    return items
