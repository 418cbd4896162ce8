"""What to say of a tuning: which layers stay float, what decided, and what that costs.

In: a report's `Tuning`. Out: sentences, rows, and the chart of its Pareto front.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reports.drawing import (
    CARD,
    HEAT,
    INK,
    LINE,
    MUTED,
    SMALL,
    drawing,
    new_figure,
    to_svg,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from pipeline.records import Assignment, Sensitivity, Tuning

WIDE, HEIGHT = 620.0, 260.0
NAMED = 6
"""Layers that a sentence names before it only counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One group of layers as the table has it.

    Attributes:
        found: What it loses alone.
        share: Of all MACs in integers.
        left: Whether it stays float; of a block, whether some of its layers do.
    """

    found: Sensitivity
    share: float
    left: bool


def chosen_of(tuning: Tuning) -> Assignment:
    """Return the assignment that was taken."""
    return tuning.front[tuning.chosen]


def rows(tuning: Tuning, kind: str) -> tuple[Row, ...]:
    """Return layers or blocks, those that lose most first.

    Args:
        tuning: Of the report.
        kind: `layer` or `block`.
    """
    total = sum(one.macs for one in tuning.sensitivities if one.kind == "layer")
    left = set(chosen_of(tuning).float_layers)
    found = [one for one in tuning.sensitivities if one.kind == kind]
    found.sort(key=lambda one: math.inf if one.sqnr_db is None else one.sqnr_db)
    return tuple(
        Row(found=one, share=one.macs / total, left=bool(left & set(one.layers))) for one in found
    )


def sentences(tuning: Tuning) -> tuple[str, ...]:
    """Say what stays float, what decided that, and which layer loses most."""
    chosen, all_layers = chosen_of(tuning), rows(tuning, "layer")
    count = len(chosen.float_layers)
    if count:
        named = ", ".join(chosen.float_layers[:NAMED])
        more = f" and {count - NAMED} more" if count > NAMED else ""
        verb = "stays" if count == 1 else "stay"
        first = f"{count} of {len(all_layers)} layers {verb} float for it: {named}{more}."
    else:
        first = f"All {len(all_layers)} layers that can do run in integers: the budget is kept so."
    said = [first]
    if chosen.accuracy is not None and chosen.accuracy.drop_ci95_pp is not None:
        tried = sum(point.accuracy is not None for point in tuning.front)
        said.append(
            f"On {chosen.accuracy.n:,} evaluation images the reference's drop reaches"
            f" {chosen.accuracy.drop_ci95_pp[1]:.2f} points at the upper end of its interval; the"
            f" budget is {tuning.max_drop_pp:g}. These images decided between {tried}"
            f" {'assignments' if tried > 1 else 'assignment'}, which the interval does not count."
        )
    if count:
        total = sum(tuning.cost.layers.values())
        said.append(
            f"That costs {quantity(chosen.cost, tuning.cost.unit)} of"
            f" {quantity(total, tuning.cost.unit)} ({tuning.cost.source})."
        )
    worst = all_layers[0].found
    if worst.sqnr_db is not None:
        said.append(
            f"The layer that loses most alone is {worst.name}: {worst.sqnr_db:.1f} dB,"
            f" on {tuning.images:,} calibration images."
        )
    return tuple(said)


def quantity(value: float, unit: str) -> str:
    """Write a cost with its unit."""
    if unit == "ms":
        return f"{value:.3g} ms"
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            # Of bytes a prefix is part of the word, of MACs a word of its own.
            return f"{value / factor:.3g} {prefix}{'B' if unit == 'bytes' else ' MACs'}"
    return f"{value:.3g} {unit}"


def draw_front(tuning: Tuning) -> str:
    """Draw the front: what an assignment costs against what it is predicted to leave.

    Returns:
        An SVG. Hollow marks are predictions, filled ones what was measured, the large one is what
        was taken.
    """
    total = sum(tuning.cost.layers.values())
    with drawing():
        figure = new_figure(HEIGHT, WIDE)
        axes = figure.add_axes((0.06, 0.14, 0.92, 0.76))
        axes.patch.set_visible(False)
        ends = [(100 * p.cost / total, p.predicted_sqnr_db) for p in tuning.front]
        xs = [x for x, y in ends if y is not None]
        ys = [y for _, y in ends if y is not None]
        axes.plot(xs, ys, color=HEAT, lw=1, alpha=0.45)
        _marks(axes, xs, ys, HEAT, CARD, 5)
        for point in tuning.front:
            if point.accuracy is not None and point.accuracy.sqnr_db is not None:
                taken = point == chosen_of(tuning)
                x, y = 100 * point.cost / total, point.accuracy.sqnr_db
                colour = INK if taken else HEAT
                _marks(axes, [x], [y], colour, colour, 10 if taken else 6)
        axes.grid(visible=True, color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=SMALL, labelcolor=MUTED)
        for side in axes.spines.values():
            side.set_visible(False)
        figure.text(0.0, 0.995, "SQNR, dB  (up is better)", color=MUTED, size=SMALL, va="top")
        text = f"cost in float, % of all {tuning.cost.unit}  (left is cheaper)"
        figure.text(0.98, 0.0, text, color=MUTED, size=SMALL, ha="right", va="bottom")
        return to_svg(figure, "front")


def _marks(
    axes: Axes, xs: Sequence[float], ys: Sequence[float], edge: str, face: str, size: float
) -> None:
    axes.plot(
        xs,
        ys,
        linestyle="none",
        marker="o",
        markersize=size,
        markeredgecolor=edge,
        markerfacecolor=face,
        markeredgewidth=1.2,
    )
