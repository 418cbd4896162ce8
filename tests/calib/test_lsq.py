"""LSQ's gradients are the paper's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calib.learned import within_pairs
from calib.lsq import lsq, replaced, slowed

ENDS = (-8, 7)


def learnable(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0]).requires_grad_()


def test_the_step_s_gradient_is_equation_3_of_the_paper() -> None:
    # Inside: round(u) - u. Below: -Q_N. Above: Q_P.
    # 3.65 / 0.5 = 7.3 is above Q_P = 7, though it rounds to it: clipped.
    x = torch.tensor([0.26, 1.3, -0.9, 3.65, -40.0])
    step = learnable(0.5)
    y = lsq(x, step, ENDS)
    assert y.tolist() == [0.5, 1.5, -1.0, 3.5, -4.0]
    weights = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])
    torch.autograd.backward((y * weights).sum())
    wanted = 1 * (1 - 0.52) + 10 * (3 - 2.6) + 100 * (-2 + 1.8) + 1000 * 7 + 10000 * -8
    assert step.grad == pytest.approx(wanted, rel=1e-5)


def test_values_pass_gradients_on_inside_only() -> None:
    x = learnable(0.26, 3.49, 3.51, -3.99, -4.01)
    torch.autograd.backward(lsq(x, torch.tensor(0.5), ENDS).sum())
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 0.0, 1.0, 0.0]


def test_the_offset_s_gradient_is_lsq_plus_s() -> None:
    # x^ = s clip(round((x - b) / s)) + b: 0 inside, 1 where it is clipped.
    x = torch.tensor([0.26, 40.0, -40.0])
    shift = learnable(0.3, 0.3, 0.3)
    y = lsq(x, torch.tensor(0.5), ENDS, shift=shift)
    torch.autograd.backward(y.sum())
    assert y.tolist() == pytest.approx([0.3, 3.8, -3.7])
    assert shift.grad is not None
    assert shift.grad.tolist() == [0.0, 1.0, 1.0]


def test_a_zero_point_moves_what_is_clipped() -> None:
    x = torch.tensor([0.26, 40.0, -40.0])
    zero = learnable(-3.0)
    y = lsq(x, torch.tensor(0.5), ENDS, zero=zero)
    assert y.tolist() == [0.5, 0.5 * 10, 0.5 * -5]
    torch.autograd.backward((y * torch.tensor([1.0, 10.0, 100.0])).sum())
    assert zero.grad == pytest.approx(-0.5 * 110)


def test_counting_in_steps_has_the_gradients_of_an_affine() -> None:
    """Of y = clip(round((x - z) / t)): rounding passes on, so dy = (dx - dz - u dt) / t."""
    x, shift = learnable(0.9, 40.0), learnable(0.1, 0.1)
    step = learnable(0.5, 0.5)
    y = lsq(x, step, ENDS, shift=shift, counts=True)
    assert y.tolist() == [2.0, 7.0]
    torch.autograd.backward(y.sum())
    assert x.grad is not None
    assert shift.grad is not None
    assert step.grad is not None
    assert x.grad.tolist() == [2.0, 0.0]
    assert shift.grad.tolist() == [-2.0, 0.0]
    assert step.grad.tolist() == pytest.approx([-1.6 / 0.5, 0.0])


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("shape", [(), (1, 3, 1, 1)])
def test_gradients_of_any_shape_sum_those_of_single_values(
    shape: tuple[int, ...], *, counts: bool
) -> None:
    """Channels-last or not, with a step for all or one per channel."""
    generator = torch.Generator().manual_seed(0)
    x = 8 * torch.randn(2, 3, 4, 5, generator=generator)
    grad = torch.randn(2, 3, 4, 5, generator=generator)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        step = torch.full(shape, 0.7).requires_grad_()
        y = lsq(x.contiguous(memory_format=layout), step, ENDS, counts=counts)
        torch.autograd.backward(y, grad.contiguous(memory_format=layout))
        assert step.grad is not None
        found.append(step.grad)
    single = torch.full(x.shape, 0.7).requires_grad_()
    torch.autograd.backward(lsq(x, single, ENDS, counts=counts), grad)
    assert single.grad is not None
    axes = (0, 1, 2, 3) if not shape else (0, 2, 3)
    wanted = single.grad.sum(dim=axes).reshape(shape)
    for one in found:
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-4)


def test_steps_learn_slower_the_more_they_serve() -> None:
    step = learnable(2.0)
    torch.autograd.backward(slowed(step, count=25, positive=4))
    assert step.grad == pytest.approx(1 / 10)


def test_a_replaced_value_is_exact_and_passes_its_gradient_on() -> None:
    x = learnable(0.1)
    y = replaced(x, torch.tensor(1e8))
    torch.autograd.backward(y)
    assert (float(y.detach()), float(x.grad if x.grad is not None else 0)) == (1e8, 1.0)


def test_what_gives_way_to_headroom_passes_gradients_on() -> None:
    x = learnable(100.0, 90.0, 140.0, -3.0).reshape(1, 4).detach().requires_grad_()
    y = lsq(x, torch.tensor(1.0), (-127, 127), rounder=within_pairs)
    assert y.tolist() == [[69.0, 59.0, 127.0, -3.0]]
    torch.autograd.backward(y.sum())
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 1.0, 0.0, 1.0]]
