"""TFLite, written op by op.

In: a `Graph`. Out: one .tflite file, channels last throughout and without a transpose. An integer
layer reads and writes int8, so its output is a site too; GELU between two int8 sites is TFLite's
int8 lookup. TFLite has no LayerNorm: it becomes seven float ops.
"""

from __future__ import annotations

from collections import Counter
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
from targets.runtimes._tflite_file import IDENTIFIER, TfliteFile

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.records import Quantization
    from targets.base import Image, Logits, Session

WEIGHTED_OPS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
QUANTIZE_OPS = ("QUANTIZE", "DEQUANTIZE")


class TfLite:
    """The runtime `tflite` (LiteRT)."""

    name = "tflite"
    capabilities = Capabilities(
        suffix=".tflite",
        layout="NHWC",
        extra="tflite",
        distributions=("ai-edge-litert",),
        graph_forms=("NHWC-native",),
        gelu="tanh",
        integer_outputs=frozenset(set(Layer) - {Layer.HEAD}),
        float_layers={Layer.HEAD: "an int8 head would round the logits to int8"},
        default_isa="arm",
    )

    def export(self, graph: g.Graph, path: Path, metadata: str) -> None:
        """Write the .tflite file; see `targets.base.Runtime`."""
        path.write_bytes(_Emitter(graph).model(metadata))

    def prove(self, path: Path, graph: g.Graph) -> Proof:
        """Count ops and the types of their tensors in the file, which the runtime runs as it is."""
        from ai_edge_litert import schema_py_generated as schema

        model = _load(path)
        tensors = model.subgraphs[0].tensors
        names = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
        counts: Counter[str] = Counter()
        integer = 0
        for op in model.subgraphs[0].operators:
            kind = names[model.operatorCodes[op.opcodeIndex].builtinCode]
            counts[kind] += 1
            int8 = all(tensors[i].type == schema.TensorType.INT8 for i in op.inputs[:2])
            integer += kind in WEIGHTED_OPS and int8
        return Proof(
            method="ops and tensor types of the file",
            integer_layers=integer,
            expected_integer_layers=graph.integer_layers,
            weighted_layers=len(graph.weighted),
            transposes_per_block=counts["TRANSPOSE"] / graph.blocks,
            quantize_ops_per_block=sum(counts[name] for name in QUANTIZE_OPS) / graph.blocks,
            op_counts=dict(sorted(counts.items())),
        )

    def read_metadata(self, path: Path) -> str:
        """Return this project's metadata buffer."""
        model = _load(path)
        for entry in model.metadata or []:
            if entry.name == METADATA_KEY.encode():
                return bytes(model.buffers[entry.buffer].data).decode()
        return ""

    def can_run(self) -> NotRun | None:
        """LiteRT runs wherever it is installed."""
        require_installed(self)
        return None

    def load(self, path: Path, threads: int) -> Session:
        """Return a session on the interpreter with its default delegate, XNNPACK."""
        from ai_edge_litert.interpreter import Interpreter

        try:
            interpreter = Interpreter(model_path=str(path), num_threads=threads)
            runner = interpreter.get_signature_runner()
        except (ValueError, RuntimeError) as error:
            raise _not_tflite(path, error) from error

        def run(image: Image) -> Logits:
            nhwc = np.ascontiguousarray(image.transpose(0, 2, 3, 1))
            logits: Logits = runner(**{INPUT_NAME: nhwc})[OUTPUT_NAME]
            return logits

        return run


def _load(path: Path) -> Any:
    from ai_edge_litert import schema_py_generated as schema

    try:
        data = path.read_bytes()
        assert data[4:8] == IDENTIFIER, "no TFLite identifier"
        return schema.ModelT.InitFromPackedBuf(data)
    except Exception as error:  # flatbuffers reads out of bounds in as many ways as there are bytes
        raise _not_tflite(path, error) from error


def _not_tflite(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"{path} is not a TFLite file ({type(error).__name__})",
        allowed="an artifact that `convnext-edge export` wrote",
        do="Export it again",
    )


