"""A new runtime is one new file, a new device one file or folder: they go through `run`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.store import PACKAGES
from reports.document import ArtifactRow, read_report

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
import os
from dataclasses import dataclass

import numpy as np

from targets.base import DeviceInfo, NotRun, OpTime, Samples


@dataclass
class Board:
    name: str

    def probe(self):
        if os.environ.get("SHELF") == "away":
            return NotRun(reason="the shelf is away")
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


Cli = Callable[..., str]


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Cli:
    """The command line of a tree with one more runtime, one more device and one more family."""
    tree = tmp_path_factory.mktemp("tree")
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

    def call(*words: str, code: int = 0, **variables: str) -> str:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pipeline.cli", *words],
            env={**os.environ, "PYTHONPATH": str(tree), **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr[-2000:]
        return done.stderr if code else done.stdout

    return call


@pytest.fixture(scope="module")
def out(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, measured on the toaster."""
    folder = tmp_path_factory.mktemp("run") / "run"
    wanted = ("--runtimes", "fake", "--device", "toaster", "--eval-images", "40")
    cli("run", *wanted, "--out", str(folder))
    return folder


def quantized(out: Path) -> ArtifactRow:
    return next(row for row in read_report(out).artifacts if row.scheme == "w8a8")


def test_one_file_each_goes_through_run(out: Path) -> None:
    row = quantized(out)
    assert row.runtime == "fake"
    assert row.accuracy.outcome == "measured"
    assert row.latency[0].device == "toaster"
    described = read_report(out).device("toaster")
    assert described is not None
    assert (described.description, described.kind) == ("a toaster", "device")
    assert row.latency[0].speedup == 2.0
    assert (out / "pages" / "toaster.md").is_file()


def test_a_family_s_devices_are_listed(cli: Cli) -> None:
    facts = {row["device"]: row for row in json.loads(cli("devices", "--json"))}
    assert facts["shelf:lower"]["usable"]
    assert facts["shelf:lower"]["kind"] == "emulated"


def test_a_family_s_devices_join_the_report(cli: Cli, out: Path, tmp_path: Path) -> None:
    (tmp_path / "lab.toml").write_text('[a]\ndevice = "shelf:upper"\n[b]\ndevice = "shelf:lower"\n')
    cli("bench", str(out), "--device", "all", "--inventory", str(tmp_path / "lab.toml"))
    row = quantized(out)
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


def test_outputs_on_a_device_are_held_against_this_host(cli: Cli, out: Path) -> None:
    cli("verify", str(out), "--device", "shelf:upper", "--images", "8")
    report = read_report(out)
    ours = [row for row in report.parity if row.device == "shelf:upper"]
    rows = {r.against: r for r in ours if r.scheme == "w8a8"}
    # On this host the fake says 3 to everything, with a lead of one.
    assert rows["host"].n == 8
    assert rows["host"].top1_agreement == 0.75
    assert rows["host"].max_abs_logit_diff == 5.0
    assert rows["host"].largest_flip_margin == 1.0
    assert rows["reference"].diff_over_error is not None
    assert quantized(out).latency[0].device == "toaster"
    assert "the same artifact on the host" in (out / "pages" / "shelf-upper.md").read_text()


def test_times_are_taken_again_where_that_is_asked(cli: Cli, out: Path) -> None:
    cli("bench", str(out))
    assert cli("bench", str(out)).startswith("0 stages made")
    assert cli("bench", str(out), "--again").startswith("1 stages made")
    cli("bench", str(out), "--device", "shelf:upper")
    made = cli("bench", str(out), "--device", "shelf:upper", "--again").splitlines()[0]
    assert made.startswith("1 stages made")


def test_the_run_s_own_device_is_no_other_place(cli: Cli, out: Path) -> None:
    cli("verify", str(out), "--device", "toaster")
    assert quantized(out).accuracy.outcome == "measured"
    assert not [row for row in read_report(out).parity if row.device == "toaster"]
    assert [one.device for one in quantized(out).latency].count("toaster") == 1


def test_a_device_that_is_away_keeps_what_it_gave(cli: Cli, out: Path) -> None:
    both = ("--device", "shelf:upper", "--device", "shelf:lower")
    cli("bench", str(out), *both)
    cli("verify", str(out), "--device", "shelf:upper", "--images", "8")
    before = read_report(out)
    said = cli("verify", str(out), "--device", "shelf:lower", SHELF="away", code=1)
    assert said.splitlines()[-1] == "failed: shelf:lower measured nothing: the shelf is away"
    report = read_report(out)
    latency = quantized(out).latency
    assert [one.outcome for one in latency] == ["measured", "measured", "not_run"]
    assert latency[2].reason == "the shelf is away"
    kept = [[r for r in one.parity if r.device == "shelf:upper"] for one in (report, before)]
    assert kept[0] == kept[1] != []
    missing = [r for r in report.parity if r.device == "shelf:lower"]
    assert [(r.outcome, r.reason) for r in missing] == [("not_run", "the shelf is away")] * 2
    # Nothing is chosen on it, so what was chosen before stays.
    layouts = (out / "layouts.json").read_bytes()
    said = cli("tune", str(out), "--device", "shelf:lower", SHELF="away", code=1)
    assert "error: nothing can be measured on shelf:lower: the shelf is away. Allowed: " in said
    assert (out / "layouts.json").read_bytes() == layouts
    assert '"device": "toaster"' in (out / "recipe.json").read_text()
    # Nobody asks for it: it is not asked anything, and what it gave stands.
    cli("bench", str(out), SHELF="away")
    assert [one.outcome for one in quantized(out).latency] == ["measured"] * 3
