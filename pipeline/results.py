"""What a person sees when a run has ended.

In: a `Report`, and what was asked of which devices. Out: a line per artifact, a table per device
that was asked, and why what is missing is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from reports.contention import contention
from reports.layouts import ONE_CANDIDATE, TUNE_OFF, sentence
from reports.summary import MISSING, drop_in_points
from reports.terminal import new_table, print_whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from rich.console import Console

    from pipeline.records import Accuracy, Latency, Layout, Parity, Place
    from reports.document import Report

HELD = "cpu:"
"""What the names of this CPU held to an instruction set begin with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a command asked for.

    Attributes:
        here: Whether the artifacts themselves and the run's own device were asked about.
        places: Others that were asked.
        what: For times, or for outputs.
    """

    here: bool = True
    places: Sequence[Place] = ()
    what: Literal["latency", "parity"] = "latency"


def print_results(report: Report, out: Path, console: Console, asked: Asked) -> None:
    """Print what was asked for, and where to look further."""
    if asked.here:
        _print_artifacts(report, console)
        _print_layouts(report.layouts, console)
    for place in _places(asked):
        if _why_nothing(report, place, asked) is not None:
            continue  # that is said as a failure
        if asked.what == "parity":
            _print_outputs(report, place.device, console)
        else:
            _print_times(report, place, console)
    console.print(f"report: {out / 'report.json'}", soft_wrap=True, highlight=False)
    console.print(f"page:   {out / 'pages' / 'index.html'}", soft_wrap=True, highlight=False)


def unreached(report: Report, asked: Asked) -> list[str]:
    """Return why devices gave nothing that was measured, one line for each that did not."""
    found = ((place.device, _why_nothing(report, place, asked)) for place in _places(asked))
    return [f"{device} measured nothing: {why}" for device, why in found if why is not None]


def _places(asked: Asked) -> list[Place]:
    """Return the places of which something is told: of outputs, each device once."""
    if asked.what == "latency":
        return list(asked.places)
    return list({place.device: place for place in asked.places}.values())


def _why_nothing(report: Report, place: Place, asked: Asked) -> str | None:
    """Return why all rows of a place are not_run, every reason once; else None."""
    rows: list[Latency | Parity] = (
        [*_outputs_on(report, place.device)]
        if asked.what == "parity"
        else [one for _, one in _times_at(report, place)]
    )
    if not rows or any(row.outcome != "not_run" for row in rows):
        return None
    return "; ".join(dict.fromkeys(str(row.reason) for row in rows))


def _print_artifacts(report: Report, console: Console) -> None:
    table = new_table("artifact", "MB", "top-1", "drop, points (95 %)", "SQNR dB", "ms", "x float")
    reasons: list[tuple[str, Accuracy | Latency]] = []
    own: list[tuple[str, Latency]] = []
    for row in report.artifacts:
        accuracy, latency = row.accuracy, next(iter(row.latency), None)
        name = f"{row.runtime} {row.scheme}"
        table.add_row(
            name,
            f"{row.size_bytes / 1e6:.2f}",
            _number(accuracy.top1, ".4f"),
            drop_in_points(accuracy),
            _number(accuracy.sqnr_db, ".1f"),
            _number(latency.wall_p50_ms if latency else None, ".2f"),
            _number(latency.speedup if latency else None, ".2f"),
        )
        reasons += [(name, accuracy), *((name, one) for one in row.latency)]
        if latency is not None and latency.wall_p50_ms is not None:
            own.append((name, latency))
    print_whole(table, console)
    for _, timed in own[:1]:
        _say(f"ms: median wall time on {timed.device}, {_threads(timed.threads)}", console)
    _print_contention(own, console)
    _print_reasons(reasons, console)


def _print_layouts(layouts: Iterable[Layout], console: Console) -> None:
    """Say what was chosen by measurement; and what was not, with why, where it could have been."""
    untuned: dict[str, list[str]] = {}
    for layout in layouts:
        if layout.source == "measured":
            _say(sentence(layout), console)
        elif layout.reason not in {TUNE_OFF, ONE_CANDIDATE}:
            untuned.setdefault(layout.reason, []).append(layout.runtime)
    for reason, names in untuned.items():
        _say(f"{', '.join(names)}: default form and placement ({reason})", console)


def _print_times(report: Report, place: Place, console: Console) -> None:
    rows = _times_at(report, place)
    title = f"{place.device}, {_threads(place.threads)}"
    if any(one.instructions is not None for _, one in rows):
        table = new_table(title, "instructions", "of float", "spread")
        for name, one in rows:
            table.add_row(
                name,
                _number(one.instructions, ","),
                _number(one.instruction_ratio, ".3f"),
                _number(one.instruction_spread, ".1g"),
            )
        print_whole(table, console)
    elif any(one.outcome == "measured" for _, one in rows):
        table = new_table(title, "wall ms", "CPU ms", "x float", "of float's CPU (95 %)")
        for name, one in rows:
            table.add_row(
                name,
                _number(one.wall_p50_ms, ".2f"),
                _number(one.cpu_p50_ms, ".2f"),
                _number(one.speedup, ".2f"),
                _interval(one.cpu_ratio, one.cpu_ratio_ci95),
            )
        print_whole(table, console)
        _print_contention(rows, console)
        _print_units(rows, console)
    _print_reasons(rows, console)


def _print_units(rows: Iterable[tuple[str, Latency]], console: Console) -> None:
    """Say which units the runtime's plan really uses."""
    for name, one in rows:
        if one.operations_on:
            units = (f"{count} on {unit}" for unit, count in sorted(one.operations_on.items()))
            _say(f"operations of {name}: {', '.join(units)}", console)


