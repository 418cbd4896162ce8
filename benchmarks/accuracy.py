"""The default path of each runtime's own tool beside this project: accuracy, with latency.

In: a checkpoint, images to calibrate with and images to evaluate on. Every method gets the same of
each; methods that calibrate do so on several draws. Out: one table and one JSON document, whose
rows say what was measured, what failed and what does not run on this machine. Ours normalises the
image within the artifact and within its time; the peers' are given normalised pixels.

Needs the extras `all` and `peers`, on constraints.txt:

    python benchmarks/accuracy.py --checkpoint model.pth --data images.zip --json accuracy.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from benchmarks import accuracy_runs as runs
from benchmarks.accuracy_peers import PEERS, Job, Peer
from benchmarks.accuracy_table import group, print_table, summary, verdicts
from pipeline import words
from pipeline.errors import EdgeError, OutputError, UsageError
from pipeline.recipe import NONE
from pipeline.records import Preprocessing
from pipeline.store import cannot_write, library_versions, size_bytes, write_atomic
from targets.base import NotRun, kind_here, runtime
from targets.devices.local import cpu_name, isa_flags

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Row = dict[str, Any]


class Ours(NamedTuple):
    """One way to run this project; placement None is each runtime's default, isa None --isa."""

    scheme: str
    placement: str | None
    runtimes: tuple[str, ...] = tuple(runs.SUFFIXES)
    note: str | None = None
    isa: str | None = None


OURS: tuple[Ours, ...] = (
    Ours("w8a8", "pointwise"),
    Ours("w8a8", "all"),
    Ours("w8a8-dynamic", "pointwise", ("onnx", "tflite")),
    Ours("w8a8-dynamic", "all", ("onnx", "tflite")),
)
"""The float artifacts come along with the first."""
TIMES = ("cpu_ms", "cpu_p50_ms", "time_failed")
ROOT, LONGEST = Path(__file__).parents[1], 400
PACKAGES = (
    *("convnext-edge", "torch", "numpy", "onnx", "onnxruntime", "openvino", "nncf", "coremltools"),
    *("tensorflow-cpu", "litert-torch", "ai-edge-litert", "ai-edge-quantizer"),
)


