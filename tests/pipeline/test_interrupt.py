"""Ctrl-C midway: exit code 130, nothing half-made, nobody left at work, and the rest is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

CLI = (sys.executable, "-P", "-m", "pipeline.cli")
INTERRUPTED = 130
FEW = ("--calibration-images", "32")


def _wait_until(true: Callable[[], object], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _workers(out: Path) -> list[str]:
    """The processes whose standard error is a log of this run folder."""
    logs = str((out / "logs").resolve())
    found = []
    for process in Path("/proc").iterdir():
        try:
            if str((process / "fd" / "2").readlink()).startswith(logs):
                found.append(process.name)
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks for workers in /proc")
def test_ctrl_c_ends_everything_and_the_same_command_resumes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [*CLI, "run", "--out", str(out), "--no-bench", *FEW],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert _wait_until(lambda: list(out.glob("stages/checkpoint-*")), 60)
        assert _wait_until(lambda: _workers(out), 60), "the next worker has not started"
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()

    assert process.returncode == INTERRUPTED, stderr
    assert "Traceback" not in stdout + stderr
    assert "interrupted" in stderr
    assert _wait_until(lambda: not list(out.rglob(".partial-*")), 5)
    assert _wait_until(lambda: not _workers(out), 5)

    again = subprocess.run(
        [*CLI, "quantize", "--out", str(out), *FEW], capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert "2 stages made, 1 reused" in again.stdout
    assert (out / "model" / "params.json").is_file()


def test_ctrl_c_while_verifying_ends_at_once(tmp_path: Path) -> None:
    command = [*CLI, "run", "--runtimes", "onnx,tflite", "--no-bench", *FEW, "--out", "interrupted"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    stages = tmp_path / "interrupted" / "stages"
    deadline = time.monotonic() + 600  # it hangs
    while not list(stages.glob(".partial-*-verify-onnx-*")):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == INTERRUPTED
    assert "Traceback" not in errors
    assert not list(stages.glob(".partial-*"))
