"""The calibrate stage: what every site of the folded model held over the calibration images.

In: the checkpoint stage's folder and a selection of images. Out: statistics.safetensors: the range
of every channel of every site.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter

from calib.batches import batches, check_readable
from calib.collect import collect, merge, save_statistics
from calib.images import select
from pipeline import checkpoint
from pipeline.distributed import group
from pipeline.fold import fold
from pipeline.records import Preprocessing, Selection

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from calib.collect import Statistics
    from calib.images import ImageSet
    from pipeline.distributed import Group
    from pipeline.worker import Progress

STATISTICS = "statistics.safetensors"
CALIBRATION_BATCH = 8


def calibrate_stage(
    model: str,
    selection: dict[str, Any],
    preprocessing: dict[str, Any],
    workers: int,
    call: int | None,
    folder: str,
    progress: Progress,
) -> dict[str, Any]:
    """Fold a checkpoint and observe every site over the calibration images.

    Args:
        model: Folder of the checkpoint stage.
        selection: A `Selection` as JSON.
        preprocessing: A `Preprocessing` as JSON.
        workers: Processes that decode ahead.
        call: For `pipeline.distributed.group`.
        folder: Takes statistics.safetensors.
        progress: Called per batch.

    Returns:
        `skipped`: the names of images that could not be decoded; `statistics`: the file's name.
    """
    how = TypeAdapter(Preprocessing).validate_python(preprocessing)
    chosen = TypeAdapter(Selection).validate_python(selection)

    def observe(ranks: Group) -> tuple[Statistics, list[str], int]:
        record, tensors = checkpoint.read(Path(model))
        images = select(chosen)
        images = replace(images, entries=tuple(ranks.shard(images.entries)))
        folded = fold(checkpoint.build(record, tensors), how)
        folded = folded.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        skipped: list[str] = []
        statistics = collect(folded, _pixels(images, how, workers, skipped, progress))
        return statistics, skipped, len(images.entries)

    with group(call) as ranks:
        found = ranks.gather(lambda: observe(ranks))
    skipped = [name for _, names, _ in found for name in names]
    check_readable(chosen.where, sum(n for *_, n in found), skipped)
    if ranks.leads:
        save_statistics(Path(folder) / STATISTICS, merge([of_rank for of_rank, *_ in found]))
    return {"skipped": skipped, "statistics": STATISTICS}


def _pixels(
    images: ImageSet, how: Preprocessing, workers: int, skipped: list[str], progress: Progress
) -> Iterator[NDArray[np.float32]]:
    total, done = len(images.entries), 0
    progress(done, total)
    for entries, batch in batches(images, how, CALIBRATION_BATCH, workers=workers, skipped=skipped):
        yield batch
        done += len(entries)
        progress(done, total)
