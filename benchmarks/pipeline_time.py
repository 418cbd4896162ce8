"""How long this project takes to four formats, beside the four tools one after the other.

In: the name of a ConvNeXt, whose weights are drawn from a seed, and images. Ours is `convnext-edge
run --tune off` without measurements; the tools are the default path of each runtime, from the same
checkpoint and with as many calibration images, which they get decoded. Out: one table and one JSON
document with wall and CPU seconds of each.

Needs the extras `all` and `peers`, on constraints.txt:

    python benchmarks/pipeline_time.py --model tiny --input-size 224 --json pipeline-time.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from benchmarks import accuracy_runs as runs
from benchmarks.accuracy import check_places, in_one_line, machine
from benchmarks.accuracy_peers import PEERS, Job
from benchmarks.latency import check_models, write_seeded
from pipeline import words
from pipeline.errors import ArtifactError
from pipeline.records import Preprocessing
from pipeline.store import write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable

Row = dict[str, Any]
LONGEST, THREADS = 400, "OMP_NUM_THREADS"

TOOLS = ("ort_quantize_static", "nncf_default", "tfliteconverter_int8", "coremltools_linear")
"""The default path of each runtime's own tool, as in accuracy_peers.py."""


def measure(model: str, options: Row, work: Path) -> list[Row]:
    """Time ours and the tools, each in processes of its own.

    Args:
        model: A name of `pipeline.convnext.SIZES`.
        options: `data`, `input_size` and `calibration_images`.
        work: Takes artifacts and logs.

    Returns:
        `method`, `wall_s` and `cpu_s` of ours and of each tool.

    Raises:
        ArtifactError: Our own run fails.
    """
    checkpoint = work / f"{model}.safetensors"
    write_seeded(model, checkpoint)
    settings = runs.Settings(
        checkpoint=str(checkpoint), eval=None, images=1, draws=1, isa="auto", **options
    )
    prepared = runs.apart(work / "log.txt", runs.prepare, work, settings)
    size = Preprocessing(**prepared["preprocessing"]).input_size
    job = Job(checkpoint=str(checkpoint), calibration=work / runs.calibration_of(0), size=size)
    rows = [_timed("ours, four formats", lambda: _ours(checkpoint, options, work))]
    peers = [one for one in PEERS if one.method in TOOLS]
    assert len(peers) == len(TOOLS), "a tool has another name now"
    for peer in peers:
        folder = work / peer.method
        folder.mkdir()
        path = folder / f"model{runs.SUFFIXES[peer.runtime]}"

        def make(peer: Any = peer, path: Path = path) -> None:
            runs.apart(work / "log.txt", peer.make, job, path)

        rows.append(_timed(f"{peer.runtime}: {peer.method}", make))
    return rows


def _ours(checkpoint: Path, options: Row, work: Path) -> None:
    command = [sys.executable, "-P", "-m", "pipeline.cli", "run", "--tune", "off", "--no-bench"]
    command += ["--checkpoint", str(checkpoint), "--eval", "none", "--out", str(work / "ours")]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise ArtifactError(
            f"our own run failed: {' '.join(done.stderr.split())[-LONGEST:]}",
            allowed="a run to the end",
            do="Run it alone: " + " ".join(command[1:]),
        )


def _timed(method: str, make: Callable[[], None]) -> Row:
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    make()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "method": method,
        "wall_s": round(time.monotonic() - begin, 1),
        "cpu_s": round(cpu, 1),
    }


def together(rows: list[Row]) -> Row:
    """Return the tools' sum, and ours over it."""
    ours, *tools = rows
    total = {clock: sum(row[clock] for row in tools) for clock in ("wall_s", "cpu_s")}
    return {
        "tools": total,
        "ratio_wall": ours["wall_s"] / total["wall_s"],
        "ratio_cpu": ours["cpu_s"] / total["cpu_s"],
    }


def print_table(rows: list[Row], found: Row, console: Console, title: str) -> None:
    """Print what each takes, and the ratio."""
    table = Table(title=title)
    table.add_column("method")
    for name in ("wall, s", "CPU, s"):
        table.add_column(name, justify="right")
    lines = [*rows, {"method": "the four tools in turn", **found["tools"]}]
    for row in lines:
        table.add_row(row["method"], f"{row['wall_s']:.1f}", f"{row['cpu_s']:.1f}")
    table.add_row("ours / tools", f"{found['ratio_wall']:.2f}", f"{found['ratio_cpu']:.2f}")
    console.print(table)


def main() -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", default="tiny", help="of seeded weights")
    add("--input-size", type=int, default=224)
    add("--data", default="digits", help="images that calibrate")
    add("--calibration-images", type=int, default=300)
    add("--json", type=Path, required=True, help="where the document goes")
    options = vars(parser.parse_args())
    in_one_line(_run, options.pop("json"), options)


def _run(target: Path, options: Row) -> None:
    model = options.pop("model")
    check_models([model])
    options["data"] = words.data_place(options["data"])
    check_places(target, None)
    os.environ["NNCF_EXTENSION_LOAD_TIMEOUT"] = "0"  # its build takes longer on few cores
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="convnext-edge-") as folder:
        rows = measure(model, options, Path(folder))
    found = together(rows)
    document: Row = {
        "settings": {**options, "model": model, "omp_num_threads": os.environ.get(THREADS)},
        **machine(),
        "load_before": load,
        "rows": rows,
        **found,
    }
    write_atomic(target, (json.dumps(document, indent=1) + "\n").encode())
    console = Console(width=None if sys.stdout.isatty() else 120, emoji=False)
    print_table(rows, found, console, f"{model}, {document['cpu']}")


if __name__ == "__main__":
    main()
