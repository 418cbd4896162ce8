"""Two run folders' latencies beside each other: what changed, and by how much.

In: two run folders, the earlier one first. Out: a `Change` for every artifact that both measured
on the same device. A change is one where a rank test says so AND its factor is large enough to
matter: of enough samples every difference is significant, and of few every factor is large.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pydantic import TypeAdapter, ValidationError
from rich.table import Table

from pipeline.benchmark import PER_ROUND
from pipeline.errors import ArtifactError
from pipeline.statistics import change
from reports.document import read_report
from reports.terminal import print_whole
from targets.base import Samples

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rich.console import Console

    from pipeline.records import Latency
    from reports.document import ArtifactRow, Report

SIGNIFICANT = 0.01
SMALLEST_TIME_FACTOR, SMALLEST_COUNT_FACTOR = 1.05, 1.01
"""Below it a difference does not matter: of times, of counted instructions."""

Verdict = Literal["faster", "slower", "no change shown", "not comparable"]
Clock = Literal["wall", "cpu"]

_SHOWN = 12
"""Of a version that is a hash."""
_SAMPLES = TypeAdapter(list[Samples])


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What became of one artifact on one device; times in milliseconds, or counts.

    Attributes:
        device: Where.
        threads: As measured.
        runtime: The artifact's.
        scheme: The artifact's.
        unit: `wall ms`, `cpu ms` or `instructions`.
        before: Median of the earlier run; None where it has none.
        after: Of the later one.
        factor: After over before.
        ci95: Of the factor; None of counts, which repeat.
        p_value: Of the rank test; None of counts.
        verdict: What follows.
        why: In words.
    """

    device: str
    threads: int | None
    runtime: str
    scheme: str
    unit: str
    before: float | None
    after: float | None
    factor: float | None
    ci95: tuple[float, float] | None
    p_value: float | None
    verdict: Verdict
    why: str


def compare_runs(before: Path, after: Path, clock: Clock) -> list[Change]:
    """Compare the latencies of two run folders.

    Args:
        before: The earlier run folder.
        after: The later one.
        clock: Which time counts.

    Raises:
        ArtifactError: A folder has no report, or its raw samples are damaged.
    """
    old, new = read_report(before), read_report(after)
    known = {
        (row.runtime, row.scheme, one.device, one.threads): (row, one)
        for row in old.artifacts
        for one in row.latency
    }
    found = []
    for row in new.artifacts:
        for one in row.latency:
            was = known.pop((row.runtime, row.scheme, one.device, one.threads), None)
            if was is None and one.outcome == "measured":
                found.append(_lone(row, one, "the earlier run has no such row", clock))
            if was is not None and "measured" in {one.outcome, was[1].outcome}:
                unlike = _unlike((old, *was), (new, row, one))
                said = _changed((before, was[1]), (after, one), (was[0], row), unlike, clock)
                others = _other_versions((old, was[1]), (new, one))
                found.append(replace(said, why="; ".join((said.why, *others))))
    lost = (was for was in known.values() if was[1].outcome == "measured")
    return found + [_lone(*was, "the later run has no such row", clock) for was in lost]


def _lone(row: ArtifactRow, one: Latency, why: str, clock: Clock) -> Change:
    """Return what is said of an artifact and device that one of the runs does not have."""
    return Change(
        device=one.device,
        threads=one.threads,
        runtime=row.runtime,
        scheme=row.scheme,
        unit="instructions" if one.instructions is not None else f"{clock} ms",
        before=None,
        after=None,
        factor=None,
        ci95=None,
        p_value=None,
        verdict="not comparable",
        why=why,
    )


def _unlike(
    old: tuple[Report, ArtifactRow, Latency], new: tuple[Report, ArtifactRow, Latency]
) -> str | None:
    """Say why two measurements cannot be compared."""
    (before, was, then), (after, row, now) = old, new
    for one, when in ((then, "earlier"), (now, "later")):
        if one.outcome != "measured":
            return f"the {when} run did not measure it: {one.reason}"
    if then.kind == "host" and before.host.cpu != after.host.cpu:
        return f"measured on {before.host.cpu} and on {after.host.cpu}"
    earlier, later = before.device(then.device), after.device(now.device)
    if earlier and later:
        old_board, board = (one.hardware or one.description for one in (earlier, later))
        if old_board != board:
            return f"{now.device} was {old_board}, and is {board}"
    if before.model.input_size != after.model.input_size or was.batch != row.batch:
        return "the inputs have other shapes"
    return None


