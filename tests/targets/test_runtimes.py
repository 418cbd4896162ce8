"""Contracts of every runtime that is discovered, on the embedded model."""

from __future__ import annotations

import itertools
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from calib.batches import batches
from calib.collect import collect
from calib.images import open_images
from pipeline import checkpoint
from pipeline.convnext import seeded
from pipeline.errors import UsageError
from pipeline.fold import fold
from pipeline.locate import locate
from pipeline.placements import PLACEMENTS
from pipeline.quantize import Given, quantize, write
from pipeline.records import (
    PROFILE_OF_ISA,
    PROFILES,
    Calibration,
    Export,
    Preprocessing,
    Profile,
    Proof,
    QuantizedModel,
    Scheme,
    Wanted,
)
from pipeline.run import EMBEDDED
from pipeline.sidecar import read_sidecar
from targets.base import Runtime, check_expressible, placement_of, runtimes
from targets.devices.local import host_isa
from targets.export import metadata, read_metadata
from targets.graph import Graph, Norm, Weighted
from targets.runtimes.reference import evaluate
from targets.translate import build_graph

Quantized = tuple[QuantizedModel, dict[str, NDArray[Any]], NDArray[np.float32]]
RUNTIMES = sorted(runtimes())
X86 = platform.machine().lower() in {"x86_64", "amd64"}
"""Elsewhere onnxruntime and OpenVINO have other kernels, and other layouts of theirs."""
SATURATING = {"onnx", "openvino"}
LAYOUT_OPS = {
    ("onnx", "channels-last linear"): (5, 2),
    ("onnx", "channels-last linear", "pointwise-depthwise"): (14, 0),
    ("onnx", "channels-last linear", "all"): (2, 0),
    ("onnx", "1x1 convolution"): (5, 2),
    ("onnx", "1x1 convolution", "none"): (5, 4),
    ("onnx", "1x1 convolution", "pointwise-depthwise"): (14, 0),
    ("onnx", "1x1 convolution", "all"): (2, 0),
    ("openvino", "channels-last linear"): (5, 1),
}
"""At the edges of the embedded model's four stages, and in each block; by runtime and form, and by
placement where that differs from the others. Onnxruntime reorders into its blocked layout and back
around each float convolution: two a block, four where float pointwise layers are convolutions, and
one for each stage; one transposition is the head's, over a single place. OpenVINO's linear form
transposes once a block, and in the first stage's once more, which stands with the edges here; its
own form never does, nor do the other runtimes."""
FORMS = [
    (name, form)
    for name in RUNTIMES
    for form in runtimes()[name].capabilities.graph_forms
    if len(runtimes()[name].capabilities.graph_forms) > 1
]


@pytest.fixture(scope="session")
def quantized() -> Quantized:
    loaded = checkpoint.load(EMBEDDED)
    how = Preprocessing(**read_sidecar(locate(EMBEDDED)).preprocessing)
    folded = fold(checkpoint.build(loaded.record, loaded.tensors), how)
    train = open_images("digits", "calibration").sample(64, 0)
    sample = np.concatenate([pixels for _, pixels in batches(train, how, 16)])
    given = Given(folded=folded, statistics=collect(folded, [sample]), sample=sample)
    record, arrays = quantize(given, how, labels=loaded.record.labels, parents={})
    held_out = open_images("digits", "evaluation").sample(8, 0)
    _, images = next(batches(held_out, how, 8))
    return record, arrays, images


@pytest.fixture(scope="session")
def deeper(quantized: Quantized) -> Quantized:
    """The embedded model with two blocks more in its third stage, and seeded weights."""
    record, _, images = quantized
    folded = fold(
        seeded(replace(record.architecture, depths=(1, 1, 5, 1)), 0), record.preprocessing
    )
    given = Given(folded=folded, statistics=collect(folded, [images]), sample=images)
    plain = Calibration(method="min-max", rounding="nearest", rescale=False, correct_bias=False)
    found = quantize(
        given, record.preprocessing, Wanted(calibration=plain), labels=None, parents={}
    )
    return *found, images


