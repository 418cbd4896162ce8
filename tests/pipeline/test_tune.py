"""Tuning: the cheapest assignment that keeps to the budget, and one line where there is none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from pipeline.data import Chosen, Data
from pipeline.display import Display
from pipeline.errors import ArtifactError, DataError
from pipeline.quantize import read, write
from pipeline.records import (
    Accuracy,
    Assignment,
    Preprocessing,
    QuantizedModel,
    Selection,
    Tuning,
)
from pipeline.stages import Done, Stages
from pipeline.tune import TUNING, Basis, Tuner, check_decidable, first_that_keeps
from reports.document import DataSource, read_report

Model = tuple[QuantizedModel, dict[str, Any]]
CLI = [sys.executable, "-P", "-m", "pipeline.cli"]


def points(n: int) -> list[Assignment]:
    return [
        Assignment(float_layers=tuple(map(str, range(i))), cost=float(i), predicted_sqnr_db=None)
        for i in range(n)
    ]


@given(st.integers(1, 40), st.integers(0, 41))
def test_bisection_finds_the_first_that_keeps(n: int, first: int) -> None:
    tried: list[float] = []

    def keeps(point: Assignment) -> bool:
        tried.append(point.cost)
        return point.cost >= first

    assert first_that_keeps(points(n), keeps) == (first if first < n else None)
    assert tried[0] == 0
    assert len(tried) == len(set(tried)) <= 2 + n.bit_length()


def chosen(n: int, purpose: Any) -> Chosen:
    return Chosen(
        selection=Selection(where="digits", purpose=purpose, n=n, seed=0),
        source=DataSource(source="digits", n=n, sha256="0" * 64),
    )


def tuner(
    stages: Stages,
    model: Model,
    max_drop_pp: float,
    upper_end: Callable[[tuple[str, ...]], float],
    saved_ms: Mapping[str, float] = {},
) -> Tuner:
    """Return a tuner whose judge answers from the layers left float.

    Each test has a budget of its own, and so finds nothing that another one has left.
    """
    folder = stages.out / "base"
    if not folder.exists():
        folder.mkdir()
        write(folder, *model)

    def judge(_name: str, path: Path, _sha256: str) -> Accuracy:
        assert path.exists()
        record, _ = read(path.parents[1])
        end = upper_end(record.float_layers)
        return Accuracy(
            outcome="measured", n=1000, drop_pp=0.0, drop_ci95_pp=(-1.0, end), sqnr_db=30.0
        )

    basis = Basis(
        base=Done(folder=folder, value={}, seconds=0.0, peak_memory_bytes=0),
        calibration=chosen(6, "calibration"),
        evaluation=chosen(1000, "evaluation"),
        preprocessing=Preprocessing(input_size=32, crop_ratio=1.0),
        profile="full",
        max_drop_pp=max_drop_pp,
    )
    return Tuner(stages, basis, judge=judge, saved_ms=lambda: saved_ms)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return Stages(tmp_path_factory.mktemp("tune"), Display(), cores=1)


def found(folder: Path) -> Tuning:
    return TypeAdapter(Tuning).validate_json((folder / TUNING).read_bytes())


def test_integers_stay_where_the_budget_allows(stages: Stages, small_model: Model) -> None:
    folder = tuner(stages, small_model, 0.5, lambda _: 0.4).run()
    tuning = found(folder)
    assert (tuning.chosen, tuning.cost.unit) == (0, "MACs")
    assert [point.accuracy is not None for point in tuning.front] == [True] + [False] * (
        len(tuning.front) - 1
    )
    assert read(folder)[0] == small_model[0]


def test_layers_stay_float_until_the_budget_is_kept(stages: Stages, small_model: Model) -> None:
    def upper_end(floats: tuple[str, ...]) -> float:
        return 1.0 - 0.2 * len(floats)

    folder = tuner(stages, small_model, 0.6, upper_end, {"onnx": 2.0}).run()
    tuning, (record, arrays) = found(folder), read(folder)
    taken = tuning.front[tuning.chosen]
    assert tuning.cost.unit == "ms"
    assert len(taken.float_layers) >= 2
    assert all(
        upper_end(point.float_layers) > 0.6
        for point in tuning.front[: tuning.chosen]
        if point.accuracy is not None
    )
    assert record.float_layers == taken.float_layers
    base = small_model[1]
    assert all(np.array_equal(array, base[name]) for name, array in arrays.items())
    # A second run takes what was found, even if it would be priced otherwise now.
    again = tuner(stages, small_model, 0.6, upper_end).run()
    assert found(again) == tuning


def test_a_budget_that_nothing_keeps_to_is_one_line(stages: Stages, small_model: Model) -> None:
    with pytest.raises(ArtifactError, match=r"--max-drop 0\.4 is not kept to .* reaches 0\.70"):
        tuner(stages, small_model, 0.4, lambda _: 0.7).run()


def test_a_reference_that_fails_is_no_budget_kept(stages: Stages, small_model: Model) -> None:
    broken = tuner(stages, small_model, 0.3, lambda _: 0.0)
    broken.judge = lambda *_: Accuracy(outcome="failed", reason="it fell over")
    with pytest.raises(ArtifactError, match="it fell over"):
        broken.run()


def test_unreadable_images_do_not_count(stages: Stages, small_model: Model) -> None:
    few = tuner(stages, small_model, 0.45, lambda _: 0.0)
    few.judge = lambda *_: Accuracy(outcome="measured", n=246, drop_ci95_pp=(-1.0, 0.7))
    with pytest.raises(DataError, match="246 readable evaluation images"):
        few.run()


def test_too_few_images_are_said_before_anything_is_done() -> None:
    data = Data(
        calibration=chosen(8, "calibration"), evaluation=chosen(200, "evaluation"), why_not=""
    )
    with pytest.raises(DataError, match=r"200 readable .* still reach 1\.89 points"):
        check_decidable(1.0, data)
    check_decidable(1.9, data)


def test_no_images_are_said_before_anything_is_done() -> None:
    data = Data(calibration=chosen(8, "calibration"), evaluation=None, why_not="no labels here")
    with pytest.raises(DataError, match="no labels here"):
        check_decidable(1.0, data)


@pytest.mark.parametrize(
    "wrong",
    [{"chosen": 99}, {"chosen": -1}, {"front": []}, {"sensitivities": []}],
)
def test_a_report_whose_tuning_does_not_hold_together_is_refused(
    stages: Stages, small_model: Model, wrong: dict[str, Any]
) -> None:
    tuning = found(tuner(stages, small_model, 0.5, lambda _: 0.4).run())
    stated = TypeAdapter(Tuning).dump_python(tuning, mode="json")
    assert TypeAdapter(Tuning).validate_python(stated) == tuning
    with pytest.raises(ValidationError):
        TypeAdapter(Tuning).validate_python(stated | wrong)


# --- as a user types it ---------------------------------------------------------------------------


def cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *arguments], capture_output=True, text=True, cwd=cwd, check=False)


RUN = (
    "run",
    "--runtimes",
    "onnx",
    "--placement",
    "all",
    "--calibration-images",
    "32",
    "--no-bench",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    done = cli(*RUN, "--max-drop", "3", "--float-layers", "stem.conv", "--out", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_report_tells_what_was_tuned(home: Path) -> None:
    report = read_report(home / "run")
    assert report.tuning is not None
    taken = report.tuning.front[report.tuning.chosen]
    assert taken.accuracy is not None
    assert taken.accuracy.drop_ci95_pp is not None
    assert taken.accuracy.drop_ci95_pp[1] <= 3
    assert report.calibration is not None
    assert report.calibration.float_layers[0] == "stem.conv"
    (row,) = [row for row in report.artifacts if row.scheme == "w8a8"]
    assert row.proof is not None
    integers = row.proof.weighted_layers - 1 - len(taken.float_layers)
    assert row.proof.integer_layers == integers


def test_the_page_has_every_layer_and_the_front(home: Path) -> None:
    page = (home / "run" / "pages" / "precision.html").read_text()
    report = read_report(home / "run")
    assert report.tuning is not None
    assert all(row.name in page for row in report.tuning.sensitivities)
    assert page.count("<svg") == 1
    assert 'href="precision.html"' in (home / "run" / "pages" / "index.html").read_text()


def test_the_embedded_budget_requires_only_what_was_exported(home: Path) -> None:
    checks = {check.name: check.outcome for check in read_report(home / "run").gate.checks}
    assert checks["onnx measured"] == "pass"
    assert not any("openvino" in name or "tflite" in name for name in checks)


def test_explain_says_it_too(home: Path) -> None:
    done = cli("explain", "run", cwd=home)
    assert done.returncode == 0, done.stderr
    assert "the budget is 3" in done.stdout
    assert "stages.3.blocks.0.pw2" in done.stdout
    facts = json.loads(cli("explain", "run", "--json", cwd=home).stdout)
    assert facts["tuning"]["max_drop_pp"] == 3


def test_the_model_tells_it_without_a_report(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "run" / "model", tmp_path / "run" / "model")
    done = cli("explain", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the budget is 3" in done.stdout


def test_a_second_run_reuses_everything(home: Path) -> None:
    done = cli(*RUN, "--max-drop", "3", "--float-layers", "stem.conv", "--out", "run", cwd=home)
    assert "0 stages made" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--float-layers", "stages.0.blocks.0.pw3"), 2, "unknown layer: stages.0.blocks.0.pw3"),
        (("--max-drop", "0.1"), 1, "would still reach"),
        (("--max-drop", "3", "--eval", "none"), 2, "max_drop needs evaluation images"),
        (("--max-drop", "3", "--tune", "full"), 2, "tune full chooses the integers anew"),
        (("--max-drop", "3", "--scheme", "float"), 2, "max_drop and float_layers go with"),
        (("--max-drop", "3", "--scheme", "w8a8-dynamic"), 2, "does not go with w8a8-dynamic"),
        (("--max-drop", "nan"), 2, "max_drop"),
        (("--max-drop", "-1"), 2, "max_drop"),
    ],
)
def test_what_cannot_be_is_one_line(
    home: Path, flags: tuple[str, ...], code: int, said: str
) -> None:
    done = cli(*RUN, *flags, "--out", "other", cwd=home)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error")]) == 1
    assert not (home / "other" / "model").exists()
