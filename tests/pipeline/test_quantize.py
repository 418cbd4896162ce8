"""Quantization: rescaling keeps the function, and the search beats the plain grids."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import pipeline.quantize as quantize_module
from calib.collect import collect
from calib.layer import IntegerLayer, Unrounded
from calib.layer import rounded as rounding_of
from pipeline.arithmetic import LEAST_DIVISOR
from pipeline.convnext import ConvNeXt, seeded
from pipeline.fold import fold
from pipeline.quantize import Given, quantize
from pipeline.records import (
    PROFILES,
    Architecture,
    Calibration,
    Export,
    Preprocessing,
    Profile,
    QuantizedModel,
    Scheme,
    Wanted,
)
from pipeline.statistics import sqnr_db
from targets.base import runtimes
from targets.graph import Graph, QuantizePair, Scale
from targets.runtimes.reference import evaluate
from targets.translate import build_graph

SIZE = 32
NET = Architecture(depths=(2, 2), dims=(16, 32), classes=6)
HOW = Preprocessing(input_size=SIZE)
OUTLIER = 60.0


def network(*, outliers: bool) -> ConvNeXt:
    """A seeded network; with some channels of the stream and of every LayerNorm much larger."""
    model = seeded(NET, 0)
    if outliers:
        tensors = model.state_dict()
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name.endswith(("norm.weight", "norm.bias")) and tensor.ndim == 1:
                    tensor[:2] *= OUTLIER
                if name.endswith("depthwise.bias"):
                    tensor[3] += 20
    return fold(model, HOW)


def images(n: int, seed: int) -> NDArray[np.float32]:
    generator = torch.Generator().manual_seed(seed)
    coarse = 255 * torch.rand(n, 3, 4, 4, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic")
    return fine.clamp(0, 255).numpy()


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "outliers"])
def given(request: pytest.FixtureRequest) -> Given:
    folded = network(outliers=request.param)
    sample = images(64, seed=1)
    return Given(folded=folded, statistics=collect(folded, [sample]), sample=sample)


def graph(
    record: QuantizedModel,
    arrays: dict[str, Any],
    placement: str,
    scheme: Scheme,
    profile: Profile = "full",
) -> Graph:
    can = runtimes()["reference"].capabilities
    export = Export(
        runtime="reference",
        scheme=scheme,
        placement=placement,
        graph_form=can.graph_forms[0],
        gelu=can.gelu,
        profile=None if scheme == "float" else profile,
    )
    return build_graph(record, arrays, can, export)


def sqnr(given: Given, wanted: Wanted) -> float:
    record, arrays = quantize(given, HOW, wanted, labels=None, parents={})
    held_out = images(64, seed=2)
    with torch.inference_mode():
        exact = given.folded(torch.from_numpy(held_out)).numpy()
    made = graph(record, arrays, wanted.placement, wanted.scheme)
    found = sqnr_db(exact, evaluate(made, held_out))
    assert found is not None
    return found


@pytest.mark.parametrize("placement", ["pointwise", "pointwise-io", "all"])
def test_the_search_beats_min_max_on_images_it_has_not_seen(given: Given, placement: str) -> None:
    wanted = Wanted(placement=placement)
    plain = Wanted(placement=placement, calibration=Calibration(method="min-max"))
    assert sqnr(given, wanted) > sqnr(given, plain) + 1


def test_four_bit_weights_gain_by_gptq_and_bias_correction(given: Given) -> None:
    wanted = Wanted(scheme="w4a8", placement="pointwise")
    plain = replace(wanted, calibration=Calibration(method="min-max"))
    assert sqnr(given, wanted) > sqnr(given, plain) + 3


def test_sixteen_bit_activations_leave_the_weights_as_what_is_lost(given: Given) -> None:
    wide = sqnr(given, Wanted(scheme="w8a16", placement="pointwise"))
    assert wide > sqnr(given, Wanted(placement="pointwise")) + 2


@pytest.mark.parametrize("placement", ["pointwise", "pointwise-io", "all"])
def test_rescaling_alone_keeps_the_function(given: Given, placement: str) -> None:
    """With the grids taken away, the graph with all its rescalings is the folded network."""
    record, arrays = quantize(given, HOW, Wanted(placement=placement), labels=None, parents={})
    assert any(name.startswith("rescale/") for name in arrays)
    held_out = images(16, seed=3)
    with torch.inference_mode():
        exact = given.folded(torch.from_numpy(held_out)).numpy()
    made = graph(record, without_rounding(record, arrays, given), placement, "w8a8")
    floats = replace(made, ops=tuple(op for op in made.ops if op.name not in made.sites))
    renamed: dict[str, str] = {}
    for site in made.sites:  # one site may stand behind another
        (source,) = made[site].inputs
        renamed[site] = renamed.get(source, source)
    ops = tuple(
        replace(op, inputs=tuple(renamed.get(name, name) for name in op.inputs))
        for op in floats.ops
    )
    logits = evaluate(replace(floats, ops=ops), held_out)
    assert np.abs(logits - exact).max() < 1e-5 * np.abs(exact).max()
    if placement == "all":
        assert any(isinstance(op, Scale) for op in made.ops)


def without_rounding(
    record: QuantizedModel, arrays: dict[str, Any], given: Given
) -> dict[str, NDArray[Any]]:
    """The record's arrays with weights and biases that are not rounded, in the same units."""
    from calib.grid import Rescaling
    from calib.layer import unrounded
    from pipeline.trace import structure, trace

    fx, modules = trace(given.folded)
    places = structure(fx, modules)
    exact = dict(arrays)
    for layer, site in places.reads.items():
        key = f"full/{layer}"
        if f"{key}.weight" not in arrays:
            continue
        stage = places.places[site].stage
        channels = len(given.statistics[site].minimum)
        nothing = Rescaling.identity(channels)
        scale = arrays.get(f"rescale/{site}.scale", arrays.get(f"rescale/{stage}.scale"))
        shift = arrays.get(f"rescale/{site}.shift")
        by = Rescaling(
            scale=nothing.scale if scale is None else torch.from_numpy(scale),
            shift=nothing.shift if shift is None else torch.from_numpy(shift),
            strength=1.0,
        )
        module: Any = modules[layer]
        of = unrounded(module, by, record.sites[site].scale)
        rows = arrays[f"{key}.weight_scale"]
        exact[f"{key}.weight"] = of.weight / rows.reshape(-1, *[1] * (of.weight.ndim - 1))
        exact[f"{key}.bias"] = of.bias / (rows * np.float64(record.sites[site].scale))
    return exact


