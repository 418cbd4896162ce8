"""The quantization contract's arithmetic, once (docs/quantization-contract.md states it).

In: numpy arrays and ranges. Out: integers, scales and zero points. Everything that quantizes,
dequantizes or chooses a scale in this project calls these functions.

    x ~ scale * (q - zero_point)

Activations are int8, asymmetric, per tensor; weights int8, symmetric, per output channel; biases
int32 at scale_x * scale_w. Rounding is half to even.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from pipeline.records import Profile, Quantization, Range

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.floating]

ACTIVATION_MIN, ACTIVATION_MAX = -128, 127
BIAS_LIMIT = 2**30
SMALLEST_SCALE = 2.0**-62
"""Below this a scale counts as zero; the product of two such scales is still a normal float32."""
WEIGHT_LIMIT = 127
"""Largest |weight|; -128 does not occur."""
PAIR_LIMIT = 128
"""What two weights of one sign may sum to where VPMADDUBSW adds their products with u8 in int16:
255 * 128 = 32640 still fits. Of opposite signs they cannot overflow."""
HEADROOM_STEPS = 16
"""Scales tried for a row whose pairs need headroom; the last leaves no pair above the limit."""
Headroom = Literal["none", "pairs", "each"]


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


def headroom(shape: tuple[int, ...], profile: Profile, *, depthwise: bool) -> Headroom:
    """Say what keeps a layer's integer kernels from overflowing.

    AVX2 without VNNI multiplies u8 by s8 with VPMADDUBSW, which adds two neighbours along the input
    channels in int16. Measured on onnxruntime's and OpenVINO's kernels with the worst inputs
    (`pytest tests/targets/test_headroom.py`): pairs (2i, 2i + 1) are what is added, in linear
    layers and in dense convolutions alike, and depthwise kernels widen first.

    Args:
        shape: Of the weight: (out, in / groups, ...).
        profile: What the integers are made for.
        depthwise: Whether the layer is a depthwise convolution.

    Returns:
        `none`; `pairs`: two neighbours of one sign sum to `PAIR_LIMIT` at most; `each`: where the
        channels do not pair up, every weight keeps to half of it.
    """
    if profile == "full" or depthwise:
        return "none"
    return "each" if shape[1] % 2 else "pairs"


def weight_scales(
    weight: Floats, bias: Floats, input_scale: float, profile: Profile, *, depthwise: bool = False
) -> NDArray[np.float32]:
    """Choose one scale per output channel.

    The scale is max|w| / 127; where pairs need headroom, the one of up to twice that which rounds
    the row with the least squared error; where each weight needs it, max|w| / 64. It is raised
    where the int32 bias at scale_x * scale_w would leave [-2**30, 2**30]: a bias that large drowns
    what the coarser weights lose (at most K * 2**7 steps of its 2**30). A row of zeros gets the
    scale that represents its bias, or 1 if that is 0 too.

    Args:
        weight: Shape (out, ...), float.
        bias: Shape (out,), float.
        input_scale: scale_x of the layer's input.
        profile: Which headroom to leave.
        depthwise: Whether the layer is a depthwise convolution.

    Returns:
        Shape (out,), float32, at least `SMALLEST_SCALE`.
    """
    largest = np.abs(weight.reshape(len(weight), -1)).max(axis=1).astype(np.float64)
    for_bias = np.abs(bias.astype(np.float64)) / (input_scale * BIAS_LIMIT)
    room = headroom(weight.shape, profile, depthwise=depthwise)
    limit = PAIR_LIMIT // 2 if room == "each" else WEIGHT_LIMIT
    scale = np.maximum(largest / limit, for_bias)
    scale = np.where(scale < SMALLEST_SCALE, 1.0, scale)
    if room == "pairs":
        scale = _roomy(weight.astype(np.float64), scale)
    chosen: NDArray[np.float32] = scale.astype(np.float32)
    return chosen


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
    weight: Floats, scales: NDArray[np.float32], profile: Profile, *, depthwise: bool = False
) -> NDArray[np.int8]:
    """Round a weight to its per-channel grid.

    Args:
        weight: Shape (out, ...), float.
        scales: Shape (out,), from `weight_scales`.
        profile: Which headroom to leave.
        depthwise: Whether the layer is a depthwise convolution.

    Returns:
        int8 of the weight's shape, with the headroom that the profile asks.
    """
    room = headroom(weight.shape, profile, depthwise=depthwise)
    limit = PAIR_LIMIT // 2 if room == "each" else WEIGHT_LIMIT
    x = np.clip(weight.astype(np.float64) / along_rows(scales, weight.ndim), -limit, limit)
    return (_round_pairs(x) if room == "pairs" else np.rint(x)).astype(np.int8)


def _roomy(weight: NDArray[np.float64], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return, per row, the scale from `scale` up that loses least to rounding and headroom."""
    best, least = scale, np.full(len(weight), np.inf)
    for factor in np.linspace(1.0, 2 * WEIGHT_LIMIT / PAIR_LIMIT, HEADROOM_STEPS):
        tried = scale * factor
        x = weight / along_rows(tried, weight.ndim)
        lost = (_round_pairs(x) - x).reshape(len(x), -1)
        error = np.einsum("ij,ij->i", lost, lost) * tried**2
        best = np.where(error < least, tried, best)
        least = np.minimum(error, least)
    return best


def _round_pairs(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round weights in steps to the nearest integers whose pairs keep to `PAIR_LIMIT`.

    A pair that exceeds it gives way on both sides alike, which is the least in squares.
    """
    pairs = np.clip(x, -WEIGHT_LIMIT, WEIGHT_LIMIT).reshape(len(x), x.shape[1] // 2, 2, -1)
    first, second = pairs[:, :, 0], pairs[:, :, 1]
    excess = np.where(first * second > 0, abs(first) + abs(second) - PAIR_LIMIT, 0).clip(0)
    a, b = (np.rint(w - np.sign(w) * excess / 2) for w in (first, second))
    # Two halves rounded up can be one too many.
    b -= np.sign(b) * ((a * b > 0) & (abs(a) + abs(b) > PAIR_LIMIT))
    return np.stack((a, b), axis=2).reshape(x.shape)


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
