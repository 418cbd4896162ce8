"""Logits beside logits: what follows from two runs over the same images.

In: logits of the float model, of artifacts, of artifacts elsewhere. Out: an `Accuracy`, an
`Agreement`, a `Parity`.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Literal

import numpy as np

from pipeline.records import Accuracy, Agreement, Export, Parity
from pipeline.statistics import paired_difference_interval, sqnr_db

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from pipeline.records import Kind


def compare(
    float_logits: NDArray[np.float32],
    logits: NDArray[np.float32],
    labels: NDArray[np.int64],
    kind: Kind = "host",
) -> Accuracy:
    """Hold an artifact's logits against the float model's.

    Args:
        float_logits: Shape (n, classes).
        logits: Shape (n, classes).
        labels: Shape (n,).
        kind: How the artifact was run.

    Returns:
        Everything that follows from them.
    """
    n = len(labels)
    was, now = float_logits.argmax(axis=1), logits.argmax(axis=1)
    right_before, right_now = was == labels, now == labels
    lost = int((right_before & ~right_now).sum())
    gained = int((~right_before & right_now).sum())
    low, high = paired_difference_interval(lost, gained, n)
    return Accuracy(
        outcome="measured",
        kind=kind,
        n=n,
        top1=float(right_now.mean()),
        drop_pp=100 * (lost - gained) / n,
        drop_ci95_pp=(100 * low, 100 * high),
        agreement_with_float=float((was == now).mean()),
        sqnr_db=sqnr_db(float_logits, logits),
        lost=lost,
        gained=gained,
        correct_bits=base64.b64encode(np.packbits(right_now).tobytes()).decode(),
    )


def agreement(
    a: tuple[Export, NDArray[np.float32]],
    b: tuple[Export, NDArray[np.float32]],
    floats: Mapping[str, NDArray[np.float32]] | None = None,
    *,
    kind: Kind = "host",
) -> Agreement:
    """Compare two artifacts' logits on the same images, shape (n, classes) each.

    Args:
        a: One artifact and its logits.
        b: The other.
        floats: Runtimes to their float artifacts' logits, as far as they are known.
        kind: How they were run: of the one that was further from a real device.
    """
    (ours, x), (theirs, y) = a, b
    difference, known = _rms(x, y), floats or {}
    errors = [
        _rms(values, known[export.runtime])
        for export, values in (a, b)
        if export.scheme != "float" and export.runtime in known
    ]
    least = min(errors, default=0.0)
    return Agreement(
        a=ours.runtime,
        b=theirs.runtime,
        scheme=ours.scheme,
        kind=kind,
        n=len(x),
        profile_a=ours.profile,
        profile_b=theirs.profile,
        top1_agreement=float((x.argmax(axis=1) == y.argmax(axis=1)).mean()),
        max_abs_logit_diff=float(np.abs(x - y).max()),
        rms_logit_diff=difference,
        diff_over_error=difference / least if least else None,
        placement_a=ours.placement,
        placement_b=theirs.placement,
    )


def parity(
    export: Export,
    logits: NDArray[np.float32],
    other: NDArray[np.float32],
    *,
    error: NDArray[np.float32],
    against: Literal["host", "reference"],
) -> Parity:
    """Hold an artifact's logits on a device against others of the same images, (n, classes) each.

    Args:
        export: What the artifact is.
        logits: The device's.
        other: What they are held against.
        error: What quantization does to the reference's logits; all 0 of a float artifact.
        against: Whose `other` is.

    Returns:
        The row, its device still to be named.
    """
    flipped = np.flatnonzero(logits.argmax(axis=1) != other.argmax(axis=1))
    leads = np.sort(other[flipped], axis=1)
    margin = leads[:, -1] - leads[:, -2] if other.shape[1] > 1 else leads[:, -1]
    difference, lost = _rms(logits, other), _rms(error, np.zeros_like(error))
    return Parity(
        device="",
        runtime=export.runtime,
        scheme=export.scheme,
        outcome="measured",
        against=against,
        n=len(logits),
        top1_agreement=1 - len(flipped) / len(logits),
        max_abs_logit_diff=float(np.abs(logits - other).max()),
        rms_logit_diff=difference,
        diff_over_error=difference / lost if lost else None,
        largest_flip_margin=float(margin.max()) if len(flipped) else None,
    )


def _rms(x: NDArray[np.float32], y: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.square(x.astype(np.float64) - y).mean()))
