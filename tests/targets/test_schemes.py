"""Every scheme through every runtime that expresses it; the others are refused with the reason."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from calib.collect import collect
from pipeline.convnext import layers, seeded
from pipeline.errors import ArtifactError, UsageError
from pipeline.fold import fold
from pipeline.quantize import Given, quantize, write
from pipeline.records import (
    ACTIVATION_BITS,
    FLOATING,
    SCHEMES,
    Architecture,
    Export,
    Layer,
    Preprocessing,
    Profile,
    QuantizedModel,
    Scheme,
    Wanted,
)
from pipeline.statistics import sqnr_db
from pipeline.store import size_bytes
from pipeline.worker import silent
from targets.base import Runtime, check_expressible, placement_of, runtimes
from targets.export import export_stage, metadata
from targets.graph import Graph, Linear
from targets.runtimes.reference import evaluate
from targets.runtimes.tflite import GELU_MINIMUM
from targets.translate import build_graph

Made = tuple[QuantizedModel, dict[str, NDArray[Any]]]
SIZE = 64
NET = Architecture(depths=(1, 2), dims=(16, 32), classes=5)
HOW = Preprocessing(input_size=SIZE)
BOUNDS: dict[Scheme, float] = {"w8a8": 0.02, "w4a8": 0.02, "w8a16": 5e-4, "w8": 1e-5, "w4a4": 1e-5}
"""How far an artifact may be from the reference, relative to the largest logit."""
LEAST_DYNAMIC_DB = 30
NEW = {"w8", "w8a8-dynamic", "w8a16"}
"""Those whose files test_runtimes.py does not read."""
EXPRESSED = [
    (name, scheme)
    for name, target in sorted(runtimes().items())
    for scheme in target.capabilities.schemes
    if scheme not in FLOATING
]
HALVES = [
    name for name, target in sorted(runtimes().items()) if "float16" in target.capabilities.schemes
]
REFUSED = [
    (name, scheme)
    for name, target in sorted(runtimes().items())
    for scheme in SCHEMES
    if scheme not in target.capabilities.schemes
]


@cache
def images(n: int = 8) -> NDArray[np.float32]:
    """Smooth images, as photographs are: noise alone would leave all logits alike."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(n, 3, 5, 5, generator=generator) * 255
    fine = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic")
    return fine.clamp(0, 255).numpy()


def quantized(folded: Any, wanted: Wanted) -> Made:
    given = Given(folded=folded, statistics=collect(folded, [images()]), sample=images())
    return quantize(given, HOW, wanted, labels=None, parents={})


@cache
def made(scheme: Scheme) -> Made:
    return quantized(fold(seeded(NET, 3), HOW), Wanted(scheme=scheme))


def export_of(
    target: Runtime,
    scheme: Scheme,
    placement: str = "all",
    batch: Any = 1,
    profile: Profile = "avx2",
) -> Export:
    can = target.capabilities
    quantizes = scheme not in FLOATING
    return Export(
        runtime=target.name,
        scheme=scheme,
        placement=placement_of(target, placement) if quantizes else "none",
        graph_form=can.graph_forms[0],
        gelu=can.gelu,
        profile=profile if quantizes else None,
        batch=batch,
    )


def graph_of(name: str, scheme: Scheme, placement: str = "all", batch: Any = 1) -> Graph:
    target = runtimes()[name]
    record, arrays = made("w8" if scheme in FLOATING else scheme)
    export = export_of(target, scheme, placement, batch)
    return build_graph(record, arrays, target.capabilities, export)


def written(graph: Graph, folder: Path) -> Path:
    target = runtimes()[graph.export.runtime]
    path = folder / f"model{target.capabilities.suffix}"
    target.export(graph, path, metadata(graph.model, graph.export, target.capabilities))
    return path


def logits_of(path: Path, graph: Graph) -> NDArray[np.float32]:
    session = runtimes()[graph.export.runtime].load(path, threads=1)
    return np.concatenate([session(image[None]).copy() for image in images()])


@pytest.mark.parametrize("name", sorted(runtimes()))
def test_a_runtime_says_of_every_scheme_whether_it_expresses_it(name: str) -> None:
    can = runtimes()[name].capabilities
    assert sorted([*can.schemes, *can.unsupported_schemes]) == sorted(SCHEMES)


