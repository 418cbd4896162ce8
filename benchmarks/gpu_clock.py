"""Two clocks around the same inferences: one per inference, and one around all of a turn.

In: a call that starts an inference on a device. Out: milliseconds. On a GPU CUDA events time each
inference on the device, and the outer clock is the processor's, read when the device is idle: what
the events leave out, such as waiting for launches, is in the outer clock.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What a turn of inferences took.

    Attributes:
        inner_ms: Each inference.
        outer_ms: An inference by the outer clock: the turn over their number.
    """

    inner_ms: tuple[float, ...]
    outer_ms: float


class Clock(Protocol):
    """Times inferences on one device."""

    def synchronise(self) -> None:
        """Wait until the device has done all it was given."""

    def turn(self, call: Callable[[], object], inferences: int) -> Turn:
        """Run inferences one after the other, without waiting in between."""


class CpuClock:
    """The processor's clock, for inferences that are done when their call returns."""

    def synchronise(self) -> None:
        """Do nothing: there is nothing to wait for."""

    def turn(self, call: Callable[[], object], inferences: int) -> Turn:
        """Read the clock between the inferences."""
        marks = [time.perf_counter_ns()]
        for _ in range(inferences):
            call()
            marks.append(time.perf_counter_ns())
        inner = tuple((after - before) / 1e6 for before, after in pairwise(marks))
        return Turn(inner_ms=inner, outer_ms=(marks[-1] - marks[0]) / 1e6 / inferences)


class CudaClock:
    """CUDA events, and the processor's clock around them.

    Args:
        cuda: `torch.cuda`, or what stands in for it.
    """

    def __init__(self, cuda: Any = torch.cuda) -> None:
        self.cuda = cuda

    def synchronise(self) -> None:
        """Wait for every stream."""
        self.cuda.synchronize()

    def turn(self, call: Callable[[], object], inferences: int) -> Turn:
        """Let the device stamp the inferences as it goes; read the stamps when all are done."""
        pairs = [
            tuple(self.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(inferences)
        ]
        self.synchronise()
        started = time.perf_counter_ns()
        for before, after in pairs:
            before.record()
            call()
            after.record()
        self.synchronise()
        outer = (time.perf_counter_ns() - started) / 1e6 / inferences
        inner = tuple(before.elapsed_time(after) for before, after in pairs)
        return Turn(inner_ms=inner, outer_ms=outer)


def clock_of(device: str) -> Clock:
    """Return the clock of a device of torch's: `cpu` or `cuda`."""
    return CpuClock() if device == "cpu" else CudaClock()
