"""A network from every dialect that can express it, through `run`, to all four formats."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.checkpoint import save
from pipeline.convert import convert
from pipeline.convnext import SIZES, seeded
from pipeline.records import Architecture
from reports.document import read_report

pytestmark = pytest.mark.acceptance

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("CONVNEXT_EDGE_DATA", ROOT.parent / "shared" / "data"))
RUNTIMES = ("onnx", "openvino", "tflite", "coreml")


def network(size: str, *, v2: bool = False) -> Architecture:
    depths, dims = SIZES[size]
    return Architecture(depths=depths, dims=dims, classes=10, grn=v2, layer_scale=not v2)


NETWORKS = {
    "atto": network("atto"),
    "tiny": network("tiny"),
    "v2-atto": network("atto", v2=True),
}
EXPRESSES = {
    "atto": ("own", "meta", "timm", "torchvision", "hf"),
    "tiny": ("own", "meta", "timm", "torchvision", "hf"),
    "v2-atto": ("own", "meta", "timm", "hf"),
}


@pytest.mark.parametrize(
    ("name", "dialect"), [(name, dialect) for name in NETWORKS for dialect in EXPRESSES[name]]
)
def test_runs_to_four_formats(name: str, dialect: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved.safetensors"
    save(saved, seeded(NETWORKS[name], seed=4), labels=None)
    named = {"own": "own.safetensors", "hf": "folder"}
    checkpoint = tmp_path / named.get(dialect, f"{dialect}.pth")
    convert(saved, dialect, checkpoint)
    words = ["--checkpoint", str(checkpoint), "--data", str(DATA / "photos200.zip")]
    words += ["--calibration-images", "8", "--input-size", "64", "--no-bench"]
    command = [sys.executable, "-P", "-m", "pipeline.cli", "run", *words]
    command += ["--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]

    report = read_report(tmp_path / "run")
    assert (report.model.dialect, report.model.variant) == (dialect, name)
    assert {(row.runtime, row.scheme) for row in report.artifacts} == set(
        itertools.product(RUNTIMES, ("float", "w8a8"))
    )
    # One calibration and one quantization serve all four formats.
    for stage in ("calibrate", "quantize"):
        assert len(list((tmp_path / "run" / "stages").glob(f"{stage}-*"))) == 1
    blocks = sum(NETWORKS[name].depths)
    for row in report.artifacts:
        assert row.proof is not None
        # The pointwise placement: two layers a block.
        assert row.proof.integer_layers == (2 * blocks if row.scheme == "w8a8" else 0)
    # However it was named, it is the same network.
    tensors = load_file(tmp_path / "run" / "model" / "tensors.safetensors")
    weights = seeded(NETWORKS[name], seed=4).stages[1].blocks[0].depthwise.weight  # type: ignore[index, union-attr]
    held = tensors["float/stages.1.blocks.0.depthwise.weight"]
    assert np.array_equal(held, weights.detach().numpy())
