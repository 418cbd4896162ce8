"""From image files to float logits: this project beside the loop that a person would write.

In: a folder or a zip of images, and a checkpoint or a seeded atto. Every way runs the same network
over the same images in batches of the same size, in one process, in turns. Out: a table and, if
asked, a JSON document: images per second by wall and by CPU time, and ratios within each round.

Linux only: the CPU time of the processes that decode ahead is read from /proc.

    python -P benchmarks/throughput.py --data photos.zip --input-size 224
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import re
import sys
import time
import zipfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from calib.batches import batches
from calib.images import open_images
from calib.preprocess import FILTERS
from pipeline.checkpoint import load_model
from pipeline.convnext import SIZES, seeded
from pipeline.errors import DataError, EdgeError
from pipeline.locate import locate
from pipeline.records import Architecture, Preprocessing
from pipeline.sidecar import DEFAULT_INPUT_SIZE, read_sidecar
from pipeline.verify import FLOAT_BATCH

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from calib.images import ImageSet
    from pipeline.convnext import ConvNeXt

Row = dict[str, Any]

PLAIN, HERE, AHEAD, DECODING = "plain loop", "workers=0", "workers=1", "decoding alone"
WARM_UP = 16
MANY = 50_000
COLUMNS = {
    "images/s": "{wall_images_per_s:.1f}",
    "per CPU s": "{cpu_images_per_s:.1f}",
    "wall: x plain loop": "{wall_ratio[0]:.2f} [{wall_ratio[1]:.2f}, {wall_ratio[2]:.2f}]",
    "CPU: x plain loop": "{cpu_ratio[0]:.2f} [{cpu_ratio[1]:.2f}, {cpu_ratio[2]:.2f}]",
    "ms/image": "{wall_ms_per_image:.2f}",
    f"{MANY:,} images, extrapolated": "{many_minutes:.1f} min",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What every way is given."""

    network: ConvNeXt
    images: ImageSet
    how: Preprocessing
    batch: int
    data: Path


def plain_loop(work: Work) -> Iterator[torch.Tensor]:
    """Yield logits as a person's own loop computes them, with PIL and torch alone."""
    size, mean, std = work.how.input_size, np.array(work.how.mean), np.array(work.how.std)
    archive = None if work.data.is_dir() else zipfile.ZipFile(work.data)
    names = [entry.name for entry in work.images.entries]
    for start in range(0, len(names), work.batch):
        tensors = []
        for name in names[start : start + work.batch]:
            file = io.BytesIO(archive.read(name)) if archive else work.data / name
            image = Image.open(file).convert("RGB")
            scale = work.how.shorter_side / min(image.size)
            width, height = (round(side * scale) for side in image.size)
            image = image.resize((width, height), FILTERS[work.how.interpolation])
            left, top = (width - size) // 2, (height - size) // 2
            image = image.crop((left, top, left + size, top + size))
            pixels = (np.asarray(image) / 255 - mean) / std
            tensors.append(torch.from_numpy(pixels.transpose(2, 0, 1)).float())
        with torch.inference_mode():
            yield work.network(torch.stack(tensors))


def this_project(work: Work, *, workers: int) -> Iterator[torch.Tensor]:
    """Yield logits as the verify stage computes the float network's."""
    mean, std = (torch.tensor(v)[:, None, None] * 255 for v in (work.how.mean, work.how.std))
    for _, pixels in batches(work.images, work.how, work.batch, workers=workers):
        with torch.inference_mode():
            yield work.network((torch.from_numpy(pixels) - mean) / std)


def decoding(work: Work) -> Iterator[torch.Tensor]:
    """Yield the pixels that the network would get."""
    for _, pixels in batches(work.images, work.how, work.batch):
        yield torch.from_numpy(pixels)


WAYS: dict[str, Callable[[Work], Iterator[torch.Tensor]]] = {
    PLAIN: plain_loop,
    HERE: lambda work: this_project(work, workers=0),
    AHEAD: lambda work: this_project(work, workers=1),
    DECODING: decoding,
}


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of all that descend from it, ended or not."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended while this loop ran
            # The name before the last bracket may hold anything.
            fields = stat.read_text().rpartition(")")[2].split()
            pid = int(stat.parent.name)
            # Its own user and system time, then those of the children that it has waited for.
            parents[pid], ticks[pid] = int(fields[1]), sum(map(int, fields[11:15]))
    ours, added = set[int](), {os.getpid()}
    while added:
        ours |= added
        added = {pid for pid, parent in parents.items() if parent in ours} - ours
    return sum(ticks.get(pid, 0) for pid in ours) / os.sysconf("SC_CLK_TCK")


