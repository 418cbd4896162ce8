"""TFLite, written op by op.

In: a `Graph`. Out: one .tflite file, channels last throughout and without a transpose. An integer
layer reads and writes integers, so its output is a site too; GELU between two int8 sites is
TFLite's int8 lookup, between int16 ones it is float, for it has no int16 kernel. TFLite has no
LayerNorm: it becomes seven float ops.

In float16 a DEQUANTIZE of a layer's weights makes it a float layer, which runtimes with float16
arithmetic (GPU delegates, XNNPACK where it is asked) compute in that.

A layer with int8 weights whose input is float quantizes that itself when it runs (w8a8-dynamic). In
w8 a DEQUANTIZE of its weights, which the runtime does once, makes it a float layer.

XNNPACK has depthwise kernels of up to 25 taps; a float 7x7 it computes as a general convolution,
channel by channel. So in the form `NHWC-native, depthwise in parts` such a layer is the sum of its
inner 5x5 and the frame around it: what is left of rows, and of columns, are dilated convolutions.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from math import floor
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.arithmetic import limits
from pipeline.errors import ArtifactError
from pipeline.records import Layer, Proof
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
from targets.runtimes._op_kinds import WARM_UP, kind_of
from targets.runtimes._tflite_file import TfliteFile, load, not_tflite

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.records import OpKind, Quantization
    from targets.base import Image, Logits, Session

WEIGHTED_OPS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
QUANTIZE_OPS = ("QUANTIZE", "DEQUANTIZE")
CONVERSION = "conversion"
FAMILIES = {
    "layer": (*WEIGHTED_OPS, "Convolution", "Fully Connected"),
    CONVERSION: (*QUANTIZE_OPS, "Convert"),
    "ADD": ("ADD", "Add"),
    "SUB": ("SUB", "Subtract"),
    "MUL": ("MUL", "Multiply"),
    "MEAN": ("MEAN", "Mean"),
    "SQUARED_DIFFERENCE": ("SQUARED_DIFFERENCE", "Squared Difference"),
    "GELU": ("GELU",),
    "PAD": ("PAD", "Constant Pad"),
    "RSQRT": ("RSQRT", "Reciprocal Square Root"),
    "DIV": ("DIV", "Divide"),
    "SQRT": ("SQRT", "Square Root"),
    "SUM": ("SUM", "Sum"),
}
"""How operations are called in the file, and how the names of XNNPACK's kernels begin."""
INT16 = 16
WHOLE, IN_PARTS = "NHWC-native", "NHWC-native, depthwise in parts"
MOST_TAPS = 25
"""Of XNNPACK's depthwise kernels."""
GELU_MINIMUM = -0.171
"""A little less than either form of GELU ever is."""
FLOAT_LAYERS = {Layer.HEAD: "an int8 head would round the logits to int8"}


