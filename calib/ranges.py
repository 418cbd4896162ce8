"""Ranges: four ways to choose what a grid spans.

In: values of a tensor. Out: a `Range` for each method. Which one serves best is for `calib.choose`
to find out, by what it does to the reader's output.

Sources: Nagel et al., "A White Paper on Neural Network Quantization", 2021, section 3.1 (min-max,
MSE); Migacz, "8-bit Inference with TensorRT", 2017 (entropy).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from calib.grid import fake_quantize
from pipeline.arithmetic import BITS, activation_quantization
from pipeline.records import Range

if TYPE_CHECKING:
    from torch import Tensor

    from calib.grid import Rescaling
    from pipeline.records import Bits, RangeMethod

PERCENTILE = 0.9999
"""Of the values below the upper end, and above the lower."""
MOST_VALUES = 2**15
SHRINK = tuple(1 - 0.08 * i for i in range(9))
BINS, LEVELS = 4096, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SomeValues:
    """Values drawn from a tensor, float32 (n,), with the channel of each, int64 (n,)."""

    values: Tensor
    channels: Tensor

    @staticmethod
    def of(x: Tensor) -> SomeValues:
        """Draw at most `MOST_VALUES` of (N, C, ...), without regard to their order."""
        where = torch.arange(x.numel())
        if len(where) > MOST_VALUES:
            # Every n-th would be every time the same column of an image.
            seeded = torch.Generator().manual_seed(0)
            where = torch.randint(x.numel(), (MOST_VALUES,), generator=seeded)
        inner = x[0, 0].numel()
        return SomeValues(values=x.flatten()[where], channels=where // inner % x.shape[1])

    def rescaled(self, by: Rescaling) -> Tensor:
        """Return the values in a rescaling's units."""
        return (self.values - by.shift[self.channels]) / by.scale[self.channels]


def clipped_range(
    some: SomeValues,
    by: Rescaling,
    observed: Range,
    method: RangeMethod,
    bits: Bits = 8,
) -> Range:
    """Return the range that a method takes for a tensor.

    Args:
        some: Of its values.
        by: How its channels are rescaled.
        observed: The least and the greatest value of all the data, rescaled.
        method: `min-max`: all of it. `percentile`: what leaves 1 - `PERCENTILE` outside on each
            side. `mse`: the ends, each shrunk on its own, that round the values with the least
            squared error. `entropy`: the shrinking that keeps the histogram's divergence least.

        bits: Of the grid. Entropy is defined on 256 levels; of more, it takes all of the range.

    Returns:
        A range within `observed`.
    """
    if method == "min-max" or (method == "entropy" and bits != BITS):
        return observed
    flat = some.rescaled(by)
    match method:
        case "percentile":
            ends = torch.quantile(flat, torch.tensor([1 - PERCENTILE, PERCENTILE]))
            low, high = (float(end) for end in ends)
        case "mse":
            low, high = _least_squares(flat, observed, bits)
        case "entropy":
            low, high = _least_divergence(flat, observed)
    low, high = max(low, observed.minimum), min(high, observed.maximum)
    return Range(minimum=min(low, high), maximum=max(low, high))


def _least_squares(x: Tensor, observed: Range, bits: Bits) -> tuple[float, float]:
    low, high = observed.minimum, observed.maximum

    def error(low: float, high: float) -> float:
        grid = activation_quantization(Range(minimum=low, maximum=high), bits)
        return float((fake_quantize(x, grid) - x).square().sum())

    high = min((high * f for f in SHRINK), key=lambda end: error(low, max(end, low)))
    low = min((low * f for f in SHRINK), key=lambda end: error(min(end, high), high))
    return low, high


def _least_divergence(x: Tensor, observed: Range) -> tuple[float, float]:
    low, high = min(observed.minimum, 0.0), max(observed.maximum, 0.0)
    if high - low <= 0:
        return low, high
    counts = torch.histc(x, BINS, low, high)
    edges = torch.linspace(low, high, BINS + 1)
    best, least = (low, high), float("inf")
    for shrink in SHRINK:
        inside = (edges[:-1] >= low * shrink) & (edges[1:] <= high * shrink)
        kept = counts[inside].clone()
        if len(kept) < LEVELS:
            break
        held = kept.clone()
        first = int(inside.nonzero()[0])
        # What lies outside is clipped onto the ends.
        kept[0] += counts[:first].sum()
        kept[-1] += counts[first + len(kept) :].sum()
        group = torch.arange(len(kept)) * LEVELS // len(kept)
        filled = (held > 0).float()
        total = torch.zeros(LEVELS).index_add_(0, group, held)
        width = torch.zeros(LEVELS).index_add_(0, group, filled)
        rounded = (total / width.clamp(min=1))[group] * filled
        p, q = kept / kept.sum(), rounded / rounded.sum().clamp(min=1e-12)
        divergence = float((p * (p / q.clamp(min=1e-9)).log().nan_to_num(0.0))[p > 0].sum())
        if divergence < least:
            best, least = (low * shrink, high * shrink), divergence
    return best
