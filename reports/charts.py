"""A report's charts: which questions are drawn, from which numbers, and what is said beside them.

In: a `Report`. Out: `Chart` records: an SVG text, or the reason why there is nothing to draw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter

from reports.drawing import (
    CARD,
    LINE,
    MUTED,
    SHAPES,
    SMALL,
    Bar,
    Group,
    colour_of,
    draw_bars,
    draw_matrix,
    drawing,
    new_figure,
    slot_of,
    to_svg,
)
from reports.pairs import Pair, describe, find_lanes, pair_up

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from matplotlib.axes import Axes

    from pipeline.records import Accuracy, Latency
    from reports.document import ArtifactRow, Report
    from reports.pairs import Lane

LOG_FROM = 8.0  # slowest over fastest from which the scatter's latency axis is logarithmic


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One chart, or the reason why there is none.

    Attributes:
        title: What the chart asks.
        subtitle: Where it was measured.
        svg: Inline SVG without scripts, links or namespaces; None where there is nothing to draw.
        note: How to read it, and what is left out; without an SVG, why.
        marks: The runtimes whose colour and shape a reader needs to know.
        keys: Whether a reader needs to know the bars of float and quantized artifacts.
    """

    title: str
    subtitle: str
    svg: str | None
    note: str
    marks: tuple[str, ...] = ()
    keys: bool = False


def draw_charts(report: Report) -> tuple[tuple[Chart, ...], tuple[Chart, ...]]:
    """Draw every chart of a report.

    Args:
        report: What to draw.

    Returns:
        The charts of accuracy, latency and size, and those of agreement between runtimes.
    """
    with drawing():
        schemes = dict.fromkeys(row.scheme for row in report.artifacts)
        return _trade_offs(report), tuple(_agreement(report, scheme) for scheme in schemes)


def _trade_offs(report: Report) -> tuple[Chart, ...]:
    pairs = pair_up(report.artifacts)
    lanes = find_lanes(report.artifacts)
    metric = _metric(report.artifacts)
    timed = [lane for lane in lanes if any(lane.measured(row) for row in report.artifacts)]
    trade = []
    if metric is None or not timed:
        # Every lane lacks the same thing: one card says it once.
        trade.append(_no_scatter(report.artifacts, accuracy=metric is not None))
    for lane in lanes:
        if metric is not None and lane in timed:
            trade.append(_scatter(lane, pairs, metric, report))
        trade.append(_latency_bars(lane, pairs))
    if not lanes:
        why = "The report holds no latency: this run timed nothing."
        trade.append(Chart(title="Latency", subtitle="", svg=None, note=why))
    # Beside the first device's two charts: three make a row, and the others follow in twos.
    trade.insert(2, _size_bars(pairs))
    return tuple(trade)


# --- the scatter ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Metric:
    field: str
    axis: str
    factor: float
    note: str


_METRICS = (
    _Metric(
        field="top1",
        axis="top-1, %  (up is better)",
        factor=100,
        note="Error bars: Tango's 95 % interval of the drop.",
    ),
    # Float artifacts have next to no noise: on one axis with them the others would be one line.
    _Metric(
        field="sqnr_db",
        axis="SQNR, dB  (up is better)",
        factor=1,
        note="No top-1 was measured, so this shows SQNR against the float model; float artifacts"
        " have next to no noise and are left out.",
    ),
    _Metric(
        field="agreement_with_float",
        axis="agreement with float, %  (up is better)",
        factor=100,
        note="No top-1 was measured, so this shows agreement with the float model.",
    ),
)


def _metric(rows: Iterable[ArtifactRow]) -> _Metric | None:
    rows = tuple(rows)
    return next((m for m in _METRICS if any(_value(m, row) is not None for row in rows)), None)


def _value(metric: _Metric, row: ArtifactRow) -> float | None:
    if metric.field == "sqnr_db" and row.scheme == "float":
        return None
    value: float | None = getattr(row.accuracy, metric.field)
    return None if value is None or row.accuracy.outcome != "measured" else value * metric.factor


def _no_scatter(rows: Sequence[ArtifactRow], *, accuracy: bool) -> Chart:
    found: list[Accuracy | Latency] = []
    for row in rows:
        found.extend(row.latency if accuracy else (row.accuracy,))
    reasons = list(dict.fromkeys(one.reason for one in found if one.reason))
    what = "No latency was measured" if accuracy else "No accuracy was measured"
    note = f"{what}: {'; '.join(reasons)}" if reasons else f"{what} in this run."
    return Chart(title="Accuracy against latency", subtitle="", svg=None, note=note)