class Bench:
    """Runs everything, one process after the other, and collects the rows.

    Args:
        work: A folder for artifacts and logs.
        settings: What was asked.
        console: Where progress is shown.
        ways: To run this project.
        peers: To run beside it.
    """

    def __init__(
        self,
        work: Path,
        settings: runs.Settings,
        console: Console,
        ways: Sequence[Ours] = OURS,
        peers: Sequence[Peer] = PEERS,
    ) -> None:
        self.work, self.settings, self.console = work, settings, console
        self.ways, self.peers = ways, peers
        self.prepared: Row = self._apart("prepare", runs.prepare, work, settings)
        self.how = Preprocessing(**self.prepared["preprocessing"])

    def rows(self) -> list[Row]:
        """Make and evaluate every artifact."""
        rows = [*self._ours(), *(self._peer(peer) for peer in self.peers)]
        rows.sort(key=lambda r: (list(runs.SUFFIXES).index(r["runtime"]), group(r["scheme"])))
        return rows

    def _ours(self) -> list[Row]:
        rows, floats = list[Row](), dict[str, Row]()
        for index, way in enumerate(self.ways):
            row = {"method": "ours", "ours": True, "scheme": way.scheme, "note": way.note}
            row["placement"] = way.placement
            try:
                made = [self._draw_of_ours(index, seed) for seed in range(self.settings.draws)]
            except Exception as error:  # noqa: BLE001 - whatever it is, it becomes a row
                failed = not_made(error)
                rows += [{**row, "runtime": name, **failed} for name in way.runtimes]
                continue
            for name in way.runtimes:
                mine = {**row, "runtime": name}
                draws = [draw[name, way.scheme] for draw in made]
                rows.append(mine | self._measured(mine, draws))
                # The float artifact comes along, the same each time.
                floats.setdefault(name, made[0][name, "float"])
        for name in dict.fromkeys(name for way in self.ways for name in way.runtimes):
            row = {"method": "ours", "ours": True, "scheme": "float", "runtime": name}
            row |= {"note": None, "placement": None}
            if name in floats:
                rows.append(row | self._measured(row, [floats[name]]))
            else:
                rows.append(row | {"outcome": "failed", "reason": "no run of ours was finished"})
        return rows

    def _draw_of_ours(self, index: int, seed: int) -> dict[tuple[str, str], Row]:
        """Return the artifacts of one run of this project, by runtime and scheme."""
        way = self.ways[index]
        asked = {
            "eval": NONE,
            "eval_images": None,
            "scheme": way.scheme,
            "placement": way.placement,
            "runtimes": way.runtimes,
        } | ({} if way.isa is None else {"isa": way.isa})
        recipe = self.settings.recipe(seed, **asked).model_dump(mode="json")
        kept = self.work / f"ours-{index}-{seed}"
        name = f"ours {way.scheme} {way.placement or 'in the default placement'}, draw {seed}"
        made = self._apart(name, runs.make_ours, self.work / "run", kept, recipe)
        return {(row["runtime"], row["scheme"]): {**row, "seed": seed} for row in made}

    def _peer(self, peer: Peer) -> Row:
        row: Row = {"runtime": peer.runtime, "method": peer.method, "ours": False}
        row |= {"scheme": peer.scheme, "placement": None, "note": peer.note}
        draws: list[Row] = []
        for seed in range(self.settings.draws if peer.calibrates else 1):
            folder = self.work / f"{peer.runtime}-{peer.method}-{seed}"
            folder.mkdir(exist_ok=True)
            path = folder / f"model{runs.SUFFIXES[peer.runtime]}"
            calibration = self.work / runs.calibration_of(seed)
            job = Job(
                checkpoint=str(self.settings.checkpoint),
                calibration=calibration,
                size=self.how.input_size,
            )
            try:
                self._apart(f"{peer.runtime} {peer.method}, draw {seed}", peer.make, job, path)
            except Exception as error:  # noqa: BLE001 - whatever it is, it becomes a row
                return row | not_made(error)
            draws.append({"seed": seed, "path": str(path), "size_bytes": size_bytes(folder)})
        return row | self._measured(row, draws)

    def _measured(self, row: Row, draws: Sequence[Row]) -> Row:
        """Evaluate the artifact of every draw; the first is the one that is timed."""
        seen = {k: v for k, v in draws[0].items() if k != "seed"}
        cannot = runtime(row["runtime"]).can_run()
        if isinstance(cannot, NotRun):
            # What follows speaks of this project's own check.
            reason = cannot.reason.partition(";")[0]
            return {**seen, "outcome": "not_run", "reason": reason}
        found = []
        for draw in draws:
            name = f"{row['runtime']} {row['method']}, draw {draw['seed']}: evaluation"
            artifact = {**row, **draw}
            try:
                result = self._apart(name, runs.evaluate, self.work, self.how, artifact)
            except Exception as error:  # noqa: BLE001 - whatever it is, it becomes a row
                return {**seen, **not_made(error)}
            found.append({"seed": draw["seed"], **result})
        return {**seen, "outcome": "measured", **summary(found)}

    def time(self, rows: Sequence[Row], threads: int = 1) -> None:
        """Put the CPU times of every artifact that runs here into its row, for any earlier ones."""
        for row in rows:
            for name in TIMES:
                row.pop(name, None)
        for name in runs.SUFFIXES:
            here = {
                str(i): row
                for i, row in enumerate(rows)
                if row["runtime"] == name and row["outcome"] == "measured"
            }
            if not here or kind_here(runtime(name)) == "interpreted":
                continue
            try:
                times = self._apart(
                    f"{name}: time", runs.time_all, self.work, self.how, here, threads
                )
            except Exception as error:  # noqa: BLE001 - the accuracy stands without the time
                times = {label: {"time_failed": described(error)} for label in here}
            for label, found in times.items():
                here[label].update(found)

    def _apart(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        begin = time.monotonic()
        try:
            return runs.apart(self.work / "log.txt", function, *arguments)
        finally:
            taken = time.monotonic() - begin
            self.console.print(f"{name:<60} {taken:6.1f} s", markup=False, highlight=False)


def not_made(error: Exception) -> Row:
    """Return what a row says of a method that did not give an artifact that runs."""
    if isinstance(error, ModuleNotFoundError):
        return {"outcome": "not_run", "reason": f"{error.name} is not installed"}
    return {"outcome": "failed", "reason": described(error)}


def described(error: Exception) -> str:
    """Return an error in one line."""
    if isinstance(error, BrokenProcessPool):
        return "its process died"
    if isinstance(error, EdgeError):
        return str(error)
    # Converters quote the file and the line that a layer comes from.
    text = f"{type(error).__name__}: {error}".replace(f"{ROOT}/", "")
    return " ".join(text.split())[:LONGEST]


def main() -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--checkpoint", required=True, help="as of `convnext-edge run`")
    add("--data", required=True, help="calibrates; where it holds train/, that")
    add("--eval", default=NONE, help="evaluates; where it holds val/, that; default: --data")
    add("--input-size", type=int, help="default: the sidecar's, else 224")
    add("--images", type=int, help="evaluate on at most this many; default: all")
    add("--calibration-images", type=int, default=512)
    add("--draws", type=int, default=3, help="of calibration images, seeds 0, 1, ...")
    add("--isa", default="auto", help="of this project's artifacts, as of `convnext-edge run`")
    add("--work", type=Path, help="keep artifacts and the log here; default: a temporary folder")
    add("--json", type=Path, required=True, help="where the document goes")
    options = vars(parser.parse_args())
    target, work = options.pop("json"), options.pop("work")
    in_one_line(measure, target, work, options)


def in_one_line(function: Callable[..., None], *arguments: Any) -> None:
    """Call a function; what it cannot do is said in one line, and the exit code is not 0."""
    try:
        function(*arguments)
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(f"error: {cannot_write(error.filename or 'the work folder', error)}", file=sys.stderr)
        sys.exit(1)


def measure(target: Path, work: Path | None, options: Row) -> None:
    """Measure everything and write the document, whole or not at all."""
    settings = settings_of(options)
    check_places(target, work)
    os.environ["NNCF_EXTENSION_LOAD_TIMEOUT"] = "0"  # its build takes longer on few cores
    console, begin, load = Console(stderr=True, emoji=False), time.monotonic(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="convnext-edge-") as folder:
        bench = Bench(work or Path(folder), settings, console)
        made = bench.rows()
        bench.time(made)
        rows = [{k: v for k, v in row.items() if k != "path"} for row in made]
    names = {"checkpoint", "data", "eval"}
    stated = {k: Path(v).name if k in names and v else v for k, v in asdict(settings).items()}
    document = {
        "settings": stated,
        **machine(),
        "load_before": load,
        "seconds": round(time.monotonic() - begin, 1),
        **bench.prepared,
        "verdicts": verdicts(rows),
        "rows": rows,
    }
    write_atomic(target, (json.dumps(document, indent=1) + "\n").encode())
    print_table(document, Console(width=None if sys.stdout.isatty() else 200, emoji=False))


def machine() -> Row:
    """Return what a document says of where it was measured."""
    return {
        "cpu": cpu_name(),
        "isa": isa_flags(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": library_versions(PACKAGES),
    }


def settings_of(options: Row) -> runs.Settings:
    """Return the settings of these options.

    Raises:
        UsageError: A value is none that a run takes.
    """
    if options["draws"] < 1:
        raise UsageError(
            f"--draws is {options['draws']}", allowed="1 or more", do="Correct --draws"
        )
    places = {
        "checkpoint": words.checkpoint_place(options["checkpoint"]),
        "data": words.data_place(options["data"]),
        "eval": None if options["eval"] == NONE else words.data_place(options["eval"]),
    }
    settings = runs.Settings(**options | places)
    settings.recipe(0)
    return settings


def check_places(target: Path, work: Path | None) -> None:
    """Refuse places that cannot be written before anything is measured."""
    if target.is_dir():
        raise OutputError(f"{target} is a folder", allowed="a file", do="Correct --json")
    for folder in (target.parent, *([work] if work else [])):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error


if __name__ == "__main__":
    main()
