"""A report as pages: one for people to look at, and one per device to keep in a repository.

In: a `Report`. Out: index.html and, where there is a calibration, a tuning or a training,
calibration.html, precision.html and training.html, each of which stands alone (no script, no
network, no other file), and a Markdown page per device. Every number is the report's own; a missing
one is a dash, with its reason where the report has one.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jinja2

from pipeline.statistics import MINIMUM_SAMPLES
from pipeline.store import file_stem, write_atomic
from reports import breakdowns, layouts, training, tuning
from reports.charts import draw_charts, milliseconds
from reports.contention import CONTENTION, contention, wall_over_cpu
from reports.culprits import MARGIN_DB, culprits, median_db, sentences, worst_first
from reports.drawing import slot_of
from reports.pairs import pair_up, tell_apart
from reports.sitechart import beyond, draw_sites
from reports.summary import NOTHING_JUDGED

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from pipeline.records import DeviceState, Latency, Training, Tuning
    from reports.document import ArtifactRow, Calibration, Gate, Report

INDEX, CALIBRATION, PRECISION = "index.html", "calibration.html", "precision.html"
TRAINING = "training.html"
SMALLEST_SHARE = 1e-4
"""Written as it is; what is less is only said to be less."""

_DASH = "—"
_SYMBOLS = 8
"""Kernels that a device's page names."""
_VERDICTS = {
    "pass": "Every check of the budget passes.",
    "fail": "The budget is not met.",
    "inconclusive": "The measurements do not decide every check.",
    "not_run": NOTHING_JUDGED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """What was not run or failed for one reason."""

    outcome: str
    reason: str
    subjects: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One latency with the artifact it is of, and its float artifact's latency beside it."""

    row: ArtifactRow
    latency: Latency
    base: Latency | None


def write_pages(report: Report, folder: Path) -> list[Path]:
    """Write a report's pages, each whole or not at all.

    Args:
        report: What to show.
        folder: Where to; made if it is not there.

    Returns:
        The files written, index.html first.

    Raises:
        OutputError: The folder cannot be written.
    """
    pages = {INDEX: _index(report)}
    if report.calibration is not None:
        pages[CALIBRATION] = _calibration_page(report, report.calibration)
    if report.tuning is not None:
        pages[PRECISION] = _precision_page(report, report.tuning)
    if report.training is not None:
        pages[TRAINING] = _training_page(report, report.training)
    timings = list_timings(report)
    for device, name in _device_files(report).items():
        ours = tuple(timing for timing in timings if timing.latency.device == device)
        pages[name] = _device_page(report, device, ours)
    for name, text in pages.items():
        write_atomic(folder / name, text.encode())
    return [folder / name for name in pages]


def _device_files(report: Report) -> dict[str, str]:
    """Return the page of every device that something was asked of, by name."""
    timed = (latency.device for row in report.artifacts for latency in row.latency)
    return file_names(dict.fromkeys((*timed, *(row.device for row in report.parity))))


def file_names(devices: Iterable[str]) -> dict[str, str]:
    """Return a safe and unique Markdown file name for each device."""
    names: dict[str, str] = {}
    # Compared without case: some file systems know no difference.
    taken: set[str] = set()
    for device in devices:
        stem = file_stem(device) or "device"
        name, number = stem, 1
        while name.lower() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.lower())
        names[device] = f"{name}.md"
    return names


def list_gaps(report: Report) -> tuple[Gap, ...]:
    """Return everything that was not run or failed, failures first, one entry per reason."""
    subjects: dict[tuple[str, str], list[str]] = {}

    def add(outcome: str, reason: str | None, subject: str) -> None:
        found = subjects.setdefault((outcome, reason or "no reason given"), [])
        if subject not in found:
            found.append(subject)

    for row in report.artifacts:
        detail = tell_apart(report.artifacts, row)
        name = f"{row.runtime} {row.scheme}" + (f" ({detail})" if detail else "")
        if row.accuracy.outcome != "measured":
            add(row.accuracy.outcome, row.accuracy.reason, f"{name}: accuracy")
        for latency in row.latency:
            if latency.outcome != "measured":
                add(latency.outcome, latency.reason, f"{name}: latency on {latency.device}")
    for check in report.gate.checks:
        if check.outcome == "not_run":
            add("not_run", check.why, f"gate: {check.name}")
    order = sorted(subjects, key=lambda key: key[0] != "failed")
    return tuple(
        Gap(outcome=outcome, reason=reason, subjects=tuple(subjects[outcome, reason]))
        for outcome, reason in order
    )


