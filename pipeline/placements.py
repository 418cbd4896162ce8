"""Placements: which layers run in integers, and which sites are quantized for it.

In: a word and the network's structure. Out: the names of layers and of sites.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import UsageError
from pipeline.records import Layer

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from pipeline.records import Architecture
    from pipeline.trace import Structure


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What runs in integers.

    Attributes:
        layers: The kinds of layer.
        outputs: Whether the sites behind these layers are quantized too, not only those that they
            read: an integer kernel that writes integers needs a grid to write on.
    """

    layers: frozenset[Layer]
    outputs: bool


POINTWISE = frozenset({Layer.PW1, Layer.PW2})
PLACEMENTS: dict[str, Placement] = {
    "pointwise": Placement(layers=POINTWISE, outputs=False),
    "pointwise-downsample": Placement(layers=POINTWISE | {Layer.DOWNSAMPLE}, outputs=False),
    "pointwise-io": Placement(layers=POINTWISE, outputs=True),
    "pointwise-depthwise": Placement(layers=POINTWISE | {Layer.DEPTHWISE}, outputs=True),
    "dense": Placement(layers=frozenset(Layer) - {Layer.DEPTHWISE}, outputs=True),
    "all": Placement(layers=frozenset(Layer), outputs=True),
}
"""The last one quantizes every site of the others."""


def widest(names: Collection[str]) -> str:
    """Return the narrowest placement that quantizes every site of these."""
    wanted = [PLACEMENTS[name] for name in names]
    layers = frozenset[Layer]().union(*(one.layers for one in wanted))
    outputs = any(one.outputs for one in wanted)
    return next(
        name for name, one in PLACEMENTS.items() if one.layers >= layers and one.outputs >= outputs
    )


def quantized_sites(
    placement: Placement, structure: Structure, integer_layers: Collection[str]
) -> frozenset[str]:
    """Return the sites that are quantized.

    Args:
        placement: Whether outputs are.
        structure: Of the network.
        integer_layers: The names of the layers that run in integers.
    """
    read = {site for layer, site in structure.reads.items() if layer in integer_layers}
    written = {site for layer, site in structure.writes.items() if layer in integer_layers}
    return frozenset(read | written if placement.outputs else read)


def check_layers(names: Sequence[str], architecture: Architecture, placement: str) -> None:
    """Check that a network has these layers, and others that run in integers.

    Raises:
        UsageError: One is not there; the message names those that are most like it. Or nothing
            would be left to quantize.
    """
    from pipeline.convnext import empty, layers  # torch is slow to import

    known = {name: kind for name, kind, _ in layers(empty(architecture))}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
            raise UsageError(
                f"unknown layer: {name}",
                allowed=f"a layer of this network, such as {', '.join(near)}",
                do="Correct --float-layers",
            )
    kinds = PLACEMENTS[placement].layers
    if not any(kind in kinds for name, kind in known.items() if name not in names):
        raise UsageError(
            f"--float-layers names every layer that placement {placement} has in integers",
            allowed="some of them",
            do="Leave one out, or ask for --scheme float",
        )
