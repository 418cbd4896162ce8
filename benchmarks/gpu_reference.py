"""Throughput on a GPU: ConvNeXt beside Swin-T and ResNet-50, in the same run.

In: names of networks, batches, precisions and modes. Out: one table and one JSON document: images
per second of every combination, and of the first network against each other one with a 95 %
interval. The networks of a combination take turns, so all see the same clocks and temperatures.
Images lie on the GPU beforehand; decoding and copying are not in it. docs/devices/gpu.md says more.

Needs the extra `dev`, for transformers:

    python benchmarks/gpu_reference.py --models convnext-tiny,swin-tiny,resnet50 --batch 1,64,256 \
      --precision float32,tf32,bf16,float16 --mode eager,compile,graph --json gpu.json

Without a GPU every row says not_run, with the reason, and the exit code is 0: nothing failed, and
nothing was measured. `--device cpu` runs the same loop on the CPU and says so.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import shlex
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.accuracy import check_places, described, in_one_line, machine
from benchmarks.gpu_clock import clock_of
from benchmarks.gpu_networks import (
    MODES,
    PRECISIONS,
    Prepared,
    build,
    check_models,
    from_checkpoint,
    prepare,
)
from pipeline import words
from pipeline.errors import UsageError
from pipeline.statistics import percentile, ratio_interval, sqnr_db
from pipeline.store import library_versions, write_atomic
from targets.base import NotRun
from targets.devices.cuda import count_as_nvidia_smi, find_gpu

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from benchmarks.gpu_clock import Clock, Turn

Row = dict[str, Any]

LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
TF32_CAPABILITY = (8, 0)
SQNR_IMAGES = 8
MEASURES = (
    *("images_per_s", "outer_ms", "inner_p50_ms", "inner_over_outer", "inferences"),
    *("first_s", "capture_s", "sqnr_db", "outer_samples_ms", "inner_samples_ms"),
)


class Cell(NamedTuple):
    """One combination that the networks are compared in."""

    batch: int
    precision: str
    mode: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What every cell is measured with.

    Attributes:
        device: torch's word: `cpu` or `cuda`.
        clock: That device's.
        input_size: Side of the images.
        layout: A word of `LAYOUTS`.
        rounds: Turns of each network.
        turn_ms: About how long a turn lasts.
    """

    device: str
    clock: Clock
    input_size: int
    layout: str
    rounds: int
    turn_ms: float

    def images(self, batch: int) -> torch.Tensor:
        """Return seeded noise on the device."""
        shape = (batch, 3, self.input_size, self.input_size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return noise.to(self.device).contiguous(memory_format=LAYOUTS[self.layout])

    def rows(self, cell: Cell, networks: Mapping[str, torch.nn.Module]) -> list[Row]:
        """Measure one cell: the networks in turns.

        Returns:
            One row per network: its cell, `outcome`, its `reason` where that is not `measured`,
            and `MEASURES`, None where there are none.
        """
        stated = {name: {"model": name, **cell._asdict()} for name in networks}
        nothing = dict.fromkeys(MEASURES)
        why = self.unusable(cell)
        if why is not None:
            return [
                row | nothing | {"outcome": "not_run", "reason": why} for row in stated.values()
            ]
        images, precision = self.images(cell.batch), PRECISIONS[cell.precision]
        ready: dict[str, Prepared] = {}
        for name, network in networks.items():
            try:
                ready[name] = prepare(
                    network, images, precision, MODES[cell.mode], self.clock.synchronise
                )
            except RuntimeError as error:  # torch's: no memory, no compiler, no kernel
                stated[name] |= nothing | {"outcome": "failed", "reason": described(error)}
        for name, taken in self.turns(ready).items():
            item, plain = ready[name], self._float32(networks[name], images[:SQNR_IMAGES])
            stated[name] |= {"outcome": "measured", "reason": None, **figures(taken, cell.batch)}
            stated[name] |= {
                "first_s": item.first_s,
                "capture_s": item.capture_s,
                # What is fast must also be right.
                "sqnr_db": sqnr_db(plain, item.logits[:SQNR_IMAGES].cpu().numpy()),
            }
        return list(stated.values())

    def unusable(self, cell: Cell) -> str | None:
        """Return why a cell cannot be measured on this device, or None where it can."""
        precision, mode = PRECISIONS[cell.precision], MODES[cell.mode]
        if self.device == "cpu":
            if precision.tf32:
                return "TF32 is arithmetic of NVIDIA GPUs; this is --device cpu"
            return "CUDA graphs need a GPU; this is --device cpu" if mode.graph else None
        missing = no_gpu()
        if missing is not None:
            return missing
        if precision.tf32 and torch.cuda.get_device_capability() < TF32_CAPABILITY:
            return "this GPU has no TF32: torch would compute in float32"
        if precision.needs_bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            return "this GPU has no bfloat16 of its own"
        return None

    def turns(self, ready: Mapping[str, Prepared]) -> dict[str, list[Turn]]:
        """Let the networks take turns, A B A B, after a turn each that is not counted."""
        inferences = {}
        for name, item in ready.items():
            first = self.clock.turn(item.call, 3)
            inferences[name] = max(1, math.ceil(self.turn_ms / first.outer_ms))
            self.clock.turn(item.call, inferences[name])
        taken: dict[str, list[Turn]] = {name: [] for name in ready}
        for name in [name for _ in range(self.rounds) for name in ready]:
            taken[name].append(self.clock.turn(ready[name].call, inferences[name]))
        return taken

    def _float32(self, network: torch.nn.Module, images: torch.Tensor) -> NDArray[np.float32]:
        """Return what the network says in float32 and eager mode on the same device."""
        plain = prepare(
            network, images, PRECISIONS["float32"], MODES["eager"], self.clock.synchronise
        )
        logits: NDArray[np.float32] = plain.logits.cpu().numpy()
        return logits


def no_gpu() -> str | None:
    """Return why torch has no GPU here, or None where it has one."""
    if torch.cuda.is_available():
        return None
    gpu = find_gpu()
    if isinstance(gpu, NotRun):
        return gpu.reason
    return f"torch {torch.__version__} cannot use the {gpu.description}"


def figures(turns: Sequence[Turn], batch: int) -> Row:
    """Return what follows from the turns of one network.

    Returns:
        `images_per_s` and `outer_ms`, the median over the turns by the outer clock; `inner_p50_ms`,
        the median inference; `inner_over_outer`, the share of the outer time that the inferences
        themselves took; and the samples.
    """
    outer = [turn.outer_ms for turn in turns]
    inner = [ms for turn in turns for ms in turn.inner_ms]
    whole = sum(turn.outer_ms * len(turn.inner_ms) for turn in turns)
    return {
        "images_per_s": 1000 * batch / median(outer),
        "outer_ms": median(outer),
        "inner_p50_ms": percentile(inner, 50),
        "inner_over_outer": sum(inner) / whole,
        "inferences": len(inner),
        "outer_samples_ms": [round(ms, 5) for ms in outer],
        "inner_samples_ms": [round(ms, 5) for ms in inner],
    }


def ratios(rows: Sequence[Row]) -> Iterator[Row]:
    """Hold the first network's throughput against each other's.

    Args:
        rows: Of one cell.

    Yields:
        The cell, `model`, `against`, and the `ratio` of their images per second with its 95 %
        interval `lo` to `hi`; all None where there are too few turns or one was not measured.
    """
    first, *others = rows
    for other in others:
        found = None
        if first["outcome"] == other["outcome"] == "measured":
            found = ratio_interval(
                other["outer_samples_ms"], first["outer_samples_ms"], per_round=1
            )
        ratio = dict(zip(("ratio", "lo", "hi"), found or (None,) * 3, strict=True))
        cell = {key: first[key] for key in Cell._fields}
        yield {**cell, "model": first["model"], "against": other["model"], **ratio}


def measure(
    bench: Bench, networks: Mapping[str, torch.nn.Module], cells: Sequence[Cell], console: Console
) -> tuple[list[Row], list[Row]]:
    """Measure every cell; return its rows and its ratios."""
    rows: list[Row] = []
    compared: list[Row] = []
    for cell in cells:
        begin = time.monotonic()
        found = bench.rows(cell, networks)
        rows += found
        compared += ratios(found)
        if any(row["outcome"] != "not_run" for row in found):
            taken = time.monotonic() - begin
            console.print(f"batch {cell.batch} {cell.precision} {cell.mode}: {taken:.1f} s")
        torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows, compared


def gpu_facts() -> Row | None:
    """Return what the GPU is and how it stands; None where there is none."""
    gpu = find_gpu()
    if isinstance(gpu, NotRun) or not torch.cuda.is_available():
        return None
    seen = torch.cuda.get_device_properties(0)
    return {
        **asdict(gpu),
        "compute_capability": f"{seen.major}.{seen.minor}",
        "multiprocessors": seen.multi_processor_count,
        "memory_bytes": seen.total_memory,
    }


def print_table(document: Row, console: Console) -> None:
    """Print rows and ratios; where a peer is faster it is printed like any other."""
    where = document["gpu"]["name"] if document["gpu"] else document["cpu"]
    settings = document["settings"]
    title = f"--device {settings['device']}, {where}: {settings['input_size']} pixels, "
    table = Table(title=title + settings["memory_format"])
    for name in ("batch", "precision", "mode", "model"):
        table.add_column(name)
    for name in ("images/s", "ms", "inner / outer", "first, s", "SQNR dB", "images/s of the first"):
        table.add_column(name, justify="right")
    against = {(*(r[k] for k in Cell._fields), r["against"]): r for r in document["ratios"]}
    missing = Counter[str]()
    for row in document["rows"]:
        cell = tuple(row[key] for key in (*Cell._fields, "model"))
        if row["outcome"] != "measured":
            missing[f"{row['outcome']}: {row['reason']}"] += 1
            continue
        held = against.get(cell, {})
        table.add_row(
            *map(str, cell),
            f"{row['images_per_s']:.1f}",
            f"{row['outer_ms']:.3f}",
            f"{row['inner_over_outer']:.2f}",
            f"{row['first_s']:.1f}",
            "exact" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}",
            f"{held['ratio']:.2f} x ({held['lo']:.2f} to {held['hi']:.2f})"
            if held.get("ratio")
            else "",
        )
    if table.row_count:
        console.print(table)
    for reason, count in missing.items():
        console.print(f"{count} of {len(document['rows'])} rows {reason}", markup=False)