def graph_of(
    quantized: Quantized,
    target: Runtime,
    scheme: Scheme,
    placement: str = "none",
    profile: Profile | None = None,
    batch: Any = 1,
    form: str | None = None,
) -> Graph:
    can = target.capabilities
    export = Export(
        runtime=target.name,
        scheme=scheme,
        placement=placement_of(target, placement) if scheme != "float" else placement,
        graph_form=form or can.graph_forms[0],
        gelu=can.gelu,
        profile=profile,
        batch=batch,
    )
    return build_graph(quantized[0], quantized[1], can, export)


def layout_ops(graph: Graph) -> float:
    """Return the changes of layout per block that are known of a network of four stages."""
    export = graph.export
    known = LAYOUT_OPS.get((export.runtime, export.graph_form), (0, 0))
    known = LAYOUT_OPS.get((export.runtime, export.graph_form, export.placement), known)
    return known[0] / graph.blocks + known[1]


def assert_layout_ops(proof: Proof, graph: Graph) -> None:
    """Check that a runtime changes the layout as often as is known; on ARM at most so often."""
    known = layout_ops(graph)
    assert proof.transposes_per_block <= known + 1e-9
    assert proof.transposes_per_block == pytest.approx(known) or not X86


def written(graph: Graph, target: Runtime, model: QuantizedModel, folder: Path) -> Path:
    path = folder / f"model{target.capabilities.suffix}"
    target.export(graph, path, metadata(model, graph.export, target.capabilities))
    return path


@pytest.mark.parametrize("placement", ["pointwise", "all"])
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", RUNTIMES)
def test_runs_the_integers_of_the_record(
    quantized: Quantized, name: str, profile: Profile, placement: str, tmp_path: Path
) -> None:
    target = runtimes()[name]
    graph = graph_of(quantized, target, "w8a8", placement, profile)
    path = written(graph, target, quantized[0], tmp_path)
    proof = target.prove(path, graph)
    blocks = sum(quantized[0].architecture.depths)
    assert proof.expected_integer_layers >= 2 * blocks
    assert proof.integer_layers == proof.expected_integer_layers
    assert_layout_ops(proof, graph)
    if placement == "all":
        left_float = len(target.capabilities.float_layers)
        assert proof.integer_layers == proof.weighted_layers - left_float
    if target.can_run() is not None:
        return
    if PROFILE_OF_ISA[host_isa()] == "avx2" and profile == "full" and name in SATURATING:
        # The full profile's integers are not exact here: that is why there is another one.
        return
    session = target.load(path, threads=1)
    logits = np.concatenate([session(image[None]) for image in quantized[2]])
    expected = evaluate(graph, quantized[2])
    # A runtime may round a requantization differently: a step or so per site, never more.
    error = np.sqrt(np.mean((logits - expected) ** 2)) / np.abs(expected).max()
    assert error < 0.01
    assert (logits.argmax(axis=1) == expected.argmax(axis=1)).all()


@pytest.mark.parametrize("placement", ["none", *PLACEMENTS])
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_every_form_computes_the_same(
    quantized: Quantized, name: str, form: str, placement: str, tmp_path: Path
) -> None:
    target = runtimes()[name]
    can = target.capabilities
    scheme: Scheme = "float" if placement == "none" else "w8a8"
    profile = PROFILE_OF_ISA[host_isa()]
    graph = graph_of(quantized, target, scheme, placement, profile, form=form)
    if placement not in {"none", *can.placements_in(form)}:
        with pytest.raises(UsageError, match=f"does not express placement {placement}"):
            check_expressible(replace(graph.export, placement=placement), target)
        return
    check_expressible(graph.export, target)
    path = written(graph, target, quantized[0], tmp_path)
    proof = target.prove(path, graph)
    assert proof.integer_layers == proof.expected_integer_layers
    assert proof.integer_weights in {None, graph.integer_layers}
    assert (proof.integer_layers > 0) == (scheme != "float")
    assert_layout_ops(proof, graph)
    if target.can_run() is None:
        session = target.load(path, threads=1)
        logits = np.concatenate([session(image[None]) for image in quantized[2]])
        expected = evaluate(graph, quantized[2])
        # RMS: of eight images one may hold a value that float noise moves across a tie.
        error = np.sqrt(np.mean((logits - expected) ** 2)) / np.abs(expected).max()
        assert error < (1e-5 if scheme == "float" else 0.01)


