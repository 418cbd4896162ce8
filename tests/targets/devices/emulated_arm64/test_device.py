"""The family and the device, with a host's Python in the emulator's place."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import store
from pipeline.errors import DeviceError, UsageError
from pipeline.worker import silent
from targets.base import DeviceInfo, Job, NotRun, device, devices, runtime
from targets.devices import _exchange as exchange
from targets.devices.emulated_arm64 import device as emulated
from targets.devices.emulated_arm64 import guest, plugin, sysroot
from targets.devices.emulated_arm64.profiles import Profile

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8)).astype(np.float32)
NULL = Job(label="harness", runtime="onnx", path=None)
COUNTS = "region\nran 0 5\nregion\nran 0 5\nregion\nran 0 6\nblock 0 1000 4e8394414e839441\n"


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Sequence[str]]:
    """Run the guest's commands with this Python; return their arguments."""
    ran: list[Sequence[str]] = []

    def command(
        _: Path,
        __: Profile,
        arguments: Sequence[str],
        *,
        plugin: Path | None = None,
        counts: Path | None = None,
    ) -> list[str]:
        ran.append(arguments)
        if plugin is not None and counts is not None:
            counts.write_text(COUNTS)
        return [sys.executable, *arguments]

    monkeypatch.setattr(guest, "command", command)
    monkeypatch.setattr(guest, "environment", lambda _: {})
    monkeypatch.setattr(guest, "require_tools", lambda _: None)
    monkeypatch.setattr(sysroot, "find", lambda: tmp_path)
    monkeypatch.setattr(plugin, "built", lambda: tmp_path / "counter.so")
    return ran


def test_every_profile_is_found_under_its_name() -> None:
    names = [name for name in devices() if name.startswith("emulated-arm64:")]
    assert names == [f"emulated-arm64:{p}" for p in ("pi3", "pi4", "pi5", "phone")]
    assert device("emulated-arm64:pi5").name == "emulated-arm64:pi5"


@pytest.mark.parametrize("address", ["", "pi6"])
def test_another_profile_is_a_wrong_word(address: str) -> None:
    with pytest.raises(UsageError, match="Allowed: pi3, pi4, pi5, phone"):
        device(f"emulated-arm64:{address}")


