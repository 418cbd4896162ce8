"""The shared graph: the folded network with its quantize/dequantize pairs, as exporters read it.

In: a `QuantizedModel` with its arrays, and which layers are to run in integers. Out: a `Graph`, a
list of typed operations in topological order, free of layout and of any framework. Each runtime
walks it once and lays it out in its own form.

The list is not written by hand: `pipeline.convnext` is traced with torch.fx on the meta device, so
the network stands in one place.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pipeline.arithmetic import bias_scales, dequantize_weight
from pipeline.records import Layer, Quantization
from targets.base import PLACEMENTS

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from numpy.typing import NDArray
    from torch import fx

    from pipeline.records import Architecture, Export, QuantizedModel
    from targets.base import Capabilities

    Arrays = Mapping[str, NDArray[Any]]

Shape = tuple[int, ...]
"""(channels, height, width), or (channels,) after pooling; the batch is not in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Integers:
    """What a layer computes with when it runs in integers.

    Shapes: `weight` int8 (out, in/groups, ...), `weight_scales` float32 (out,), `bias` int32
    (out,), `bias_scales` float32 (out,) = scale_x * weight_scales.
    """

    weight: NDArray[np.int8]
    weight_scales: NDArray[np.float32]
    bias: NDArray[np.int32]
    bias_scales: NDArray[np.float32]

    def dequantized(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return weight and bias as the float32 values that the integers stand for."""
        return (
            dequantize_weight(self.weight, self.weight_scales),
            (self.bias * self.bias_scales.astype(np.float64)).astype(np.float32),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One operation. `name` is also its output's name; `inputs` name earlier operations."""

    name: str
    inputs: tuple[str, ...]
    shape: Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Input(Op):
    """The image: float pixels in [0, 255]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighted(Op):
    """A layer with weights: `weight` (out, in/groups, ...) and `bias` (out,), float32.

    With `integers`, the input is a `QuantizePair` and the layer computes on its integers.
    """

    layer: Layer
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    integers: Integers | None

    def values(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return weight and bias as the floats that this layer really multiplies by."""
        return self.integers.dequantized() if self.integers else (self.weight, self.bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conv(Weighted):
    """A convolution; depthwise where `groups` equals the channels."""

    stride: int
    padding: int
    groups: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear(Weighted):
    """A linear map over channels, at every position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm(Op):
    """LayerNorm over channels; `weight` and `bias` (channels,) float32 where it has an affine."""

    eps: float
    weight: NDArray[np.float32] | None
    bias: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseNorm(Op):
    """GRN: x (1 + weight n), n each channel's norm over the image by the mean norm; float.

    `weight` is (channels,) float32; its shift is folded into the layer that follows.
    """

    eps: float
    weight: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift(Op):
    """A constant per channel added, in float; `bias` is (channels,) float32."""

    bias: NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gelu(Op):
    """GELU; each runtime's Capabilities say whether by tanh or by erf."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Add(Op):
    """The residual addition, in float."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean(Op):
    """The mean over height and width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizePair(Op):
    """A site: quantize to int8 and dequantize again."""

    parameters: Quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """The operations in an order in which each follows its inputs; the last one is `logits`."""

    ops: tuple[Op, ...]
    export: Export
    model: QuantizedModel
    arrays: Arrays

    @property
    def blocks(self) -> int:
        """How many ConvNeXt blocks there are."""
        return sum(self.model.architecture.depths)

    def __getitem__(self, name: str) -> Op:
        """Return the operation with this name."""
        return next(op for op in self.ops if op.name == name)

    def users(self, name: str) -> tuple[Op, ...]:
        """Return the operations that read this one."""
        return tuple(op for op in self.ops if name in op.inputs)

    def output_site(self, op: Op) -> QuantizePair | None:
        """Return the site behind `op`, where a site is all that reads it."""
        users = self.users(op.name)
        if len(users) == 1 and isinstance(users[0], QuantizePair):
            return users[0]
        return None

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites that are quantized."""
        return tuple(op.name for op in self.ops if isinstance(op, QuantizePair))

    @property
    def weighted(self) -> tuple[Weighted, ...]:
        """The layers with weights."""
        return tuple(op for op in self.ops if isinstance(op, Weighted))

    @property
    def integer_layers(self) -> int:
        """How many layers are meant to run in integers."""
        return sum(op.integers is not None for op in self.weighted)


def build_graph(
    model: QuantizedModel, arrays: Arrays, capabilities: Capabilities, export: Export
) -> Graph:
    """Lay out one artifact: float layers and integer layers, and the sites between them.

    Args:
        model: Scales and zero points of every site.
        arrays: Its tensors: `float/NAME`, `PROFILE/LAYER.weight`, `.weight_scale`, `.bias`.
        capabilities: Of the runtime: which outputs must be sites, which layers stay float.
        export: The scheme, placement and profile wanted.

    Returns:
        The graph, without a site that no integer layer needs.
    """
    integer = frozenset[Layer]()
    if export.scheme == "w8a8":
        integer = PLACEMENTS[export.placement] - capabilities.float_layers.keys()
    traced, modules = _trace(model.architecture, model.preprocessing.input_size)
    ops = _Translator(model, arrays, integer, capabilities, export, modules).run(traced)
    return Graph(ops=tuple(ops), export=export, model=model, arrays=arrays)


def _trace(
    architecture: Architecture, input_size: int
) -> tuple[fx.Graph, dict[str, torch.nn.Module]]:
    import torch
    from torch import fx
    from torch.fx.passes.shape_prop import ShapeProp

    from pipeline import convnext
    from pipeline.trace import trace

    model = convnext.empty(architecture, folded=True)
    graph, modules = trace(model)
    image = torch.empty(1, architecture.in_channels, input_size, input_size, device="meta")
    ShapeProp(fx.GraphModule(model, graph)).propagate(image)
    return graph, modules


class _Translator:
    """Turns fx nodes into operations; sites that no integer layer needs vanish."""

    def __init__(
        self,
        model: QuantizedModel,
        arrays: Arrays,
        integer: frozenset[Layer],
        capabilities: Capabilities,
        export: Export,
        modules: Mapping[str, torch.nn.Module],
    ) -> None:
        self.model = model
        self.arrays = arrays
        self.integer = integer
        self.must_write_integers = capabilities.integer_outputs & integer
        self.profile = export.profile
        self.modules = modules
        self.ops: dict[str, Op] = {}
        self.names: dict[fx.Node, str] = {}

    def run(self, graph: fx.Graph) -> list[Op]:
        for node in graph.nodes:
            if node.op != "output":
                self.names[node] = self._translate(node)
        return list(self.ops.values())

    def _translate(self, node: fx.Node) -> str:
        from pipeline import convnext

        inputs = tuple(self.names[source] for source in node.all_input_nodes)
        shape = tuple(node.meta["tensor_meta"].shape[1:])
        if node.op == "placeholder":
            return self._put(Input(name="image", inputs=(), shape=shape))
        if node.op == "call_function" and node.target is operator.add:
            return self._put(Add(name=_dotted(node), inputs=inputs, shape=shape))
        name = str(node.target)
        module = self.modules[name]
        base: dict[str, Any] = {"name": name, "inputs": inputs, "shape": shape}
        match type(module).__name__:
            case "Site":
                return self._site(node, inputs[0])
            case "Conv2d" | "Pointwise":
                layer = convnext.layer_kind(name)
                return self._put(self._weighted(base, layer, module))
            case "ChannelNorm":
                eps = cast("convnext.ChannelNorm", module).eps
                weight, bias = (self.arrays.get(f"float/{name}.{n}") for n in ("weight", "bias"))
                return self._put(Norm(**base, eps=eps, weight=weight, bias=bias))
            case "ResponseNorm":
                gamma = self.arrays[f"float/{name}.weight"]
                return self._put(ResponseNorm(**base, eps=convnext.GRN_EPS, weight=gamma))
            case "Centre":
                return self._put(Shift(**base, bias=self.arrays[f"float/{name}.bias"]))
            case "GELU":
                return self._put(Gelu(**base))
            case "GlobalMean":
                return self._put(Mean(**base))
        msg = f"no operation stands for {type(module).__name__} at {name}"
        raise NotImplementedError(msg)

    def _site(self, node: fx.Node, source: str) -> str:
        name = str(node.target)
        producer = self.ops[source]
        readers = [self._layer_at(user) for user in node.users]
        feeds = any(layer in self.integer for layer in readers)
        follows = isinstance(producer, Weighted) and producer.layer in self.must_write_integers
        if not feeds and not follows:
            return source
        parameters = self.model.sites[name]
        return self._put(
            QuantizePair(name=name, inputs=(source,), shape=producer.shape, parameters=parameters)
        )

    def _layer_at(self, node: fx.Node) -> Layer | None:
        from torch import nn

        from pipeline import convnext

        name = str(node.target)
        module = self.modules.get(name)
        is_weighted = isinstance(module, nn.Conv2d | convnext.Pointwise)
        return convnext.layer_kind(name) if is_weighted else None

    def _weighted(self, base: dict[str, Any], layer: Layer, module: torch.nn.Module) -> Weighted:
        name = base["name"]
        integers = None
        if layer in self.integer:
            site = cast("QuantizePair", self.ops[base["inputs"][0]])
            scales = self.arrays[f"{self.profile}/{name}.weight_scale"]
            integers = Integers(
                weight=self.arrays[f"{self.profile}/{name}.weight"],
                weight_scales=scales,
                bias=self.arrays[f"{self.profile}/{name}.bias"],
                bias_scales=bias_scales(site.parameters.scale, scales),
            )
        common = {
            **base,
            "layer": layer,
            "weight": self.arrays[f"float/{name}.weight"],
            "bias": self.arrays[f"float/{name}.bias"],
            "integers": integers,
        }
        if layer in {Layer.PW1, Layer.PW2, Layer.HEAD}:
            return Linear(**common)
        conv = cast("torch.nn.Conv2d", module)
        return Conv(
            **common,
            stride=conv.stride[0],
            padding=cast("int", conv.padding[0]),
            groups=conv.groups,
        )

    def _put(self, op: Op) -> str:
        self.ops[op.name] = op
        return op.name


def _dotted(node: fx.Node) -> str:
    # The residual addition is named after the block whose branch it adds.
    branch = next(n for n in reversed(node.all_input_nodes) if n.op == "call_module")
    return f"{str(branch.target).rpartition('.')[0]}.add"
