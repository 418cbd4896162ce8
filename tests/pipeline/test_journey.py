"""From a run to a prediction and a verdict, as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from calib.images import open_images
from reports.document import read_report

CLI = [sys.executable, "-P", "-m", "pipeline.cli"]
RUN = ("run", "--runtimes", "onnx,tflite", "--calibration-images", "32", "--no-bench")


def cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *arguments], capture_output=True, text=True, cwd=cwd, check=False)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of batch 3 in `run`; 50 images do not divide by 3."""
    folder = tmp_path_factory.mktemp("journey")
    (folder / "pass.toml").write_text("max_drop_pp = 50\nmax_size_ratio = 0.9\n")
    (folder / "fail.toml").write_text("max_size_ratio = 0.01\n")
    (folder / "open.toml").write_text("max_drop_pp = 0.1\n")
    (folder / "baseline.toml").write_text(
        "[gate.baseline]\nmax_drop_pp = 50\nmax_size_ratio = 1.01\n"
    )
    arguments = (*RUN, "--eval-images", "50", "--batch", "3", "--budget", "pass.toml")
    done = cli(*arguments, "--out", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_fixed_batch_is_verified_image_by_image(home: Path) -> None:
    report = read_report(home / "run")
    assert {row.accuracy.outcome for row in report.artifacts} == {"measured"}
    assert {row.accuracy.n for row in report.artifacts} == {50}
    floats = [row.accuracy for row in report.artifacts if row.scheme == "float"]
    assert {accuracy.agreement_with_float for accuracy in floats} == {1.0}


def test_float16_goes_all_the_way_and_stays_when_measured_again(tmp_path: Path) -> None:
    words = ("--scheme", "float16", "--runtimes", "openvino", "--calibration-images", "16")
    (tmp_path / "gate.toml").write_text(
        'require = ["openvino"]\nmax_drop_pp = 50\nmax_size_ratio = 0.6\n'
    )
    more = ("--eval-images", "40", "--tune", "quick", "--budget", "gate.toml", "--out", "run")
    done = cli("run", *words, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = read_report(tmp_path / "run")
    assert [row.scheme for row in report.artifacts] == ["float", "float16"]
    (layout,) = report.layouts
    assert (layout.asked, layout.scheme, layout.placement) == ("float16", "float16", None)
    assert cli("bench", "run", cwd=tmp_path).returncode == 0
    assert [row.scheme for row in read_report(tmp_path / "run").artifacts] == ["float", "float16"]
    # What was chosen for float16 is none for another scheme.
    done = cli("export", "--runtimes", "openvino", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [row.scheme for row in read_report(tmp_path / "run").artifacts] == ["float", "w8a8"]


@pytest.mark.parametrize("artifact", ["onnx-w8a8/model.onnx", "tflite-w8a8/model.tflite"])
def test_predict_names_the_digit(home: Path, artifact: str) -> None:
    held_out = open_images("digits", "evaluation")
    entry = held_out.entries[0]
    (home / "digit.png").write_bytes(held_out.read(entry))
    done = cli("predict", f"run/artifacts/{artifact}", "digit.png", "--json", cwd=home)
    assert done.returncode == 0, done.stderr
    best = json.loads(done.stdout)[0]["classes"][0]
    assert held_out.classes is not None
    assert entry.label is not None
    assert best["label"] == held_out.classes[entry.label]
    assert best["probability"] > 0.5


def test_one_bad_file_takes_nothing_from_the_others(home: Path) -> None:
    held_out = open_images("digits", "evaluation")
    (home / "good.png").write_bytes(held_out.read(held_out.entries[0]))
    (home / "bad.png").write_text("no image")
    files = ("bad.png", "good.png", "absent.png")
    done = cli("predict", "run/artifacts/onnx-w8a8/model.onnx", *files, "--json", cwd=home)
    assert done.returncode == 1
    assert [one["image"] for one in json.loads(done.stdout)] == ["good.png"]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert ["bad.png" in lines[0], "absent.png" in lines[1]] == [True, True]
    # Nothing else: what libraries print is in the log of the worker, which is gone.
    assert len(done.stderr.splitlines()) == 2


def test_export_adds_a_runtime_and_run_has_those_it_names(tmp_path: Path) -> None:
    how = ("--calibration-images", "8", "--eval-images", "20", "--out", "run")

    def after(*words: str) -> tuple[list[str], list[str], str]:
        done = cli(*words, *how, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        rows = read_report(tmp_path / "run").artifacts
        lie = sorted(one.name for one in (tmp_path / "run" / "artifacts").iterdir())
        return list(dict.fromkeys(row.runtime for row in rows)), lie, done.stderr

    onnx, openvino = (["onnx-float", "onnx-w8a8"], ["openvino-float", "openvino-w8a8"])
    assert after("export", "--runtimes", "onnx")[:2] == (["onnx"], onnx)
    made = (tmp_path / "run" / "artifacts" / "onnx-w8a8" / "model.onnx").stat().st_mtime_ns
    both = after("export", "--runtimes", "openvino")
    assert both[:2] == (["onnx", "openvino"], [*onnx, *openvino])
    assert (tmp_path / "run" / "artifacts" / "onnx-w8a8" / "model.onnx").stat().st_mtime_ns == made
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_bytes())
    # The gate asks for what was there too.
    assert recipe["runtimes"] == recipe["gate"]["require"] == ["onnx", "openvino"]
    # Another model, and what is not of it goes.
    other = after("export", "--runtimes", "openvino", "--seed", "1")
    assert other[:2] == (["openvino"], openvino)
    assert "taken out of artifacts/: onnx-float, onnx-w8a8" in other[2]
    alone = ("run", "--runtimes", "onnx", "--seed", "1", "--no-bench", "--tune", "off")
    assert after(*alone)[:2] == (["onnx"], onnx)


def test_export_takes_the_place_of_a_damaged_folder_s_recipe(tmp_path: Path) -> None:
    words = ("export", "--calibration-images", "8", "--eval", "none")
    assert cli(*words, "--out", "run", cwd=tmp_path).returncode == 0
    (tmp_path / "run" / "recipe.json").write_text("{")
    done = cli(*words, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # One calibration and one quantization serve all four formats.
    made = Counter(
        stage.name.rpartition("-")[0] for stage in (tmp_path / "run" / "stages").iterdir()
    )
    formats = ("onnx", "openvino", "tflite", "coreml")
    exports = [f"export-{name}-{scheme}" for name in formats for scheme in ("float", "w8a8")]
    assert made == Counter(["checkpoint", "calibrate", "quantize", *exports, "pages"])


def test_the_places_of_a_recipe_hold_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    held_out = open_images("digits", "evaluation")
    for index, entry in enumerate(held_out.entries[:3]):
        (tmp_path / "images" / f"{index}.png").write_bytes(held_out.read(entry))
    (tmp_path / "recipe.toml").write_text('data = "images"\neval = "none"\ninput_size = 32\n')
    words = ("quantize", "--recipe", "recipe.toml", "--out", "run")
    assert cli(*words, cwd=tmp_path).returncode == 0
    stored = json.loads((tmp_path / "run" / "recipe.json").read_bytes())
    assert stored["data"] == str(tmp_path / "images")


@pytest.mark.parametrize(
    ("budget", "code", "word"),
    [("pass", 0, "pass"), ("fail", 3, "fail"), ("open", 4, "inconclusive")],
)
def test_the_gate_says_its_word_by_exit_code(home: Path, budget: str, code: int, word: str) -> None:
    done = cli("gate", "run", "--budget", f"{budget}.toml", cwd=home)
    assert done.returncode == code, done.stderr
    assert done.stdout.rstrip().endswith(f"gate: {word}")
    assert read_report(home / "run").gate.outcome == word
    assert word in (home / "run" / "gate.md").read_text()
    assert "<testsuite" in (home / "run" / "gate.xml").read_text()


def test_an_accepted_baseline_is_what_later_runs_are_held_against(home: Path) -> None:
    without = cli("gate", "run", "--budget", "baseline.toml", cwd=home)
    assert without.returncode == 4
    assert cli("gate", "run", "--accept", cwd=home).returncode == 0
    done = cli("gate", "run", "--budget", "baseline.toml", cwd=home)
    assert done.returncode == 0, done.stdout
    (home / "convnext-edge-baseline.json").unlink()


def test_another_budget_reruns_only_the_gate(home: Path) -> None:
    arguments = (*RUN, "--eval-images", "50", "--batch", "3", "--budget", "open.toml")
    done = cli(*arguments, "--out", "run", cwd=home)
    assert done.returncode == 0
    assert "gate: inconclusive" in done.stdout
    remade = [line for line in done.stderr.splitlines() if line.strip().endswith(" s")]
    assert {line.split()[0] for line in remade} <= {"data", "pages"}


def test_doctor_tells_of_every_runtime(home: Path) -> None:
    facts = json.loads(cli("doctor", "--json", cwd=home).stdout)
    names = {row["runtime"] for row in facts["runtimes"]}
    assert names == {"onnx", "openvino", "tflite", "coreml", "reference"}
    kinds = {row["runtime"]: row["kind"] for row in facts["runtimes"]}
    assert kinds.pop("coreml") == ("host" if sys.platform == "darwin" else "interpreted")
    assert set(kinds.values()) == {"host"}
    assert facts["profile"] in {"full", "avx2"}


@pytest.mark.parametrize("folder", ["model", "artifacts"])
def test_somebody_s_own_folders_are_never_replaced(folder: str, tmp_path: Path) -> None:
    mine = tmp_path / "project" / folder / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years")
    done = cli("quantize", "--out", "project", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert f"holds {folder}, and no run wrote it" in done.stderr
    assert mine.read_text() == "years"
    assert not (tmp_path / "project" / "stages").exists()


@pytest.mark.parametrize("kept", ["pages/mine.html", "report.json", "gate.md"])
def test_nor_is_anything_else_that_a_run_would_take_away(kept: str, tmp_path: Path) -> None:
    mine = tmp_path / "project" / kept
    mine.parent.mkdir(parents=True)
    mine.write_text("years")
    (tmp_path / "project" / "stages").mkdir()
    done = cli("quantize", "--out", "project", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert f"holds {kept.partition('/')[0]}, and no run wrote it" in done.stderr
    assert mine.read_text() == "years"


def test_a_run_folder_keeps_what_it_holds(tmp_path: Path) -> None:
    """Nothing is written into it but by its own commands."""
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    recipe = {"data": "digits", "scheme": "w4a8", "runtimes": ["onnx"]}
    (run / "recipe.json").write_text(json.dumps(recipe))
    for words, said in (
        (("finetune", "run", "--out", "run"), "is RUN_DIR itself"),
        (("finetune", "run", "--out", "run/model"), "lies in the run folder"),
        (("quantize", "--out", "run/model/deeper"), "lies in the run folder"),
    ):
        done = cli(*words, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
    assert {str(path.relative_to(run)) for path in run.rglob("*")} == {"model", "recipe.json"}


def test_another_model_leaves_no_verdict_of_the_one_before(tmp_path: Path) -> None:
    words = (*RUN, "--eval-images", "10", "--budget", "pass.toml", "--out", "run")
    (tmp_path / "pass.toml").write_text("max_drop_pp = 50\n")
    assert cli(*words, cwd=tmp_path).returncode == 0
    assert (tmp_path / "run" / "gate.md").is_file()
    done = cli("quantize", "--calibration-images", "16", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    left = {item.name for item in (tmp_path / "run").iterdir()}
    assert not left & {"report.json", "gate.md", "gate.xml", "pages", "artifacts"}
