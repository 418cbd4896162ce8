"""ONNX: a convolution that reads integers and writes floats is a linear layer on its windows."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from calib.collect import collect
from pipeline.convnext import seeded
from pipeline.fold import fold
from pipeline.quantize import Given, quantize
from pipeline.records import Architecture, Export, Preprocessing, Scheme, Wanted
from targets.base import NotRun, runtime
from targets.export import metadata
from targets.graph import Graph, QuantizePair
from targets.runtimes.reference import evaluate
from targets.translate import build_graph

Batch = int | Literal["dynamic"]
NET = Architecture(depths=(1, 1, 1), dims=(8, 16, 24), classes=5)
ONNX = runtime("onnx")


def graph_of(
    side: int, batch: Batch, placement: str = "pointwise-downsample", scheme: Scheme = "w8a8"
) -> tuple[Graph, np.ndarray]:
    pixels = 255 * torch.rand(8, 3, side, side, generator=torch.Generator().manual_seed(0)).numpy()
    how = Preprocessing(input_size=side)
    folded = fold(seeded(NET, 0), how)
    given = Given(folded=folded, statistics=collect(folded, [pixels]), sample=pixels)
    wanted = Wanted(scheme=scheme, placement=placement)
    record, arrays = quantize(given, how, wanted, labels=None, parents={})
    export = Export(
        runtime="onnx",
        scheme=scheme,
        placement=placement,
        graph_form=ONNX.capabilities.graph_forms[0],
        gelu="erf",
        profile="avx2",
        batch=batch,
    )
    return build_graph(record, arrays, ONNX.capabilities, export), pixels


@pytest.mark.parametrize("batch", [1, 8, "dynamic"])
@pytest.mark.parametrize("side", [32, 36, 60])  # 36 and 60: 9 and 15 places, of which one is left
def test_downsamples_are_linear_layers_on_their_windows(
    side: int, batch: Batch, tmp_path: Path
) -> None:
    graph, pixels = graph_of(side, batch)
    path = tmp_path / "model.onnx"
    ONNX.export(graph, path, metadata(graph.model, graph.export, ONNX.capabilities))
    proof = ONNX.prove(path, graph)
    downsamples = len(NET.depths) - 1
    assert proof.op_counts["QGemm"] == 2 * graph.blocks + downsamples
    assert proof.op_counts["Conv"] == graph.blocks + 1  # depthwise, and the stem
    assert proof.op_counts["QuantizeLinear"] == proof.op_counts["QGemm"]
    session, step = ONNX.load(path, threads=1), 1 if batch == 1 else 8
    logits = np.concatenate([session(pixels[i : i + step]) for i in range(0, 8, step)])
    expected = evaluate(graph, pixels)
    error = np.abs(logits - expected).max(axis=1) / np.abs(expected).max()
    assert np.median(error) < 1e-5
    assert error.max() < 1e-2  # float noise may move a value of an image across a tie


def test_a_crop_is_a_change_of_layout_and_no_layernorm(tmp_path: Path) -> None:
    graph, pixels = graph_of(36, 1)
    path = tmp_path / "model.onnx"
    ONNX.export(graph, path, "{}")
    found = ONNX.op_times(path, pixels[:1], threads=1, inferences=1)
    assert not isinstance(found, NotRun)
    kinds = {(one.op, one.kind) for one in found if "downsample" in one.name}
    assert kinds == {
        ("Reshape", "layout"),
        ("Slice", "layout"),
        ("Transpose", "layout"),
        ("LayerNormalization", "layernorm"),
        ("QuantizeLinear", "quantize"),
        ("QGemm", "convolution"),
    }


@pytest.mark.parametrize(
    ("placement", "scheme", "op"),
    [
        ("dense", "w8a8", "QLinearConv"),  # it writes integers
        ("pointwise-downsample", "w8a8-dynamic", "Conv"),  # no site says what it reads
        ("pointwise-downsample", "w8", "Conv"),
    ],
)
def test_other_downsamples_stay_convolutions(
    placement: str, scheme: Scheme, op: str, tmp_path: Path
) -> None:
    graph, pixels = graph_of(32, 8, placement, scheme)
    path = tmp_path / "model.onnx"
    ONNX.export(graph, path, "{}")
    counts = ONNX.prove(path, graph).op_counts
    depthwise, stem = graph.blocks, 1
    others = depthwise if op == "QLinearConv" else 0
    assert counts[op] + others == depthwise + stem + len(NET.depths) - 1
    logits = ONNX.load(path, threads=1)(pixels)
    expected = evaluate(graph, pixels)
    assert np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()


def test_a_window_s_weights_are_the_record_s_integers(tmp_path: Path) -> None:
    graph, _ = graph_of(32, 1)
    path = tmp_path / "model.onnx"
    ONNX.export(graph, path, "{}")
    stored = {one.name: numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}
    for op in graph.weighted:
        if not op.name.endswith("downsample.conv"):
            continue
        assert op.integers is not None
        assert isinstance(graph[op.inputs[0]], QuantizePair)
        out, channels, height, width = op.integers.weight.shape
        found = stored[f"{op.name}.weight.q"].T.reshape(out, height, width, channels)
        assert (found.transpose(0, 3, 1, 2) == op.integers.weight).all()
        assert (stored[f"{op.name}.bias.q"] == op.integers.bias).all()
        assert np.abs(op.integers.weight).max() > 0
    assert sum("downsample.conv.weight.q" in name for name in stored) == len(NET.depths) - 1
