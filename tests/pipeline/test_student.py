"""The network that is trained computes what the record's integers compute, before and after."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from calib.collect import collect
from pipeline.arithmetic import LEAST_DIVISOR, PAIR_LIMIT
from pipeline.convnext import ConvNeXt, seeded
from pipeline.fold import fold
from pipeline.quantize import Given, quantize
from pipeline.records import (
    PROFILES,
    Architecture,
    Export,
    Preprocessing,
    QuantizedModel,
    Scheme,
    Wanted,
)
from pipeline.student import Student
from pipeline.trace import structure, trace
from targets.base import runtimes
from targets.runtimes.reference import evaluate
from targets.translate import build_graph

HOW = Preprocessing(input_size=32)
NETS = {
    "plain": Architecture(depths=(1, 2), dims=(8, 16), classes=6),
    "v2": Architecture(depths=(1, 1), dims=(8, 16), classes=6, grn=True, layer_scale=False),
    "ols": Architecture(
        depths=(1, 1), dims=(8, 16), classes=6, stem="overlap_act", stem_width=4, head_width=12
    ),
}
Model = tuple[QuantizedModel, dict[str, NDArray[Any]]]


def network(name: str) -> ConvNeXt:
    """A seeded network with outlier channels, so that sites are rescaled."""
    model = seeded(NETS[name], 0)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith(("norm.weight", "norm.bias")) and tensor.ndim == 1:
                tensor[:2] *= 30
            if key.endswith("depthwise.bias"):
                tensor[3] += 20
    return fold(model, HOW)


def made(pixels: NDArray[np.float32], name: str, scheme: Scheme, placement: str) -> Model:
    folded = network(name)
    given = Given(folded=folded, statistics=collect(folded, [pixels]), sample=pixels)
    wanted = Wanted(scheme=scheme, placement=placement)
    return quantize(given, HOW, wanted, labels=None, parents={})


def logits(record: QuantizedModel, arrays: dict[str, Any], image: NDArray[Any]) -> NDArray[Any]:
    """What the contract's own arithmetic gives."""
    export = Export(
        runtime="reference",
        scheme=record.scheme,
        placement=record.placement,
        graph_form="eager",
        gelu="erf",
        profile="avx2",
    )
    can = runtimes()["reference"].capabilities
    return evaluate(build_graph(record, arrays, can, export), image)


def apart(student: Student, model: Model, image: NDArray[np.float32]) -> float:
    """Largest difference of logits in float64, over the largest logit.

    In float32 a value can lie so near the middle between two steps that noise decides.
    """
    exact = image.astype(np.float64)
    found = student.double().network(torch.from_numpy(exact)).detach().numpy()
    wanted = logits(*model, exact)
    assert np.abs(wanted).max() > 0.01
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


