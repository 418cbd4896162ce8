"""ONNX with quantize/dequantize pairs, for onnxruntime.

In: a `Graph`. Out: one .onnx file (opset 20, external data never used). The form is channels-last
linear: LayerNorm, GELU and the pointwise layers work on rows of channels, so that onnxruntime fuses
each dequantize-Gemm into one QGemm with float output; only convolutions see NCHW. Activations are
uint8 (the contract's int8 + 128), which is what MLAS's u8 x s8 kernels take.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import ArtifactError
from pipeline.records import Layer, Proof
from targets import graph as g
from targets.base import (
    INPUT_NAME,
    METADATA_KEY,
    OUTPUT_NAME,
    Capabilities,
    NotRun,
    require_installed,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import onnx
    from numpy.typing import NDArray

    from targets.base import Image, Logits, Session

OPSET, IR_VERSION = 20, 9
INTEGER_OPS = ("QGemm", "QLinearConv", "QLinearMatMul", "MatMulIntegerToFloat", "ConvInteger")
LAYOUT_OPS = ("Transpose", "ReorderInput", "ReorderOutput")
QUANTIZE_OPS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


class OnnxRuntime:
    """The runtime `onnx`."""

    name = "onnx"
    capabilities = Capabilities(
        suffix=".onnx",
        layout="NCHW",
        extra="onnx",
        distributions=("onnx", "onnxruntime"),
        graph_forms=("channels-last linear",),
        gelu="tanh",
        # QLinearConv writes integers; QGemm writes float.
        integer_outputs=frozenset({Layer.STEM, Layer.DEPTHWISE, Layer.DOWNSAMPLE}),
    )

    def export(self, graph: g.Graph, path: Path, metadata: str) -> None:
        """Write the .onnx file; see `targets.base.Runtime`."""
        import onnx

        model = _Emitter(graph).model()
        onnx.helper.set_model_props(model, {METADATA_KEY: metadata})
        onnx.checker.check_model(model)
        path.write_bytes(model.SerializeToString(deterministic=True))

    def prove(self, path: Path, graph: g.Graph) -> Proof:
        """Count what onnxruntime executes after its own optimisation of the file."""
        with TemporaryDirectory() as folder:
            optimised = Path(folder) / "optimised.onnx"
            _session(path, threads=1, optimised=optimised)
            counts = Counter(node.op_type for node in _load(optimised).graph.node)
        return Proof(
            method="op types of the graph that onnxruntime saves after its own optimisation",
            integer_layers=sum(counts[name] for name in INTEGER_OPS),
            expected_integer_layers=graph.integer_layers,
            weighted_layers=len(graph.weighted),
            transposes_per_block=sum(counts[name] for name in LAYOUT_OPS) / graph.blocks,
            quantize_ops_per_block=sum(counts[name] for name in QUANTIZE_OPS) / graph.blocks,
            op_counts=dict(sorted(counts.items())),
        )

    def read_metadata(self, path: Path) -> str:
        """Return this project's entry of the file's metadata_props."""
        entries = {entry.key: entry.value for entry in _load(path).metadata_props}
        return str(entries.get(METADATA_KEY, ""))

    def can_run(self) -> NotRun | None:
        """Onnxruntime runs wherever it is installed."""
        require_installed(self)
        return None

    def load(self, path: Path, threads: int) -> Session:
        """Return a session on the CPU provider."""
        _load(path)  # refuses a damaged file and external data outside its folder
        session = _session(path, threads=threads)

        def run(image: Image) -> Logits:
            logits: Logits = session.run([OUTPUT_NAME], {INPUT_NAME: image})[0]
            return logits

        return run


def _load(path: Path) -> onnx.ModelProto:
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError has no public home
        raise ArtifactError(
            f"{path} is not an ONNX file ({type(error).__name__})",
            allowed="an artifact that `convnext-edge export` wrote",
            do="Export it again",
        ) from error
    graphs = [model.graph, *model.functions]
    if any(tensor.external_data for graph in graphs for tensor in _constants(graph)):
        raise ArtifactError(
            f"{path} refers to external data",
            allowed="an ONNX file with its weights inside",
            do="Export it again with this project",
        )
    return model


def _constants(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.TensorProto]:
    """Yield every constant, wherever a file can hide one that names another file."""
    yield from getattr(graph, "initializer", ())
    for sparse in getattr(graph, "sparse_initializer", ()):
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for inner in (attribute.g, *attribute.graphs):
                yield from _constants(inner)


def _session(path: Path, *, threads: int, optimised: Path | None = None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class _Emitter:
    """Walks the graph once; every value may exist as NCHW, as NHWC and as rows of channels."""

    def __init__(self, graph: g.Graph) -> None:
        self.graph = graph
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.values: dict[str, dict[str, str]] = {}

    def model(self) -> onnx.ModelProto:
        from onnx import TensorProto, helper

        batch = "batch" if self.graph.export.batch == "dynamic" else self.graph.export.batch
        for op in self.graph.ops:
            self._emit(op)
        image, last = self.graph.ops[0], self.graph.ops[-1]
        self._node("Identity", [self._as(last.name, "rows")], OUTPUT_NAME)
        return helper.make_model(
            helper.make_graph(
                self.nodes,
                "convnext",
                [
                    helper.make_tensor_value_info(
                        INPUT_NAME, TensorProto.FLOAT, [batch, *image.shape]
                    )
                ],
                [
                    helper.make_tensor_value_info(
                        OUTPUT_NAME, TensorProto.FLOAT, [batch, *last.shape]
                    )
                ],
                list(self.constants.values()),
            ),
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="convnext-edge",
        )

    def _emit(self, op: g.Op) -> None:
        match op:
            case g.Input():
                self.values[op.name] = {"NCHW": INPUT_NAME}
            case g.Conv():
                self._conv(op)
            case g.Linear():
                self._linear(op)
            case g.Norm():
                self._norm(op)
            case g.ResponseNorm():
                self._response_norm(op)
            case g.Shift():
                bias = self._constant(f"{op.name}.bias", op.bias.reshape(-1, 1, 1))
                source = self._as(op.inputs[0], "NCHW")
                self._put(op, "NCHW", self._node("Add", [source, bias], op.name))
            case g.Gelu():
                self._map(op, "Gelu", approximate=self.graph.export.gelu.replace("erf", "none"))
            case g.Add():
                left, right = (self._as(name, "rows") for name in op.inputs)
                self._put(op, "rows", self._node("Add", [left, right], op.name))
            case g.Mean():
                source = self._as(op.inputs[0], "NCHW")
                out = self._node("ReduceMean", [source, self._axes(2, 3)], op.name, keepdims=0)
                self._put(op, "rows", out)
            case g.QuantizePair():
                self._quantize(op)
            case _:
                msg = f"{type(op).__name__} has no ONNX form"
                raise NotImplementedError(msg)

    def _conv(self, op: g.Conv) -> None:
        out = self._node(
            "Conv",
            [self._as(op.inputs[0], "NCHW"), *self._weights(op, out_axis=0)],
            op.name,
            strides=[op.stride] * 2,
            pads=[op.padding] * 4,
            group=op.groups,
            kernel_shape=list(op.weight.shape[2:]),
        )
        self._put(op, "NCHW", out)

    def _linear(self, op: g.Linear) -> None:
        source = self._as(op.inputs[0], "rows")
        out = self._node("Gemm", [source, *self._weights(op, out_axis=1)], op.name)
        self._put(op, "rows", out)

    def _weights(self, op: g.Weighted, *, out_axis: int) -> list[str]:
        """Emit weight and bias; the output channels of the stored weight lie on `out_axis`."""
        turn = np.transpose if out_axis else np.asarray
        if op.integers is None:
            weight = self._constant(f"{op.name}.weight", turn(op.weight))
            return [weight, self._constant(f"{op.name}.bias", op.bias)]
        layer = op.integers
        weight = self._dequantize(
            f"{op.name}.weight", turn(layer.weight), layer.weight_scales, out_axis
        )
        return [weight, self._dequantize(f"{op.name}.bias", layer.bias, layer.bias_scales, 0)]

    def _dequantize(
        self, name: str, q: NDArray[Any], scales: NDArray[np.float32], axis: int
    ) -> str:
        inputs = [
            self._constant(f"{name}.q", q),
            self._constant(f"{name}.scale", scales),
            self._constant(f"{name}.zero", np.zeros(len(scales), q.dtype)),
        ]
        return self._node("DequantizeLinear", inputs, name, axis=axis)

    def _norm(self, op: g.Norm) -> None:
        ones = np.ones(op.shape[0], np.float32)
        scale = self._constant(f"{op.name}.weight", ones if op.weight is None else op.weight)
        inputs = [self._as(op.inputs[0], "rows"), scale]
        if op.bias is not None:
            inputs.append(self._constant(f"{op.name}.bias", op.bias))
        out = self._node("LayerNormalization", inputs, op.name, axis=-1, epsilon=op.eps)
        self._put(op, "rows", out)

    def _response_norm(self, op: g.ResponseNorm) -> None:
        x, name = self._as(op.inputs[0], "NHWC"), op.name
        eps, one = (
            self._constant(f"{name}.{what}", np.float32(value))
            for what, value in (("eps", op.eps), ("one", 1))
        )
        gamma = self._constant(f"{name}.weight", op.weight)
        response = self._node("ReduceL2", [x, self._axes(1, 2)], f"{name}.response")
        mean = self._node("ReduceMean", [response, self._axes(-1)], f"{name}.mean")
        shifted = self._node("Add", [mean, eps], f"{name}.shifted")
        relative = self._node("Div", [response, shifted], f"{name}.relative")
        scaled = self._node("Mul", [relative, gamma], f"{name}.scaled")
        factor = self._node("Add", [scaled, one], f"{name}.factor")
        self._put(op, "NHWC", self._node("Mul", [x, factor], name))

    def _quantize(self, op: g.QuantizePair) -> None:
        scale = self._constant(f"{op.name}.scale", np.float32(op.parameters.scale))
        zero = self._constant(f"{op.name}.zero", np.uint8(op.parameters.zero_point + 128))
        layout, source = next(iter(self.values[op.inputs[0]].items()))
        q = self._node("QuantizeLinear", [source, scale, zero], f"{op.name}.q")
        self._put(op, layout, self._node("DequantizeLinear", [q, scale, zero], op.name))

    def _map(self, op: g.Op, kind: str, **attributes: Any) -> None:
        layout, source = next(iter(self.values[op.inputs[0]].items()))
        self._put(op, layout, self._node(kind, [source], op.name, **attributes))

    def _put(self, op: g.Op, layout: str, value: str) -> None:
        self.values[op.name] = {layout: value}

    def _as(self, name: str, layout: str) -> str:
        """Return a value in a layout, converted at most once."""
        known = self.values[name]
        if layout not in known:
            known[layout] = self._convert(name, layout)
        return known[layout]

    def _convert(self, name: str, layout: str) -> str:
        shape = self.graph[name].shape
        if layout == "NCHW":
            source = self._as(name, "NHWC")
            return self._node("Transpose", [source], f"{name}.nchw", perm=[0, 3, 1, 2])
        if layout == "NHWC" and "rows" in self.values[name]:
            size = self._axes(-1, *shape[1:], shape[0])
            return self._node("Reshape", [self.values[name]["rows"], size], f"{name}.nhwc")
        if layout == "NHWC":
            source = self.values[name]["NCHW"]
            return self._node("Transpose", [source], f"{name}.nhwc", perm=[0, 2, 3, 1])
        source = self._as(name, "NHWC")
        return self._node("Reshape", [source, self._axes(-1, shape[0])], f"{name}.rows")

    def _axes(self, *values: int) -> str:
        return self._constant(f"int64{values}", np.array(values, np.int64))

    def _constant(self, name: str, value: NDArray[Any] | np.generic) -> str:
        from onnx import numpy_helper

        array = np.ascontiguousarray(value) if np.ndim(value) else np.asarray(value)
        self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def _node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, list(inputs), [output], output, **attributes))
        return output


RUNTIME = OnnxRuntime()
