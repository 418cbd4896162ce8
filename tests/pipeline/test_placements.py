"""Placements: the last contains the others, and layers are checked by name."""

from __future__ import annotations

import pytest

from pipeline.convnext import empty, layers
from pipeline.errors import UsageError
from pipeline.placements import PLACEMENTS, check_layers, widest
from pipeline.records import Architecture

NET = Architecture(depths=(1,), dims=(8,), classes=2)
NAMES = [name for name, _, _ in layers(empty(NET))]


def test_the_last_contains_the_others() -> None:
    last = list(PLACEMENTS.values())[-1]
    assert all(
        one.layers <= last.layers and one.outputs <= last.outputs for one in PLACEMENTS.values()
    )


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["pointwise"], "pointwise"),
        (["pointwise", "pointwise-io"], "pointwise-io"),
        (["pointwise", "dense"], "dense"),
        (["pointwise", "pointwise-downsample"], "pointwise-downsample"),
        (["pointwise-downsample", "pointwise-io"], "dense"),
        (["pointwise-depthwise", "pointwise-io"], "pointwise-depthwise"),
        (["pointwise-depthwise", "dense"], "all"),
        (["pointwise", "all", "pointwise-io"], "all"),
    ],
)
def test_widest_quantizes_every_site_of_the_others(names: list[str], expected: str) -> None:
    assert widest(names) == expected


def test_an_unknown_layer_is_answered_with_those_like_it() -> None:
    check_layers(["stages.0.blocks.0.pw1"], NET, "all")  # a known one passes
    with pytest.raises(UsageError, match=r"unknown layer: stages\.0\.blocks\.0\.pw3.*pw2"):
        check_layers(["stages.0.blocks.0.pw3"], NET, "all")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_something_must_be_left_to_quantize(placement: str) -> None:
    with pytest.raises(UsageError, match=f"every layer that placement {placement} has"):
        check_layers(NAMES, NET, placement)
    with pytest.raises(UsageError, match="--scheme float"):
        check_layers([name for name in NAMES if "pw" in name], NET, "pointwise")
