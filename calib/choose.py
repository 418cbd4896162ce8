"""Choose a site's grid by what it does to the reader's output, not by taste.

In: a site's tensor, what its channels held over all images, and what reads it. Out: the `SiteGrid`
with the least error and a `SiteCalibration` that says how it was chosen. Coordinate by coordinate:
the rescaling at two kinds of range, then the kind of range, then each end of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

from calib.equalize import STRENGTHS, rescaling, spread, stream_candidates, widths
from calib.grid import Rescaling, SiteGrid
from calib.observers import ChannelRange
from calib.ranges import SomeValues, clipped_range
from pipeline.arithmetic import WIDE_BITS, activation_quantization, limits
from pipeline.records import Range, RangeMethod, SiteCalibration

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from calib.equalize import Widths as ChannelWidths
    from calib.probe import Reader
    from pipeline.records import Bits, Calibration

FIRST_RANGES: tuple[RangeMethod, ...] = ("min-max", "mse")
"""Tried with every rescaling; the others only with the best one."""
REFINE = (0.5, 0.7, 0.85, 0.95, 1.05)
"""Factors that each end of the best range is tried with."""
NEAR = 0.125
"""The strengths tried beside the best one."""
ROUNDS = 2

Widths = Literal["ends", "deviations"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What can be chosen at a site, apart from any data.

    Attributes:
        widths: What the channels' widths are taken from; see `calib.equalize`.
        strength: How far they are made equal; 0 leaves the site as it is.
        method: The range.
        low: Factor on its lower end.
        high: Factor on its upper end.
    """

    widths: Widths = "ends"
    strength: float = 0.0
    method: RangeMethod = "min-max"
    low: float = 1.0
    high: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What is known of a site.

    Attributes:
        x: Its tensor on the sample of images: float32 (N, C, ...).
        channels: What its channels held over all calibration images.
        reader: What reads it.
    """

    x: Tensor
    channels: ChannelRange
    reader: Reader

    def half(self) -> Seen:
        """Return what is known from every other image of the sample alone."""
        x = self.x[::2]
        rows = x.movedim(1, 0).flatten(1)
        channels = ChannelRange(minimum=rows.amin(dim=1), maximum=rows.amax(dim=1))
        return Seen(x=x, channels=channels, reader=self.reader)

    @cached_property
    def some(self) -> SomeValues:
        """Some of the tensor's values, drawn once."""
        return SomeValues.of(self.x)

    def observed(self, by: Rescaling) -> Range:
        """Return the range over all images, in rescaled units."""
        low = (self.channels.minimum - by.shift) / by.scale
        high = (self.channels.maximum - by.shift) / by.scale
        return Range(minimum=float(low.min()), maximum=float(high.max()))


class _Search:
    """Choices of one site by what they lose.

    With `halved` they are made from half of the sample and judged by the other. A rescaling that
    fits every channel's grid to the values seen clips, on other images, in every channel; only
    images that it was not made from show that.
    """

    def __init__(
        self,
        seen: Seen,
        bits: Bits,
        free: Literal["shift", "scale", "none"] = "none",
        given: Rescaling | None = None,
        *,
        halved: bool = False,
    ) -> None:
        self.bits = bits
        self.free = free
        halved = halved and len(seen.x) > 1
        self.seen = seen.half() if halved else seen
        self.exam = seen.reader.exam(seen.x[1::2] if halved else seen.x)
        self.start(given or Rescaling.identity(seen.x.shape[1]))

    def start(self, plain: Rescaling) -> None:
        """Forget all choices: at strength 0 the channels are rescaled like this from now on."""
        self._plain = plain
        self._widths: dict[str, ChannelWidths] = {}
        self._rescalings: dict[Any, Rescaling] = {}
        self._ranges: dict[Any, Range] = {}
        self._errors: dict[Choice, float] = {}

    def error(self, choice: Choice) -> float:
        """Return what a choice loses."""
        if choice not in self._errors:
            grid, _ = self.grid(choice)
            self._errors[choice] = self.exam(grid)
        return self._errors[choice]

    def best(self, choices: Iterable[Choice]) -> Choice:
        """Return the choice with the least error; the first of equal ones."""
        return min(choices, key=self.error)

    def grid(self, choice: Choice) -> tuple[SiteGrid, Range]:
        """Return the grid that a choice makes, and its range in rescaled units."""
        by, data = self._rescaling(choice), self.seen
        key = (choice.widths, choice.strength, choice.method)
        if key not in self._ranges:
            observed, method = data.observed(by), choice.method
            self._ranges[key] = clipped_range(data.some, by, observed, method, self.bits)
        low = self._ranges[key].minimum * choice.low
        high = self._ranges[key].maximum * choice.high
        taken = Range(minimum=min(low, high), maximum=max(low, high))
        return SiteGrid(parameters=activation_quantization(taken, self.bits), rescaling=by), taken

    def _rescaling(self, choice: Choice) -> Rescaling:
        if choice.strength == 0:
            return self._plain
        if not self._widths:
            found = widths(self.seen.x, self.seen.channels, shifts=self.free == "shift")
            self._widths = dict(zip(get_args(Widths), found, strict=True))
        key = (choice.widths, choice.strength)
        if key not in self._rescalings:
            self._rescalings[key] = rescaling(self._widths[choice.widths], choice.strength)
        return self._rescalings[key]


