"""Independent pieces of the search, as many at a time as there are cores.

In: a function and what to apply it to. Out: the results, in order. torch's own threads gain little
on tensors of this size and wait for each other; here each piece is computed by one, so the result
does not depend on how many there are.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_pool: list[ThreadPoolExecutor] = []
"""The one that is open; none outside `side_by_side`."""


@contextmanager
def side_by_side() -> Iterator[None]:
    """Let `together` use as many threads as torch may, and torch one in each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if threads == 1 or _pool:
            yield
            return
        with ThreadPoolExecutor(threads) as pool:
            _pool.append(pool)
            try:
                yield
            finally:
                _pool.clear()
    finally:
        torch.set_num_threads(threads)


def together(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Apply a function, which calls this one no further, to every item."""
    if not _pool or len(items) < 2:  # noqa: PLR2004 - one alone needs no other thread
        return [function(item) for item in items]

    def without_gradients(item: _Item) -> _Result:
        # torch keeps that by thread.
        with torch.no_grad():
            return function(item)

    return list(_pool[0].map(without_gradients, items))
