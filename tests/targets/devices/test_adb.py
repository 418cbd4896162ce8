"""Devices over adb: Android's own client and server, against the small adbd beside this file.

Transport is what this proves. The shell behind it is this machine's, and the benchmark_model here
only prints what the real one would.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.errors import DeviceError, UsageError
from pipeline.records import OpKind
from pipeline.store import sha256_file
from pipeline.worker import silent
from targets.base import DeviceInfo, Job, NotRun, OpTime, Profiled, device, run_padded, runtimes
from targets.devices import adb
from targets.devices._benchmarked import NAME, VARIABLE
from targets.devices._workspace import Patience
from targets.runtimes._litert_profiler import profile

Adbd: Any = runpy.run_path(str(Path(__file__).with_name("adbd.py")))["Adbd"]
REQUIRE_ADB = "CONVNEXT_EDGE_REQUIRE_ADB"
QUICK = Patience(command=30, silence=60, reconnect=(0.1, 0.5, 1, 2), poll=(0.05, 0.2))
HURRIED = Patience(command=30, silence=60, reconnect=(0.1, 0.1), poll=(0.05,))
ONCE: dict[str, Any] = {"rounds": 1, "per_round": 1, "threads": 1, "progress": silent}
NULL = [Job(label="harness", runtime="onnx", path=None)]
PIXEL = np.zeros((1, 3, 2, 2), np.float32)
TMPFS_KB = 1024
TOOLS = {
    "getprop": 'case $1 in *release) echo 14;; *) echo "${1##*.}";; esac',
    "dumpsys": 'case $1 in battery) echo "  temperature: 287";; *) echo "Thermal Status: 1";; esac',
}
"""What Android's shell has and this one may not; a name's last word stands for a property."""
BENCHMARK_MODEL = """#!/bin/sh
echo "$@" >>"$HOME/calls"
runs=50
for word; do case $word in
--graph=*) graph=${word#*=};;
--num_runs=*) runs=${word#*=};;
--op_profiling_output_file=*) profile=${word#*=};;
--input_layer_shape=*) batch=${word#*=} batch=${batch%%,*};;
--output_filepath=*) taken=${word#*=};;
--use_nnapi=true) echo "INFO: Though NNAPI delegate is explicitly applied, the model graph will \
not be executed by the delegate.";;
esac; done
[ -s "$graph" ] || { echo "ERROR: Could not open '$graph'."; exit 1; }
us=$(wc -c <"$graph")
echo "INFO: count=4 first=$((us + 9)) curr=$us min=$us max=$((us + 9)) avg=$((us + 2)) std=3"
if [ "$runs" = 1 ]; then echo "INFO: count=1 curr=$us"
else echo "INFO: count=$runs first=$us curr=$((us + 1)) min=$us max=$((us + 1)) avg=$us.5 std=1"; fi
echo "INFO: Inference timings in us: Init: 5000, First inference: 1, Inference (avg): $us.5"
if [ -n "$taken" ]; then
size=$(($(wc -c <given) / batch))
for i in $(seq 0 $((batch - 1))); do tail -c +$((i * size + 1)) given | head -c 12; done >"$taken"
fi
[ -z "$profile" ] || cp "$HOME/profile" "$profile"
"""


class Lab:
    """An adb server of its own, and the devices on it."""

    def __init__(self, folder: Path, adb_path: str) -> None:
        self.folder, self.adb_path = folder, adb_path
        self.home = folder / "home"
        self.tmp = self.home / "data" / "local" / "tmp"
        self.tmp.mkdir(parents=True)
        binaries = folder / "bin"
        binaries.mkdir()
        for name, text in TOOLS.items():
            (binaries / name).write_text(f"#!/bin/sh\n{text}\n")
            (binaries / name).chmod(0o755)
        self.environment = {
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "OMP_NUM_THREADS": "1",
        }
        self.shell = "/bin/sh"
        self.daemons: list[Any] = []

    def attach(self, mood: str = "device") -> Any:
        """Switch a device on and connect it; return its adbd."""
        daemon = Adbd(self.home, self.environment, self.shell)
        daemon.mood = mood
        self.daemons.append(daemon)
        self.client("connect", f"127.0.0.1:{daemon.port}")
        return daemon

    def client(self, *words: str) -> str:
        done = subprocess.run(
            [self.adb_path, *words], capture_output=True, text=True, check=False, timeout=60
        )
        return done.stdout

    def phone(self, daemon: Any, options: str = "", **how: Any) -> adb.Phone:
        address = adb.parsed(f"127.0.0.1:{daemon.port}{options}")
        words = {
            "folder": str(self.tmp),
            "python": sys.executable,
            "patience": QUICK,
            **how,
        }
        return adb.Phone(address, **words)

    def tool(self, place: Path) -> Path:
        place.write_text(BENCHMARK_MODEL)
        place.chmod(0o755)
        (self.home / "profile").touch()
        return place

    def runs(self) -> list[Path]:
        return list((self.tmp / "convnext-edge" / "runs").iterdir())

    def stop(self) -> None:
        self.client("kill-server")
        for daemon in self.daemons:
            daemon.stop()


def needed(command: str) -> str:
    """Return where a command is."""
    path = shutil.which(command)
    if path is None:
        message = f"devices over adb are tested with {command}: apt-get install {command}"
        if os.environ.get(REQUIRE_ADB):
            pytest.fail(message)
        pytest.skip(message)
    return path


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    path = needed("adb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(free.getsockname()[1]))
    (tmp_path / "user").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.delenv(VARIABLE, raising=False)
    started = Lab(tmp_path, path)
    yield started
    started.stop()


def jobs(artifacts: Mapping[str, Path], name: str = "tflite") -> list[Job]:
    null = Job(label="harness", runtime=name, path=None)
    return [null, Job(label="float", runtime=name, path=artifacts[name])]


def test_from_the_list_to_logits(
    artifacts: Mapping[str, Path],
    pixels: NDArray[np.float32],
    lab: Lab,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(adb, "FOLDER", str(lab.tmp))
    monkeypatch.setenv(adb.PYTHON, sys.executable)
    serial = f"127.0.0.1:{lab.attach().port}"
    assert adb.DEVICES.found() == (serial,)
    phone = device("adb:")
    info = phone.probe()
    assert isinstance(info, DeviceInfo)
    assert (info.name, info.kind) == (f"adb:{serial}", "device")
    assert info.description.startswith("manufacturer model model Android 14, ")
    assert phone.can_run(runtimes()["onnx"]) is None
    assert isinstance(phone.can_run(runtimes()["coreml"]), NotRun)
    harness, timed = phone.measure(
        jobs(artifacts), pixels[:1], rounds=2, per_round=3, threads=1, progress=silent
    )
    assert len(timed.wall_ms) == len(harness.wall_ms) == len(timed.cpu_ms) == 6
    logits = phone.infer(jobs(artifacts)[1], pixels, batch=1, threads=1, progress=silent)
    here = runtimes()["tflite"].load(artifacts["tflite"], 1)
    expected = np.concatenate([run_padded(here, one[None], 1) for one in pixels])
    np.testing.assert_array_equal(logits, expected)
    assert lab.runs() == []


def test_a_stale_file_of_equal_size_is_replaced(
    artifacts: Mapping[str, Path], pixels: NDArray[np.float32], lab: Lab
) -> None:
    daemon, how = lab.attach(), {**ONCE, "per_round": 2}
    lab.phone(daemon).measure(jobs(artifacts), pixels[:1], **how)
    first = len(daemon.pushed)
    lab.phone(daemon).measure(jobs(artifacts), pixels[:1], **how)
    again = len(daemon.pushed) - first
    place = lab.tmp / "convnext-edge" / "files" / sha256_file(artifacts["tflite"])
    stale = bytes(artifacts["tflite"].stat().st_size)
    place.write_bytes(stale)
    lab.phone(daemon).measure(jobs(artifacts), pixels[:1], **how)
    assert len(daemon.pushed) - first - again == again + 1
    assert place.read_bytes() == artifacts["tflite"].read_bytes() != stale


def test_cores_are_kept_to(lab: Lab) -> None:
    daemon = lab.attach()
    last = max(os.sched_getaffinity(0))
    whole, one = lab.phone(daemon).probe(), lab.phone(daemon, f",cores={1 << last:x}").probe()
    assert isinstance(whole, DeviceInfo)
    assert isinstance(one, DeviceInfo)
    assert (whole.cores, one.cores) == (len(os.sched_getaffinity(0)), 1)
    assert one.name.endswith(f",cores={1 << last:x}")


@pytest.mark.parametrize("where", ["pushed", "on the device"])
def test_benchmark_model_takes_turns(
    where: str, artifacts: Mapping[str, Path], pixels: NDArray[np.float32], lab: Lab
) -> None:
    tool = lab.tool((lab.folder if where == "pushed" else lab.tmp) / NAME)
    phone = lab.phone(
        lab.attach(),
        f",cores={1 << min(os.sched_getaffinity(0)):x},delegate=gpu",
        pushed=tool if where == "pushed" else None,
    )
    info = phone.probe()
    assert isinstance(info, DeviceInfo)
    assert info.description.endswith(f"{NAME} {sha256_file(tool)[:12]}, delegate gpu")
    assert info.cores == 1
    assert info.accelerated
    assert info.hardware == "manufacturer model model"
    assert isinstance(phone.can_run(runtimes()["onnx"]), NotRun)
    other = lab.folder / "int8.tflite"
    other.write_bytes(b"12345")
    ways = [*jobs(artifacts), Job(label="w8a8", runtime="tflite", path=other)]
    said: list[tuple[int, int]] = []
    harness, timed, fast = phone.measure(
        ways,
        pixels[:1],
        rounds=2,
        per_round=3,
        threads=2,
        progress=lambda *got: said.append(got),
    )
    size = artifacts["tflite"].stat().st_size / 1000
    assert timed.wall_ms == pytest.approx([size, size + 0.001, size] * 2)
    assert fast.wall_ms == pytest.approx([0.005, 0.006, 0.005] * 2)
    assert (harness.wall_ms, timed.cpu_ms, timed.peak_memory_bytes) == ((), (), None)
    assert (fast.load_ms, fast.first_ms) == (5.0, 0.014)
    assert fast.versions == {NAME: sha256_file(tool)[:12]}
    assert timed.before is not None
    assert timed.before.temperatures_c["battery"] == 28.7
    assert timed.before.throttled == "Thermal Status: 1"
    assert said[-1] == (8, 8)
    calls = (lab.home / "calls").read_text().splitlines()
    assert [call.split()[0][-8] for call in calls] == list("00110011")
    assert "--num_threads=2 --use_gpu=true --warmup_min_secs=0 --warmup_runs=4" in calls[0]
    assert lab.runs() == []


def test_an_artifact_that_the_tool_refuses_says_why_beside_the_others(
    artifacts: Mapping[str, Path], lab: Lab
) -> None:
    lab.tool(lab.tmp / NAME)
    refused = lab.folder / "empty.tflite"
    refused.write_bytes(b"")
    ways = [*jobs(artifacts), Job(label="w8a8", runtime="tflite", path=refused)]
    harness, timed, failed = lab.phone(lab.attach(), f",tool={NAME}").measure(
        ways, PIXEL, rounds=2, per_round=2, threads=1, progress=silent
    )
    assert (harness.error, timed.error, len(timed.wall_ms)) == (None, None, 4)
    assert "ERROR: Could not open" in (failed.error or "")
    assert (failed.wall_ms, failed.before) == ((), timed.before)


@pytest.mark.parametrize("batch", [1, 2])
def test_benchmark_model_gives_outputs(
    batch: int, artifacts: Mapping[str, Path], pixels: NDArray[np.float32], lab: Lab
) -> None:
    """The tool here takes the first pixel's channels for logits."""
    lab.tool(lab.tmp / NAME)
    phone, said = lab.phone(lab.attach(), f",tool={NAME}"), list[tuple[int, int]]()
    logits = phone.infer(
        jobs(artifacts)[1],
        pixels,
        batch=batch,
        threads=1,
        progress=lambda *got: said.append(got),
    )
    np.testing.assert_array_equal(logits, pixels[:, :, 0, 0])
    assert said[-1][:2] == (5, 5)
    assert f"--input_layer_shape={batch},32,32,3 " in (lab.home / "calls").read_text()


