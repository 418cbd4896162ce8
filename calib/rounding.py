"""Rounding of a layer's weights, by what the layer really reads.

In: weights in the units of the site they read, the layer's inputs, one scale per row. Out: integers
that the contract's `WeightGrid` allows.

Sources: Frantar et al., "GPTQ", 2023, algorithm 1 (with its ordering by activity); Nagel et al.,
"Up or Down? Adaptive Rounding", 2020, equations 21 to 24; Zhong et al., "ERQ", 2024, section 3.2
(the ridge correction).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.linalg import blas, lapack

from pipeline.arithmetic import PAIR_LIMIT, along_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from pipeline.arithmetic import WeightGrid

    Doubles = NDArray[np.float64]

DAMPING = 0.01
"""Of the mean of a Hessian's diagonal, added to it (GPTQ's own value)."""
BLOCK = 32
"""Columns between which errors are passed on at once; later columns get them together."""
RIDGE = 1.0
"""As damping, of ERQ's correction."""
ADAROUND_STEPS, ADAROUND_BATCH, ADAROUND_RATE = 1500, 1024, 0.03
ADAROUND_WEIGHT = 50.0
STRETCH = (-0.1, 1.1)
"""AdaRound's zeta and gamma: the sigmoid reaches 0 and 1 before its ends."""
BETAS = (20.0, 2.0)


def second_moment(rows: Tensor, others: Tensor | None = None) -> Doubles:
    """Return E[x y^T] over positions.

    Args:
        rows: Float32 (P, K).
        others: The same shape; None is `rows` themselves.
    """
    if others is not None:
        return (rows.T.double() @ others.double() / len(rows)).numpy()
    # Symmetric: half of the products are enough.
    lower = blas.dsyrk(1 / len(rows), rows.double().numpy().T, lower=True)
    moment: Doubles = np.tril(lower) + np.tril(lower, -1).T
    return moment


def gptq(
    weight: Doubles, scales: NDArray[np.float32], hessian: Doubles, grid: WeightGrid
) -> NDArray[np.int8]:
    """Round column by column, each one's error passed on to those still to come.

    Args:
        weight: Shape (out, K).
        scales: Shape (out,).
        hessian: E[x x^T] of the quantized inputs, shape (K, K).
        grid: What the weights may be.

    Returns:
        int8, shape (out, K).
    """
    order = np.argsort(-np.diag(hessian), kind="stable")
    if grid.pairs:
        # Partners stay beside each other.
        pairs = np.argsort(-np.diag(hessian).reshape(-1, 2).sum(axis=1), kind="stable")
        order = (2 * pairs[:, None] + np.arange(2)).ravel()
    damped = hessian[np.ix_(order, order)].copy()
    damped[np.diag_indices_from(damped)] += DAMPING * max(np.diag(hessian).mean(), 1e-30)
    factor, first = lapack.dpotrf(damped)
    inverse, second = lapack.dpotri(factor)
    upper, third = lapack.dpotrf(inverse)
    # LAPACK passes NaN on without a word.
    if first or second or third or not np.isfinite(upper).all():
        raise np.linalg.LinAlgError("a layer's second moments are not positive definite")
    # Columns become rows: each is read and written whole.
    steps = np.ascontiguousarray((weight[:, order] / along_rows(scales.astype(np.float64), 2)).T)
    q = np.zeros_like(steps)
    low, high = (np.full(len(weight), sign * float(grid.limit)) for sign in (-1, 1))
    for start in range(0, len(steps), BLOCK):
        end = min(start + BLOCK, len(steps))
        errors = np.zeros((end - start, len(weight)))
        for j in range(start, end):
            least, most = low, high
            if grid.pairs and j % 2:
                before = q[j - 1]
                most = np.where(before > 0, np.minimum(high, PAIR_LIMIT - before), high)
                least = np.where(before < 0, np.maximum(low, -PAIR_LIMIT - before), low)
            q[j] = np.clip(np.rint(steps[j]), least, most)
            errors[j - start] = (steps[j] - q[j]) / upper[j, j]
            steps[j + 1 : end] -= np.outer(upper[j, j + 1 : end], errors[j - start])
        steps[end:] -= upper[start:end, end:].T @ errors
    chosen = np.empty(weight.shape, np.int8)
    chosen[:, order] = q.T
    return chosen


def ridge(weight: Doubles, lost: Doubles, hessian: Doubles) -> Doubles:
    """Return weights that make up for what quantizing the inputs loses.

    Args:
        weight: Shape (out, K).
        lost: E[(x - x~) x~^T], shape (K, K); x the inputs, x~ the quantized ones.
        hessian: E[x~ x~^T].

    Returns:
        W + W E[(x - x~) x~^T] (E[x~ x~^T] + lambda I)^-1, shape (out, K).
    """
    damped = hessian + RIDGE * np.diag(hessian).mean() * np.eye(len(hessian))
    return weight + np.linalg.solve(damped.T, (weight @ lost).T).T


def adaround(
    weight: Doubles, scales: NDArray[np.float32], inputs: Tensor, grid: WeightGrid
) -> NDArray[np.int8]:
    """Learn for each weight whether to round it up or down.

    Args:
        weight: Shape (out, K).
        scales: Shape (out,).
        inputs: Quantized inputs in the weights' units, float32 (P, K).
        grid: What the weights may be; one that asks headroom of pairs is refused.

    Returns:
        int8, shape (out, K).
    """
    assert not grid.pairs, "AdaRound moves weights one by one: pairs could overflow"
    steps = torch.from_numpy(weight / along_rows(scales.astype(np.float64), 2)).float()
    lower = steps.floor()
    fraction = (steps - lower).clamp(0.01, 0.99)
    zeta, gamma = STRETCH
    v = torch.logit((fraction - zeta) / (gamma - zeta)).requires_grad_()
    size = torch.from_numpy(scales)[:, None]
    target = (steps * size).clone()
    optimiser = torch.optim.Adam([v], lr=ADAROUND_RATE)
    generator = torch.Generator().manual_seed(0)

    def soft() -> Tensor:
        return (torch.sigmoid(v) * (gamma - zeta) + zeta).clamp(0, 1)

    nearest = steps.round().clamp(-grid.limit, grid.limit) * size
    # In units of what rounding to nearest loses; Adam's own epsilon would swallow smaller ones.
    unit = float((inputs @ (nearest - target).T).square().mean().clamp(min=1e-30))
    with torch.enable_grad():
        for step in range(ADAROUND_STEPS):
            x = inputs[torch.randint(len(inputs), (ADAROUND_BATCH,), generator=generator)]
            h = soft()
            rounded = (lower + h).clamp(-grid.limit, grid.limit) * size
            loss = (x @ (rounded - target).T).square().mean() / unit
            done = step / ADAROUND_STEPS
            beta = BETAS[0] + (BETAS[1] - BETAS[0]) * done
            if done > 0.2:  # noqa: PLR2004 - the paper's warm-up
                undecided = (1 - (2 * h - 1).abs().pow(beta)).mean()
                loss = loss + ADAROUND_WEIGHT * undecided
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    q = (lower + (soft() >= 0.5)).clamp(-grid.limit, grid.limit)  # noqa: PLR2004
    return q.detach().numpy().astype(np.int8)


def mean_error(exact: Tensor, y: Tensor) -> Doubles:
    """Return the mean of exact - y per channel: (C,) of two tensors (N, C, ...)."""
    positions = (0, *range(2, y.ndim))
    return (exact - y).mean(dim=positions, dtype=torch.float64).numpy()
