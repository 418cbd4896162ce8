"""The quantization contract's arithmetic, once (docs/quantization-contract.md states it).

In: numpy arrays and ranges. Out: integers, scales and zero points. Everything that quantizes,
dequantizes or chooses a scale in this project calls these functions.

    x ~ scale * (q - zero_point)

Activations are int8, asymmetric, per tensor; weights int8, symmetric, per output channel; biases
int32 at scale_x * scale_w. Rounding is half to even.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from pipeline.records import Bits, Profile, Quantization, Range

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]

FEW_BITS: Final = 4
BITS: Final = 8
WIDE_BITS: Final = 16
ACTIVATION_MIN, ACTIVATION_MAX = -128, 127
ACTIVATION_LIMIT_16 = 32767
"""Of w8a16, symmetric as TFLite's kernels ask; -32768 does not occur."""
ENDS: dict[Bits, tuple[int, int]] = {
    4: (-8, 7),
    8: (ACTIVATION_MIN, ACTIVATION_MAX),
    16: (-ACTIVATION_LIMIT_16, ACTIVATION_LIMIT_16),
}
"""The least and the greatest integer of an activation, by bits."""
BIAS_LIMIT = 2**30
SMALLEST_SCALE = 2.0**-62
"""Below this a scale counts as zero; the product of two such scales is still a normal float32."""
WEIGHT_LIMITS = {BITS: 127, FEW_BITS: 7}
"""Largest |weight| by bits; -128 and -8 do not occur."""
WEIGHT_LIMIT = WEIGHT_LIMITS[BITS]
PAIR_LIMIT = 128
"""What two weights of one sign may sum to where VPMADDUBSW adds their products with u8 in int16:
255 * 128 = 32640 still fits. Of opposite signs they cannot overflow."""
HEADROOM_STEPS = 16
"""Scales tried for a row whose pairs need headroom; the last leaves no pair above the limit."""
SEARCH_STEPS = 16
SEARCHED_AT_ONCE = 2**14
"""Weights whose scales are searched together."""
LEAST_DIVISOR = 51
"""Of a requantization, from which its weight scale is moved to the next odd one: by 4 % at most."""
SMALLEST_FACTOR = {BITS: 0.85, FEW_BITS: 0.55}
"""How far below max|w| / limit a row's scale is searched: clipping few to round all finer."""


def activation_quantization(observed: Range, bits: Bits = 8) -> Quantization:
    """Choose scale and zero point for a tensor with this range.

    The range is widened to contain 0, so that 0.0 is exactly a grid point. The scale is a float32,
    as every runtime stores it. A tensor that was always 0 gets scale 1 and represents 0 exactly.

    Args:
        observed: The least and the greatest value to represent.
        bits: 8 or 4, asymmetric; or 16, symmetric.

    Returns:
        Parameters for int8 in [-128, 127] (for uint8 add 128 to q and to the zero point), or for
        int16 in [-32767, 32767]. With 4 bits q is in [-8, 7].
    """
    low, high = min(observed.minimum, 0.0), max(observed.maximum, 0.0)
    if bits == WIDE_BITS:
        scale = float(np.float32(max(-low, high) / ACTIVATION_LIMIT_16))
        return Quantization(scale=1.0 if scale < SMALLEST_SCALE else scale, zero_point=0, bits=16)
    first, last = ENDS[bits]
    scale = float(np.float32((high - low) / (last - first)))
    if scale < SMALLEST_SCALE:
        return Quantization(scale=1.0, zero_point=0, bits=bits)
    zero_point = int(np.clip(np.rint(first - low / scale), first, last))
    return Quantization(scale=scale, zero_point=zero_point, bits=bits)


def limits(parameters: Quantization) -> tuple[int, int]:
    """Return the least and the greatest integer of a grid."""
    return ENDS[parameters.bits]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightGrid:
    """What a layer's integer weights may be.

    AVX2 without VNNI multiplies u8 by s8 with VPMADDUBSW, which adds two neighbours along the input
    channels in int16. Measured on onnxruntime's and OpenVINO's kernels with the worst inputs
    (`pytest tests/targets/test_headroom.py`): pairs (2i, 2i + 1) are what is added, in linear
    layers and in dense convolutions alike, and depthwise kernels widen first.

    Attributes:
        limit: Largest |weight|.
        pairs: Whether two neighbours of one sign must sum to `PAIR_LIMIT` at most.
        bits: 8 or 4.
    """

    limit: int
    pairs: bool
    bits: int


