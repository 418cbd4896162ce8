"""What a proof is to find, by the scheme."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from pipeline.records import Layer
    from targets import graph as g


def computing_layers(
    graph: g.Graph, dynamic: Collection[type[g.Weighted]] = (), floats: Collection[Layer] = ()
) -> int:
    """Return how many layers are to compute in integers.

    Args:
        graph: What was exported.
        dynamic: Kinds of layer that compute in integers where the runtime quantizes activations.
        floats: Kinds of layer that compute in floats with their integers dequantized.

    Returns:
        The layers with integer weights whose input is in integers too; in w8 that is none.
    """
    match graph.export.scheme:
        case "w8":
            return 0
        case "w8a8-dynamic":
            kinds = tuple(dynamic)
            return sum(op.integers is not None and isinstance(op, kinds) for op in graph.weighted)
    return sum(op.integers is not None and op.layer not in floats for op in graph.weighted)
