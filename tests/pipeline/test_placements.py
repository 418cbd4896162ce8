"""Placements: each contains the one before it, and layers are checked by name."""

from __future__ import annotations

import itertools

import pytest

from pipeline.convnext import empty, layers
from pipeline.errors import UsageError
from pipeline.placements import PLACEMENTS, check_layers, widest
from pipeline.records import Architecture

NET = Architecture(depths=(1,), dims=(8,), classes=2)
NAMES = [name for name, _, _ in layers(empty(NET))]


def test_each_contains_those_before_it() -> None:
    for narrow, wide in itertools.pairwise(PLACEMENTS.values()):
        assert narrow.layers <= wide.layers
        assert narrow.outputs <= wide.outputs
    assert widest(["pointwise", "all", "pointwise-io"]) == "all"


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