def list_timings(report: Report) -> tuple[Timing, ...]:
    """Return every latency of a report, by device, with the float artifact's beside it."""
    twins = {id(pair.row): pair.float_row for pair in pair_up(report.artifacts) if pair.row}
    timings = []
    for row in report.artifacts:
        for latency in row.latency:
            twin = twins.get(id(row))
            same = [
                one
                for one in (twin.latency if twin else ())
                if (one.device, one.threads) == (latency.device, latency.threads)
            ]
            timings.append(Timing(row=row, latency=latency, base=next(iter(same), None)))
    devices = list(dict.fromkeys(timing.latency.device for timing in timings))
    return tuple(sorted(timings, key=lambda timing: devices.index(timing.latency.device)))


# --- the pages ------------------------------------------------------------------------------------


class _Verbatim(str):
    """Text that enters a page as it is, because whoever made it has escaped what is in it."""

    __slots__ = ()

    def __html__(self) -> str:
        return str(self)


def _verbatim(svg: str | None) -> _Verbatim | None:
    # matplotlib has escaped every label in it.
    return None if svg is None else _Verbatim(svg)


def _index(report: Report) -> str:
    trade, agreement = draw_charts(report)
    page = _environment().get_template("index.html.j2")
    return page.render(
        report=report,
        verdict=_verdict(report.gate),
        waits=[one for one in list_timings(report) if contention(one.latency) is not None],
        trade=[(chart, _verbatim(chart.svg)) for chart in trade],
        agreement=[(chart, _verbatim(chart.svg)) for chart in agreement],
        timings=list_timings(report),
        device_pages=_device_files(report),
        gaps=list_gaps(report),
        detail=functools.partial(tell_apart, report.artifacts),
        calibration_says=sentences(report.calibration) if report.calibration else (),
        calibration_page=CALIBRATION,
        tuning_says=tuning.sentences(report.tuning) if report.tuning else (),
        precision_page=PRECISION,
        training_says=training.sentences(report.training) if report.training else (),
        training_page=TRAINING,
        layout_says=layouts.sentence,
        breakdown=_verbatim(breakdowns.draw(report.breakdowns)),
        breakdown_says=breakdowns.sentences,
        breakdown_rows=breakdowns.rows,
    )


def _verdict(gate: Gate) -> str:
    missing = sum(check.outcome == "not_run" for check in gate.checks)
    if gate.outcome == "pass" and missing:
        return f"{missing} of {len(gate.checks)} checks were not run; all others pass."
    return _VERDICTS[gate.outcome]


def _calibration_page(report: Report, calibration: Calibration) -> str:
    sites = calibration.sites
    wide, narrow = draw_sites(calibration)
    places = {site.site: place for place, site in enumerate(sites, start=1)}
    page = _environment().get_template("calibration.html.j2")
    return page.render(
        report=report,
        calibration=calibration,
        sentences=sentences(calibration),
        median=median_db(sites),
        margin=MARGIN_DB,
        culprits=culprits(sites),
        beyond=beyond(sites),
        wide=_verbatim(wide),
        narrow=_verbatim(narrow),
        rows=[(site, places[site.site]) for site in worst_first(sites)],
    )


def _precision_page(report: Report, found: Tuning) -> str:
    page = _environment().get_template("precision.html.j2")
    return page.render(
        report=report,
        tuning=found,
        chosen=tuning.chosen_of(found),
        sentences=tuning.sentences(found),
        chart=_verbatim(tuning.draw_front(found)),
        layers=tuning.rows(found, "layer"),
        blocks=tuning.rows(found, "block"),
        quantity=tuning.quantity,
    )


