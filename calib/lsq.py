"""LSQ's fake quantization: the contract's rounding, and the gradients of what is learnt.

In: values, steps, shifts and zero points as torch tensors. Out: what the contract makes of them,
with gradients for each.

Sources: Esser et al., "Learned Step Size Quantization", 2020, equations 1 to 5; Bhalgat et al.,
"LSQ+", 2020, equations 2 to 6 (the offset, which is the zero point times the step).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable


class _Quantize(torch.autograd.Function):
    """clip(round(u)) with the gradients of LSQ.

    Inside the range rounding passes gradients on as if it were not there; outside the value follows
    the zero point alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        shift: Tensor | None,
        zero: Tensor | None,
        ends: tuple[int, int],
        counts: bool,  # noqa: FBT001 - autograd passes positions only
        rounder: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Quantize: steps where `counts`, else the values that they stand for."""
        u = (x / step) if shift is None else (x - shift).div_(step)
        offset = 0.0 if zero is None else float(zero)
        low, high = ends[0] - offset, ends[1] - offset
        y = rounder(u).clamp_(low, high)
        # What the step's gradient is made of: u where it counts, else y, less u where it is inside.
        kept = u if counts else torch.sub(y, inside := _inside(u, u, low, high), out=inside)
        ctx.save_for_backward(kept, u, step)
        ctx.counts, ctx.range = counts, (low, high)
        ctx.shift = None if shift is None else shift.shape
        if counts:
            return y
        found = y * step
        return found if shift is None else found.add_(shift)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, step, shift and zero."""
        (grad,) = grads
        kept, u, step = ctx.saved_tensors
        passed = _inside(grad, u, *ctx.range)
        of_x = passed / step if ctx.counts else passed
        of_step = of_shift = of_zero = None
        if ctx.needs_input_grad[1]:
            of_step = -_dot(of_x, kept, step.shape) if ctx.counts else _dot(grad, kept, step.shape)
        if ctx.shift is not None and ctx.needs_input_grad[2]:
            # As LSQ+'s offset: what is clipped follows it, what is inside does not feel it.
            of_shift = _summed(-of_x if ctx.counts else grad - passed, ctx.shift)
        if ctx.needs_input_grad[3]:
            clipped = (grad.sum() - passed.sum()) if ctx.counts else ((grad - passed) * step).sum()
            of_zero = -clipped
        return of_x, of_step, of_shift, of_zero, None, None, None


def _inside(x: Tensor, u: Tensor, low: float, high: float) -> Tensor:
    """Return x where low <= u <= high, to a few float steps, and 0 elsewhere.

    In one pass over memory: a mask and `torch.where` take five times as long.
    """
    # The kernel compares in float32 at least.
    fine = min(torch.finfo(u.dtype).eps, torch.finfo(torch.float32).eps)
    margin = 2 * fine * max(-low, high)
    inside: Tensor = torch.ops.aten.hardtanh_backward(x, u, low - margin, high + margin)
    return inside


def _summed(x: Tensor, shape: torch.Size) -> Tensor:
    """Sum over all axes along which a parameter of this shape was broadcast."""
    if not shape:
        return x.sum()
    axes = [axis for axis, size in enumerate(shape) if size == 1 and x.shape[axis] != 1]
    return x.sum(dim=axes, keepdim=True) if axes else x


def _dot(x: Tensor, y: Tensor, shape: torch.Size) -> Tensor:
    """Sum products as `_summed` does; of all of them, without storing them."""
    if shape or x.stride() != y.stride():
        return _summed(x * y, shape)
    flat = (x.numel(),), (1,)
    return torch.dot(x.as_strided(*flat), y.as_strided(*flat))


def lsq(
    x: Tensor,
    step: Tensor,
    ends: tuple[int, int],
    *,
    shift: Tensor | None = None,
    zero: Tensor | None = None,
    counts: bool = False,
    rounder: Callable[[Tensor], Tensor] = torch.round,
) -> Tensor:
    """Quantize and dequantize, with LSQ's gradients for all that is learnt.

    Args:
        x: What is quantized.
        step: Positive; a scalar, or of x's rank and broadcast over it.
        ends: Least and greatest integer.
        shift: Subtracted before and added after; broadcasts as `step`.
        zero: The zero point, a whole number; a scalar tensor. None is 0.
        counts: Whether to return q - zero, in steps, instead of shift + step * (q - zero).
        rounder: Takes and returns steps; what it does beyond rounding passes gradients on alike.

    Returns:
        The shape of x.
    """
    quantized: Tensor = _Quantize.apply(  # type: ignore[no-untyped-call]
        x, step, shift, zero, ends, counts, rounder
    )
    return quantized


class _Replace(torch.autograd.Function):
    """Another value, the same gradient."""

    @staticmethod
    def forward(_ctx: Any, _x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def replaced(x: Tensor, value: Tensor) -> Tensor:
    """Return `value`, through which gradients go to x (a straight-through estimate)."""
    found: Tensor = _Replace.apply(x, value)  # type: ignore[no-untyped-call]
    return found


class _Slowed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def slowed(x: Tensor, count: int, positive: int) -> Tensor:
    """Return x with its gradient divided by sqrt(count * positive) (LSQ, section 2.2).

    Args:
        x: A step.
        count: Weights of the step, or channels of the site.
        positive: Q_P, the greatest number of steps.
    """
    found: Tensor = _Slowed.apply(x, (count * positive) ** -0.5)  # type: ignore[no-untyped-call]
    return found
