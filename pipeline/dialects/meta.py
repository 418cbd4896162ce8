"""Meta's original names: ConvNeXt, its isotropic form, and ConvNeXt V2.

In: tensors as facebookresearch/ConvNeXt and ConvNeXt-V2 save them. Out: canonical ones; and back.

Source: their models/convnext.py, models/convnext_isotropic.py and models/convnextv2.py. LayerNorm's
eps is 1e-6 throughout. V2 has GRN, of shape (1, 1, 1, 4C), where V1 has LayerScale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.dialects import _rules
from pipeline.dialects._rules import Feature, Rule

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

    from pipeline.records import Architecture

NAME = "meta"
EXPECTED = "downsample_layers.0.0.weight, stages.0.0.dwconv.weight, norm.weight, head.weight"

_HEAD = "head"
_LACKS = frozenset(
    {
        Feature.GRN_AND_SCALE,
        Feature.OVERLAP,
        Feature.BARE_STEM,
        Feature.ISOTROPIC_GRN,
        Feature.DOWNSAMPLE_FIRST,
        Feature.NORM_FIRST,
        Feature.MLP_HEAD,
    }
)
# (1, 1, 1, 4C) before the canonical (4C,).
_GRN_ONES = (3, 0)


def _blocks(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Return the rules of a block's tensors and of the head, alike in all three networks."""
    return (
        Rule(f"{theirs}.dwconv.{{p}}", f"{ours}.depthwise.{{p}}"),
        Rule(f"{theirs}.norm.{{p}}", f"{ours}.norm.{{p}}"),
        Rule(f"{theirs}.pwconv1.{{p}}", f"{ours}.pw1.{{p}}"),
        Rule(f"{theirs}.grn.gamma", f"{ours}.grn.weight", _GRN_ONES),
        Rule(f"{theirs}.grn.beta", f"{ours}.grn.bias", _GRN_ONES),
        Rule(f"{theirs}.pwconv2.{{p}}", f"{ours}.pw2.{{p}}"),
        Rule(f"{theirs}.gamma", f"{ours}.scale.weight"),
        Rule("norm.{p}", "head.norm.{p}"),
        Rule("head.{p}", "head.fc.{p}"),
    )


_STAGED = (
    Rule("downsample_layers.0.0.{p}", "stem.conv.{p}"),
    Rule("downsample_layers.0.1.{p}", "stem.norm.{p}"),
    Rule("downsample_layers.{i}.0.{p}", "stages.{i}.downsample.norm.{p}"),
    Rule("downsample_layers.{i}.1.{p}", "stages.{i}.downsample.conv.{p}"),
    *_blocks("stages.{i}.{j}", "stages.{i}.blocks.{j}"),
)
_ISOTROPIC = (
    Rule("stem.{p}", "stem.conv.{p}"),
    *_blocks("blocks.{j}", "stages.0.blocks.{j}"),
)


def matches(names: Collection[str]) -> bool:
    """Tell whether these tensor names are of this dialect."""
    staged = "downsample_layers.0.0.weight" in names
    pretraining = "encoder.downsample_layers.0.0.weight" in names and "mask_token" in names
    return staged or pretraining or _isotropic(names)


def traits(names: Collection[str]) -> frozenset[str]:  # noqa: ARG001 - the interface's
    """Return what the names alone tell: nothing, for the canonical tensors tell it all."""
    return frozenset()


def refusal(tensors: Mapping[str, Tensor]) -> str | None:
    """Return what keeps these tensors from being read, by its name with the reason; or None."""
    for name in tensors:
        if name == "mask_token" or name.startswith("decoder.") or name.endswith(".dwconv.kernel"):
            return (
                f"FCMAE pretraining ({name}): a masked autoencoder has a decoder or sparse "
                "convolutions and no classifier"
            )
    return _rules.refusal(tensors, _rules_of(tensors), head=_HEAD)


def canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under canonical names; GRN's of shape (4C,)."""
    return _rules.canonical(tensors, _rules_of(tensors), head=_HEAD)


def original(tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Return canonical tensors under this dialect's names and in its shapes.

    Raises:
        CheckpointError: The dialect cannot express a feature of the architecture.
    """
    _rules.require(architecture, NAME, lacks=_LACKS)
    return _rules.original(tensors, _STAGED if architecture.stem_norm else _ISOTROPIC)


def norm_eps(canonical: Mapping[str, Tensor]) -> tuple[float, float | None]:  # noqa: ARG001
    """Return the eps of all LayerNorms, and None: the head's is the same."""
    return 1e-6, None


def _isotropic(names: Collection[str]) -> bool:
    return "stem.weight" in names and "blocks.0.dwconv.weight" in names


def _rules_of(names: Collection[str]) -> tuple[Rule, ...]:
    return _ISOTROPIC if _isotropic(names) else _STAGED
