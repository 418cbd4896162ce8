"""The shared graph: the folded network with its quantize/dequantize pairs, as exporters read it.

A `Graph` is a list of typed operations in topological order, free of layout and of any framework.
`targets.translate` makes it; each runtime walks it once and lays it out in its own form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.arithmetic import dequantize_weight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from pipeline.records import Export, Layer, Quantization, QuantizedModel

    Arrays = Mapping[str, NDArray[Any]]

Shape = tuple[int, ...]
"""(channels, height, width), or (channels,) after pooling; the batch is not in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Integers:
    """What a layer computes with when its weights are integers.

    Shapes: `weight` int8 (out, in/groups, ...), `weight_scales` float32 (out,), `bias` int32
    (out,), `bias_scales` float32 (out,) = scale_x * weight_scales. Where the layer's input is not a
    `QuantizePair`, `bias` is float32 and `bias_scales` is None.
    """

    weight: NDArray[np.int8]
    weight_scales: NDArray[np.float32]
    bias: NDArray[np.int32] | NDArray[np.float32]
    bias_scales: NDArray[np.float32] | None

    def dequantized(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return weight and bias as the float32 values that the integers stand for."""
        bias = self.bias if self.bias_scales is None else self.bias * self.bias_scales.astype(float)
        return dequantize_weight(self.weight, self.weight_scales), bias.astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operation. `name` is also its output's name; `inputs` name earlier operations."""

    name: str
    inputs: tuple[str, ...]
    shape: Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Input(Op):
    """The image: float pixels in [0, 255]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighted(Op):
    """A layer with weights: `weight` (out, in/groups, ...) and `bias` (out,), float32.

    With `integers` their values count instead. The scheme says what the layer computes on: the
    integers of the `QuantizePair` that it reads, integers that the runtime makes of its input
    (w8a8-dynamic), or floats (w8).
    """

    layer: Layer
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    integers: Integers | None

    def values(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return weight and bias as the floats that this layer really multiplies by."""
        return self.integers.dequantized() if self.integers else (self.weight, self.bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conv(Weighted):
    """A convolution; depthwise where `groups` equals the channels."""

    stride: int
    padding: int
    groups: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear(Weighted):
    """A linear map over channels, at every position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm(Op):
    """LayerNorm over channels; `weight` and `bias` (channels,) float32 where it has an affine."""

    eps: float
    weight: NDArray[np.float32] | None
    bias: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseNorm(Op):
    """GRN: x (1 + weight n), n each channel's norm over the image by the mean norm; float.

    `weight` is (channels,) float32; its shift is folded into the layer that follows.
    """

    eps: float
    weight: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift(Op):
    """A constant per channel added, in float; `bias` is (channels,) float32."""

    bias: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale(Op):
    """A factor per channel, in float; `weight` is (channels,) float32."""

    weight: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gelu(Op):
    """GELU; each runtime's Capabilities say whether by tanh or by erf."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Add(Op):
    """The residual addition, in float, of two tensors in the same units."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean(Op):
    """The mean over height and width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizePair(Op):
    """A site: quantize to integers and dequantize again."""

    parameters: Quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """The operations in an order in which each follows its inputs; the last one is `logits`."""

    ops: tuple[Op, ...]
    export: Export
    model: QuantizedModel
    arrays: Arrays

    @property
    def blocks(self) -> int:
        """How many ConvNeXt blocks there are."""
        return sum(self.model.architecture.depths)

    def __getitem__(self, name: str) -> Op:
        """Return the operation with this name."""
        return next(op for op in self.ops if op.name == name)

    def users(self, name: str) -> tuple[Op, ...]:
        """Return the operations that read this one."""
        return tuple(op for op in self.ops if name in op.inputs)

    def output_site(self, op: Op) -> QuantizePair | None:
        """Return the site behind `op`, where a site is all that reads it."""
        users = self.users(op.name)
        if len(users) == 1 and isinstance(users[0], QuantizePair):
            return users[0]
        return None

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites that are quantized."""
        return tuple(op.name for op in self.ops if isinstance(op, QuantizePair))

    @property
    def weighted(self) -> tuple[Weighted, ...]:
        """The layers with weights."""
        return tuple(op for op in self.ops if isinstance(op, Weighted))

    @property
    def integer_layers(self) -> int:
        """How many layers have integer weights."""
        return sum(op.integers is not None for op in self.weighted)
