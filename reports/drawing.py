"""Figures as inline SVG that follows the page's light or dark theme.

In: labels, numbers and positions. Out: SVG text. Figures are drawn in placeholder colours, which
become CSS variables in the SVG's text; labels stay text, so the page's own font sets them. The
same input gives the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.axes import Axes

# One narrow width for all: a phone shows a chart whole, a desktop shows three side by side, and the
# letters have nearly the same size on both.
WIDTH = 360.0
TEXT, SMALL = 12.0, 11.0
VALUE_ROOM = 70.0  # what the longest number beside a bar takes
HEAT_LOW, HEAT_HIGH = 0.06, 0.5  # opacities that leave ink on the tint legible in both themes
LONGEST_LABEL = 32

RUNTIMES = ("onnx", "openvino", "tflite", "coreml", "reference")
SHAPES = ("o", "s", "^", "D", "v", "P", "X", "p")
INK, MUTED, LINE, HEAT, CARD = "#010203", "#010204", "#010205", "#010206", "#010207"
BAD = "#010208"
_VARIABLES = {
    INK: "ink", MUTED: "muted", LINE: "line", HEAT: "heat", CARD: "card", BAD: "bad"
} | {f"#0102a{slot}": f"r{slot}" for slot in range(len(SHAPES))}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar; without a value only its text stands there. `marker` is a tick across it."""

    value: float | None
    text: str
    marker: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A runtime's bars under one label: hollow is float, filled is quantized."""

    label: str
    runtime: str
    factor: str
    hollow: Bar
    filled: Bar


def slot_of(runtime: str) -> int:
    """Return the number of a runtime's colour and shape; one that is new gets a stable one."""
    if runtime in RUNTIMES:
        return RUNTIMES.index(runtime)
    return len(RUNTIMES) + sum(runtime.encode()) % (len(SHAPES) - len(RUNTIMES))


def draw_bars(groups: Sequence[Group], name: str) -> str | None:
    """Draw groups of horizontal bars on one scale.

    Args:
        groups: From top to bottom.
        name: Tells the charts of one page apart.

    Returns:
        The SVG, or None where no bar has a value.
    """
    bars = [bar for group in groups for bar in (group.hollow, group.filled)]
    longest = max((max(bar.value or 0.0, bar.marker or 0.0) for bar in bars), default=0.0)
    if not longest:
        return None
    step = 60.0
    figure = new_figure(step * len(groups) - 8.5)
    axes = plain_axes(figure)
    scale = (WIDTH - VALUE_ROOM - 2) / longest
    for index, group in enumerate(groups):
        top, colour = index * step, colour_of(group.runtime)
        write(axes, 0, top + 11.0, group.label, size=TEXT)
        write(axes, WIDTH, top + 11.0, group.factor, size=TEXT, ha="right")
        for offset, bar, face in ((18, group.hollow, CARD), (35, group.filled, colour)):
            _draw_bar(axes, bar, top + offset, scale, colour=colour, face=face)
    return to_svg(figure, name)


def _draw_bar(axes: Axes, bar: Bar, top: float, scale: float, *, colour: str, face: str) -> None:
    height, end = 13.0, 0.0
    if bar.value is not None:
        # The outline lies inside, so that a hollow and a filled bar of one value end together.
        width = max(bar.value * scale, 2.0)
        axes.add_patch(
            Rectangle(
                (0.8, top), width - 0.8, height, facecolor=face, edgecolor=colour, linewidth=1.4
            )
        )
        end = width
        if bar.marker is not None:
            at = max(bar.marker * scale, 1.0)
            # A halo keeps the tick visible on a filled bar.
            axes.plot([at, at], [top - 1.5, top + height + 1.5], color=CARD, lw=4.2)
            axes.plot([at, at], [top - 1.5, top + height + 1.5], color=INK, lw=1.8)
            end = max(end, at)
    ink = INK if bar.value is not None else MUTED
    write(axes, end + 6 * bool(end), top + 10.5, bar.text, colour=ink)


