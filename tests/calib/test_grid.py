"""A grid whose arithmetic every runtime computes alike is the grid that was chosen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calib.grid import SIGNIFICANT_BITS, Rescaling, SiteGrid, shortened
from pipeline.records import Quantization

CHANNELS = 8


def grid(*, rescaled: bool) -> SiteGrid:
    by = Rescaling.identity(CHANNELS)
    if rescaled:
        generator = torch.Generator().manual_seed(0)
        scale = torch.randn(CHANNELS, generator=generator).exp()
        by = Rescaling(shift=torch.randn(CHANNELS, generator=generator), scale=scale, strength=1.0)
    return SiteGrid(parameters=Quantization(scale=0.0371, zero_point=-17), rescaling=by)


@pytest.mark.parametrize("rescaled", [True, False])
def test_counting_in_steps_hardly_moves_the_grid(*, rescaled: bool) -> None:
    chosen = grid(rescaled=rescaled)
    counted = chosen.in_steps()
    assert (counted.parameters.scale == 1) == rescaled
    assert counted.parameters.zero_point == chosen.parameters.zero_point
    assert bool((counted.rescaling.shift == chosen.rescaling.shift).all())
    before = chosen.rescaling.scale * chosen.parameters.scale
    after = counted.rescaling.scale * counted.parameters.scale
    assert float((after / before - 1).abs().max()) <= 2.0**-SIGNIFICANT_BITS
    # Values in the middle of a step, where a grid that moved by a hundredth of it says the same.
    q = torch.arange(-60.0, 60.0).reshape(-1, 1, 1, 1).expand(-1, CHANNELS, 1, 1)
    x = chosen.rescaling.undo(q * chosen.parameters.scale)
    step = float(chosen.rescaling.scale.max() * chosen.parameters.scale)
    assert float((counted(x) - chosen(x)).abs().max()) < 0.02 * step


def test_an_integer_times_a_short_step_is_exact() -> None:
    steps = shortened(torch.rand(500, generator=torch.Generator().manual_seed(0)) * 3 + 1e-3)
    q = np.arange(-255, 256)
    product = q[:, None] * steps.double().numpy()
    assert (product.astype(np.float32) == product).all()
    # As OpenVINO does it: uint8 times the step, and the lower end added.
    sums = (q[q >= 0][:, None] * steps.double().numpy()) + (-145 * steps.double().numpy())
    assert (sums.astype(np.float32) == sums).all()