class TfLite:
    """The runtime `tflite` (LiteRT)."""

    name = "tflite"
    capabilities = Capabilities(
        suffix=".tflite",
        layout="NHWC",
        extra="tflite",
        distributions=("ai-edge-litert",),
        schemes=("float", "float16", "w8a8", "w4a8", "w8a16", "w8a8-dynamic", "w8"),
        graph_forms=(IN_PARTS, WHOLE),
        gelu="erf",
        # Its integer kernels write integers.
        placements=("pointwise-io", "pointwise-depthwise", "dense", "all"),
        float_layers=FLOAT_LAYERS,
        unsupported_schemes={"w4a4": NO_FOUR_BITS},
        default_isa="arm",
    )

    def export(self, graph: g.Graph, path: Path, metadata: str) -> None:
        """Write the .tflite file; see `targets.base.Runtime`."""
        path.write_bytes(_Emitter(graph).model(metadata))

    def prove(self, path: Path, graph: g.Graph) -> Proof:
        """Count ops and the types of their tensors in the file, which the runtime runs as it is."""
        from ai_edge_litert import schema_py_generated as schema

        model = load(path)
        tensors = model.subgraphs[0].tensors
        names = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
        int8, counts = schema.TensorType.INT8, Counter[str]()
        unpacked, integer, packed, constant = set[int](), 0, 0, 0
        layers = {op.name for op in graph.weighted}
        for op in model.subgraphs[0].operators:
            kind = names[model.operatorCodes[op.opcodeIndex].builtinCode]
            counts[kind] += 1
            if kind == "DEQUANTIZE" and tensors[op.inputs[0]].buffer:
                constant += 1
                unpacked |= set(op.outputs) if tensors[op.inputs[0]].type == int8 else set()
            elif kind in WEIGHTED_OPS and _layer(tensors[op.inputs[1]]) in layers:
                # With int8 weights it computes in integers, whatever it reads.
                integer += tensors[op.inputs[1]].type == int8
                packed += op.inputs[1] in unpacked
        quantizing = sum(counts[name] for name in QUANTIZE_OPS) - constant
        fallbacks = _fallbacks(path)
        return Proof(
            method="ops and tensor types of the file",
            integer_layers=integer,
            expected_integer_layers=computing_layers(graph, {g.Conv, g.Linear}, FLOAT_LAYERS),
            weighted_layers=len(graph.weighted),
            transposes_per_block=counts["TRANSPOSE"] / graph.blocks,
            quantize_ops_per_block=quantizing / graph.blocks,
            op_counts=dict(sorted(counts.items())),
            integer_weights=integer + packed,
            fallback_ops_per_block=None if fallbacks is None else fallbacks / graph.blocks,
        )

    def read_metadata(self, path: Path) -> str:
        """Return this project's metadata buffer."""
        model = load(path)
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
            raise not_tflite(path, error) from error

        def run(image: Image) -> Logits:
            nhwc = np.ascontiguousarray(image.transpose(0, 2, 3, 1))
            logits: Logits = runner(**{INPUT_NAME: nhwc})[OUTPUT_NAME]
            return logits

        return run

    def op_times(
        self, path: Path, image: Image, *, threads: int, inferences: int
    ) -> list[OpTime] | NotRun:
        """Ask LiteRT's profiler, which tells the kernels in the file's order."""
        from targets.runtimes._litert_profiler import profile

        if not sys.platform.startswith("linux"):
            return NotRun(reason="LiteRT's profiler is reached through its library for Linux")
        events = profile(path, threads, warm_up=WARM_UP, inferences=inferences)
        kernels = [kernel for kernel, _ in events[: len(events) // inferences]]
        known = kinds(path, kernels)
        if known is None or [kernel for kernel, _ in events] != kernels * inferences:
            return NotRun(reason="LiteRT's profiler tells other operations than the file has")
        times = np.array([ms for _, ms in events]).reshape(inferences, -1)
        return [
            OpTime(kind=kind, op=kernel, name=name, ms=ms, is_fallback=is_own_kernel(kernel))
            for (kind, name), kernel, ms in zip(
                known, kernels, np.median(times, axis=0).tolist(), strict=True
            )
        ]


def kinds(path: Path, kernels: Sequence[str]) -> list[tuple[OpKind, str]] | None:
    """Return what the kernels of one inference compute.

    Args:
        path: The .tflite file.
        kernels: As LiteRT or XNNPACK calls them, in the order in which they run.

    Returns:
        The kind and the name in the file of each; None where the file has other operations.
    """
    names = _matched(_executed(path), kernels)
    if names is None:
        return None
    return [
        ("quantize" if _family(kernel) == CONVERSION else kind_of([name]), name)
        for name, kernel in zip(names, kernels, strict=True)
    ]


def is_own_kernel(kernel: str) -> bool:
    """Return whether LiteRT itself executes a kernel, because XNNPACK does not."""
    from ai_edge_litert import schema_py_generated as schema

    return hasattr(schema.BuiltinOperator, kernel)


def _fallbacks(path: Path) -> int | None:
    """Count what XNNPACK leaves to LiteRT in an inference; None where the profiler does not say."""
    from targets.runtimes._litert_profiler import profile

    if not sys.platform.startswith("linux"):
        return None
    try:
        events = profile(path, 1, warm_up=0, inferences=1)
    except ArtifactError:
        return None
    return sum(is_own_kernel(kernel) for kernel, _ in events)


def _family(kernel: str) -> str:
    """Return what an operation is called in the file and by XNNPACK alike."""
    return next((family for family, words in FAMILIES.items() if kernel.startswith(words)), kernel)


def _matched(ops: Sequence[tuple[str, str]], kernels: Sequence[str]) -> list[str] | None:
    """Return the name of what each kernel computes, None where the two do not fit.

    LiteRT may do what is ready before what stands in front of it in the file, but keeps to its
    order among operations of one family, for each of those waits for the one before.
    """
    waiting = defaultdict[str, deque[str]](deque)
    for op, name in ops:
        waiting[_family(op)].append(name)
    if Counter(map(_family, kernels)) != {family: len(names) for family, names in waiting.items()}:
        return None
    return [waiting[_family(kernel)].popleft() for kernel in kernels]


def _executed(path: Path) -> list[tuple[str, str]]:
    """Return type and output of every operation of a file that an inference executes."""
    from ai_edge_litert import schema_py_generated as schema

    model = load(path)
    graph = model.subgraphs[0]
    names = {v: k for k, v in vars(schema.BuiltinOperator).items() if isinstance(v, int)}
    return [
        (
            names[model.operatorCodes[op.opcodeIndex].builtinCode],
            graph.tensors[op.outputs[0]].name.decode(),
        )
        for op in graph.operators
        if not all(graph.tensors[one].buffer for one in op.inputs)  # done when it was loaded
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Some rows and columns of a convolution's kernel; their steps are its dilation."""

    rows: range
    columns: range

    def of(self, weight: NDArray[Any]) -> NDArray[Any]:
        """Return this part of a weight (out, in, height, width)."""
        return weight[:, :, self.rows][..., self.columns]


def _frames(size: int) -> list[_Part]:
    """Cut a square kernel of odd size into its frames and what is left inside them.

    Each part lies around the kernel's centre, so all read the same input with the same padding.
    """
    parts, low, high = list[_Part](), 0, size
    while (high - low) ** 2 > MOST_TAPS:
        edges, inside = range(low, high, high - low - 1), range(low + 1, high - 1)
        parts += [
            _Part(rows=edges, columns=range(low, high)),
            _Part(rows=inside, columns=edges),
        ]
        low, high = low + 1, high - 1
    return [_Part(rows=range(low, high), columns=range(low, high)), *parts]


class _Emitter:
    """Walks the graph once; a value exists as float32, as integers, or both."""

    def __init__(self, graph: g.Graph) -> None:
        self.file = TfliteFile(dynamic_batch=graph.export.batch == "dynamic")
        self.schema = self.file.schema
        self.graph = graph
        self.batch = 1 if graph.export.batch == "dynamic" else graph.export.batch
        self.floats: dict[str, int] = {}
        self.integers: dict[str, int] = {}
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
            case g.Scale():
                factor = self.file.constant(f"{op.name}.weight", op.weight)
                self._binary("MUL", op.name, self._float(op.inputs[0]), factor, op.shape)
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
        layer = op.integers
        if layer is None or layer.bias_scales is None or op.layer in FLOAT_LAYERS:
            self._float_layer(op)
        else:
            self._integer_layer(op, layer, layer.bias_scales)

    def _float_layer(self, op: g.Conv | g.Linear) -> None:
        """Emit a layer that reads and writes floats, as the sum of the parts of its kernel."""
        source = self._padded(op, self._float(op.inputs[0]))
        total, bias = None, op.values()[1]
        for index, part in enumerate(self._parts(op)):
            kind, weight_axis, options = self._kernel(op, part)
            name = f"{op.name}.{index}" if index else op.name
            weight = self._float_weight(op, part, name, weight_axis)
            added = self.file.constant(f"{name}.bias", np.zeros_like(bias) if index else bias)
            out = self._float_op(kind, name, [source, weight, added], op.shape, options)
            total = out if total is None else self._binary("ADD", op.name, total, out, op.shape)

    def _float_weight(self, op: g.Conv | g.Linear, part: _Part | None, name: str, axis: int) -> int:
        layer, name = op.integers, f"{name}.weight"
        whole = op.weight if layer is None else layer.weight
        values = self._ohwi(op, whole if part is None else part.of(whole))
        if self.graph.export.scheme == "float16":
            half = self.file.constant(name, values.astype(np.float16))
            return self.file.dequantized(f"{name}.float", half)
        if layer is None:
            return self.file.constant(name, values)
        weight = self.file.constant(name, values, self.file.per_channel(layer.weight_scales, axis))
        if self.graph.export.scheme == "w8a8-dynamic" and op.layer not in FLOAT_LAYERS:
            return weight
        return self.file.dequantized(f"{name}.float", weight)

    def _integer_layer(
        self, op: g.Conv | g.Linear, layer: g.Integers, bias_scales: NDArray[np.float32]
    ) -> None:
        kind, weight_axis, options = self._kernel(op)
        weight = self.file.constant(
            f"{op.name}.weight",
            self._ohwi(op, layer.weight),
            self.file.per_channel(layer.weight_scales, weight_axis),
        )
        site = self.graph.output_site(op)
        assert site is not None, f"{op.name} writes integers and has no output site"
        steps: NDArray[Any] = layer.bias
        if site.parameters.bits == INT16:
            steps = steps.astype(np.int32 if self._sums_in_int32(op, layer) else np.int64)
            if kind != "DEPTHWISE_CONV_2D":
                options.quantizedBiasType = getattr(
                    self.schema.TensorType, steps.dtype.name.upper()
                )
        bias = self.file.constant(f"{op.name}.bias", steps, self.file.per_channel(bias_scales, 0))
        source = self._padded(op, self.integers[op.inputs[0]])
        out = self._integer_tensor(op.name, op.shape, site.parameters)
        self.file.operator(kind, [source, weight, bias], [out], options)
        self.integers[op.name] = out

    def _parts(self, op: g.Conv | g.Linear) -> Sequence[_Part | None]:
        """Cut a kernel into parts that XNNPACK has depthwise kernels for; None is all of it."""
        dynamic = op.integers is not None and self.graph.export.scheme == "w8a8-dynamic"
        if self.graph.export.graph_form != IN_PARTS or dynamic or not _can_be_parted(op):
            return [None]
        return _frames(op.weight.shape[-1])

    def _sums_in_int32(self, op: g.Conv | g.Linear, layer: g.Integers) -> bool:
        """Return whether an int16 layer's sums fit whatever it reads.

        With an int32 bias the kernels add in int32, unchecked; with an int64 one they take 25 times
        as long. The depthwise kernel knows int64 only.
        """
        site = self.graph[op.inputs[0]]
        assert isinstance(site, g.QuantizePair)
        low, high = limits(site.parameters)
        if isinstance(self.graph[site.inputs[0]], g.Gelu):
            low = floor(GELU_MINIMUM / site.parameters.scale)
        rows = layer.weight.reshape(len(layer.weight), -1).astype(np.int64)
        up, down = rows.clip(0, None).sum(axis=1), -rows.clip(None, 0).sum(axis=1)
        most = np.maximum(up * high - down * low, down * high - up * low)
        fits: bool = (most + np.abs(layer.bias.astype(np.int64)) < 2**31).all()
        return fits and not (isinstance(op, g.Conv) and op.groups > 1)

    def _padded(self, op: g.Conv | g.Linear, source: int) -> int:
        """Pad what a strided convolution reads: SAME would pad on the far side only.

        PAD fills integers with the tensor's zero point, which stands for 0.
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
                else self._integer_tensor(f"{op.name}.padded", grown, parameters)
            )
            self.file.operator("PAD", [source, amount], [out], self.file.options("PadOptions"))
            return out
        return source

    def _kernel(self, op: g.Conv | g.Linear, part: _Part | None = None) -> tuple[str, int, Any]:
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
        height, width = (part.rows.step, part.columns.step) if part else (1, 1)
        common |= {"dilationHFactor": height, "dilationWFactor": width}
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
        source, site = self.integers.get(op.inputs[0]), self.graph.output_site(op)
        if source is None or site is None or self.parameters[source].bits == INT16:
            self._float_op("GELU", op.name, [self._float(op.inputs[0])], op.shape, options)
            return
        out = self._integer_tensor(op.name, op.shape, site.parameters)
        self.file.operator("GELU", [source], [out], options)
        self.integers[op.name] = out

    def _quantize(self, op: g.QuantizePair) -> None:
        source = op.inputs[0]
        if source in self.integers and self.parameters[self.integers[source]] == op.parameters:
            self.integers[op.name] = self.integers[source]
            return
        # Of another grid, or of none yet: QUANTIZE takes both.
        given = self.integers[source] if source in self.integers else self._float(source)
        out = self._integer_tensor(op.name, op.shape, op.parameters)
        self.file.operator("QUANTIZE", [given], [out], self.file.options("QuantizeOptions"))
        self.integers[op.name] = out

    def _float(self, name: str) -> int:
        """Return a value as float32, dequantized at most once."""
        if name not in self.floats:
            options = self.file.options("DequantizeOptions")
            shape = self.graph[name].shape
            source = self.integers[name]
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

    def _integer_tensor(self, name: str, shape: g.Shape, parameters: Quantization) -> int:
        tensor = self.file.integer_tensor(f"{name}.q", self._nhwc(shape), parameters)
        self.parameters[tensor] = parameters
        return tensor


def _layer(weight: Any) -> str:
    """Return what a weight's tensor belongs to: a layer, or a part of one after its first."""
    return str(weight.name.decode()).removesuffix(".float").removesuffix(".weight")


def _can_be_parted(op: g.Conv | g.Linear) -> bool:
    """Return whether a layer is depthwise, and no part of its frame has too many taps."""
    depthwise = isinstance(op, g.Conv) and op.groups > 1 and op.stride == 1
    return depthwise and 2 * op.weight.shape[-1] <= MOST_TAPS


def _pads_by_itself(op: g.Conv | g.Linear) -> bool:
    return isinstance(op, g.Linear) or op.padding == 0 or op.stride == 1


RUNTIME = TfLite()
