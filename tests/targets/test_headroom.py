"""The integers of the avx2 profile are exact on the worst inputs, and only where they need to be.

Each layer is made of weights at their limits and read by pixels at theirs: what a kernel that adds
two u8 x s8 products in int16 cannot hold, shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib.collect import collect
from pipeline.convnext import layers, seeded
from pipeline.fold import fold
from pipeline.quantize import Given, quantize
from pipeline.records import PROFILE_OF_ISA, Architecture, Export, Preprocessing, Profile
from targets.base import runtimes
from targets.devices.local import host_isa
from targets.export import metadata
from targets.graph import Graph
from targets.runtimes.reference import evaluate
from targets.translate import build_graph

SIZE = 32
NET = Architecture(depths=(1, 1), dims=(8, 16), classes=4)
SATURATING = ("onnx", "openvino")


def worst(
    profile: Profile, name: str, placement: str
) -> tuple[Graph, np.ndarray[Any, np.dtype[np.float32]]]:
    """A network whose every weight is at its row's limit, and images at 0 and 255."""
    generator = torch.Generator().manual_seed(0)
    model = seeded(NET, 0)
    with torch.no_grad():
        for _, _, module in layers(model):
            # Mostly of one sign, so that neighbours add up.
            signs = torch.rand(module.weight.shape, generator=generator).sub_(0.2).sign_()
            module.weight.copy_(signs * 0.05)
    how = Preprocessing(input_size=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3)
    folded = fold(model, how)
    images = 255 * torch.randint(0, 2, (8, 3, SIZE, SIZE), generator=generator).float().numpy()
    given = Given(folded=folded, statistics=collect(folded, [images]), sample=images)
    record, arrays = quantize(given, how, labels=None, parents={})
    can = runtimes()[name].capabilities
    export = Export(
        runtime=name,
        scheme="w8a8",
        placement=placement,
        graph_form=can.graph_forms[0],
        gelu=can.gelu,
        profile=profile,
    )
    return build_graph(record, arrays, can, export), images


def error_of(profile: Profile, name: str, folder: Path, placement: str = "all") -> float:
    target = runtimes()[name]
    graph, images = worst(profile, name, placement)
    path = folder / f"model{target.capabilities.suffix}"
    target.export(graph, path, metadata(graph.model, graph.export, target.capabilities))
    session = target.load(path, threads=1)
    logits = np.concatenate([session(image[None]) for image in images])
    expected = evaluate(graph, images)
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("placement", ["pointwise-downsample", "all"])
@pytest.mark.parametrize("name", SATURATING)
def test_the_profile_of_avx2_is_exact_on_the_worst_inputs(
    name: str, placement: str, tmp_path: Path
) -> None:
    assert error_of("avx2", name, tmp_path, placement) < 0.02


@pytest.mark.parametrize("name", SATURATING)
def test_the_worst_inputs_are_bad_enough(name: str, tmp_path: Path) -> None:
    """The full profile overflows here where it can, or the test above could not fail."""
    error = error_of("full", name, tmp_path)
    if PROFILE_OF_ISA[host_isa()] == "avx2":
        assert error > 0.05
    else:
        assert error < 0.02
