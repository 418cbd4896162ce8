"""Weights that swing between two integers while they are trained: measured, and stopped.

In: the learnt layers of a network, after every update. Out: how many weights oscillate, and, where
that is asked, weights frozen at the integer that they were at most of the time, or a penalty that
draws them to the middle of their cell.

Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", 2022: the frequency
of section 2.4 (equation 4), freezing of algorithm 1, dampening of section 4.1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipeline.arithmetic import BITS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from calib.learned import LearnedLayer

MOMENTUM = 0.01
"""Of the running frequency and of the running mean of integers (the paper's m)."""
OSCILLATES = 0.005
"""A weight with a frequency above this counts as oscillating (the paper's figures)."""
THRESHOLDS = (0.1, 0.01)
"""Frequency from which a weight is frozen, at the beginning and at the end, on a cosine between."""


class Oscillation(nn.Module):
    """What every weight's integer has done so far.

    Its state is in buffers, so it is saved and restored with a state dict.

    Args:
        layers: By name.
    """

    def __init__(self, layers: Mapping[str, LearnedLayer]) -> None:
        super().__init__()
        self.layers = dict(layers)  # not registered: they are the network's
        self.histories = [_History(layer) for layer in self.layers.values()]
        self.saved = nn.ModuleList(self.histories)

    def observe(self, frozen_from: float | None = None, bits: int = BITS) -> None:
        """Take note of the integers after an update.

        Args:
            frozen_from: Weights that oscillate more often than this are frozen; None freezes none.
            bits: Only in layers whose weights have no more.
        """
        for history, layer in zip(self.histories, self.layers.values(), strict=True):
            history.observe(layer, frozen_from if layer.grid.bits <= bits else None)

    def share(self) -> float:
        """Return the share of weights that oscillate."""
        found = [history.frequency > OSCILLATES for history in self.histories]
        return _share(found)

    def frozen_share(self) -> float:
        """Return the share of weights that are frozen."""
        return _share([history.frozen for history in self.histories])


class _History(nn.Module):
    """One layer's: the last integer and which way it moved, how often it turned, where it was."""

    last: Tensor
    direction: Tensor
    frequency: Tensor
    mean: Tensor
    frozen: Tensor

    def __init__(self, layer: LearnedLayer) -> None:
        super().__init__()
        with torch.no_grad():
            now = layer.integers(layer.scales())
        self.register_buffer("last", now.to(torch.int8))
        self.register_buffer("direction", torch.zeros_like(self.last))
        self.register_buffer("frequency", torch.zeros_like(now))
        self.register_buffer("mean", now.clone())
        self.register_buffer("frozen", torch.zeros_like(self.last, dtype=torch.bool))

    @torch.no_grad()
    def observe(self, layer: LearnedLayer, frozen_from: float | None) -> None:
        scales = layer.scales()
        if self.frozen.any():
            # The optimiser's momentum does not know: they are put back.
            held = self.mean.round() * layer.relative(scales)
            layer.weight.copy_(torch.where(self.frozen, held, layer.weight))
        now = layer.integers(scales)
        moved = (now - self.last).sign().to(torch.int8)
        turned = (moved * self.direction) < 0
        self.frequency.lerp_(turned.to(now.dtype), MOMENTUM)
        self.mean.lerp_(torch.where(self.frozen, self.mean, now), MOMENTUM)
        torch.where(moved != 0, moved, self.direction, out=self.direction)
        self.last.copy_(now)
        if frozen_from is not None:
            self.frozen |= self.frequency > frozen_from


def dampening(layers: Mapping[str, LearnedLayer]) -> Tensor:
    """Return the sum of weights' square distances from the middle of their cell, in steps."""
    total = torch.zeros(())
    for layer in layers.values():
        scales = layer.scales().detach()
        steps = layer.weight / layer.relative(scales)
        clipped = steps.clamp(-layer.grid.limit, layer.grid.limit)
        away = (layer.integers(scales).detach() - clipped).square().sum()
        total = total.to(away) + away
    return total


def frozen_from(progress: float) -> float:
    """Return the frequency from which weights are frozen, as training goes from 0 to 1."""
    start, end = THRESHOLDS
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _share(masks: list[Tensor]) -> float:
    total = sum(mask.numel() for mask in masks)
    return float(sum(int(mask.sum()) for mask in masks)) / max(1, total)
