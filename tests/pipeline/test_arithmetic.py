"""The contract's arithmetic, stated as properties."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from pipeline import arithmetic
from pipeline.arithmetic import LEAST_DIVISOR
from pipeline.records import PROFILES, Bits, Profile, Quantization, Range

FAST = settings(max_examples=150, deadline=None)

values = st.floats(-1e6, 1e6, allow_nan=False, allow_subnormal=False)
ranges = st.tuples(values, values).map(lambda ends: Range(minimum=min(ends), maximum=max(ends)))
profiles = st.sampled_from(PROFILES)
input_scales = st.floats(2**-20, 2**10, width=32)
rows = hnp.array_shapes(min_dims=2, max_dims=4, max_side=5)
finite32 = st.floats(-1024, 1024, width=32)
weights = hnp.arrays(np.float32, rows, elements=finite32)


def grid(weight: NDArray[Any], profile: Profile) -> arithmetic.WeightGrid:
    return arithmetic.weight_grid(weight.shape, profile, depthwise=False)


def _bias_for(weight: NDArray[np.float32], magnitude: float) -> NDArray[np.float32]:
    signs = np.where(np.arange(len(weight)) % 2, -1, 1)
    return (signs * magnitude).astype(np.float32)


@given(observed=ranges)
@FAST
def test_zero_is_a_grid_point(observed: Range) -> None:
    chosen = arithmetic.activation_quantization(observed)
    q = arithmetic.quantize(np.zeros(3, np.float32), chosen)
    assert (q == chosen.zero_point).all()
    assert (arithmetic.dequantize(q, chosen) == 0.0).all()


@given(observed=ranges)
@FAST
def test_scale_is_a_float32_and_zero_point_an_integer_of_the_grid(observed: Range) -> None:
    grids: dict[Bits, tuple[int, int]] = {8: (-128, 127), 4: (-8, 7)}
    for bits, (least, most) in grids.items():
        chosen = arithmetic.activation_quantization(observed, bits)
        assert float(np.float32(chosen.scale)) == chosen.scale
        assert least <= chosen.zero_point <= most
        assert chosen.bits == bits
        q = arithmetic.quantize(np.array([observed.minimum, 0, observed.maximum]), chosen)
        assert least <= q.min() <= q.max() <= most


@given(
    observed=ranges,
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=20),
    bits=st.sampled_from([4, 8]),
)
@FAST
def test_round_trip_errs_by_half_a_step_at_most(
    observed: Range, shares: list[float], bits: Bits
) -> None:
    chosen = arithmetic.activation_quantization(observed, bits)
    spread = observed.maximum - observed.minimum
    x = np.array([0.0, 1.0, *shares]) * spread + observed.minimum
    x = np.clip(x, observed.minimum, observed.maximum)
    back = arithmetic.dequantize(arithmetic.quantize(x, chosen), chosen)
    # The float32 of the scale and of the result move the ends by 255 * 2**-24 steps.
    assert np.abs(back - x).max() <= chosen.scale * (0.5 + 1e-4)


@given(observed=ranges)
@FAST
def test_the_whole_grid_is_used(observed: Range) -> None:
    chosen = arithmetic.activation_quantization(observed)
    low, high = min(observed.minimum, 0.0), max(observed.maximum, 0.0)
    if high - low > 1e-12:
        ends = arithmetic.quantize(np.array([low, high]), chosen)
        assert ends[0] <= -127
        assert ends[1] >= 126


@given(observed=ranges, shares=st.lists(st.floats(-1, 2), min_size=1, max_size=20))
@FAST
def test_uint8_is_int8_plus_128(observed: Range, shares: list[float]) -> None:
    chosen = arithmetic.activation_quantization(observed)
    x = np.array(shares) * (observed.maximum - observed.minimum) + observed.minimum
    unsigned_zero = chosen.zero_point + 128
    unsigned = np.clip(np.rint(x / chosen.scale) + unsigned_zero, 0, 255).astype(np.uint8)
    signed = arithmetic.quantize(x, chosen)
    assert (signed.astype(np.int16) + 128 == unsigned).all()
    from_unsigned = (unsigned.astype(np.int32) - unsigned_zero) * np.float32(chosen.scale)
    assert (from_unsigned.astype(np.float32) == arithmetic.dequantize(signed, chosen)).all()


@pytest.mark.parametrize("constant", [3.7, -3.7, 1e-3, -250.0])
def test_a_constant_activation_survives(constant: float) -> None:
    chosen = arithmetic.activation_quantization(Range(minimum=constant, maximum=constant))
    back = arithmetic.dequantize(arithmetic.quantize(np.array([constant, 0.0]), chosen), chosen)
    assert back[0] == pytest.approx(constant, rel=1e-6)
    assert back[1] == 0.0


@pytest.mark.parametrize("tiny", [0.0, 1e-30])
def test_an_activation_that_is_always_zero_gets_scale_one(tiny: float) -> None:
    chosen = arithmetic.activation_quantization(Range(minimum=0.0, maximum=tiny))
    assert chosen == Quantization(scale=1.0, zero_point=0)


def test_a_range_above_zero_is_widened_to_it() -> None:
    chosen = arithmetic.activation_quantization(Range(minimum=10.0, maximum=25.5))
    assert chosen.zero_point == -128
    assert chosen.scale == pytest.approx(0.1)


def test_rounding_is_half_to_even() -> None:
    x = np.array([0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5])
    q = arithmetic.quantize(x, Quantization(scale=1.0, zero_point=0))
    assert q.tolist() == [0, 2, 2, 4, 0, -2, -2]
    # The zero point is added after rounding, as every runtime does it.
    shifted = arithmetic.quantize(x, Quantization(scale=1.0, zero_point=1))
    assert shifted.tolist() == [1, 3, 3, 5, 1, -1, -1]
    row = np.array([[2.5, 3.5, -2.5, 127.0]], np.float32)
    scales = np.ones(1, np.float32)
    assert arithmetic.quantize_weight(row, scales, grid(row, "full")).tolist() == [[2, 4, -2, 127]]
    halves = np.array([0.5, 1.5, -2.5], np.float32)
    assert arithmetic.quantize_bias(halves, 1.0, np.ones(3, np.float32)).tolist() == [0, 2, -2]


def test_values_outside_the_range_saturate() -> None:
    q = arithmetic.quantize(np.array([-1e9, 1e9]), Quantization(scale=0.5, zero_point=7))
    assert q.tolist() == [-128, 127]


@pytest.mark.parametrize(
    ("profile", "weight", "expected"),
    [
        # Opposite signs cannot overflow; one of two alike gives way, or both do.
        ("full", [[1.0, 1.0], [-2.0, 2.0]], [[127, 127], [-127, 127]]),
        ("avx2", [[1.0, 1.0], [-2.0, 2.0]], [[64, 64], [-127, 127]]),
        # Nothing to pair up with: each keeps to half.
        ("avx2", [[1.0, -0.5, 0.25], [-2.0, 2.0, 0.0]], [[64, -32, 16], [-64, 64, 0]]),
        ("avx2", [[1.0], [-2.0]], [[64], [-64]]),
    ],
)
def test_headroom_is_that_of_the_contract(
    profile: Profile, weight: list[list[float]], expected: list[list[int]]
) -> None:
    of = np.array(weight, np.float32)
    scales = arithmetic.weight_scales(of, np.zeros(2, np.float32), 0.1, grid(of, profile))
    assert arithmetic.quantize_weight(of, scales, grid(of, profile)).tolist() == expected


def test_a_pair_gives_way_to_the_nearest_one_that_fits() -> None:
    every = np.arange(-127, 128)
    first, second = np.meshgrid(every, every, indexing="ij")
    fits = (first * second <= 0) | (abs(first) + abs(second) <= arithmetic.PAIR_LIMIT)
    pairs = np.stack([first[fits], second[fits]], axis=1)
    # Quarters: halves, which round to even, among them.
    drawn = np.random.default_rng(0).integers(-508, 509, (500, 2)) / 4
    # Both of these halves come out a last bit too large, and would round up.
    drawn[0] = 119.34694646762286, 24.34694646762286
    q = arithmetic.quantize_weight(drawn, np.ones(len(drawn), np.float32), grid(drawn, "avx2"))
    for weight, chosen in zip(drawn, q.astype(float), strict=True):
        least = ((pairs - weight) ** 2).sum(axis=1).min()
        assert (pairs == chosen).all(axis=1).any()
        assert ((chosen - weight) ** 2).sum() == pytest.approx(least, rel=1e-12)


@pytest.mark.parametrize("shape", [(6, 8), (4, 6, 2, 2)])
def test_pairs_keep_their_headroom_however_a_weight_lies_in_memory(shape: tuple[int, ...]) -> None:
    of = np.full(shape, 124.0)
    scales = np.ones(shape[0], np.float32)
    q = arithmetic.quantize_weight(np.asfortranarray(of), scales, grid(of, "avx2"))
    assert q.tolist() == arithmetic.quantize_weight(of, scales, grid(of, "avx2")).tolist()
    assert set(q.ravel().tolist()) == {64}


def test_a_depthwise_layer_needs_no_headroom() -> None:
    weight = np.array([[[1.0, 1.0]], [[-2.0, -2.0]]], np.float32)
    bias = np.zeros(2, np.float32)
    of = arithmetic.weight_grid(weight.shape, "avx2", depthwise=True)
    scales = arithmetic.weight_scales(weight, bias, 0.1, of)
    q = arithmetic.quantize_weight(weight, scales, of)
    assert q.tolist() == [[[127, 127]], [[-127, -127]]]


@given(
    weight=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.sampled_from([2, 4, 8]), st.integers(1, 3)),
        elements=st.floats(-1, 1, width=32),
    )
)
@FAST
def test_no_pair_overflows_and_less_is_lost_than_with_seven_bits(
    weight: NDArray[np.float32],
) -> None:
    scales = arithmetic.weight_scales(
        weight, np.zeros(len(weight), np.float32), 1.0, grid(weight, "avx2")
    )
    q = arithmetic.quantize_weight(weight, scales, grid(weight, "avx2")).astype(int)
    pairs = q.reshape(len(q), -1, 2, weight.shape[2])
    worst = 255 * np.where(pairs > 0, pairs, 0).sum(axis=2), 255 * np.minimum(pairs, 0).sum(axis=2)
    assert worst[0].max() <= 32767
    assert worst[1].min() >= -32768

    def lost(q: NDArray[Any], scales: NDArray[np.float32]) -> NDArray[np.float64]:
        error = q * arithmetic.along_rows(scales, q.ndim).astype(float) - weight
        each: NDArray[np.float64] = (error.reshape(len(q), -1) ** 2).sum(axis=1)
        return each

    largest = np.abs(weight).reshape(len(weight), -1).max(axis=1).astype(float)
    # A scale below 2**-62 counts as zero: such a row is 0 in either form.
    seven = np.where(largest / 127 < 2**-62, 1, largest / 64).astype(np.float32)
    seven_bits = np.rint(weight / arithmetic.along_rows(seven, 3))
    # Scales are float32: that rounds every weight a little.
    slack = weight[0].size * (largest * 2.0**-23) ** 2
    assert (lost(q, scales) <= lost(seven_bits, seven) * (1 + 1e-5) + slack).all()


@given(weight=weights, magnitude=finite32, input_scale=input_scales, profile=profiles)
@FAST
def test_weights_keep_to_their_profile(
    weight: NDArray[np.float32], magnitude: float, input_scale: float, profile: Profile
) -> None:
    bias = _bias_for(weight, magnitude)
    scales = arithmetic.weight_scales(weight, bias, input_scale, grid(weight, profile))
    q = arithmetic.quantize_weight(weight, scales, grid(weight, profile))
    assert q.dtype == np.int8
    assert q.shape == weight.shape
    of = grid(weight, profile)
    assert of.limit == (64 if profile == "avx2" and weight.shape[1] % 2 else 127)
    assert np.abs(q.astype(int)).max() <= of.limit
    error = np.abs(arithmetic.dequantize_weight(q, scales).astype(float) - weight)
    steps = error / arithmetic.along_rows(scales, weight.ndim)
    # Weights that count as zero are lost whole; all others by half a step, where no pair gives way.
    if not of.pairs:
        assert steps.max() <= 0.5 + 1e-4


@given(weight=weights, magnitude=finite32, input_scale=input_scales, profile=profiles)
@FAST
def test_biases_stay_within_two_to_the_thirty(
    weight: NDArray[np.float32], magnitude: float, input_scale: float, profile: Profile
) -> None:
    bias = _bias_for(weight, magnitude)
    scales = arithmetic.weight_scales(weight, bias, input_scale, grid(weight, profile))
    q = arithmetic.quantize_bias(bias, input_scale, scales)
    # Two roundings to float32: 2**30 * 2 * 2**-24.
    assert np.abs(q.astype(np.int64)).max() <= 2**30 + 2**8
    back = q * arithmetic.bias_scales(input_scale, scales).astype(float)
    step = np.float64(input_scale) * scales
    assert (np.abs(back - bias) <= step * 0.51).all()


@given(magnitude=finite32, input_scale=input_scales, profile=profiles)
@FAST
def test_a_row_of_zeros_is_exact_and_keeps_its_bias(
    magnitude: float, input_scale: float, profile: Profile
) -> None:
    weight, bias = np.zeros((2, 3), np.float32), np.array([magnitude, 0.0], np.float32)
    scales = arithmetic.weight_scales(weight, bias, input_scale, grid(weight, profile))
    assert scales[1] == 1.0
    assert (scales > 0).all()
    q = arithmetic.quantize_weight(weight, scales, grid(weight, profile))
    assert not arithmetic.dequantize_weight(q, scales).any()
    back = arithmetic.quantize_bias(bias, input_scale, scales) * arithmetic.bias_scales(
        input_scale, scales
    ).astype(float)
    if scales[0] != 1.0:
        assert math.isclose(back[0], magnitude, rel_tol=1e-6)
    assert back[1] == 0.0


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_of_zeros_keeps_scale_one_where_scales_are_searched(bits: int) -> None:
    weight = np.array([[0.0, 0.0], [1.0, 0.3]], np.float32)
    of = arithmetic.weight_grid(weight.shape, "full", depthwise=False, bits=bits)
    scales = arithmetic.weight_scales(weight, np.zeros(2), 1.0, of, np.ones((1, 2)))
    assert scales[0] == 1.0


def test_a_large_bias_raises_its_own_scale_only() -> None:
    weight = np.full((2, 4), 1e-6, np.float32)
    bias = np.array([1000.0, 0.0], np.float32)
    scales = arithmetic.weight_scales(weight, bias, 1e-3, grid(weight, "full"))
    assert scales[0] == pytest.approx(1000 / (1e-3 * 2**30))
    assert scales[1] == pytest.approx(1e-6 / 127)


@given(
    factor=st.floats(LEAST_DIVISOR, 10_000),
    input_scale=st.floats(2.0**-20, 1e3, width=32),
    output_scale=st.floats(2.0**-20, 1e3, width=32),
    steps=st.lists(st.integers(-128, 127), min_size=1, max_size=20),
    beside=st.sampled_from([-1, 0, 1]),
)
@FAST
def test_a_tie_free_scale_is_rounded_alike_by_every_kernel(
    factor: float, input_scale: float, output_scale: float, steps: list[int], beside: int
) -> None:
    before = np.array([output_scale / (input_scale * factor)])
    after = arithmetic.tie_free(before, input_scale, np.array([output_scale]))
    n = output_scale / (input_scale * after[0])
    whole = round(n)
    assert whole % 2 == 1
    assert n == pytest.approx(whole, rel=1e-12)
    assert 1 - 1e-12 <= after[0] / before[0] <= 1 + 2 / (LEAST_DIVISOR - 2) + 1e-12
    # The sums nearest to halfway between two integers: n is odd, so these are the worst.
    sums = np.array(steps) * whole + whole // 2 + beside
    exact = np.rint(sums / whole)
    x, w, y = np.float32(input_scale), np.float32(after[0]), np.float32(output_scale)
    as_floats = np.rint(sums.astype(np.float32) * (x * w / y))
    multiplier = np.rint(float(x) * float(w) / float(y) * 2.0**46)
    in_fixed_point = np.floor(sums * multiplier / 2.0**46 + 0.5)
    assert (as_floats == exact).all()
    assert (in_fixed_point == exact).all()


def test_a_scale_of_few_steps_is_left_and_so_is_one_before_floats() -> None:
    scales, output = np.array([1.0, 1.0]), np.array([LEAST_DIVISOR - 0.5, LEAST_DIVISOR + 0.5])
    assert arithmetic.tie_free(scales, 1.0, output)[0] == 1.0
    assert arithmetic.tie_free(scales, 1.0, output)[1] == output[1] / LEAST_DIVISOR
    assert arithmetic.tie_free(scales, 1.0, None) is scales


def test_scales_are_per_output_channel() -> None:
    weight = np.array([[1.0, -1.0], [1e-3, 5e-4]], np.float32)
    scales = arithmetic.weight_scales(weight, np.zeros(2, np.float32), 1.0, grid(weight, "full"))
    assert scales.dtype == np.float32
    assert scales.tolist() == pytest.approx([1 / 127, 1e-3 / 127])
