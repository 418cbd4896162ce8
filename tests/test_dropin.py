"""A new runtime is one new file, a new device one file or folder: they go through `run`."""

from __future__ import annotations

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
    out = tmp_path / "run"
    command = [sys.executable, "-P", "-m", "pipeline.cli", "run", "--runtimes", "fake"]
    command += ["--device", "toaster", "--eval-images", "40", "--out", str(out)]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    row = next(r for r in read_report(out).artifacts if r.scheme == "w8a8")
    assert row.runtime == "fake"
    assert row.accuracy.outcome == "measured"
    assert row.latency[0].device == "toaster"
    assert row.latency[0].speedup == 2.0
    assert (out / "pages" / "toaster.md").is_file()
