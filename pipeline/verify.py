"""An artifact against the float model, on the same images, by running the artifact itself.

In: images, the float network, artifacts. Out: logits on disk, and from them accuracy, the paired
drop with its interval, agreement and SQNR.
"""

from __future__ import annotations

import base64
import itertools
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import TypeAdapter

from calib.images import select
from calib.preprocess import batches
from pipeline import checkpoint
from pipeline.records import Accuracy, Agreement, Export, Preprocessing, Selection
from pipeline.statistics import paired_difference_interval, sqnr_db
from targets.base import run_padded, runtime

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.worker import Progress

LOGITS, LABELS = "logits.npy", "labels.npy"
FLOAT_BATCH = 32


def float_stage(
    model: str,
    selection: dict[str, Any],
    preprocessing: dict[str, Any],
    folder: str,
    progress: Progress,
) -> dict[str, Any]:
    """Run the float network, as it was trained, over the evaluation images.

    Args:
        model: Folder with the checkpoint stage's record and tensors.
        selection: A `Selection` as JSON.
        preprocessing: A `Preprocessing` as JSON.
        folder: Takes logits.npy (float32, (n, classes)) and labels.npy (int64, (n,)).
        progress: Called per batch.

    Returns:
        `top1` and `n`.
    """
    import torch

    record, tensors = checkpoint.read(Path(model))
    network = checkpoint.build(record, tensors).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    how = TypeAdapter(Preprocessing).validate_python(preprocessing)
    images = select(TypeAdapter(Selection).validate_python(selection), record)
    mean, std = (torch.tensor(v)[:, None, None] * 255 for v in (how.mean, how.std))
    parts = []
    progress(0, len(images.entries))
    with torch.inference_mode():
        for _, pixels in batches(images, how, FLOAT_BATCH):
            parts.append(network((torch.from_numpy(pixels) - mean) / std).numpy())
            progress(sum(map(len, parts)), len(images.entries))
    logits = np.concatenate(parts)
    labels = np.array([entry.label for entry in images.entries], np.int64)
    np.save(Path(folder) / LOGITS, logits)
    np.save(Path(folder) / LABELS, labels)
    return {"top1": float((logits.argmax(axis=1) == labels).mean()), "n": len(labels)}


def artifact_stage(
    model: str,
    name: str,
    path: str,
    batch: int | str,
    selection: dict[str, Any],
    preprocessing: dict[str, Any],
    reference: str,
    folder: str,
    progress: Progress,
) -> dict[str, Any]:
    """Run an artifact over the evaluation images and compare it with the float model.

    Args:
        model: Folder of the checkpoint stage.
        name: The runtime.
        path: The artifact.
        batch: Its batch; `dynamic` is run one by one.
        selection: A `Selection` as JSON.
        preprocessing: A `Preprocessing` as JSON.
        reference: Folder with the float model's logits.npy and labels.npy.
        folder: Takes logits.npy.
        progress: Called per image.

    Returns:
        An `Accuracy` as JSON.
    """
    record = checkpoint.read_record(Path(model))
    how = TypeAdapter(Preprocessing).validate_python(preprocessing)
    images = select(TypeAdapter(Selection).validate_python(selection), record)
    session = runtime(name).load(Path(path), threads=1)
    parts = []
    progress(0, len(images.entries))
    size = batch if isinstance(batch, int) else 1
    for _, pixels in batches(images, how, size):
        parts.append(run_padded(session, pixels, size))
        progress(sum(map(len, parts)), len(images.entries))
    logits = np.concatenate(parts)
    np.save(Path(folder) / LOGITS, logits)
    labels = np.load(Path(reference) / LABELS)
    return asdict(compare(np.load(Path(reference) / LOGITS), logits, labels))


def compare(
    float_logits: NDArray[np.float32], logits: NDArray[np.float32], labels: NDArray[np.int64]
) -> Accuracy:
    """Hold an artifact's logits against the float model's.

    Args:
        float_logits: Shape (n, classes).
        logits: Shape (n, classes).
        labels: Shape (n,).

    Returns:
        Everything that follows from them; kind `host`.
    """
    n = len(labels)
    was, now = float_logits.argmax(axis=1), logits.argmax(axis=1)
    right_before, right_now = was == labels, now == labels
    lost = int((right_before & ~right_now).sum())
    gained = int((~right_before & right_now).sum())
    low, high = paired_difference_interval(lost, gained, n)
    return Accuracy(
        outcome="measured",
        kind="host",
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


def agreement_stage(
    artifacts: list[dict[str, Any]], folder: str, progress: Progress
) -> list[dict[str, Any]]:
    """Compare every pair of artifacts of equal scheme.

    Args:
        artifacts: For each measured artifact its `export`, and the `folder` with its logits.npy.
        folder: Takes nothing: the result is all there is.
        progress: Called before and after.

    Returns:
        `Agreement` rows as JSON, in the order given.
    """
    del folder
    progress(0, 1)
    exports = [TypeAdapter(Export).validate_python(item["export"]) for item in artifacts]
    logits = [np.load(Path(item["folder"]) / LOGITS) for item in artifacts]
    rows = [
        asdict(agreement((exports[i], logits[i]), (exports[j], logits[j])))
        for i, j in itertools.combinations(range(len(artifacts)), 2)
        if exports[i].scheme == exports[j].scheme
    ]
    progress(1, 1)
    return rows


def agreement(
    a: tuple[Export, NDArray[np.float32]], b: tuple[Export, NDArray[np.float32]]
) -> Agreement:
    """Compare two artifacts' logits on the same images, shape (n, classes) each."""
    (ours, x), (theirs, y) = a, b
    return Agreement(
        a=ours.runtime,
        b=theirs.runtime,
        scheme=ours.scheme,
        kind="host",
        n=len(x),
        profile_a=ours.profile,
        profile_b=theirs.profile,
        top1_agreement=float((x.argmax(axis=1) == y.argmax(axis=1)).mean()),
        max_abs_logit_diff=float(np.abs(x - y).max()),
    )
