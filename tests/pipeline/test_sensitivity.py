"""Sensitivity: what a group is said to lose is what it loses alone, however it is computed."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import softmax
from scipy.stats import entropy

from calib.batches import some_pixels
from pipeline.quantize import sample_size, write
from pipeline.records import Preprocessing, QuantizedModel, Selection, Sensitivity
from pipeline.sensitivity import reference_graph, sensitivities, sensitivity_stage
from pipeline.statistics import divergence, sqnr_db
from pipeline.worker import silent
from targets.runtimes.reference import evaluate

Model = tuple[QuantizedModel, dict[str, Any]]


@pytest.fixture(scope="module")
def found(small_model: Model, pixels: NDArray[np.float32]) -> dict[tuple[str, str], Sensitivity]:
    rows = sensitivities(*small_model, "full", pixels, silent)
    return {(row.kind, row.name): row for row in rows}


def test_every_layer_and_every_block_of_several_is_there(
    found: dict[tuple[str, str], Sensitivity],
) -> None:
    blocks = [name for kind, name in found if kind == "block"]
    layers = [name for kind, name in found if kind == "layer"]
    assert blocks == ["stages.0.blocks.0", "stages.1.blocks.0"]
    inner = [f"{block}.{part}" for block in blocks for part in ("depthwise", "pw1", "pw2")]
    assert sorted(layers) == sorted([*inner, "stem.conv", "stages.1.downsample.conv", "head.fc"])
    block = found["block", blocks[0]]
    assert block.layers == tuple(inner[:3])
    assert block.macs == sum(found["layer", layer].macs for layer in inner[:3])


@pytest.mark.parametrize(
    ("kind", "name"), [("layer", "stages.0.blocks.0.pw2"), ("block", "stages.1.blocks.0")]
)
def test_a_group_loses_what_it_loses_alone(
    small_model: Model,
    pixels: NDArray[np.float32],
    found: dict[tuple[str, str], Sensitivity],
    kind: str,
    name: str,
) -> None:
    record, arrays = small_model
    every = [layer for row, layer in found if row == "layer"]
    row = found[kind, name]

    def logits(floats: list[str]) -> NDArray[np.float32]:
        kept = replace(record, float_layers=tuple(floats))
        return evaluate(reference_graph(kept, arrays, "full"), pixels)

    nothing = logits(every)
    alone = logits([layer for layer in every if layer not in row.layers])
    assert row.sqnr_db == pytest.approx(sqnr_db(nothing, alone), abs=1e-3)
    p, q = (softmax(x.astype(float), axis=1) for x in (nothing, alone))
    assert row.kl == pytest.approx(float(np.mean(entropy(p, q, axis=1))), rel=1e-2)


def test_macs_are_positions_times_weights(found: dict[tuple[str, str], Sensitivity]) -> None:
    # 32 px, patch 4: 8 x 8 positions of 8 channels, expanded four times.
    row = found["layer", "stages.0.blocks.0.pw1"]
    assert (row.macs, row.weights) == (64 * 8 * 32, 8 * 32)
    # The head reads one position.
    assert found["layer", "head.fc"].macs == 16 * 6


def test_sites_are_those_that_the_group_needs(
    found: dict[tuple[str, str], Sensitivity],
) -> None:
    assert found["layer", "stages.0.blocks.0.pw1"].sites == (
        "stages.0.blocks.0.ln_out",
        "stages.0.blocks.0.gelu_in",
    )


def test_a_layer_with_coarse_weights_loses_most(
    small_model: Model, pixels: NDArray[np.float32]
) -> None:
    record, arrays = small_model
    coarse = dict(arrays)
    name = "full/stages.1.blocks.0.pw1.weight"
    coarse[name] = (arrays[name] // 64 * 64).astype(np.int8)
    rows = sensitivities(record, coarse, "full", pixels, silent)
    layers = [row for row in rows if row.kind == "layer" and row.sqnr_db is not None]
    assert min(layers, key=lambda row: row.sqnr_db or 0).name == "stages.1.blocks.0.pw1"


def test_the_stage_looks_at_a_few_images_that_chose_nothing(
    small_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_out: list[int] = []

    def spied(*arguments: Any, after: int) -> NDArray[np.float32]:
        left_out.append(after)
        return some_pixels(*arguments, after=after)

    monkeypatch.setattr("pipeline.sensitivity.some_pixels", spied)
    write(tmp_path, *small_model)
    how = Preprocessing(input_size=32, crop_ratio=1.0)
    chosen = Selection(where="digits", purpose="calibration", n=5, seed=0)
    made = sensitivity_stage(str(tmp_path), asdict(chosen), asdict(how), "avx2", "", silent)
    assert made["images"] == 5
    assert left_out == [sample_size(how)]
    assert len(made["sensitivities"]) == 11


def test_divergence_is_zero_only_without_any_difference() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    assert divergence(logits, logits) == 0.0
    assert divergence(logits, logits + 3) == pytest.approx(0.0, abs=1e-9)
    p, q = softmax(logits, axis=1), softmax(-logits, axis=1)
    expected = float(np.mean(entropy(p, q, axis=1)))
    assert divergence(logits, -logits) == pytest.approx(expected, rel=1e-6)
