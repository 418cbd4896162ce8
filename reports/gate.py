"""The gate: budgets against a report, with the statistics behind each answer.

In: a `Report`, a `Budget` and, where there is one, the accepted baseline's report. Out: a `Gate`:
pass, fail, or inconclusive when the interval straddles the limit, saying how many images would
decide. What was not run never passes: it is not_run, or fails where the budget requires it.
"""

from __future__ import annotations

import base64
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from pipeline.statistics import (
    images_to_decide,
    paired_difference_interval,
    proportion_interval,
)
from reports import device_checks
from reports.document import Check, CheckOutcome, Gate, Report
from reports.layouts import ships_float, without_integers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from pipeline.recipe import BaselineBudget, Budget
    from pipeline.records import Accuracy, Agreement, Latency, Proof
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
        *_answered("max_drop_pp", budget.max_drop_pp, partial(_drops, report)),
        *_answered("max_size_ratio", budget.max_size_ratio, partial(_sizes, report)),
        *_answered(
            "max_latency_ratio",
            budget.max_latency_ratio,
            partial(_ratios, report, "latency", budget.clock),
        ),
        *_answered(
            "faster_than_float",
            1.0 if budget.faster_than_float else None,
            partial(_ratios, report, "is no slower than float", budget.clock),
        ),
        *(
            check
            for name, read in _COUNTS.items()
            for check in _answered(
                name, getattr(budget, name), partial(_counts, report, name, read)
            )
        ),
        *_answered(
            "max_instruction_ratio",
            budget.max_instruction_ratio,
            partial(device_checks.instruction_ratios, report),
        ),
        *_answered(
            "min_device_agreement",
            budget.min_device_agreement,
            partial(device_checks.parities, report),
        ),
        *_agreements(report, budget),
        *_against_baseline(report, budget.baseline, baseline, budget.clock),
    ]
    return Gate(outcome=_word(checks), checks=tuple(checks))


def _word(checks: Sequence[Check]) -> CheckOutcome:
    """Sum up. A not_run check neither passes nor fails: `require` decides whether it may be one."""
    outcomes = {check.outcome for check in checks}
    ranked: tuple[CheckOutcome, ...] = ("fail", "inconclusive", "pass")
    return next((outcome for outcome in ranked if outcome in outcomes), "not_run")


def _judged(report: Report) -> list[ArtifactRow]:
    """Return the artifacts that are held against the float ones."""
    return [row for row in report.artifacts if row.scheme != "float"]


def _required(report: Report, budget: Budget) -> Iterator[Check]:
    for runtime in budget.require:
        reasons = list(_missing(report, budget, runtime))
        yield Check(
            name=f"{runtime} measured",
            outcome="fail" if reasons else "pass",
            value=None,
            limit=None,
            why="; ".join(reasons)
            or f"what it ships was {_how(report, runtime)}, as this budget needs it",
        )


def _how(report: Report, runtime: str) -> str:
    kinds = {row.accuracy.kind for row in report.artifacts if row.runtime == runtime}
    return "interpreted" if "interpreted" in kinds else "run"


def _missing(report: Report, budget: Budget, runtime: str) -> Iterator[str]:
    """Say what the budget needs of a required runtime and the report does not have."""
    rows = [row for row in _judged(report) if row.runtime == runtime]
    if not rows and runtime in _float_shipped(report):
        # Integers were measured and are not faster: what is shipped is judged.
        rows = [row for row in report.artifacts if row.runtime == runtime]
    if not rows:
        yield "the report has no quantized artifact of it"
    timed = (
        budget.faster_than_float or budget.max_latency_ratio or budget.baseline.max_latency_ratio
    )
    for row in rows:
        results: list[Accuracy | Latency] = [row.accuracy]
        times = _times(row)
        if timed and not times:
            yield f"{row.scheme}: no latency"
        elif timed and all(one.outcome != "measured" for one in times):
            # A device that cannot run it does not undo what another has measured.
            results.append(times[0])
        for result in results:
            if result.outcome != "measured":
                yield f"{row.scheme}: {result.outcome}, {result.reason}"


