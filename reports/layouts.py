"""What to say of the graph forms and placements that the runtimes' artifacts have.

In: a report's `Layout`s. Out: a sentence for each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.records import FLOATING

if TYPE_CHECKING:
    from pipeline.records import Candidate, Export, Layout
    from reports.document import ArtifactRow


TUNE_OFF, ONE_CANDIDATE = "--tune off", "there is nothing to choose from"
"""Reasons for a default that nobody needs to be told."""


def sentence(layout: Layout) -> str:
    """Say what a runtime takes and why."""
    form = f"form {layout.graph_form}"
    if layout.source == "default":
        where = f"placement {layout.placement}, " if layout.placement else ""
        return f"{layout.runtime}: {where}{form}, its default ({layout.reason})"
    where = f"measured on {layout.device}, {layout.isa}"
    if layout.placement is None:
        return f"{layout.runtime}: {layout.scheme} is shipped, {form} ({layout.reason}; {where})"
    return f"{layout.runtime}: placement {placed(layout)}, {form} ({layout.reason}; {where})"


def placed(of: Export | Candidate | ArtifactRow | Layout) -> str:
    """Name a placement, with the stages whose blocks it leaves in float."""
    if not of.float_stages:
        return of.placement or ""
    word = "stage" if len(of.float_stages) == 1 else "stages"
    return f"{of.placement}, {word} {', '.join(map(str, of.float_stages))} in float"


def ships_float(layout: Layout) -> bool:
    """Return whether integers were measured and float alone is shipped."""
    return layout.scheme == "float" and without_integers(layout)


def without_integers(layout: Layout) -> bool:
    """Return whether integers were measured and float or float16 is shipped instead."""
    measured = (one for one in layout.candidates if one.outcome == "measured")
    return layout.scheme in FLOATING and any(one.scheme not in FLOATING for one in measured)
