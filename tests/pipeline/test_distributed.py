"""Two real gloo processes find what one finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from calib.images import open_images
from pipeline.distributed import Group
from pipeline.errors import DataError

ROOT = Path(__file__).parents[2]


def torchrun(*words: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", "-m", "pipeline.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    words = ["--runtimes", "onnx", "--no-bench", "--calibration-images", "61"]
    words += ["--eval-images", "53", "--out"]
    alone = [sys.executable, "-m", "pipeline.cli", "run", *words, str(folder / "one")]
    subprocess.run(alone, capture_output=True, cwd=ROOT, check=True)
    shared = torchrun("run", *words, str(folder / "two"))
    assert shared.returncode == 0, shared.stderr[-2000:]
    return folder / "one", folder / "two"


def stage(run: Path, name: str) -> Path:
    (found,) = (run / "stages").glob(f"{name}-*")
    return found


def test_statistics_equal_those_of_one_process(runs: tuple[Path, Path]) -> None:
    one, two = (load_file(stage(run, "calibrate") / "statistics.safetensors") for run in runs)
    assert one.keys() == two.keys()
    for name, alone in one.items():
        assert two[name] == pytest.approx(alone, rel=1e-5, abs=1e-5), name


def test_logits_come_in_the_order_of_the_images(runs: tuple[Path, Path]) -> None:
    for name in ("verify-reference", "verify-onnx-float", "verify-onnx-w8a8"):
        one, two = (np.load(stage(run, name) / "logits.npy") for run in runs)
        assert one.shape == two.shape == (53, 10)
        assert np.abs(one - two).max() <= 1e-6 * np.abs(one).max()
    one, two = (np.load(stage(run, "verify-reference") / "labels.npy") for run in runs)
    assert (one == two).all()


def test_reports_agree(runs: tuple[Path, Path]) -> None:
    one, two = (json.loads((run / "report.json").read_text()) for run in runs)
    assert one["float"] == two["float"]
    assert one["data"] == two["data"]


def test_an_error_of_one_rank_ends_all_with_its_line(tmp_path: Path) -> None:
    """Rank 1 alone lacks the data: rank 0 must say so and not wait."""
    script = tmp_path / "rank_1_fails.py"
    script.write_text(
        "import os\n"
        "from pipeline import calibrate\n"
        "from pipeline.cli import main\n"
        "from pipeline.errors import DataError\n"
        "def fails(*_):\n"
        "    raise DataError('rank 1 lacks the data', allowed='it', do='Copy it')\n"
        "if os.environ['RANK'] == '1':\n"
        "    calibrate.select = fails\n"
        "main()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(script), "run", "--runtimes", "onnx", "--no-bench"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert lines == ["error: rank 1 lacks the data. Allowed: it. Copy it."]


def test_small_and_damaged_shards_are_judged_together(tmp_path: Path) -> None:
    """Most of rank 0's images are damaged, few of all; and one image evaluates on two ranks."""
    digits = open_images("digits", "calibration")
    for i, entry in enumerate(digits.entries[:9]):
        place = tmp_path / "data" / ("val" if i == 8 else "train") / str(entry.label)
        place.mkdir(parents=True, exist_ok=True)
        data = digits.read(entry)
        (place / f"{i}.png").write_bytes(data[: len(data) // 2] if i < 3 else data)
    out = tmp_path / "run"
    words = ["--data", str(tmp_path / "data"), "--runtimes", "onnx", "--no-bench"]
    done = torchrun("run", *words, "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((out / "report.json").read_text())
    assert [Path(n).name for n in report["data"]["calibration"]["skipped"]] == [
        "0.png",
        "1.png",
        "2.png",
    ]
    assert report["float"]["n"] == 1


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "2"}])
def test_variables_of_a_cluster_alone_are_no_torchrun(variables: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "doctor", "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


def test_shards_are_the_whole_in_order() -> None:
    for size in (1, 2, 3, 7):
        for n in (0, 1, 5, 12):
            items = list(range(n))
            parts = [Group(rank=rank, size=size).shard(items) for rank in range(size)]
            assert [item for part in parts for item in part] == items


def test_alone_the_work_is_done_and_its_error_raised() -> None:
    assert Group().gather(lambda: 7) == [7]

    def fails() -> int:
        raise DataError("nothing", allowed="something", do="Look")

    with pytest.raises(DataError):
        Group().gather(fails)


TRAINING = (
    'scheme = "w4a8"\nruntimes = ["onnx"]\ncalibration_images = 32\neval_images = 40\n'
    "bench = false\n[finetune]\nepochs = 1\nimages = 64\nbatch = 16\nsave_minutes = 0\n"
)


def test_an_image_that_one_rank_cannot_read_ends_the_training_of_all(tmp_path: Path) -> None:
    recipe, script = tmp_path / "recipe.toml", tmp_path / "rank_1_fails.py"
    recipe.write_text(TRAINING)
    script.write_text(
        "import os\n"
        "from pipeline import training\n"
        "from pipeline.cli import main\n"
        "from pipeline.errors import DataError\n"
        "def fails(*_, **__):\n"
        "    raise DataError('rank 1 cannot read', allowed='it', do='Copy it')\n"
        "    yield\n"
        "if os.environ['RANK'] == '1':\n"
        "    training.training_batches = fails\n"
        "main()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(script), "run", "--recipe", str(recipe)]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert lines == ["error: rank 1 cannot read. Allowed: it. Copy it."]
