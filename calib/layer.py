"""A layer's integers, chosen from what it reads.

In: the float layer, the grid of the site it reads, and its inputs in float and as the quantized
network delivers them. Out: an `IntegerLayer`: the contract's arrays, and the layer as the folded
network sees it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from calib import rounding
from calib.grid import along_channels, apply, drawn
from pipeline.arithmetic import (
    FEW_BITS,
    bias_scales,
    dequantize_weight,
    quantize_bias,
    quantize_weight,
    weight_scales,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from calib.grid import Rescaling
    from pipeline.arithmetic import WeightGrid
    from pipeline.records import Rounding

MOST_ROWS = 2**15
"""Positions whose inputs make a Hessian or are looked at while rounding is learnt."""


LEAST_IMPORTANCE = 1e-3
"""Of the mean of a layer's inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unrounded:
    """A float layer in the units of the site it reads.

    Attributes:
        module: Its stride, padding and groups.
        weight: W diag(s), float64 (out, in / groups, ...).
        bias: b + W z, float64 (out,).
        rescaling: Of the site.
        input_scale: scale_x of the site; None where the layer reads floats.
        output_scale: scale_y per row, float64 (out,), of the site that it writes; None where it
            writes floats.
    """

    module: nn.Conv2d | nn.Linear
    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    rescaling: Rescaling
    input_scale: float | None
    output_scale: NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerLayer:
    """What a layer computes with: int8 weights, float32 scales per row, and its bias.

    `bias` is int32 at scale_x * scale_w, or float where the layer reads floats.
    """

    of: Unrounded
    weight: NDArray[np.int8]
    scales: NDArray[np.float32]
    bias: NDArray[Any]

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer to a site's output (N, in, ...) in the folded network's units."""
        weight = torch.from_numpy(dequantize_weight(self.weight, self.scales))
        return apply(self.of.module, self.of.rescaling.apply(x), weight, self.offsets())

    def corrected(self, exact: Tensor, y: Tensor) -> tuple[IntegerLayer, Tensor]:
        """Make up for a layer's mean error in its bias.

        Args:
            exact: What the float layer computes, (N, out, ...).
            y: What this one does.

        Returns:
            The layer with another bias, and what it computes.
        """
        bias = self.of.bias + rounding.mean_error(exact, y)
        to = replace(self, of=replace(self.of, bias=bias), bias=_bias(self.of, bias, self.scales))
        moved = (to.offsets() - self.offsets()).to(y.dtype)
        return to, y + along_channels(moved, y.ndim)

    def offsets(self) -> Tensor:
        """Return the bias in the units of what the layer writes, float64 (out,)."""
        if self.of.input_scale is None:
            return torch.from_numpy(self.bias).double()
        return torch.from_numpy(
            self.bias * bias_scales(self.of.input_scale, self.scales).astype(np.float64)
        )


def unrounded(
    module: nn.Conv2d | nn.Linear,
    rescaling: Rescaling,
    input_scale: float | None,
    output_scale: NDArray[np.float64] | None = None,
) -> Unrounded:
    """Move a site's rescaling into the layer that reads it, in float64.

    Args:
        module: Of the folded network.
        rescaling: Of the site. A depthwise layer's is the residual stream's, has no shift, and goes
            into its rows.
        input_scale: scale_x of the site, None where it is not quantized.
        output_scale: As in `Unrounded`.
    """
    weight = module.weight.detach().double().numpy()
    bias = np.zeros(len(weight)) if module.bias is None else module.bias.detach().double().numpy()
    shift, scale = (v.double().numpy() for v in (rescaling.shift, rescaling.scale))
    if _depthwise(module):
        weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    else:
        across = (1, -1, *[1] * (weight.ndim - 2))
        summed = (weight * shift.reshape(across)).reshape(len(weight), -1).sum(axis=1)
        weight, bias = weight * scale.reshape(across), bias + summed
    return Unrounded(
        module=module,
        weight=weight,
        bias=bias,
        rescaling=rescaling,
        input_scale=input_scale,
        output_scale=output_scale,
    )


def rounded(
    layer: Unrounded,
    grid: WeightGrid,
    how: Rounding,
    exact: Tensor | None = None,
    inputs: Tensor | None = None,
) -> IntegerLayer:
    """Choose a layer's scales and integers.

    Args:
        layer: What to round.
        grid: What the weights may be.
        how: The rounding, of linear layers; convolutions are rounded to nearest, and so are layers
            that read fewer positions than they have inputs. Where pairs need headroom, AdaRound
            gives way to GPTQ.
        exact: What the layer reads in the float network, (N, in, ...); None with `inputs` None.
        inputs: What it reads in the quantized one; None rounds to nearest on max|w| / limit.

    Returns:
        The layer in integers, its bias not yet corrected.
    """
    if inputs is None or exact is None:
        scales = _scales(layer, grid)
        return _made(layer, quantize_weight(layer.weight, scales, grid), scales)
    read = layer.rescaling.apply(inputs)
    scales = _scales(layer, grid, _importance(layer, read))
    few = grid.bits == FEW_BITS
    if how in {"auto", "nearest"} or not isinstance(layer.module, nn.Linear):
        return _made(layer, quantize_weight(layer.weight, scales, grid), scales)
    rows, weight = _rows(read), layer.weight
    if len(rows) < weight.shape[1]:
        # Fewer positions than inputs leave directions that no error was seen in.
        return _made(layer, quantize_weight(layer.weight, scales, grid), scales)
    hessian = rounding.second_moment(rows)
    if few:
        lost = rounding.second_moment(_rows(layer.rescaling.apply(exact)) - rows, rows)
        weight = rounding.ridge(weight, lost, hessian)
        layer = replace(layer, weight=weight)
    if how == "adaround" and not grid.pairs:
        return _made(layer, rounding.adaround(weight, scales, rows, grid), scales)
    return _made(layer, rounding.gptq(weight, scales, hessian, grid), scales)


def _made(layer: Unrounded, weight: NDArray[np.int8], scales: NDArray[np.float32]) -> IntegerLayer:
    return IntegerLayer(
        of=layer, weight=weight, scales=scales, bias=_bias(layer, layer.bias, scales)
    )


def _scales(
    layer: Unrounded, grid: WeightGrid, importance: NDArray[np.float64] | None = None
) -> NDArray[np.float32]:
    read, written = layer.input_scale or 1.0, layer.output_scale
    return weight_scales(layer.weight, _bounded(layer), read, grid, importance, written)


def _bias(layer: Unrounded, bias: NDArray[np.float64], scales: NDArray[np.float32]) -> NDArray[Any]:
    if layer.input_scale is None:
        return bias.astype(np.float32)
    return quantize_bias(bias, layer.input_scale, scales)


def _bounded(layer: Unrounded) -> NDArray[np.float64]:
    """Return the bias that scales must leave room for: none where it stays float."""
    return layer.bias if layer.input_scale is not None else np.zeros_like(layer.bias)


def _importance(layer: Unrounded, x: Tensor) -> NDArray[np.float64]:
    """Return the mean square of what each weight multiplies, shaped to broadcast over them."""
    positions = (0, *range(2, x.ndim))
    square: NDArray[np.float64] = x.square().mean(dim=positions, dtype=torch.float64).numpy()
    ndim = layer.weight.ndim
    if _depthwise(layer.module):
        # Within a row all weights multiply the same channel.
        return np.ones((1,) * ndim)
    # A channel that this sample left at 0 may hold something in others.
    square += LEAST_IMPORTANCE * square.mean() + np.finfo(np.float64).tiny
    return square.reshape(1, -1, *[1] * (ndim - 2))


def _rows(x: Tensor) -> Tensor:
    return drawn(x.movedim(1, -1).flatten(0, -2), MOST_ROWS)


def _depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups > 1
