"""ONNX with quantize/dequantize pairs, for onnxruntime.

In: a `Graph`. Out: one .onnx file (opset 20, external data never used). In the form `channels-last
linear` LayerNorm, GELU and the pointwise layers work on rows of channels, so that onnxruntime fuses
each dequantize-Gemm into one QGemm with float output; only convolutions see NCHW. Onnxruntime has
no convolution that reads integers and writes floats: there such a one is a linear layer on its
windows. In the form `1x1 convolution` pointwise layers are convolutions too, which become integer
where they write integers.
Activations are uint8 (the contract's int8 + 128), which is what MLAS's u8 x s8 kernels take.

Where no site says on which grid a linear layer reads (w8a8-dynamic), onnxruntime finds one for each
inference and multiplies in integers: DynamicQuantizeLinear and MatMulInteger, which it fuses into
one op. Its ConvInteger took 3 to 30 times as long as a float convolution, so convolutions compute
in float there, as all layers do in w8; their weights lie in the file as int8 behind Cast and Mul.
Onnxruntime folds those two when it loads the file. A DequantizeLinear it would not: it would keep
a convolution out of its blocked layout, and turn a Gemm into a MatMulNBits that quantizes
activations unasked.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.arithmetic import along_rows
from pipeline.placements import PLACEMENTS
from pipeline.records import Proof
from targets import graph as g
from targets.base import (
    INPUT_NAME,
    METADATA_KEY,
    NO_FOUR_BITS,
    OUTPUT_NAME,
    Capabilities,
    NotRun,
    OpTime,
    require_installed,
)
from targets.runtimes._counts import computing_layers
from targets.runtimes._onnx_file import (
    as_session,
    distribution,
    integer_weights,
    load,
    session,
)
from targets.runtimes._op_kinds import WARM_UP, kind_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx
    from numpy.typing import NDArray

    from pipeline.records import OpKind
    from targets.base import Image, Session

OPSET, IR_VERSION = 20, 9
LINEAR, CONVOLUTION = "channels-last linear", "1x1 convolution"
FLOAT = 1
"""onnx.TensorProto.FLOAT."""
INTEGER_OPS = (
    "ConvInteger",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
)
KERNEL_TIME = "_kernel_time"
LAYOUT_OPS = ("Transpose", "ReorderInput", "ReorderOutput")
QUANTIZE_OPS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


class OnnxRuntime:
    """The runtime `onnx`."""

    name = "onnx"
    capabilities = Capabilities(
        suffix=".onnx",
        layout="NCHW",
        extra="onnx",
        distributions=("onnx", distribution()),
        schemes=("float", "w8a8", "w4a8", "w8a8-dynamic", "w8"),
        graph_forms=(LINEAR, CONVOLUTION),
        # A QLinearConv writes integers.
        placements_of_form={
            CONVOLUTION: tuple(name for name, one in PLACEMENTS.items() if one.outputs)
        },
        gelu="erf",
        unsupported_schemes={
            "w4a4": NO_FOUR_BITS,
            "float16": "onnxruntime has no CPU kernels for it; it would convert to float and back",
            "w8a16": "onnxruntime has no kernel for 16-bit activations; it would compute in float",
        },
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
            session(path, threads=1, optimised=optimised)
            counts = Counter(node.op_type for node in load(optimised).graph.node)
        return Proof(
            method="op types of the graph that onnxruntime saves after its own optimisation",
            integer_layers=sum(counts[name] for name in INTEGER_OPS),
            expected_integer_layers=computing_layers(graph, {g.Linear}),
            weighted_layers=len(graph.weighted),
            transposes_per_block=sum(counts[name] for name in LAYOUT_OPS) / graph.blocks,
            quantize_ops_per_block=sum(counts[name] for name in QUANTIZE_OPS) / graph.blocks,
            op_counts=dict(sorted(counts.items())),
            integer_weights=integer_weights(load(path)),
        )

    def read_metadata(self, path: Path) -> str:
        """Return this project's entry of the file's metadata_props."""
        entries = {entry.key: entry.value for entry in load(path).metadata_props}
        return str(entries.get(METADATA_KEY, ""))

    def can_run(self) -> NotRun | None:
        """Onnxruntime runs wherever it is installed."""
        require_installed(self)
        return None

    def load(self, path: Path, threads: int) -> Session:
        """Return a session on the CPU provider."""
        load(path)  # refuses a damaged file and external data outside its folder
        return as_session(session(path, threads=threads))

    def op_times(
        self, path: Path, image: Image, *, threads: int, inferences: int
    ) -> list[OpTime] | NotRun:
        """Read onnxruntime's profile."""
        with TemporaryDirectory() as folder:
            running = session(path, threads=threads, profiled=Path(folder) / "profile")
            for _ in range(WARM_UP + inferences):
                running.run([OUTPUT_NAME], {INPUT_NAME: image})
            events = json.loads(Path(running.end_profiling()).read_bytes())
        kernels = [
            one for one in events if one.get("cat") == "Node" and one["name"].endswith(KERNEL_TIME)
        ]
        per_run = len(kernels) // (WARM_UP + inferences)
        times = np.array([one["dur"] for one in kernels]).reshape(-1, per_run)[WARM_UP:]
        return [
            OpTime(kind=_kind(op, name), op=op, name=name, ms=us / 1000)
            for us, op, name in zip(
                np.median(times, axis=0).tolist(),
                (one["args"]["op_name"] for one in kernels),
                (one["name"].removesuffix(KERNEL_TIME) for one in kernels),
                strict=False,  # the names of one run
            )
        ]


