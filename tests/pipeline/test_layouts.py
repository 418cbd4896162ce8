"""What a folder's layouts were chosen for is looked at before they are taken again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.exports import Exports
from pipeline.layouts import kept_layouts, network_key
from pipeline.recipe import Recipe
from pipeline.records import Architecture, Layout, to_json
from pipeline.store import installed_versions
from targets.base import runtimes

NET = Architecture(depths=(1,), dims=(8,), classes=2)
SHAPE = (1, 3, 32, 32)
ONNX = runtimes()["onnx"].capabilities


def chosen(exports: Exports) -> Layout:
    (target,) = exports.targets
    return replace(
        exports.default_layout(target, "0.50 of the best float one's cpu time"),
        source="measured",
        device="local",
        threads=1,
        input_size=32,
        network=network_key(NET, SHAPE, ()),
        versions=installed_versions(ONNX.distributions),
        placement="all",
        graph_form=ONNX.graph_forms[1],
    )


def kept(tmp_path: Path, layout: Layout, exports: Exports, network: str) -> Layout:
    (tmp_path / "layouts.json").write_bytes(to_json({"onnx": layout}))
    taken, stays = kept_layouts(exports, tmp_path / "layouts.json", 1, network)
    assert stays == {"onnx": layout}  # it may be for that again
    return taken["onnx"]


@pytest.fixture
def exports() -> Exports:
    return Exports(Recipe(runtimes=("onnx",)))


def test_a_choice_is_kept_for_what_it_was_made_for(exports: Exports, tmp_path: Path) -> None:
    layout = chosen(exports)
    assert kept(tmp_path, layout, exports, network_key(NET, SHAPE, ())) == layout


@pytest.mark.parametrize(
    "other",
    [
        network_key(NET, (1, 3, 64, 64), ()),
        network_key(NET, (2, 3, 32, 32), ()),
        network_key(replace(NET, dims=(16,)), SHAPE, ()),
        network_key(NET, SHAPE, ("stages.0.blocks.0.fc1",)),
    ],
)
def test_another_network_or_input_takes_the_default(
    other: str, exports: Exports, tmp_path: Path
) -> None:
    found = kept(tmp_path, chosen(exports), exports, other)
    assert (found.source, found.graph_form) == ("default", ONNX.graph_forms[0])
    assert "chosen for another network or input, of 32 pixels" in found.reason
    assert "convnext-edge tune RUN_DIR" in found.reason


def test_another_version_of_the_runtime_takes_the_default(exports: Exports, tmp_path: Path) -> None:
    layout = chosen(exports)
    older = replace(layout, versions={**(layout.versions or {}), "onnxruntime": "0.1"})
    found = kept(tmp_path, older, exports, network_key(NET, SHAPE, ()))
    assert found.source == "default"
    assert found.reason.startswith("chosen with onnxruntime 0.1, and here is onnxruntime ")


def test_a_choice_of_an_earlier_version_says_too_little(exports: Exports, tmp_path: Path) -> None:
    older = replace(chosen(exports), network=None)
    found = kept(tmp_path, older, exports, network_key(NET, SHAPE, ()))
    assert found.source == "default"
    assert found.reason.startswith("chosen by an earlier version")
