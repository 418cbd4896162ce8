"""What kind of operation a runtime's op is, by the names that this project gave it.

In: names in an artifact, such as `stages.0.blocks.1.norm.mean`. Out: an `OpKind`. A runtime says
itself which of its ops quantize or change a layout; what it fused has the names of all its parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pipeline.records import OpKind

WARM_UP = 3
"""Inferences before those whose operations are timed."""
KINDS: dict[str, OpKind] = {
    "pw1": "pointwise",
    "pw2": "pointwise",
    "depthwise": "depthwise",
    "conv": "convolution",
    "norm": "layernorm",
    "grn": "layernorm",
    "gelu": "gelu",
    "add": "add",
}
"""By a part of a name."""


def kind_of(names: Iterable[str]) -> OpKind:
    """Return the kind of the first name that tells one; `other` where none does."""
    found = (KINDS[part] for name in names for part in name.split(".") if part in KINDS)
    return next(found, "other")