def _training_page(report: Report, found: Training) -> str:
    page = _environment().get_template("training.html.j2")
    return page.render(
        report=report,
        training=found,
        sentences=training.sentences(found),
        settings=training.settings(found),
        points=training.rows(found),
        chart=_verbatim(training.draw_curves(found)) if found.curve else None,
    )


def _device_page(report: Report, device: str, timings: tuple[Timing, ...]) -> str:
    done = [timing for timing in timings if timing.latency.outcome == "measured"]
    measured = [timing for timing in done if timing.latency.instructions is None]
    waits = [timing for timing in measured if contention(timing.latency) is not None]
    page = _environment(markdown=True).get_template("device.md.j2")
    return page.render(
        report=report,
        device=device,
        described=report.device(device),
        measured=measured,
        counted=[timing for timing in done if timing.latency.instructions is not None],
        states=_states(done),
        parity=[row for row in report.parity if row.device == device],
        missing=[timing for timing in timings if timing.latency.outcome != "measured"],
        waits=waits,
        detail=functools.partial(tell_apart, report.artifacts),
        limit=CONTENTION,
    )


def _states(timings: Sequence[Timing]) -> list[tuple[str, str, DeviceState]]:
    """Return how a device stood before and after each runtime's samples, where it tells."""
    found: dict[tuple[str, str], DeviceState] = {}
    for timing in timings:
        for when, state in (("before", timing.latency.before), ("after", timing.latency.after)):
            if state is not None:
                found.setdefault((timing.row.runtime, when), state)
    return [(runtime, when, state) for (runtime, when), state in found.items()]


def _environment(*, markdown: bool = False) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    if markdown:
        # Every expression of a Markdown page passes through, so none can be forgotten.
        environment.finalize = escape_markdown
    environment.filters |= {
        "ms": lambda value: _DASH if value is None else milliseconds(value),
        "pct": lambda value: _number(value, 100, 2, " %"),
        "pp": _points,
        "db": lambda value: _number(value, 1, 1, " dB"),
        "mb": lambda value: _number(value, 1e-6, 1, " MB"),
        "mj": lambda value: _number(value, 1, 1, " mJ"),
        "times": lambda value: _number(value, 1, 2, "×"),
        "exponent": lambda value: _DASH if value is None else f"{value:.0e}",
        "plain": lambda value: _DASH if value is None else f"{value:.6g}",
        "share": share,
        "word": word,
        "placed": layouts.placed,
        "human": _human,
        "largest": lambda counts: sorted(counts.items(), key=lambda item: -item[1])[:_SYMBOLS],
        "count": lambda value: _DASH if value is None else f"{value:,}",
        "slot": slot_of,
        "contention": contention,
        "wall_over_cpu": wall_over_cpu,
    }
    environment.globals |= {"dash": _DASH, "minimum_samples": MINIMUM_SAMPLES}
    return environment


def escape_markdown(value: object) -> str:
    """Return a value as Markdown text for a table's cell: one line, and nothing in it is markup."""
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~])", r"\\\1", text)
    # Inside a word an underscore is only itself.
    return _Verbatim(re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text))


def share(value: float) -> str:
    """Write a share of values in per cent; one that is small but not zero never looks like zero."""
    if 0 < value < SMALLEST_SHARE:
        return f"<{SMALLEST_SHARE * 100:g} %"
    return f"{value * 100:.2f} %"


def word(value: object) -> str:
    """Return a setting as a person says it: yes and no for booleans."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _number(value: float | None, factor: float, digits: int, unit: str) -> str:
    return _DASH if value is None else f"{value * factor:.{digits}f}{unit}"


def _points(value: float | None) -> str:
    if value is None:
        return _DASH
    # A true minus sign is as wide as the plus; a rounded zero has no sign.
    return f"{value:+.2f}".replace("-", "−") if round(value, 2) else "0.00"


def _human(value: float) -> str:
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:g}"