def _print_contention(rows: Iterable[tuple[str, Latency]], console: Console) -> None:
    """Warn of times that something else made longer."""
    waits = {name: times for name, one in rows if (times := contention(one)) is not None}
    if waits:
        named = ", ".join(f"{name} {times:.2f}" for name, times in waits.items())
        _say(f"disturbed: something else had the processor: wall over CPU time is {named}", console)
        _say("ms and x float mislead there; `bench RUN_DIR --again` measures anew", console)


def _print_outputs(report: Report, device: str, console: Console) -> None:
    rows = _outputs_on(report, device)
    titles = ("against", "images", "same class", "logits differ", "of error")
    table = new_table(f"outputs on {device}", *titles)
    for row in rows:
        if row.outcome == "measured":
            table.add_row(
                f"{row.runtime} {row.scheme}",
                "this host" if row.against == "host" else "reference",
                _number(row.n, ","),
                _number(row.top1_agreement, ".2%"),
                _number(row.max_abs_logit_diff, ".2g"),
                _number(row.diff_over_error, ".2f"),
            )
    if table.row_count:
        print_whole(table, console)
        says = "logits differ: the largest difference; of error: RMS over what quantization changes"
        _say(says, console)
    changed = {f"{row.runtime} {row.scheme}" for row in rows if (row.diff_over_error or 0) >= 1}
    if changed:
        _say(
            f"{', '.join(sorted(changed))}: {device} changes as much as quantization does, or more",
            console,
        )
        full = {f"{x.runtime} {x.scheme}" for x in report.artifacts if x.profile == "full"}
        if device.startswith(HELD) and changed & full:
            _say("integers of profile full saturate without VNNI: see --isa avx2", console)
    _print_reasons([(f"{row.runtime} {row.scheme}", row) for row in rows], console)


def _times_at(report: Report, place: Place) -> list[tuple[str, Latency]]:
    return [
        (f"{row.runtime} {row.scheme}", one)
        for row in report.artifacts
        for one in row.latency
        if one.device == place.device and one.threads == place.threads
    ]


def _outputs_on(report: Report, device: str) -> list[Parity]:
    return [row for row in report.parity if row.device == device]


def _print_reasons(
    results: Iterable[tuple[str, Accuracy | Latency | Parity]], console: Console
) -> None:
    """Print every reason once, with the artifacts that it is of."""
    reasons: dict[str, list[str]] = {}
    for name, one in results:
        if one.reason:
            reasons.setdefault(f"{one.outcome}: {one.reason}", []).append(name)
    for reason, names in reasons.items():
        _say(f"{reason} ({', '.join(dict.fromkeys(names))})", console)


def _say(text: str, console: Console) -> None:
    console.print(f"  {text}", soft_wrap=True, highlight=False, markup=False)


def _threads(n: int | None) -> str:
    return "1 thread" if n in {None, 1} else f"{n} threads"


def _interval(ratio: float | None, ends: tuple[float, float] | None) -> str:
    if ratio is None or ends is None:
        return MISSING
    return f"{ratio:.2f} ({ends[0]:.2f} to {ends[1]:.2f})"


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)
