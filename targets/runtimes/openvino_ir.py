"""OpenVINO IR, built op by op.

In: a `Graph`. Out: model.xml with model.bin beside it, NCHW. In the form `1x1 convolution`
pointwise layers are convolutions, into whose integer kernels OpenVINO fuses the erf form of GELU;
LayerNorm is an MVN over the channel axis, so nothing is ever transposed. In the form `channels-last
linear` they are matrix products, and each block is transposed behind its depthwise layer and back.
Activations are FakeQuantize with 256 levels, weights int8 constants behind Convert and Multiply.

In w8 that is all there is, and the file says so in its runtime_options: OpenVINO quantizes by
itself what a linear layer with int8 weights reads, unless it is told not to.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.arithmetic import ACTIVATION_MAX, ACTIVATION_MIN, along_rows
from pipeline.errors import ArtifactError
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
from targets.runtimes._op_kinds import WARM_UP, kind_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pipeline.records import OpKind, Quantization
    from targets.base import Image, Logits, Session

    Along = Callable[[NDArray[Any]], NDArray[Any]]
    """Lays values of channels along a tensor's channel axis."""

CONVOLUTION, LINEAR = "1x1 convolution", "channels-last linear"
TO_NHWC, TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
INTEGER_PRECISIONS = ("i8", "u8")
WEIGHTED_TYPES = ("Convolution", "GroupConvolution", "FullyConnected", "MatMul")
UNPACKING_TYPES = ("Convert", "Multiply")
LAYOUT_TYPES = ("Transpose",)
NOT_EXECUTED = ("undef", "unknown_f32")
"""What was fused into another node, and what lies in memory already."""
REFERENCE_KERNEL = "ref"
"""What an implementation is called that no kernel was written for."""
NORM_TYPES = ("MVN", "RMS", "ReduceMean", "Subgraph")
LEVELS = ACTIVATION_MAX - ACTIVATION_MIN + 1
FLOAT_OPS = (g.Norm, g.Add, g.Mean, g.Scale, g.Shift, g.ResponseNorm)
"""What computes in floats, whatever it reads."""
CHANNELWISE = (g.Shift, g.Scale, g.Gelu, g.QuantizePair, g.ResponseNorm)
"""What may lie in either layout: it stays in that of what it reads."""
BEGINNING = 256
"""Bytes in which a model's root element begins."""
DYNAMIC = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
PRECISION, HALF = "INFERENCE_PRECISION_HINT", "FP16"
PARITY = {PRECISION: "f32", "NUM_STREAMS": 1}
"""Without the hint OpenVINO may compute in bf16 where the CPU has it."""


