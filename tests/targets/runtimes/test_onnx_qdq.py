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
from pipeline.records import Architecture, Export, Preprocessing
from targets.base import runtime
from targets.export import metadata
from targets.graph import Graph, QuantizePair
from targets.runtimes.reference import evaluate
from targets.translate import build_graph

Batch = int | Literal["dynamic"]
NET = Architecture(depths=(1, 1, 1), dims=(8, 16, 24), classes=5)
ONNX = runtime("onnx")


def graph_of(side: int, batch: Batch) -> tuple[Graph, np.ndarray]:
    pixels = 255 * torch.rand(8, 3, side, side, generator=torch.Generator().manual_seed(0)).numpy()
    how = Preprocessing(input_size=side)
    folded = fold(seeded(NET, 0), how)
    given = Given(folded=folded, statistics=collect(folded, [pixels]), sample=pixels)
    record, arrays = quantize(given, how, labels=None, parents={})
    export = Export(
        runtime="onnx",
        scheme="w8a8",
        placement="pointwise-downsample",
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
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


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