def time_of(way: str, work: Work) -> tuple[float, float, torch.Tensor]:
    """Run a way to its end; return wall seconds, CPU seconds and all that it gave."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    found = list(WAYS[way](work))
    return time.perf_counter() - wall, cpu_seconds() - cpu, torch.cat(found)


def compare(work: Work, rounds: int) -> dict[str, Row]:
    """Let the ways take turns, round after round, and return what each took."""
    logits = {way: time_of(way, warm_up_of(work))[2] for way in WAYS}
    expected = logits[PLAIN]
    walls: dict[str, list[float]] = {way: [] for way in WAYS}
    cpus: dict[str, list[float]] = {way: [] for way in WAYS}
    for way in [way for _ in range(rounds) for way in WAYS]:
        wall, cpu, _ = time_of(way, work)
        walls[way].append(wall)
        cpus[way].append(cpu)
    n, rows = len(work.images.entries), dict[str, Row]()
    for way in WAYS:
        row = rows[way] = {"wall_s": walls[way], "cpu_s": cpus[way]}
        for clock, samples in (("wall", walls), ("cpu", cpus)):
            ratios = [base / own for base, own in zip(samples[PLAIN], samples[way], strict=True)]
            row[f"{clock}_images_per_s"] = n / median(samples[way])
            row[f"{clock}_ms_per_image"] = 1000 * median(samples[way]) / n
            row[f"{clock}_ratio"] = (median(ratios), min(ratios), max(ratios))
        row["many_minutes"] = MANY * median(walls[way]) / n / 60
        if way != DECODING:
            row["max_logit_difference"] = float((logits[way] - expected).abs().max())
    return rows


def warm_up_of(work: Work) -> Work:
    """Return the same work on a few images: the first pass pays for what is loaded once."""
    few = work.images.sample(WARM_UP, seed=0)
    return Work(network=work.network, images=few, how=work.how, batch=work.batch, data=work.data)


def prepare(
    data: Path, checkpoint: str | None, input_size: int | None, images: int | None, batch: int
) -> Work:
    """Load the network and choose the images."""
    if not data.is_dir() and not zipfile.is_zipfile(data):
        raise DataError(
            f"{data} is neither a folder nor a zip",
            allowed="a folder or a .zip of images, which the plain loop reads too",
            do="Correct --data",
        )
    if checkpoint is None:
        depths, dims = SIZES["atto"]
        network = seeded(Architecture(depths=depths, dims=dims, classes=1000), seed=0)
        stated: dict[str, Any] = {}
    else:
        network = load_model(checkpoint)
        stated = read_sidecar(locate(checkpoint)).preprocessing
    flags = {} if input_size is None else {"input_size": input_size}
    return Work(
        # As the verify stage lays it out; the plain loop gets the same network.
        network=network.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        images=open_images(str(data), "evaluation").sample(images, seed=0),
        how=Preprocessing(**{"input_size": DEFAULT_INPUT_SIZE, **stated, **flags}),
        batch=batch,
        data=data,
    )


def document(work: Work, rows: dict[str, Row], name: str, load: float) -> Row:
    """Return everything that was measured, with the machine and the versions."""
    info = Path("/proc/cpuinfo").read_text()
    return {
        "cpu": re.findall(r"model name\s*: (.*)", info)[0],
        "cores": len(os.sched_getaffinity(0)),
        "load_before": load,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {item: metadata.version(item) for item in ("numpy", "torch", "pillow")},
        "network": name,
        "data": work.data.name,
        "images": len(work.images.entries),
        "batch": work.batch,
        "preprocessing": asdict(work.how),
        "ways": rows,
    }


def main() -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder or zip of images")
    parser.add_argument("--checkpoint", help="default: an atto with seeded weights")
    parser.add_argument("--input-size", type=int, help="default: the sidecar's, else 224")
    parser.add_argument("--images", type=int, help="at most this many; default: all")
    parser.add_argument("--batch", type=int, default=FLOAT_BATCH)
    parser.add_argument("--rounds", type=int, default=5, help="turns of every way")
    parser.add_argument("--threads", type=int, default=1, help="of torch; a decoder has one")
    parser.add_argument("--json", type=Path, help="where the document goes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load = os.getloadavg()[0]
    try:
        work = prepare(
            options.data, options.checkpoint, options.input_size, options.images, options.batch
        )
        rows = compare(work, options.rounds)
    except EdgeError as error:
        sys.exit(f"error: {error}")
    name = Path(options.checkpoint).name if options.checkpoint else "atto, seeded"
    found = document(work, rows, name, load)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    title = "{network}, {images} of {data}, batch {batch}, {threads} thread(s), {cpu}"
    table = Table("way", title=title.format(**found))
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for way, row in rows.items():
        table.add_row(way, *(cell.format(**row) for cell in COLUMNS.values()))
    console = Console(width=140, emoji=False)
    console.print(table)
    apart = max(row.get("max_logit_difference", 0) for row in rows.values())
    console.print(f"logits of the plain loop and of this project differ by {apart:.2g} at most")
    console.print(f"load average of the minute before: {load:.2f}")


if __name__ == "__main__":
    main()