def _answered(
    name: str, limit: float | None, ask: Callable[[float], Iterable[Check]]
) -> Iterator[Check]:
    """Ask for one limit's checks; where none of them was run, the question stays open."""
    if limit is None:
        return
    checks = list(ask(limit))
    yield from checks
    if all(check.outcome == "not_run" for check in checks):
        yield _open(name, limit, "asked, and nothing in the report answers it")


def _drops(report: Report, limit: float) -> Iterator[Check]:
    yield from _of_float(report, "drop", 0.0, limit)
    for row in _judged(report):
        name, result = f"{row.runtime} {row.scheme} drop", row.accuracy
        if result.lost is None or result.gained is None or result.n is None:
            yield _unmeasured(name, limit, result)
        else:
            against = "the float model"
            yield paired_check(name, result.lost, result.gained, result.n, limit, against)


def _sizes(report: Report, limit: float) -> Iterator[Check]:
    floats = {row.runtime: row for row in report.artifacts if row.scheme == "float"}
    yield from _of_float(report, "size", 1.0, limit)
    for row in _judged(report):
        name = f"{row.runtime} {row.scheme} size"
        yield _size(name, row, floats.get(row.runtime), limit, "float")


def _ratios(report: Report, what: str, clock: str, limit: float) -> Iterator[Check]:
    """Ask how long what is shipped in integers takes of float's time."""
    yield from _of_float(report, what, 1.0, limit)
    floats = {row.runtime: row.latency for row in report.artifacts if row.scheme == "float"}
    for row in _judged(report):
        name = f"{row.runtime} {row.scheme} {what}"
        times = _times(row)
        for latency in times:
            base = _beside(latency, floats.get(row.runtime, ()))
            if latency.outcome == "measured" and base is not None and base.outcome == "failed":
                base = replace(base, reason=f"its float artifact, {base.reason}")
                yield _unmeasured(f"{name} on {latency.device}", limit, base)
            else:
                yield _latency(f"{name} on {latency.device}", latency, limit, clock)
        if not times and any(one.instructions is not None for one in row.latency):
            counted = "its instructions were counted, and these are no times"
            yield _not_run(name, limit, f"{counted}: max_instruction_ratio asks for them")


def _beside(latency: Latency, others: Iterable[Latency]) -> Latency | None:
    """Return the one of the same device and threads."""
    where = (latency.device, latency.threads)
    return next((one for one in others if (one.device, one.threads) == where), None)


def _times(row: ArtifactRow) -> list[Latency]:
    """Return the latencies of an artifact that are, or were to be, times."""
    return [latency for latency in row.latency if not device_checks.is_counted(latency)]


def _float_shipped(report: Report) -> dict[str, str]:
    """Return the runtimes that ship float because integers are not faster there, and why."""
    has = {row.runtime for row in report.artifacts if row.scheme == "float"}
    shipped = (one for one in report.layouts if ships_float(one) and one.runtime in has)
    return {one.runtime: f"float is shipped: {one.reason}" for one in shipped}


def _of_float(report: Report, what: str, value: float, limit: float) -> Iterator[Check]:
    """Answer for the runtimes that ship float, which is to float what it is."""
    for runtime, why in _float_shipped(report).items():
        outcome: CheckOutcome = "pass" if value <= limit else "fail"
        name = f"{runtime} {what}"
        yield Check(name=name, outcome=outcome, value=value, limit=limit, why=why)


_COUNTS: dict[str, Callable[[Proof], float | None]] = {
    "max_transposes_per_block": lambda proof: proof.transposes_per_block,
    "max_quantize_ops_per_block": lambda proof: proof.quantize_ops_per_block,
    "max_fallback_ops_per_block": lambda proof: proof.fallback_ops_per_block,
    "max_float_layers": lambda proof: proof.weighted_layers - proof.integer_layers,
}
"""Limits on what a proof counts, by their keys in a budget."""


