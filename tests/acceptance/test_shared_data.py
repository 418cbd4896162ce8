"""The issue's figures on ../shared/data, through the command line as a user would type it."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.checkpoint import save
from pipeline.convnext import SIZES, seeded
from pipeline.records import Architecture
from reports.document import Report, read_report

pytestmark = pytest.mark.acceptance

RUNTIMES = ("onnx", "openvino", "tflite", "coreml")
ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("CONVNEXT_EDGE_DATA", ROOT.parent / "shared" / "data"))


def run(*arguments: str) -> str:
    """Run the command line to a successful end and return its standard output."""
    command = [sys.executable, "-P", "-m", "pipeline.cli", "run", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cifar")


def measured(folder: Path, *more: str) -> Report:
    run(
        "--checkpoint",
        str(DATA / "convnext_atto_cifar10_64.pth"),
        "--data",
        str(DATA / "cifar10.zip"),
        "--no-bench",
        "--out",
        str(folder),
        *more,
    )
    return read_report(folder)


@pytest.fixture(scope="module")
def cifar(folder: Path) -> Report:
    return measured(folder)


@pytest.fixture(scope="module")
def cifar_io(cifar: Report, folder: Path) -> Report:
    """The placement that tflite has by default, in coreml too; what `cifar` measured stays."""
    del cifar
    return measured(folder, "--runtimes", "tflite,coreml", "--placement", "pointwise-io")


def test_float_top1_is_that_of_the_sidecar(cifar: Report) -> None:
    assert cifar.float_result.n == 5000
    assert cifar.float_result.top1 == pytest.approx(0.7072, abs=0.001)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_w8a8_drop_lies_under_a_point(cifar: Report, runtime: str) -> None:
    row = next(r for r in cifar.artifacts if r.runtime == runtime and r.scheme == "w8a8")
    assert row.accuracy.n == 5000
    assert row.accuracy.drop_ci95_pp is not None
    assert row.accuracy.drop_ci95_pp[1] < 1.0
    assert row.proof is not None
    assert row.proof.integer_layers == row.proof.expected_integer_layers == 24


def test_runtimes_agree(cifar: Report) -> None:
    rows = {(r.a, r.b): r for r in cifar.agreement if r.scheme == "w8a8"}
    assert set(rows) == set(itertools.combinations(RUNTIMES, 2))
    for row in rows.values():
        interpreted = row.b == "coreml" and sys.platform != "darwin"
        assert row.kind == ("interpreted" if interpreted else "host")
        limit = 0.985 if row.profile_a == row.profile_b else 0.975
        assert row.top1_agreement >= limit, row


@pytest.mark.parametrize("other", ["onnx", "openvino"])
def test_coreml_is_within_a_tenth_of_a_point_of(cifar: Report, other: str) -> None:
    check_coreml_beside(cifar, other)


def test_coreml_is_within_a_tenth_of_a_point_of_tflite(cifar_io: Report) -> None:
    check_coreml_beside(cifar_io, "tflite")


def check_coreml_beside(report: Report, other: str) -> None:
    rows = {r.runtime: r for r in report.artifacts if r.scheme == "w8a8"}
    coreml, beside = rows["coreml"], rows[other]
    assert coreml.placement == beside.placement
    assert coreml.accuracy.n == beside.accuracy.n == 5000
    assert coreml.accuracy.kind == ("host" if sys.platform == "darwin" else "interpreted")
    assert coreml.accuracy.top1 == pytest.approx(beside.accuracy.top1, abs=0.001)
    assert coreml.accuracy.sqnr_db == pytest.approx(beside.accuracy.sqnr_db, abs=1)


def test_tiny_at_224_goes_to_four_formats_within_its_memory(tmp_path: Path) -> None:
    depths, dims = SIZES["tiny"]
    model = seeded(Architecture(depths=depths, dims=dims, classes=1000), seed=0)
    checkpoint = tmp_path / "tiny.safetensors"
    save(checkpoint, model, labels=None)
    arguments = (
        "--checkpoint",
        str(checkpoint),
        "--data",
        str(DATA / "photos200.zip"),
        "--calibration-images",
        "64",
        "--input-size",
        "224",
        "--no-bench",
        "--out",
        str(tmp_path / "run"),
    )
    run(*arguments)
    report = read_report(tmp_path / "run")
    assert {(r.runtime, r.scheme) for r in report.artifacts} == set(
        itertools.product(RUNTIMES, ("float", "w8a8"))
    )
    for row in report.artifacts:
        assert row.export_peak_memory_bytes is not None
        assert row.export_peak_memory_bytes < 3e9
        assert row.accuracy.outcome == "not_run"
    assert "0 stages made" in run(*arguments)