class OpenVino:
    """The runtime `openvino`."""

    name = "openvino"
    capabilities = Capabilities(
        suffix=".xml",
        layout="NCHW",
        extra="openvino",
        distributions=("openvino",),
        schemes=("float", "float16", "w8a8", "w4a8", "w8"),
        graph_forms=(CONVOLUTION, LINEAR),
        gelu="erf",
        half_flags=frozenset({"avx512_fp16", "asimdhp"}),
        unsupported_schemes={
            "w4a4": NO_FOUR_BITS,
            "w8a16": "OpenVINO has no kernel for 16-bit activations; it would compute in float",
            "w8a8-dynamic": "OpenVINO does that in linear layers only, on CPUs with VNNI only, and"
            " its compiled model does not say whether it did",
        },
    )

    def export(self, graph: g.Graph, path: Path, metadata: str) -> None:
        """Write the .xml and its .bin; see `targets.base.Runtime`."""
        import openvino

        model = _Emitter(graph).model()
        model.set_rt_info(metadata, [METADATA_KEY])
        if graph.export.scheme == "w8":
            model.set_rt_info("0", ["runtime_options", DYNAMIC])
        openvino.save_model(model, path, compress_to_fp16=False)

    def prove(self, path: Path, graph: g.Graph) -> Proof:
        """Count in the model that OpenVINO compiled for this CPU."""
        counts: Counter[str] = Counter()
        integer = half = fallbacks = 0
        compiled = _compile(path, threads=1)
        # OpenVINO calls a linear layer with int8 weights i8 even where it computes in float.
        stored = graph.export.scheme == "w8" and not compiled.get_property(DYNAMIC)
        for node in compiled.get_runtime_model().get_ordered_ops():
            info = node.get_rt_info()
            kind = info["layerType"].astype(str)
            precision = info["runtimePrecision"].astype(str)
            counts[kind] += 1
            computes = kind in WEIGHTED_TYPES and not (stored and kind == "FullyConnected")
            integer += computes and precision in INTEGER_PRECISIONS
            half += kind in WEIGHTED_TYPES and precision == "f16"
            fallbacks += info["primitiveType"].astype(str).startswith(REFERENCE_KERNEL)
        method = "runtimePrecision of layers in the model that OpenVINO compiled for this CPU"
        if graph.export.scheme == "float16":
            method += f"; {half} of them in f16"
        return Proof(
            method=method,
            integer_layers=integer,
            expected_integer_layers=computing_layers(graph),
            weighted_layers=len(graph.weighted),
            transposes_per_block=sum(counts[name] for name in LAYOUT_TYPES) / graph.blocks,
            quantize_ops_per_block=counts["FakeQuantize"] / graph.blocks,
            op_counts=dict(sorted(counts.items())),
            integer_weights=_integer_weights(_read(path)),
            fallback_ops_per_block=fallbacks / graph.blocks,
        )

    def read_metadata(self, path: Path) -> str:
        """Return this project's entry of the model's rt_info."""
        return _metadata(_read(path))

    def can_run(self) -> NotRun | None:
        """OpenVINO runs wherever it is installed."""
        require_installed(self)
        return None

    def load(self, path: Path, threads: int) -> Session:
        """Return a session on the CPU plugin."""
        request = _compile(path, threads=threads).create_infer_request()

        def run(image: Image) -> Logits:
            logits: Logits = request.infer({INPUT_NAME: image})[OUTPUT_NAME]
            return logits

        return run

    def op_times(
        self, path: Path, image: Image, *, threads: int, inferences: int
    ) -> list[OpTime] | NotRun:
        """Read OpenVINO's counters of each node that it executes."""
        compiled = _compile(path, threads=threads, PERF_COUNT=True)
        request, runs = compiled.create_infer_request(), list[list[float]]()
        for _ in range(WARM_UP + inferences):
            request.infer({INPUT_NAME: image})
            nodes = request.profiling_info
            runs.append([one.cpu_time.total_seconds() * 1000 for one in nodes])
        fused = {
            node.get_friendly_name(): node.get_rt_info()["originalLayersNames"].astype(str)
            for node in compiled.get_runtime_model().get_ordered_ops()
        }
        return [
            OpTime(
                kind=_kind(one.node_type, fused.get(one.node_name, "").split(",")),
                op=f"{one.node_type} {one.exec_type}",
                name=one.node_name,
                ms=ms,
                is_fallback=one.exec_type.startswith(REFERENCE_KERNEL),
            )
            for one, ms in zip(nodes, np.median(runs[WARM_UP:], axis=0).tolist(), strict=True)
            if one.exec_type not in NOT_EXECUTED
        ]


def _kind(op: str, names: Sequence[str]) -> OpKind:
    if op in {"Reorder", "Reshape", *LAYOUT_TYPES}:
        return "layout"
    if op == "FakeQuantize":
        return "quantize"
    found = kind_of(names)
    if found != "other":
        return found
    # Some nodes of what it takes apart or rewrites keep no name of ours.
    if op in NORM_TYPES:
        return "layernorm"
    if any("Dequantization" in name for name in names):
        return "quantize"
    return "pointwise" if "head.fc" not in names and op in WEIGHTED_TYPES else "other"


def _read(path: Path) -> Any:
    import openvino

    refusal = ArtifactError(
        f"{path} is not an OpenVINO model with its .bin beside it",
        allowed="an artifact that `convnext-edge export` wrote, both files in one folder",
        do="Export it again",
    )
    try:
        # What is something else, OpenVINO would try every other format on, and loudly.
        with path.open("rb") as file:
            if b"<net" not in file.read(BEGINNING):
                raise refusal
        return openvino.Core().read_model(path)
    except (OSError, RuntimeError) as error:
        raise refusal from error


