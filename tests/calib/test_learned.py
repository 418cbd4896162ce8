"""What is learnt keeps to the contract."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from calib.learned import (
    GridKind,
    LearnedGrid,
    LearnedLayer,
    LearnedSite,
    StartingLayer,
    tie_free,
    within_pairs,
)
from pipeline import arithmetic
from pipeline.arithmetic import LEAST_DIVISOR, weight_grid
from pipeline.records import Quantization


@given(st.integers(0, 2**32 - 1), st.floats(10, 200))
def test_pairs_round_as_the_contract_says(seed: int, width: float) -> None:
    x = np.random.default_rng(seed).normal(0, width, (3, 8, 2, 2))
    grid = weight_grid(x.shape, "avx2", depthwise=False)
    assert grid.pairs
    wanted = arithmetic.round_weights(x, grid)
    assert (within_pairs(torch.from_numpy(x)).numpy() == wanted).all()


@given(st.integers(0, 2**32 - 1))
def test_no_requantization_can_tie(seed: int) -> None:
    generator = np.random.default_rng(seed)
    scales = torch.from_numpy(generator.uniform(1e-4, 1e-2, 50))
    read = torch.tensor(generator.uniform(0.01, 1), dtype=torch.float64)
    written = torch.from_numpy(generator.uniform(1e-3, 1, 50))
    moved = tie_free(scales, read, written)
    n = (written / (read * moved)).numpy()
    large = (written / (read * scales)).numpy() > LEAST_DIVISOR
    assert (abs(n[large] - np.rint(n[large])) < 1e-6).all()
    assert (np.rint(n[large]) % 2 == 1).all()
    assert (moved.numpy()[~large] == scales.numpy()[~large]).all()
    # To the nearest: never further than one step of n.
    assert (abs(n[large] - (written / (read * scales)).numpy()[large]) <= 1 + 1e-6).all()


def test_what_the_calibration_made_tie_free_stays_as_it_is() -> None:
    scales = np.random.default_rng(0).uniform(1e-4, 1e-2, 200)
    written = np.full(200, 0.3)
    exact = arithmetic.tie_free(scales, 0.11, written).astype(np.float32)
    moved = tie_free(torch.from_numpy(exact), torch.tensor(0.11), torch.from_numpy(written))
    assert moved.numpy() == pytest.approx(exact, rel=2e-7)


def site(step: float = 0.1, *, per_channel: bool, short: bool = True) -> LearnedSite:
    grid = LearnedGrid(
        Quantization(scale=step, zero_point=-5),
        torch.tensor([1.0, 2.0, 3.0]) if per_channel else None,
        torch.tensor([0.5, 0.0, -0.5]) if per_channel else None,
        GridKind(bits=8, short=short, has_zero=not per_channel),
    )
    return LearnedSite(grid, None, read=True)


def test_learned_steps_keep_twelve_bits() -> None:
    made = site(per_channel=True)
    with torch.no_grad():
        made.grid.factor.mul_(1.2345678)
    for value in made.grid.step().tolist():
        mantissa = np.frexp(value)[0]
        assert mantissa * 2**12 == round(mantissa * 2**12)
    assert site(per_channel=False, short=False).grid.step() == np.float32(0.1)


def test_a_learned_zero_point_is_whole_and_in_range() -> None:
    grid = site(per_channel=False).grid
    assert float(grid.zero_point().detach()) == -5
    for turned, wanted in ((8.4 / 255, 3), (-1.0, -128), (1.0, 127)):
        with torch.no_grad():
            grid.turned.fill_(turned)
            assert float(grid.zero_point()) == wanted


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_layer_norm_s_site_learns_as_lsq_says(kind: str) -> None:
    """Its step and shift are its reader's too: together the gradients are those of t q + z."""
    made = site(0.125, per_channel=True)  # it has twelve bits
    module = nn.Linear(3, 2) if kind == "linear" else nn.Conv2d(3, 2, 1)
    weight = torch.tensor([[3, -2, 5], [-7, 4, 1]], dtype=torch.int8)
    weight = weight.reshape(module.weight.shape)
    scales = torch.tensor([0.01, 0.02])
    grid = weight_grid(tuple(weight.shape), "full", depthwise=False)
    start = StartingLayer(weight=weight, scales=scales, bias=torch.zeros(2), grid=grid)
    layer = LearnedLayer(module, start, made, None)
    generator = torch.Generator().manual_seed(0)
    # Some values of the first channel are clipped.
    x = 12 * torch.randn(2, 3, 4, 4, generator=generator)
    grad = torch.randn(2, 2, 4, 4, generator=generator)
    torch.autograd.backward(layer(made(x)), grad)

    t, z = made.grid.unit, made.grid.origin
    assert z is not None
    u = (x - z.reshape(3, 1, 1)) / t.reshape(3, 1, 1)
    low, high = -128 + 5, 127 + 5
    clipped = (u < low) | (u > high)
    assert 0 < clipped.float().mean() < 0.5
    q = u.round().clamp(low, high)
    # In the network's units: what the columns were before the step went into them.
    columns = (weight.reshape(2, 3) * scales[:, None] / t).T
    read = torch.einsum("cr,nrhw->nchw", columns, grad)
    of_step = (read * torch.where(clipped, q, q - u)).sum(dim=(0, 2, 3))
    of_shift = (read * clipped).sum(dim=(0, 2, 3))
    assert made.grid.factor.grad is not None
    assert made.grid.moved is not None
    assert made.grid.moved.grad is not None
    # A step serves 16 values of each image.
    wanted = t * of_step * (16 * 127) ** -0.5
    torch.testing.assert_close(made.grid.factor.grad, wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(made.grid.moved.grad, 255 * t * of_shift, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "conv", "depthwise"])
