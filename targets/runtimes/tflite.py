"""TFLite, written op by op through the runtime's own flatbuffer schema.

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

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.records import Quantization
    from targets.base import Image, Logits, Session

IDENTIFIER, SCHEMA_VERSION = b"TFL3", 3
WEIGHTED_OPS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
QUANTIZE_OPS = ("QUANTIZE", "DEQUANTIZE")
VERSIONS = {
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 3,
    "FULLY_CONNECTED": 5,
    "GELU": 2,
    "QUANTIZE": 1,
    "DEQUANTIZE": 2,
}
"""Op versions where they are above 1: those in which int8 and kept dimensions came in."""


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
        from ai_edge_litert import schema_py_generated as schema

        self.schema = schema
        self.graph = graph
        self.batch = 1 if graph.export.batch == "dynamic" else graph.export.batch
        self.buffers = [schema.BufferT()]
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self.codes: dict[str, int] = {}
        self.floats: dict[str, int] = {}
        self.int8s: dict[str, int] = {}
        self.parameters: dict[int, Quantization] = {}

    def model(self, metadata: str) -> bytes:
        import flatbuffers

        schema = self.schema
        for op in self.graph.ops:
            self._emit(op)
        image = self.floats[self.graph.ops[0].name]
        logits = self._float(self.graph.ops[-1].name)
        self.tensors[image].name, self.tensors[logits].name = INPUT_NAME, OUTPUT_NAME
        subgraph = schema.SubGraphT()
        subgraph.tensors, subgraph.operators = self.tensors, self.operators
        subgraph.inputs, subgraph.outputs = [image], [logits]
        subgraph.name = "main"
        model = schema.ModelT()
        model.version, model.description = SCHEMA_VERSION, "convnext-edge"
        model.subgraphs = [subgraph]
        model.operatorCodes = [self._code(kind) for kind in self.codes]
        model.signatureDefs = [self._signature(image, logits)]
        entry = schema.MetadataT()
        entry.name = METADATA_KEY
        entry.buffer = self._buffer(np.frombuffer(metadata.encode(), np.uint8))
        model.metadata = [entry]
        model.buffers = self.buffers
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), IDENTIFIER)
        return bytes(builder.Output())

    def _emit(self, op: g.Op) -> None:
        match op:
            case g.Input():
                self.floats[op.name] = self._tensor(op.name, self._nhwc(op.shape))
            case g.Conv() | g.Linear():
                self._weighted(op)
            case g.Norm():
                self._norm(op)
            case g.Gelu():
                self._gelu(op)
            case g.Add():
                left, right = (self._float(name) for name in op.inputs)
                self._binary("ADD", op.name, left, right, op.shape)
            case g.Mean():
                options = self._options("ReducerOptions", keepDims=False)
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
            weight = self._constant(f"{op.name}.weight", self._ohwi(op, op.weight))
            bias = self._constant(f"{op.name}.bias", op.bias)
            source = self._float(op.inputs[0])
            self._float_op(kind, op.name, [source, weight, bias], op.shape, options)
            return
        layer, site = op.integers, self.graph.output_site(op)
        assert site is not None, f"{op.name} writes integers and has no output site"
        weight = self._constant(
            f"{op.name}.weight",
            self._ohwi(op, layer.weight),
            self._per_channel(layer.weight_scales, weight_axis),
        )
        bias = self._constant(
            f"{op.name}.bias", layer.bias, self._per_channel(layer.bias_scales, 0)
        )
        out = self._int8_tensor(op.name, op.shape, site.parameters)
        self._operator(kind, [self.int8s[op.inputs[0]], weight, bias], [out], options)
        self.int8s[op.name] = out

    def _kernel(self, op: g.Conv | g.Linear) -> tuple[str, int, Any]:
        schema = self.schema
        if isinstance(op, g.Linear):
            return "FULLY_CONNECTED", 0, self._options("FullyConnectedOptions", keepNumDims=True)
        padding = schema.Padding.SAME if op.padding else schema.Padding.VALID
        common = {"strideH": op.stride, "strideW": op.stride, "padding": padding}
        common |= {"dilationHFactor": 1, "dilationWFactor": 1}
        if op.groups > 1:
            options = self._options("DepthwiseConv2DOptions", depthMultiplier=1, **common)
            return "DEPTHWISE_CONV_2D", 3, options
        return "CONV_2D", 0, self._options("Conv2DOptions", **common)

    @staticmethod
    def _ohwi(op: g.Conv | g.Linear, weight: NDArray[Any]) -> NDArray[Any]:
        if isinstance(op, g.Linear):
            return weight
        return weight.transpose((1, 2, 3, 0) if op.groups > 1 else (0, 2, 3, 1))

    def _norm(self, op: g.Norm) -> None:
        x, shape, one = self._float(op.inputs[0]), op.shape, (1, *op.shape[1:])
        keep = self._options("ReducerOptions", keepDims=True)
        last = self._axes(len(shape))
        mean = self._float_op("MEAN", f"{op.name}.mean", [x, last], one, keep)
        square = self._binary("SQUARED_DIFFERENCE", f"{op.name}.square", x, mean, shape)
        variance = self._float_op("MEAN", f"{op.name}.variance", [square, last], one, keep)
        eps = self._constant(f"{op.name}.eps", np.float32(op.eps))
        shifted = self._binary("ADD", f"{op.name}.shifted", variance, eps, one)
        inverse = self._float_op("RSQRT", f"{op.name}.inverse", [shifted], one, None)
        centred = self._binary("SUB", f"{op.name}.centred", x, mean, shape)
        y = self._binary("MUL", op.name, centred, inverse, shape)
        if op.weight is not None and op.bias is not None:
            gamma = self._constant(f"{op.name}.weight", op.weight)
            beta = self._constant(f"{op.name}.bias", op.bias)
            scaled = self._binary("MUL", f"{op.name}.scaled", y, gamma, shape)
            self._binary("ADD", op.name, scaled, beta, shape)

    def _gelu(self, op: g.Gelu) -> None:
        options = self._options("GeluOptions", approximate=self.graph.export.gelu == "tanh")
        source, site = self.int8s.get(op.inputs[0]), self.graph.output_site(op)
        if source is None or site is None:
            self._float_op("GELU", op.name, [self._float(op.inputs[0])], op.shape, options)
            return
        out = self._int8_tensor(op.name, op.shape, site.parameters)
        self._operator("GELU", [source], [out], options)
        self.int8s[op.name] = out

    def _quantize(self, op: g.QuantizePair) -> None:
        source = op.inputs[0]
        if source in self.int8s and self.parameters[self.int8s[source]] == op.parameters:
            self.int8s[op.name] = self.int8s[source]
            return
        # Of another grid, or of none yet: QUANTIZE takes both.
        given = self.int8s[source] if source in self.int8s else self._float(source)
        out = self._int8_tensor(op.name, op.shape, op.parameters)
        self._operator("QUANTIZE", [given], [out], self._options("QuantizeOptions"))
        self.int8s[op.name] = out

    def _float(self, name: str) -> int:
        """Return a value as float32, dequantized at most once."""
        if name not in self.floats:
            options = self._options("DequantizeOptions")
            shape = self.graph[name].shape
            source = self.int8s[name]
            self._float_op("DEQUANTIZE", name, [source], shape, options)
        return self.floats[name]

    def _binary(self, kind: str, name: str, left: int, right: int, shape: g.Shape) -> int:
        table = {"ADD": "AddOptions", "SUB": "SubOptions", "MUL": "MulOptions"}
        options = self._options(table.get(kind, "SquaredDifferenceOptions"))
        return self._float_op(kind, name, [left, right], shape, options)

    def _float_op(
        self, kind: str, name: str, inputs: list[int], shape: g.Shape, options: Any
    ) -> int:
        out = self._tensor(name, self._nhwc(shape))
        self._operator(kind, inputs, [out], options)
        self.floats[name] = out
        return out

    def _operator(self, kind: str, inputs: list[int], outputs: list[int], options: Any) -> None:
        op = self.schema.OperatorT()
        op.opcodeIndex = self.codes.setdefault(kind, len(self.codes))
        op.inputs, op.outputs = inputs, outputs
        if options is not None:
            op.builtinOptions = options
            kind_of = self.schema.BuiltinOptions
            op.builtinOptionsType = getattr(kind_of, type(options).__name__.removesuffix("T"))
        self.operators.append(op)

    def _options(self, kind: str, **fields: object) -> Any:
        options = getattr(self.schema, f"{kind}T")()
        for name, value in fields.items():
            setattr(options, name, value)
        return options

    def _code(self, kind: str) -> Any:
        code = self.schema.OperatorCodeT()
        code.builtinCode = getattr(self.schema.BuiltinOperator, kind)
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)
        code.version = VERSIONS.get(kind, 1)
        return code

    def _signature(self, image: int, logits: int) -> Any:
        signature = self.schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        entries = [self.schema.TensorMapT() for _ in range(2)]
        entries[0].name, entries[0].tensorIndex = INPUT_NAME, image
        entries[1].name, entries[1].tensorIndex = OUTPUT_NAME, logits
        signature.inputs, signature.outputs = entries[:1], entries[1:]
        return signature

    def _nhwc(self, shape: g.Shape) -> list[int]:
        return [self.batch, *shape[1:], shape[0]]

    def _axes(self, *values: int) -> int:
        return self._constant(f"axes{values}", np.array(values, np.int32))

    def _per_channel(self, scales: NDArray[np.float32], axis: int) -> Any:
        quantization = self.schema.QuantizationParametersT()
        quantization.scale = scales
        quantization.zeroPoint = np.zeros(len(scales), np.int64)
        quantization.quantizedDimension = axis
        return quantization

    def _int8_tensor(self, name: str, shape: g.Shape, parameters: Quantization) -> int:
        quantization = self.schema.QuantizationParametersT()
        quantization.scale = np.array([parameters.scale], np.float32)
        quantization.zeroPoint = np.array([parameters.zero_point], np.int64)
        tensor = self._tensor(
            f"{name}.q", self._nhwc(shape), self.schema.TensorType.INT8, quantization=quantization
        )
        self.parameters[tensor] = parameters
        return tensor

    def _constant(
        self, name: str, value: NDArray[Any] | np.generic, quantization: Any = None
    ) -> int:
        types = {"float32": "FLOAT32", "int8": "INT8", "int32": "INT32"}
        array = np.ascontiguousarray(value) if np.ndim(value) else np.asarray(value)
        kind = getattr(self.schema.TensorType, types[array.dtype.name])
        data = np.frombuffer(array.tobytes(), np.uint8)
        return self._tensor(name, array.shape, kind, self._buffer(data), quantization)

    def _tensor(
        self,
        name: str,
        shape: Sequence[int],
        kind: int | None = None,
        buffer: int = 0,
        quantization: Any = None,
    ) -> int:
        tensor = self.schema.TensorT()
        tensor.name, tensor.shape, tensor.buffer = name, list(shape), buffer
        tensor.type = self.schema.TensorType.FLOAT32 if kind is None else kind
        tensor.quantization = quantization
        if buffer == 0 and self.graph.export.batch == "dynamic":
            tensor.shapeSignature = [-1, *shape[1:]]
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def _buffer(self, data: NDArray[np.uint8]) -> int:
        buffer = self.schema.BufferT()
        buffer.data = data
        self.buffers.append(buffer)
        return len(self.buffers) - 1


RUNTIME = TfLite()
