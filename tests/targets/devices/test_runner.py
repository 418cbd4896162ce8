"""The file that runs on a device, as a program of its own."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from targets.base import run_padded, runtimes
from targets.devices import _runner

RUNNER = Path(__file__).parents[3] / "targets" / "devices" / "_runner.py"
MEASURE = {
    "task": "measure",
    "image": "image.npy",
    "threads": 1,
    "rounds": 3,
    "per_round": 4,
    "warm_up": 1,
    "processes": True,
    "marks": False,
}
HARNESS = {"label": "harness", "runtime": "onnx", "path": None, "layout": "NCHW"}


def job(name: str, path: Path, label: str = "float") -> dict[str, Any]:
    layout = runtimes()[name].capabilities.layout
    return {"label": label, "runtime": name, "path": str(path), "layout": layout}


def run(folder: Path, task: dict[str, Any], **environment: str) -> tuple[dict[str, Any], list[Any]]:
    """Return the result and the lines of progress; it runs where nothing of ours can be found."""
    (folder / "JOBS.json").write_text(json.dumps(task))
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(RUNNER), "JOBS.json", "RESULT.json"],
        cwd=folder,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in folder.glob(".*")) == []
    result: dict[str, Any] = json.loads((folder / "RESULT.json").read_text())
    return result, [json.loads(line) for line in done.stdout.splitlines()]


def test_it_is_one_file_for_an_old_python() -> None:
    tree = ast.parse(RUNNER.read_text(), feature_version=(3, 9))
    imported = {
        ((isinstance(node, ast.ImportFrom) and node.module) or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    runtimes_ = {"onnxruntime", "openvino"}
    assert imported <= {*sys.stdlib_module_names, "numpy", *runtimes_}


def test_it_says_what_the_device_is(tmp_path: Path) -> None:
    result, lines = run(tmp_path, {"task": "probe"})
    assert (result["runner"], result["error"], result["jobs"], lines) == (1, None, [], [])
    machine = result["machine"]
    assert machine["machine"] == os.uname().machine
    assert machine["cores"] == len(os.sched_getaffinity(0))
    assert machine["description"]
    assert machine["isa"]
    assert machine["packages"]["numpy"] == np.__version__
    assert "onnxruntime" in machine["packages"]
    assert result["before"]["load"] >= 0


def test_a_pi_tells_its_temperature_and_whether_it_was_slowed_down(tmp_path: Path) -> None:
    tool = tmp_path / "bin" / "vcgencmd"
    tool.parent.mkdir()
    tool.write_text(
        "#!/bin/sh\ncase $1 in get_throttled) echo throttled=0x50000;;"
        ' measure_temp) echo "temp=48.3\'C";; esac\n'
    )
    tool.chmod(0o755)
    path = f"{tool.parent}:{os.environ['PATH']}"
    result, _ = run(tmp_path, {"task": "probe"}, PATH=path)
    assert result["before"]["throttled"] == result["after"]["throttled"] == "0x50000"
    assert result["after"]["temperatures_c"]["vcgencmd"] == 48.3


def test_its_clock_is_that_of_the_cores_it_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for core, governor in ((0, "powersave"), (4, "performance")):
        clock = tmp_path / f"cpu{core}" / "cpufreq"
        clock.mkdir(parents=True)
        (clock / "scaling_governor").write_text(f"{governor}\n")
        (clock / "scaling_cur_freq").write_text(f"{core + 1}000000\n")
    monkeypatch.setattr(_runner, "CPUS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5})
    found = _runner.state()
    assert (found["governor"], found["frequency_mhz"]) == ("performance", 5000.0)


def test_a_device_that_keeps_its_load_to_itself_is_measured_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused() -> tuple[float, float, float]:
        raise OSError("/proc/loadavg: permission denied")

    monkeypatch.setattr(os, "getloadavg", refused)
    assert _runner.state()["load"] is None


@pytest.mark.parametrize("where", ["processes", "here"])
@pytest.mark.parametrize("name", ["onnx", "openvino", "tflite"])
def test_it_times_each_job_in_turn(
    name: str, where: str, artifacts: Mapping[str, Path], pixels: NDArray[Any], tmp_path: Path
) -> None:
    np.save(tmp_path / "image.npy", pixels[:1])
    jobs = [HARNESS, job(name, artifacts[name])]
    result, lines = run(tmp_path, {**MEASURE, "processes": where == "processes", "jobs": jobs})
    assert result["error"] is None
    # Whoever waits hears after loading, and around what goes before: here there is one process.
    quiet = 0 if where == "processes" else 2 * 3
    assert lines == [{"done": 0, "total": 6}] * quiet + [
        {"done": i, "total": 6} for i in range(1, 7)
    ]
    harness, timed = result["jobs"]
    assert timed["error"] is None
    assert len(timed["wall_ms"]) == len(timed["cpu_ms"]) == len(harness["wall_ms"]) == 12
    assert 0 < np.median(harness["wall_ms"]) < np.median(timed["wall_ms"])
    assert timed["load_ms"] > 0
    assert timed["first_ms"] > 0
    assert timed["peak_memory_bytes"] > 10_000_000
    assert (harness["versions"], len(timed["versions"])) == ({}, 1)


def counters(folder: Path, **zones: tuple[str, int]) -> None:
    """Write what /sys/class/powercap has, one zone after another."""
    for zone, (name, value) in zones.items():
        place = folder / zone.replace("_", ":")
        place.mkdir(parents=True, exist_ok=True)
        (place / "name").write_text(f"{name}\n")
        (place / "energy_uj").write_text(f"{value}\n")
        (place / "max_energy_range_uj").write_text("99999\n")


def test_energy_is_that_of_every_package_once_and_goes_on_behind_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_runner, "POWERCAP", tmp_path)
    assert _runner.energy_uj() == {}
    assert _runner.spent_mj({}, {}) is None
    counters(
        tmp_path,
        rapl_0=("package-0", 99_000),
        rapl_0_0=("core", 500),
        rapl_1=("package-1", 10_000),
        mmio_0=("psys", 7),
        rapx_0=("package-0", 3),
    )
    before = _runner.energy_uj()
    assert before == {"package-0": (99_000, 99_999), "package-1": (10_000, 99_999)}
    counters(tmp_path, rapl_0=("package-0", 1_000), rapl_1=("package-1", 12_500))
    assert _runner.spent_mj(before, _runner.energy_uj()) == pytest.approx(2 + 2.5)
    (tmp_path / "rapl:1" / "energy_uj").unlink()  # as where it may not be read
    assert _runner.spent_mj(before, _runner.energy_uj()) is None


@pytest.mark.parametrize(("silent", "told"), [((), 3 * 1.5), ((2,), None)])
def test_energy_is_that_of_all_turns_or_of_none(
    silent: tuple[int, ...], told: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter(range(100))

    def look() -> dict[str, tuple[int, int]]:
        index = next(looks)
        return {} if index in silent else {"package-0": (1_500 * index, 99_999)}

    monkeypatch.setattr(_runner, "energy_uj", look)
    np.save(tmp_path / "image.npy", np.zeros((1, 3, 16, 16), np.float32))
    (tmp_path / "JOBS.json").write_text(
        json.dumps({**MEASURE, "processes": False, "jobs": [HARNESS]})
    )
    found = _runner.perform(tmp_path / "JOBS.json", lambda *_: None)
    assert found["jobs"][0]["energy_mj"] == (told and pytest.approx(told))


def test_marks_are_seen_from_outside_and_the_libraries_are_told(
    artifacts: Mapping[str, Path], pixels: NDArray[Any], tmp_path: Path
) -> None:
    np.save(tmp_path / "image.npy", pixels[:1])
    wanted = {
        **MEASURE,
        "processes": False,
        "marks": True,
        "jobs": [job("onnx", artifacts["onnx"])],
    }
    result, _ = run(tmp_path, wanted)
    assert result["jobs"][0]["error"] is None
    assert "onnxruntime" in result["maps"]


def test_what_goes_before_goes_the_same_way_and_is_not_counted(
    pixels: NDArray[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "image.npy", pixels[:1])
    marked: list[int] = []
    monkeypatch.setattr(_runner, "mark", marked.append)
    here = _runner.Here()
    here.load(HARNESS, str(tmp_path), "image.npy", threads=1, warm_up=2, marks=True)
    here.time(3)
    counted = [_runner.COUNT_FROM, _runner.COUNT_TO]
    assert marked == [_runner.UNSEEN] * 4 + 3 * counted
    marked.clear()
    here.load(HARNESS, str(tmp_path), "image.npy", threads=1, warm_up=2, marks=False)
    here.time(3)
    assert not marked


@pytest.mark.parametrize("name", ["onnx", "openvino", "tflite"])
def test_its_logits_are_those_of_the_runtime_here(
    name: str, artifacts: Mapping[str, Path], pixels: NDArray[Any], tmp_path: Path
) -> None:
    np.save(tmp_path / "images.npy", pixels)
    task = {"task": "infer", "images": "images.npy", "batch": 1, "threads": 1}
    wanted = {**task, "job": job(name, artifacts[name]), "logits": "logits.npy"}
    result, lines = run(tmp_path, wanted)
    assert result["error"] is None
    assert lines[-1] == {"done": 5, "total": 5}
    here = runtimes()[name].load(artifacts[name], 1)
    expected = np.concatenate([run_padded(here, one[None], 1) for one in pixels])
    logits = np.load(tmp_path / "logits.npy")
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, expected)


def test_a_job_that_fails_says_why_and_the_others_go_on(
    artifacts: Mapping[str, Path], pixels: NDArray[Any], tmp_path: Path
) -> None:
    np.save(tmp_path / "image.npy", pixels[:1])
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"nothing")
    jobs = [job("onnx", damaged, "damaged"), job("onnx", artifacts["onnx"])]
    result, _ = run(tmp_path, {**MEASURE, "jobs": jobs})
    assert result["error"] is None
    broken, whole = result["jobs"]
    assert "InvalidProtobuf" in broken["error"]
    assert "\n" not in broken["error"]
    assert (broken["wall_ms"], len(whole["wall_ms"])) == ([], 12)


def test_a_process_that_is_killed_is_a_job_that_failed(
    artifacts: Mapping[str, Path], pixels: NDArray[Any], tmp_path: Path
) -> None:
    np.save(tmp_path / "image.npy", pixels[:1])
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "onnxruntime.py").write_text("import os; os.abort()")
    jobs = [job("onnx", artifacts["onnx"]), {**HARNESS, "runtime": "tflite"}]
    packages = str(tmp_path / "packages")
    result, _ = run(tmp_path, {**MEASURE, "jobs": jobs}, PYTHONPATH=packages)
    assert result["jobs"][0]["error"] == "its process ended with signal SIGABRT"
    assert result["jobs"][1]["error"] is None


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"task": "dance"}, "KeyError: 'dance'"),
        ({**MEASURE, "jobs": [HARNESS]}, "FileNotFoundError"),
        ({"task": "measure"}, "KeyError: 'jobs'"),
    ],
)
def test_what_cannot_be_done_is_one_line(task: dict[str, Any], said: str, tmp_path: Path) -> None:
    result, _ = run(tmp_path, task)
    told = result["error"] or result["jobs"][0]["error"]
    assert said in told


def test_without_numpy_it_still_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "numpy.py").write_text("raise ModuleNotFoundError('No numpy')")
    packages = str(tmp_path / "packages")
    result, _ = run(tmp_path, {**MEASURE, "jobs": [HARNESS]}, PYTHONPATH=packages)
    assert result["machine"]["cores"] > 0
    assert result["jobs"][0]["error"] == "ModuleNotFoundError: No numpy"