@pytest.mark.parametrize(("name", "scheme"), REFUSED)
def test_a_refusal_says_why(name: str, scheme: Scheme) -> None:
    target = runtimes()[name]
    with pytest.raises(UsageError) as caught:
        check_expressible(export_of(target, scheme), target)
    assert f"does not express scheme {scheme}: " in str(caught.value)
    assert target.capabilities.unsupported_schemes[scheme] in str(caught.value)


# --- float16 --------------------------------------------------------------------------------------


def test_float16_is_the_float_network_with_rounded_weights() -> None:
    graph, plain = graph_of("reference", "float16"), graph_of("reference", "float")
    for half, one in zip(graph.weighted, plain.weighted, strict=True):
        rounded = one.weight.astype(np.float16)
        np.testing.assert_array_equal(half.weight, rounded)
        np.testing.assert_array_equal(half.bias, one.bias)
    reached = sqnr_db(evaluate(plain, images()), evaluate(graph, images()))
    assert reached is not None
    assert 50 < reached < 100


@pytest.mark.parametrize("name", HALVES)
def test_a_float16_artifact_is_half_as_large_and_computes_the_same(
    name: str, tmp_path: Path
) -> None:
    target, graph = runtimes()[name], graph_of(name, "float16")
    for folder in ("half", "whole"):
        (tmp_path / folder).mkdir()
    path = written(graph, tmp_path / "half")
    proof = target.prove(path, graph)
    assert (proof.integer_layers, proof.integer_weights) == (0, 0)
    assert proof.quantize_ops_per_block == 0
    logits, expected = logits_of(path, graph), evaluate(graph, images())
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    # CoreML computes in it everywhere, OpenVINO where the CPU does.
    assert error < {"coreml": 5e-3, "openvino": 5e-3}.get(name, 1e-5)
    if name != "reference":
        whole = written(graph_of(name, "float"), tmp_path / "whole")
        weights = sum(op.weight.size for op in graph.weighted)
        saved = size_bytes(whole.parent) - size_bytes(path.parent)
        assert saved == pytest.approx(2 * weights, rel=0.15)  # words of the file


