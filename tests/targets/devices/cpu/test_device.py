"""This CPU held to a lower instruction set: what it says of itself, and that libraries obey."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.records import PROFILE_OF_ISA
from pipeline.worker import Worker
from targets.base import DeviceInfo, NotRun, device, devices, runtimes
from targets.devices import local
from targets.devices.cpu import cpuid
from targets.devices.cpu import device as held
from targets.devices.cpu.device import LEVELS, ONEDNN

EVERYTHING = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")


def has(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    for module in (held, local):
        monkeypatch.setattr(module, "isa_flags", lambda: flags)


@pytest.fixture
def newest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has all of them."""
    has(monkeypatch, *EVERYTHING)


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


def test_a_level_hides_all_that_those_above_it_need_and_nothing_of_its_own() -> None:
    order = ["avx2", "avx512", "avx512-vnni", "amx"]
    for index, name in enumerate(order):
        assert {LEVELS[other].needs for other in order[index + 1 :]} <= LEVELS[name].hides
        assert LEVELS[name].needs not in LEVELS[name].hides
        assert LEVELS[name].hides <= set(cpuid.BITS)
    assert LEVELS["avx2"].hides - LEVELS["avx2-vnni"].hides == {"avx_vnni"}
    assert all(level.hides for level in LEVELS.values())


@pytest.mark.usefixtures("newest")
def test_all_levels_of_a_cpu_are_found() -> None:
    assert {f"cpu:{name}" for name in LEVELS} <= set(devices())


def test_a_level_that_this_cpu_lacks_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, "avx2")
    assert "cpu:amx" not in devices()
    found = device("cpu:amx").probe()
    assert isinstance(found, NotRun)
    assert "no amx_int8" in found.reason


def test_where_nothing_can_be_hidden_openvino_alone_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpuid, "why_not", lambda: "this kernel hides nothing")
    board = device("cpu:avx2")
    assert isinstance(board, held.HeldBack)
    assert board.environment() == {ONEDNN: "AVX2"}
    assert board.can_run(runtimes()["openvino"]) is None
    for name in ("onnx", "tflite"):
        cannot = board.can_run(runtimes()[name])
        assert isinstance(cannot, NotRun)
        assert (
            cannot.reason == f"{name} chooses its kernels by CPUID, and this kernel hides nothing"
        )


def test_how_it_is_held_belongs_to_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, *EVERYTHING)
    found = []
    for why in (None, "this kernel hides nothing"):
        monkeypatch.setattr(cpuid, "why_not", lambda why=why: why)
        info = device("cpu:avx2").probe()
        assert isinstance(info, DeviceInfo)
        found.append(info.versions)
    assert found[0] != found[1]


def test_an_unknown_level_is_one_line() -> None:
    with pytest.raises(UsageError, match=r"unknown instruction set: sse9\. Allowed: cpu:avx2"):
        device("cpu:sse9")


def test_a_worker_has_the_variables_that_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpuid, "why_not", lambda: "this kernel hides nothing")
    (tmp_path / "told.py").write_text(
        "import os\ndef say(progress):\n    return os.environ['ONEDNN_MAX_CPU_ISA']\n"
    )
    board = device("cpu:avx2")
    assert isinstance(board, held.HeldBack)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    environment = {**board.environment(), "PYTHONPATH": path}
    with Worker(tmp_path / "log", environment=environment) as worker:
        assert worker.call("told:say").value == "AVX2"
    assert ONEDNN not in os.environ