@pytest.mark.parametrize("profile", PROFILES)
def test_no_requantization_can_tie(given: Given, profile: Profile) -> None:
    record, arrays = quantize(given, HOW, labels=None, parents={})
    made = graph(record, arrays, "all", "w8a8", profile)
    seen = 0
    for op in made.weighted:
        site, read = made.output_site(op), made[op.inputs[0]]
        if site is None or op.integers is None:
            continue
        assert isinstance(read, QuantizePair)
        step = read.parameters.scale * op.integers.weight_scales.astype(np.float64)
        n = site.parameters.scale / step
        n = n[n > LEAST_DIVISOR]
        seen += len(n)
        from_odd = np.abs(n - (2 * np.rint((n - 1) / 2) + 1))
        # Scales are float32: of 2**20 steps that is a tenth of one.
        assert (from_odd[n < 2**20] <= n[n < 2**20] * 2.0**-23).all(), op.name
    assert seen > 100


def test_a_site_behind_a_site_takes_its_grid(given: Given) -> None:
    record, arrays = quantize(given, HOW, labels=None, parents={})
    made = graph(record, arrays, "all", "w8a8")
    pairs = [op for op in made.ops if isinstance(op, QuantizePair)]
    behind = [op for op in pairs if isinstance(made[op.inputs[0]], QuantizePair)]
    assert behind
    for op in behind:
        assert op.parameters == record.sites[op.inputs[0]]
        assert record.chosen[op.name] == record.chosen[op.inputs[0]]