def choose(
    seen: Seen,
    how: Calibration,
    bits: Bits,
    *,
    free: Literal["shift", "scale", "none"],
    given: Rescaling | None = None,
    methods: Sequence[RangeMethod] = get_args(RangeMethod),
) -> tuple[SiteGrid, SiteCalibration]:
    """Choose what a site does.

    Args:
        seen: What is known of it.
        how: Whether to search at all, and what.
        bits: Of the grid.
        free: What may be done to its channels: shifted and scaled, scaled, or nothing.
        given: A rescaling settled elsewhere (the residual stream's).
        methods: The ranges to try. A runtime that takes each tensor's own ends has min-max alone.

    Returns:
        The grid, made from all that is known, and what it costs.
    """
    if bits == WIDE_BITS:
        # Its steps are so small that all it can lose is what a range clips, on any image.
        methods = ("min-max",)
    search = _Search(seen, bits, free, given)
    if how.method != "search":
        best = Choice(method=how.method)
    else:
        best = Choice()
        if how.rescale and free != "none":
            best = _rescaled(_Search(seen, bits, free, halved=True), methods)
        best = search.best([best, *(replace(best, method=m) for m in methods)])
        if bits != WIDE_BITS and len(methods) > 1:
            best = _refined(search, best)
    return _made(search, best)


def _rescaled(search: _Search, methods: Sequence[RangeMethod]) -> Choice:
    """Try to make the channels more equal, then the strengths beside the best one."""
    first = [method for method in FIRST_RANGES if method in methods]
    best = search.best(Choice(method=method) for method in first)
    for kind in get_args(Widths):
        tried = [
            Choice(widths=kind, strength=strength, method=method)
            for strength in STRENGTHS
            for method in first
        ]
        found = search.best(tried)
        near = (found.strength - NEAR, found.strength + NEAR)
        best = search.best([best, found, *(replace(found, strength=a) for a in near if 0 < a <= 1)])
    return best


def _refined(search: _Search, best: Choice) -> Choice:
    """Move each end of a range while that helps."""
    for _ in range(ROUNDS):
        before = best
        best = search.best([best, *(replace(best, high=best.high * f) for f in REFINE)])
        best = search.best([best, *(replace(best, low=best.low * f) for f in REFINE)])
        if best == before:
            break
    return best


def choose_stream(sites: Sequence[Seen], bits: Bits) -> Rescaling:
    """Choose one rescaling for the residual stream of a stage.

    Args:
        sites: Those at which the stream is read or written and that will be quantized.
        bits: Of their grids.

    Returns:
        The rescaling with the least sum of the sites' relative errors, each made from half of the
        sample and judged by the other.
    """
    halves = [seen.half() if len(seen.x) > 1 else seen for seen in sites]
    tried = stream_candidates([half.channels for half in halves])

    searches = [_Search(seen, bits, halved=True) for seen in sites]

    def total(index: int) -> float:
        for search in searches:
            search.start(tried[index])
        return sum(
            min(search.error(Choice(method=method)) for method in FIRST_RANGES)
            for search in searches
        )

    best = min(range(len(tried)), key=total)
    return stream_candidates([seen.channels for seen in sites])[best]


def _made(search: _Search, best: Choice) -> tuple[SiteGrid, SiteCalibration]:
    seen = search.seen
    grid, taken = search.grid(best)
    by = grid.rescaling
    nothing = Rescaling.identity(len(by.scale))
    plain = SiteGrid(
        parameters=activation_quantization(seen.observed(nothing), search.bits), rescaling=nothing
    )
    values = seen.some.rescaled(by)
    least, most = limits(grid.parameters)
    steps = values / grid.parameters.scale + grid.parameters.zero_point
    outside = (steps < least - 0.5) | (steps > most + 0.5)
    return grid, SiteCalibration(
        range_method=best.method,
        strength=by.strength,
        minimum=taken.minimum,
        maximum=taken.maximum,
        clipped=float(outside.float().mean()),
        spread_before=spread(seen.channels, nothing),
        spread_after=spread(seen.channels, by),
        sqnr_db=_decibels(search.error(best)),
        plain_sqnr_db=_decibels(search.exam(plain)),
    )


def _decibels(error: float) -> float:
    return -10 * math.log10(max(error, 1e-30))
