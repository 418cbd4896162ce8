"""The gate: budgets against a report, with the statistics behind each answer.

In: a `Report`, a `Budget` and, where there is one, the accepted baseline's report. Out: a `Gate`:
pass, fail, or inconclusive when the interval straddles the limit, saying how many images would
decide. What was not run never passes: it is not_run, or fails where the budget requires it.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import numpy as np

from pipeline.statistics import (
    images_to_decide,
    paired_difference_interval,
    proportion_interval,
)
from reports.document import Check, CheckOutcome, Gate, Report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from pipeline.recipe import BaselineBudget, Budget
    from pipeline.records import Accuracy, Agreement, Latency
    from reports.document import ArtifactRow

PER_POINT = 100
"""Percentage points in a whole."""


def judge(report: Report, budget: Budget, baseline: Report | None = None) -> Gate:
    """Ask every question of a budget.

    Args:
        report: The run.
        budget: The limits; what it leaves out is not asked.
        baseline: The accepted run, for the budget's baseline limits.

    Returns:
        The checks and the word: fail where one fails, else inconclusive where one is, else pass
        where one passes, else not_run.
    """
    checks = [
        *_required(report, budget),
        *_against_float(report, budget),
        *_agreements(report, budget),
        *_against_baseline(report, budget.baseline, baseline, budget.clock),
    ]
    return Gate(outcome=_word(checks), checks=tuple(checks))


def _word(checks: Sequence[Check]) -> CheckOutcome:
    """Sum up. A not_run check neither passes nor fails: `require` decides whether it may be one."""
    outcomes = {check.outcome for check in checks}
    ranked: tuple[CheckOutcome, ...] = ("fail", "inconclusive", "pass")
    return next((outcome for outcome in ranked if outcome in outcomes), "not_run")


def _quantized(report: Report) -> list[ArtifactRow]:
    return [row for row in report.artifacts if row.scheme != "float"]


def _required(report: Report, budget: Budget) -> Iterator[Check]:
    for runtime in budget.require:
        reasons = list(_missing(report, budget, runtime))
        yield Check(
            name=f"{runtime} measured",
            outcome="fail" if reasons else "pass",
            value=None,
            limit=None,
            why="; ".join(reasons) or "its quantized artifact was run, as this budget needs it",
        )


def _missing(report: Report, budget: Budget, runtime: str) -> Iterator[str]:
    """Say what the budget needs of a required runtime and the report does not have."""
    rows = [row for row in _quantized(report) if row.runtime == runtime]
    if not rows:
        yield "the report has no quantized artifact of it"
    timed = budget.max_latency_ratio or budget.baseline.max_latency_ratio
    for row in rows:
        results: list[Accuracy | Latency] = [row.accuracy, *(row.latency if timed else ())]
        if timed and not row.latency:
            yield f"{row.scheme}: no latency"
        for result in results:
            if result.outcome != "measured":
                yield f"{row.scheme}: {result.outcome}, {result.reason}"


def _against_float(report: Report, budget: Budget) -> Iterator[Check]:
    floats = {row.runtime: row for row in report.artifacts if row.scheme == "float"}
    for row in _quantized(report):
        label = f"{row.runtime} {row.scheme}"
        if budget.max_drop_pp is not None:
            yield _drop(f"{label} drop", row, budget.max_drop_pp)
        if budget.max_size_ratio is not None:
            base = floats.get(row.runtime)
            yield _size(f"{label} size", row, base, budget.max_size_ratio, "float")
        if budget.max_latency_ratio is not None:
            for latency in row.latency:
                name = f"{label} latency on {latency.device}"
                yield _latency(name, latency, budget.max_latency_ratio, budget.clock)


def _drop(name: str, row: ArtifactRow, limit: float) -> Check:
    result = row.accuracy
    if result.lost is None or result.gained is None or result.n is None:
        return _not_run(name, limit, result.reason)
    return paired_check(name, result.lost, result.gained, result.n, limit, "the float model")


def paired_check(name: str, lost: int, gained: int, n: int, limit_pp: float, against: str) -> Check:
    """Judge a loss of top-1 on paired images by its 95 % interval.

    Args:
        name: Of the check.
        lost: Images only the other gets right.
        gained: Images only this one gets right.
        n: All images.
        limit_pp: Largest loss allowed, in percentage points.
        against: What it is compared with.

    Returns:
        pass where the whole interval lies at or below the limit, fail where it lies above,
        inconclusive between.
    """
    low, high = (PER_POINT * x for x in paired_difference_interval(lost, gained, n))
    interval = f"95 % interval {low:+.2f} to {high:+.2f} points on {n} images against {against}"
    if high <= limit_pp:
        outcome, why = "pass", interval
    elif low > limit_pp:
        outcome, why = "fail", interval
    else:
        more = _more(lambda m: _paired_at(lost, gained, n, m), n, limit_pp / PER_POINT)
        outcome, why = "inconclusive", f"{interval} straddles the limit: {more}"
    value = PER_POINT * (lost - gained) / n
    return Check(name=name, outcome=outcome, value=value, limit=limit_pp, why=why)


def _size(name: str, row: ArtifactRow, base: ArtifactRow | None, limit: float, of: str) -> Check:
    if base is None:
        return _not_run(name, limit, f"no {of} artifact of {row.runtime} to compare with")
    value = row.size_bytes / base.size_bytes
    why = f"{row.size_bytes} bytes against {base.size_bytes} of {of}"
    return Check(
        name=name, outcome="pass" if value <= limit else "fail", value=value, limit=limit, why=why
    )


def _latency(name: str, latency: Latency, limit: float, clock: str) -> Check:
    value, interval = _ratio(latency, clock)
    if value is None or interval is None:
        return _not_run(name, limit, latency.reason)
    low, high = interval
    outcome: CheckOutcome = "pass" if high <= limit else "fail" if low > limit else "inconclusive"
    why = (
        f"{clock} time over float, 95 % interval {low:.3f} to {high:.3f} "
        f"({latency.n} samples each, alternating)"
    )
    return Check(name=name, outcome=outcome, value=value, limit=limit, why=why)


def _agreements(report: Report, budget: Budget) -> Iterator[Check]:
    for row in report.agreement:
        if row.scheme == "float":
            continue
        same = row.profile_a == row.profile_b
        limit = budget.min_agreement if same else budget.min_agreement_across_profiles
        if limit is not None:
            yield _agreement(row, limit)


def _agreement(row: Agreement, limit: float) -> Check:
    hits = round(row.top1_agreement * row.n)
    low, high = proportion_interval(hits, row.n)
    why = f"95 % interval {low:.4f} to {high:.4f} on {row.n} images"
    outcome: CheckOutcome = "pass" if low >= limit else "fail" if high < limit else "inconclusive"
    if outcome == "inconclusive":
        rate = hits / row.n
        more = _more(lambda m: proportion_interval(round(rate * m), m), row.n, limit)
        why = f"{why} straddles the limit: {more}"
    return Check(
        name=f"{row.a} and {row.b} agree ({row.scheme}, {row.profile_a}/{row.profile_b})",
        outcome=outcome,
        value=row.top1_agreement,
        limit=limit,
        why=why,
    )


def _paired_at(lost: int, gained: int, n: int, m: int) -> tuple[float, float]:
    """Return the interval that `m` images would give at the rates of `n`."""
    more_lost = min(round(lost * m / n), m)
    more_gained = min(round(gained * m / n), m - more_lost)
    return paired_difference_interval(more_lost, more_gained, m)


def _more(interval: Callable[[int], tuple[float, float]], n: int, limit: float) -> str:
    needed = images_to_decide(interval, n, limit)
    return f"about {needed} images would decide" if needed else "no feasible number decides"


def _against_baseline(
    report: Report, budget: BaselineBudget, baseline: Report | None, clock: str
) -> Iterator[Check]:
    asked = [budget.max_drop_pp, budget.max_latency_ratio, budget.max_size_ratio]
    if all(limit is None for limit in asked):
        return
    if baseline is None:
        reason = "no baseline: store one with `convnext-edge gate RUN_DIR --accept`"
        yield _open("baseline", None, reason)
        return
    before = {(row.runtime, row.scheme): row for row in baseline.artifacts}
    for row in _quantized(report):
        label = f"{row.runtime} {row.scheme} against baseline"
        base = before.get((row.runtime, row.scheme))
        if base is None:
            yield _open(label, None, "the baseline has no such artifact: accept a new one")
            continue
        if budget.max_drop_pp is not None:
            same = report.data.evaluation == baseline.data.evaluation
            yield _baseline_drop(f"{label}: drop", row, base, budget.max_drop_pp, same=same)
        if budget.max_size_ratio is not None:
            yield _size(f"{label}: size", row, base, budget.max_size_ratio, "the baseline")
        if budget.max_latency_ratio is not None:
            yield _baseline_latency(f"{label}: latency", row, base, budget.max_latency_ratio, clock)


def _baseline_drop(
    name: str, row: ArtifactRow, base: ArtifactRow, limit: float, *, same: bool
) -> Check:
    now, before = row.accuracy.correct_bits, base.accuracy.correct_bits
    if now is None:
        return _not_run(name, limit, row.accuracy.reason)
    if before is None:
        return _open(name, limit, f"the baseline did not measure it: {base.accuracy.reason}")
    if not same or row.accuracy.n is None:
        reason = "the baseline was evaluated on other images: accept a new one"
        return _open(name, limit, reason)
    right_now, right_before = (_unpacked(bits, row.accuracy.n) for bits in (now, before))
    lost = int((right_before & ~right_now).sum())
    gained = int((right_now & ~right_before).sum())
    return paired_check(name, lost, gained, row.accuracy.n, limit, "the baseline")


def _unpacked(bits: str, n: int) -> NDArray[np.bool_]:
    raw = np.frombuffer(base64.b64decode(bits), np.uint8)
    return np.unpackbits(raw, count=n).astype(bool)


def _baseline_latency(
    name: str, row: ArtifactRow, base: ArtifactRow, limit: float, clock: str
) -> Check:
    """Compare int8 / float ratios: they hold between machines and hours, milliseconds do not."""
    pairs = [
        (now, before)
        for now in row.latency
        for before in base.latency
        if now.device == before.device
    ]
    for now, before in pairs:
        ratio, interval = _ratio(now, clock)
        ratio_before, interval_before = _ratio(before, clock)
        if ratio is None or interval is None or ratio_before is None or interval_before is None:
            continue
        low, high = interval[0] / interval_before[1], interval[1] / interval_before[0]
        outcome: CheckOutcome = (
            "pass" if high <= limit else "fail" if low > limit else "inconclusive"
        )
        why = (
            f"int8 / float {clock} time {ratio:.3f} on {now.device}, {ratio_before:.3f} in the "
            f"baseline; interval of the ratio {low:.3f} to {high:.3f}"
        )
        value = ratio / ratio_before
        return Check(name=name, outcome=outcome, value=value, limit=limit, why=why)
    if all(latency.outcome != "measured" for latency in row.latency):
        return _not_run(name, limit, next((x.reason for x in row.latency), None))
    return _open(name, limit, "the baseline has no latency on this device: accept a new one")


def _ratio(latency: Latency, clock: str) -> tuple[float | None, tuple[float, float] | None]:
    if clock == "cpu":
        return latency.cpu_ratio, latency.cpu_ratio_ci95
    return latency.wall_ratio, latency.wall_ratio_ci95


def _not_run(name: str, limit: float | None, reason: str | None) -> Check:
    why = reason or "not measured"
    return Check(name=name, outcome="not_run", value=None, limit=limit, why=why)


def _open(name: str, limit: float | None, why: str) -> Check:
    return Check(name=name, outcome="inconclusive", value=None, limit=limit, why=why)
