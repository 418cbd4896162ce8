"""torchvision's names: numbered features, and a classifier of norm, flatten and linear.

In: tensors as torchvision saves its ConvNeXt. Out: canonical ones; and back.

Source: torchvision/models/convnext.py. LayerNorm's eps is 1e-6 throughout, every block has
LayerScale, of shape (C, 1, 1), and the stages stand at odd places, their downsamples between them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.dialects import _rules
from pipeline.dialects._rules import Feature, Rule

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

    from pipeline.records import Architecture

NAME = "torchvision"
EXPECTED = "features.0.0.weight, features.1.0.block.0.weight, classifier.2.weight"

_HEAD = "classifier"
_LACKS = frozenset(
    {
        Feature.GRN,
        Feature.NO_SCALE,
        Feature.OVERLAP,
        Feature.ISOTROPIC,
        Feature.DOWNSAMPLE_FIRST,
        Feature.NORM_FIRST,
        Feature.MLP_HEAD,
    }
)
_RULES = (
    Rule("features.0.0.{p}", "stem.conv.{p}"),
    Rule("features.0.1.{p}", "stem.norm.{p}"),
    Rule("features.{even}.0.{p}", "stages.{i}.downsample.norm.{p}"),
    Rule("features.{even}.1.{p}", "stages.{i}.downsample.conv.{p}"),
    Rule("features.{odd}.{j}.block.0.{p}", "stages.{i}.blocks.{j}.depthwise.{p}"),
    Rule("features.{odd}.{j}.block.2.{p}", "stages.{i}.blocks.{j}.norm.{p}"),
    Rule("features.{odd}.{j}.block.3.{p}", "stages.{i}.blocks.{j}.pw1.{p}"),
    Rule("features.{odd}.{j}.block.5.{p}", "stages.{i}.blocks.{j}.pw2.{p}"),
    Rule("features.{odd}.{j}.layer_scale", "stages.{i}.blocks.{j}.scale.weight", (0, 2)),
    Rule("classifier.0.{p}", "head.norm.{p}"),
    Rule("classifier.2.{p}", "head.fc.{p}"),
)


def matches(names: Collection[str]) -> bool:
    """Tell whether these tensor names are of this dialect."""
    return "features.0.0.weight" in names and "features.1.0.block.0.weight" in names


def traits(names: Collection[str]) -> frozenset[str]:  # noqa: ARG001 - the interface's
    """Return what the names alone tell: nothing, for the canonical tensors tell it all."""
    return frozenset()


def refusal(tensors: Mapping[str, Tensor]) -> str | None:
    """Return what keeps these tensors from being read, by its name with the reason; or None."""
    return _rules.refusal(tensors, _RULES, head=_HEAD)


def canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under canonical names; LayerScale's of shape (C,)."""
    return _rules.canonical(tensors, _RULES, head=_HEAD)


def original(tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Return canonical tensors under this dialect's names and in its shapes.

    Raises:
        CheckpointError: The dialect cannot express a feature of the architecture.
    """
    _rules.require(architecture, NAME, lacks=_LACKS)
    return _rules.original(tensors, _RULES)


def norm_eps(canonical: Mapping[str, Tensor]) -> tuple[float, float | None]:  # noqa: ARG001
    """Return the eps of all LayerNorms, and None: the head's is the same."""
    return 1e-6, None
