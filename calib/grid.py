"""A site's grid with its channels rescaled, on torch tensors.

In: the contract's `Quantization` and a `Rescaling`. Out: what a tensor becomes when it passes the
site. Everything here speaks in the units of the folded network: rescaling is a property of the
site, so nothing around it has to be rewritten to try one out.

    x -> shift + scale * dequantize(quantize((x - shift) / scale))
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from pipeline.arithmetic import limits

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.records import Quantization


SIGNIFICANT_BITS = 12
"""Of a step that multiplies integers: the product is exact in float32 for any 8-bit integer,
and so is its sum with the product of a zero point, however a runtime fuses the two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescaling:
    """Channel c is quantized as (x_c - shift_c) / scale_c: float32 (C,) each.

    `strength` is how far it makes the channels' ranges equal: 0 leaves their proportions, 1 makes
    them all one.
    """

    shift: Tensor
    scale: Tensor
    strength: float

    @staticmethod
    def identity(channels: int) -> Rescaling:
        """Return the rescaling that changes nothing."""
        return Rescaling(shift=torch.zeros(channels), scale=torch.ones(channels), strength=0.0)

    @property
    def changes_nothing(self) -> bool:
        """Whether it is the identity."""
        return bool((self.shift == 0).all() and (self.scale == 1).all())

    def apply(self, x: Tensor) -> Tensor:
        """Map (N, C, ...) to the units that are quantized."""
        return (x - along_channels(self.shift, x.ndim)) / along_channels(self.scale, x.ndim)

    def undo(self, x: Tensor) -> Tensor:
        """Map back."""
        return x * along_channels(self.scale, x.ndim) + along_channels(self.shift, x.ndim)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteGrid:
    """What a site does to a tensor."""

    parameters: Quantization
    rescaling: Rescaling

    def in_steps(self) -> SiteGrid:
        """Return the grid with its step moved into a rescaling that is there anyway.

        What is quantized then counts in steps: no runtime has to divide by the step, so each of
        them rounds the same number. The scales keep `SIGNIFICANT_BITS`.
        """
        if self.rescaling.changes_nothing:
            return self.with_short_step()
        steps = shortened(self.rescaling.scale * self.parameters.scale)
        return SiteGrid(
            parameters=replace(self.parameters, scale=1.0),
            rescaling=replace(self.rescaling, scale=steps),
        )

    def with_short_step(self) -> SiteGrid:
        """Return the grid with a step of `SIGNIFICANT_BITS`."""
        step = float(shortened(torch.tensor(self.parameters.scale)))
        return replace(self, parameters=replace(self.parameters, scale=step))

    def __call__(self, x: Tensor) -> Tensor:
        """Quantize and dequantize (N, C, ...)."""
        return self.rescaling.undo(fake_quantize(self.rescaling.apply(x), self.parameters))


def fake_quantize(x: Tensor, parameters: Quantization) -> Tensor:
    """Return dequantize(quantize(x)) as `pipeline.arithmetic` defines it, in float32."""
    low, high = (end - parameters.zero_point for end in limits(parameters))
    # Several times as fast on a CPU as torch's own function of this name.
    return (x / parameters.scale).round_().clamp_(low, high).mul_(parameters.scale)


def apply(module: nn.Conv2d | nn.Linear, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a layer with other weights: (N, in, ...) to (N, out, ...), float32."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if isinstance(module, nn.Conv2d):
        stride, padding = module.stride, module.padding
        return functional.conv2d(x, weight, bias, stride, padding, groups=module.groups)
    return functional.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)


def drawn(rows: Tensor, most: int) -> Tensor:
    """Return at most `most` rows of a tensor, drawn without regard to their order.

    Every n-th would be every time the same column of an image.
    """
    if len(rows) <= most:
        return rows
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:most]]


def shortened(steps: Tensor) -> Tensor:
    """Round float32 values to `SIGNIFICANT_BITS`."""
    mantissa, exponent = torch.frexp(steps)
    return torch.ldexp(torch.round(mantissa * 2**SIGNIFICANT_BITS), exponent - SIGNIFICANT_BITS)


def along_channels(values: Tensor, ndim: int) -> Tensor:
    """Reshape (C,) so that it broadcasts along the second of `ndim` axes."""
    return values.reshape(1, -1, *[1] * (ndim - 2))
