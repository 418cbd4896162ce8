"""`finetune` by the command line: a run folder becomes another one, whatever happens midway."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from pipeline.finetune import TRAINING
from pipeline.recorder import CHECKPOINT, METRICS
from reports.document import read_report

CLI = (sys.executable, "-P", "-m", "pipeline.cli")
FEW = ("--epochs", "2", "--images", "160", "--batch", "16", "--no-bench", "--crop", "0.9")
UPDATES = 20
ALWAYS, ONE = ("--save-minutes", "0"), ("--runtimes", "onnx")


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *words], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finetune") / "run"
    done = cli(
        *("run", "--out", str(out), "--runtimes", "onnx,tflite", "--no-bench"),
        *("--calibration-images", "64", "--eval-images", "100", "--scheme", "w4a8"),
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def trained(run: Path) -> Path:
    out = run.parent / "trained"
    done = cli("finetune", str(run), *FEW, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "gate:" in done.stdout
    return out


def arrays(out: Path) -> dict[str, Any]:
    return dict(load_file(out / "model" / "tensors.safetensors"))


def test_the_report_holds_what_was_learnt(run: Path, trained: Path) -> None:
    before, report = read_report(run), read_report(trained)
    rows = {(row.runtime, row.scheme): row for row in report.artifacts}
    assert set(rows) == {(r, s) for r in ("onnx", "tflite") for s in ("float", "w4a8")}
    # Runtimes and evaluation are those of the run.
    assert report.data.evaluation == before.data.evaluation
    for row in rows.values():
        assert (row.accuracy.outcome, row.accuracy.n) == ("measured", 100)
        assert row.latency[0].outcome == "not_run"
    training = report.training
    assert training is not None
    assert (training.n, training.updates, training.resumed_at) == (160, UPDATES, 0)
    assert (training.source, training.processes) == ("digits", 1)
    assert training.images_per_second is not None
    assert [point.step for point in training.curve] == list(range(1, UPDATES + 1))
    assert training.curve[0].top1 is not None
    assert training.before is not None
    assert training.after is not None
    assert training.before.sqnr_db != training.after.sqnr_db
    # The artifacts hold what was trained: the reference's figure is theirs, to rounding.
    assert rows["tflite", "w4a8"].accuracy.sqnr_db == pytest.approx(training.after.sqnr_db, abs=1.0)


def test_the_record_says_that_it_was_trained(trained: Path) -> None:
    record = json.loads((trained / "model" / "params.json").read_text())
    assert record["trained"]["epochs"] == 2
    assert record["trained"]["augmentation"]["crop"] == 0.9
    assert record["parents"].keys() >= {"checkpoint", "calibration", "quantized", "training"}
    lines = (trained / "model" / METRICS).read_text().splitlines()
    assert len(lines) == UPDATES


def test_nothing_is_left_of_the_way(trained: Path) -> None:
    assert not list(trained.rglob(CHECKPOINT))
    assert not list(trained.rglob(".partial-*"))


def test_a_second_run_reuses_everything(run: Path, trained: Path) -> None:
    words = ("finetune", str(run), *FEW, "--out", str(trained))
    done = cli(*words)
    assert done.returncode == 0, done.stderr
    assert "0 stages made" in done.stdout
    # How often it is saved changes the report, not the training.
    done = cli(*words, "--save-minutes", "3")
    assert "1 stages made" in done.stdout
    assert re.search(r"reused:[^.]*finetune", done.stderr)
    assert re.search(r"pages +[0-9.]+ s", done.stderr)


def test_what_the_run_had_calibrated_is_not_done_again(trained: Path) -> None:
    for name in ("checkpoint", "calibrate", "quantize"):
        (mine,) = (trained / "stages").glob(f"{name}-*")
        (its,) = (trained.parent / "run" / "stages").glob(f"{name}-*")
        # Copied, and not a second too late.
        assert (mine / "result.json").read_bytes() == (its / "result.json").read_bytes()


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600  # it hangs
    while not list(path.rglob(CHECKPOINT)):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def started(run: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*CLI, "finetune", str(run), *FEW, *ALWAYS, *ONE, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def training_worker(out: Path) -> int:
    """The process whose standard error is the training's log."""
    log = str((out / "logs" / "finetune.log").resolve())
    for process in Path("/proc").iterdir():
        try:
            if str((process / "fd" / "2").readlink()) == log:
                return int(process.name)
        except OSError:
            continue
    msg = "no process trains"
    raise AssertionError(msg)


@pytest.mark.parametrize("how", ["killed", "interrupted", "terminated"])
def test_a_training_that_was_stopped_goes_on_to_the_same_bits(
    run: Path, trained: Path, tmp_path: Path, how: str
) -> None:
    out = tmp_path / "out"
    process = started(run, out)
    wait_for(out / TRAINING, process)
    if how == "killed":
        # Nobody can clean up: the worker first, or it would notice that its parent is gone.
        os.kill(training_worker(out), signal.SIGKILL)
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.send_signal(signal.SIGINT if how == "interrupted" else signal.SIGTERM)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == {"killed": -9, "interrupted": 130, "terminated": 143}[how]
    if how != "killed":
        assert f"{how}: finished stages are kept, the same command resumes" in errors
    assert "Traceback" not in errors
    (checkpoint,) = (out / TRAINING).rglob(CHECKPOINT)
    behind = torch.load(checkpoint, weights_only=True)["step"]
    assert 0 < behind < UPDATES
    again = cli(*("finetune", str(run), *FEW, "--out", str(out), "--resume"))
    assert again.returncode == 0, again.stderr
    training = read_report(out).training
    assert training is not None
    assert training.resumed_at >= behind
    mine, wanted = arrays(out), arrays(trained)
    assert mine.keys() == wanted.keys()
    assert all(np.array_equal(mine[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--scheme", "w8a8-dynamic"), "finetune does not go with w8a8-dynamic"),
        (("--scheme", "float"), "finetune does not go with float"),
        (("--epochs", "0"), "finetune.epochs is 0"),
        (("--rate", "-1"), "finetune.rate is -1.0"),
        (("--engine", "brevitas"), "finetune.engine is 'brevitas'"),
        (("--oscillation", "stop"), "finetune.oscillation is 'stop'"),
        (("--crop", "2"), "finetune.augmentation.crop is 2.0"),
        (("--data", "nowhere"), "nowhere"),
        (
            ("--logit-weight", "0", "--kl-weight", "0", "--block-weight", "0"),
            "logit_weight, kl_weight, block_weight and label_weight are all 0",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    run: Path, tmp_path: Path, words: tuple[str, ...], line: str
) -> None:
    done = cli("finetune", str(run), *words, "--out", str(tmp_path / "out"))
    assert done.returncode in {1, 2}
    (said,) = [text for text in done.stderr.splitlines() if text.startswith("error:")]
    assert line in said
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "model").exists()


def test_images_that_evaluate_do_not_train(run: Path, tmp_path: Path) -> None:
    from calib.images import open_images

    digits = open_images("digits", "evaluation").sample(100, 0)
    for entry in digits.entries[:30]:
        place = tmp_path / "data" / str(entry.label)
        place.mkdir(parents=True, exist_ok=True)
        (place / entry.name.replace("/", "-")).with_suffix(".png").write_bytes(digits.read(entry))
    words = ("--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"))
    done = cli("finetune", str(run), *words)
    assert done.returncode == 1
    assert "30 images are used both to train and to evaluate" in done.stderr


def test_a_folder_that_no_run_wrote_is_said(tmp_path: Path) -> None:
    done = cli("finetune", str(tmp_path), "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "is not a run folder" in done.stderr