def test_it_is_not_run_before_it_is_set_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(store.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(guest, "require_tools", lambda _: None)
    board = device("emulated-arm64:pi5")
    found = board.probe()
    assert isinstance(found, NotRun)
    assert "convnext-edge devices setup emulated-arm64" in found.reason
    with pytest.raises(DeviceError, match="convnext-edge devices setup emulated-arm64"):
        board.infer(NULL, IMAGES, batch=1, threads=1, progress=silent)


def test_a_missing_tool_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = device("emulated-arm64:pi5").probe()
    assert isinstance(found, NotRun)
    assert "apt-get install -y qemu-user mmdebstrap gcc" in found.reason


@pytest.mark.usefixtures("host")
def test_the_dot_product_begins_with_the_pi5() -> None:
    flags = {}
    for name in ("pi3", "pi4", "pi5", "phone"):
        found = device(f"emulated-arm64:{name}").probe()
        assert isinstance(found, DeviceInfo)
        assert found.kind == "emulated"
        flags[name] = {flag for flag in found.isa if flag in {"asimddp", "i8mm"}}
    assert flags == {"pi3": set(), "pi4": set(), "pi5": {"asimddp"}, "phone": {"asimddp", "i8mm"}}


def test_coreml_does_not_run_there() -> None:
    board = device("emulated-arm64:pi4")
    assert board.can_run(runtime("tflite")) is None
    assert board.can_run(runtime("coreml")) is not None


def test_counts_come_out_and_no_time(host: list[Sequence[str]]) -> None:
    done: list[tuple[int, int]] = []
    found = device("emulated-arm64:pi5").measure(
        [NULL, NULL],
        IMAGES[:1],
        rounds=1,
        per_round=1,
        threads=1,
        progress=lambda a, b, _note="": done.append((a, b)),
    )
    assert len(found) == len(host) == 2
    assert done[-1] == (2, 2)
    for row in found:
        assert row.instructions == (10, 10, 12)
        assert row.instruction_kinds == {"dot_product": 11, "i8mm": 0}
        assert sum(row.symbols.values()) == 11
        assert (row.wall_ms, row.cpu_ms, row.load_ms, row.first_ms) == ((), (), None, None)


def test_threads_are_not_counted() -> None:
    with pytest.raises(DeviceError, match="--threads 1"):
        device("emulated-arm64:pi5").measure(
            [NULL], IMAGES[:1], rounds=1, per_round=1, threads=2, progress=silent
        )


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("batch", [1, 2])
def test_logits_come_in_the_images_order(batch: int) -> None:
    done: list[int] = []
    logits = device("emulated-arm64:pi4").infer(
        NULL, IMAGES, batch=batch, threads=1, progress=lambda a, _b, _note="": done.append(a)
    )
    np.testing.assert_array_equal(logits, IMAGES[:, 0, 0, :1])
    assert done[-1] == len(IMAGES)


@pytest.mark.usefixtures("host")
def test_a_guest_that_dies_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    dies = [sys.executable, "-c", "import sys; sys.exit('qemu: uncaught target signal 11')"]
    monkeypatch.setattr(guest, "command", lambda *_, **__: dies)
    with pytest.raises(DeviceError, match="uncaught target signal 11") as caught:
        device("emulated-arm64:pi4").infer(NULL, IMAGES, batch=1, threads=1, progress=silent)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(
    ("child", "then", "said"),
    [
        (">/dev/null", "for i in 1 2; do sleep 1.6; tell $i; done; wait", [0, 1, 2]),
        (">/dev/null", "printf '{\"done\": 1'; wait", [0]),
        (">/dev/null", "exec >/dev/null; wait", [0]),
        ("", "exit 0", [0]),
    ],
    ids=["silent", "in the middle of a line", "output closed", "its child holds the output"],
)
def test_a_guest_that_hangs_is_killed_with_its_children_and_said(
    child: str, then: str, said: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids, done = tmp_path / "pids", list[int]()
    text = (
        'tell() { echo "{\\"done\\": $1, \\"total\\": 9}"; }\n'
        f'sleep 600 {child} &\necho "$$ $!" >{pids}\ntell 0\n{then}\n'
    )
    monkeypatch.setattr(guest, "command", lambda *_, **__: ["/bin/sh", "-c", text])
    monkeypatch.setattr(emulated, "SILENCE", 3.0)  # less than it takes to say all three
    with pytest.raises(DeviceError, match=r"pi4: the guest has said nothing for 3 s\.") as caught:
        device("emulated-arm64:pi4").infer(
            NULL, IMAGES, batch=1, threads=1, progress=lambda a, _b, _note="": done.append(a)
        )
    assert str(caught.value).isprintable()
    assert done == said
    deadline = time.monotonic() + 10
    while running(pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running(pids) == []


def running(pids: Path) -> list[str]:
    """Return those that still run of the processes that a file names."""
    found = []
    for pid in pids.read_text().split():
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            found += [pid] if state != "Z" else []
    return found


@pytest.mark.usefixtures("host")
def test_a_damaged_artifact_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"nothing")
    job = Job(label="w8a8", runtime="onnx", path=path)
    with pytest.raises(DeviceError, match="the task failed"):
        device("emulated-arm64:pi4").infer(job, IMAGES, batch=1, threads=1, progress=silent)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(("rounds", "inferences"), [(1, 1), (8, 3)])
def test_a_count_takes_an_inference_per_round_and_three_at_most(
    rounds: int, inferences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    original = exchange.timing

    def timing(*arguments: Any, rounds: int, per_round: int, **more: Any) -> Any:
        asked.append((rounds, per_round))
        return original(*arguments, rounds=rounds, per_round=per_round, **more)

    monkeypatch.setattr(emulated, "timing", timing)
    device("emulated-arm64:pi5").measure(
        [NULL], IMAGES[:1], rounds=rounds, per_round=9, threads=1, progress=silent
    )
    assert asked == [(inferences, 1)]  # so that it says something after each


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(("side", "inferences"), [(32, 40), (33, 8), (96, 8), (97, 0)])
def test_the_fewer_instructions_an_image_takes_the_more_inferences_go_before(
    side: int, inferences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    original = guest.command

    def command(root: Path, profile: Profile, arguments: Sequence[str], **more: Any) -> list[str]:
        asked.append(json.loads(Path(arguments[1]).read_text())["warm_up"])
        return original(root, profile, arguments, **more)

    monkeypatch.setattr(guest, "command", command)
    image = np.zeros((1, 3, side, side), np.float32)
    device("emulated-arm64:pi5").measure(
        [NULL], image, rounds=1, per_round=1, threads=1, progress=silent
    )
    assert asked == [inferences]