class _Emitter:
    """Walks the graph once; a value exists as float32, as int8, or both."""

    def __init__(self, graph: g.Graph) -> None:
        self.file = TfliteFile(dynamic_batch=graph.export.batch == "dynamic")
        self.schema = self.file.schema
        self.graph = graph
        self.batch = 1 if graph.export.batch == "dynamic" else graph.export.batch
        self.floats: dict[str, int] = {}
        self.int8s: dict[str, int] = {}
        self.parameters: dict[int, Quantization] = {}

    def model(self, metadata: str) -> bytes:
        for op in self.graph.ops:
            self._emit(op)
        image = self.floats[self.graph.ops[0].name]
        logits = self._float(self.graph.ops[-1].name)
        return self.file.finish(
            inputs={INPUT_NAME: image},
            outputs={OUTPUT_NAME: logits},
            metadata={METADATA_KEY: metadata.encode()},
        )

    def _emit(self, op: g.Op) -> None:
        match op:
            case g.Input():
                self.floats[op.name] = self.file.tensor(op.name, self._nhwc(op.shape))
            case g.Conv() | g.Linear():
                self._weighted(op)
            case g.Norm():
                self._norm(op)
            case g.ResponseNorm():
                self._response_norm(op)
            case g.Shift():
                bias = self.file.constant(f"{op.name}.bias", op.bias)
                self._binary("ADD", op.name, self._float(op.inputs[0]), bias, op.shape)
            case g.Gelu():
                self._gelu(op)
            case g.Add():
                left, right = (self._float(name) for name in op.inputs)
                self._binary("ADD", op.name, left, right, op.shape)
            case g.Mean():
                options = self.file.options("ReducerOptions", keepDims=False)
                source = self._float(op.inputs[0])
                self._float_op("MEAN", op.name, [source, self._axes(1, 2)], op.shape, options)
            case g.QuantizePair():
                self._quantize(op)
            case _:
                msg = f"{type(op).__name__} has no TFLite form"
                raise NotImplementedError(msg)

    def _weighted(self, op: g.Conv | g.Linear) -> None:
        kind, weight_axis, options = self._kernel(op)
        if op.integers is None:
            weight = self.file.constant(f"{op.name}.weight", self._ohwi(op, op.weight))
            bias = self.file.constant(f"{op.name}.bias", op.bias)
            source = self._padded(op, self._float(op.inputs[0]))
            self._float_op(kind, op.name, [source, weight, bias], op.shape, options)
            return
        layer, site = op.integers, self.graph.output_site(op)
        assert site is not None, f"{op.name} writes integers and has no output site"
        weight = self.file.constant(
            f"{op.name}.weight",
            self._ohwi(op, layer.weight),
            self.file.per_channel(layer.weight_scales, weight_axis),
        )
        bias = self.file.constant(
            f"{op.name}.bias", layer.bias, self.file.per_channel(layer.bias_scales, 0)
        )
        source = self._padded(op, self.int8s[op.inputs[0]])
        out = self._int8_tensor(op.name, op.shape, site.parameters)
        self.file.operator(kind, [source, weight, bias], [out], options)
        self.int8s[op.name] = out

    def _padded(self, op: g.Conv | g.Linear, source: int) -> int:
        """Pad what a strided convolution reads: SAME would pad on the far side only.

        An int8 PAD fills with the tensor's zero point, which stands for 0.
        """
        if not _pads_by_itself(op):
            assert isinstance(op, g.Conv)
            channels, height, width = self.graph[op.inputs[0]].shape
            grown = (channels, height + 2 * op.padding, width + 2 * op.padding)
            sides = np.array([[0, 0], [op.padding] * 2, [op.padding] * 2, [0, 0]], np.int32)
            amount = self.file.constant(f"{op.name}.padding", sides)
            parameters = self.parameters.get(source)
            out = (
                self.file.tensor(f"{op.name}.padded", self._nhwc(grown))
                if parameters is None
                else self._int8_tensor(f"{op.name}.padded", grown, parameters)
            )
            self.file.operator("PAD", [source, amount], [out], self.file.options("PadOptions"))
            return out
        return source

    def _kernel(self, op: g.Conv | g.Linear) -> tuple[str, int, Any]:
        schema = self.schema
        if isinstance(op, g.Linear):
            return (
                "FULLY_CONNECTED",
                0,
                self.file.options("FullyConnectedOptions", keepNumDims=True),
            )
        same = op.padding and _pads_by_itself(op)
        padding = schema.Padding.SAME if same else schema.Padding.VALID
        common = {"strideH": op.stride, "strideW": op.stride, "padding": padding}
        common |= {"dilationHFactor": 1, "dilationWFactor": 1}
        if op.groups > 1:
            options = self.file.options("DepthwiseConv2DOptions", depthMultiplier=1, **common)
            return "DEPTHWISE_CONV_2D", 3, options
        return "CONV_2D", 0, self.file.options("Conv2DOptions", **common)

    @staticmethod
    def _ohwi(op: g.Conv | g.Linear, weight: NDArray[Any]) -> NDArray[Any]:
        if isinstance(op, g.Linear):
            return weight
        return weight.transpose((1, 2, 3, 0) if op.groups > 1 else (0, 2, 3, 1))

    def _norm(self, op: g.Norm) -> None:
        x, shape, one = self._float(op.inputs[0]), op.shape, (1, *op.shape[1:])
        keep = self.file.options("ReducerOptions", keepDims=True)
        last = self._axes(len(shape))
        mean = self._float_op("MEAN", f"{op.name}.mean", [x, last], one, keep)
        square = self._binary("SQUARED_DIFFERENCE", f"{op.name}.square", x, mean, shape)
        variance = self._float_op("MEAN", f"{op.name}.variance", [square, last], one, keep)
        eps = self.file.constant(f"{op.name}.eps", np.float32(op.eps))
        shifted = self._binary("ADD", f"{op.name}.shifted", variance, eps, one)
        inverse = self._float_op("RSQRT", f"{op.name}.inverse", [shifted], one, None)
        centred = self._binary("SUB", f"{op.name}.centred", x, mean, shape)
        y = self._binary("MUL", op.name, centred, inverse, shape)
        if op.weight is not None and op.bias is not None:
            gamma = self.file.constant(f"{op.name}.weight", op.weight)
            beta = self.file.constant(f"{op.name}.bias", op.bias)
            scaled = self._binary("MUL", f"{op.name}.scaled", y, gamma, shape)
            self._binary("ADD", op.name, scaled, beta, shape)

    def _response_norm(self, op: g.ResponseNorm) -> None:
        x, name, shape = self._float(op.inputs[0]), op.name, op.shape
        each, one = (shape[0], 1, 1), (1, 1, 1)
        keep = self.file.options("ReducerOptions", keepDims=True)
        square = self._binary("MUL", f"{name}.square", x, x, shape)
        total = self._float_op("SUM", f"{name}.sum", [square, self._axes(1, 2)], each, keep)
        response = self._float_op("SQRT", f"{name}.response", [total], each, None)
        mean = self._float_op("MEAN", f"{name}.mean", [response, self._axes(3)], one, keep)
        eps, unit, gamma = (
            self.file.constant(f"{name}.{what}", value)
            for what, value in (
                ("eps", np.float32(op.eps)),
                ("one", np.float32(1)),
                ("weight", op.weight),
            )
        )
        shifted = self._binary("ADD", f"{name}.shifted", mean, eps, one)
        relative = self._binary("DIV", f"{name}.relative", response, shifted, each)
        scaled = self._binary("MUL", f"{name}.scaled", relative, gamma, each)
        factor = self._binary("ADD", f"{name}.factor", scaled, unit, each)
        self._binary("MUL", name, x, factor, shape)

    def _gelu(self, op: g.Gelu) -> None:
        options = self.file.options("GeluOptions", approximate=self.graph.export.gelu == "tanh")
        source, site = self.int8s.get(op.inputs[0]), self.graph.output_site(op)
        if source is None or site is None:
            self._float_op("GELU", op.name, [self._float(op.inputs[0])], op.shape, options)
            return
        out = self._int8_tensor(op.name, op.shape, site.parameters)
        self.file.operator("GELU", [source], [out], options)
        self.int8s[op.name] = out

    def _quantize(self, op: g.QuantizePair) -> None:
        source = op.inputs[0]
        if source in self.int8s and self.parameters[self.int8s[source]] == op.parameters:
            self.int8s[op.name] = self.int8s[source]
            return
        # Of another grid, or of none yet: QUANTIZE takes both.
        given = self.int8s[source] if source in self.int8s else self._float(source)
        out = self._int8_tensor(op.name, op.shape, op.parameters)
        self.file.operator("QUANTIZE", [given], [out], self.file.options("QuantizeOptions"))
        self.int8s[op.name] = out

    def _float(self, name: str) -> int:
        """Return a value as float32, dequantized at most once."""
        if name not in self.floats:
            options = self.file.options("DequantizeOptions")
            shape = self.graph[name].shape
            source = self.int8s[name]
            self._float_op("DEQUANTIZE", name, [source], shape, options)
        return self.floats[name]

    def _binary(self, kind: str, name: str, left: int, right: int, shape: g.Shape) -> int:
        table = {name: f"{name.title()}Options" for name in ("ADD", "SUB", "MUL", "DIV")}
        options = self.file.options(table.get(kind, "SquaredDifferenceOptions"))
        return self._float_op(kind, name, [left, right], shape, options)

    def _float_op(
        self, kind: str, name: str, inputs: list[int], shape: g.Shape, options: Any
    ) -> int:
        out = self.file.tensor(name, self._nhwc(shape))
        self.file.operator(kind, inputs, [out], options)
        self.floats[name] = out
        return out

    def _nhwc(self, shape: g.Shape) -> list[int]:
        return [self.batch, *shape[1:], shape[0]]

    def _axes(self, *values: int) -> int:
        return self.file.constant(f"axes{values}", np.array(values, np.int32))

    def _int8_tensor(self, name: str, shape: g.Shape, parameters: Quantization) -> int:
        tensor = self.file.int8_tensor(f"{name}.q", self._nhwc(shape), parameters)
        self.parameters[tensor] = parameters
        return tensor


def _pads_by_itself(op: g.Conv | g.Linear) -> bool:
    return isinstance(op, g.Linear) or op.padding == 0 or op.stride == 1


RUNTIME = TfLite()