def _counts(
    report: Report, key: str, read: Callable[[Proof], float | None], limit: float
) -> Iterator[Check]:
    what, floats = key.removeprefix("max_").replace("_", " "), _float_shipped(report)
    shipped = (row for row in report.artifacts if row.scheme == "float" and row.runtime in floats)
    for row in (*_judged(report), *shipped):
        name = f"{row.runtime} {row.scheme} {what}"
        if row.proof is None:
            yield _not_run(name, limit, "the report has no proof of it")
            continue
        value = read(row.proof)
        if value is None:
            yield _not_run(name, limit, f"{row.runtime} does not tell: {row.proof.method}")
            continue
        outcome: CheckOutcome = "pass" if value <= limit else "fail"
        why = f"{value:g} counted, {limit:g} allowed: {row.proof.method}"
        yield Check(name=name, outcome=outcome, value=value, limit=limit, why=why)


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
        return _unmeasured(name, limit, latency)
    low, high = interval
    outcome: CheckOutcome = "pass" if high <= limit else "fail" if low > limit else "inconclusive"
    why = (
        f"{clock} time over float, 95 % interval {low:.3f} to {high:.3f} "
        f"({latency.n} samples each, alternating)"
    )
    return Check(name=name, outcome=outcome, value=value, limit=limit, why=why)


def _agreements(report: Report, budget: Budget) -> Iterator[Check]:
    limits = (budget.min_agreement, budget.min_agreement_across_profiles)
    if limits == (None, None):
        return
    rows = [row for row in report.agreement if row.scheme != "float"]
    floats = [
        f"{one.runtime} ships {one.scheme}" for one in report.layouts if without_integers(one)
    ]
    if not rows and floats:
        yield _not_run("agreement", None, " and ".join(floats))
    elif not rows:
        yield _open("agreement", None, "asked, and no two quantized artifacts were run")
    for row in rows:
        same = row.profile_a == row.profile_b
        limit = limits[0] if same else limits[1]
        if limit is not None:
            yield _agreement(row, limit)
        else:
            word = "min_agreement" if same else "min_agreement_across_profiles"
            yield _not_run(f"{row.a} and {row.b} agree", None, f"the budget has no {word}")


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
    asked = [
        budget.max_drop_pp,
        budget.max_latency_ratio,
        budget.max_size_ratio,
        budget.max_instruction_ratio,
    ]
    if all(limit is None for limit in asked):
        return
    if baseline is None:
        why = "no baseline: store one with `convnext-edge gate RUN_DIR --accept`"
        yield _open("baseline", None, why)
        return
    before = {(row.runtime, row.scheme): row for row in baseline.artifacts}
    for runtime, why in _float_shipped(report).items():
        if any(row.runtime == runtime for row in _judged(baseline)):
            label = f"{runtime} against baseline"
            yield _open(label, None, f"{why}; the baseline has integers: accept a new one")
    for row in _judged(report):
        label = f"{row.runtime} {row.scheme} against baseline"
        base = before.get((row.runtime, row.scheme))
        if base is None:
            yield _open(label, None, "the baseline has no such artifact: accept a new one")
            continue
        if budget.max_drop_pp is not None:
            same = _same_images(report, baseline)
            yield _baseline_drop(f"{label}: drop", row, base, budget.max_drop_pp, same=same)
        if budget.max_size_ratio is not None:
            yield _size(f"{label}: size", row, base, budget.max_size_ratio, "the baseline")
        if budget.max_instruction_ratio is not None:
            yield from device_checks.instruction_growth(
                label, row, base, budget.max_instruction_ratio
            )
        if budget.max_latency_ratio is not None:
            limit, name = budget.max_latency_ratio, f"{label}: latency"
            if (unlike := _incomparable(report, baseline, row, base)) is None:
                yield from _baseline_latency(name, row, base, limit, clock)
            else:
                yield _open(name, limit, unlike)


