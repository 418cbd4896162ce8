"""The network as a graph of its modules, by torch.fx.

In: a `ConvNeXt`, on the meta device if need be. Out: nodes in the order in which data reaches them:
what stands behind what is read off the network, and written down nowhere else.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from torch import fx, nn

from pipeline.convnext import (
    Centre,
    ChannelNorm,
    GlobalMean,
    Pointwise,
    ResponseNorm,
    Site,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipeline.convnext import ConvNeXt

WEIGHTED = (nn.Conv2d, Pointwise)
LEAVES = (Site, ChannelNorm, Pointwise, GlobalMean, ResponseNorm, Centre)
"""What a trace does not look into."""


def trace(model: ConvNeXt) -> tuple[fx.Graph, dict[str, nn.Module]]:
    """Return the network as torch.fx nodes, one per module, with the modules by name.

    Nodes are sites, layers, norms and the residual additions, in the order in which data reaches
    them; identities that are no sites are left out. A model on the meta device will do.
    """

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
            return isinstance(m, LEAVES) or super().is_leaf_module(m, qualified_name)

    graph, modules = Tracer().trace(model), dict(model.named_modules())
    for node in graph.nodes:
        if type(modules.get(str(node.target))) is nn.Identity:
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
    return graph, modules


class Freedom(StrEnum):
    """What may be done to a site's channels without changing the function.

    `norm`: a LayerNorm writes it, so its channels can be shifted and scaled. `rows`: a layer writes
    it, and a LayerNorm or the residual addition reads it: scaled. `stream`: it starts or reads the
    residual stream, whose channels are scaled alike at all sites of a stage. `none`: nothing.
    """

    NORM = "norm"
    ROWS = "rows"
    STREAM = "stream"
    NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a site lies.

    Attributes:
        freedom: What may be done to its channels.
        writer: The module that writes it, past what only averages or adds; None for the image.
        readers: The modules that read it; none for a site in front of the residual addition.
        stage: Whose residual stream it starts, reads or is added to, where it does.
    """

    freedom: Freedom
    writer: str | None
    readers: tuple[str, ...]
    stage: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """What stands behind what, by name.

    Attributes:
        places: Every site's.
        reads: Every layer with weights to the site that it reads.
        writes: The same to the site behind it, where there is one.
        streams: Every node of a residual stream to its stage: additions (by `addition_name`), and
            what the first of them starts from.
    """

    places: dict[str, Place]
    reads: dict[str, str]
    writes: dict[str, str]
    streams: dict[str, str]


def addition_name(node: fx.Node) -> str:
    """Return a residual addition's name: that of the block whose branch it adds."""
    branch = next(n for n in reversed(node.all_input_nodes) if n.op == "call_module")
    return f"{str(branch.target).rpartition('.')[0]}.add"


def node_name(node: fx.Node) -> str:
    """Return a module's name, an addition's, or `image` for the input."""
    if node.op == "placeholder":
        return "image"
    return addition_name(node) if is_addition(node) else str(node.target)


def is_addition(node: fx.Node) -> bool:
    """Tell whether a node is a residual addition."""
    return node.op == "call_function" and node.target is operator.add


def structure(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> Structure:
    """Read off a trace where every site lies."""
    streams: dict[str, str] = {}
    for node in graph.nodes:
        if is_addition(node):
            stage = addition_name(node).partition(".blocks.")[0]
            for part in (node, node.args[0]):
                # The first stage of an isotropic network starts at its stem.
                streams.setdefault(node_name(part), stage)

    def of(node: fx.Node) -> nn.Module | None:
        return modules.get(str(node.target)) if node.op == "call_module" else None

    places: dict[str, Place] = {}
    reads: dict[str, str] = {}
    writes: dict[str, str] = {}
    for node in graph.nodes:
        if not isinstance(of(node), Site):
            continue
        name, source = node_name(node), node.all_input_nodes[0]
        while isinstance(of(source), GlobalMean):
            source = source.all_input_nodes[0]
        readers = [user for user in node.users if user.op == "call_module"]
        places[name] = Place(
            freedom=_freedom(node, of(source), [of(user) for user in readers], streams),
            writer=None if source.op == "placeholder" else node_name(source),
            readers=tuple(node_name(user) for user in readers),
            stage=_stage(node, streams),
        )
        reads |= {node_name(u): name for u in readers if isinstance(of(u), WEIGHTED)}
        if isinstance(of(source), WEIGHTED):
            writes[node_name(source)] = name
    return Structure(places=places, reads=reads, writes=writes, streams=streams)


def _freedom(
    node: fx.Node,
    writer: nn.Module | None,
    readers: Sequence[nn.Module | None],
    streams: Mapping[str, str],
) -> Freedom:
    if _stage(node, streams) is not None:
        branch = node_name(node) not in streams and any(map(is_addition, node.users))
        return Freedom.ROWS if branch else Freedom.STREAM
    if isinstance(writer, ChannelNorm) and all(isinstance(r, WEIGHTED) for r in readers):
        return Freedom.NORM
    if isinstance(writer, WEIGHTED) and all(isinstance(r, ChannelNorm) for r in readers):
        return Freedom.ROWS
    return Freedom.NONE


def _stage(node: fx.Node, streams: Mapping[str, str]) -> str | None:
    """Return the stage whose stream a site starts, reads or is added to."""
    added = [user for user in node.users if is_addition(user)]
    near = [node, *added, *node.all_input_nodes]
    return next((streams[node_name(n)] for n in near if node_name(n) in streams), None)
