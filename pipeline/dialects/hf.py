"""The names of Hugging Face transformers: ConvNextForImageClassification and its V2.

In: tensors as transformers saves either. Out: canonical ones; and back.

Source: transformers/models/convnext/modeling_convnext.py and models/convnextv2. LayerNorm's eps is
1e-6 but for the head's, which is the configuration's `layer_norm_eps`, 1e-12 where nothing else is
stated. V2 has GRN, of shape (1, 1, 1, 4C), where V1 has LayerScale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.dialects import _rules
from pipeline.dialects._rules import Feature, Rule

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

    from pipeline.records import Architecture

NAME = "hf"
EXPECTED = "convnext.embeddings.patch_embeddings.weight, classifier.weight (or convnextv2.)"

_HEAD = "classifier"
_LACKS = frozenset(
    {
        Feature.GRN_AND_SCALE,
        Feature.OVERLAP,
        Feature.ISOTROPIC,
        Feature.DOWNSAMPLE_FIRST,
        Feature.NORM_FIRST,
        Feature.MLP_HEAD,
    }
)
_PREFIXES = ("convnext.", "convnextv2.", "")


def _rules_behind(prefix: str) -> tuple[Rule, ...]:
    """Return the table of V1, of V2, or of a model saved without its classifier."""
    stage, ours = f"{prefix}encoder.stages.{{i}}", "stages.{i}"
    layer, block = f"{stage}.layers.{{j}}", f"{ours}.blocks.{{j}}"
    return (
        Rule(f"{prefix}embeddings.patch_embeddings.{{p}}", "stem.conv.{p}"),
        Rule(f"{prefix}embeddings.layernorm.{{p}}", "stem.norm.{p}"),
        Rule(f"{stage}.downsampling_layer.0.{{p}}", f"{ours}.downsample.norm.{{p}}"),
        Rule(f"{stage}.downsampling_layer.1.{{p}}", f"{ours}.downsample.conv.{{p}}"),
        Rule(f"{layer}.dwconv.{{p}}", f"{block}.depthwise.{{p}}"),
        Rule(f"{layer}.layernorm.{{p}}", f"{block}.norm.{{p}}"),
        Rule(f"{layer}.pwconv1.{{p}}", f"{block}.pw1.{{p}}"),
        Rule(f"{layer}.grn.{{p}}", f"{block}.grn.{{p}}", (3, 0)),
        Rule(f"{layer}.pwconv2.{{p}}", f"{block}.pw2.{{p}}"),
        Rule(f"{layer}.layer_scale_parameter", f"{block}.scale.weight"),
        Rule(f"{prefix}layernorm.{{p}}", "head.norm.{p}"),
        Rule("classifier.{p}", "head.fc.{p}"),
    )


def matches(names: Collection[str]) -> bool:
    """Tell whether these tensor names are of this dialect."""
    return any(
        f"{prefix}embeddings.patch_embeddings.weight" in names
        and f"{prefix}encoder.stages.0.layers.0.dwconv.weight" in names
        for prefix in _PREFIXES
    )


def traits(names: Collection[str]) -> frozenset[str]:  # noqa: ARG001 - the interface's
    """Return what the names alone tell: nothing, for the canonical tensors tell it all."""
    return frozenset()


def refusal(tensors: Mapping[str, Tensor]) -> str | None:
    """Return what keeps these tensors from being read, by its name with the reason; or None."""
    if any("hidden_states_norms." in name for name in tensors):
        return "ConvNextBackbone (hidden_states_norms): it gives feature maps and has no classifier"
    if not _prefix(tensors) and not any(name.startswith(f"{_HEAD}.") for name in tensors):
        return "ConvNextModel, saved alone: it gives features and has no classifier"
    return _rules.refusal(tensors, _rules_behind(_prefix(tensors)), head=_HEAD)


def canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under canonical names; GRN's of shape (4C,)."""
    return _rules.canonical(tensors, _rules_behind(_prefix(tensors)), head=_HEAD)


def original(tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Return canonical tensors under this dialect's names and in its shapes.

    Raises:
        CheckpointError: The dialect cannot express a feature of the architecture.
    """
    _rules.require(architecture, NAME, lacks=_LACKS)
    prefix = "convnextv2." if architecture.grn else "convnext."
    return _rules.original(tensors, _rules_behind(prefix))


def norm_eps(canonical: Mapping[str, Tensor]) -> tuple[float, float | None]:  # noqa: ARG001
    """Return the eps of all LayerNorms, and the head's as transformers' configuration has it."""
    return 1e-6, 1e-12


def _prefix(names: Collection[str]) -> str:
    found = (p for p in _PREFIXES if f"{p}embeddings.patch_embeddings.weight" in names)
    return next(found, "")