def test_the_mean_error_of_layers_falls_on_images_held_out(given: Given) -> None:
    held_out = torch.from_numpy(images(128, seed=4))

    def mean_errors(*, correct: bool) -> float:
        """The mean over layers of the per-channel mean error behind pw2, over its deviation."""
        how = Calibration(correct_bias=correct)
        wanted = Wanted(scheme="w4a8", placement="pointwise", calibration=how)
        record, arrays = quantize(given, HOW, wanted, labels=None, parents={})
        made = graph(record, arrays, "pointwise", "w4a8")
        cut = next(i for i, op in enumerate(made.ops) if op.name == "stages.1.blocks.1.pw2")
        y = torch.from_numpy(evaluate(replace(made, ops=made.ops[: cut + 1]), held_out.numpy()))
        found: dict[str, torch.Tensor] = {}
        layer = given.folded.get_submodule("stages.1.blocks.1.pw2")
        handle = layer.register_forward_hook(lambda _m, _i, out: found.update(exact=out))
        with torch.inference_mode():
            given.folded(held_out)
        handle.remove()
        error = (found["exact"] - y).mean(dim=(0, 2, 3)).abs()
        return float((error / found["exact"].std(dim=(0, 2, 3))).mean())

    assert mean_errors(correct=True) < 0.7 * mean_errors(correct=False)


def test_one_image_is_not_searched_and_the_record_says_so(given: Given) -> None:
    one = replace(given, sample=given.sample[:1])
    plain = Wanted(calibration=Calibration(method="min-max"))
    assert sqnr(one, Wanted()) == sqnr(one, plain)
    record, _ = quantize(one, HOW, labels=None, parents={})
    assert record.calibration.method == "min-max"


def test_gamma_and_beta_that_are_scaled_change_nothing() -> None:
    """The same function with channels of every LayerNorm 300 times as large."""
    plain = seeded(NET, 0)
    tensors = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    for name in list(tensors):
        if name.endswith(".norm.weight") and name.startswith("stages"):
            norm = name.removesuffix(".weight")
            reader = norm.removesuffix("norm") + ("conv" if "downsample" in norm else "pw1")
            tensors[f"{norm}.weight"][::3] *= 300
            tensors[f"{norm}.bias"][::3] *= 300
            tensors[f"{reader}.weight"][:, ::3] /= 300
    scaled = seeded(NET, 0)
    scaled.load_state_dict(tensors)
    found = []
    for model in (plain, scaled):
        folded, sample = fold(model, HOW), images(64, seed=1)
        given = Given(folded=folded, statistics=collect(folded, [sample]), sample=sample)
        found.append(sqnr(given, Wanted(placement="all")))
    assert abs(found[0] - found[1]) < 0.2


@pytest.mark.parametrize(("scheme", "times"), [("w4a8", 1), ("w8a8", 2)])
def test_profiles_are_computed_apart_only_where_their_integers_differ(
    given: Given, monkeypatch: pytest.MonkeyPatch, scheme: Scheme, times: int
) -> None:
    seen = []

    def counted(layer: Unrounded, *arguments: Any) -> IntegerLayer:
        seen.append(layer)
        return rounding_of(layer, *arguments)

    monkeypatch.setattr(quantize_module, "rounded", counted)
    wanted = Wanted(scheme=scheme, placement="pointwise")
    _, arrays = quantize(given, HOW, wanted, labels=None, parents={})
    weights = [name for name in arrays if name.startswith("avx2/") and name.endswith(".weight")]
    assert len(seen) == times * len(weights)
    alike = [
        np.array_equal(arrays[name], arrays[name.replace("avx2", "full", 1)]) for name in weights
    ]
    assert all(alike) == (times == 1)