@pytest.mark.parametrize(
    ("name", "form", "placement"),
    [
        (name, form, placement)
        for name, form in FORMS
        for placement in ("none", *runtimes()[name].capabilities.placements_in(form))
    ],
)
def test_what_a_block_adds_is_fused_and_changes_layout_as_often_as_is_known(
    deeper: Quantized, name: str, form: str, placement: str, tmp_path: Path
) -> None:
    target = runtimes()[name]
    scheme: Scheme = "float" if placement == "none" else "w8a8"
    graph = graph_of(deeper, target, scheme, placement, "full", form=form)
    proof = target.prove(written(graph, target, deeper[0], tmp_path), graph)
    assert_layout_ops(proof, graph)
    norms = sum(isinstance(op, Norm) for op in graph.ops)
    assert (norms, graph.blocks) == (13, 8)
    if X86:
        expected = fused_ops(name, form, norms, graph.blocks)
        assert {op: proof.op_counts.get(op, 0) for op in expected} == expected


def fused_ops(name: str, form: str, norms: int, blocks: int) -> dict[str, int]:
    """Return what a runtime executes for all LayerNorms and all GELUs."""
    unfused = dict.fromkeys(("Erf", "Tanh", "Pow", "Sqrt", "Div", "Sub"), 0)
    match name, form:
        case "onnx", _:
            return {"LayerNormalization": norms, "Gelu": blocks, "ReduceMean": 1} | unfused
        case "openvino", "1x1 convolution":
            # Mean and variance of each but the head's, and the mean of all places; GELU is in pw1.
            return {"MVN": 1, "RMS": 0, "Reduce": 2 * (norms - 1) + 1}
        case "openvino", _:
            return {"MVN": 1, "RMS": norms - 1, "Reduce": norms}
    # TFLite has no op for LayerNorm; its GELU is one (decision 0010: erf).
    return {"GELU": blocks, "RSQRT": norms, "SQUARED_DIFFERENCE": norms, "MEAN": 2 * norms + 1}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_runtimes_round_alike(quantized: Quantized, placement: str, tmp_path: Path) -> None:
    """What is left is float noise, which moves a value across a tie in few images of a hundred."""
    record = quantized[0]
    held_out = open_images("digits", "evaluation").sample(100, 0)
    images = np.concatenate([pixels for _, pixels in batches(held_out, record.preprocessing, 50)])
    profile = PROFILE_OF_ISA[host_isa()]
    logits: dict[str, NDArray[np.float32]] = {}
    for name, target in runtimes().items():
        if placement not in target.capabilities.placements or target.can_run() is not None:
            continue
        graph = graph_of(quantized, target, "w8a8", placement, profile)
        (tmp_path / name).mkdir()
        session = target.load(written(graph, target, record, tmp_path / name), threads=1)
        logits[name] = np.concatenate([session(image[None]) for image in images])
    assert {"onnx", "openvino", "reference"} <= logits.keys()
    exact = evaluate(graph_of(quantized, runtimes()["reference"], "float"), images)
    for a, b in itertools.combinations(logits, 2):
        difference = np.abs(logits[a] - logits[b]).max(axis=1)
        lost = np.sqrt(np.mean((logits[a] - exact) ** 2))
        assert np.sqrt(np.mean((logits[a] - logits[b]) ** 2)) <= lost / 3, (a, b)
        assert (difference < 1e-4 * np.abs(exact).max()).mean() >= 0.9, (a, b)