def test_a_layer_computes_with_its_integers(kind: str) -> None:
    module: nn.Linear | nn.Conv2d = nn.Linear(3, 4)
    if kind != "linear":
        groups = 3 if kind == "depthwise" else 1
        module = nn.Conv2d(3, 3 if groups == 3 else 4, 3, padding=1, stride=1, groups=groups)
    generator = torch.Generator().manual_seed(0)
    shape = module.weight.shape
    weight = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    scales = torch.rand(shape[0], generator=generator) / 100
    reads = site(per_channel=False)
    grid = weight_grid(tuple(shape), "full", depthwise=kind == "depthwise")
    bias = 1000 * torch.arange(1, shape[0] + 1) * scales * reads.grid.step().detach()
    start = StartingLayer(weight=weight, scales=scales, bias=bias, grid=grid)
    layer = LearnedLayer(module, start, reads, None)
    values, offsets = layer.values()
    torch.testing.assert_close(
        values, weight.float() * scales.reshape(-1, *[1] * (weight.ndim - 1))
    )
    torch.testing.assert_close(offsets, bias)
    with torch.no_grad():
        layer.weight.add_(3.3 * torch.randn(shape, generator=generator))
        layer.factor.mul_(1.01)
        layer.bias.add_(0.0123)
        values, offsets = layer.values()
        whole = layer.integers(layer.scales())
        step = layer.scales().reshape(-1, *[1] * (weight.ndim - 1))
        steps = offsets / (layer.scales() * reads.grid.step())
    torch.testing.assert_close(values, whole * step)
    assert (whole == whole.round()).all()
    assert whole.abs().max() <= 127
    torch.testing.assert_close(steps, steps.round(), rtol=1e-6, atol=1e-3)
    with torch.no_grad():
        module.weight.copy_(values)
        assert module.bias is not None
        module.bias.copy_(offsets)
        x = torch.randn(2, 3, 5, 5, generator=generator)
        wanted = module(x) if kind != "linear" else module(x.movedim(1, -1)).movedim(-1, 1)
        torch.testing.assert_close(layer(x), wanted)
