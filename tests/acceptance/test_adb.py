"""An Android phone, as far as a machine without one goes.

Adb's own client, the small adbd of the tests, and behind its shell the on-device runner in the ARM
build of Python, emulated. What it computes must be what the same emulated board computes without a
link between.
"""

from __future__ import annotations

import os
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.store import CACHE_VARIABLE, cache_folder
from pipeline.worker import silent
from targets.base import DeviceInfo, Job, device
from targets.devices import adb
from targets.devices.emulated_arm64 import guest, sysroot
from targets.devices.emulated_arm64.device import DEVICES
from targets.devices.emulated_arm64.profiles import PROFILES

pytestmark = pytest.mark.acceptance

Adbd: Any = runpy.run_path(
    str(Path(__file__).parents[1] / "targets" / "devices" / "adbd.py"),
)["Adbd"]
BOARD = "pi5"


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """Return a command that is the emulated board's Python."""
    DEVICES.setup(silent)
    found = sysroot.find()
    assert found is not None
    place = tmp_path / "python"
    variables = [f"{k}={v}" for k, v in guest.environment(found).items()]
    emulator, *words = guest.command(found, PROFILES[BOARD], [])
    # The runner starts processes with the Python that it runs in, which must be this command.
    script = shlex.join(["env", *variables, emulator, "-0", str(place), *words])
    place.write_text(f'#!/bin/sh\nexec {script} "$@"\n')
    place.chmod(0o755)
    return place


@pytest.fixture
def phone(python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[adb.Phone]:
    client = shutil.which("adb")
    assert client is not None, "adb is missing: apt-get install adb"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv(CACHE_VARIABLE, str(cache_folder()))  # it lies in the true home
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "data"
    folder.mkdir()
    daemon = Adbd(folder, {"PATH": os.environ["PATH"], "HOME": str(folder)}, "/bin/sh")
    serial = f"127.0.0.1:{daemon.port}"
    subprocess.run([client, "connect", serial], check=True, capture_output=True)
    yield adb.Phone(adb.parsed(serial), folder=str(folder), python=str(python))
    subprocess.run([client, "kill-server"], check=False, capture_output=True)
    daemon.stop()


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    command = [sys.executable, "-P", "-m", "pipeline.cli", "run", "--out", str(tmp_path / "run")]
    command += ["--runtimes", "tflite", "--tune", "off", "--no-bench", "--eval-images", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return tmp_path / "run" / "artifacts" / "tflite-w8a8" / "model.tflite"


def test_the_runner_behind_adb_runs_arm_builds(phone: adb.Phone, artifact: Path) -> None:
    info, board = phone.probe(), device(f"emulated-arm64:{BOARD}")
    assert isinstance(info, DeviceInfo)
    here = board.probe()
    assert isinstance(here, DeviceInfo)
    assert info.isa == here.isa
    job = Job(label="w8a8", runtime="tflite", path=artifact)
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32)).astype(np.float32)
    how: Any = {"threads": 1, "progress": silent}
    there = phone.infer(job, images, batch=1, **how)
    np.testing.assert_array_equal(there, board.infer(job, images, batch=1, **how))
    (timed,) = phone.measure([job], images[:1], rounds=2, per_round=2, **how)
    assert len(timed.wall_ms) == len(timed.cpu_ms) == 4
    assert (
        timed.versions == board.measure([job], images[:1], rounds=1, per_round=1, **how)[0].versions
    )