@pytest.mark.parametrize("name", RUNTIMES)
def test_float_artifact_equals_the_reference(
    quantized: Quantized, name: str, tmp_path: Path
) -> None:
    target = runtimes()[name]
    graph = graph_of(quantized, target, "float")
    path = written(graph, target, quantized[0], tmp_path)
    assert target.prove(path, graph).integer_layers == 0
    if target.can_run() is None:
        session = target.load(path, threads=1)
        logits = np.concatenate([session(image[None]) for image in quantized[2]])
        expected = evaluate(graph, quantized[2])
        assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("batch", [3, "dynamic"])
@pytest.mark.parametrize(("name", "form"), [*((name, None) for name in RUNTIMES), *FORMS])
def test_batch_is_what_was_asked(
    quantized: Quantized, name: str, form: str | None, batch: int | str, tmp_path: Path
) -> None:
    target = runtimes()[name]
    graph = graph_of(quantized, target, "w8a8", "pointwise-io", "avx2", batch, form)
    path = written(graph, target, quantized[0], tmp_path)
    assert target.prove(path, graph).integer_layers == graph.integer_layers
    if target.can_run() is None:
        logits = target.load(path, threads=1)(quantized[2][:3])
        assert logits.shape == (3, quantized[0].architecture.classes)


@pytest.mark.parametrize("name", RUNTIMES)
def test_metadata_comes_back(quantized: Quantized, name: str, tmp_path: Path) -> None:
    target = runtimes()[name]
    path = written(graph_of(quantized, target, "float"), target, quantized[0], tmp_path)
    stated = read_metadata(path)
    assert stated.runtime.name == name
    assert stated.preprocessing == quantized[0].preprocessing
    assert stated.labels == quantized[0].labels
    assert stated.batch == 1


@pytest.mark.parametrize("name", RUNTIMES)
def test_layernorm_is_never_quantized(quantized: Quantized, name: str) -> None:
    graph = graph_of(quantized, runtimes()[name], "w8a8", "all", "full")
    norms = [op for op in graph.ops if isinstance(op, Norm)]
    assert (
        len(norms)
        == sum(quantized[0].architecture.depths) + len(quantized[0].architecture.depths) + 1
    )
    for norm in norms:
        for values in (norm.weight, norm.bias):
            assert values is None or values.dtype == np.float32
    assert not any(isinstance(op, Weighted) and "norm" in op.name for op in graph.ops)
    quantized_arrays = [key for key in quantized[1] if not key.startswith("float/")]
    assert quantized_arrays
    assert not any("norm" in key for key in quantized_arrays)


def test_every_site_and_integer_is_the_same_in_every_runtime(quantized: Quantized) -> None:
    graphs = [graph_of(quantized, r, "w8a8", "all", "full") for r in runtimes().values()]
    for graph in graphs:
        for layer in graph.weighted:
            if layer.integers is not None:
                assert layer.integers.weight is quantized[1][f"full/{layer.name}.weight"]
                assert layer.integers.bias is quantized[1][f"full/{layer.name}.bias"]


def test_the_record_is_files_and_comes_back(quantized: Quantized, tmp_path: Path) -> None:
    from pipeline.quantize import read

    write(tmp_path, quantized[0], quantized[1])
    assert {item.name for item in tmp_path.iterdir()} == {"params.json", "tensors.safetensors"}
    record, arrays = read(tmp_path)
    assert record == quantized[0]
    assert all((arrays[name] == array).all() for name, array in quantized[1].items())


def test_tensorflow_s_reference_kernels_agree_with_the_tflite_artifact(
    quantized: Quantized, tmp_path: Path
) -> None:
    import tensorflow as tf

    target = runtimes()["tflite"]
    path = written(
        graph_of(quantized, target, "w8a8", "pointwise", "full"), target, quantized[0], tmp_path
    )
    reference = tf.lite.Interpreter(
        str(path),
        experimental_op_resolver_type=tf.lite.experimental.OpResolverType.BUILTIN_REF,
    ).get_signature_runner()
    session = target.load(path, threads=1)
    for image in quantized[2]:
        nhwc = np.ascontiguousarray(image[None].transpose(0, 2, 3, 1))
        expected = reference(image=nhwc)["logits"]
        assert np.abs(session(image[None]) - expected).max() < 0.02 * np.abs(expected).max()


