"""TFLite: what XNNPACK leaves to LiteRT is counted, in the proof and by the profiler."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from calib.collect import collect
from pipeline.convnext import seeded
from pipeline.fold import fold
from pipeline.quantize import Given, quantize
from pipeline.records import Architecture, Export, Preprocessing, Scheme, Wanted
from targets.base import NotRun, runtime
from targets.breakdown import by_kind
from targets.export import metadata
from targets.translate import build_graph

NET = Architecture(depths=(1, 2), dims=(8, 16), classes=5)
BLOCKS, SIDE = 3, 32
TFLITE = runtime("tflite")


@pytest.mark.parametrize(
    ("scheme", "placement", "left"),
    # Between two integer layers it computes GELU on a table of its own, which XNNPACK has not.
    [("float", "none", 0), ("w8a8", "pointwise-io", BLOCKS)],
)
def test_what_xnnpack_leaves_is_a_fallback(
    scheme: Scheme, placement: str, left: int, tmp_path: Path
) -> None:
    pixels = 255 * torch.rand(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).numpy()
    how = Preprocessing(input_size=SIDE)
    folded = fold(seeded(NET, 0), how)
    given = Given(folded=folded, statistics=collect(folded, [pixels]), sample=pixels)
    record, arrays = quantize(given, how, Wanted(), labels=None, parents={})
    can = TFLITE.capabilities
    export = Export(
        runtime="tflite",
        scheme=scheme,
        placement=placement,
        graph_form=can.graph_forms[0],
        gelu=can.gelu,
        profile=None if scheme == "float" else "full",
    )
    graph, path = build_graph(record, arrays, can, export), tmp_path / "model.tflite"
    TFLITE.export(graph, path, metadata(record, export, can))
    assert TFLITE.prove(path, graph).fallback_ops_per_block == left / BLOCKS
    image = np.zeros((1, 3, SIDE, SIDE), np.float32)
    found = TFLITE.op_times(path, image, threads=1, inferences=2)
    assert not isinstance(found, NotRun)
    assert [one.kind for one in found if one.is_fallback] == ["gelu"] * left
    told = by_kind(found)
    assert told["fallback_ops"] == left
    assert told["fallback_ms"] == sum(one.ms for one in found if one.is_fallback)
    assert (told["fallback_ms"] > 0) == (left > 0)
