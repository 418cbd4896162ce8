"""The layouts that a run chose, kept in its folder for what measures its artifacts again.

In: a run folder's layouts.json and what a recipe exports. Out: a `Layout` for every runtime.
`pipeline.autotune` chooses them.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import ArtifactError, printable
from pipeline.records import FLOATING, Layout
from pipeline.store import installed_versions, sha256_json
from reports.layouts import TUNE_OFF
from targets import base

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pipeline.exports import Exports
    from pipeline.recipe import Recipe
    from pipeline.records import Architecture

LAYOUTS = "layouts.json"


def network_key(
    architecture: Architecture, image_shape: Sequence[int], float_layers: Sequence[str]
) -> str:
    """Return the sha256 of what decides, beside the weights, how long a network takes.

    Args:
        architecture: Of the network.
        image_shape: NCHW of one input.
        float_layers: Layers that stay float in every placement.
    """
    return sha256_json([asdict(architecture), list(image_shape), list(float_layers)])


def kept_layouts(
    exports: Exports, file: Path, stages: int, network: str
) -> tuple[dict[str, Layout], dict[str, Layout]]:
    """Return what was chosen before; a runtime of which nothing fits takes its default.

    Args:
        exports: What a recipe exports.
        file: Of the run folder.
        stages: Of the network.
        network: Its `network_key`.

    Returns:
        What is exported, and what is kept for a later run: a choice that was made for something
        else may be for that again.

    Raises:
        ArtifactError: The file is damaged, or names what a runtime or the network does not have.
    """
    found, taken, kept = read_layouts(file, stages), dict[str, Layout](), dict[str, Layout]()
    why = "not chosen by measurement: run `convnext-edge tune RUN_DIR`"
    if exports.recipe.tune == "off":
        why = TUNE_OFF
    for target in exports.targets:
        default = exports.default_layout(target, why)
        before = found.get(target.name, default)
        if not _fits(before, default, exports.recipe):
            before = default
        taken[target.name] = kept[target.name] = before
        if (other := _chosen_for_another(before, target, network)) is not None:
            why = f"{other}: run `convnext-edge tune RUN_DIR`"
            taken[target.name] = replace(default, reason=why)
    return taken, kept


def read_layouts(file: Path, stages: int) -> dict[str, Layout]:
    """Read what an earlier run chose; nothing where none did.

    Args:
        file: Of the run folder.
        stages: Of the network.

    Raises:
        ArtifactError: The file is damaged, or names what a runtime or the network does not have.
    """
    if not file.exists():
        return {}
    why = None
    try:
        found = TypeAdapter(dict[str, Layout]).validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        found, why = {}, type(error).__name__
    known = base.runtimes()
    for name, layout in found.items():
        if name not in known:
            why = f"there is no runtime {printable(name)}"
        elif layout.runtime != name or not _has(known[name].capabilities, layout, stages):
            why = f"{name} or its network has no such form, placement, scheme or stage"
    if why is not None:
        raise ArtifactError(
            f"{file} tells no layouts ({why})",
            allowed="what `convnext-edge run` or `tune` of this version wrote",
            do="Run `convnext-edge tune` on the folder, or remove the file to take the defaults",
        )
    return found


def _has(can: base.Capabilities, layout: Layout, stages: int) -> bool:
    """Return whether a runtime can lay a model out so."""
    forms = {layout.graph_form, layout.float_form}
    floats = layout.scheme in FLOATING
    placed = [None] if floats else can.placements_in(layout.graph_form)
    return (
        forms <= set(can.graph_forms)
        and layout.placement in placed
        and layout.scheme in can.schemes
        and layout.scheme in {*FLOATING, layout.asked}
        and set(layout.float_stages) <= set(() if floats else range(stages))
    )


def _fits(layout: Layout, default: Layout, recipe: Recipe) -> bool:
    """Return whether a layout is of the artifacts that a recipe asks for."""
    placed = recipe.placement is None or layout.placement in {None, default.placement}
    return placed and layout.isa == default.isa and layout.asked == recipe.scheme


def _chosen_for_another(layout: Layout, target: base.Runtime, network: str) -> str | None:
    """Say what a measured layout was chosen for, where that is not what is exported now."""
    if layout.source != "measured":
        return None
    if layout.network is None:
        return "chosen by an earlier version, which does not say for what network"
    if layout.network != network:
        return f"chosen for another network or input, of {layout.input_size} pixels"
    was, now = layout.versions or {}, installed_versions(target.capabilities.distributions)
    if was == now:
        return None
    other = next(name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name))
    had, has = (f"{other} {known[other]}" if other in known else "none" for known in (was, now))
    return f"chosen with {had}, and here is {has}"
