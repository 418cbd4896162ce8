"""Meta's original names (facebookresearch/ConvNeXt): downsample_layers, stages, norm, head.

Source: the paper's reference implementation, models/convnext.py; LayerNorm eps is 1e-6 throughout.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

NAME = "meta"
NORM_EPS = 1e-6
EXPECTED = "downsample_layers.0.0.weight, stages.0.0.dwconv.weight, norm.weight, head.weight"

_RULES: tuple[tuple[str, str], ...] = (
    (r"downsample_layers\.0\.0\.(.+)", r"stem.conv.\1"),
    (r"downsample_layers\.0\.1\.(.+)", r"stem.norm.\1"),
    (r"downsample_layers\.(\d+)\.0\.(.+)", r"stages.\1.downsample.norm.\2"),
    (r"downsample_layers\.(\d+)\.1\.(.+)", r"stages.\1.downsample.conv.\2"),
    (r"stages\.(\d+)\.(\d+)\.dwconv\.(.+)", r"stages.\1.blocks.\2.depthwise.\3"),
    (r"stages\.(\d+)\.(\d+)\.norm\.(.+)", r"stages.\1.blocks.\2.norm.\3"),
    (r"stages\.(\d+)\.(\d+)\.pwconv(\d)\.(.+)", r"stages.\1.blocks.\2.pw\3.\4"),
    (r"stages\.(\d+)\.(\d+)\.gamma", r"stages.\1.blocks.\2.scale.weight"),
    (r"norm\.(.+)", r"head.norm.\1"),
    (r"head\.(.+)", r"head.fc.\1"),
)


def matches(names: Collection[str]) -> bool:
    """Tell whether these tensor names are of this dialect."""
    return "downsample_layers.0.0.weight" in names


def canonical(name: str) -> str:
    """Return the canonical name of a tensor, or the name itself where no rule applies."""
    for pattern, replacement in _RULES:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return name
