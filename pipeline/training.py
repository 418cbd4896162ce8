"""The training stage: a quantized model, trained on, is a quantized model again.

In: the folder of a `QuantizedModel`, a selection of images, a `Finetuning`. Out: the same record,
with other integers, the same exporters take it; and the metrics of the training, a line of JSON
each.

The processes that torchrun started share every batch, over NCCL where each has a GPU and over gloo
elsewhere. Rank 0 writes.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from pydantic import TypeAdapter

from calib.augment import batches_per_epoch, training_batches
from calib.images import select_labelled
from pipeline import quantize
from pipeline.distributed import group
from pipeline.errors import UsageError
from pipeline.recorder import METRICS
from pipeline.records import (
    FLOATING,
    Checkpoint,
    Finetuning,
    Preprocessing,
    QuantizedModel,
    Selection,
)
from pipeline.student import Student, float_network
from pipeline.training_loop import Feed, Loop, Trainee

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from calib.images import ImageSet
    from pipeline.distributed import Group
    from pipeline.training_loop import Batches
    from pipeline.worker import Progress

    class Learner(Trainee, Protocol):
        """A trainee that becomes a record again."""

        def quantized(self) -> tuple[QuantizedModel, dict[str, NDArray[Any]]]:
            """Return the record that it has become."""


def training_stage(
    model: str,
    images: dict[str, Any],
    how: dict[str, Any],
    parents: dict[str, str],
    keep: str,
    workers: int,
    call: int | None,
    folder: str,
    progress: Progress,
) -> dict[str, Any]:
    """Train a quantized model.

    Args:
        model: Folder with params.json and tensors.safetensors.
        images: `selection`, `preprocessing`, and the `checkpoint` whose order of classes labels
            count in: a `Selection`, a `Preprocessing` and a `Checkpoint` as JSON.
        how: A `Finetuning` as JSON.
        parents: Name to sha256 of what the model is made from, besides what it knows.
        keep: Folder of the checkpoint, which outlives this stage until it is finished.
        workers: Processes that decode ahead.
        call: For `pipeline.distributed.group`.
        folder: Takes params.json, tensors.safetensors and metrics.jsonl.
        progress: Called per update.

    Returns:
        What the report says of it: `updates`; `seconds`, `images_per_second`, `device` and
        `processes` of those that finished it; `resumed_at`: updates behind it then; `skipped`.

    Raises:
        TrainingError: As of `Loop.train`.
        UsageError: The scheme has nothing to learn, or a batch cannot be divided.
    """
    settings = TypeAdapter(Finetuning).validate_python(how)
    prepared = TypeAdapter(Preprocessing).validate_python(images["preprocessing"])
    record, arrays = quantize.read(Path(model))
    with group(call, training=True) as ranks:
        skipped: set[str] = set()
        made: list[tuple[Learner, Loop, ImageSet]] = []

        def prepare() -> None:
            found = select_labelled(
                TypeAdapter(Selection).validate_python(images["selection"]),
                TypeAdapter(Checkpoint).validate_python(images["checkpoint"]),
                needed=settings.label_weight > 0,
            )
            learner = engine(settings.engine, record, arrays)
            loop = Loop(
                learner,
                float_network(record, arrays).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
                settings,
                _feed(found, prepared, settings, ranks, workers, skipped),
                keep=Path(keep),
                ranks=ranks,
                device=device_of(ranks),
            )
            made.append((learner, loop, found))

        ranks.gather(prepare)
        ((learner, loop, found),) = made
        began = time.monotonic()
        with stopped_by_signals(loop):
            loop.train(progress)
        seconds = time.monotonic() - began
        names = sorted({name for part in ranks.gather(lambda: sorted(skipped)) for name in part})
    if ranks.leads:
        _write(Path(folder), learner, settings, parents, loop.lines)
    size = min(settings.batch, len(found.entries))
    done = (loop.step - loop.resumed_at) * size
    return {
        "updates": loop.step,
        "resumed_at": loop.resumed_at,
        "seconds": round(seconds, 1),
        "images_per_second": round(done / seconds, 1) if done else None,
        "device": _device_name(loop.device),
        "processes": ranks.size,
        "skipped": names,
    }


def engine(name: str, record: QuantizedModel, arrays: Mapping[str, NDArray[Any]]) -> Learner:
    """Return what is trained.

    Raises:
        UsageError: The engine cannot train this scheme.
    """
    if record.scheme in {*FLOATING, "w8a8-dynamic"}:
        raise UsageError(
            f"scheme {record.scheme} cannot be trained"
            + ("" if record.scheme in FLOATING else ": its runtimes choose the activations' grids"),
            allowed="w8a8, w4a8, w4a4, w8a16 or w8",
            do="Choose another --scheme",
        )
    if name == "nncf":
        from pipeline.nncf_student import NncfStudent

        return NncfStudent(record, arrays)
    return Student(record, arrays)


def device_of(ranks: Group) -> torch.device:
    """Return where this process trains: on a GPU of its own where there is one."""
    count = torch.cuda.device_count()
    return torch.device("cuda", ranks.rank % count) if count else torch.device("cpu")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _feed(
    images: ImageSet,
    preprocessing: Preprocessing,
    how: Finetuning,
    ranks: Group,
    workers: int,
    skipped: set[str],
) -> Feed:
    def batches(epoch: int, start: int) -> Batches:
        return training_batches(
            images,
            preprocessing,
            how.augmentation,
            batch=how.batch,
            seed=how.seed,
            epoch=epoch,
            start=start,
            share=(ranks.rank, ranks.size),
            workers=workers,
            skipped=skipped,
        )

    return Feed(per_epoch=batches_per_epoch(len(images.entries), how.batch), batches=batches)


@contextmanager
def stopped_by_signals(loop: Loop) -> Iterator[None]:
    """Let SIGTERM and SIGINT end a training after the update that it is at, saved."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda *_: loop.stop()) for number in wanted]
    try:
        yield
    finally:
        for number, handler in zip(wanted, before, strict=True):
            signal.signal(number, handler)


def _write(
    folder: Path,
    learner: Learner,
    how: Finetuning,
    parents: Mapping[str, str],
    lines: list[dict[str, Any]],
) -> None:
    learner.network_of().cpu()
    record, arrays = learner.quantized()
    # How often it was saved is nothing of the model's.
    stated = replace(how, save_minutes=Finetuning().save_minutes)
    trained = replace(record, trained=stated, parents={**record.parents, **parents})
    quantize.write(folder, trained, arrays)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / METRICS).write_text(text)