def integers_of_onnx(path: Path) -> dict[str, NDArray[Any]]:
    import onnx

    tensors = onnx.load(str(path)).graph.initializer
    found = {t.name: onnx.numpy_helper.to_array(t) for t in tensors}
    layers = [n.removesuffix(".weight.q") for n in found if n.endswith(".weight.q")]
    turned = {
        n: found[f"{n}.weight.q"].T if found[f"{n}.weight.q"].ndim == 2 else found[f"{n}.weight.q"]
        for n in layers
    }
    return {
        **{f"{n}.weight": turned[n] for n in layers},
        **{f"{n}.bias": found[f"{n}.bias.q"] for n in layers},
        **{f"{n}.weight_scale": found[f"{n}.weight.scale"] for n in layers},
    }


def integers_of_tflite(path: Path) -> dict[str, NDArray[Any]]:
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    kinds = {schema.TensorType.INT8: np.int8, schema.TensorType.INT32: np.int32}
    found: dict[str, NDArray[Any]] = {}
    for tensor in model.subgraphs[0].tensors:
        name = tensor.name.decode()
        data = model.buffers[tensor.buffer].data
        if data is None or tensor.type not in kinds or name.startswith("axes"):
            continue
        array = np.frombuffer(bytes(data), kinds[tensor.type]).reshape(tensor.shape)
        if array.ndim == 4:
            array = array.transpose((3, 0, 1, 2) if array.shape[0] == 1 else (0, 3, 1, 2))
        found[name] = array
        if name.endswith(".weight"):
            found[f"{name}_scale"] = tensor.quantization.scale
    return found


def integers_of_openvino(path: Path) -> dict[str, NDArray[Any]]:
    import openvino

    found: dict[str, NDArray[Any]] = {}
    for op in openvino.Core().read_model(path).get_ordered_ops():
        if op.get_type_name() not in {"Convolution", "GroupConvolution", "MatMul"}:
            continue
        scaled = op.input_value(1).get_node()
        if scaled.get_type_name() != "Multiply":
            continue
        integers = scaled.input_value(0).get_node().input_value(0).get_node().data
        # The layer's name went to the bias addition that reads it.
        (reader,) = op.output(0).get_target_inputs()
        name = reader.get_node().get_friendly_name()
        found[f"{name}.weight"] = integers
        found[f"{name}.weight_scale"] = scaled.input_value(1).get_node().data
    return found


def integers_of_coreml(path: Path) -> dict[str, NDArray[Any]]:
    import coremltools as ct
    from coremltools.converters.mil.frontend.milproto.load import load

    model = ct.models.MLModel(str(path), skip_model_load=True)
    spec = model.get_spec()
    program = load(spec, spec.specificationVersion, model.weights_dir)
    found: dict[str, NDArray[Any]] = {}
    for op in program.functions["main"].operations:
        if op.op_type == "constexpr_affine_dequantize":
            name = op.outputs[0].name.removesuffix("_weight")
            found[f"{name}.weight"] = op.quantized_data.val
            found[f"{name}.weight_scale"] = op.scale.val
    return found


READERS = {
    "onnx": integers_of_onnx,
    "tflite": integers_of_tflite,
    "openvino": integers_of_openvino,
    "coreml": integers_of_coreml,
}


