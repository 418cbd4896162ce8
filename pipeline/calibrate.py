"""The calibrate stage: what every site of the folded model held over the calibration images.

In: the checkpoint stage's folder and a selection of images. Out: ranges.json, site to `Range`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter

from calib.collect import collect
from calib.images import select
from calib.preprocess import batches
from pipeline import checkpoint
from pipeline.fold import fold
from pipeline.records import Preprocessing, Range, Selection

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from pipeline.worker import Progress

RANGES = "ranges.json"
CALIBRATION_BATCH = 8


def calibrate_stage(
    model: str,
    selection: dict[str, Any],
    preprocessing: dict[str, Any],
    folder: str,
    progress: Progress,
) -> None:
    """Fold a checkpoint and observe every site over the calibration images.

    Args:
        model: Folder of the checkpoint stage.
        selection: A `Selection` as JSON.
        preprocessing: A `Preprocessing` as JSON.
        folder: Takes ranges.json, site name to `Range`.
        progress: Called per batch.
    """
    record, tensors = checkpoint.read(Path(model))
    how = TypeAdapter(Preprocessing).validate_python(preprocessing)
    images = select(TypeAdapter(Selection).validate_python(selection))
    folded = fold(checkpoint.build(record, tensors), how)
    folded = folded.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    total = len(images.entries)

    def pixels() -> Iterator[NDArray[np.float32]]:
        done = 0
        progress(done, total)
        for entries, batch in batches(images, how, CALIBRATION_BATCH):
            yield batch
            done += len(entries)
            progress(done, total)

    ranges = collect(folded, pixels())
    (Path(folder) / RANGES).write_bytes(TypeAdapter(dict[str, Range]).dump_json(ranges, indent=1))
