"""An artifact against the float model, on the same images, by running the artifact itself.

In: images, the float network, artifacts. Out: logits on disk, and from them accuracy, the paired
drop with its interval, agreement and SQNR.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pydantic import TypeAdapter

from calib.batches import batches, check_readable
from calib.images import select
from pipeline.distributed import group
from pipeline.loaded import read_record
from pipeline.logits import agreement, compare
from pipeline.records import Export, Preprocessing, Selection
from targets.base import kind_here, run_padded, runtime

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from pipeline.distributed import Group
    from pipeline.records import Kind
    from pipeline.worker import Progress

    Classifier = Callable[[NDArray[np.float32]], NDArray[np.float32]]
    """Pixels (N, C, H, W) in [0, 255] to logits (N, classes)."""

LOGITS, LABELS = "logits.npy", "labels.npy"
FLOAT_BATCH = 32
KINDS: tuple[Kind, ...] = ("device", "host", "emulated", "interpreted")
"""From what a phone does to what is only computed after it."""


def float_stage(
    model: str,
    selection: dict[str, Any],
    preprocessing: dict[str, Any],
    workers: int,
    call: int | None,
    folder: str,
    progress: Progress,
) -> dict[str, Any]:
    """Run the float network, as it was trained, over the evaluation images.

    Args:
        model: Folder with the checkpoint stage's record and tensors.
        selection: A `Selection` as JSON.
        preprocessing: A `Preprocessing` as JSON.
        workers: Processes that decode ahead.
        call: For `pipeline.distributed.group`.
        folder: Takes logits.npy (float32, (n, classes)) and labels.npy (int64, (n,)).
        progress: Called per batch.

    Returns:
        `top1` and `n`; `skipped`, the names of images that could not be decoded.
    """
    import torch

    from pipeline import checkpoint

    how = TypeAdapter(Preprocessing).validate_python(preprocessing)

    def load() -> Classifier:
        record, tensors = checkpoint.read(Path(model))
        network = checkpoint.build(record, tensors).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        mean, std = (torch.tensor(v)[:, None, None] * 255 for v in (how.mean, how.std))

        def run(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
            with torch.inference_mode():
                logits: NDArray[np.float32]
                logits = network((torch.from_numpy(pixels) - mean) / std).numpy()
                return logits

        return run

    chosen = TypeAdapter(Selection).validate_python(selection)
    seen = _over_images(load, model, chosen, _Batches(how, FLOAT_BATCH, workers), call, progress)
    if seen.leads:
        np.save(Path(folder) / LOGITS, seen.logits)
        np.save(Path(folder) / LABELS, seen.labels)
    top1 = float((seen.logits.argmax(axis=1) == seen.labels).mean())
    return {"top1": top1, "n": len(seen.labels), "skipped": seen.skipped}


def artifact_stage(
    model: str,
    artifact: dict[str, Any],
    selection: dict[str, Any],
    preprocessing: dict[str, Any],
    reference: str,
    workers: int,
    call: int | None,
    folder: str,
    progress: Progress,
) -> dict[str, Any] | None:
    """Run an artifact over the evaluation images and compare it with the float model.

    Args:
        model: Folder of the checkpoint stage.
        artifact: Its `runtime`, `path` and `batch`; a batch that is `dynamic` is run one by one.
        selection: A `Selection` as JSON.
        preprocessing: A `Preprocessing` as JSON.
        reference: Folder with the float model's logits.npy and labels.npy.
        workers: Processes that decode ahead.
        call: For `pipeline.distributed.group`.
        folder: Takes logits.npy.
        progress: Called per image.

    Returns:
        An `Accuracy` as JSON; None on a rank that does not lead.
    """
    how = TypeAdapter(Preprocessing).validate_python(preprocessing)
    size = artifact["batch"] if isinstance(artifact["batch"], int) else 1

    def load() -> Classifier:
        session = runtime(artifact["runtime"]).load(Path(artifact["path"]), threads=1)
        return lambda pixels: run_padded(session, pixels, size)

    chosen = TypeAdapter(Selection).validate_python(selection)
    seen = _over_images(load, model, chosen, _Batches(how, size, workers), call, progress)
    if not seen.leads:
        return None
    np.save(Path(folder) / LOGITS, seen.logits)
    labels = np.load(Path(reference) / LABELS)
    kind = kind_here(runtime(artifact["runtime"]))
    return asdict(compare(np.load(Path(reference) / LOGITS), seen.logits, labels, kind))


class _Batches(NamedTuple):
    """How images become batches: preprocessing, size, and processes that decode ahead."""

    how: Preprocessing
    size: int
    workers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What a run over all images gave: logits (n, classes), labels (n,), undecodable names."""

    logits: NDArray[np.float32]
    labels: NDArray[np.int64]
    skipped: list[str]
    leads: bool


class _Part(NamedTuple):
    """What one process saw of its images."""

    logits: list[NDArray[np.float32]]
    labels: list[int | None]
    skipped: list[str]
    n: int


def _over_images(
    load: Callable[[], Classifier],
    model: str,
    selection: Selection,
    of: _Batches,
    call: int | None,
    progress: Progress,
) -> _Seen:
    """Run something over every image, in the images' order, however many processes share them."""

    def over(ranks: Group) -> _Part:
        images = select(selection, read_record(Path(model)))
        images = replace(images, entries=tuple(ranks.shard(images.entries)))
        run, part = load(), _Part([], [], [], len(images.entries))
        progress(0, part.n)
        for entries, pixels in batches(
            images, of.how, of.size, workers=of.workers, skipped=part.skipped
        ):
            part.logits.append(run(pixels))
            part.labels.extend(entry.label for entry in entries)
            progress(len(part.labels) + len(part.skipped), part.n)
        return part

    with group(call) as ranks:
        found = ranks.gather(lambda: over(ranks))
    skipped = [name for part in found for name in part.skipped]
    check_readable(selection.where, sum(part.n for part in found), skipped)
    return _Seen(
        logits=np.concatenate([batch for part in found for batch in part.logits]),
        labels=np.array([label for part in found for label in part.labels], np.int64),
        skipped=skipped,
        leads=ranks.leads,
    )


def agreement_stage(
    artifacts: list[dict[str, Any]], folder: str, progress: Progress
) -> list[dict[str, Any]]:
    """Compare every pair of artifacts of equal scheme.

    Args:
        artifacts: For each measured artifact its `export`, the `kind` of its accuracy, and the
            `folder` with its logits.npy.
        folder: Takes nothing: the result is all there is.
        progress: Called before and after.

    Returns:
        `Agreement` rows as JSON, in the order given.
    """
    del folder
    progress(0, 1)
    exports = [TypeAdapter(Export).validate_python(item["export"]) for item in artifacts]
    logits = [np.load(Path(item["folder"]) / LOGITS) for item in artifacts]
    floats = {
        export.runtime: values
        for export, values in zip(exports, logits, strict=True)
        if export.scheme == "float"
    }
    kinds: list[Kind] = [item["kind"] for item in artifacts]
    rows = [
        asdict(
            agreement(
                (exports[i], logits[i]),
                (exports[j], logits[j]),
                floats,
                kind=max(kinds[i], kinds[j], key=KINDS.index),
            )
        )
        for i, j in itertools.combinations(range(len(artifacts)), 2)
        if exports[i].scheme == exports[j].scheme
    ]
    progress(1, 1)
    return rows
