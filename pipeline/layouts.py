"""The layouts that a run chose, kept in its folder for what measures its artifacts again.

In: a run folder's layouts.json and what a recipe exports. Out: a `Layout` for every runtime.
`pipeline.autotune` chooses them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import ArtifactError
from pipeline.records import Layout
from targets import base

if TYPE_CHECKING:
    from pathlib import Path

    from pipeline.exports import Exports
    from pipeline.recipe import Recipe

LAYOUTS = "layouts.json"


def kept_layouts(exports: Exports, file: Path) -> dict[str, Layout]:
    """Return what was chosen before; a runtime of which nothing fits takes its default.

    Args:
        exports: What a recipe exports.
        file: Of the run folder.

    Raises:
        ArtifactError: The file is damaged, or names what a runtime does not have.
    """
    found, kept = read_layouts(file), dict[str, Layout]()
    why = "not chosen by measurement: run `convnext-edge tune RUN_DIR`"
    for target in exports.targets:
        default = exports.default_layout(target, why)
        before = found.get(target.name, default)
        kept[target.name] = before if _fits(before, default, exports.recipe) else default
    return kept


def read_layouts(file: Path) -> dict[str, Layout]:
    """Read what an earlier run chose; nothing where none did.

    Raises:
        ArtifactError: The file is damaged, or names what a runtime does not have.
    """
    if not file.exists():
        return {}
    why = None
    try:
        found = TypeAdapter(dict[str, Layout]).validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        found, why = {}, type(error).__name__
    for name, layout in found.items():
        if layout.runtime != name or not _has(base.runtime(name).capabilities, layout):
            why = f"{name} has no such form or placement"
    if why is not None:
        raise ArtifactError(
            f"{file} tells no layouts ({why})",
            allowed="what `convnext-edge run` or `tune` of this version wrote",
            do="Run `convnext-edge tune` on the folder, or remove the file to take the defaults",
        )
    return found


def _has(can: base.Capabilities, layout: Layout) -> bool:
    """Return whether a runtime can lay a model out so."""
    forms = {layout.graph_form, layout.float_form}
    placed = layout.placement in {None, *can.placements_in(layout.graph_form)}
    return placed and forms <= set(can.graph_forms)


def _fits(layout: Layout, default: Layout, recipe: Recipe) -> bool:
    """Return whether a layout is of the artifacts that a recipe asks for."""
    placed = recipe.placement is None or layout.placement in {None, default.placement}
    return placed and layout.isa == default.isa and layout.asked == recipe.scheme