@pytest.mark.parametrize(("can", "hint"), [(["FP32", "FP16"], "f16"), (["FP32"], "f32")])
def test_openvino_computes_in_float16_where_the_cpu_does(
    can: list[str], hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino

    seen: list[Any] = []
    path = written(graph_of("openvino", "float16"), tmp_path)

    class Core:
        read_model = openvino.Core().read_model

        def get_property(self, *_: str) -> list[str]:
            return can

        def compile_model(self, _: Any, __: str, settings: Any) -> Any:
            seen.append(settings["INFERENCE_PRECISION_HINT"])
            raise InterruptedError

    monkeypatch.setattr(openvino, "Core", Core)
    with pytest.raises(InterruptedError):
        runtimes()["openvino"].load(path, threads=1)
    assert seen == [hint]


def test_a_weight_that_float16_does_not_hold_is_refused() -> None:
    record, arrays = made("w8")
    name = next(key for key in arrays if key.startswith("float/") and key.endswith(".pw1.weight"))
    arrays = {**arrays, name: arrays[name] * 1e9}
    target = runtimes()["reference"]
    with pytest.raises(ArtifactError, match=r"a weight of .*pw1 is .*float16 does not hold"):
        build_graph(record, arrays, target.capabilities, export_of(target, "float16"))


# --- stages in float ------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["pointwise", "all"])
@pytest.mark.parametrize("name", sorted(runtimes()))
def test_the_blocks_of_a_stage_stay_float_where_that_is_asked(
    name: str, placement: str, tmp_path: Path
) -> None:
    target, whole = runtimes()[name], graph_of(name, "w8a8", placement)
    export = replace(whole.export, float_stages=(1,))
    graph = build_graph(*made("w8a8"), target.capabilities, export)
    for op, before in zip(graph.weighted, whole.weighted, strict=True):
        left = op.name.startswith("stages.1.blocks.")
        assert (op.integers is None) == (before.integers is None or left)
    assert graph.integer_layers < whole.integer_layers
    path = written(graph, tmp_path)
    proof = target.prove(path, graph)
    assert proof.integer_layers == proof.expected_integer_layers
    logits, expected = logits_of(path, graph), evaluate(graph, images())
    assert np.abs(logits - expected).max() < BOUNDS["w8a8"] * np.abs(expected).max()


# --- integers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", ["pointwise", "all"])
@pytest.mark.parametrize(("name", "scheme"), EXPRESSED)
def test_an_artifact_computes_what_the_reference_computes(
    name: str, scheme: Scheme, placement: str, tmp_path: Path
) -> None:
    target, graph = runtimes()[name], graph_of(name, scheme, placement)
    path = written(graph, tmp_path)
    proof = target.prove(path, graph)
    assert proof.integer_layers == proof.expected_integer_layers
    assert proof.integer_weights == graph.integer_layers > 0
    assert proof.integer_layers <= graph.integer_layers
    if scheme in ACTIVATION_BITS:
        floats = [op for op in graph.weighted if op.layer in target.capabilities.float_layers]
        left = len(floats) if placement == "all" else 0
        assert proof.integer_layers == graph.integer_layers - left
    if scheme == "w8":
        assert proof.integer_layers == 0
        assert proof.quantize_ops_per_block == 0
    if target.can_run() is not None:
        return
    logits, expected = logits_of(path, graph), evaluate(graph, images())
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    if scheme != "w8a8-dynamic":
        assert error < BOUNDS[scheme]
    elif proof.integer_layers:
        # The reference's activations are float: nothing is quantized where nothing differs.
        assert error > 1e-5
        against_float = evaluate(graph_of(name, "float"), images())
        reached = sqnr_db(against_float, logits)
        assert reached is not None
        assert reached > LEAST_DYNAMIC_DB


@pytest.mark.parametrize("name", ["onnx", "tflite"])
def test_dynamic_layers_compute_in_integers_wherever_that_is_worth_it(
    name: str, tmp_path: Path
) -> None:
    graph = graph_of(name, "w8a8-dynamic")
    proof = runtimes()[name].prove(written(graph, tmp_path), graph)
    linear = sum(isinstance(op, Linear) and op.integers is not None for op in graph.weighted)
    assert 0 < linear < graph.integer_layers
    # onnxruntime's integer convolutions are slower than its float ones.
    assert proof.integer_layers == (linear if name == "onnx" else graph.integer_layers)


# --- what the file holds --------------------------------------------------------------------------


def int8_of_onnx(path: Path) -> Iterator[NDArray[np.int8]]:
    import onnx

    for tensor in onnx.load(str(path)).graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8:
            yield onnx.numpy_helper.to_array(tensor)


def int8_of_tflite(path: Path) -> Iterator[NDArray[np.int8]]:
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    found = defaultdict[str, list[NDArray[np.int8]]](list)
    for tensor in model.subgraphs[0].tensors:
        data = model.buffers[tensor.buffer].data
        if tensor.type == schema.TensorType.INT8 and data is not None:
            # A depthwise layer may lie there in parts, the second as NAME.1.weight.
            name = re.sub(r"(\.[12])?\.weight$", "", tensor.name.decode())
            found[name].append(np.frombuffer(bytes(data), np.int8))
    yield from map(np.concatenate, found.values())


def int8_of_openvino(path: Path) -> Iterator[NDArray[np.int8]]:
    import openvino

    for op in openvino.Core().read_model(path).get_ordered_ops():
        if op.get_type_name() == "Constant" and op.get_element_type().get_type_name() == "i8":
            yield op.data


def int8_of_coreml(path: Path) -> Iterator[NDArray[np.int8]]:
    import coremltools as ct
    from coremltools.converters.mil.frontend.milproto.load import load

    model = ct.models.MLModel(str(path), skip_model_load=True)
    spec = model.get_spec()
    program = load(spec, spec.specificationVersion, model.weights_dir)
    for op in program.functions["main"].operations:
        if op.op_type == "constexpr_affine_dequantize":
            yield op.quantized_data.val


READERS = {
    "coreml": int8_of_coreml,
    "onnx": int8_of_onnx,
    "openvino": int8_of_openvino,
    "tflite": int8_of_tflite,
}


@pytest.mark.parametrize(
    ("name", "scheme"),
    [(name, scheme) for name, scheme in EXPRESSED if name in READERS and scheme in NEW],
)
def test_the_file_holds_the_record_s_integers_and_not_their_floats(
    name: str, scheme: Scheme, tmp_path: Path
) -> None:
    graph = graph_of(name, scheme)
    path = written(graph, tmp_path)
    # Each runtime lays a weight out in its own order; that it is right is what the logits show.
    found = {np.sort(array, axis=None).tobytes() for array in READERS[name](path)}
    weights = [op.integers.weight for op in graph.weighted if op.integers is not None]
    assert all(np.sort(weight, axis=None).tobytes() in found for weight in weights)
    (tmp_path / "float").mkdir()
    unpacked = written(graph_of(name, "float"), tmp_path / "float")
    saved = stored_bytes(unpacked) - stored_bytes(path)
    assert saved > 2 * sum(weight.size for weight in weights)


def stored_bytes(path: Path) -> int:
    """Of the artifact with what lies beside it, without its description."""
    beside = path.with_suffix(".bin")
    return size_bytes(path) + (size_bytes(beside) if beside.exists() else 0)


@pytest.mark.parametrize("lost", [0, 1])
def test_an_export_counts_the_integer_weights(
    lost: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = runtimes()["onnx"]
    model, folder = tmp_path / "model", tmp_path / "artifact"
    model.mkdir()
    folder.mkdir()
    write(model, *made("w8"))
    graph = graph_of("onnx", "w8")
    proof = target.prove(written(graph, tmp_path), graph)
    told = replace(proof, integer_weights=graph.integer_layers - lost)
    monkeypatch.setattr(type(target), "prove", lambda *_: told)
    wanted = asdict(graph.export)
    if lost:
        with pytest.raises(ArtifactError, match="weights in integers"):
            export_stage(str(model), wanted, str(folder), silent)
    else:
        assert export_stage(str(model), wanted, str(folder), silent)["path"] == "model.onnx"


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "scheme"),
    [(name, scheme) for name, scheme in EXPRESSED if scheme in NEW],
)
def test_a_dynamic_batch_computes_the_same(name: str, scheme: Scheme, tmp_path: Path) -> None:
    target, graph = runtimes()[name], graph_of(name, scheme, batch="dynamic")
    path = written(graph, tmp_path)
    if target.can_run() is not None:
        return
    logits = target.load(path, threads=1)(images())
    expected = evaluate(graph, images())
    # Where a runtime finds one grid for a whole batch, images share it.
    bound = BOUNDS.get(scheme, 0.1)
    assert np.abs(logits - expected).max() < bound * np.abs(expected).max()


