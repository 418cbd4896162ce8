"""This project's own names: safetensors whose metadata carries the architecture and the labels.

In: tensors under canonical names. Out: the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.dialects import _rules

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

    from pipeline.records import Architecture

NAME = "own"
EXPECTED = "stem.conv.weight, stages.0.blocks.0.depthwise.weight, head.fc.weight"

_HEAD = "head.fc"


def matches(names: Collection[str]) -> bool:
    """Tell whether these tensor names are of this dialect."""
    return "stem.conv.weight" in names and "stages.0.blocks.0.depthwise.weight" in names


def traits(names: Collection[str]) -> frozenset[str]:  # noqa: ARG001 - the interface's
    """Return what the names alone tell: nothing, for the metadata carries the architecture."""
    return frozenset()


def refusal(tensors: Mapping[str, Tensor]) -> str | None:
    """Return what keeps these tensors from being read, by its name with the reason; or None."""
    return _rules.refusal(tensors, (), head=_HEAD)


def canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as they are, a wrapped classifier under its plain name."""
    return _rules.canonical(tensors, (), head=_HEAD)


def original(
    tensors: Mapping[str, Tensor],
    architecture: Architecture,  # noqa: ARG001 - the interface's
) -> dict[str, Tensor]:
    """Return the tensors as they are; this dialect has names for every architecture."""
    return dict(tensors)


def norm_eps(canonical: Mapping[str, Tensor]) -> tuple[float, float | None]:  # noqa: ARG001
    """Return the eps of all LayerNorms, and None: the head's is the same."""
    return 1e-6, None