@pytest.mark.parametrize("name", sorted(READERS))
def test_the_file_holds_the_integers_of_the_record(
    quantized: Quantized, name: str, tmp_path: Path
) -> None:
    target = runtimes()[name]
    graph = graph_of(quantized, target, "w8a8", "all", "full")
    found = READERS[name](written(graph, target, quantized[0], tmp_path))
    layers = [layer for layer in graph.weighted if layer.integers is not None]
    assert len([key for key in found if key.endswith(".weight")]) == len(layers)
    for layer in layers:
        assert layer.integers is not None
        key = layer.name.replace(".", "_") if name == "coreml" else layer.name
        weight = layer.integers.weight
        assert (found[f"{key}.weight"].reshape(weight.shape) == weight).all(), layer.name
        assert (found[f"{key}.weight_scale"].ravel() == layer.integers.weight_scales).all()
        if f"{key}.bias" in found:
            assert (found[f"{key}.bias"] == layer.integers.bias).all()


Scales = dict[str, tuple[float, int]]


def scales_of_onnx(path: Path) -> Scales:
    import onnx

    model = onnx.load(str(path)).graph
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.initializer}
    quantizers = [node for node in model.node if node.op_type == "QuantizeLinear"]
    return {
        node.name.removesuffix(".q"): (
            float(constants[node.input[1]]),
            int(constants[node.input[2]]) - 128,
        )
        for node in quantizers
    }


def scales_of_openvino(path: Path) -> Scales:
    import openvino

    found: Scales = {}
    for op in openvino.Core().read_model(path).get_ordered_ops():
        if op.get_type_name() == "FakeQuantize":
            ends = [float(op.input_value(i).get_node().data.ravel()[0]) for i in range(1, 5)]
            assert ends[:2] == ends[2:]
            scale = (ends[1] - ends[0]) / 255
            found[op.get_friendly_name()] = (scale, round(-128 - ends[0] / scale))
    return found


def scales_of_tflite(path: Path) -> Scales:
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(path.read_bytes())
    return {
        tensor.name.decode().removesuffix(".q"): (
            float(tensor.quantization.scale[0]),
            int(tensor.quantization.zeroPoint[0]),
        )
        for tensor in model.subgraphs[0].tensors
        if tensor.name.endswith(b".q")
    }


def scales_of_coreml(path: Path) -> Scales:
    import coremltools as ct
    from coremltools.converters.mil.frontend.milproto.load import load

    model = ct.models.MLModel(str(path), skip_model_load=True)
    spec = model.get_spec()
    program = load(spec, spec.specificationVersion, model.weights_dir)
    found: Scales = {}
    for op in program.functions["main"].operations:
        if op.op_type == "quantize":
            # coremltools turns int8 with zero point -128 into uint8 with 0, which it leaves out.
            zero_point = int(op.zero_point.val) if op.zero_point is not None else 0
            unsigned = op.output_dtype.val == "uint8"
            found[op.outputs[0].name] = (float(op.scale.val), zero_point - 128 * unsigned)
    return found


SCALE_READERS = {
    "onnx": scales_of_onnx,
    "tflite": scales_of_tflite,
    "openvino": scales_of_openvino,
    "coreml": scales_of_coreml,
}


@pytest.mark.parametrize("name", sorted(SCALE_READERS))
def test_the_file_holds_the_scales_of_the_record(
    quantized: Quantized, name: str, tmp_path: Path
) -> None:
    target = runtimes()[name]
    graph = graph_of(quantized, target, "w8a8", "all", "full")
    found = SCALE_READERS[name](written(graph, target, quantized[0], tmp_path))
    if name == "coreml":
        # coremltools renames an operation now and then, and keeps their order; of two sites of
        # equal grids behind each other it keeps one.
        sites = quantized[0].sites
        kept = [s for s in graph.sites if sites.get(graph[s].inputs[0]) != sites[s]]
        found = dict(zip(kept, found.values(), strict=True))
    used = set()
    for site in graph.sites:
        # TFLite names a tensor after the layer that writes it, and sites of equal grids share one.
        key = site
        while key not in found:
            key = graph[key].inputs[0]
        used.add(key)
        expected = quantized[0].sites[site]
        scale, zero_point = found[key]
        assert zero_point == expected.zero_point, site
        # OpenVINO is given the ends of the range in float32 and derives the scale from them.
        assert scale == pytest.approx(expected.scale, rel=1e-6 if name == "openvino" else 0)
    assert used == set(found)