def test_androids_own_shell_and_tools_are_enough(
    artifacts: Mapping[str, Path], pixels: NDArray[np.float32], lab: Lab
) -> None:
    """These are mksh and toybox."""
    lab.shell, toybox, tools = needed("mksh"), needed("toybox"), lab.folder / "bin"
    for name in subprocess.run([toybox], capture_output=True, text=True, check=True).stdout.split():
        (tools / name).symlink_to(toybox)
    (tools / "sh").unlink(missing_ok=True)
    (tools / "sh").symlink_to(lab.shell)
    lab.environment["PATH"] = str(tools)
    lab.tool(lab.tmp / NAME)
    daemon = lab.attach()
    how = {**ONCE, "rounds": 2, "per_round": 2}
    for tool in ("runner", NAME):
        phone = lab.phone(daemon, f",cores=1,tool={tool}")
        assert isinstance(phone.probe(), DeviceInfo)
        _, timed = phone.measure(jobs(artifacts), pixels[:1], **how)
        assert len(timed.wall_ms) == 4
        assert timed.after is not None
        assert timed.after.load is not None
    assert lab.runs() == []


def test_operations_are_told_by_kind(artifacts: Mapping[str, Path], lab: Lab) -> None:
    """The names are those that LiteRT's kernels have here; the table is as the real tool's."""
    events = profile(artifacts["tflite"], 1, warm_up=1, inferences=1)
    lines = [
        "Operator-wise Profiling Info for Regular Benchmark Runs:",
        "=============== Run Order ===============",
        "node type, first, avg_ms, %, cdf%, mem KB, times called, name",
        *(f"{op}, 9, {ms}, 1%, 1%, 0, 1, Delegate/{i}" for i, (op, ms) in enumerate(events)),
        "",
    ]
    (lab.home / "profile").write_text("\n".join(lines))
    lab.tool(lab.tmp / NAME)
    phone = lab.phone(lab.attach())
    assert isinstance(phone, Profiled)
    job = jobs(artifacts)[1]
    found = phone.op_times(job, threads=1, inferences=15)
    here = runtimes()["tflite"].op_times(artifacts["tflite"], PIXEL, threads=1, inferences=2)
    assert sums(found).keys() == sums(here).keys()
    assert sum(sums(found).values()) == pytest.approx(sum(ms for _, ms in events))
    lines[3] = "TfLiteGpuDelegateV2, 9, 9, 1%, 1%, 0, 1, [logits]:9"
    (lab.home / "profile").write_text("\n".join([*lines[:4], ""]))
    none = phone.op_times(job, threads=1, inferences=15)
    assert isinstance(none, NotRun)
    assert "keeps no profile" in none.reason
    (lab.home / "profile").write_text("nothing\n")
    with pytest.raises(DeviceError, match="no table of operations"):
        phone.op_times(job, threads=1, inferences=15)


