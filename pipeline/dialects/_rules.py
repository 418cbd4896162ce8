"""One table per dialect gives the names in both directions; what the dialects share stands here.

In: a table of rules, tensors by name, an `Architecture`. Out: the tensors under the other names, in
the other shapes; what keeps a file from being read; what a dialect cannot express.

A rule holds the dialect's name of a tensor and the canonical one, with fields in braces: `{i}` the
stage, `{even}` 2i, `{odd}` 2i + 1, `{j}` the block, `{p}` weight or bias.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING

from pipeline.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from torch import Tensor

    from pipeline.records import Architecture

_FIELDS = {
    "i": "[0-9]{1,4}",
    "even": "[0-9]{0,3}[02468]",
    "odd": "[0-9]{0,3}[13579]",
    "j": "[0-9]{1,4}",
    "p": "weight|bias",
}


@dataclass(frozen=True, slots=True)
class Rule:
    """One tensor's two names.

    Attributes:
        theirs: The dialect's name.
        ours: The canonical name.
        ones: How many axes of length 1 the dialect's tensor has before and behind the canonical
            one's.
    """

    theirs: str
    ours: str
    ones: tuple[int, int] = (0, 0)


class Feature(StrEnum):
    """What sets networks apart and a dialect may be unable to express, in words."""

    GRN = "GRN"
    GRN_AND_SCALE = "GRN together with LayerScale"
    NO_SCALE = "blocks without LayerScale"
    OVERLAP = "an overlapping stem"
    ISOTROPIC = "a stem without LayerNorm"
    BARE_STEM = "several stages behind a stem without LayerNorm"
    ISOTROPIC_GRN = "GRN behind a stem without LayerNorm"
    DOWNSAMPLE_FIRST = "a downsample in the first stage"
    NORM_FIRST = "a head that normalises before it pools"
    MLP_HEAD = "a head of two layers"
    NORM_FIRST_MLP = "a head of two layers that normalises before it pools"


def features(net: Architecture) -> frozenset[Feature]:
    """Return what of `Feature` a network has."""
    present = {
        Feature.GRN: net.grn,
        Feature.GRN_AND_SCALE: net.grn and net.layer_scale,
        Feature.NO_SCALE: not net.layer_scale,
        Feature.OVERLAP: net.stem != "patch",
        Feature.ISOTROPIC: not net.stem_norm,
        Feature.BARE_STEM: not net.stem_norm and len(net.depths) > 1,
        Feature.ISOTROPIC_GRN: not net.stem_norm and net.grn,
        Feature.DOWNSAMPLE_FIRST: net.downsample_first,
        Feature.NORM_FIRST: net.head_norm_first,
        Feature.MLP_HEAD: net.head_width is not None,
        Feature.NORM_FIRST_MLP: net.head_norm_first and net.head_width is not None,
    }
    return frozenset(feature for feature, has in present.items() if has)


def require(net: Architecture, dialect: str, *, lacks: Collection[Feature]) -> None:
    """Check that a dialect can express a network.

    Args:
        net: The network.
        dialect: The dialect's name.
        lacks: What it cannot express.

    Raises:
        CheckpointError: The network has such a feature.
    """
    if beyond := sorted(features(net) & frozenset(lacks)):
        raise CheckpointError(
            f"the {dialect} dialect cannot express {', '.join(beyond)}",
            allowed=f"networks with none of: {', '.join(sorted(lacks))}",
            do="Choose another dialect; own takes every network",
        )


def canonical(
    tensors: Mapping[str, Tensor], rules: Iterable[Rule], *, head: str
) -> dict[str, Tensor]:
    """Return tensors under their canonical names, in their canonical shapes.

    Args:
        tensors: By the dialect's names, of any shape and dtype.
        rules: The dialect's table; the first rule that knows a name gives the other.
        head: What the names of the classifier begin with. One linear layer below it is the
            classifier, however it is wrapped.

    Returns:
        The same values. A name that no rule knows stays; a tensor without the axes that its rule
        expects keeps its shape. Of two tensors for one name the last stays: `refusal` tells.
    """
    rules = tuple(rules)
    layers = linears(tensors, rules, head=head)
    if len(layers) == 1:
        rules = (Rule(layers[0] + ".{p}", "head.fc.{p}"), *rules)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        renamed, rule = _first(name, ((rule, rule.theirs, rule.ours) for rule in rules))
        found[renamed] = tensor if rule is None else _without_ones(tensor, *rule.ones)
    return found


def original(tensors: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, Tensor]:
    """Return canonical tensors under a dialect's names, in its shapes; the same values."""
    rules = tuple(rules)
    found = {}
    for name, tensor in tensors.items():
        renamed, rule = _first(name, ((rule, rule.ours, rule.theirs) for rule in rules))
        before, behind = (0, 0) if rule is None else rule.ones
        found[renamed] = tensor.reshape((1,) * before + tuple(tensor.shape) + (1,) * behind)
    return found


