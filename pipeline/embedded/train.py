"""Train the embedded default: a small ConvNeXt on scikit-learn's digits.

In: nothing but the digits' train split. Out: digits.safetensors (our own dialect), digits.json (its
sidecar, with the float top-1 on the held-out split) and training.log, all in one folder. Seeded:
the same machine and versions give the same file. `nox -s train-reference` runs it.
"""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

from calib.batches import batches
from calib.images import DIGITS, open_images
from pipeline.checkpoint import save
from pipeline.convnext import ConvNeXt, count_parameters
from pipeline.records import Architecture, Preprocessing
from pipeline.store import write_atomic

if TYPE_CHECKING:
    from calib.images import Purpose

HOME = Path(__file__).parent
ARCHITECTURE = Architecture(depths=(1, 1, 3, 1), dims=(24, 48, 72, 96), classes=10)
PREPROCESSING = Preprocessing(
    input_size=32,
    crop_ratio=1.0,
    interpolation="bilinear",
    antialias=False,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
SEED, EPOCHS, BATCH = 0, 60, 64
LEARNING_RATE, WEIGHT_DECAY, WARM_UP, SMOOTHING = 4e-3, 0.05, 3, 0.1
MAX_TURN, MAX_ZOOM, MAX_SHIFT = math.radians(12), 0.12, 0.12

log = logging.getLogger("train-reference")


def train() -> tuple[ConvNeXt, float, int]:
    """Train from scratch.

    Returns:
        The network in eval mode, its top-1 on the held-out split, and that split's size.
    """
    torch.manual_seed(SEED)
    pixels, labels = _load("calibration")
    held_out_pixels, held_out_labels = _load("evaluation")
    model = _initialised()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": WEIGHT_DECAY},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
    )
    steps = EPOCHS * math.ceil(len(pixels) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    log.info("%d parameters, %d training images", count_parameters(ARCHITECTURE), len(pixels))
    for epoch in range(EPOCHS):
        started, total = time.monotonic(), 0.0
        model.train()
        for chosen in torch.split(torch.randperm(len(pixels)), BATCH):
            images = _augment(pixels[chosen])
            loss = functional.cross_entropy(
                model(images), labels[chosen], label_smoothing=SMOOTHING
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(chosen)
        top1 = _top1(model, held_out_pixels, held_out_labels)
        log.info(
            "epoch %2d loss %.4f held-out top-1 %.4f seconds %.1f",
            epoch + 1,
            total / len(pixels),
            top1,
            time.monotonic() - started,
        )
    return model.eval(), _top1(model, held_out_pixels, held_out_labels), len(held_out_pixels)


def _load(purpose: Purpose) -> tuple[Tensor, Tensor]:
    images = open_images(DIGITS, purpose)
    entries, pixels = next(batches(images, PREPROCESSING, len(images.entries)))
    mean, std = (
        np.array(value, np.float32)[:, None, None] * 255
        for value in (PREPROCESSING.mean, PREPROCESSING.std)
    )
    return torch.from_numpy((pixels - mean) / std), torch.tensor([e.label for e in entries])


def _initialised() -> ConvNeXt:
    model = ConvNeXt(ARCHITECTURE)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def _rate(step: int, steps: int) -> float:
    warm_up = WARM_UP * steps / EPOCHS
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def _augment(images: Tensor) -> Tensor:
    """Turn, zoom and shift each image at random; beyond its edge it continues."""
    n = len(images)
    angle = (torch.rand(n) * 2 - 1) * MAX_TURN
    zoom = 1 + (torch.rand(n) * 2 - 1) * MAX_ZOOM
    shift = (torch.rand(n, 2) * 2 - 1) * MAX_SHIFT
    cosine, sine = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    affine = torch.stack(
        [
            torch.stack([cosine, -sine, shift[:, 0]], dim=1),
            torch.stack([sine, cosine, shift[:, 1]], dim=1),
        ],
        dim=1,
    )
    grid = functional.affine_grid(affine, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _top1(model: ConvNeXt, pixels: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.inference_mode():
        predicted = torch.cat([model(part).argmax(dim=1) for part in torch.split(pixels, 256)])
    return float((predicted == labels).double().mean())


class _Kept(logging.Handler):
    """Keeps every line, so that the log file appears whole with the checkpoint."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main(
    out: Annotated[Path, typer.Option(help="Where the three files go.")] = HOME,
) -> None:
    """Train the embedded reference model and write it with its sidecar and its log."""
    lines: list[str] = []
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler())
    log.addHandler(_Kept(lines))
    started = time.monotonic()
    model, top1, n = train()
    seconds = time.monotonic() - started
    log.info("done in %.0f seconds: top-1 %.4f on %d held-out images", seconds, top1, n)
    classes = [str(digit) for digit in range(10)]
    save(out / "digits.safetensors", model, labels=tuple(classes))
    sidecar = {
        **asdict(PREPROCESSING),
        "classes": classes,
        "float_top1_val": round(top1, 6),
        "n": n,
    }
    write_atomic(out / "digits.json", json.dumps(sidecar, indent=1).encode() + b"\n")
    write_atomic(out / "training.log", "\n".join([*lines, ""]).encode())


if __name__ == "__main__":
    typer.run(main)