def sums(found: list[OpTime] | NotRun) -> dict[OpKind, float]:
    assert isinstance(found, list)
    total: dict[OpKind, float] = {}
    for one in found:
        total[one.kind] = total.get(one.kind, 0) + one.ms
    return total


def test_without_python_and_tool_it_is_said(lab: Lab) -> None:
    found = lab.phone(lab.attach(), python="no-python").probe()
    assert isinstance(found, NotRun)
    assert "has no benchmark_model. Allowed: LiteRT's benchmark_model at" in found.reason


@pytest.mark.parametrize(
    ("text", "options", "why"),
    [
        (BENCHMARK_MODEL, ",delegate=nnapi", "all would run on the CPU"),
        ("#!/bin/sh\necho Hello\n", "", "Hello"),
        ("#!/bin/sh\nkill -s SEGV $$\n", "", "exit code 139"),
        ("#!/bin/sh\necho 'ERROR: no OpenCL'; exit 1\n", "", "exit code 1: ERROR: no OpenCL"),
    ],
)
def test_a_tool_that_gives_no_times_is_said(
    text: str, options: str, why: str, artifacts: Mapping[str, Path], lab: Lab
) -> None:
    lab.tool(lab.tmp / NAME).write_text(text)
    phone = lab.phone(lab.attach(), options or f",tool={NAME}")
    job = jobs(artifacts)[1]
    for ask in (
        lambda: phone.measure([job], PIXEL, **ONCE),
        lambda: phone.infer(job, PIXEL, batch=1, threads=1, progress=silent),
        lambda: phone.op_times(job, threads=1, inferences=1),
    ):
        with pytest.raises(DeviceError, match=why) as said:
            ask()
        assert str(said.value).isprintable()