# --- TFLite's int16 layers ------------------------------------------------------------------------


def bias_types(path: Path) -> dict[str, set[str]]:
    """The types of the biases of int16 layers, by the operator."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    operators = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
    types = {v: k for k, v in vars(schema.TensorType).items() if isinstance(v, int)}
    tensors, found = model.subgraphs[0].tensors, dict[str, set[str]]()
    for op in model.subgraphs[0].operators:
        if tensors[op.inputs[0]].type == schema.TensorType.INT16 and len(op.inputs) > 2:
            kind = operators[model.operatorCodes[op.opcodeIndex].builtinCode]
            found.setdefault(kind, set()).add(types[tensors[op.inputs[2]].type])
    return found


def test_int16_layers_add_in_int32_where_their_sums_fit(tmp_path: Path) -> None:
    assert bias_types(written(graph_of("tflite", "w8a16"), tmp_path)) == {
        "CONV_2D": {"INT32"},
        "DEPTHWISE_CONV_2D": {"INT64"},
        "FULLY_CONNECTED": {"INT32"},
    }


def test_int16_layers_whose_sums_do_not_fit_are_exact_all_the_same(tmp_path: Path) -> None:
    """640 products of 127 and 32767 are more than 2**31."""
    net = Architecture(depths=(1,), dims=(160,), classes=4)
    model = seeded(net, 0)
    with torch.no_grad():
        for _, kind, module in layers(model):
            if kind is Layer.PW1:
                assert module.bias is not None
                module.weight.mul_(1e-3)
                module.bias.fill_(2.0)
            if kind is Layer.PW2:
                module.weight.fill_(0.05)
    record, arrays = quantized(fold(model, HOW), Wanted(scheme="w8a16"))
    target = runtimes()["tflite"]
    export = export_of(target, "w8a16", "pointwise", profile="full")
    graph = build_graph(record, arrays, target.capabilities, export)
    path = written(graph, tmp_path)
    assert bias_types(path)["FULLY_CONNECTED"] == {"INT32", "INT64"}
    logits, expected = logits_of(path, graph), evaluate(graph, images())
    assert np.abs(logits - expected).max() < 5e-4 * np.abs(expected).max()


@pytest.mark.parametrize("form", ["none", "tanh"])
def test_gelu_is_never_below_what_int16_sums_are_bounded_with(form: str) -> None:
    lowest = torch.nn.functional.gelu(torch.linspace(-8, 0, 100_001), approximate=form).min()
    assert GELU_MINIMUM < lowest < GELU_MINIMUM + 2e-3
