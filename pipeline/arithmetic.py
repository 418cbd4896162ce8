"""The quantization contract's arithmetic, once (docs/quantization-contract.md states it).

In: numpy arrays and ranges. Out: integers, scales and zero points. Everything that quantizes,
dequantizes or chooses a scale in this project calls these functions.

    x ~ scale * (q - zero_point)

Activations are int8, asymmetric, per tensor; weights int8, symmetric, per output channel; biases
int32 at scale_x * scale_w. Rounding is half to even.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.records import Profile, Quantization, Range

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]

ACTIVATION_MIN, ACTIVATION_MAX = -128, 127
BIAS_LIMIT = 2**30
SMALLEST_SCALE = 2.0**-62
"""Below this a scale counts as zero; the product of two such scales is still a normal float32."""
WEIGHT_LIMIT: dict[Profile, int] = {"full": 127, "avx2": 64}
"""Largest |weight| per profile: VPMADDUBSW adds two u8 x s8 products in int16, and
2 * 255 * 64 = 32640 still fits, so 64 is exact on AVX2 without VNNI."""


def activation_quantization(observed: Range) -> Quantization:
    """Choose scale and zero point for a tensor with this range.

    The range is widened to contain 0, so that 0.0 is exactly a grid point. The scale is a float32,
    as every runtime stores it. A tensor that was always 0 gets scale 1 and represents 0 exactly.

    Args:
        observed: The least and the greatest value seen.

    Returns:
        Parameters for int8 in [-128, 127]; for uint8 add 128 to q and to the zero point.
    """
    low, high = min(observed.minimum, 0.0), max(observed.maximum, 0.0)
    steps = ACTIVATION_MAX - ACTIVATION_MIN
    scale = float(np.float32((high - low) / steps))
    if scale < SMALLEST_SCALE:
        return Quantization(scale=1.0, zero_point=0)
    zero_point = int(np.clip(np.rint(ACTIVATION_MIN - low / scale), ACTIVATION_MIN, ACTIVATION_MAX))
    return Quantization(scale=scale, zero_point=zero_point)


def weight_scales(
    weight: Floats, bias: Floats, input_scale: float, profile: Profile
) -> NDArray[np.float32]:
    """Choose one scale per output channel.

    The scale is max|w| / limit, raised where the int32 bias at scale_x * scale_w would leave
    [-2**30, 2**30]: a bias that large drowns what the coarser weights lose (at most K * 2**7 steps
    of its 2**30). A row of zeros gets the scale that represents its bias, or 1 if that is 0 too.

    Args:
        weight: Shape (out, ...), float.
        bias: Shape (out,), float.
        input_scale: scale_x of the layer's input.
        profile: Its limit on |q|.

    Returns:
        Shape (out,), float32, at least `SMALLEST_SCALE`.
    """
    largest = np.abs(weight.reshape(len(weight), -1)).max(axis=1).astype(np.float64)
    for_bias = np.abs(bias.astype(np.float64)) / (input_scale * BIAS_LIMIT)
    scale = np.maximum(largest / WEIGHT_LIMIT[profile], for_bias)
    return np.where(scale < SMALLEST_SCALE, 1.0, scale).astype(np.float32)


def quantize(x: Floats, parameters: Quantization) -> NDArray[np.int8]:
    """Map floats to int8: clip(round_half_even(x / scale) + zero_point)."""
    q = np.rint(np.asarray(x, np.float64) / parameters.scale) + parameters.zero_point
    clipped: NDArray[np.int8] = np.clip(q, ACTIVATION_MIN, ACTIVATION_MAX).astype(np.int8)
    return clipped


def dequantize(q: NDArray[np.int8], parameters: Quantization) -> NDArray[np.float32]:
    """Map int8 back to float32: scale * (q - zero_point)."""
    shifted = q.astype(np.int32) - parameters.zero_point
    return (shifted * np.float32(parameters.scale)).astype(np.float32)


def quantize_weight(
    weight: Floats, scales: NDArray[np.float32], profile: Profile
) -> NDArray[np.int8]:
    """Round a weight to its per-channel grid.

    Args:
        weight: Shape (out, ...), float.
        scales: Shape (out,), from `weight_scales`.
        profile: Its limit on |q|.

    Returns:
        int8 of the weight's shape, in [-limit, limit].
    """
    limit = WEIGHT_LIMIT[profile]
    q = np.rint(weight.astype(np.float64) / along_rows(scales, weight.ndim))
    return np.clip(q, -limit, limit).astype(np.int8)


def dequantize_weight(q: NDArray[np.int8], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return scale * q per output channel, in float32."""
    return (q * along_rows(scales, q.ndim)).astype(np.float32)


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


def along_rows(scales: NDArray[np.float32], ndim: int) -> NDArray[np.float32]:
    """Reshape (out,) so that it broadcasts along a tensor's first of `ndim` axes."""
    return scales.reshape(-1, *[1] * (ndim - 1))
