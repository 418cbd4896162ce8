"""The gate's word for machines and pull requests.

In: a `Report` with its gate. Out: JUnit XML, and a Markdown summary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite

if TYPE_CHECKING:
    from pipeline.records import Accuracy
    from reports.document import Check, Gate, Report

MISSING = "—"
NOTHING_JUDGED = "Nothing was judged: there is no budget, or nothing was measured yet."
WORDS = {
    "pass": "✅ pass",
    "fail": "❌ fail",
    "inconclusive": "❓ inconclusive",
    "not_run": "⏭ not run",
}


def junit(gate: Gate) -> bytes:
    """Return the checks as JUnit XML: inconclusive is an error, not_run is skipped."""
    suite = TestSuite("convnext-edge gate")
    for check in gate.checks:
        case = TestCase(check.name, classname="gate")
        if check.outcome == "fail":
            case.result = [Failure(check.why)]
        elif check.outcome == "inconclusive":
            case.result = [Error(check.why)]
        elif check.outcome == "not_run":
            case.result = [Skipped(check.why)]
        suite.add_testcase(case)
    document = JUnitXml()
    document.add_testsuite(suite)
    document.update_statistics()  # type: ignore[no-untyped-call]
    return bytes(document.tostring())  # type: ignore[no-untyped-call]


def markdown(report: Report) -> str:
    """Return the summary that goes into a pull request."""
    lines = [
        f"## convnext-edge gate: {WORDS[report.gate.outcome]}",
        "",
        "| artifact | top-1 | drop, points (95 %) | agrees with float | latency / float | size |",
        "|---|---|---|---|---|---|",
    ]
    for row in report.artifacts:
        ratio = next((x.wall_ratio for x in row.latency if x.wall_ratio is not None), None)
        accuracy = row.accuracy
        how = ", interpreted" if accuracy.kind == "interpreted" else ""
        lines.append(
            f"| {row.runtime} {row.scheme}{how} | {_percent(accuracy.top1)} "
            f"| {drop_in_points(accuracy)} | {_percent(accuracy.agreement_with_float)} "
            f"| {MISSING if ratio is None else f'{ratio:.2f}'} | {row.size_bytes / 1e6:.2f} MB |"
        )
    lines += ["", "| check | outcome | value | limit | why |", "|---|---|---|---|---|"]
    lines += [_check_row(check) for check in report.gate.checks]
    return "\n".join([*lines, ""])


def _check_row(check: Check) -> str:
    value, limit = (MISSING if x is None else f"{x:.4g}" for x in (check.value, check.limit))
    why = check.why.replace("|", "\\|")
    return f"| {check.name} | {WORDS[check.outcome]} | {value} | {limit} | {why} |"


def _percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.2f} %"


def drop_in_points(accuracy: Accuracy) -> str:
    """Write a drop with its interval, or a dash where there is none."""
    if accuracy.drop_pp is None or accuracy.drop_ci95_pp is None:
        return MISSING
    low, high = accuracy.drop_ci95_pp
    return f"{accuracy.drop_pp:+.2f} ({low:+.2f} to {high:+.2f})"