@pytest.mark.parametrize(
    ("mood", "why"),
    [
        ("unauthorized", "has not allowed this machine.*Unlock its screen"),
        ("offline", "does not answer adb.*offline"),
        ("garbage", "does not answer adb.*offline"),
    ],
)
def test_a_device_that_does_not_talk_is_said(mood: str, why: str, lab: Lab) -> None:
    phone = lab.phone(lab.attach(mood))
    with pytest.raises(DeviceError, match=why) as said:
        phone.measure(NULL, PIXEL, **ONCE)
    assert str(said.value).isprintable()
    found = phone.probe()
    assert isinstance(found, NotRun)


def test_two_devices_and_no_serial(lab: Lab) -> None:
    with pytest.raises(UsageError, match="no devices are attached"):
        device("adb:")
    serials = [f"127.0.0.1:{lab.attach().port}" for _ in range(2)]
    assert sorted(adb.DEVICES.found()) == sorted(serials)
    with pytest.raises(UsageError, match="2 devices are attached") as said:
        device("adb:,cores=f0")
    assert all(f"adb:{serial}" in str(said.value) for serial in serials)


def test_a_device_that_is_not_there_is_said(lab: Lab) -> None:
    there = lab.attach()
    gone = adb.Phone(adb.parsed("R58M123ABC"), patience=QUICK)
    with pytest.raises(DeviceError, match=r"is not attached.*'R58M123ABC' not found") as said:
        gone.measure(NULL, PIXEL, **ONCE)
    assert f"127.0.0.1:{there.port}" in str(said.value)


