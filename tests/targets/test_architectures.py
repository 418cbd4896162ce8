"""Every architecture through every runtime that is discovered, as the reference computes it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib.collect import collect
from pipeline.convnext import Site, empty, seeded, variant
from pipeline.fold import fold
from pipeline.quantize import Given, quantize
from pipeline.records import Architecture, Export, Preprocessing, QuantizedModel, Scheme
from pipeline.trace import structure, trace
from targets.base import Runtime, placement_of, runtimes
from targets.export import metadata
from targets.graph import Graph, QuantizePair, ResponseNorm
from targets.runtimes.reference import evaluate
from targets.translate import build_graph

SIZE = 64
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "v2": {"grn": True, "layer_scale": False},
    "overlapping stem": {"stem": "overlap", "stem_width": 8},
    "overlapping stem with activation": {"stem": "overlap_act", "stem_width": 16},
    "head norm first": {"head_norm_first": True},
    "mlp head": {"head_width": 24},
    "patch 2": {"patch": 2, "downsample_first": True},
    "isotropic": {
        "depths": (2,),
        "dims": (16,),
        "patch": 16,
        "stem_norm": False,
        "layer_scale": False,
    },
    "grey": {"in_channels": 1},
    "kernel 5, expansion 3": {"kernel": 5, "expansion": 3},
    "kernel 9": {"kernel": 9},
    "another eps": {"norm_eps": 1e-3, "head_norm_eps": 1e-1},
}
RUNTIMES = sorted(runtimes())
CASES = [
    (name, form, scheme)
    for name in RUNTIMES
    for index, form in enumerate(runtimes()[name].capabilities.graph_forms)
    # Of a form that is not the default the widest placement: the others are part of it.
    for scheme in (("float", "pointwise", "all") if index == 0 else ("all",))
]


def architecture(feature: str) -> Architecture:
    plain: dict[str, Any] = {"depths": (1, 2), "dims": (16, 32), "classes": 5}
    return Architecture(**{**plain, **FEATURES[feature]})


def images(channels: int, n: int = 8) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Smooth images, as photographs are: noise alone would leave all logits alike."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(n, channels, 5, 5, generator=generator) * 255
    fine = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic")
    return fine.clamp(0, 255).numpy()


@functools.cache
def quantized(feature: str) -> tuple[QuantizedModel, dict[str, np.ndarray[Any, Any]]]:
    """Quantize a network once for every runtime, form and placement; nobody changes the arrays."""
    net = architecture(feature)
    grey: dict[str, Any] = {"mean": (0.5,), "std": (0.25,)} if net.in_channels == 1 else {}
    how = Preprocessing(input_size=SIZE, **grey)
    folded = fold(seeded(net, 3), how)
    sample = images(net.in_channels)
    given = Given(folded=folded, statistics=collect(folded, [sample]), sample=sample)
    return quantize(given, how, labels=None, parents={})


def graph_of(
    feature: str, target: Runtime, scheme: Scheme, placement: str, form: str | None = None
) -> Graph:
    record, arrays = quantized(feature)
    can = target.capabilities
    export = Export(
        runtime=target.name,
        scheme=scheme,
        placement=placement_of(target, placement) if scheme != "float" else placement,
        graph_form=form or can.graph_forms[0],
        gelu=can.gelu,
        profile="avx2" if scheme == "w8a8" else None,
    )
    return build_graph(record, dict(arrays), can, export)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("name", "form", "scheme"), CASES)
def test_artifact_computes_what_the_reference_computes(
    name: str, form: str, feature: str, scheme: str, tmp_path: Path
) -> None:
    target = runtimes()[name]
    of: tuple[Scheme, str] = ("float", "none") if scheme == "float" else ("w8a8", scheme)
    graph = graph_of(feature, target, *of, form)
    path = tmp_path / f"model{target.capabilities.suffix}"
    target.export(graph, path, metadata(graph.model, graph.export, target.capabilities))
    proof = target.prove(path, graph)
    assert proof.integer_layers == proof.expected_integer_layers
    assert (proof.integer_layers > 0) == (scheme != "float")
    if target.can_run() is not None:
        return
    batch = images(graph.model.architecture.in_channels)
    session = target.load(path, threads=1)
    logits = np.concatenate([session(image[None]) for image in batch])
    expected = evaluate(graph, batch)
    spread = np.abs(expected - expected.mean(axis=0)).max()
    assert spread > 0.005 * np.abs(expected).max(), "the images must not all look alike"
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    assert error < (1e-4 if scheme == "float" else 0.02)


@pytest.mark.parametrize("name", RUNTIMES)
def test_grn_stays_float_and_what_follows_has_a_site_of_its_own(name: str) -> None:
    graph = graph_of("v2", runtimes()[name], "w8a8", "all")
    norms = [op for op in graph.ops if isinstance(op, ResponseNorm)]
    assert len(norms) == graph.blocks
    for norm in norms:
        (site,) = graph.users(norm.name)
        assert isinstance(site, QuantizePair)
        assert site.name.endswith(".grn_out")
        assert [reader.name for reader in graph.users(site.name)] == [
            norm.name.removesuffix("grn") + "pw2"
        ]
        (source,) = norm.inputs
        assert not isinstance(graph[source], QuantizePair), "GRN reads float"


@pytest.mark.parametrize("feature", FEATURES)
def test_every_layer_reads_a_site(feature: str) -> None:
    model = empty(architecture(feature), folded=True)
    graph, modules = trace(model)
    reads = structure(graph, modules).reads
    assert reads
    assert all(isinstance(modules[site], Site) for site in reads.values())


def test_named_variants() -> None:
    tiny: dict[str, Any] = {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768), "classes": 1000}
    assert variant(Architecture(**tiny)) == "tiny"
    assert variant(Architecture(**tiny, grn=True, layer_scale=False)) == "v2-tiny"
    assert variant(Architecture(**tiny, stem="overlap", stem_width=48)) == "tiny-ols"
    assert variant(Architecture(**tiny, head_norm_first=True)) == "tiny-hnf"
    assert variant(Architecture(**tiny, head_width=768)) == "tiny-mlp"
    assert variant(Architecture(**tiny, kernel=5)) == "custom"
    isotropic: dict[str, Any] = {"depths": (18,), "dims": (384,), "classes": 1000, "patch": 16}
    assert variant(Architecture(**isotropic, stem_norm=False)) == "isotropic-small"
    assert variant(Architecture(**isotropic)) == "custom"