def main() -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--models", default="convnext-tiny,swin-tiny,resnet50", help="the first is held against")
    add("--checkpoint", help="a ConvNeXt of your own, which then is the first")
    add("--batch", default="1,64,256", help="comma-separated")
    add("--precision", default="float32,tf32,bf16,float16", help=f"of {', '.join(PRECISIONS)}")
    add("--mode", default="eager,compile,graph", help=f"of {', '.join(MODES)}")
    add("--memory-format", default="channels-last", help=f"of {', '.join(LAYOUTS)}")
    add("--device", default="cuda", help="cuda or cpu")
    add("--input-size", type=int, default=224)
    add("--rounds", type=int, default=12, help="turns of each network; an interval needs 10")
    add("--turn-ms", type=float, default=250.0, help="about how long a turn lasts")
    add("--json", type=Path, required=True, help="where the document goes")
    options = vars(parser.parse_args())
    in_one_line(_run, options.pop("json"), options)


def _run(target: Path, options: Row) -> None:
    settings = options | {
        "models": list(dict.fromkeys(words.listed(options["models"]))),
        "batch": _batches(options["batch"]),
        "precision": _words("--precision", options["precision"], PRECISIONS),
        "mode": _words("--mode", options["mode"], MODES),
    }
    _words("--memory-format", settings["memory_format"], LAYOUTS)
    _words("--device", settings["device"], ("cuda", "cpu"))
    for name in ("input_size", "rounds", "turn_ms"):
        if settings[name] <= 0:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} is {settings[name]}", allowed="above 0", do=f"Correct {flag}")
    check_models(settings["models"])
    check_places(target, None)
    own = {}
    if settings["checkpoint"] is not None:
        own[Path(settings["checkpoint"]).name] = from_checkpoint(settings["checkpoint"])
        settings["checkpoint"] = Path(settings["checkpoint"]).name
    networks = own | {name: build(name, settings["input_size"]) for name in settings["models"]}
    if not networks:
        raise UsageError("no network is named", allowed="1 or more", do="Correct --models")
    count_as_nvidia_smi()
    # Convolutions of one shape: let cuDNN try its algorithms in the first inference.
    torch.backends.cudnn.benchmark = True
    bench = Bench(
        device=settings["device"],
        clock=clock_of(settings["device"]),
        input_size=settings["input_size"],
        layout=settings["memory_format"],
        rounds=settings["rounds"],
        turn_ms=settings["turn_ms"],
    )
    cells = [Cell(*each) for each in itertools.product(*(settings[k] for k in Cell._fields))]
    before, load, begin = gpu_facts(), os.getloadavg()[0], time.monotonic()
    rows, compared = measure(bench, networks, cells, Console(stderr=True, emoji=False))
    document: Row = {
        "command": shlex.join(["python", "benchmarks/gpu_reference.py", *sys.argv[1:]]),
        "settings": settings,
        **machine(),
        "load_before": load,
        "gpu": before,
        "gpu_after": gpu_facts(),
        "torch": {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "threads": torch.get_num_threads(),
        },
        "transformers": library_versions(("transformers",))["transformers"],
        "seconds": round(time.monotonic() - begin, 1),
        "ratios": compared,
        "rows": rows,
    }
    write_atomic(target, (json.dumps(document, indent=1) + "\n").encode())
    print_table(document, Console(width=None if sys.stdout.isatty() else 160, emoji=False))


def _batches(text: str) -> list[int]:
    """Return the batches that are listed."""
    found = words.listed(text)
    if not found or not all(word.isdecimal() and int(word) for word in found):
        raise UsageError(f"--batch is {text!r}", allowed="64 or 1,64,256", do="Correct --batch")
    return [int(word) for word in found]


def _words(flag: str, text: str, allowed: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """Return the listed words, all of them allowed and at least one."""
    found = words.listed(text)
    if not found or not set(found) <= set(allowed):
        raise UsageError(f"{flag} is {text!r}", allowed=", ".join(allowed), do=f"Correct {flag}")
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    main()