CASES = [
    ("plain", "w8a8", "pointwise"),
    ("plain", "w4a8", "pointwise-io"),
    ("plain", "w8a8", "all"),
    ("plain", "w4a8", "all"),
    ("plain", "w4a4", "pointwise"),
    ("plain", "w8a16", "pointwise-io"),
    ("plain", "w8", "all"),
    ("v2", "w4a8", "all"),
    ("ols", "w8a8", "all"),
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def model(request: pytest.FixtureRequest, pixels: NDArray[np.float32]) -> Model:
    return made(pixels, *request.param)


def test_training_begins_where_calibration_ends(model: Model, pixels: NDArray[np.float32]) -> None:
    """Learned rounding included: GPTQ's integers, not those nearest to the weights."""
    assert apart(Student(*model), model, pixels[:4]) < 1e-5


def test_what_was_not_trained_comes_back_as_it_was(model: Model) -> None:
    record, arrays = model
    back, found = Student(record, arrays).quantized()
    assert back == record
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        if name.startswith("full/"):
            # One set of integers, the strictest profile's, holds in all.
            assert (found[name] == found[name.replace("full/", "avx2/")]).all()
        elif name.endswith(("weight_scale", ".scale", ".shift")):
            assert found[name] == pytest.approx(array, rel=1e-6), name
        elif array.dtype == np.int32:
            assert np.abs(found[name] - array).max() <= 1 + 1e-6 * np.abs(array).max(), name
        else:
            assert (found[name] == array).all(), name


def shaken(model: Model, seed: int = 0) -> Student:
    """A student whose every learnt number has moved."""
    student = Student(*model)
    generator = torch.Generator().manual_seed(seed)
    weights, others = student.groups()
    assert weights
    with torch.no_grad():
        for p in weights:
            p.add_(torch.randn(p.shape, generator=generator))
        for p in others:
            p.mul_(1 + 0.02 * torch.randn(p.shape, generator=generator))
            p.add_(0.01 * torch.randn(p.shape, generator=generator))
    return student


def test_the_integers_exported_are_the_integers_trained(
    model: Model, pixels: NDArray[np.float32]
) -> None:
    student = shaken(model)
    back = student.quantized()
    changed = [n for n, a in model[1].items() if n.endswith(".weight") and a.dtype == np.int8]
    assert any((back[1][name] != model[1][name]).any() for name in changed)
    assert apart(student, back, pixels[:4]) < 1e-5


def test_what_is_trained_keeps_to_the_contract(model: Model) -> None:
    student = shaken(model, seed=1)
    record, arrays = student.quantized()
    for name in student.layers:
        for profile in PROFILES:
            weight = arrays[f"{profile}/{name}.weight"].astype(int)
            assert np.abs(weight).max() <= student.layers[name].grid.limit
            if student.layers[name].grid.pairs:
                pairs = weight.reshape(len(weight), weight.shape[1] // 2, 2, -1)
                same = pairs[:, :, 0] * pairs[:, :, 1] > 0
                assert (np.abs(pairs.sum(axis=2))[same] <= PAIR_LIMIT).all()
            reads = record.sites.get(student.structure.reads[name])
            written = student.structure.writes.get(name)
            if reads is None or written not in student.sites:
                continue
            step = student.sites[written].written_scale().detach().double().numpy()
            exact = step / (reads.scale * arrays[f"{profile}/{name}.weight_scale"].astype(float))
            large = exact > LEAST_DIVISOR
            assert np.abs(exact[large] - np.rint(exact[large])).max(initial=0) < 1e-2
            assert (np.rint(exact[large]) % 2 == 1).all()
    for name, grid in record.sites.items():
        if record.scheme in {"w8", "w8a16"}:
            break
        least, most = {8: (-128, 127), 4: (-8, 7)}[grid.bits]
        assert least <= grid.zero_point <= most, name


def test_what_stays_float_is_not_trained(model: Model) -> None:
    student = Student(*model)
    weights, others = student.groups()
    learnt = {id(p) for p in (*weights, *others)}
    owners = (*student.layers.values(), *(site.grid for site in student.sites.values()))
    owned = {id(p) for m in owners for p in m.parameters() if p.requires_grad}
    assert learnt == owned
    before = {n: a.copy() for n, a in model[1].items() if n.startswith("float/")}
    _, after = shaken(model).quantized()
    assert all((after[name] == array).all() for name, array in before.items())


def test_scales_offsets_and_biases_do_not_decay(model: Model) -> None:
    student = Student(*model)
    weights, others = student.groups()
    assert [id(p) for p in weights] == [id(layer.weight) for layer in student.layers.values()]
    assert {id(p) for p in weights}.isdisjoint(id(p) for p in others)
    assert {id(layer.bias) for layer in student.layers.values()} <= {id(p) for p in others}


def test_every_learnt_number_gets_a_gradient(model: Model, pixels: NDArray[np.float32]) -> None:
    student = Student(*model)
    torch.autograd.backward(student.network(torch.from_numpy(pixels[:4])).square().sum())
    for name, p in student.network.named_parameters():
        assert not p.requires_grad or p.grad is not None, name
        if p.requires_grad and name.endswith((".weight", ".bias")):
            assert p.grad is not None
            assert p.grad.abs().max() > 0, name


def test_dropped_paths_are_the_same_however_a_batch_is_divided(
    pixels: NDArray[np.float32],
) -> None:
    model = made(pixels, "plain", "w8a8", "pointwise")
    image, whole = torch.from_numpy(pixels[:8]), []
    for part in ((0, 1), (0, 2), (1, 2)):
        student, generator = Student(*model), torch.Generator()
        student.drop_paths(0.5, generator, part)
        generator.manual_seed(5)
        rank, ranks = part
        mine = image[rank * 8 // ranks :][: 8 // ranks]
        whole.append(student.network(mine).detach())
    torch.testing.assert_close(torch.cat(whole[1:]), whole[0], rtol=1e-4, atol=1e-4)
    plain = Student(*model).network(image).detach()
    assert (whole[0] - plain).abs().max() > 0.01


def test_zero_points_and_biases_stay_in_the_contract_wherever_they_are_learnt(
    pixels: NDArray[np.float32],
) -> None:
    model = made(pixels, "plain", "w8a8", "all")
    student = Student(*model)
    with torch.no_grad():
        for site in student.sites.values():
            site.grid.turned.add_(0.02 if site.grid.kind.has_zero else 0.0)
            site.grid.factor.mul_(0.9)
        for layer in student.layers.values():
            layer.bias.fill_(1e9)
    record, arrays = student.quantized()
    moved = [
        n for n, grid in record.sites.items() if grid.zero_point != model[0].sites[n].zero_point
    ]
    assert moved
    for name, array in arrays.items():
        if array.dtype == np.int32:
            assert np.abs(array).max() == 2**30, name
    assert apart(student, (record, arrays), pixels[:2]) < 1e-5


def test_layers_left_in_float_stay_out(pixels: NDArray[np.float32]) -> None:
    folded = network("plain")
    given = Given(folded=folded, statistics=collect(folded, [pixels]), sample=pixels)
    kept = "stages.1.blocks.0.pw1"
    wanted = Wanted(scheme="w8a8", placement="pointwise", float_layers=(kept,))
    model = quantize(given, HOW, wanted, labels=None, parents={})
    student = Student(*model)
    graph, modules = trace(folded)
    pointwise = {n for n in structure(graph, modules).reads if n.endswith((".pw1", ".pw2"))}
    assert set(student.layers) == pointwise - {kept}
    assert apart(student, model, pixels[:2]) < 1e-5
    assert model[0] == student.quantized()[0]
