"""The training page tells what training gained and how it went, in the report's numbers."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.records import Training
from reports.document import Report
from reports.pages import write_pages
from reports.training import rows, sentences, settings, smoothed


def test_it_says_what_was_gained(training: Training) -> None:
    said = " ".join(sentences(training))
    assert "from 36.5 dB to 40.1 dB" in said
    assert "the upper end of its drop from 0.34 to 0.21 points, on 5,000 evaluation" in said
    assert "50,000 images of cifar <10>, seen 2 times in 1,562 updates, on CPU" in said
    assert "15 minutes, 111 images a second" in said
    assert "1.2% of the weights swung between two integers, and 0.4% were frozen" in said


def test_it_says_what_is_not_known(training: Training) -> None:
    said = sentences(replace(training, before=None, after=None, curve=(), resumed_at=700))
    assert said[0] == "Nothing was evaluated, so what training gained is not known."
    assert "from update 700 on, where an earlier process had come to" in said[1]
    assert len(said) == 2


def test_the_page_has_the_numbers_and_is_reached(
    trained_report: Report, training: Training, tmp_path: Path
) -> None:
    names = [path.name for path in write_pages(trained_report, tmp_path)]
    assert "training.html" in names
    assert 'href="training.html"' in (tmp_path / "index.html").read_text()
    page = (tmp_path / "training.html").read_text()
    assert "36.5 dB" in page
    assert "40.1 dB" in page
    assert "cifar &lt;10&gt;" in page
    assert "cifar <10>" not in page
    assert "#0102" not in page, "a placeholder colour is left"
    assert page.count("<svg") == 1
    for name, value in settings(training):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page


def test_what_is_missing_is_a_dash(full_report: Report, training: Training, tmp_path: Path) -> None:
    poor = replace(
        training,
        before=None,
        after=None,
        curve=tuple(replace(point, top1=None) for point in training.curve[:3]),
    )
    write_pages(full_report.model_copy(update={"training": poor}), tmp_path)
    page = (tmp_path / "training.html").read_text()
    assert "<dt>SQNR before</dt><dd>—</dd>" in page
    assert page.count('<td class="n">—</td>') == 3
    write_pages(full_report.model_copy(update={"training": replace(poor, curve=())}), tmp_path)
    page = (tmp_path / "training.html").read_text()
    assert "No metrics were kept." in page
    assert "<svg" not in page


def test_a_report_without_training_has_no_such_page(full_report: Report, tmp_path: Path) -> None:
    assert "training.html" not in [path.name for path in write_pages(full_report, tmp_path)]
    assert "training.html" not in (tmp_path / "index.html").read_text()


def test_settings_are_named_as_in_a_recipe(training: Training) -> None:
    found = dict(settings(training))
    assert found["epochs"] == "2"
    assert found["augmentation.crop"] == "0.7"
    assert found["images"] == "all"


def test_a_table_s_points_are_spread_over_the_curve(training: Training) -> None:
    steps = [point.step for point in rows(training)]
    assert (steps[0], steps[-1], len(steps)) == (1, 100, 12)
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 10
    assert [p.step for p in rows(replace(training, curve=training.curve[:5]))] == [1, 2, 3, 4, 5]


def test_the_running_mean_starts_at_the_first_point() -> None:
    assert smoothed([3.0, 5.0]) == pytest.approx([3.0, 4.0])
    assert smoothed([1.0] * 30 + [2.0])[-1] == pytest.approx(1.1)
    assert smoothed([]) == []