def _kind(op: str, name: str) -> OpKind:
    if op in {*LAYOUT_OPS, "Reshape", "Slice"}:
        return "layout"
    if op in QUANTIZE_OPS:
        return "quantize"
    # Its rewrites hang words on: stem.conv_nchwc, stages.0.blocks.1.depthwise_token_6.
    return kind_of([name.partition("_nchwc")[0].partition("_token")[0].partition("_quant")[0]])


class _Emitter:
    """Walks the graph once.

    Every value may exist as NCHW, as NHWC, as rows of channels, and what a convolution on patches
    reads as these.
    """

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
            case g.Scale():
                layout, source = next(iter(self.values[op.inputs[0]].items()))
                shape = (-1, 1, 1) if layout == "NCHW" else (-1,)
                weight = self._constant(f"{op.name}.weight", op.weight.reshape(shape))
                self._put(op, layout, self._node("Mul", [source, weight], op.name))
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

    def _conv(self, op: g.Conv | g.Linear) -> None:
        """Emit a convolution, or a linear layer as one of 1x1."""
        if self._on_patches(op):
            self._conv_on_patches(op)
            return
        stride, padding, groups = (
            (op.stride, op.padding, op.groups) if isinstance(op, g.Conv) else (1, 0, 1)
        )
        out = self._node(
            "Conv",
            [self._as(op.inputs[0], "NCHW"), *self._weights(op, _kernel_shape(op))],
            op.name,
            strides=[stride] * 2,
            pads=[padding] * 4,
            group=groups,
            kernel_shape=_kernel_shape(op)[2:],
        )
        self._put(op, "NCHW", out)

    def _on_patches(self, op: g.Op) -> bool:
        """Tell whether a convolution is emitted as a linear layer on each of its windows.

        Those do not overlap.
        """
        return (
            isinstance(op, g.Conv)
            and op.integers is not None
            and isinstance(self.graph[op.inputs[0]], g.QuantizePair)
            and self.graph.output_site(op) is None
            and (op.groups, op.padding, [op.stride] * 2) == (1, 0, _kernel_shape(op)[2:])
        )

    def _conv_on_patches(self, op: g.Conv | g.Linear) -> None:
        assert op.integers is not None, "_on_patches has seen to it"
        weight = np.moveaxis(op.integers.weight.reshape(_kernel_shape(op)), 1, -1)
        flat = replace(op.integers, weight=weight.reshape(len(weight), -1))
        inputs = [self._as(op.inputs[0], "patches"), *self._weights(replace(op, integers=flat))]
        self._put(op, "rows", self._node("Gemm", inputs, op.name))

    def _patches(self, name: str, side: int) -> str:
        """Emit the windows of a value as rows, each of its places' channels one after another."""
        channels, *lengths = self.graph[name].shape
        whole = [length // side * side for length in lengths]
        source = self._as(name, "NHWC")
        if whole != lengths:  # what no window covers
            ends = [self._axes(0, 0), self._axes(*whole), self._axes(1, 2)]
            source = self._node("Slice", [source, *ends], f"{name}.covered")
        height, width = (length // side for length in whole)
        places = self._axes(-1, height, side, width, side, channels)
        split = self._node("Reshape", [source, places], f"{name}.split")
        turned = self._node("Transpose", [split], f"{name}.turned", perm=[0, 1, 3, 2, 4, 5])
        row = self._axes(-1, side * side * channels)
        return self._node("Reshape", [turned, row], f"{name}.patches")

    def _linear(self, op: g.Linear) -> None:
        if op.integers is not None and self.graph.export.scheme == "w8a8-dynamic":
            out = self._dynamic_linear(op.name, self._as(op.inputs[0], "rows"), op.integers)
        elif self.graph.export.graph_form == CONVOLUTION and len(op.shape) > 1:
            self._conv(op)
            return
        else:
            out = self._node("Gemm", [self._as(op.inputs[0], "rows"), *self._weights(op)], op.name)
        self._put(op, "rows", out)

    def _dynamic_linear(self, name: str, source: str, layer: g.Integers) -> str:
        x, scale, zero = (f"{name}.{what}" for what in ("x", "x.scale", "x.zero"))
        self._nodes("DynamicQuantizeLinear", [source], [x, scale, zero])
        weight = self._constant(f"{name}.weight.q", layer.weight.T)
        scales = self._constant(f"{name}.weight.scale", layer.weight_scales)
        total = self._node("MatMulInteger", [x, weight, zero], f"{name}.total")
        value = self._node("Cast", [total], f"{name}.value", to=FLOAT)
        step = self._node("Mul", [scale, scales], f"{name}.step")
        product = self._node("Mul", [value, step], f"{name}.product")
        return self._node("Add", [product, self._constant(f"{name}.bias", layer.bias)], name)

    def _weights(self, op: g.Weighted, kernel: Sequence[int] | None = None) -> list[str]:
        """Emit weight and bias: of a convolution's shape, or transposed as Gemm takes them."""

        def laid_out(values: NDArray[Any]) -> NDArray[Any]:
            return values.T if kernel is None else values.reshape(kernel)

        out_axis = 1 if kernel is None else 0
        if op.integers is None:
            weight = self._constant(f"{op.name}.weight", laid_out(op.weight))
            return [weight, self._constant(f"{op.name}.bias", op.bias)]
        layer, name = op.integers, f"{op.name}.weight"
        q = laid_out(layer.weight)
        if layer.bias_scales is None:
            bias = self._constant(f"{op.name}.bias", layer.bias)
            return [self._unpacked(name, q, layer, out_axis), bias]
        weight = self._dequantize(name, q, layer.weight_scales, out_axis)
        return [weight, self._dequantize(f"{op.name}.bias", layer.bias, layer.bias_scales, 0)]

    def _unpacked(self, name: str, q: NDArray[np.int8], layer: g.Integers, out_axis: int) -> str:
        stored = self._constant(f"{name}.q", q)
        along = np.moveaxis(along_rows(layer.weight_scales, q.ndim), 0, out_axis)
        scales = self._constant(f"{name}.scale", along)
        value = self._node("Cast", [stored], f"{name}.value", to=FLOAT)
        return self._node("Mul", [value, scales], name)

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
        for reader in self.graph.users(op.name):
            if isinstance(reader, g.Conv) and self._on_patches(reader):
                layout, source = "patches", self._patches(op.inputs[0], reader.stride)
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
        assert layout == "rows", f"{name} is not made into {layout}"
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
        self._nodes(kind, inputs, [output], **attributes)
        return output

    def _nodes(
        self, kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any
    ) -> None:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, outputs, outputs[0], **attributes))


def _kernel_shape(op: g.Conv | g.Linear) -> list[int]:
    """Return the shape of a weight as a convolution's: (out, in, height, width)."""
    return [*op.weight.shape, 1, 1] if isinstance(op, g.Linear) else [*op.weight.shape]


RUNTIME = OnnxRuntime()
