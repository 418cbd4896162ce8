"""A new runtime is one new file, a new device one file or folder: they go through `run`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from pipeline.store import PACKAGES
from reports.document import read_report

ROOT = Path(__file__).parents[1]

RUNTIME = """
from pathlib import Path

from pipeline.records import Proof
from targets.base import Capabilities
from targets.graph import Graph


class Fake:
    name = "fake"
    capabilities = Capabilities(
        suffix=".fake",
        layout="NCHW",
        extra="fake",
        distributions=(),
        graph_forms=("one",),
        gelu="erf",
    )

    def export(self, graph, path, metadata):
        path.write_text(metadata)

    def prove(self, path, graph):
        return Proof(
            method="none",
            integer_layers=graph.integer_layers,
            expected_integer_layers=graph.integer_layers,
            weighted_layers=len(graph.weighted),
            transposes_per_block=0.0,
            quantize_ops_per_block=0.0,
            op_counts={},
        )

    def read_metadata(self, path):
        return path.read_text()

    def can_run(self):
        return None

    def op_times(self, path, image, *, threads, inferences):
        return []

    def load(self, path, threads):
        import numpy as np

        return lambda image: np.eye(10, dtype=np.float32)[[3] * len(image)]


RUNTIME = Fake()
"""

DEVICE = """
from targets.base import DeviceInfo, Samples


class Toaster:
    name = "toaster"

    def probe(self):
        return DeviceInfo(name="toaster", kind="device", isa=(), description="a toaster", cores=1)

    def can_run(self, wanted):
        return None

    def measure(self, jobs, image, *, rounds, per_round, threads, progress):
        n = rounds * per_round
        times = {"harness": 0.1, "float": 4.0, "w8a8": 2.0}
        return [
            Samples(
                label=job.label,
                wall_ms=(times[job.label],) * n,
                cpu_ms=(times[job.label],) * n,
                load_ms=1.0,
                first_ms=1.0,
                peak_memory_bytes=1,
                versions={},
            )
            for job in jobs
        ]


DEVICE = Toaster()
"""


SHELF = """
from dataclasses import dataclass

import numpy as np

from targets.base import DeviceInfo, OpTime, Samples


@dataclass
class Board:
    name: str

    def probe(self):
        return DeviceInfo(
            name=self.name, kind="emulated", isa=("asimd",), description="a board", cores=1
        )

    def can_run(self, wanted):
        return None

    def measure(self, jobs, image, *, rounds, per_round, threads, progress):
        counts = {"harness": 10, "float": 4000, "w8a8": 1000}
        return [
            Samples(
                label=job.label,
                wall_ms=(),
                cpu_ms=(),
                load_ms=None,
                first_ms=None,
                peak_memory_bytes=None,
                versions={},
                instructions=(counts[job.label], counts[job.label] + 2),
                instruction_kinds={"dot_product": 5, "i8mm": 0},
                symbols={"kernel": counts[job.label]},
            )
            for job in jobs
        ]

    def infer(self, job, images, *, batch, threads, progress):
        # One image in four is taken for a nine, by far.
        logits = np.eye(10, dtype=np.float32)[[3] * len(images)]
        logits[::4] = 5 * np.eye(10)[9]
        return logits

    def op_times(self, job, *, threads, inferences):
        return [OpTime(kind="gelu", op="GELU", name=name, ms=1.5) for name in ("one", "two")]


class Shelf:
    name = "shelf"

    def found(self):
        return ("upper", "lower")

    def at(self, address):
        return Board(f"shelf:{address}")


DEVICES = Shelf()
"""


def test_one_file_each_goes_through_run(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    (tree / "targets" / "runtimes" / "fake.py").write_text(RUNTIME)
    toaster = tree / "targets" / "devices" / "toaster"
    toaster.mkdir()
    (toaster / "__init__.py").touch()
    (toaster / "device.py").write_text(DEVICE)
    (tree / "targets" / "devices" / "shelf.py").write_text(SHELF)
    out = tmp_path / "run"

    def cli(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pipeline.cli", *words],
            env={**os.environ, "PYTHONPATH": str(tree)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    wanted = ("--runtimes", "fake", "--device", "toaster", "--eval-images", "40")
    cli("run", *wanted, "--out", str(out))
    row = next(r for r in read_report(out).artifacts if r.scheme == "w8a8")
    assert row.runtime == "fake"
    assert row.accuracy.outcome == "measured"
    assert row.latency[0].device == "toaster"
    assert row.latency[0].speedup == 2.0
    assert (out / "pages" / "toaster.md").is_file()

    facts = {row["device"]: row for row in json.loads(cli("devices", "--json"))}
    assert facts["shelf:lower"]["usable"]
    assert facts["shelf:lower"]["kind"] == "emulated"

    # A device of a family joins the report; what was measured elsewhere stays in it.
    (tmp_path / "lab.toml").write_text('[a]\ndevice = "shelf:upper"\n[b]\ndevice = "shelf:lower"\n')
    cli("bench", str(out), "--device", "all", "--inventory", str(tmp_path / "lab.toml"))
    row = next(r for r in read_report(out).artifacts if r.scheme == "w8a8")
    assert [one.device for one in row.latency] == ["toaster", "shelf:upper", "shelf:lower"]
    assert row.latency[0].speedup == 2.0
    counted = row.latency[2]
    assert (counted.instructions, counted.float_instructions) == (1001, 4001)
    assert counted.instruction_ratio == 1001 / 4001
    assert (counted.wall_p50_ms, counted.speedup, counted.n) == (None, None, 2)
    page = (out / "pages" / "shelf-lower.md").read_text()
    assert "0.25×" in page
    assert "kernel 99.90 %" in page
    told = {(r.device, r.scheme): (r.ms, r.ops) for r in read_report(out).breakdowns}
    assert told["shelf:lower", "w8a8"] == ({"gelu": 3.0}, {"gelu": 2})
    assert len(told) == 4

    cli("verify", str(out), "--device", "shelf:upper", "--images", "8")
    report = read_report(out)
    rows = {r.against: r for r in report.parity if r.scheme == "w8a8"}
    assert {r.device for r in report.parity} == {"shelf:upper"}
    # On this host the fake says 3 to everything, with a lead of one.
    assert rows["host"].n == 8
    assert rows["host"].top1_agreement == 0.75
    assert rows["host"].max_abs_logit_diff == 5.0
    assert rows["host"].largest_flip_margin == 1.0
    assert rows["reference"].diff_over_error is not None
    assert next(r for r in report.artifacts if r.scheme == "w8a8").latency[1:] == row.latency[1:]
    assert "the same artifact on the host" in (out / "pages" / "shelf-upper.md").read_text()
