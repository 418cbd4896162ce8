"""The calibration's chart: every site in network order by its SQNR, the worst ones named.

In: a report's `Calibration`. Out: SVG texts, one for a desktop and one for a phone. A filled mark
is what was chosen, the hollow mark on the same line the plain grid. The few sites that stand out
are larger, in another colour, and have their names below all marks.
"""

from __future__ import annotations

import html
import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from reports.culprits import MARGIN_DB, culprits, median_db, most_helped
from reports.drawing import (
    BAD,
    CARD,
    HEAT,
    INK,
    LINE,
    MUTED,
    WIDTH,
    drawing,
    new_figure,
    plain_axes,
    to_svg,
    write,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from reports.document import Calibration, Site

WIDE = 900.0
HIGHEST, LOWEST = 70.0, -20.0
"""dB: what lies beyond is drawn here. A site without any noise has a few hundred."""
LEFT, RIGHT, TOP = 28.0, 8.0, 42.0
ROW = 17.0  # of a name below the marks
LETTER, WIDE_LETTER = 6.0, 6.6  # width of one in the page's font, generously; and of a bold one
LONGEST = 54  # letters of a label; a real one has at most 44
LEANS = (0.5, 1.0, 0.0)  # tried in this order
NARROWEST = 30.0  # a stage's room, however few its sites


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """Where a value in dB is drawn."""

    low: float
    high: float
    height: float

    def at(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        return TOP + (self.high - value) / (self.high - self.low) * self.height


@dataclass(frozen=True, slots=True, kw_only=True)
class _Label:
    """A site's name below the marks.

    Attributes:
        x: Where its site is drawn.
        start: Where the name starts.
        end: Where it ends.
        foot: Its site's lower mark.
        text: The name and its numbers.
        colour: Of all this.
        worst: Whether no site is worse.
    """

    x: float
    start: float
    end: float
    foot: float
    text: str
    colour: str
    worst: bool

    def meets(self, other: _Label) -> bool:
        return self.start < other.end + LETTER and other.start < self.end + LETTER


def draw_sites(calibration: Calibration) -> tuple[str, str]:
    """Draw a calibration's sites.

    Args:
        calibration: What to draw.

    Returns:
        The SVG for a wide page, and the one for a narrow page.
    """
    with drawing():
        return _draw(calibration.sites, WIDE, 250.0), _draw(calibration.sites, WIDTH, 230.0)


def beyond(sites: Sequence[Site]) -> bool:
    """Tell whether the chart's scale leaves some value out."""
    values = _values(sites)
    return max(values) > HIGHEST or min(values) < LOWEST


def stage_of(site: str) -> str:
    """Return the stage in a site's name; stem and head are stages of their own."""
    parts = site.split(".")
    return f"stage {parts[1]}" if parts[0] == "stages" and len(parts) > 1 else parts[0]


def _values(sites: Sequence[Site]) -> list[float]:
    return [value for site in sites for value in (site.sqnr_db, site.plain_sqnr_db)]


def _draw(sites: Sequence[Site], width: float, height: float) -> str:
    stages = [
        (stage, [index for index, _ in found])
        for stage, found in itertools.groupby(enumerate(sites), lambda item: stage_of(item[1].site))
    ]
    rooms = _rooms([len(found) for _, found in stages], width - LEFT - RIGHT)
    xs: list[float] = []
    left = LEFT
    for (_, found), room in zip(stages, rooms, strict=True):
        xs += [left + (place + 0.5) * room / len(found) for place in range(len(found))]
        left += room
    scale = _scale(sites, height)
    bottom = TOP + height
    labels = _in_rows([_labels(sites, xs, width, scale, lean) for lean in LEANS])
    figure = new_figure(bottom + 12 + ROW * (labels[-1][0] + 1), width)
    axes = plain_axes(figure)
    _draw_frame(axes, [stage for stage, _ in stages], rooms, scale)
    limit = scale.at(median_db(sites) - MARGIN_DB)
    axes.plot([LEFT, width - RIGHT], [limit, limit], color=MUTED, lw=1, linestyle=(0, (4, 3)))
    for row, label in labels:
        end = bottom + 10 + ROW * row
        axes.plot([label.x, label.x], [label.foot, end], color=label.colour, lw=1, alpha=0.45)
    named = culprits(sites)
    pitch = min(room / len(found) for (_, found), room in zip(stages, rooms, strict=True))
    # Those that stand out come last and the worst on top of all, so that nothing lies on them.
    order = [site for site in sites if site not in named] + [*reversed(named)]
    for site in order:
        size = min(max(0.8 * pitch, 2.4), 6.5)
        if site in named:
            size = 11.0 if site == named[0] else 7.5
        _draw_site(axes, xs[sites.index(site)], site, scale, size=size, named=site in named)
    for row, label in labels:
        _write_label(axes, label, bottom + 10 + ROW * row)
    _draw_titles(axes, xs, bottom)
    return _titled(to_svg(figure, f"sites-{width:.0f}"), sites)


def _rooms(counts: Sequence[int], width: float) -> list[float]:
    """Share a width among stages by their sites, a small stage getting enough to be named."""
    least = min(NARROWEST, width / len(counts))
    small: set[int] = set()
    while True:
        free = width - least * len(small)
        sites = sum(count for index, count in enumerate(counts) if index not in small)
        below = {
            index
            for index, count in enumerate(counts)
            if index not in small and count * free / sites < least
        }
        if not below:
            break
        small |= below
    return [least if index in small else count * free / sites for index, count in enumerate(counts)]


def _scale(sites: Sequence[Site], height: float) -> _Scale:
    values = [min(max(value, LOWEST), HIGHEST) for value in _values(sites)]
    low, high = min(values), max(values)
    margin = max(0.05 * (high - low), 1.0)
    return _Scale(low=low - margin, high=high + margin, height=height)


def _draw_frame(axes: Axes, stages: Sequence[str], rooms: Sequence[float], scale: _Scale) -> None:
    right = LEFT + sum(rooms)
    write(axes, 0, 11, "SQNR, dB  (up is better)", colour=MUTED)
    for tick in MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(scale.low, scale.high):
        if scale.low <= tick <= scale.high:
            y = scale.at(tick)
            axes.plot([LEFT, right], [y, y], color=LINE, lw=0.8)
            write(axes, LEFT - 6, y + 4, f"{tick:g}".replace("-", "−"), colour=MUTED, ha="right")
    fits = all(
        len(stage) * LETTER <= room
        for stage, room in zip(stages, rooms, strict=True)
        if stage.startswith("stage ")
    )
    left = LEFT
    for index, (stage, room) in enumerate(zip(stages, rooms, strict=True)):
        if index:
            axes.plot([left, left], [TOP - 14, TOP + scale.height], color=LINE, lw=0.8)
        text = stage if fits else stage.removeprefix("stage ")
        if len(text) * LETTER <= room:
            write(axes, left + room / 2, TOP - 6, text, colour=MUTED, ha="center")
        left += room


def _draw_site(
    axes: Axes, x: float, site: Site, scale: _Scale, *, size: float, named: bool
) -> None:
    colour, edge = BAD if named else HEAT, 1.6 if named else 1.0
    chosen, plain = scale.at(site.sqnr_db), scale.at(site.plain_sqnr_db)
    axes.plot([x, x], [chosen, plain], color=colour, lw=edge, alpha=1.0 if named else 0.45)
    for y, face in ((plain, CARD), (chosen, colour)):
        axes.plot(
            [x],
            [y],
            linestyle="none",
            marker="o",
            markersize=size,
            markeredgewidth=edge,
            markeredgecolor=colour,
            markerfacecolor=face,
        )


def _labels(
    sites: Sequence[Site], xs: Sequence[float], width: float, scale: _Scale, lean: float
) -> list[_Label]:
    """Return the names to write, each under its site.

    Args:
        sites: In network order.
        xs: Where they are drawn.
        width: Of the figure.
        scale: Of the marks.
        lean: How far names reach from their sites towards the middle: 1 wholly, 0 not at all.
    """
    named = culprits(sites)
    helped = most_helped(sites)
    labels = []
    for site in (*named, *([helped] if helped and helped not in named else [])):
        text = f"{site.site} {site.sqnr_db:.1f} dB"
        if site not in named:
            text = f"{site.site} {site.plain_sqnr_db:.1f} → {site.sqnr_db:.1f} dB"
        letter = WIDE_LETTER if site == named[0] else LETTER
        half = min(min(len(text), LONGEST) * letter, width) / 2
        x = xs[sites.index(site)]
        shift = (2 * lean - 1) * 0.8 * half * (1 if x < width / 2 else -1)
        middle = min(max(x + shift, half), width - half)
        label = _Label(
            x=x,
            start=middle - half,
            end=middle + half,
            foot=scale.at(min(site.sqnr_db, site.plain_sqnr_db)),
            text=text,
            colour=BAD if site in named else INK,
            worst=site == named[0],
        )
        labels.append(label)
    return labels


def _write_label(axes: Axes, label: _Label, top: float) -> None:
    size = (label.end - label.start, ROW - 1)
    axes.add_patch(Rectangle((label.start, top), *size, facecolor=CARD, linewidth=0, zorder=2.5))
    write(
        axes,
        (label.start + label.end) / 2,
        top + 12,
        label.text,
        colour=label.colour,
        ha="center",
        longest=LONGEST,
        bold=label.worst,
    )


def _in_rows(ways: Sequence[Sequence[_Label]]) -> list[tuple[int, _Label]]:
    """Return labels with their rows: as few lines as can be cross a higher one, then few rows.

    Args:
        ways: The same labels, where each way places them.
    """

    def placed(order: Sequence[_Label]) -> list[tuple[int, _Label]]:
        rows: list[list[_Label]] = []
        for label in order:
            if not rows or any(label.meets(other) for other in rows[-1]):
                rows.append([])
            rows[-1].append(label)
        return [(row, label) for row, inside in enumerate(rows) for label in inside]

    def cost(rows: Sequence[tuple[int, _Label]]) -> tuple[int, int]:
        crossed = sum(
            upper.start < lower.x < upper.end
            for (above, upper), (below, lower) in itertools.combinations(rows, 2)
            if above < below
        )
        return crossed, rows[-1][0]

    orders = itertools.chain.from_iterable(itertools.permutations(way) for way in ways)
    return min(map(placed, orders), key=cost)


def _draw_titles(axes: Axes, xs: Sequence[float], bottom: float) -> None:
    """Lay a clear column over each site, for a pointer to find it by."""
    ends = [(a + b) / 2 for a, b in itertools.pairwise(xs)]
    for index, (start, end) in enumerate(
        zip((LEFT, *ends), (*ends, 2 * xs[-1] - (LEFT, *ends)[-1]), strict=True)
    ):
        column = Rectangle((start, TOP), end - start, bottom - TOP, facecolor=INK, alpha=0)
        column.set_linewidth(0)
        column.set_gid(f"column-{index}")
        axes.add_patch(column)


def _titled(svg: str, sites: Sequence[Site]) -> str:
    def title(found: re.Match[str]) -> str:
        site = sites[int(found.group(1))]
        text = f"{site.site}: {site.sqnr_db:.1f} dB, plain {site.plain_sqnr_db:.1f} dB"
        return f"<g><title>{html.escape(text)}</title>"

    return re.sub(r'<g id="column-(\d+)">', title, svg)
