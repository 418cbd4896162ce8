"""The end of a run: the gate's word, the report and its pages.

In: a `Report` and a budget. Out: in the run folder report.json with the gate in it, gate.xml
(JUnit), gate.md (for a pull request) and pages/. Runs again on its own when only a budget changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.recipe import Budget
from pipeline.stages import Stages
from pipeline.store import Stage, publish, sha256_bytes, sha256_file, write_atomic
from reports import document
from reports.document import REPORT, Report, read_report, write_report
from reports.gate import judge
from reports.summary import junit, markdown

if TYPE_CHECKING:
    from pipeline.display import Display
    from pipeline.worker import Progress
    from reports.document import Gate

JUNIT, SUMMARY, PAGES = "gate.xml", "gate.md", "pages"
DEFAULT_BASELINE = "convnext-edge-baseline.json"


def conclude(
    report: Report, out: Path, budget: Budget | None, *, baseline: str | None, stages: Stages
) -> Report:
    """Judge a report and write everything a person reads.

    Args:
        report: As assembled, or as read back.
        out: The run folder.
        budget: What the gate asks; None asks nothing, and the gate is not_run.
        baseline: Path of the accepted report; None takes `DEFAULT_BASELINE` where that exists.
        stages: Where the pages are cached.

    Returns:
        The report with the gate's word, as written.

    Raises:
        ArtifactError: The baseline given is not a report.
        OutputError: The run folder cannot be written.
    """
    accepted = Path(baseline or DEFAULT_BASELINE)
    before = read_report(accepted) if baseline or accepted.is_file() else None
    judged = report.model_copy(update={"gate": judge(report, budget or Budget(), before)})
    write_report(out / REPORT, judged)
    write_atomic(out / JUNIT, junit(judged.gate))
    write_atomic(out / SUMMARY, markdown(judged).encode())
    _write_pages(judged, out, stages)
    return judged


def judge_again(out: Path, budget: Budget, baseline: str | None, display: Display) -> Gate:
    """Judge a finished run by another budget; nothing is measured again."""
    stages = Stages(out, display, cores=1)
    return conclude(read_report(out), out, budget, baseline=baseline, stages=stages).gate


def write_pages_of(out: Path, display: Display) -> None:
    """Write a finished run's pages again from its report.json."""
    _write_pages(read_report(out), out, Stages(out, display, cores=1))


def accept_baseline(out: Path, baseline: str | None) -> Path:
    """Store a run's report as the baseline that later runs are held against.

    Args:
        out: The run folder.
        baseline: Where; None is `DEFAULT_BASELINE` in the working directory.

    Returns:
        The file written.
    """
    place = Path(baseline or DEFAULT_BASELINE)
    write_report(place, read_report(out))
    return place


def _write_pages(report: Report, out: Path, stages: Stages) -> None:
    stage = Stage(
        name="pages",
        modules=("reports.pages",),
        inputs={
            "report": sha256_bytes(report.model_dump_json(by_alias=True).encode()),
            "templates": sha256_file(Path(document.__file__).parent / "templates"),
        },
        settings={},
        libraries=("jinja2", "matplotlib"),
    )

    def make(folder: Path, progress: Progress) -> None:
        from reports.pages import write_pages

        progress(0, 1)
        write_pages(report, folder)
        progress(1, 1)

    folder = stages.do_here(stage, make)
    names = [item.name for item in folder.iterdir() if item.name != "stage.json"]
    publish(folder, out / PAGES, names)
