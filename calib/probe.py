"""What quantizing a site does to the output of what reads it.

In: a site's tensor and its reader. Out: for any grid the squared error of the reader's output, on
a bounded choice of positions or images. Half of them are the extremes: what a range clips is rare,
and positions drawn blindly would always vote for a narrower one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import nn

from calib.grid import along_channels, apply, fake_quantize

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from calib.grid import Rescaling, SiteGrid
    from pipeline.arithmetic import WeightGrid

    Exam = Callable[[SiteGrid], float]
    """A grid's relative squared error."""

POSITIONS = 2048
"""Looked at per site where the reader mixes channels only."""
PLANES = 4096
"""Positions looked at per site, in whole images, where the reader is a convolution."""
FEWEST_IMAGES = 4


class Reader(Protocol):
    """What reads a site."""

    def exam(self, x: Tensor) -> Exam:
        """Return what judges grids by the reader's output on a choice of this tensor (N, C, ...).

        The exam returns the squared error of the output over the output's squares.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Behind:
    """What follows a site's reader: an error there counts by what becomes of it.

    Attributes:
        function: A LayerNorm, a GELU, or nothing.
        weight: How much each channel of its output counts, (C,): the norm of the columns of the
            layer that reads it.
    """

    function: Callable[[Tensor], Tensor]
    weight: Tensor

    def judge(self, exact: Tensor) -> Callable[[Tensor], float]:
        """Return what holds an output against the exact one."""
        across = along_channels(self.weight, exact.ndim)
        right = self.function(exact) * across
        whole = max(float(right.square().sum()), 1e-30)

        def error(y: Tensor) -> float:
            return float((self.function(y) * across - right).square().sum()) / whole

        return error


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReader:
    """A layer with weights, which are rounded too: a rescaling moves what their grid must span."""

    layer: nn.Conv2d | nn.Linear
    grid: WeightGrid
    behind: Behind

    def exam(self, x: Tensor) -> Exam:
        """See `Reader`."""
        linear = isinstance(self.layer, nn.Linear)
        looked = chosen_positions(x) if linear else chosen_images(x)
        weight = self.layer.weight.detach()
        bias = torch.zeros(len(weight)) if self.layer.bias is None else self.layer.bias.detach()
        depthwise = isinstance(self.layer, nn.Conv2d) and self.layer.groups > 1
        judge = self.behind.judge(apply(self.layer, looked, weight, bias))

        def moved(by: Rescaling) -> tuple[Tensor, Tensor, Tensor]:
            """Return inputs, rounded weight and bias in a rescaling's units."""
            if depthwise:
                rows = weight * by.scale.reshape(-1, *[1] * (weight.ndim - 1))
                return by.apply(looked), nearest(rows, self.grid), bias
            columns = weight * along_channels(by.scale, weight.ndim)
            summed = (weight * along_channels(by.shift, weight.ndim)).flatten(1).sum(dim=1)
            return by.apply(looked), nearest(columns, self.grid), bias + summed

        last: list[tuple[Rescaling, tuple[Tensor, Tensor, Tensor]]] = []

        def error(grid: SiteGrid) -> float:
            if not last or last[0][0] is not grid.rescaling:
                last[:] = [(grid.rescaling, moved(grid.rescaling))]
            inputs, rounded, shifted = last[0][1]
            return judge(
                apply(self.layer, fake_quantize(inputs, grid.parameters), rounded, shifted)
            )

        return error


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionReader:
    """A LayerNorm, a GELU or an addition."""

    behind: Behind

    def exam(self, x: Tensor) -> Exam:
        """See `Reader`."""
        looked = chosen_positions(x)
        judge = self.behind.judge(looked)
        last: list[tuple[Rescaling, Tensor]] = []

        def error(grid: SiteGrid) -> float:
            by = grid.rescaling
            if not last or last[0][0] is not by:
                last[:] = [(by, by.apply(looked))]
            return judge(by.undo(fake_quantize(last[0][1], grid.parameters)))

        return error


def nearest(weight: Tensor, grid: WeightGrid) -> Tensor:
    """Return a weight rounded to the nearest of its per-channel grid, as floats."""
    rows = weight.abs().flatten(1).amax(dim=1).clamp(min=1e-30) / grid.limit
    steps = rows.reshape(-1, *[1] * (weight.ndim - 1))
    return (weight / steps).round() * steps


def chosen_positions(x: Tensor) -> Tensor:
    """Return at most `POSITIONS` positions of (N, C, ...): (P, C), half of them the extremes."""
    rows = x.movedim(1, -1).flatten(0, -2)
    return rows[_extremes_and_others(rows.abs().amax(dim=1), _unusual(rows).amax(dim=1), POSITIONS)]


def chosen_images(x: Tensor) -> Tensor:
    """Return some images of (N, C, H, W), half of them those that hold the extremes."""
    rows = x.flatten(2)
    n = max(FEWEST_IMAGES, PLANES // rows.shape[2])
    flat = rows.movedim(1, -1)
    unusual = _unusual(flat.flatten(0, 1)).reshape(flat.shape)
    return x[_extremes_and_others(rows.abs().amax(dim=(1, 2)), unusual.amax(dim=(1, 2)), n)]


def _unusual(rows: Tensor) -> Tensor:
    """Return how many deviations each value lies from its channel's mean."""
    away = rows - rows.mean(dim=0)
    deviation = away.square().mean(dim=0).sqrt()
    return away.abs_().div_(deviation.clamp(min=1e-12))


def _extremes_and_others(largest: Tensor, unusual: Tensor, n: int) -> Tensor:
    count = len(largest)
    if count <= n:
        return torch.arange(count)
    quarter = n // 4
    drawn = np.random.default_rng(0).permutation(count)[: n - 2 * quarter]
    return torch.cat(
        [
            torch.from_numpy(drawn),
            largest.topk(quarter).indices,
            unusual.topk(quarter).indices,
        ]
    )