def _scatter(lane: Lane, pairs: Sequence[Pair], metric: _Metric, report: Report) -> Chart:
    points: dict[tuple[str, str], tuple[float, float, ArtifactRow]] = {}
    left_out = []
    for row in report.artifacts:
        latency, y = lane.measured(row), _value(metric, row)
        if latency is not None and latency.wall_p50_ms is not None and y is not None:
            points[row.path, row.sha256] = (latency.wall_p50_ms, y, row)
        elif row.scheme != "float" or metric.field != "sqnr_db":
            left_out.append(f"{row.runtime} {row.scheme}")
    title = "Accuracy against latency"
    if not points:
        why = "No artifact has both its accuracy and its latency here."
        return Chart(title=title, subtitle=describe(lane, report.artifacts), svg=None, note=why)
    figure = new_figure(258)
    axes = figure.add_axes((0.125, 0.14, 0.855, 0.76))
    axes.patch.set_visible(False)
    for pair in pairs:
        ends = [points.get((one.path, one.sha256)) for one in (pair.float_row, pair.row) if one]
        drawn = [end for end in ends if end]
        colour = colour_of(pair.runtime)
        axes.plot(
            [x for x, _, _ in drawn], [y for _, y, _ in drawn], color=colour, lw=1, alpha=0.45
        )
    for x, y, row in points.values():
        _mark(axes, x, y, row, _whiskers(row) if metric.field == "top1" else None)
    _scatter_axes(axes, [x for x, _, _ in points.values()], metric)
    note = f"{metric.note} Lines join the float and the quantized artifact of a runtime."
    if left_out:
        note += f" Not drawn, for want of a number: {', '.join(dict.fromkeys(left_out))}."
    return Chart(
        title=title,
        subtitle=describe(lane, report.artifacts),
        svg=to_svg(figure, f"scatter-{lane.device}-{lane.threads}"),
        note=note,
        marks=tuple(dict.fromkeys(row.runtime for _, _, row in points.values())),
    )


def _mark(
    axes: Axes, x: float, y: float, row: ArtifactRow, whiskers: tuple[float, float] | None
) -> None:
    colour = colour_of(row.runtime)
    if whiskers:
        below, above = whiskers
        axes.errorbar(
            x,
            y,
            yerr=[[below], [above]],
            fmt="none",
            color=colour,
            ecolor=colour,
            elinewidth=1.1,
            capsize=2.5,
        )
    axes.plot(
        [x],
        [y],
        linestyle="none",
        marker=SHAPES[slot_of(row.runtime)],
        markersize=7.5,
        markeredgewidth=1.6,
        markeredgecolor=colour,
        markerfacecolor=CARD if row.scheme == "float" else colour,
    )


def _whiskers(row: ArtifactRow) -> tuple[float, float] | None:
    drop, interval = row.accuracy.drop_pp, row.accuracy.drop_ci95_pp
    if drop is None or interval is None:
        return None
    # A larger drop is a lower top-1: the interval's ends change places.
    return max(interval[1] - drop, 0.0), max(drop - interval[0], 0.0)


def _scatter_axes(axes: Axes, xs: Sequence[float], metric: _Metric) -> None:
    low, high = min(xs), max(xs)
    if high / low > LOG_FROM:
        axes.set_xscale("log")
        low, high = low / 1.4, high * 1.4
        steps = [m * 10.0**e for e in range(-4, 7) for m in (1, 2, 5)]
        inside = [step for step in steps if low <= step <= high]
        axes.xaxis.set_major_locator(FixedLocator(inside[:: math.ceil(len(inside) / 6)]))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        low, high = 0.0, high * 1.12
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.set_xlim(low, high)
    axes.margins(y=0.14)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis):
        # Bare numbers, without the offset that matplotlib would write into a corner.
        axis.set_major_formatter(ScalarFormatter(useOffset=False))
    axes.ticklabel_format(style="plain")
    axes.grid(visible=True, color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=SMALL, labelcolor=MUTED)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.figure.text(0.0, 0.995, metric.axis, color=MUTED, size=SMALL, va="top")
    axes.figure.text(
        0.98,
        0.0,
        "wall p50, ms  (left is better)",
        color=MUTED,
        size=SMALL,
        ha="right",
        va="bottom",
    )


# --- bars -----------------------------------------------------------------------------------------


