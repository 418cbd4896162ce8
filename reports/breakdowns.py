"""What to say of where an artifact's time goes.

In: `Breakdown`s. Out: sentences, rows, and a stacked bar for each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from matplotlib.patches import Rectangle

from pipeline.records import OpKind
from reports.drawing import (
    CARD,
    INK,
    LINE,
    SMALL,
    TEXT,
    drawing,
    new_figure,
    plain_axes,
    slot_colour,
    to_svg,
    write,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.records import Breakdown

KINDS: tuple[OpKind, ...] = get_args(OpKind)
WIDE, LABEL, ROOM, STEP = 620.0, 120.0, 70.0, 30.0
MOSTLY_PROFILER = 2.0
"""Times the time without it: from there on most of a profile is the profiler's own."""
LEGEND_COLUMNS, LEGEND_STEP = 5, 18.0


def total_ms(found: Breakdown) -> float:
    """Return the time of all operations together."""
    return sum((found.ms or {}).values())


def sentences(found: Breakdown) -> tuple[str, ...]:
    """Say how much the pointwise layers take, alone and within, and what the machine allows."""
    name = f"{name_of(found)} on {found.device}"
    if found.outcome != "measured" or not found.ms:
        return (f"{name}: {found.outcome.replace('_', ' ')}: {found.reason}",)
    total = total_ms(found)
    said = [f"{name}: {total:.3g} ms ({found.method})."]
    if is_mostly_profiler(found):
        # What is made of such times would contradict the latencies.
        said.append(
            f"Without the profiler it takes {found.unprofiled_ms:.3g} ms: the operations are too"
            " short for it, and most of what it tells is its own."
        )
        return tuple(said)
    if found.fallback_ops:
        said.append(
            f"{found.fallback_ops} of its operations fall back to kernels that are not the"
            f" runtime's fast ones: {found.fallback_ms or 0:.3g} ms."
        )
    if found.floor_ms:
        said.append(
            f"Its pointwise layers alone take {found.floor_ms:.3g} ms in this runtime: the whole is"
            f" {total / found.floor_ms:.2f} times that."
        )
    if found.bound_ms and found.macs_per_second and found.bytes_per_second:
        said.append(
            f"The roofline allows {found.bound_ms:.3g} ms: at {found.macs_per_second / 1e9:.3g}"
            " GMAC/s, the rate of the fastest stage of them, and"
            f" {found.bytes_per_second / 1e9:.3g} GB/s, at which memory is copied."
        )
    return tuple(said)


def is_mostly_profiler(found: Breakdown) -> bool:
    """Return whether most of the time is what the profiler itself takes."""
    alone = found.unprofiled_ms
    return alone is not None and total_ms(found) > MOSTLY_PROFILER * alone


def rows(found: Breakdown) -> tuple[tuple[OpKind, float, float, int], ...]:
    """Return kind, milliseconds, share and count of every kind there is, longest first."""
    total, ops = total_ms(found), found.ops or {}
    made = [
        (kind, ms, ms / total if total else 0.0, ops[kind]) for kind, ms in (found.ms or {}).items()
    ]
    return tuple(sorted(made, key=lambda row: -row[1]))


def name_of(one: Breakdown) -> str:
    """Name the artifact of a breakdown."""
    return f"{one.runtime} {one.scheme}"


def draw(found: Sequence[Breakdown]) -> str | None:
    """Draw a stacked bar per artifact; the tick is what its pointwise layers take alone.

    Returns:
        An SVG of those that tell of the artifact; None where none does.
    """
    measured = [one for one in found if one.ms and not is_mostly_profiler(one)]
    if not measured:
        return None
    longest, devices = max(map(total_ms, measured)), {one.device for one in measured}
    with drawing():
        legend = LEGEND_STEP * -(-len(KINDS) // LEGEND_COLUMNS)
        figure = new_figure(STEP * len(measured) + legend + 6, WIDE)
        axes = plain_axes(figure)
        scale = (WIDE - LABEL - ROOM) / longest
        for index, one in enumerate(measured):
            top, left = index * STEP, LABEL
            write(axes, 0, top + (15 if len(devices) == 1 else 10), name_of(one), size=TEXT)
            if len(devices) > 1:
                write(axes, 0, top + 22, one.device, size=SMALL)
            for kind in KINDS:
                width = (one.ms or {}).get(kind, 0.0) * scale
                face = LINE if kind == "other" else slot_colour(KINDS.index(kind))
                axes.add_patch(
                    Rectangle((left, top + 3), width, 16, facecolor=face, edgecolor=CARD, lw=0.6)
                )
                left += width
            if one.floor_ms:
                at = LABEL + one.floor_ms * scale
                axes.plot([at, at], [top + 1, top + 21], color=CARD, lw=4.2)
                axes.plot([at, at], [top + 1, top + 21], color=INK, lw=1.8)
                left = max(left, at)
            write(axes, left + 6, top + 15, f"{total_ms(one):.3g} ms", size=TEXT)
        for index, kind in enumerate(KINDS):
            row, column = divmod(index, LEGEND_COLUMNS)
            x, y = column * WIDE / LEGEND_COLUMNS, STEP * len(measured) + 6 + row * LEGEND_STEP
            face = LINE if kind == "other" else slot_colour(index)
            axes.add_patch(Rectangle((x, y), 10, 10, facecolor=face, linewidth=0))
            write(axes, x + 15, y + 9, kind, size=SMALL)
        return to_svg(figure, "breakdown")
