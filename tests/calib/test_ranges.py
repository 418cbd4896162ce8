"""Every kind of range does what its name says."""

from __future__ import annotations

from typing import Literal, get_args

import pytest
import torch

from calib.grid import Rescaling, fake_quantize
from calib.ranges import PERCENTILE, SomeValues, clipped_range
from pipeline.arithmetic import activation_quantization
from pipeline.records import Range, RangeMethod

METHODS = get_args(RangeMethod)


def values(outlier: float) -> torch.Tensor:
    x = torch.randn(2**15, generator=torch.Generator().manual_seed(0))
    x[7] = outlier
    return x


def observed(x: torch.Tensor) -> Range:
    return Range(minimum=float(x.min()), maximum=float(x.max()))


def taken_range(
    x: torch.Tensor, seen: Range, method: RangeMethod, bits: Literal[8, 16] = 8
) -> Range:
    """The range of a tensor of one channel that is not rescaled."""
    some = SomeValues.of(x.reshape(1, 1, -1))
    return clipped_range(some, Rescaling.identity(1), seen, method, bits)


def test_values_are_rescaled_by_their_channels() -> None:
    channels = torch.tensor([1.0, 10.0, 100.0])
    x = channels.reshape(1, 3, 1, 1).expand(4, 3, 200, 200)
    by = Rescaling(shift=channels, scale=channels, strength=1.0)
    some = SomeValues.of(x)
    assert set(some.values.tolist()) == {1.0, 10.0, 100.0}
    assert (some.rescaled(by) == 0).all()
    assert (some.rescaled(Rescaling.identity(3)) == some.values).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_range_stays_within_what_was_observed(method: RangeMethod) -> None:
    x = values(30.0)
    taken = taken_range(x, observed(x), method)
    assert observed(x).minimum <= taken.minimum < 0 < taken.maximum <= observed(x).maximum


def test_min_max_clips_nothing_and_those_that_count_give_up_a_lone_outlier() -> None:
    x = values(1000.0)
    ends = {method: taken_range(x, observed(x), method).maximum for method in METHODS}
    assert ends["min-max"] == 1000.0
    assert ends["percentile"] < 5
    assert ends["entropy"] < 1000


def test_the_percentile_leaves_its_share_outside() -> None:
    x = torch.linspace(-1, 1, 2**15)
    taken = taken_range(x, observed(x), "percentile")
    assert float((x > taken.maximum).float().mean()) == pytest.approx(1 - PERCENTILE, abs=1e-4)
    assert float((x < taken.minimum).float().mean()) == pytest.approx(1 - PERCENTILE, abs=1e-4)


@pytest.mark.parametrize("outlier", [0.0, 8.0, 20.0])
def test_mse_rounds_with_no_more_error_than_min_max(outlier: float) -> None:
    x = values(outlier)

    def error(taken: Range) -> float:
        return float((fake_quantize(x, activation_quantization(taken)) - x).square().sum())

    assert error(taken_range(x, observed(x), "mse")) <= error(observed(x))


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_the_sample_is_not_one_column_of_every_image(method: RangeMethod) -> None:
    x = 2 * torch.rand(64, 32, 16, 16, generator=torch.Generator().manual_seed(0)) - 1
    x[..., 0] /= 100
    x[..., 0, :] /= 100
    order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(1))
    taken, shuffled = (taken_range(t, observed(x), method).maximum for t in (x, x.flatten()[order]))
    assert taken == pytest.approx(shuffled, rel=0.1)


def test_sixteen_bits_need_less_clipping_than_eight() -> None:
    x = values(9.0)
    ends = [taken_range(x, observed(x), method, 16).maximum for method in ("mse", "entropy")]
    assert ends == [9.0, 9.0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("constant", [0.0, 2.5, -2.5])
def test_a_constant_tensor_is_no_trouble(method: RangeMethod, constant: float) -> None:
    x = torch.full((500,), constant)
    taken = taken_range(x, observed(x), method)
    back = fake_quantize(x, activation_quantization(taken))
    assert back == pytest.approx(x, rel=1e-5)
