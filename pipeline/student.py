"""The network that is trained: a quantized model as torch modules, and back.

In: a `QuantizedModel` with its arrays. Out: the folded network with its sites and integer layers
replaced by learnt ones (`calib.learned`), every fold and rescaling baked in, whose logits are those
of the integers; and, whenever asked, the record that it has become.

What stays float is not trained: it is what the float artifacts hold too. One set of integers is
trained, that of the strictest profile, and holds in every profile.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from calib.learned import GridKind, LearnedGrid, LearnedLayer, LearnedSite, StartingLayer
from pipeline.arithmetic import BIAS_LIMIT, BITS, bias_scales, quantize_bias
from pipeline.convnext import Block, ConvNeXt, Site, empty, layer_kind
from pipeline.placements import PLACEMENTS
from pipeline.quantize import FLOAT, layer_grid
from pipeline.records import ACTIVATION_BITS, PROFILES, STRICTEST, QuantizedModel
from pipeline.trace import Freedom, node_name, structure, trace

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import fx

    from pipeline.records import Quantization
    from pipeline.trace import Place

    Arrays = Mapping[str, NDArray[Any]]

_TENSORS = ("weight", "weight_scale")


def float_network(record: QuantizedModel, arrays: Arrays) -> ConvNeXt:
    """Return the folded float network that a model was quantized from, frozen, in eval mode."""
    network = empty(record.architecture, folded=True).to_empty(device="cpu")
    prefix = f"{FLOAT}/"
    network.load_state_dict(
        {
            name.removeprefix(prefix): torch.from_numpy(array)
            for name, array in arrays.items()
            if name.startswith(prefix)
        }
    )
    return network.eval().requires_grad_(requires_grad=False)


class Student(nn.Module):
    """A quantized model that can be trained.

    Takes pixels in [0, 255], float32 (N, C, H, W), and returns logits (N, classes), as the
    artifacts do.

    Args:
        record: Where training begins.
        arrays: Its arrays.
    """

    def __init__(self, record: QuantizedModel, arrays: Arrays) -> None:
        super().__init__()
        self.record = record
        self.network = float_network(record, arrays)
        self.start = arrays
        graph, modules = trace(self.network)
        self.structure = structure(graph, modules)
        behind = sites_behind_sites(graph, modules)
        self.sites: dict[str, LearnedSite] = {}
        self.layers: dict[str, LearnedLayer] = {}
        self.integer = self._integer_layers()
        if record.scheme in ACTIVATION_BITS:
            for name in record.sites:
                self._add_site(name, behind.get(name))
        for name in self.integer:
            self._add_layer(name, cast("nn.Conv2d | nn.Linear", modules[name]))

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        logits: Tensor = self.network(image)
        return logits

    def _integer_layers(self) -> list[str]:
        kinds = PLACEMENTS[self.record.placement].layers
        return [
            name
            for name in self.structure.reads
            if layer_kind(name) in kinds and name not in self.record.float_layers
        ]

    def _add_site(self, name: str, before: str | None) -> None:
        place, parameters = self.structure.places[name], self.record.sites[name]
        scale, shift, stream = self._rescaling(name, place)
        grid = LearnedGrid(
            parameters,
            scale,
            shift,
            GridKind(
                bits=parameters.bits,
                short=place.freedom in {Freedom.NORM, Freedom.ROWS} or place.writer in self.integer,
                has_zero=shift is None and parameters.bits <= BITS,
            ),
        )
        if before in self.sites:
            # It quantizes what is quantized already.
            grid = self.sites[before].grid
        read = any(layer in self.structure.reads for layer in place.readers)
        self.sites[name] = LearnedSite(grid, stream, read=read)
        self.network.set_submodule(name, self.sites[name])

    def _rescaling(
        self, name: str, place: Place
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return a site's scale and shift per channel, and its residual stream's scale."""

        def vector(key: str) -> Tensor | None:
            array = self.start.get(f"rescale/{key}")
            return None if array is None else torch.from_numpy(array)

        if place.freedom is Freedom.STREAM:
            return None, None, vector(f"{place.stage}.scale")
        return vector(f"{name}.scale"), vector(f"{name}.shift"), None

    def _add_layer(self, name: str, module: nn.Conv2d | nn.Linear) -> None:
        key = f"{STRICTEST}/{name}"
        reads = self.sites.get(self.structure.reads[name])
        writes = self.sites.get(self.structure.writes.get(name, ""))
        weight, scales = (torch.from_numpy(self.start[f"{key}.{n}"]) for n in _TENSORS)
        bias = torch.from_numpy(self.start[f"{key}.bias"]).float()
        if reads is not None:
            step = 1.0 if reads.counts else float(reads.grid.step().detach())
            whole = self.start[f"{key}.bias"].astype(float)
            bias = torch.from_numpy(whole * bias_scales(step, scales.numpy())).float()
        layer = LearnedLayer(
            module,
            StartingLayer(
                weight=weight,
                scales=scales,
                bias=bias,
                grid=layer_grid(self.record.scheme, name, tuple(weight.shape), STRICTEST),
            ),
            reads,
            writes,
        )
        self.layers[name] = layer
        self.network.set_submodule(name, layer)

    # --- for the training loop -----------------------------------------------------------------

    @property
    def bits(self) -> int:
        """Of the weights that have least."""
        return min(layer.grid.bits for layer in self.layers.values())

    def groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the weights, which may decay, and scales, offsets and biases, which do not."""
        weights = [layer.weight for layer in self.layers.values()]
        own = {id(weight) for weight in weights}
        learnt = [p for p in self.network.parameters() if p.requires_grad]
        return weights, [p for p in learnt if id(p) not in own]

    def network_of(self) -> nn.Module:
        """Return the network."""
        return self.network

    def drop_paths(self, rate: float, generator: torch.Generator, part: tuple[int, int]) -> None:
        """Let images skip blocks while training; see `drop_paths`."""
        drop_paths(self.network, rate, generator, part)

    # --- the way back ------------------------------------------------------------------------

    def quantized(self) -> tuple[QuantizedModel, dict[str, NDArray[Any]]]:
        """Return the record that the network has become, and its arrays.

        The integers are those that `forward` computes with, in every profile.
        """
        with torch.no_grad():
            arrays = dict(self.start)
            sites = dict(self.record.sites)
            for name, site in self.sites.items():
                sites[name] = self._site(name, site.grid, arrays)
            for name, layer in self.layers.items():
                self._layer(name, layer, arrays)
        return replace(self.record, sites=sites), arrays

    def _site(self, name: str, grid: LearnedGrid, arrays: dict[str, NDArray[Any]]) -> Quantization:
        step, shift = grid.step(), grid.shift()
        if step.ndim:
            arrays[f"rescale/{name}.scale"] = step.numpy()
            if shift is not None:
                arrays[f"rescale/{name}.shift"] = shift.numpy()
        return replace(
            self.record.sites[name],
            scale=1.0 if step.ndim else float(step),
            zero_point=int(grid.zero_point()),
        )

    def _layer(self, name: str, layer: LearnedLayer, arrays: dict[str, NDArray[Any]]) -> None:
        scales = layer.scales()
        weight = layer.integers(scales).numpy().astype(np.int8)
        bias = layer.exact_bias().numpy()
        if layer.sites[0] is not None:
            step = float(layer.input_scale())
            most = BIAS_LIMIT * bias_scales(step, scales.numpy()).astype(float)
            bias = quantize_bias(np.clip(bias, -most, most), step, scales.numpy())
        for profile in PROFILES:
            arrays[f"{profile}/{name}.weight"] = weight
            arrays[f"{profile}/{name}.weight_scale"] = scales.numpy()
            arrays[f"{profile}/{name}.bias"] = bias


def drop_paths(
    network: nn.Module, rate: float, generator: torch.Generator, part: tuple[int, int]
) -> None:
    """Let images skip a network's blocks, the last one with this probability.

    Args:
        network: Changed in place.
        rate: Of the last block; the others' rise from 0 linearly with depth.
        generator: What is drawn from.
        part: This process's rank and how many there are: all draw for the whole batch.
    """
    blocks = [name for name, m in network.named_modules() if isinstance(m, Block)]
    for index, block in enumerate(blocks):
        branch = f"{block}.res_out"
        inner = network.get_submodule(branch)
        share = rate * (index + 1) / len(blocks)
        network.set_submodule(branch, DroppedPath(inner, share, generator, part).train())


class DroppedPath(nn.Module):
    """A branch that is left out for some images, and counts the more for the others.

    Source: Huang et al., "Deep Networks with Stochastic Depth", 2016.
    """

    def __init__(
        self, inner: nn.Module, rate: float, generator: torch.Generator, part: tuple[int, int]
    ) -> None:
        super().__init__()
        self.inner, self.rate, self.generator, self.part = inner, rate, generator, part

    def forward(self, x: Tensor) -> Tensor:
        """Pass (N, C, H, W) on."""
        y: Tensor = self.inner(x)
        if not self.training:
            return y
        rank, ranks = self.part
        drawn = torch.rand(ranks * len(y), generator=self.generator)[rank * len(y) :][: len(y)]
        kept = (drawn >= self.rate).to(y) / (1 - self.rate)
        return y * kept.reshape(-1, *[1] * (y.ndim - 1))


def sites_behind_sites(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return every site that reads what a site gives, with that site."""
    found = {}
    for node in graph.nodes:
        if isinstance(modules.get(str(node.target)), Site):
            source = node.all_input_nodes[0]
            if isinstance(modules.get(str(source.target)), Site):
                found[node_name(node)] = node_name(source)
    return found
