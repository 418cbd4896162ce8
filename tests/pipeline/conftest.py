"""A small quantized network, for what is done with one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from calib.collect import collect
from pipeline.convnext import seeded
from pipeline.fold import fold
from pipeline.quantize import Given, quantize
from pipeline.records import Architecture, Calibration, Preprocessing, QuantizedModel, Wanted

PLAIN = Calibration(method="min-max", rounding="nearest", rescale=False, correct_bias=False)


@pytest.fixture(scope="session")
def pixels() -> NDArray[np.float32]:
    """Blurred noise: float32 (16, 3, 32, 32) in [0, 255]."""
    coarse = 255 * torch.rand(16, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    fine = torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic")
    return fine.clamp(0, 255).numpy()


def _quantized(
    pixels: NDArray[np.float32], wanted: Wanted
) -> tuple[QuantizedModel, dict[str, Any]]:
    how = Preprocessing(input_size=32)
    shape = Architecture(depths=(1, 1), dims=(8, 16), classes=6, layer_scale=False)
    folded = fold(seeded(shape, 0), how)
    given = Given(folded=folded, statistics=collect(folded, [pixels]), sample=pixels)
    return quantize(given, how, wanted, labels=None, parents={})


@pytest.fixture(scope="session")
def small_model(pixels: NDArray[np.float32]) -> tuple[QuantizedModel, dict[str, Any]]:
    """Two stages of a block each, six classes, every layer in integers."""
    return _quantized(pixels, Wanted(calibration=PLAIN))


@pytest.fixture(scope="session")
def few_bits_model(pixels: NDArray[np.float32]) -> tuple[QuantizedModel, dict[str, Any]]:
    """The same with 4-bit weights in the pointwise layers."""
    return _quantized(pixels, Wanted(scheme="w4a8", calibration=PLAIN))