def test_a_connection_that_is_cut_midway_is_made_again(
    artifacts: Mapping[str, Path], pixels: NDArray[np.float32], lab: Lab
) -> None:
    daemon = lab.attach()
    cuts: list[int] = []

    def cut(*_: object) -> None:
        if len(cuts) < 3:
            cuts.append(daemon.cut())

    how = {**ONCE, "rounds": 30, "per_round": 200, "progress": cut}
    samples = lab.phone(daemon).measure(jobs(artifacts), pixels[:1], **how)
    assert [len(s.wall_ms) for s in samples] == [6000, 6000]
    assert sum(cuts) >= 2
    assert lab.runs() == []


def test_a_command_that_is_cut_is_not_taken_for_done(lab: Lab) -> None:
    """The client itself says nothing and leaves with exit code 0."""
    daemon = lab.attach()
    link = lab.phone(daemon).workspace.transport
    assert link.run("echo here", timeout=30).out == "here\n"
    threading.Timer(0.3, daemon.cut).start()
    with pytest.raises(DeviceError, match="connection was cut"):
        link.run("echo begun; sleep 5; echo done", timeout=30)


@pytest.mark.parametrize("code", [0, 1, 7, 127])
def test_exit_codes_and_both_streams_come_over(code: int, lab: Lab) -> None:
    link = lab.phone(lab.attach()).workspace.transport
    answer = link.run(f"printf 'a\nended 5'; echo b >&2; exit {code}", timeout=30)
    assert (answer.code, answer.out, answer.err) == (code, "a\nended 5", "b\n")


def test_a_device_without_exit_codes_tells_them_too(lab: Lab) -> None:
    link = lab.phone(lab.attach("old")).workspace.transport
    answer = link.run("echo a; exit 7", timeout=30)
    assert (answer.code, answer.out) == (7, "a\n")


def test_a_device_that_stays_away_is_given_up(lab: Lab) -> None:
    daemon = lab.attach()
    how = {**ONCE, "rounds": 1000, "per_round": 1000, "progress": lambda *_: daemon.stop()}
    with pytest.raises(DeviceError, match="connection was cut") as said:
        lab.phone(daemon, patience=HURRIED).measure(NULL, PIXEL, **how)
    assert str(said.value).isprintable()
    [run] = lab.runs()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(int((run / "pid").read_text()), signal.SIGKILL)


@pytest.mark.parametrize(
    ("tool", "full"),
    [
        ("runner", "partial"),
        ("runner", ".RESULT.json.partial"),
        (NAME, "partial"),
        (NAME, "logits"),
    ],
)
def test_a_file_without_room_is_said(
    tool: str,
    full: str,
    artifacts: Mapping[str, Path],
    pixels: NDArray[np.float32],
    lab: Lab,
    without_room: Callable[[Path, Path, str], None],
) -> None:
    """What is pushed, what the runner writes, and what benchmark_model's script does."""
    without_room(lab.folder / "bin", lab.tmp / "convnext-edge", full)
    phone = lab.phone(lab.attach(), f",tool={tool}", pushed=lab.tool(lab.folder / NAME))
    with pytest.raises(DeviceError, match="the disk is full there") as said:
        phone.infer(jobs(artifacts)[1], pixels, batch=1, threads=1, progress=silent)
    assert str(said.value).isprintable()
    assert lab.runs() == []


