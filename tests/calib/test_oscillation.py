"""Weights that swing are counted as the paper counts, frozen where they mostly were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from calib.learned import LearnedLayer, StartingLayer
from calib.oscillation import MOMENTUM, THRESHOLDS, Oscillation, dampening, frozen_from
from pipeline.arithmetic import weight_grid


@pytest.fixture
def layer() -> LearnedLayer:
    weight = torch.tensor([[1, 2, 3]], dtype=torch.int8)
    start = StartingLayer(
        weight=weight,
        scales=torch.tensor([0.1]),
        bias=torch.zeros(1),
        grid=weight_grid((1, 3), "full", depthwise=False, bits=4),
    )
    return LearnedLayer(nn.Linear(3, 1), start, None, None)


def move(layer: LearnedLayer, *steps: float) -> None:
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([steps]))


def test_only_a_turn_counts(layer: LearnedLayer) -> None:
    watch = Oscillation({"layer": layer})
    history = watch.histories[0]
    # The first weight goes up and down, the second up twice, the third stays.
    for first, second in ((2, 3), (1, 4), (2, 4), (2, 4)):
        move(layer, first, second, 3)
        watch.observe()
    # Up is no turn, down is one, up again another, staying none.
    wanted = 0.0
    for turned in (0, 1, 1, 0):
        wanted = MOMENTUM * turned + (1 - MOMENTUM) * wanted
    assert history.frequency[0].tolist() == pytest.approx([wanted, 0, 0], rel=1e-5)
    assert watch.share() == pytest.approx(1 / 3)
    assert watch.frozen_share() == 0


def test_a_weight_that_turns_often_stays_where_it_mostly_was(layer: LearnedLayer) -> None:
    watch = Oscillation({"layer": layer})
    for index in range(60):
        # Two of three times at 2.
        move(layer, 1.0 if index % 3 == 0 else 2.0, 2.0, 3.0)
        watch.observe(frozen_from=0.1)
    assert watch.frozen_share() == pytest.approx(1 / 3)
    move(layer, -7.0, 2.0, -7.0)
    watch.observe(frozen_from=0.1)
    held = layer.integers(layer.scales())[0].tolist()
    assert held == [round(float(watch.histories[0].mean[0, 0])), 2.0, -7.0]
    assert held[0] in {1.0, 2.0}


def test_a_frozen_integer_outlives_a_change_of_scale(layer: LearnedLayer) -> None:
    watch = Oscillation({"layer": layer})
    watch.histories[0].frozen[0, 1] = True
    watch.histories[0].mean[0, 1] = 2.0
    with torch.no_grad():
        layer.factor.mul_(1.7)
    watch.observe()
    assert layer.integers(layer.scales())[0, 1] == 2


def test_its_state_is_saved(layer: LearnedLayer) -> None:
    watch, other = Oscillation({"layer": layer}), Oscillation({"layer": layer})
    for value in (2, 1, 2, 1):
        move(layer, value, 2, 3)
        watch.observe()
    other.load_state_dict(watch.state_dict())
    assert other.share() == watch.share() > 0
    assert (other.histories[0].last == watch.histories[0].last).all()


def test_dampening_draws_to_the_middle_of_a_cell(layer: LearnedLayer) -> None:
    move(layer, 1.25, 2.0, 9.0)  # the last is clipped: nothing draws it
    penalty = dampening({"layer": layer})
    assert float(penalty.detach()) == pytest.approx(0.25**2)
    torch.autograd.backward(penalty)
    grad = layer.weight.grad
    assert grad is not None
    assert grad[0].tolist() == pytest.approx([2 * 0.25, 0, 0])


def test_the_threshold_falls_on_a_cosine() -> None:
    assert frozen_from(0) == pytest.approx(THRESHOLDS[0])
    assert frozen_from(1) == pytest.approx(THRESHOLDS[1])
    assert frozen_from(0.5) == pytest.approx(sum(THRESHOLDS) / 2)
