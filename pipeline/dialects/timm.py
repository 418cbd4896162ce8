"""timm's names: ConvNeXt and ConvNeXt V2 with timm's own stems and heads.

In: tensors as timm saves its ConvNeXt. Out: canonical ones; and back.

Source: timm/models/convnext.py. LayerNorm's eps is 1e-6, but 1e-5 in convnext_xxlarge. A block's
two maps are linear layers, or convolutions of side 1 in its small networks (`conv_mlp`). Tensors do
not tell the activation: timm's test_convnext networks, whose GELU is approximate, look like others.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pipeline.convnext import SIZES
from pipeline.dialects import _rules
from pipeline.dialects._rules import Feature, Rule

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

    from pipeline.records import Architecture

NAME = "timm"
EXPECTED = "stem.0.weight, stages.0.blocks.0.conv_dw.weight, head.fc.weight"

_HEAD = "head"
_LACKS = frozenset({Feature.ISOTROPIC, Feature.NORM_FIRST_MLP})
# What stands at each place of the stem; GELU has no tensors.
_STEMS = {
    "patch": ("conv", "norm"),
    "overlap": ("conv", "conv2", "norm"),
    "overlap_act": ("conv", "", "conv2", "norm"),
}
_CONV_MLP_SIZES = frozenset({"atto", "femto", "pico", "nano"})
_BLOCK = (
    ("conv_dw.{p}", "depthwise.{p}"),
    ("norm.{p}", "norm.{p}"),
    ("mlp.fc1.bias", "pw1.bias"),
    ("mlp.grn.{p}", "grn.{p}"),
    ("mlp.fc2.bias", "pw2.bias"),
    ("gamma", "scale.weight"),
)
# Older files keep the head as Meta does. They are read; what is written has today's names.
_OLDER = (Rule("norm.{p}", "head.norm.{p}"), Rule("head.{p}", "head.fc.{p}"))


def _rules_for(stem: str, *, norm_first: bool, conv_mlp: bool) -> tuple[Rule, ...]:
    places = [(place, part) for place, part in enumerate(_STEMS[stem]) if part]
    block, ones = "stages.{i}.blocks.{j}", (0, 2) if conv_mlp else (0, 0)
    return (
        *(Rule(f"stem.{place}.{{p}}", f"stem.{part}.{{p}}") for place, part in places),
        Rule("stages.{i}.downsample.0.{p}", "stages.{i}.downsample.norm.{p}"),
        Rule("stages.{i}.downsample.1.{p}", "stages.{i}.downsample.conv.{p}"),
        *(Rule(f"{block}.{theirs}", f"{block}.{ours}") for theirs, ours in _BLOCK),
        Rule(f"{block}.mlp.fc1.weight", f"{block}.pw1.weight", ones),
        Rule(f"{block}.mlp.fc2.weight", f"{block}.pw2.weight", ones),
        Rule("norm_pre.{p}" if norm_first else "head.norm.{p}", "head.norm.{p}"),
        Rule("head.pre_logits.fc.{p}", "head.hidden.{p}"),
        Rule("head.fc.{p}", "head.fc.{p}"),
    )


def matches(names: Collection[str]) -> bool:
    """Tell whether these tensor names are of this dialect."""
    return "stem.0.weight" in names and "stages.0.blocks.0.conv_dw.weight" in names


def traits(names: Collection[str]) -> frozenset[str]:
    """Return what the names alone tell.

    Args:
        names: timm's, of tensors.

    Returns:
        `overlap_act`: GELU stands between the stem's two convolutions, where it takes a place
        without tensors. `head_norm_first`: the head normalises before it pools.
    """
    present = {"overlap_act": "stem.3.weight", "head_norm_first": "norm_pre.weight"}
    return frozenset(trait for trait, name in present.items() if name in names)


LARGEST_PATCH = 4
"""Above it timm reaches its output stride of 32 before the last stage, and dilates from there."""


def refusal(tensors: Mapping[str, Tensor]) -> str | None:
    """Return what keeps these tensors from being read, by its name with the reason; or None."""
    stem = tensors.get("stem.0.weight")
    if stem is not None and stem.ndim > 1 and stem.shape[-1] > LARGEST_PATCH:
        return (
            f"patch {stem.shape[-1]}: timm dilates its later stages there (output_stride 32), "
            "which the tensors do not show"
        )
    return _rules.refusal(tensors, _rules_of(tensors), head=_HEAD)


def canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under canonical names; the maps of a block as (out, in)."""
    return _rules.canonical(tensors, _rules_of(tensors), head=_HEAD)


def original(tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Return canonical tensors under this dialect's names, in the shapes of timm's entry points.

    Raises:
        CheckpointError: The dialect cannot express a feature of the architecture.
    """
    _rules.require(architecture, NAME, lacks=_LACKS)
    rules = _rules_for(
        architecture.stem,
        norm_first=architecture.head_norm_first,
        conv_mlp=_conv_mlp(architecture),
    )
    return _rules.original(tensors, rules)


def norm_eps(canonical: Mapping[str, Tensor]) -> tuple[float, float | None]:
    """Return the eps of all LayerNorms, and None: the head's is the same."""
    return (1e-5 if _size(canonical) == SIZES["xxlarge"] else 1e-6), None


def _conv_mlp(net: Architecture) -> bool:
    """Tell whether timm's entry point for this network asks for convolutions of side 1."""
    size = next((name for name, shape in SIZES.items() if shape == (net.depths, net.dims)), None)
    return size in _CONV_MLP_SIZES or (size == "tiny" and net.head_norm_first and not net.grn)


def _rules_of(names: Collection[str]) -> tuple[Rule, ...]:
    overlap = "overlap" if "stem.2.weight" in names else "patch"
    told = traits(names)
    stem = "overlap_act" if "overlap_act" in told else overlap
    return (*_rules_for(stem, norm_first="head_norm_first" in told, conv_mlp=True), *_OLDER)


def _size(canonical: Mapping[str, Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return blocks and channels per stage."""
    blocks: dict[int, int] = {}
    dims: dict[int, int] = {}
    for name, tensor in canonical.items():
        if match := re.fullmatch(r"stages\.(\d+)\.blocks\.\d+\.depthwise\.weight", name):
            stage = int(match[1])
            blocks[stage] = blocks.get(stage, 0) + 1
            dims[stage] = int(tensor.shape[0])
    return tuple(blocks[s] for s in sorted(blocks)), tuple(dims[s] for s in sorted(dims))