def _incomparable(
    report: Report, baseline: Report, row: ArtifactRow, base: ArtifactRow
) -> str | None:
    """Say why two artifacts' int8 / float ratios cannot be held against each other."""
    if report.host.cpu != baseline.host.cpu or row.profile != base.profile:
        return "the baseline was measured on another CPU or profile"
    floats = (_float_of(baseline, row.runtime), _float_of(report, row.runtime))
    if len({one.graph_form for one in floats if one is not None}) > 1:
        return "the baseline's float artifact has another graph form"
    return None


def _float_of(report: Report, runtime: str) -> ArtifactRow | None:
    rows = (row for row in report.artifacts if row.scheme == "float" and row.runtime == runtime)
    return next(rows, None)


def _same_images(report: Report, baseline: Report) -> bool:
    """Tell by hash: where the images lie may differ between machines."""
    now, before = report.data.evaluation, baseline.data.evaluation
    return now is not None and before is not None and now.sha256 == before.sha256


def _baseline_drop(
    name: str, row: ArtifactRow, base: ArtifactRow, limit: float, *, same: bool
) -> Check:
    now, before = row.accuracy.correct_bits, base.accuracy.correct_bits
    if now is None:
        return _unmeasured(name, limit, row.accuracy)
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
) -> Iterator[Check]:
    """Compare int8 / float ratios: they hold between busy and quiet hours, milliseconds do not."""
    accepted = {(one.device, one.threads): one for one in base.latency}
    answered = False
    for now in _times(row):
        before = accepted.get((now.device, now.threads))
        if now.outcome == "failed":
            answered = True
            yield _unmeasured(f"{name} on {now.device}", limit, now)
        elif before is not None:
            check = _growth(f"{name} on {now.device}", now, before, limit, clock)
            answered = answered or check is not None
            yield from [check] if check is not None else []
    if not answered:
        unmeasured = [one for one in _times(row) if one.outcome != "measured"]
        if unmeasured and len(unmeasured) == len(_times(row)):
            yield _unmeasured(name, limit, unmeasured[0])
        else:
            told = any(_ratio(one, clock)[0] is not None for one in _times(row))
            why = "the baseline has no latency on this device: accept a new one"
            yield _open(name, limit, why if told else f"no ratio to float by {clock} time")


def _growth(name: str, now: Latency, before: Latency, limit: float, clock: str) -> Check | None:
    """Compare one device's ratios; None where one of them was not measured."""
    ratio, interval = _ratio(now, clock)
    ratio_before, interval_before = _ratio(before, clock)
    if ratio is None or interval is None or ratio_before is None or interval_before is None:
        return None
    low, high = interval[0] / interval_before[1], interval[1] / interval_before[0]
    outcome: CheckOutcome = "pass" if high <= limit else "fail" if low > limit else "inconclusive"
    why = (
        f"int8 / float {clock} time {ratio:.3f} on {now.device}, {ratio_before:.3f} in the "
        f"baseline; interval of the ratio {low:.3f} to {high:.3f}"
    )
    value = ratio / ratio_before
    return Check(name=name, outcome=outcome, value=value, limit=limit, why=why)


def _ratio(latency: Latency, clock: str) -> tuple[float | None, tuple[float, float] | None]:
    if clock == "cpu":
        return latency.cpu_ratio, latency.cpu_ratio_ci95
    return latency.wall_ratio, latency.wall_ratio_ci95


def _not_run(name: str, limit: float | None, reason: str | None) -> Check:
    why = reason or "not measured"
    return Check(name=name, outcome="not_run", value=None, limit=limit, why=why)


def _unmeasured(name: str, limit: float | None, result: Accuracy | Latency) -> Check:
    """Answer for a result that is not there: what failed fails, what was not run is not_run."""
    if result.outcome == "failed":
        why = f"failed: {result.reason}"
        return Check(name=name, outcome="fail", value=None, limit=limit, why=why)
    return _not_run(name, limit, result.reason)


def _open(name: str, limit: float | None, why: str) -> Check:
    return Check(name=name, outcome="inconclusive", value=None, limit=limit, why=why)
