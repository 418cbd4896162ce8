"""int8 of this project beside the default path of each runtime's own tools: CPU time.

In: names of ConvNeXts, whose weights are drawn from a seed, and images. Every tool gets the same
weights, calibration images and threads; all artifacts of a runtime take turns in one process. Out:
one table and one JSON document with a row per artifact of ours and peer: the ratio of the medians
with its 95 % interval, and what each loses in accuracy.

Needs the extras `all` and `peers`, on constraints.txt:

    python benchmarks/latency.py --models tiny,atto --input-size 224 --threads 1 --json latency.json

`--device cpu:avx2` holds everything to an older instruction set, on a CPU that has newer ones
(docs/devices/cpu.md).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import accuracy_runs as runs
from benchmarks.accuracy import Bench, Ours, check_places, in_one_line, machine
from benchmarks.accuracy_peers import PEERS, Peer
from pipeline import words
from pipeline.errors import UsageError
from pipeline.records import Architecture
from pipeline.statistics import percentile, ratio_interval
from pipeline.store import write_atomic
from targets import base
from targets.devices.local import Local, isa_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pipeline.records import Isa

Row = dict[str, Any]

HOSTS = ("onnx", "openvino", "tflite")
"""Runtimes that run here."""
CLASSES, SEED = 10, 0


def ways(runtimes: Sequence[str], isa: Isa) -> tuple[Ours, ...]:
    """Return the ways to run this project: each placement, made for a CPU and for any.

    Args:
        runtimes: Those that are measured.
        isa: Of the CPU.
    """
    found = [
        Ours("w8a8", "pointwise", HOSTS),
        Ours("w8a8", "pointwise-downsample", ("onnx", "openvino")),
        Ours("w8a8", "all", HOSTS),
        Ours("w8a8-dynamic", "pointwise", ("onnx", "tflite")),
        Ours("w8a8-dynamic", "all", ("onnx", "tflite")),
    ]
    if isa == "avx2":
        # What headroom costs: the same without it, whose integers are wrong on this CPU.
        found.append(Ours("w8a8", "pointwise", ("onnx", "openvino"), isa="vnni"))
    kept = ((one, tuple(name for name in one.runtimes if name in runtimes)) for one in found)
    return tuple(one._replace(runtimes=names) for one, names in kept if names)


def measure(
    models: Sequence[str],
    threads: Sequence[int],
    options: Row,
    work: Path,
    ours: Sequence[Ours],
    peers: Sequence[Peer],
) -> list[Row]:
    """Measure every network with each number of threads.

    Args:
        models: Names of `pipeline.convnext.SIZES`.
        threads: Of each inference.
        options: `data`, `input_size`, `images`, `calibration_images` and `isa` of `runs.Settings`.
        work: Takes artifacts and logs.
        ours: Ways to run this project.
        peers: What to run beside it.

    Returns:
        One row per artifact of ours and peer.
    """
    console, found = Console(stderr=True, emoji=False), list[Row]()
    for model in models:
        folder = work / model
        folder.mkdir(exist_ok=True)
        checkpoint = folder / f"{model}.safetensors"
        write_seeded(model, checkpoint)
        settings = runs.Settings(checkpoint=str(checkpoint), eval=None, draws=1, **options)
        bench = Bench(folder, settings, console, ours, peers)
        rows = bench.rows()
        for count in threads:
            bench.time(rows, count)
            found += [{"model": model, "threads": count, **row} for row in pairs(rows)]
    return found


def write_seeded(model: str, path: Path) -> None:
    """Write a checkpoint of a named size whose weights are drawn from a seed."""
    from pipeline.checkpoint import save
    from pipeline.convnext import SIZES, seeded

    depths, dims = SIZES[model]
    architecture = Architecture(depths=depths, dims=dims, classes=CLASSES)
    save(path, seeded(architecture, SEED), labels=None)


def check_models(models: Sequence[str]) -> None:
    """Check that these are names of networks.

    Raises:
        UsageError: One is not, or there is none.
    """
    from pipeline.convnext import SIZES

    known = [name for name in SIZES if not name.startswith("isotropic")]
    if not models or not set(models) <= set(known):
        named = ", ".join(name for name in models if name not in known) or "none is named"
        raise UsageError(f"unknown model: {named}", allowed=", ".join(known), do="Name another one")


def pairs(rows: Sequence[Row]) -> Iterator[Row]:
    """Hold each artifact of ours against each peer of its runtime.

    Args:
        rows: As `Bench` made and timed them.

    Yields:
        `runtime`, `ours`, `profile`, `peer`; `ratio_cpu` of our median over the peer's, with
        `ratio_lo` and `ratio_hi`; `sqnr_ours_db` and `sqnr_peer_db`, None where nothing differs;
        the medians themselves in `cpu_ours_ms` and `cpu_peer_ms`; and `outcome`, with its `reason`
        where it is not `measured`.
    """
    for ours in (row for row in rows if row["ours"]):
        for peer in rows:
            if peer["ours"] or peer["runtime"] != ours["runtime"]:
                continue
            row = {
                "runtime": ours["runtime"],
                "ours": " ".join(filter(None, (ours["scheme"], ours["placement"]))),
                "profile": ours.get("profile"),
                "peer": peer["method"],
            }
            missing = next((one for one in (ours, peer) if "cpu_ms" not in one), None)
            if missing is not None:
                whose = "ours" if missing["ours"] else "the peer's"
                reason = missing.get("reason") or missing.get("time_failed") or "not timed"
                failed = {"outcome": "not_run", "reason": f"{whose}: {reason}"}
                yield row | dict.fromkeys(MEASURES) | failed
                continue
            ratio = ratio_interval(ours["cpu_ms"], peer["cpu_ms"], per_round=runs.PER_ROUND)
            if ratio is None:
                failed = {"outcome": "not_run", "reason": "the clock is too coarse for it"}
                yield row | dict.fromkeys(MEASURES) | failed
                continue
            medians = (percentile(one["cpu_ms"], 50) for one in (ours, peer))
            measured = (*ratio, ours["sqnr_db"], peer["sqnr_db"], *medians)
            yield row | dict(zip(MEASURES, measured, strict=True)) | {"outcome": "measured"}


RATIO, SQNR = ("ratio_cpu", "ratio_lo", "ratio_hi"), ("sqnr_ours_db", "sqnr_peer_db")
MEDIANS = ("cpu_ours_ms", "cpu_peer_ms")
MEASURES = (*RATIO, *SQNR, *MEDIANS)


def print_table(rows: Sequence[Row], console: Console, title: str) -> None:
    """Print the rows; ours that is slower is printed like any other."""
    table = Table(title=title)
    for name in ("model", "threads", "runtime", "ours", "profile", "peer"):
        table.add_column(name)
    for name in ("CPU ms, ours", "peer", "ours / peer", "95 %", "SQNR dB, ours", "peer"):
        table.add_column(name, justify="right")
    for row in rows:
        stated = [row["model"], str(row["threads"]), row["runtime"], row["ours"]]
        stated += [row["profile"] or "", row["peer"]]
        if row["outcome"] != "measured":
            table.add_row(*stated, row["outcome"], escape(row["reason"]))
            continue
        ends = f"{row['ratio_lo']:.2f} to {row['ratio_hi']:.2f}"
        table.add_row(
            *stated,
            *(f"{row[k]:.2f}" for k in (*MEDIANS, "ratio_cpu")),
            ends,
            *("exact" if row[k] is None else f"{row[k]:.1f}" for k in SQNR),
        )
    console.print(table)


def main() -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--models", default="tiny,atto", help="of seeded weights, comma-separated")
    add("--input-size", type=int, default=224)
    add("--runtimes", default=",".join(HOSTS), help="comma-separated")
    add("--threads", default="1", help="of an inference; several comma-separated")
    add("--data", default="digits", help="images that calibrate and evaluate")
    add("--images", type=int, default=64, help="evaluate on at most this many")
    add("--calibration-images", type=int, default=64)
    add("--device", default="local", help="local, or this CPU held to a set: cpu:avx2")
    add("--work", type=Path, help="keep artifacts and the log here; default: a temporary folder")
    add("--json", type=Path, required=True, help="where the document goes")
    options = vars(parser.parse_args())
    target, work = options.pop("json"), options.pop("work")
    in_one_line(_run, target, work, options)


def held_to(name: str, runtimes: Sequence[str]) -> tuple[base.DeviceInfo, Isa]:
    """Return what this process runs on; where that takes another environment, start it again in it.

    Args:
        name: Of a device that is this machine's CPU.
        runtimes: To run there.

    Raises:
        UsageError: It is none, or cannot run one of these.
    """
    device = base.device(name)
    # Others are not even asked: they may be far away.
    info = device.probe() if isinstance(device, Local) else base.NotRun(reason="")
    allowed = "local, cpu:avx2, cpu:avx512-vnni and its like"
    do = "Correct --device or --runtimes"
    if not isinstance(device, Local) or isinstance(info, base.NotRun):
        why = f" ({info.reason})" if isinstance(info, base.NotRun) and info.reason else ""
        raise UsageError(f"{name} is no CPU of this machine{why}", allowed=allowed, do=do)
    for one in runtimes:
        cannot = device.can_run(base.runtime(one))
        if cannot is not None:
            raise UsageError(cannot.reason, allowed="another runtime or device", do=do)
    isa = isa_of(info.isa)
    if isa is None:
        raise UsageError(f"{name} names no instruction set", allowed=allowed, do=do)
    wanted = device.environment()
    if any(os.environ.get(key) != value for key, value in wanted.items()):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **wanted})  # noqa: S606 - itself
    return info, isa


def _run(target: Path, work: Path | None, options: Row) -> None:
    models = list(dict.fromkeys(words.listed(options.pop("models"))))
    check_models(models)
    asked = words.listed(options.pop("threads"))
    threads = [int(word) for word in asked if word.isdecimal() and int(word)]
    if not threads or len(threads) < len(asked):
        raise UsageError(
            f"--threads is {', '.join(asked)!r}", allowed="1 or 1,2", do="Correct --threads"
        )
    runtimes = words.listed(options.pop("runtimes"))
    if not runtimes or not set(runtimes) <= set(HOSTS):
        raise UsageError(
            f"--runtimes is {', '.join(runtimes)!r}",
            allowed=", ".join(HOSTS),
            do="Correct --runtimes",
        )
    options["data"] = words.data_place(options["data"])
    check_places(target, work)
    info, isa = held_to(options.pop("device"), runtimes)
    os.environ["NNCF_EXTENSION_LOAD_TIMEOUT"] = "0"  # its build takes longer on few cores
    begin, load = time.monotonic(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="convnext-edge-") as folder:
        peers = [peer for peer in PEERS if peer.runtime in runtimes]
        place = work or Path(folder)
        asked_of = {**options, "isa": isa}
        rows = measure(models, threads, asked_of, place, ways(runtimes, isa), peers)
    document: Row = {
        "settings": {**options, "models": models, "runtimes": runtimes, "threads": threads},
        **machine(),
        "device": info.name,
        "isa": info.isa,
        "held_by": info.versions,
        "load_before": load,
        "seconds": round(time.monotonic() - begin, 1),
        "rows": rows,
    }
    write_atomic(target, (json.dumps(document, indent=1) + "\n").encode())
    console = Console(width=None if sys.stdout.isatty() else 180, emoji=False)
    print_table(rows, console, f"{document['cpu']}, {', '.join(document['isa'])}")


if __name__ == "__main__":
    main()
