"""Moving a rescaling into the layers around a site is exact: proven in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from calib.grid import Rescaling, apply
from calib.layer import rounded, unrounded
from pipeline.arithmetic import weight_grid
from pipeline.convnext import Pointwise, seeded
from pipeline.fold import fold
from pipeline.records import Architecture, Preprocessing, Rounding

CHANNELS = 12
ROUNDINGS: tuple[Rounding, ...] = ("gptq", "nearest")


def seeded_layers() -> dict[str, nn.Conv2d | nn.Linear]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            "pointwise": Pointwise(CHANNELS, 20),
            "downsample": nn.Conv2d(CHANNELS, 20, 2, stride=2),
            "depthwise": nn.Conv2d(CHANNELS, CHANNELS, 7, padding=3, groups=CHANNELS),
        }


LAYERS = seeded_layers()


def rescaling(*, shifted: bool, size: float = 3.0) -> Rescaling:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(CHANNELS, generator=generator, dtype=torch.float64)
    shift = torch.randn(CHANNELS, generator=generator, dtype=torch.float64) if shifted else None
    return Rescaling(
        shift=torch.zeros(CHANNELS, dtype=torch.float64) if shift is None else shift,
        scale=(size * spread).exp(),
        strength=1.0,
    )


def inputs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, CHANNELS, 8, 8, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_what_reads_a_rescaled_site_computes_the_same(name: str) -> None:
    module = copy.deepcopy(LAYERS[name]).double()
    by, x = rescaling(shifted=name != "depthwise"), inputs()
    moved = unrounded(module, by, None)
    with torch.no_grad():
        weight, bias = torch.from_numpy(moved.weight), torch.from_numpy(moved.bias)
        y, expected = apply(module, by.apply(x), weight, bias), module(x)
    assert float((y - expected).abs().max() / expected.abs().max()) < 1e-12


def test_a_layernorm_with_an_affine_writes_the_rescaled_site() -> None:
    by, x = rescaling(shifted=True), inputs().movedim(1, -1)
    plain = functional.layer_norm(x, (CHANNELS,), eps=1e-6)
    y = functional.layer_norm(x, (CHANNELS,), 1 / by.scale, -by.shift / by.scale, 1e-6)
    expected = by.apply(plain.movedim(-1, 1)).movedim(1, -1)
    assert float((y - expected).abs().max() / expected.abs().max()) < 1e-12


def test_a_residual_stream_can_be_scaled_from_end_to_end() -> None:
    net = Architecture(depths=(3,), dims=(CHANNELS,), classes=2)
    stage = fold(seeded(net, 0), Preprocessing(input_size=32)).stages[0].double()
    scale, x = rescaling(shifted=False).scale, inputs()
    with torch.no_grad():
        expected = stage(x)
        tensors = stage.state_dict()
        for name, tensor in tensors.items():
            if name.endswith("depthwise.weight"):
                tensor.mul_(scale.reshape(-1, 1, 1, 1))
            elif ".pw2." in name:
                tensor.div_(scale.reshape(-1, *[1] * (tensor.ndim - 1)))
        y = stage(x / scale[:, None, None]) * scale[:, None, None]
    assert float((y - expected).abs().max() / expected.abs().max()) < 1e-12


@pytest.mark.parametrize("name", LAYERS)
def test_an_integer_layer_is_its_float_layer_but_for_rounding(name: str) -> None:
    module, by = LAYERS[name], rescaling(shifted=name != "depthwise", size=0.5)
    by = Rescaling(shift=by.shift.float(), scale=by.scale.float(), strength=1.0)
    x = inputs().float()
    shape = tuple(module.weight.shape)
    grid = weight_grid(shape, "full", depthwise=name == "depthwise")
    with torch.no_grad():
        layer = rounded(unrounded(module, by, 0.01), grid, "nearest", x, x)
        expected = module(x)
        y = layer(x)
    assert layer.weight.dtype == np.int8
    assert layer.bias.dtype == np.int32
    # At most half a step for every weight that an output reads, and half one of its bias.
    steps = torch.from_numpy(layer.scales)
    read = by.apply(x).abs()
    ones = torch.ones_like(module.weight)
    across = (1, -1, *[1] * (y.ndim - 2))
    most = (apply(module, read, ones, torch.zeros(len(ones))) + 0.01) / 2 * steps.reshape(across)
    assert (y - expected).abs().le(most + 1e-5).all()
    assert float((y - expected).square().mean().sqrt() / most.mean()) < 0.5  # they do not add up


def test_a_layer_that_sees_fewer_positions_than_inputs_is_rounded_to_nearest() -> None:
    module = LAYERS["pointwise"]
    grid = weight_grid(tuple(module.weight.shape), "full", depthwise=False)
    of = unrounded(module, Rescaling.identity(CHANNELS), 0.01)
    found = []
    for positions in (CHANNELS - 1, 40 * CHANNELS):
        x = torch.randn(positions, CHANNELS, generator=torch.Generator().manual_seed(0))
        x += x[:, :1]  # correlated, or GPTQ is rounding to nearest
        gptq, nearest = (rounded(of, grid, how, x, x).weight for how in ROUNDINGS)
        found.append(bool((gptq == nearest).all()))
    assert found == [True, False]


def test_a_bias_correction_moves_the_bias_by_the_mean_error() -> None:
    module = LAYERS["pointwise"]
    nothing = Rescaling.identity(CHANNELS)
    grid = weight_grid(tuple(module.weight.shape), "full", depthwise=False)
    with torch.no_grad():
        layer = rounded(unrounded(module, nothing, 0.01), grid, "nearest")
        x = inputs().float()
        y = layer(x)
        moved, said = layer.corrected(y + 0.5, y)
        step = float((moved(x) - y - 0.5).abs().max())
    # Before and after, the bias is rounded to half a step.
    assert step < 1.01 * 0.01 * float(layer.scales.max())
    torch.testing.assert_close(said, moved(x))
