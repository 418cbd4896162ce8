"""This project's own names: safetensors whose metadata carries the architecture and the labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

NAME = "own"
NORM_EPS = 1e-6
EXPECTED = "stem.conv.weight, stages.0.blocks.0.depthwise.weight, head.fc.weight"


def matches(names: Collection[str]) -> bool:
    """Tell whether these tensor names are of this dialect."""
    return "stem.conv.weight" in names and "head.fc.weight" in names


def canonical(name: str) -> str:
    """Return the canonical name of a tensor."""
    return name
