"""The network as a graph of its modules, by torch.fx.

In: a `ConvNeXt`, on the meta device if need be. Out: nodes in the order in which data reaches them:
what stands behind what is read off the network, and written down nowhere else.
"""

from __future__ import annotations

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
    from pipeline.convnext import ConvNeXt

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


def inputs_of_layers(model: ConvNeXt) -> dict[str, str]:
    """Return, for every layer that carries weights, the name of the site that it reads."""
    graph, modules = trace(model)
    reads = {}
    for node in graph.nodes:
        if not isinstance(modules.get(str(node.target)), nn.Conv2d | Pointwise):
            continue
        source = str(node.all_input_nodes[0].target)
        assert isinstance(modules.get(source), Site), f"{node.target} reads no site"
        reads[str(node.target)] = source
    return reads