def linears(tensors: Mapping[str, Tensor], rules: Iterable[Rule], *, head: str) -> list[str]:
    """Return the names, without `.weight`, of the linear layers below `head`.

    A hidden layer that the dialect itself has a name for is not among them.
    """
    rules = tuple(rules)
    below = re.compile(rf"({re.escape(head)}(?:\.\w+)*)\.weight", re.ASCII)
    found = []
    for name, tensor in tensors.items():
        match = below.fullmatch(name)
        if match is None or tensor.ndim < 2:  # noqa: PLR2004 - a norm's weight has one axis
            continue
        renamed, _ = _first(name, ((rule, rule.theirs, rule.ours) for rule in rules))
        if renamed != "head.hidden.weight":
            found.append(match[1])
    return found


def refusal(tensors: Mapping[str, Tensor], rules: Iterable[Rule], *, head: str) -> str | None:
    """Return what keeps these tensors from being read, by its name with the reason; or None.

    A tensor that is merely missing is no reason here: the check against the network names it.
    """
    rules = tuple(rules)
    layers = linears(tensors, rules, head=head)
    if len(layers) > 1:
        return (
            f"a head of {len(layers)} linear layers ({', '.join(layers[:3])}): "
            "the activation between them cannot be read off tensors"
        )
    names = canonical(tensors, rules, head=head).keys()
    if twice := len(tensors) - len(names):
        return f"{twice} tensors too many: two names stand for one place in the network"
    ends = {name.split(".blocks.")[-1].partition(".")[2] for name in names if ".blocks." in name}
    if "norm.weight" in ends and "norm.bias" not in ends:
        return (
            "RMSNorm: its norms have a weight and no bias, and only LayerNorm, with both, is read"
        )
    if "depthwise.weight" in ends and "depthwise.bias" not in ends:
        return "convolutions without bias (timm's conv_bias=False): a ConvNeXt's have one"
    if not any(name.startswith("head.fc.") for name in names):
        return f"backbone only: there is no classifier ({head}), so there is no class to predict"
    return None


def _first(name: str, sides: Iterable[tuple[Rule, str, str]]) -> tuple[str, Rule | None]:
    for rule, source, target in sides:
        if match := _pattern(source).fullmatch(name):
            return target.format_map(_values(match)), rule
    return name, None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)  # text and fields by turns
    texts, fields = map(re.escape, parts[::2]), [*parts[1::2], ""]
    return re.compile(
        "".join(
            text + (f"(?P<{field}>{_FIELDS[field]})" if field else "")
            for text, field in zip(texts, fields, strict=True)
        )
    )


def _values(match: re.Match[str]) -> dict[str, str]:
    values = match.groupdict()
    for field in values.keys() & {"i", "even", "odd"}:
        stage = int(values[field]) // (1 if field == "i" else 2)
        return values | {"i": str(stage), "even": str(2 * stage), "odd": str(2 * stage + 1)}
    return values


def _without_ones(tensor: Tensor, before: int, behind: int) -> Tensor:
    shape = tuple(tensor.shape)
    inner = shape[before : len(shape) - behind]
    if not inner or shape != (1,) * before + inner + (1,) * behind:
        return tensor
    return tensor.reshape(inner)