def _other_versions(old: tuple[Report, Latency], new: tuple[Report, Latency]) -> list[str]:
    """Name what ran there in another version."""
    was, now = _versions(*old), _versions(*new)
    return [
        f"{name} {was[name][:_SHOWN]} then, {now[name][:_SHOWN]} now"
        for name in sorted(was.keys() & now.keys())
        if was[name] != now[name]
    ]


def _versions(report: Report, one: Latency) -> dict[str, str]:
    described = report.device(one.device)
    return (described.versions if described else {}) | (one.versions or {})


def _changed(
    old: tuple[Path, Latency],
    new: tuple[Path, Latency],
    rows: tuple[ArtifactRow, ArtifactRow],
    unlike: str | None,
    clock: Clock,
) -> Change:
    (_, then), (_, now), (was_row, row) = old, new, rows
    counted = now.instructions is not None and then.instructions is not None
    was, is_ = (
        (then.instructions, now.instructions)
        if counted
        else (then.cpu_p50_ms, now.cpu_p50_ms)
        if clock == "cpu"
        else (then.wall_p50_ms, now.wall_p50_ms)
    )
    factor, ci95, p_value = (is_ / was if was and is_ else None), None, None
    verdict: Verdict = "not comparable"
    why = unlike or "one of the runs has too few samples"
    if unlike is None and counted and factor is not None:
        verdict, why = _word(factor, SMALLEST_COUNT_FACTOR), "counts repeat: no test is needed"
    elif unlike is None and not counted:
        raw = [_raw(folder, one, row, clock) for folder, one in (old, new)]
        if (tested := change(*raw, per_round=PER_ROUND)) is not None:
            factor, ci95, p_value = tested
            verdict, why = _tested(factor, ci95, p_value)
            if was_row.sha256 == row.sha256 and verdict in {"faster", "slower"}:
                why += "; the file is the same, so it is the machine or the runtime"
    return Change(
        device=now.device,
        threads=now.threads,
        runtime=row.runtime,
        scheme=row.scheme,
        unit="instructions" if counted else f"{clock} ms",
        before=was,
        after=is_,
        factor=factor,
        ci95=ci95,
        p_value=p_value,
        verdict=verdict,
        why=why,
    )


def _tested(factor: float, ci95: tuple[float, float], p_value: float) -> tuple[Verdict, str]:
    if p_value >= SIGNIFICANT:
        return "no change shown", f"p = {p_value:.2g}: it may be noise"
    if ci95[0] <= 1 <= ci95[1]:
        return "no change shown", f"p = {p_value:.2g}, but the factor's interval contains 1"
    word = _word(factor, SMALLEST_TIME_FACTOR)
    if word == "no change shown":
        return word, f"p = {p_value:.2g}, but a factor below {SMALLEST_TIME_FACTOR}"
    return word, f"p = {p_value:.2g}, and a factor of more than {SMALLEST_TIME_FACTOR}"


def _word(factor: float, smallest: float) -> Verdict:
    if factor > smallest:
        return "slower"
    return "faster" if factor < 1 / smallest else "no change shown"


def _raw(folder: Path, one: Latency, row: ArtifactRow, clock: Clock) -> tuple[float, ...]:
    """Return the raw samples behind a latency."""
    file = folder / (one.samples_file or "")
    try:
        rows = _SAMPLES.validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        raise ArtifactError(
            f"{file} holds no raw samples ({type(error).__name__})",
            allowed="the samples that `convnext-edge bench` wrote beside its report",
            do="Run `convnext-edge bench` on that folder again",
        ) from error
    times: Iterator[tuple[float, ...]] = (
        item.cpu_ms if clock == "cpu" else item.wall_ms for item in rows if item.label == row.scheme
    )
    return next(times, ())


def _threads(count: int | None) -> str:
    return "" if count is None else f"{count} thread{'s' if count != 1 else ''}"


def show(changes: list[Change], console: Console) -> None:
    """Print the changes as a table."""
    table = Table("artifact", "device", "before", "after", "factor", "95 %", "verdict", "why")
    for one in changes:
        form = ",.0f" if one.unit == "instructions" else ",.4g"
        times = ["—" if v is None else format(v, form) for v in (one.before, one.after)]
        table.add_row(
            f"{one.runtime} {one.scheme}",
            ", ".join(filter(None, (one.device, _threads(one.threads)))),
            *times,
            "—" if one.factor is None else f"{one.factor:.3f}",
            "—" if one.ci95 is None else f"{one.ci95[0]:.3f} to {one.ci95[1]:.3f}",
            one.verdict,
            one.why,
        )
    print_whole(table, console)