@pytest.fixture
def small_disk(lab: Lab) -> Iterator[Path]:
    """Have the folder on a file system of its own, with little room."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_KB}k", "tmpfs", str(lab.tmp)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(
            "a whole disk that is full needs root (one file's room does not, and is tested):"
            f" {done.stderr.strip()}"
        )
    yield lab.tmp
    subprocess.run(["umount", "--lazy", str(lab.tmp)], check=True)


@pytest.mark.parametrize("when", ["before the push", "while it runs"])
@pytest.mark.parametrize("tool", ["runner", NAME])
def test_a_full_disk_is_said(
    when: str,
    tool: str,
    artifacts: Mapping[str, Path],
    pixels: NDArray[np.float32],
    lab: Lab,
    small_disk: Path,
) -> None:
    filled: list[OSError] = []

    def fill(*_: object) -> None:
        if not filled:
            with pytest.raises(OSError, match="No space left") as full:
                (small_disk / "filler").write_bytes(bytes(2 * 1024 * TMPFS_KB))
            filled.append(full.value)

    pushed = lab.tool(lab.folder / NAME)
    if when == "before the push":
        fill()
    # Many turns: it must still be running when its first progress is seen.
    how = {**ONCE, "rounds": 400, "per_round": 10, "progress": fill}
    with pytest.raises(DeviceError, match="the disk is full there") as said:
        lab.phone(lab.attach(), f",tool={tool}", pushed=pushed).measure(
            jobs(artifacts), pixels[:1], **how
        )
    assert filled
    assert str(said.value).isprintable()


@pytest.mark.parametrize("junk", ["head -c 3000 /dev/urandom", "echo Welcome"])
def test_garbage_is_said(junk: str, lab: Lab) -> None:
    daemon = lab.attach()
    phone = lab.phone(daemon, ",tool=runner")
    assert isinstance(phone.probe(), DeviceInfo)
    (lab.folder / "bin" / "sha256sum").write_text(f"#!/bin/sh\n{junk}\n")
    (lab.folder / "bin" / "sha256sum").chmod(0o755)
    with pytest.raises(DeviceError, match="arrived with SHA-256 None") as said:
        phone.measure(NULL, PIXEL, **ONCE)
    assert str(said.value).isprintable()


@pytest.mark.usefixtures("lab")
def test_a_server_that_is_none_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def hang_up() -> None:
            with contextlib.suppress(OSError):
                while True:
                    listening.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(listening.getsockname()[1]))
        found = adb.Phone(adb.parsed("R58M123ABC"), patience=HURRIED).probe()
        assert isinstance(found, NotRun)
        assert adb.DEVICES.found() == ()


def test_without_a_client_it_is_said(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(lab.folder))
    assert adb.DEVICES.found() == ()
    with pytest.raises(DeviceError, match="no adb here"):
        device("adb:R58M123ABC").measure(NULL, PIXEL, **ONCE)


@pytest.mark.usefixtures("lab")
@pytest.mark.parametrize("port", [None, "70000", "none"])
def test_looking_starts_no_server(port: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    free = int(os.environ["ANDROID_ADB_SERVER_PORT"])
    if port is not None:
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", port)
    assert adb.DEVICES.found() == ()
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", free))


@pytest.mark.parametrize(
    "address",
    [
        "-s",
        "a b",
        "a;ls",
        "a,cores",
        "a,cores=",
        "a,cores=0",
        "a,cores=xy",
        "a,cores=f0,cores=f",
        "a,delegate=tpu",
        "a,tool=hammer",
        "a,colour=red",
        "a,tool=runner,delegate=gpu",
    ],
)
def test_what_is_no_address_is_a_wrong_word(address: str) -> None:
    with pytest.raises(UsageError, match=r"names no device|takes no delegate"):
        device(f"adb:{address}")


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("emulator-5554", "adb:emulator-5554"),
        ("192.168.1.5:5555,delegate=gpu,cores=f0", "adb:192.168.1.5:5555,cores=f0,delegate=gpu"),
        ("adb-1A2B-x._adb-tls-connect._tcp", "adb:adb-1A2B-x._adb-tls-connect._tcp"),
        ("[fe80::1]:5555,tool=benchmark_model", "adb:[fe80::1]:5555,tool=benchmark_model"),
    ],
)
def test_addresses(address: str, name: str) -> None:
    assert device(f"adb:{address}").name == name


def test_a_tool_that_is_not_there_is_a_wrong_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "/no/such/file")
    with pytest.raises(UsageError, match="names no file: /no/such/file"):
        device("adb:R58M123ABC")