def _latency_bars(lane: Lane, pairs: Sequence[Pair]) -> Chart:
    groups = []
    for pair in pairs:
        base, latency = lane.find(pair.float_row), lane.find(pair.row)
        # The float time taken together with the quantized one is what its speed-up is made of.
        paired = latency if latency and latency.float_wall_p50_ms is not None else None
        factor = latency.speedup if latency else None
        groups.append(
            Group(
                label=pair.label,
                runtime=pair.runtime,
                factor=f"{factor:.2f}× as fast" if factor is not None else "",
                hollow=_time_bar(paired.float_wall_p50_ms, paired.float_cpu_p50_ms)
                if paired
                else _latency_bar(base),
                filled=_latency_bar(latency),
            )
        )
    rows = [row for pair in pairs for row in (pair.float_row, pair.row) if row]
    chart = draw_bars(groups, f"latency-{lane.device}-{lane.threads}")
    found = [latency for latency in (lane.find(row) for row in rows) if latency]
    reasons = dict.fromkeys(one.reason for one in found if one.reason)
    note = "Wall p50, milliseconds an inference; shorter is better. The upright tick is CPU p50."
    if chart is None:
        note = (
            f"Nothing was timed here: {'; '.join(str(why) for why in reasons) or 'no reason given'}"
        )
    where = describe(lane, rows)
    return Chart(title="Latency", subtitle=where, svg=chart, note=note, keys=True)


def _latency_bar(latency: Latency | None) -> Bar:
    if latency is None:
        return Bar(value=None, text="— not in this report")
    if latency.outcome != "measured":
        return Bar(value=None, text="— failed" if latency.outcome == "failed" else "— not run")
    return _time_bar(latency.wall_p50_ms, latency.cpu_p50_ms)


def _time_bar(wall: float | None, cpu: float | None) -> Bar:
    return Bar(value=wall, text=f"{milliseconds(wall)} ms" if wall is not None else "—", marker=cpu)


def _size_bars(pairs: Sequence[Pair]) -> Chart:
    groups = []
    for pair in pairs:
        base, row = pair.float_row, pair.row
        groups.append(
            Group(
                label=pair.label,
                runtime=pair.runtime,
                factor=_size_factor(base, row),
                hollow=_size_bar(base),
                filled=_size_bar(row),
            )
        )
    note = "Megabytes of 1,000,000 bytes; shorter is better."
    svg = draw_bars(groups, "size")
    note = note if svg else "The report holds no artifact."
    return Chart(title="Size", subtitle="", svg=svg, note=note, keys=True)


def _size_factor(base: ArtifactRow | None, row: ArtifactRow | None) -> str:
    if base is None or row is None:
        return ""
    ratio = base.size_bytes / row.size_bytes
    return f"{ratio:.2f}× smaller" if ratio >= 1 else f"{1 / ratio:.2f}× larger"


def _size_bar(row: ArtifactRow | None) -> Bar:
    if row is None:
        return Bar(value=None, text="— no such artifact")
    return Bar(value=float(row.size_bytes), text=f"{row.size_bytes / 1e6:.1f} MB")


# --- agreement ------------------------------------------------------------------------------------


def _agreement(report: Report, scheme: str) -> Chart:
    cells: dict[frozenset[str], float] = {}
    names: dict[str, None] = {}
    for row in report.agreement:
        if row.scheme == scheme:
            sides = ((row.a, row.profile_a), (row.b, row.profile_b))
            ends = [f"{runtime}\n{profile}" if profile else runtime for runtime, profile in sides]
            names.update(dict.fromkeys(ends))
            # Two artifacts of one runtime and profile: the matrix shows the worse.
            key = frozenset(ends)
            cells[key] = min(row.top1_agreement, cells.get(key, 1.0))
    title, order = f"Agreement, {scheme}", list(names)
    if len(order) <= 1:
        why = f"No two {scheme} artifacts were run on the same images, so nothing was compared."
        return Chart(title=title, subtitle="", svg=None, note=why)
    floor = min(0.9, math.floor(min(cells.values()) * 10) / 10)
    counts = sorted({row.n for row in report.agreement if row.scheme == scheme})
    images = " or ".join(f"{n:,}" for n in counts)
    note = f"Share of images with the same top-1, %, on {images} images."
    note += f" The tint deepens from {floor * 100:.0f} % to 100 %."
    svg = draw_matrix(order, cells, floor, f"agreement-{scheme}")
    return Chart(title=title, subtitle="top-1, runtime against runtime", svg=svg, note=note)


def milliseconds(value: float) -> str:
    """Write a time with at least three digits."""
    whole_digits = len(f"{value:.0f}")
    return f"{value:.{max(0, 3 - whole_digits)}f}"
