"""This CPU held to a lower instruction set: what it says of itself, and that oneDNN obeys."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.records import PROFILE_OF_ISA
from pipeline.worker import Worker
from targets.base import DeviceInfo, NotRun, device, devices, runtimes
from targets.devices import cpu, local
from targets.devices.cpu import LEVELS, VARIABLE

EVERYTHING = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")


@pytest.fixture
def newest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has all of them."""
    for module in (cpu, local):
        monkeypatch.setattr(module, "isa_flags", lambda: EVERYTHING)


@pytest.mark.usefixtures("newest")
@pytest.mark.parametrize(
    ("name", "profile"),
    [
        ("avx2", "avx2"),
        ("avx2-vnni", "full"),
        ("avx512", "avx2"),
        ("avx512-vnni", "full"),
        ("amx", "full"),
    ],
)
def test_a_level_s_flags_tell_which_integers_it_runs_exactly(name: str, profile: str) -> None:
    info = device(f"cpu:{name}").probe()
    assert isinstance(info, DeviceInfo)
    assert (info.name, info.kind) == (f"cpu:{name}", "host")
    isa = local.isa_of(info.isa)
    assert isa is not None
    assert PROFILE_OF_ISA[isa] == profile


@pytest.mark.usefixtures("newest")
def test_all_levels_of_a_cpu_are_found() -> None:
    assert {f"cpu:{name}" for name in LEVELS} <= set(devices())


def test_a_level_that_this_cpu_lacks_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cpu, local):
        monkeypatch.setattr(module, "isa_flags", lambda: ("avx2",))
    assert "cpu:amx" not in devices()
    found = device("cpu:amx").probe()
    assert isinstance(found, NotRun)
    assert "no amx_int8" in found.reason


@pytest.mark.parametrize("name", ["onnx", "tflite"])
def test_others_cannot_be_told(name: str) -> None:
    cannot = device("cpu:avx2").can_run(runtimes()[name])
    assert isinstance(cannot, NotRun)
    assert "cannot be held" in cannot.reason


def test_an_unknown_level_is_one_line() -> None:
    with pytest.raises(UsageError, match=r"unknown instruction set: sse9\. Allowed: cpu:avx2"):
        device("cpu:sse9")


def test_a_worker_has_the_variables_that_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text(
        "import os\ndef say(progress):\n    return os.environ['ONEDNN_MAX_CPU_ISA']\n"
    )
    board = device("cpu:avx2")
    assert isinstance(board, cpu.HeldBack)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {**board.environment, "PYTHONPATH": path}
    with Worker(tmp_path / "log", environment=environment) as worker:
        assert worker.call("told:say").value == "AVX2"
    assert VARIABLE not in os.environ
