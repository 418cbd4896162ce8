"""A trained atto on emulated boards, as a user goes: run, bench, verify, and what the report says.

OpenVINO is tested on the embedded model, in test_emulated_arm64.py: its minutes of emulation would
double this test.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.records import Latency, Parity
from pipeline.worker import silent
from reports.document import Report, read_report
from targets.devices.emulated_arm64.device import DEVICES

pytestmark = pytest.mark.acceptance

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("CONVNEXT_EDGE_DATA", ROOT.parent / "shared" / "data"))
RUNTIMES, SCHEMES = ("onnx", "tflite"), ("float", "w8a8")
PI4, PI5 = "emulated-arm64:pi4", "emulated-arm64:pi5"
IMAGES = 100
MOST = {"float": 1e-5, "w8a8": 0.05}
"""Largest difference of a logit: they reach 5."""
OVER_ERROR = {"pointwise": 1 / 3, "pointwise-io": 0.4}
"""Of what quantization changes; a third was asked, see docs/devices/emulated-arm64.md."""


def call(*words: str) -> None:
    """Run the command line to a successful end."""
    command = [sys.executable, "-P", "-m", "pipeline.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    DEVICES.setup(silent)
    out = tmp_path_factory.mktemp("atto")
    words = ["--checkpoint", str(DATA / "convnext_atto_cifar10_64.pth")]
    words += ["--data", str(DATA / "cifar10.zip"), "--runtimes", ",".join(RUNTIMES)]
    words += ["--isa", "arm", "--tune", "off", "--no-bench", "--calibration-images", "64"]
    call("run", *words, "--eval-images", str(IMAGES), "--out", str(out))
    call("bench", str(out), "--device", PI4, "--device", PI5)
    call("verify", str(out), "--device", PI5, "--images", str(IMAGES))
    return out


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    return read_report(folder)


def test_both_boards_instructions_join_the_report(report: Report) -> None:
    counted: dict[tuple[str, str, str], Latency] = {
        (row.runtime, row.scheme, latency.device): latency
        for row in report.artifacts
        for latency in row.latency
        if latency.outcome == "measured"
    }
    assert set(counted) == set(itertools.product(RUNTIMES, SCHEMES, (PI4, PI5)))
    for (runtime, scheme, board), latency in counted.items():
        assert latency.kind == "emulated"
        assert latency.instructions
        assert latency.instruction_spread is not None
        assert latency.instruction_spread < 1e-3
        assert latency.wall_p50_ms is latency.cpu_p50_ms is latency.speedup is None
        if scheme == "w8a8":
            floating = counted[runtime, "float", board].instructions
            assert latency.float_instructions == floating
            assert floating is not None
            assert latency.instructions < floating


def test_outputs_join_the_report_and_are_the_reference_s_and_the_host_s(report: Report) -> None:
    rows: dict[tuple[str, str, str | None], Parity] = {
        (row.runtime, row.scheme, row.against): row for row in report.parity
    }
    assert len(rows) == len(report.parity)
    assert set(rows) == set(itertools.product(RUNTIMES, SCHEMES, ("reference", "host")))
    placements = {row.runtime: row.placement for row in report.artifacts if row.scheme == "w8a8"}
    assert placements == {"onnx": "pointwise", "tflite": "pointwise-io"}
    for (runtime, scheme, _), row in rows.items():
        assert (row.device, row.outcome, row.kind, row.n) == (PI5, "measured", "emulated", IMAGES)
        assert row.max_abs_logit_diff is not None
        assert row.max_abs_logit_diff < MOST[scheme]
        # Arithmetic gives this one: it is the line above that binds.
        assert (row.largest_flip_margin or 0) <= 2 * row.max_abs_logit_diff
        if scheme == "w8a8":
            assert row.diff_over_error is not None
            assert row.diff_over_error <= OVER_ERROR[placements[runtime]]


@pytest.mark.parametrize("board", [PI4, PI5])
def test_the_board_has_its_page(folder: Path, board: str) -> None:
    page = (folder / "pages" / f"{board.replace(':', '-')}.md").read_text()
    assert f" on {board}\n" in page.partition("\n\n")[0] + "\n"
    assert "## Instructions" in page
    assert ("## Outputs" in page) == (board == PI5)
