"""What the gate asks of devices that count instructions, and of what artifacts compute on them.

In: a report, and for growth the accepted one. Out: a check per row. Counts repeat, so they need no
interval; shares of images have one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.statistics import proportion_interval
from reports.document import Check

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipeline.records import Latency, Parity
    from reports.document import ArtifactRow, CheckOutcome, Report


def is_counted(latency: Latency) -> bool:
    """Return whether a device counted instructions there, and took no times."""
    return latency.kind == "emulated"


def instruction_ratios(report: Report, limit: float) -> Iterator[Check]:
    """Ask how many instructions int8 takes for one of float."""
    for row in report.artifacts:
        for latency in row.latency if row.scheme != "float" else ():
            ratio = latency.instruction_ratio
            if is_counted(latency) and ratio is not None:
                why = f"{latency.instructions} instructions, float {latency.float_instructions}"
                name = f"{row.runtime} {row.scheme} instructions on {latency.device}"
                yield _decided(name, ratio, limit, why, good=ratio <= limit)
            elif is_counted(latency):
                yield _without(f"{row.runtime} {row.scheme} instructions", latency, limit)


def instruction_growth(
    label: str, row: ArtifactRow, base: ArtifactRow, limit: float
) -> Iterator[Check]:
    """Ask how many instructions an artifact takes for one of the accepted artifact's.

    Args:
        label: What the checks' names begin with.
        row: The artifact.
        base: The accepted one.
        limit: Largest ratio, such as 1.01.
    """
    before = {one.device: one.instructions for one in base.latency}
    for latency in row.latency:
        if not is_counted(latency):
            continue
        name, was = f"{label}: instructions on {latency.device}", before.get(latency.device)
        if latency.instructions is None:
            yield _without(name, latency, limit)
        elif was is None:
            why = "the baseline counted none on this device: accept a new one"
            yield Check(name=name, outcome="inconclusive", value=None, limit=limit, why=why)
        else:
            ratio = latency.instructions / was
            why = f"{latency.instructions} instructions, {was} in the baseline"
            yield _decided(name, ratio, limit, why, good=ratio <= limit)


def parities(report: Report, limit: float) -> Iterator[Check]:
    """Ask on what share of images a device gives the class that the host gives."""
    for row in report.parity:
        beside = "the reference" if row.against == "reference" else "the host"
        name = f"{row.runtime} {row.scheme} on {row.device} agrees with {beside}"
        share = row.top1_agreement
        if share is None or row.n is None:
            yield _without(name, row, limit)
        else:
            lead = row.largest_flip_margin
            flips = "none differs" if lead is None else f"the largest lead that flips is {lead:.3g}"
            why = f"{row.n} images, {flips}; logits differ by {row.max_abs_logit_diff:.3g} at most"
            low, high = proportion_interval(round(share * row.n), row.n)
            outcome: CheckOutcome = (
                "pass" if low >= limit else "fail" if high < limit else "inconclusive"
            )
            why += f"; 95 % interval {low:.4f} to {high:.4f}"
            yield Check(name=name, outcome=outcome, value=share, limit=limit, why=why)


def _decided(name: str, value: float, limit: float, why: str, *, good: bool) -> Check:
    outcome: CheckOutcome = "pass" if good else "fail"
    return Check(name=name, outcome=outcome, value=value, limit=limit, why=why)


def _without(name: str, row: Latency | Parity, limit: float) -> Check:
    """Answer for what is not there: what failed fails, what was not run is not_run."""
    outcome: CheckOutcome = "fail" if row.outcome == "failed" else "not_run"
    why = f"{row.outcome}: {row.reason}" if row.reason else "nothing was counted"
    return Check(name=name, outcome=outcome, value=None, limit=limit, why=why)