def draw_matrix(
    names: Sequence[str], cells: dict[frozenset[str], float], floor: float, name: str
) -> str:
    """Draw the lower triangle of a symmetric matrix of fractions, as numbers on a tint.

    Args:
        names: The rows and columns; a line break starts a second, fainter line.
        cells: The value of each pair of names; a missing one is drawn as a dash.
        floor: The value of the faintest tint.
        name: Tells the charts of one page apart.
    """
    # The matrix is symmetric and its diagonal trivial: the lower triangle says all.
    rows, columns = names[1:], names[:-1]
    left, foot = 78.0, 34.0
    width = min((WIDTH - left) / len(columns), 94.0)
    height = min(max(width * 0.62, 30.0), 50.0)
    figure = new_figure(height * len(rows) + foot)
    axes = plain_axes(figure)
    for i, row in enumerate(rows):
        _write_lines(axes, left - 8, (i + 0.5) * height, row, ha="right", longest=12)
        for j, column in enumerate(columns[: i + 1]):
            value = cells.get(frozenset((row, column)))
            share = 0.0 if value is None else (value - floor) / (1 - floor)
            x, y, tint = left + j * width, i * height, HEAT_LOW + share * (HEAT_HIGH - HEAT_LOW)
            box = Rectangle((x + 1, y + 1), width - 2, height - 2, facecolor=HEAT, alpha=tint)
            axes.add_patch(box).set_linewidth(0)
            text = "—" if value is None else f"{value * 100:.2f}"
            # Five digits wide at most, so numbers in narrow columns keep apart.
            size = min(TEXT, width / 3.2)
            write(axes, x + width / 2, y + height / 2 + 4, text, size=size, ha="center")
    for j, column in enumerate(columns):
        middle = left + (j + 0.5) * width
        below = height * len(rows) + foot / 2 + 2
        _write_lines(axes, middle, below, column, ha="center", longest=max(int(width / 6.2), 2))
    return to_svg(figure, name)


def colour_of(runtime: str) -> str:
    """Return the placeholder of a runtime's colour."""
    return slot_colour(slot_of(runtime))


def slot_colour(slot: int) -> str:
    """Return the placeholder of one of as many colours as there are shapes."""
    return f"#0102a{slot}"


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """Return an empty figure, of the common width if not told; units are those of the SVG."""
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    figure.patch.set_visible(False)
    return figure


def plain_axes(figure: Figure) -> Axes:
    """Return axes that cover a figure, in the SVG's units, y downwards."""
    axes = figure.add_axes((0, 0, 1, 1))
    width, height = figure.get_size_inches() * 72
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    return axes


def write(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    *,
    size: float = SMALL,
    colour: str = INK,
    ha: Literal["left", "center", "right"] = "left",
    longest: int = LONGEST_LABEL,
    bold: bool = False,
) -> None:
    """Write one line of text, cut where it is longer than `longest` characters."""
    # Names come from users: no mathematics between dollar signs, no control characters.
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    line = line if len(line) <= longest else f"{line[: longest - 1]}…"
    weight = "bold" if bold else "normal"
    axes.text(
        x, y, line, size=size, color=colour, ha=ha, va="baseline", weight=weight, parse_math=False
    )


def _write_lines(
    axes: Axes, x: float, y: float, text: str, *, ha: Literal["center", "right"], longest: int
) -> None:
    # Line by line: within one text of several, the SVG keeps no anchor and another font shifts it.
    lines = text.split("\n")
    for index, line in enumerate(lines):
        shift = 3.5 + 12.5 * (index - (len(lines) - 1) / 2)
        colour = MUTED if index else INK
        write(axes, x, y + shift, line, ha=ha, colour=colour, longest=longest)


@contextmanager
def drawing() -> Iterator[None]:
    """Draw with this module's settings, whatever the user's own matplotlibrc says."""
    with mpl.rc_context(), warnings.catch_warnings():
        # The page's font draws the text, so a glyph that matplotlib's own lacks is no loss.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        mpl.rcdefaults()
        mpl.rcParams["svg.fonttype"] = "none"
        yield


def to_svg(figure: Figure, name: str) -> str:
    """Write a figure as SVG that can stand in a page beside others, the same every day."""
    # The salt gives clip paths and markers the same ids every time, and other ids in every chart.
    mpl.rcParams["svg.hashsalt"] = name
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", lambda tag: _adapt(tag.group()), text)
    return re.sub(r"\s*\n\s*", "\n", text).strip()


def _adapt(tag: str) -> str:
    """Fit one tag into a page: no namespaces, no repeated ids, the page's font and colours."""
    tag = re.sub(r'\s(xmlns(:\w+)?|version|width="[\d.]+pt" height)="[^"]*"', "", tag)
    tag = re.sub(r'\sid="[\w.]+_\d+"', "", tag)
    tag = re.sub(r"font-family: [^;\"]*;?\s?", "", tag).replace("xlink:href", "href")
    tag = re.sub(r"#0102\w\w", lambda found: f"var(--{_VARIABLES.get(found.group(), 'ink')})", tag)
    return tag.replace("<svg", '<svg aria-hidden="true"', 1)