def _integer_weights(model: Any) -> int:
    """Count the layers whose weights lie in a model as int8 behind Convert and Multiply."""

    def stored(node: Any) -> str:
        while node.get_type_name() in UNPACKING_TYPES:
            node = node.input_value(0).get_node()
        return str(node.get_output_element_type(0).get_type_name())

    return sum(
        stored(node.input_value(1).get_node()) == "i8"
        for node in model.get_ordered_ops()
        if node.get_type_name() in WEIGHTED_TYPES
    )


def _metadata(model: Any) -> str:
    if not model.has_rt_info([METADATA_KEY]):
        return ""
    return str(model.get_rt_info([METADATA_KEY]).astype(str))


def _compile(path: Path, *, threads: int, **more: object) -> Any:
    import openvino

    core, model = openvino.Core(), _read(path)
    settings = {**PARITY, "INFERENCE_NUM_THREADS": threads, **more}
    if _is_half(model) and HALF in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        settings[PRECISION] = "f16"
    return core.compile_model(model, "CPU", settings)


def _is_half(model: Any) -> bool:
    """Return whether a model of ours is in float16; what others wrote is not asked."""
    stated = json.loads(_metadata(model) or "{}")
    return bool(stated.get("export", {}).get("scheme") == "float16")


class _Emitter:
    """Walks the graph once; every value lies in NCHW, and in NHWC where its form asks for it."""

    def __init__(self, graph: g.Graph) -> None:
        from openvino import opset13

        self.ov = opset13
        self.graph = graph
        self.nchw: dict[str, Any] = {}
        self.nhwc: dict[str, Any] = {}

    def model(self) -> Any:
        import openvino

        for op in self.graph.ops:
            last = self._is_last(op)
            node = self._emit(op, last=last)
            node.set_friendly_name(op.name)
            (self.nhwc if last else self.nchw)[op.name] = node
        image, logits = (self.nchw[self.graph.ops[i].name] for i in (0, -1))
        image.output(0).set_names({INPUT_NAME})
        logits.output(0).set_names({OUTPUT_NAME})
        return openvino.Model([logits], [image], "convnext")

    def _is_last(self, op: g.Op) -> bool:
        """Return whether an operation is done with its channels last."""
        if self.graph.export.graph_form != LINEAR or len(op.shape) == 1:
            return False
        pointwise = isinstance(op, g.Norm | g.Linear)
        return pointwise or (isinstance(op, CHANNELWISE) and op.inputs[0] in self.nhwc)

    def _value(self, name: str, *, last: bool) -> Any:
        """Return a value in a layout, transposed at most once."""
        known, other = (self.nhwc, self.nchw) if last else (self.nchw, self.nhwc)
        if name not in known:
            order = TO_NHWC if last else TO_NCHW
            known[name] = self.ov.transpose(other[name], np.array(order))
        return known[name]

    def _emit(self, op: g.Op, *, last: bool) -> Any:
        ov = self.ov
        x = [self._value(name, last=last) for name in op.inputs]

        def along(values: NDArray[Any]) -> NDArray[Any]:
            return values if last else along_rows(values, len(op.shape))

        match op:
            case g.Input():
                batch = -1 if self.graph.export.batch == "dynamic" else self.graph.export.batch
                return ov.parameter([batch, *op.shape], np.float32, INPUT_NAME)
            case g.Linear() if last or len(op.shape) == 1:
                return self._linear(op, x[0])
            case g.Conv() | g.Linear():
                return self._layer(op, x[0])
            case g.Norm():
                return self._norm(op, x[0], along, np.array([-1 if last else 1]))
            case g.ResponseNorm():
                return self._response_norm(op, x[0], along, (1, 2) if last else (2, 3))
            case g.Shift():
                return ov.add(x[0], along(op.bias))
            case g.Scale():
                return ov.multiply(x[0], along(op.weight))
            case g.Gelu():
                return self._gelu(op, x[0])
            case g.Add():
                return ov.add(x[0], x[1])
            case g.Mean():
                return ov.reduce_mean(x[0], np.array([2, 3]), keep_dims=False)
            case g.QuantizePair():
                low, high = _ends(op.parameters)
                whole = self._rounded(op, x[0])
                return ov.fake_quantize(whole, low, high, low, high, LEVELS)
        msg = f"{type(op).__name__} has no OpenVINO form"
        raise NotImplementedError(msg)

    def _rounded(self, op: g.QuantizePair, x: Any) -> Any:
        """Round what floats bring to a site, so that FakeQuantize finds integers.

        It adds 128 before it rounds, which costs a float32 its last bits. The rounding is fused
        into what stands in front of it; the kernel of a layer would not take it.
        """
        ov, scale = self.ov, op.parameters.scale
        if not isinstance(self.graph[op.inputs[0]], FLOAT_OPS):
            return x
        if scale == 1:
            return ov.round(x)
        return ov.multiply(ov.round(ov.multiply(x, np.float32(1 / scale))), np.float32(scale))

    def _layer(self, op: g.Conv | g.Linear, x: Any) -> Any:
        ov, shape = self.ov, op.weight.shape
        match op:
            case g.Conv() if op.groups > 1:
                shape = (op.groups, op.shape[0] // op.groups, *shape[1:])
                return self._conv(ov.group_convolution, op, x, shape, op.stride, op.padding)
            case g.Conv():
                return self._conv(ov.convolution, op, x, shape, op.stride, op.padding)
        return self._conv(ov.convolution, op, x, (*shape, 1, 1), 1, 0)

    def _linear(self, op: g.Linear, x: Any) -> Any:
        ov = self.ov
        weight = self._weight(op, op.weight.shape)
        return ov.add(ov.matmul(x, weight, False, True), op.values()[1])

    def _gelu(self, op: g.Gelu, x: Any) -> Any:
        ov, form = self.ov, self.graph.export.gelu
        if len(op.shape) > 1:
            return ov.gelu(x, form)
        # Else OpenVINO fuses a head of two layers into one float op on some CPUs.
        last = np.array([-1])
        return ov.squeeze(ov.gelu(ov.unsqueeze(x, last), form), last)

    def _norm(self, op: g.Norm, x: Any, along: Along, channels: NDArray[Any]) -> Any:
        ov, source = self.ov, self.graph[op.inputs[0]]
        if isinstance(source, g.QuantizePair):
            # It cuts nothing off, but without it OpenVINO takes the mean of uint8 values before
            # it subtracts their zero point, which costs the mean its last bits.
            x = ov.maximum(x, _ends(source.parameters)[0])
        y = ov.mvn(x, channels, True, op.eps, "inside_sqrt")
        if op.weight is None or op.bias is None:
            return y
        return ov.add(ov.multiply(y, along(op.weight)), along(op.bias))

    def _response_norm(
        self, op: g.ResponseNorm, x: Any, along: Along, places: tuple[int, int]
    ) -> Any:
        ov, (channels,) = self.ov, {1, 2, 3} - {*places}
        response = ov.reduce_l2(x, np.array(places), keep_dims=True)
        mean = ov.reduce_mean(response, np.array([channels]), keep_dims=True)
        relative = ov.divide(response, ov.add(mean, np.float32(op.eps)))
        factor = ov.add(ov.multiply(relative, along(op.weight)), np.float32(1))
        return ov.multiply(x, factor)

    def _conv(
        self, kind: Any, op: g.Weighted, x: Any, shape: g.Shape, stride: int, padding: int
    ) -> Any:
        pads = [padding] * 2
        y = kind(x, self._weight(op, shape), [stride] * 2, pads, pads, [1, 1])
        return self.ov.add(y, _per_channel(op.values()[1]))

    def _weight(self, op: g.Weighted, shape: g.Shape) -> Any:
        ov = self.ov
        if self.graph.export.scheme == "float16":
            half = op.weight.astype(np.float16).reshape(shape)
            return ov.convert(ov.constant(half), np.float32)
        if op.integers is None:
            return ov.constant(op.weight.reshape(shape))
        integers = ov.convert(ov.constant(op.integers.weight.reshape(shape)), np.float32)
        scales = along_rows(op.integers.weight_scales, len(shape))
        return ov.multiply(integers, ov.constant(scales))


def _ends(of: Quantization) -> tuple[np.float32, np.float32]:
    """Return the least and the greatest value of a grid."""
    low, high = (
        np.float32((q - of.zero_point) * of.scale) for q in (ACTIVATION_MIN, ACTIVATION_MAX)
    )
    return low, high


def _per_channel(values: Any) -> Any:
    return values.reshape(-1, 1, 1)


RUNTIME = OpenVino()
