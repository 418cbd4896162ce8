"""What benchmarks/accuracy.py concludes from its rows, and the networks that it hands to tools."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.accuracy_networks import (
    as_published,
    tensorflow_function,
    without_layer_scale,
)
from benchmarks.accuracy_table import say, summary, verdicts
from pipeline.convnext import ConvNeXt, seeded
from pipeline.records import Architecture

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "accuracy.py"
V1 = Architecture(depths=(1, 2), dims=(8, 16), classes=5)
V2 = Architecture(depths=(1, 1), dims=(8, 16), classes=5, layer_scale=False, grn=True)


def draw(seed: int, decibels: float | None) -> dict[str, Any]:
    return {
        "seed": seed,
        "top1": 0.7 + seed / 100,
        "drop_pp": -seed,
        "agreement_with_float": 0.9,
        "sqnr_db": decibels,
    }


def row(method: str, *decibels: float | None, **more: Any) -> dict[str, Any]:
    measured = summary([draw(seed, value) for seed, value in enumerate(decibels)])
    stated = {"runtime": "onnx", "method": method, "ours": method == "ours", "scheme": "w8a8"}
    return {**stated, "placement": None, "outcome": "measured", **measured, **more}


def test_a_summary_has_medians_and_the_ends_of_the_sqnr() -> None:
    found = summary([draw(0, 30.0), draw(1, 28.0), draw(2, 33.0)])
    assert (found["sqnr_db"], found["spread"], found["top1"]) == (30.0, [28.0, 33.0], 0.71)
    assert [item["seed"] for item in found["draws"]] == [0, 1, 2]


def test_one_draw_has_no_spread_and_no_error_is_not_a_number() -> None:
    found = summary([draw(0, None)])
    assert (found["sqnr_db"], found["spread"]) == (None, None)
    assert summary([draw(0, None), draw(1, 40.0), draw(2, 41.0)])["spread"] == [40.0, None]


@pytest.mark.parametrize(
    ("ours", "ahead", "beyond"),
    [((31.0, 32.0), True, True), ((28.0, 34.0), True, False), ((20.0, 22.0), False, False)],
)
def test_ours_is_held_against_the_best_peer(
    ours: tuple[float, ...], *, ahead: bool, beyond: bool
) -> None:
    peers = [row("poor", 10.0, 12.0), row("best", 28.0, 30.0, cpu_p50_ms=2.0)]
    [verdict] = verdicts([*peers, row("ours", *ours, cpu_p50_ms=1.0)])
    assert (verdict["peer"], verdict["ahead"], verdict["beyond_spread"]) == ("best", ahead, beyond)
    assert verdict["cpu_ratio"] == 0.5
    assert "best" in say(verdict)


def test_one_draw_of_each_says_nothing_of_the_spread() -> None:
    [verdict] = verdicts([row("tool", 20.0), row("ours", 30.0)])
    assert (verdict["by_db"], verdict["beyond_spread"]) == (10.0, None)
    assert say(verdict) == "+10.0 dB on tool, one draw"


def test_only_the_same_runtime_and_scheme_are_compared() -> None:
    others = [
        row("tool", 50.0, runtime="tflite"),
        row("tool", 50.0, scheme="w8a8-dynamic"),
        row("tool", 50.0, outcome="failed"),
        row("tool", 50.0, scheme="float"),
    ]
    [verdict] = verdicts([*others, row("ours", 30.0)])
    assert verdict["peer"] is None
    assert say(verdict) == "no peer in this scheme"


def test_an_artifact_without_error_is_ahead() -> None:
    [verdict] = verdicts([row("tool", 20.0, 21.0), row("ours", None, None)])
    assert (verdict["ahead"], verdict["by_db"], verdict["beyond_spread"]) == (True, None, True)


def images(network: ConvNeXt) -> torch.Tensor:
    return torch.randn(2, network.architecture.in_channels, 32, 32, generator=torch.manual_seed(0))


@pytest.mark.parametrize("net", [V1, V2])
@torch.inference_mode()
def test_the_published_form_computes_the_same(net: Architecture) -> None:
    network = seeded(net, 0)
    expected = network(images(network))
    assert torch.allclose(as_published(network)(images(network)), expected, atol=1e-5)


@torch.inference_mode()
def test_folding_layer_scale_alone_computes_the_same() -> None:
    network = seeded(V1, 0)
    folded = without_layer_scale(network)
    assert not any(name.endswith("scale.weight") for name in folded.state_dict())
    assert torch.allclose(folded(images(network)), network(images(network)), atol=1e-5)


@pytest.mark.parametrize(
    "net",
    [V1, V2, Architecture(depths=(1,), dims=(8,), classes=5, stem="overlap_act", stem_width=6)],
)
@torch.inference_mode()
def test_the_network_in_tensorflow_computes_the_same(net: Architecture) -> None:
    pytest.importorskip("tensorflow")
    network = seeded(net, 0)
    image = images(network)
    found = tensorflow_function(network)(image.permute(0, 2, 3, 1).numpy()).numpy()
    assert np.allclose(found, network(image).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--checkpoint", "missing.pth", "--data", "digits"], "no such checkpoint"),
        (["--checkpoint", "missing.pth", "--data", "digits", "--draws", "0"], "--draws is 0"),
        (["--checkpoint", "missing.pth", "--data", "digits", "--images", "0"], "eval_images"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_file(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    command = [sys.executable, str(PROGRAM), *arguments, "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode in {1, 2}
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
