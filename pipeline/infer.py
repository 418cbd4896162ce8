"""The architecture of a network, read off its tensors.

In: canonical tensors, and what a dialect knows beyond them. Out: an `Architecture`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pydantic import ValidationError

from pipeline.errors import CheckpointError
from pipeline.records import Architecture

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

BLOCK = re.compile(r"stages\.(\d+)\.blocks\.(\d+)\.")
FIRST = "stages.0.blocks.0"


def infer_architecture(
    tensors: Mapping[str, Tensor],
    *,
    norm_eps: float,
    head_norm_eps: float | None,
    traits: Collection[str],
    where: str,
) -> Architecture:
    """Read depths, dims and variants off canonical tensors.

    Args:
        tensors: Canonical names to tensors; only their shapes are looked at.
        norm_eps: LayerNorm eps, as the dialect defines it.
        head_norm_eps: The head's where it is another.
        traits: What a dialect's names tell and canonical ones do not: `overlap_act`,
            `head_norm_first`.
        where: The checkpoint, for messages.

    Raises:
        CheckpointError: A tensor that gives the shape is missing or has the wrong rank.
    """
    shapes = _Shapes(tensors, where)
    blocks: dict[int, set[int]] = {}
    for name in tensors:
        if match := BLOCK.match(name):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    width, channels, patch, _ = shapes.of("stem.conv.weight", 4)
    overlap = "stem.conv2.weight" in tensors
    dims = [shapes.of("stem.conv2.weight", 4)[0] if overlap else width]
    dims += [
        shapes.of(f"stages.{stage}.downsample.conv.weight", 4)[0] for stage in range(1, len(blocks))
    ]
    kernel = shapes.of(f"{FIRST}.depthwise.weight", 4)[2]
    if kernel % 2 == 0:
        raise CheckpointError(
            f"{where}: depthwise convolutions of side {kernel}",
            allowed="odd sides, which padding keeps the resolution of",
            do="Check that the file is a ConvNeXt classifier",
        )
    hidden, inner = shapes.of(f"{FIRST}.pw1.weight", 2)
    has_hidden_head = "head.hidden.weight" in tensors
    try:
        return Architecture(
            depths=tuple(len(blocks[stage]) for stage in range(len(blocks))),
            dims=tuple(dims),
            classes=shapes.of("head.fc.weight", 2)[0],
            layer_scale=f"{FIRST}.scale.weight" in tensors,
            in_channels=channels,
            patch=4 if overlap else patch,
            kernel=kernel,
            expansion=hidden // max(inner, 1),
            norm_eps=norm_eps,
            head_norm_eps=None if head_norm_eps == norm_eps else head_norm_eps,
            grn=f"{FIRST}.grn.weight" in tensors,
            stem=("overlap_act" if "overlap_act" in traits else "overlap") if overlap else "patch",
            stem_width=width if overlap else None,
            stem_norm="stem.norm.weight" in tensors,
            downsample_first="stages.0.downsample.conv.weight" in tensors,
            head_norm_first="head_norm_first" in traits,
            head_width=shapes.of("head.hidden.weight", 2)[0] if has_hidden_head else None,
        )
    except (KeyError, ValidationError) as error:
        raise CheckpointError(
            f"{where}: stages {sorted(blocks)} do not make a ConvNeXt",
            allowed="stages numbered from 0 without gaps",
            do="Check that the file is a whole ConvNeXt classifier",
        ) from error


class _Shapes:
    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        self.tensors = tensors
        self.where = where

    def of(self, name: str, rank: int) -> tuple[int, ...]:
        tensor = self.tensors.get(name)
        if tensor is None or tensor.ndim != rank:
            got = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise CheckpointError(
                f"{self.where}: {name} (canonical name) is {got}",
                allowed=f"a tensor of rank {rank} there",
                do="Check that the file is a whole ConvNeXt classifier, head included",
            )
        return tuple(tensor.shape)
