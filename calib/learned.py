"""Grids and weights that training learns, on the contract's terms.

In: what the calibration chose at a site or for a layer. Out: torch modules that quantize as the
contract does, pass gradients on as LSQ says, and give back the contract's integers.

A site quantizes u = (x - shift) / step to y = clip(round(u), low - zero, high - zero). A layer's
weights pass the same function, without a shift, one step per row. What is learnt is relative to
what the calibration chose, weights in units of their steps: one learning rate then suits rows of
every size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from calib.grid import along_channels, shortened
from calib.lsq import lsq, replaced, slowed
from pipeline.arithmetic import BIAS_LIMIT, ENDS, LEAST_DIVISOR, PAIR_LIMIT

if TYPE_CHECKING:
    from pipeline.arithmetic import WeightGrid
    from pipeline.records import Bits, Quantization

LEAST_FACTOR = 2.0**-6
"""Of a learned step over the one it started from; below it would soon change its sign."""
SLACK = 1e-3
BIAS_STEPS = 64
"""Steps of the accumulator that a bias moves by where a weight moves by one of its own."""


# --- activations ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class GridKind:
    """What of a site's grid is learnt, and on which terms.

    Attributes:
        bits: Of its integers.
        short: Whether its step keeps twelve bits (`calib.grid.SIGNIFICANT_BITS`).
        has_zero: Whether its zero point is learnt: not where the channels are shifted, which says
            the same, and not where it is 0 by contract.
    """

    bits: Bits
    short: bool
    has_zero: bool


class LearnedGrid(nn.Module):
    """The grid of a site, or of two sites with one grid.

    Args:
        parameters: What the calibration chose.
        scale: Per channel, float (C,), where channels are rescaled and count in steps; else None.
        shift: The same, where they are shifted too.
        kind: What is learnt.
    """

    unit: Tensor
    origin: Tensor | None
    zero: Tensor

    def __init__(
        self,
        parameters: Quantization,
        scale: Tensor | None,
        shift: Tensor | None,
        kind: GridKind,
    ) -> None:
        super().__init__()
        self.kind = kind
        step = torch.tensor(parameters.scale, dtype=torch.float32)
        self.register_buffer("unit", step if scale is None else scale * step)
        self.register_buffer("origin", shift)
        self.factor = nn.Parameter(torch.ones_like(self.unit))
        """The step over the calibration's."""
        self.moved = nn.Parameter(torch.zeros_like(self.unit)) if shift is not None else None
        """How far the shift is from the calibration's, in widths of the grid."""
        self.register_buffer("zero", torch.tensor(float(parameters.zero_point)))
        self.served = 1
        """How many values of an image each step is the step of; known once one was seen."""
        self.turned = nn.Parameter(torch.zeros(()), requires_grad=kind.has_zero)
        """How far the zero point is from the calibration's, in widths of the grid."""

    @property
    def ends(self) -> tuple[int, int]:
        """The least and the greatest integer."""
        return ENDS[self.kind.bits]

    @property
    def width(self) -> int:
        """How many steps the grid has."""
        return self.ends[1] - self.ends[0]

    def step(self) -> Tensor:
        """Return the step, a scalar or (C,), as the record will hold it."""
        factor = slowed(self.factor, self.served, self.ends[1])
        step = self.unit * factor.clamp(min=LEAST_FACTOR)
        return replaced(step, shortened(step.detach())) if self.kind.short else step

    def shift(self) -> Tensor | None:
        """Return the shift (C,), where there is one."""
        if self.moved is None:
            return None
        assert self.origin is not None
        return self.origin + self.unit * self.width * self.moved

    def zero_point(self) -> Tensor:
        """Return the zero point, a whole number."""
        zero = self.zero + self.width * self.turned
        return replaced(zero, zero.detach().round().clamp(*self.ends))

    def forward(self, x: Tensor, *, counts: bool) -> Tensor:
        """Quantize (N, C, ...); see `calib.lsq.lsq`."""
        self.served = max(1, x[0].numel() // self.unit.numel())
        step, shift = self.step(), self.shift()
        if step.ndim:
            step = along_channels(step, x.ndim)
        if shift is not None:
            shift = along_channels(shift, x.ndim)
        return lsq(x, step, self.ends, shift=shift, zero=self.zero_point(), counts=counts)


class LearnedSite(nn.Module):
    """A site of the network that is trained.

    Args:
        grid: Its grid; None where the scheme quantizes no activations.
        stream: Of the residual stream, per channel (C,), where the site lies in it; else None.
        read: Whether a layer reads it. The layer's weights are in the units of what the site
            quantizes; anything else reads the network's own.
    """

    stream: Tensor | None

    def __init__(self, grid: LearnedGrid, stream: Tensor | None, *, read: bool) -> None:
        super().__init__()
        self.grid = grid
        self.read = read
        self.register_buffer("stream", stream)

    @property
    def counts(self) -> bool:
        """Whether what leaves counts in steps: its reader's columns have them."""
        return self.read and self.grid.unit.ndim > 0

    def written_scale(self) -> Tensor:
        """Return scale_y in the units of the rows that write this site: a scalar or (C,)."""
        step = self.grid.step()
        return step if self.stream is None else step * self.stream

    def forward(self, x: Tensor) -> Tensor:
        """Quantize (N, C, ...)."""
        with torch.autocast(x.device.type, enabled=False):
            y = x.float() if x.dtype in {torch.bfloat16, torch.float16} else x
            if self.stream is not None:
                y = y / along_channels(self.stream, y.ndim)
            y = cast("Tensor", self.grid(y, counts=self.counts))
            if self.stream is not None and not self.read:
                y = y * along_channels(self.stream, y.ndim)
            return y


# --- weights --------------------------------------------------------------------------------------


def tie_free(scales: Tensor, input_scale: Tensor, output_scale: Tensor | None) -> Tensor:
    """Return weight scales for which no requantization can tie.

    As `pipeline.arithmetic.tie_free`, but to the nearest odd divisor, not the next one below: while
    a scale is learnt it must not be pushed one way.

    Args:
        scales: scale_w, (out,).
        input_scale: scale_x, a scalar.
        output_scale: scale_y in the rows' units, a scalar or (out,); None changes nothing.
    """
    if output_scale is None:
        return scales
    exact = output_scale.double() / input_scale.double()
    n = exact / scales.double()
    odd = 2 * torch.round((n - 1) / 2) + 1
    moved = (exact / odd.clamp(min=1)).to(scales.dtype)
    # n was rounded with the scales: one of 51 is a little more or less.
    return torch.where(n > LEAST_DIVISOR - SLACK, moved, scales)


def within_pairs(x: Tensor) -> Tensor:
    """Round weights in steps so that neighbours leave each other headroom.

    As `pipeline.arithmetic.round_weights` with pairs: (out, in, ...) to the same.
    """
    limit = float(PAIR_LIMIT - 1)
    pairs = x.clamp(-limit, limit).reshape(len(x), x.shape[1] // 2, 2, -1)
    first, second = pairs.unbind(dim=2)
    excess = (first.abs() + second.abs() - PAIR_LIMIT).clamp(min=0) * (first * second > 0)
    a, b = (torch.round(w - w.sign() * excess / 2) for w in (first, second))
    b = b - b.sign() * ((a * b > 0) & (a.abs() + b.abs() > PAIR_LIMIT))
    return torch.stack((a, b), dim=2).reshape(x.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartingLayer:
    """A layer's integers as the calibration left them.

    Attributes:
        weight: int8 (out, in / groups, ...).
        scales: float32 (out,).
        bias: float (out,), in the network's units.
        grid: What the weights may be.
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor
    grid: WeightGrid


class LearnedLayer(nn.Module):
    """A convolution or a linear map over channels whose weights are integers.

    Args:
        module: The float layer: its kind, stride, padding and groups.
        start: Where training begins.
        reads: The site it reads; None where it reads floats.
        writes: The site that it writes in integers; None where it writes floats.
    """

    unit: Tensor
    origin: Tensor

    def __init__(
        self,
        module: nn.Conv2d | nn.Linear,
        start: StartingLayer,
        reads: LearnedSite | None,
        writes: LearnedSite | None,
    ) -> None:
        super().__init__()
        self.grid = start.grid
        self.geometry = (
            (module.stride[0], cast("int", module.padding[0]), module.groups)
            if isinstance(module, nn.Conv2d)
            else None
        )
        # Kept out of the modules of this one: they are the network's.
        self.sites = (reads, writes)
        self.register_buffer("unit", start.scales.clone())
        self.register_buffer("origin", start.bias.clone())
        self.weight = nn.Parameter(start.weight.float())
        """In steps of the calibration's scales."""
        self.factor = nn.Parameter(torch.ones_like(start.scales))
        """A row's scale over the calibration's."""
        self.bias = nn.Parameter(torch.zeros_like(start.bias))
        """How far the bias is from the calibration's, in `BIAS_STEPS` of the accumulator."""

    def input_scale(self) -> Tensor:
        """Return scale_x, a scalar: 1 where the layer reads floats or counts in steps."""
        reads = self.sites[0]
        if reads is None or reads.counts:
            return torch.ones((), dtype=self.unit.dtype, device=self.unit.device)
        return reads.grid.step()

    def scales(self) -> Tensor:
        """Return scale_w, (out,), as the record will hold it."""
        factor = slowed(self.factor, self.weight[0].numel(), self.grid.limit)
        scales = self.unit * factor.clamp(min=LEAST_FACTOR)
        writes = self.sites[1]
        if writes is None:
            return scales
        with torch.no_grad():
            moved = tie_free(scales, self.input_scale(), writes.written_scale())
        return replaced(scales, moved)

    def integers(self, scales: Tensor) -> Tensor:
        """Return the weight's integers as floats, (out, in / groups, ...)."""
        return self._rounded(scales, counts=True)

    def _rounded(self, scales: Tensor, *, counts: bool) -> Tensor:
        """Return the weight on its grid: in steps, or in the calibration's steps."""
        return lsq(
            self._followed(),
            self.relative(scales),
            (-self.grid.limit, self.grid.limit),
            counts=counts,
            rounder=within_pairs if self.grid.pairs else torch.round,
        )

    def _followed(self) -> Tensor:
        """Return the weight, its columns in the steps that its site counts in now.

        Where a site counts in steps, they and its shift are part of this layer: a column has the
        site's step in it, and the bias what the shift adds. Both follow when they are learnt, so
        the function stays, and the gradients are LSQ's and LSQ+'s: those of step * q + shift.
        """
        reads = self.sites[0]
        if reads is None or not reads.counts:
            return self.weight
        return self.weight * self._along_columns(reads.grid.step() / reads.grid.unit)

    def _along_columns(self, values: Tensor) -> Tensor:
        return values.reshape(1, -1, *[1] * (self.weight.ndim - 2))

    def relative(self, scales: Tensor) -> Tensor:
        """Return what a step is in the calibration's steps, (out, 1, ...)."""
        return self._along_rows(scales / self.unit)

    def _along_rows(self, values: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * (self.weight.ndim - 1))

    def values(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias as the floats that the integers stand for."""
        scales = self.scales()
        weight = self._rounded(scales, counts=False) * self._along_rows(self.unit)
        bias = self.exact_bias()
        if self.sites[0] is not None:
            step = (scales * self.input_scale()).detach()
            whole = (bias.detach() / step).round().clamp(-BIAS_LIMIT, BIAS_LIMIT)
            bias = replaced(bias, whole * step)
        return weight, bias

    def exact_bias(self) -> Tensor:
        """Return the bias before it is rounded, (out,)."""
        step = BIAS_STEPS * self.unit * self.input_scale().detach()
        bias = self.origin + self.bias * step
        reads = self.sites[0]
        if reads is None or not reads.counts or reads.grid.moved is None:
            return bias
        moved = self._along_columns(reads.grid.width * reads.grid.moved)
        return bias + self.unit * (self.weight * moved).flatten(1).sum(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to what its site gives: (N, in, ...) to (N, out, ...)."""
        weight, bias = self.values()
        if self.geometry is not None:
            stride, padding, groups = self.geometry
            return functional.conv2d(x, weight, bias, stride, padding, groups=groups)
        return functional.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)
