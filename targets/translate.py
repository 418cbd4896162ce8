"""From the quantized model to the shared graph: one artifact, operation by operation.

In: a `QuantizedModel` with its arrays, and which layers are to run in integers. Out: a `Graph`. The
list is not written by hand: `pipeline.convnext` is traced with torch.fx on the meta device, so the
network stands in one place.

Here rescaling becomes operations. Where a site is quantized, what writes it divides by the site's
scale and what reads it multiplies; where it is not, the folded network's own weights stand. Integer
layers have what they read in their integers already, so only what they write is left to do: a
factor per row, which goes into the scales.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from pipeline.arithmetic import along_rows, bias_scales
from pipeline.errors import ArtifactError
from pipeline.placements import PLACEMENTS, quantized_sites
from pipeline.records import ACTIVATION_BITS, FLOATING, Layer
from targets.graph import (
    Add,
    Conv,
    Gelu,
    Graph,
    Input,
    Integers,
    Linear,
    Mean,
    Norm,
    Op,
    QuantizePair,
    ResponseNorm,
    Scale,
    Shift,
    Weighted,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from numpy.typing import NDArray
    from torch import fx

    from pipeline.records import Architecture, Export, QuantizedModel
    from pipeline.trace import Structure
    from targets.base import Capabilities
    from targets.graph import Arrays

    Vector = NDArray[np.float32]

HALF_MAX = float(np.finfo(np.float16).max)


def build_graph(
    model: QuantizedModel, arrays: Arrays, capabilities: Capabilities, export: Export
) -> Graph:
    """Lay out one artifact: float layers and integer layers, and the sites between them.

    Args:
        model: Scales and zero points of every site.
        arrays: Its tensors, as `QuantizedModel` lists them.
        capabilities: Of the runtime: which layers stay float.
        export: The scheme, placement and profile wanted.

    Returns:
        The graph, without a site that no integer layer needs.
    """
    from pipeline.trace import structure

    traced, modules = _trace(model.architecture, model.preprocessing.input_size)
    plan = _Plan(model, structure(traced, modules), capabilities, export)
    ops = _Translator(arrays, plan, modules, model).run(traced)
    if export.scheme == "float16":
        ops = [_halved(op) for op in ops]
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


class _Plan:
    """Which layers have integers and which sites are quantized."""

    def __init__(
        self,
        model: QuantizedModel,
        structure: Structure,
        capabilities: Capabilities,
        export: Export,
    ) -> None:
        from pipeline.convnext import layer_kind
        from pipeline.trace import Freedom

        self.structure = structure
        self.export = export
        self.integer = frozenset[str]()
        self.sites = frozenset[str]()
        self.streams = frozenset[str | None]()
        if export.scheme in FLOATING:
            return
        placement = PLACEMENTS[export.placement]
        kept = frozenset(model.float_layers)
        kinds = placement.layers
        if export.scheme not in ACTIVATION_BITS:
            kinds = kinds - capabilities.float_layers.keys()
        stages = tuple(f"stages.{stage}.blocks." for stage in export.float_stages)
        self.integer = frozenset(
            name
            for name in structure.reads
            if layer_kind(name) in kinds and name not in kept and not name.startswith(stages)
        )
        if export.scheme in ACTIVATION_BITS:
            self.sites = quantized_sites(placement, structure, self.integer)
        self.streams = frozenset(
            place.stage
            for site, place in structure.places.items()
            if site in self.sites and place.freedom is Freedom.STREAM
        )


class _Translator:
    """Turns fx nodes into operations."""

    def __init__(
        self,
        arrays: Arrays,
        plan: _Plan,
        modules: Mapping[str, torch.nn.Module],
        model: QuantizedModel,
    ) -> None:
        self.arrays = arrays
        self.plan = plan
        self.modules = modules
        self.model = model
        self.ops: dict[str, Op] = {}
        self.names: dict[fx.Node, str] = {}
        self.divided: dict[str, Vector] = {}
        """Operations whose output is the folded network's divided by a scale per channel."""

    def run(self, graph: fx.Graph) -> list[Op]:
        for node in graph.nodes:
            if node.op != "output":
                self.names[node] = self._translate(node)
        return list(self.ops.values())

    def _translate(self, node: fx.Node) -> str:
        from pipeline import convnext
        from pipeline.trace import is_addition, node_name

        name = node_name(node)
        inputs = tuple(self.names[source] for source in node.all_input_nodes)
        base: dict[str, Any] = {
            "name": name,
            "inputs": inputs,
            "shape": tuple(node.meta["tensor_meta"].shape[1:]),
        }
        if node.op == "placeholder":
            return self._put(Input(**base))
        if is_addition(node):
            return self._addition(base)
        module = self.modules[name]
        match type(module).__name__:
            case "Site":
                return self._site(base)
            case "Conv2d" | "Pointwise":
                return self._weighted(base, convnext.layer_kind(name), module)
            case "ChannelNorm":
                return self._norm(base, cast("convnext.ChannelNorm", module).eps)
            case "ResponseNorm":
                gamma = self.arrays[f"float/{name}.weight"]
                return self._put(ResponseNorm(**base, eps=convnext.GRN_EPS, weight=gamma))
            case "Centre":
                return self._put(Shift(**base, bias=self.arrays[f"float/{name}.bias"]))
            case "GELU":
                return self._put(Gelu(**base))
            case "GlobalMean":
                return self._put(Mean(**base), self.divided.get(inputs[0]))
        msg = f"no operation stands for {type(module).__name__} at {name}"
        raise NotImplementedError(msg)

    # --- rescaling -----------------------------------------------------------------------------

    def _vector(self, place: str | None, kind: Literal["scale", "shift"]) -> Vector | None:
        return self.arrays.get(f"rescale/{place}.{kind}")

    def _written_scale(self, name: str) -> Vector | None:
        """Return what the output of a layer or norm is to be divided by."""
        from pipeline.trace import Freedom

        places, site = self.plan.structure.places, self.plan.structure.writes.get(name)
        stage = self.plan.structure.streams.get(name)
        if site is not None:
            if site in self.plan.sites and places[site].freedom is Freedom.ROWS:
                return self._vector(site, "scale")
            stage = places[site].stage
        return self._vector(stage, "scale") if stage in self.plan.streams else None

    def _undivided(self, source: str, wanted: Vector | None = None) -> str:
        """Return an operation's output divided by `wanted`, or by nothing."""
        scale = self.divided.get(source)
        if scale is wanted:
            return source
        one = np.ones(1, np.float32)
        weight = (one if scale is None else scale) / (one if wanted is None else wanted)
        op = Scale(
            name=f"{source}.rescaled",
            inputs=(source,),
            shape=self.ops[source].shape,
            weight=weight,
        )
        return self._put(op, wanted)

    # --- operations ----------------------------------------------------------------------------

    def _site(self, base: dict[str, Any]) -> str:
        name, (source,) = base["name"], base["inputs"]
        if name not in self.plan.sites:
            return str(source)
        pair = QuantizePair(**base, parameters=self.model.sites[name])
        return self._put(pair, self.divided.get(source))

    def _addition(self, base: dict[str, Any]) -> str:
        """Add a branch to the residual stream, in the stream's units."""
        stream, branch = base["inputs"]
        scale = self.divided.get(stream)
        base |= {"inputs": (stream, self._undivided(branch, scale))}
        return self._put(Add(**base), scale)

    def _norm(self, base: dict[str, Any], eps: float) -> str:
        name = base["name"]
        base |= {"inputs": (self._undivided(base["inputs"][0]),)}
        weight, bias = (self.arrays.get(f"float/{name}.{n}") for n in ("weight", "bias"))
        stream = self._written_scale(name)
        if stream is not None:
            assert weight is not None, f"{name} starts a residual stream and has no affine"
            assert bias is not None
            norm = Norm(
                **base, eps=eps, weight=_float32(weight / stream), bias=_float32(bias / stream)
            )
            return self._put(norm, stream)
        if weight is None:
            weight, bias = self._affine(name)
        return self._put(Norm(**base, eps=eps, weight=weight, bias=bias))

    def _affine(self, norm: str) -> tuple[Vector | None, Vector | None]:
        """Return what a folded LayerNorm must do so that its site holds (x - z) / s."""
        for site, place in self.plan.structure.places.items():
            read = all(reader in self.plan.integer for reader in place.readers)
            scale = self._vector(site, "scale")
            if place.writer == norm and read and scale is not None:
                shift = self._vector(site, "shift")
                assert shift is not None, f"{site} lies behind a LayerNorm and has no shift"
                inverse = 1 / scale.astype(np.float64)
                return _float32(inverse), _float32(-shift * inverse)
        return None, None

    def _weighted(self, base: dict[str, Any], layer: Layer, module: torch.nn.Module) -> str:
        name, (source,) = base["name"], base["inputs"]
        written = self._written_scale(name)
        common = {
            **base,
            "layer": layer,
            "weight": self.arrays[f"float/{name}.weight"],
            "bias": self.arrays[f"float/{name}.bias"],
            "integers": None,
        }
        if name in self.plan.integer:
            common["integers"] = self._integers(name, source, written)
        else:
            # A depthwise layer reads the stream's units; every other float layer reads its own.
            rows = 1 / written if written is not None else np.ones(1, np.float32)
            read = self.divided.get(source, np.ones(1, np.float32))
            common["weight"] = common["weight"] * along_rows(rows * read, common["weight"].ndim)
            common["bias"] = common["bias"] * rows
        if layer in {Layer.PW1, Layer.PW2, Layer.HEAD}:
            return self._put(Linear(**common), written)
        conv = cast("torch.nn.Conv2d", module)
        op = Conv(
            **common,
            stride=conv.stride[0],
            padding=cast("int", conv.padding[0]),
            groups=conv.groups,
        )
        return self._put(op, written)

    def _integers(self, name: str, source: str, written: Vector | None) -> Integers:
        key = f"{self.plan.export.profile}/{name}"
        scales = self.arrays[f"{key}.weight_scale"]
        bias, of_bias = self.arrays[f"{key}.bias"], None
        if written is not None:
            scales = _float32(scales / written)
        if self.plan.export.scheme in ACTIVATION_BITS:
            site = cast("QuantizePair", self.ops[source])
            of_bias = bias_scales(site.parameters.scale, scales)
        elif written is not None:
            bias = _float32(bias / written)
        return Integers(
            weight=self.arrays[f"{key}.weight"],
            weight_scales=scales,
            bias=bias,
            bias_scales=of_bias,
        )

    def _put(self, op: Op, divided: Vector | None = None) -> str:
        self.ops[op.name] = op
        if divided is not None:
            self.divided[op.name] = divided
        return op.name


def _halved(op: Op) -> Op:
    """Round a layer's weights to float16, which leaves them float32 here.

    Raises:
        ArtifactError: One is too large for float16.
    """
    if not isinstance(op, Weighted):
        return op
    largest = float(np.abs(op.weight).max())
    if largest > HALF_MAX:
        raise ArtifactError(
            f"a weight of {op.name} is {largest:.3g}, which float16 does not hold",
            allowed=f"weights up to {HALF_MAX:g} once the network is folded",
            do="Choose --scheme float or w8a8",
        )
    return replace(op, weight=_float32(op.weight.astype(np.float16)))


def _float32(values: NDArray[Any]) -> Vector:
    return values.astype(np.float32)
