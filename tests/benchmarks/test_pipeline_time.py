"""What benchmarks/pipeline_time.py measures and concludes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import pipeline_time
from benchmarks.pipeline_time import _timed, print_table, together
from targets.devices.local import isa_flags

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "pipeline_time.py"
ROWS = [
    {"method": "ours, four formats", "wall_s": 30.0, "cpu_s": 40.0},
    {"method": "onnx: a", "wall_s": 20.0, "cpu_s": 10.0},
    {"method": "tflite: b", "wall_s": 40.0, "cpu_s": 90.0},
]


def test_ours_is_held_against_the_tools_together(capsys: pytest.CaptureFixture[str]) -> None:
    found = together(ROWS)
    assert found["tools"] == {"wall_s": 60.0, "cpu_s": 100.0}
    assert (found["ratio_wall"], found["ratio_cpu"]) == (0.5, 0.4)
    print_table(ROWS, found, Console(width=80), "here")
    assert "0.50" in capsys.readouterr().out


def test_the_time_is_that_of_the_processes_started() -> None:
    def make() -> None:
        subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
        time.sleep(0.2)

    row = _timed("x", make)
    assert row["wall_s"] >= 0.2
    assert 0 < row["cpu_s"] <= row["wall_s"]


@pytest.mark.parametrize("threads", ["1", None])
def test_the_document_says_on_what_and_with_how_many_threads(
    threads: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(pipeline_time, "measure", lambda *_: ROWS)
    options = {"model": "atto", "data": "digits", "input_size": 32, "calibration_images": 5}
    pipeline_time._run(tmp_path / "time.json", dict(options))
    document = json.loads((tmp_path / "time.json").read_bytes())
    assert document["settings"] == options | {"omp_num_threads": threads}
    assert document["isa"] == list(isa_flags())
    assert document["rows"] == ROWS


def test_a_model_that_is_none_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--model", "enormous", "--json", str(tmp_path / "x.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "unknown model: enormous" in done.stderr
    assert "Traceback" not in done.stderr
