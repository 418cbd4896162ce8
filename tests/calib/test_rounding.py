"""Rounding is judged by the output of the layer, on what it reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from calib import rounding
from pipeline.arithmetic import PAIR_LIMIT, WeightGrid, quantize_weight, weight_grid, weight_scales

OUT, IN, POSITIONS = 24, 32, 4096


def inputs() -> torch.Tensor:
    """Correlated inputs of unequal sizes: what makes one rounding better than another."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(IN, IN, generator=generator) / IN**0.5
    sizes = torch.logspace(-1, 1, IN)
    x: torch.Tensor = torch.randn(POSITIONS, IN, generator=generator) @ mixing * sizes
    return x


def weights() -> NDArray[np.float64]:
    return np.random.default_rng(1).normal(size=(OUT, IN))


def lost(q: NDArray[np.int8], scales: NDArray[np.float32], x: torch.Tensor) -> float:
    error = q * scales[:, None].astype(float) - weights()
    return float(np.square(x.double().numpy() @ error.T).mean())


def rounded_by(method: str, grid: WeightGrid) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    x, weight = inputs(), weights()
    scales = weight_scales(weight, np.zeros(OUT), 1.0, grid, x.square().mean(dim=0).numpy()[None])
    if method == "gptq":
        return rounding.gptq(weight, scales, rounding.second_moment(x), grid), scales
    if method == "adaround":
        return rounding.adaround(weight, scales, x, grid), scales
    return quantize_weight(weight, scales, grid), scales


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("method", "most"), [("gptq", 0.6), ("adaround", 0.9)])
def test_it_loses_less_than_rounding_to_nearest(method: str, most: float, bits: int) -> None:
    grid = weight_grid((OUT, IN), "full", depthwise=False, bits=bits)
    ours, scales = rounded_by(method, grid)
    nearest, _ = rounded_by("nearest", grid)
    assert lost(ours, scales, inputs()) < most * lost(nearest, scales, inputs())


@pytest.mark.parametrize("method", ["nearest", "gptq", "adaround"])
def test_four_bits_stay_within_seven(method: str) -> None:
    q, _ = rounded_by(method, weight_grid((OUT, IN), "full", depthwise=False, bits=4))
    assert np.abs(q.astype(int)).max() == 7


@pytest.mark.parametrize("wrong", [float("nan"), -1.0])
def test_moments_that_are_none_round_nothing(wrong: float) -> None:
    grid = weight_grid((OUT, IN), "full", depthwise=False)
    moments = wrong * np.eye(IN)
    with pytest.raises(np.linalg.LinAlgError, match="not positive definite"):
        rounding.gptq(weights(), np.ones(OUT, np.float32), moments, grid)


def test_gptq_leaves_headroom_in_every_pair() -> None:
    q, _ = rounded_by("gptq", weight_grid((OUT, IN), "avx2", depthwise=False))
    pairs = q.astype(int).reshape(OUT, -1, 2)
    same = pairs[..., 0] * pairs[..., 1] > 0
    assert same.any()
    assert np.abs(pairs).sum(axis=2)[same].max() <= PAIR_LIMIT
    assert np.abs(pairs).max() > PAIR_LIMIT // 2, "single weights may be larger"


def test_ridge_makes_up_for_what_its_inputs_lose() -> None:
    x, weight = inputs(), weights()
    coarse = (x / 4).round() * 4
    lost_inputs = rounding.second_moment(x - coarse, coarse)
    better = rounding.ridge(weight, lost_inputs, rounding.second_moment(coarse))
    exact = x.double().numpy() @ weight.T

    def error(by: NDArray[np.float64]) -> float:
        return float(np.square(coarse.double().numpy() @ by.T - exact).mean())

    assert error(better) < 0.95 * error(weight)


def test_mean_error_is_per_channel() -> None:
    exact, y = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    y[:, 1] = -2.0
    assert rounding.mean_error(exact, y).tolist() == [0.0, 2.0, 0.0]
