"""timm's 28 entry points: every one is read, or refused because its norms are RMSNorm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.convnext import SIZES, empty
from pipeline.dialects import timm
from pipeline.records import Architecture


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def timm_file(
    depths: tuple[int, ...],
    dims: tuple[int, ...],
    *,
    stem: str = "patch",
    mid: int | None = None,
    conv_mlp: bool = False,
    grn: bool = False,
    rms: bool = False,
    hnf: bool = False,
    hidden: int | None = None,
    patch: int = 4,
    conv_bias: bool = True,
) -> dict[str, Tensor]:
    """Return names and shapes as timm/models/convnext.py makes them, without values."""
    found: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *shape: int, bias: bool = True) -> None:
        found[f"{name}.weight"] = shape
        if bias:
            found[f"{name}.bias"] = shape[:1]

    if stem == "patch":
        layer("stem.0", dims[0], 3, patch, patch, bias=conv_bias)
        layer("stem.1", dims[0], bias=not rms)
    else:
        second = 2 if stem == "overlap_act" else 1
        layer("stem.0", mid or dims[0], 3, 3, 3, bias=conv_bias)
        layer(f"stem.{second}", dims[0], mid or dims[0], 3, 3, bias=conv_bias)
        layer(f"stem.{second + 1}", dims[0], bias=not rms)
    for i, (depth, c) in enumerate(zip(depths, dims, strict=True)):
        if i or patch == 2:
            before = dims[max(i - 1, 0)]
            layer(f"stages.{i}.downsample.0", before, bias=not rms)
            layer(f"stages.{i}.downsample.1", c, before, 2, 2, bias=conv_bias)
        for j in range(depth):
            block, ones = f"stages.{i}.blocks.{j}", (1, 1) if conv_mlp else ()
            layer(f"{block}.conv_dw", c, 1, 7, 7, bias=conv_bias)
            layer(f"{block}.norm", c, bias=not rms)
            layer(f"{block}.mlp.fc1", 4 * c, c, *ones)
            layer(f"{block}.mlp.fc2", c, 4 * c, *ones)
            if grn:
                layer(f"{block}.mlp.grn", 4 * c)
            else:
                found[f"{block}.gamma"] = (c,)
    layer("norm_pre" if hnf else "head.norm", dims[-1], bias=not rms)
    if hidden:
        layer("head.pre_logits.fc", hidden, dims[-1])
    layer("head.fc", 1000, hidden or dims[-1])
    return {name: torch.empty(shape, device="meta") for name, shape in found.items()}


CONV: dict[str, Any] = {"conv_mlp": True}
TIERED: dict[str, Any] = {**CONV, "stem": "overlap"}
# Each with its parameters in millions, rounded as in timm's results tables.
ENTRIES: dict[str, tuple[float, dict[str, Any]]] = {
    "convnext_zepto_rms": (2.16, {**CONV, "rms": True}),
    "convnext_zepto_rms_ols": (2.16, {**CONV, "rms": True, "stem": "overlap_act"}),
    "convnext_atto": (3.70, CONV),
    "convnext_atto_ols": (3.70, {**TIERED, "mid": 24}),
    "convnext_atto_rms": (3.69, {**CONV, "rms": True}),
    "convnext_femto": (5.22, CONV),
    "convnext_femto_ols": (5.23, {**TIERED, "mid": 24}),
    "convnext_pico": (9.05, CONV),
    "convnext_pico_ols": (9.06, {**TIERED, "mid": 32}),
    "convnext_nano": (15.59, CONV),
    "convnext_nano_ols": (15.65, {**TIERED, "mid": 80}),
    "convnext_tiny_hnf": (28.59, {**CONV, "hnf": True}),
    "convnext_tiny": (28.59, {}),
    "convnext_small": (50.22, {}),
    "convnext_base": (88.59, {}),
    "convnext_large": (197.77, {}),
    "convnext_large_mlp": (200.13, {"hidden": 1536}),
    "convnext_xlarge": (350.20, {}),
    "convnext_xxlarge": (846.47, {}),
    "convnextv2_atto": (3.71, {**CONV, "grn": True}),
    "convnextv2_femto": (5.23, {**CONV, "grn": True}),
    "convnextv2_pico": (9.07, {**CONV, "grn": True}),
    "convnextv2_nano": (15.62, {**CONV, "grn": True}),
    "convnextv2_tiny": (28.64, {"grn": True}),
    "convnextv2_small": (50.32, {"grn": True}),
    "convnextv2_base": (88.72, {"grn": True}),
    "convnextv2_large": (197.96, {"grn": True}),
    "convnextv2_huge": (660.29, {"grn": True}),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_timm_entry_points(entry: str) -> None:
    millions, options = ENTRIES[entry]
    depths, dims = SIZES[entry.split("_")[1]]
    theirs = timm_file(depths, dims, **options)
    assert round(sum(tensor.numel() for tensor in theirs.values()) / 1e6, 2) == millions
    assert timm.matches(theirs)
    refusal = timm.refusal(theirs)
    if options.get("rms"):
        assert refusal is not None
        assert refusal.startswith("RMSNorm: ")
        return
    assert refusal is None
    tensors = timm.canonical(theirs)
    net = Architecture(
        depths=depths,
        dims=dims,
        classes=1000,
        layer_scale="grn" not in options,
        grn="grn" in options,
        stem=options.get("stem", "patch"),
        stem_width=options.get("mid"),
        head_norm_first="head_norm_first" in timm.traits(theirs),
        head_width=options.get("hidden"),
    )
    assert net.head_norm_first == ("hnf" in options)
    assert shapes(tensors) == shapes(empty(net).state_dict())
    assert shapes(timm.original(tensors, net)) == shapes(theirs)
    assert timm.norm_eps(tensors) == (1e-5 if entry == "convnext_xxlarge" else 1e-6, None)


def test_timm_stems() -> None:
    for stem in ("overlap", "overlap_act"):
        theirs = timm_file((1, 1), (4, 6), stem=stem, mid=3)
        assert timm.traits(theirs) == ({"overlap_act"} if stem == "overlap_act" else set())
        found = shapes(timm.canonical(theirs))
        assert found["stem.conv.weight"] == (3, 3, 3, 3)
        assert found["stem.conv2.weight"] == (4, 3, 3, 3)
        assert found["stem.norm.weight"] == (4,)
    halved = shapes(timm.canonical(timm_file((1, 1), (4, 6), patch=2)))
    assert halved["stages.0.downsample.norm.weight"] == (4,)
    assert halved["stages.0.downsample.conv.weight"] == (4, 4, 2, 2)


def test_layers_without_a_bias_are_refused_by_name() -> None:
    unbiased = timm.refusal(timm_file((1, 1), (4, 6), conv_bias=False))
    assert str(unbiased).startswith("convolutions without bias (timm's conv_bias=False): ")
    rms = timm.refusal(timm_file((1, 1), (4, 6), rms=True))
    assert str(rms).startswith("RMSNorm: ")
    damaged = timm_file((1, 1), (4, 6))  # one bias is missing: the check of the network names it
    del damaged["stages.0.blocks.0.norm.bias"], damaged["stages.1.blocks.0.conv_dw.bias"]
    assert timm.refusal(damaged) is None


def test_a_patch_behind_which_timm_dilates_is_refused() -> None:
    tensors = {
        "stem.0.weight": torch.ones(4, 3, 8, 8),
        "stages.0.blocks.0.conv_dw.weight": torch.ones(4),
    }
    reason = timm.refusal(tensors)
    assert reason is not None
    assert "patch 8" in reason
    assert "dilates" in reason