def weight_grid(
    shape: tuple[int, ...], profile: Profile, *, depthwise: bool, bits: int = 8
) -> WeightGrid:
    """Say what keeps a layer's integer kernels from overflowing.

    Args:
        shape: Of the weight: (out, in / groups, ...).
        profile: What the integers are made for.
        depthwise: Whether the layer is a depthwise convolution.
        bits: Of the weights; 4 need no headroom.

    Returns:
        The grid. Where headroom is asked and the channels do not pair up, every weight keeps to
        half of `PAIR_LIMIT`.
    """
    if profile == "full" or depthwise or bits == FEW_BITS:
        return WeightGrid(limit=WEIGHT_LIMITS[bits], pairs=False, bits=bits)
    if shape[1] % 2:
        return WeightGrid(limit=PAIR_LIMIT // 2, pairs=False, bits=bits)
    return WeightGrid(limit=WEIGHT_LIMIT, pairs=True, bits=bits)


def weight_scales(
    weight: Floats,
    bias: Floats,
    input_scale: float,
    grid: WeightGrid,
    importance: Floats | None = None,
    output_scale: Floats | None = None,
) -> NDArray[np.float32]:
    """Choose one scale per output channel.

    The scale is max|w| / limit. With `importance`, it is the one from `SMALLEST_FACTOR` of that up
    which rounds the row with the least weighted squared error; where pairs need headroom, one of up
    to twice that. It is raised where the int32 bias at scale_x * scale_w would leave
    [-2**30, 2**30]: a bias that large drowns what the coarser weights lose (at most K * 2**7 steps
    of its 2**30). A row of zeros gets the scale that represents its bias, or 1 if that is 0 too.

    Args:
        weight: Shape (out, in, ...), float.
        bias: Shape (out,), float.
        input_scale: scale_x of the layer's input.
        grid: What the weights may be.
        importance: Broadcastable to the weight: how much an error there counts, such as the mean
            square of what it multiplies. None: no scale below max|w| / limit is tried.
        output_scale: scale_y of the site that the layer writes, in the row's own units: shape
            (out,). The scales tried are then `tie_free`. None: what the layer writes stays float.

    Returns:
        Shape (out,), float32, at least `SMALLEST_SCALE`.
    """
    exact = weight.astype(np.float64)
    largest = np.abs(exact.reshape(len(weight), -1)).max(axis=1)
    for_bias = np.abs(bias.astype(np.float64)) / (input_scale * BIAS_LIMIT)
    scale = np.maximum(largest / grid.limit, for_bias)
    scale = np.where(scale < SMALLEST_SCALE, 1.0, scale)
    factors = [1.0]
    if importance is not None:
        # From 1 down: of equal errors the scale that clips nothing is taken.
        factors = list(np.linspace(1.0, SMALLEST_FACTOR[grid.bits], SEARCH_STEPS))
    if grid.pairs:
        factors += list(np.linspace(1.0, 2 * WEIGHT_LIMIT / PAIR_LIMIT, HEADROOM_STEPS))[1:]
    counts = np.broadcast_to(1.0 if importance is None else importance, exact.shape)
    best = np.array(tie_free(scale, input_scale, output_scale))
    # A few rows at a time stay in the processor's cache through all that is tried on them.
    height = max(1, SEARCHED_AT_ONCE // max(1, exact[0].size))
    for start in range(0, len(exact) if len(factors) > 1 else 0, height):
        rows = slice(start, start + height)
        written = None if output_scale is None else output_scale[rows]
        least = np.full(len(exact[rows]), np.inf)
        for factor in factors:
            lowest = np.maximum(for_bias[rows], SMALLEST_SCALE)
            tried = tie_free(np.maximum(scale[rows] * factor, lowest), input_scale, written)
            steps = along_rows(tried, weight.ndim)
            lost = (round_weights(exact[rows] / steps, grid) * steps - exact[rows]) ** 2
            lost *= counts[rows]
            error = lost.reshape(len(lost), -1).sum(axis=1)
            best[rows] = np.where(error < least, tried, best[rows])
            least = np.minimum(error, least)
    chosen: NDArray[np.float32] = best.astype(np.float32)
    return chosen


def tie_free(scales: Floats, input_scale: float, output_scale: Floats | None) -> Floats:
    """Raise weight scales until what a layer writes never lies halfway between two integers.

    A kernel that writes integers rounds sum * scale_x * scale_w / scale_y. Where that factor is
    1 / n with an odd n, no sum is a tie and each lies 1 / 2n of a step or more from one. That is
    far more than float32 or a fixed-point multiplier is wrong by, so all runtimes round alike.

    Args:
        scales: scale_w, shape (out,).
        input_scale: scale_x.
        output_scale: scale_y in each row's own units, shape (out,). None changes nothing.

    Returns:
        Shape (out,). A row with n below `LEAST_DIVISOR` stays as it is.
    """
    if output_scale is None:
        return scales
    n = output_scale / (input_scale * scales)
    odd = 2 * np.floor((n - 1) / 2) + 1
    exact: NDArray[np.float64] = output_scale / (input_scale * np.maximum(odd, 1))
    return np.where(odd >= LEAST_DIVISOR, exact, scales)


def quantize(x: Floats, parameters: Quantization) -> NDArray[np.int8 | np.int16]:
    """Map floats to integers: clip(round_half_even(x / scale) + zero_point)."""
    q = np.rint(np.asarray(x, np.float64) / parameters.scale) + parameters.zero_point
    kind = np.int16 if parameters.bits == WIDE_BITS else np.int8
    clipped: NDArray[np.int8 | np.int16] = np.clip(q, *limits(parameters)).astype(kind)
    return clipped


def dequantize(q: NDArray[np.int8 | np.int16], parameters: Quantization) -> NDArray[np.float32]:
    """Map integers back to float32: scale * (q - zero_point)."""
    shifted = q.astype(np.int32) - parameters.zero_point
    return (shifted * np.float32(parameters.scale)).astype(np.float32)


def quantize_weight(
    weight: Floats, scales: NDArray[np.float32], grid: WeightGrid
) -> NDArray[np.int8]:
    """Round a weight to its per-channel grid.

    Args:
        weight: Shape (out, in, ...), float.
        scales: Shape (out,), from `weight_scales`.
        grid: What the weights may be.

    Returns:
        int8 of the weight's shape, with the headroom that the grid asks.
    """
    steps = weight.astype(np.float64) / along_rows(scales, weight.ndim)
    return round_weights(steps, grid).astype(np.int8)


def round_weights(x: NDArray[np.float64], grid: WeightGrid) -> NDArray[np.float64]:
    """Round weights, given in steps of their scales, to the nearest that a grid allows.

    Where pairs need headroom, one that exceeds it gives way on both sides alike, which is the least
    in squares.
    """
    if not grid.pairs:
        return np.rint(np.clip(x, -grid.limit, grid.limit))
    # In rows, so that what follows sees its pairs and not a copy of them.
    clipped = np.ascontiguousarray(np.clip(x, -grid.limit, grid.limit))
    q, pairs = np.rint(clipped), clipped.reshape(-1, 2, math.prod(x.shape[2:]))
    # Of unlike signs none exceeds it: each alone keeps to `WEIGHT_LIMIT`.
    over = abs(pairs[:, 0] + pairs[:, 1]) > PAIR_LIMIT
    if over.any():
        first, second = pairs[:, 0][over], pairs[:, 1][over]
        excess = abs(first) + abs(second) - PAIR_LIMIT
        a, b = (np.rint(w - np.sign(w) * excess / 2) for w in (first, second))
        # Two halves rounded up can be one too many.
        b -= np.sign(b) * (abs(a) + abs(b) > PAIR_LIMIT)
        rounded = q.reshape(pairs.shape)
        rounded[:, 0][over], rounded[:, 1][over] = a, b
    return q


def dequantize_weight(q: NDArray[np.int8], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return scale * q per output channel, in float32."""
    values: NDArray[np.float32] = (q * along_rows(scales, q.ndim)).astype(np.float32)
    return values


def bias_scales(input_scale: float, scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return scale_x * scale_w per output channel in float32, as every runtime computes it."""
    return (np.float32(input_scale) * scales).astype(np.float32)


def quantize_bias(
    bias: Floats, input_scale: float, scales: NDArray[np.float32]
) -> NDArray[np.int32]:
    """Round a bias to int32 at scale_x * scale_w.

    Args:
        bias: Shape (out,), float.
        input_scale: scale_x of the layer's input.
        scales: scale_w, shape (out,), from `weight_scales`, which leaves room for the bias.

    Returns:
        int32, within 2**30 up to rounding.
    """
    q = np.rint(bias.astype(np.float64) / bias_scales(input_scale, scales))
    return q.astype(np.int32)


def along_rows(scales: NDArray[Any], ndim: int) -> NDArray[Any]:
    """Reshape (out,) so that it broadcasts along a tensor's first of `ndim` axes."""
    return scales.reshape(-1, *[1] * (ndim - 1))
