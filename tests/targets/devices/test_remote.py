"""A device over a link: here the link is a shell on this machine with a home of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.errors import DeviceError
from pipeline.worker import end_all, ending, silent
from targets.base import DeviceInfo, Job, NotRun, run_padded, runtimes
from targets.devices._remote import Remote
from targets.devices._workspace import Answer, LostLinkError, Patience

ROOT = ".cache/convnext-edge"
QUICK = Patience(command=30, silence=60, reconnect=(0.01, 0.02), poll=(0.05,))
Hook = Callable[[str], Answer | None]


class Shell:
    """A transport to a folder of this machine."""

    name = "shell:here"

    def __init__(self, home: Path) -> None:
        self.home = home
        self.pushed: list[int] = []
        self.before: Hook = lambda _: None
        self.packages: Path | None = None
        self.lost_bytes = 0
        self.closed = 0

    def run(self, command: str, *, timeout: float) -> Answer:
        return self.before(command) or self._shell(command, None, timeout)

    def push(self, source: Path, target: str, *, timeout: float) -> Answer:
        self.pushed.append(source.stat().st_size)
        data = source.read_bytes()
        return self.before(f"push {target}") or self._shell(f"cat >{target}", data, timeout)

    def pull(self, source: str, target: Path, *, timeout: float) -> Answer:
        answer = self.before(f"pull {source}")
        if answer is None:
            data = (self.home / source).read_bytes()
            target.write_bytes(data[: len(data) - self.lost_bytes])
        return answer or Answer(code=0, out="", err="")

    def close(self) -> None:
        self.closed += 1

    def _shell(self, command: str, data: bytes | None, timeout: float) -> Answer:
        kept = {"PATH": os.environ["PATH"], "HOME": str(self.home), "OMP_NUM_THREADS": "1"}
        if self.packages is not None:
            kept["PYTHONPATH"] = str(self.packages)
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            cwd=self.home,
            env=kept,
            input=data,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        return Answer(code=done.returncode, out=done.stdout.decode(), err=done.stderr.decode())


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    home = tmp_path / "home"
    home.mkdir()
    return Shell(home)


@pytest.fixture
def remote(shell: Shell) -> Remote:
    return Remote(shell, root=ROOT, python=sys.executable, patience=QUICK)


def jobs(artifacts: Mapping[str, Path], name: str = "onnx") -> list[Job]:
    null = Job(label="harness", runtime=name, path=None)
    return [null, Job(label="float", runtime=name, path=artifacts[name])]


def left(shell: Shell) -> list[Path]:
    return list((shell.home / ROOT / "runs").iterdir())


def at(word: str, act: Callable[[], Answer | None]) -> Hook:
    """Return a hook that acts at the first command with a word in it."""
    acted: list[str] = []

    def hook(command: str) -> Answer | None:
        if word not in command or acted:
            return None
        acted.append(command)
        return act()

    return hook


def lose() -> Answer | None:
    raise LostLinkError("the link is gone", allowed="a link", do="Wait")


def processes_in(folder: Path) -> list[str]:
    found = []
    for cwd in Path("/proc").glob("[0-9]*/cwd"):
        try:
            where = str(cwd.readlink())
        except OSError:
            continue
        if where.startswith(str(folder)) and " (zombie)" not in (cwd.parent / "status").read_text():
            found.append(where)
    return found


def test_it_says_what_the_device_is(remote: Remote, shell: Shell) -> None:
    info = remote.probe()
    assert isinstance(info, DeviceInfo)
    assert (info.name, info.kind) == ("shell:here", "device")
    assert info.cores == len(os.sched_getaffinity(0))
    assert "Python 3." in info.description
    assert left(shell) == []


@pytest.mark.parametrize("name", ["onnx", "openvino", "tflite"])
def test_times_and_logits_come_back(
    name: str,
    artifacts: Mapping[str, Path],
    pixels: NDArray[np.float32],
    remote: Remote,
    shell: Shell,
) -> None:
    heard: list[tuple[int, int]] = []

    def hear(done: int, total: int, note: str = "") -> None:
        assert not note
        heard.append((done, total))

    target = runtimes()[name]
    assert remote.can_run(target) is None
    samples = remote.measure(
        jobs(artifacts, name),
        pixels[:1],
        rounds=2,
        per_round=3,
        threads=1,
        progress=hear,
    )
    assert [(s.label, len(s.wall_ms), len(s.cpu_ms)) for s in samples] == [
        ("harness", 6, 6),
        ("float", 6, 6),
    ]
    assert samples[1].versions
    assert samples[1].before is not None
    assert samples[1].before.load is not None
    assert heard[-1] == (4, 4)
    job = jobs(artifacts, name)[1]
    logits = remote.infer(job, pixels, batch=1, threads=1, progress=silent)
    here = target.load(artifacts[name], 1)
    expected = np.concatenate([run_padded(here, one[None], 1) for one in pixels])
    np.testing.assert_array_equal(logits, expected)
    assert left(shell) == []
    assert processes_in(shell.home) == []


def test_a_job_that_fails_there_says_why_beside_the_others(
    artifacts: Mapping[str, Path], pixels: NDArray[np.float32], remote: Remote, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"nothing")
    wrong = Job(label="w8a8", runtime="onnx", path=damaged)
    harness, whole, broken = remote.measure([*jobs(artifacts), wrong], pixels[:1], **ONCE)
    assert (harness.error, whole.error, len(whole.wall_ms)) == (None, None, 1)
    assert "w8a8 failed: " in (broken.error or "")
    assert "InvalidProtobuf" in (broken.error or "")
    assert (broken.wall_ms, broken.before) == ((), whole.before)
    with pytest.raises(DeviceError, match="InvalidProtobuf"):
        remote.measure([jobs(artifacts)[0], wrong], pixels[:1], **ONCE)
    with pytest.raises(DeviceError, match="InvalidProtobuf"):
        remote.infer(wrong, pixels[:1], batch=1, threads=1, progress=silent)


def test_a_machine_is_the_same_by_every_address(tmp_path: Path) -> None:
    infos = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        shell = Shell(tmp_path / name)
        shell.name = f"shell:{name}"
        infos.append(Remote(shell, root=ROOT, python=sys.executable, patience=QUICK).probe())
    one, other = infos
    assert isinstance(one, DeviceInfo)
    assert isinstance(other, DeviceInfo)
    assert (one.machine, one.name) == (other.machine, "shell:one")
    own = Path("/etc/machine-id")
    assert own.is_file() == bool(one.machine)
    assert own.read_text().strip() not in {one.machine, ""}


def test_pixels_that_are_no_whole_numbers_stay_as_they_are(
    artifacts: Mapping[str, Path], pixels: NDArray[np.float32], remote: Remote
) -> None:
    halves = pixels / np.float32(2)
    logits = remote.infer(jobs(artifacts)[1], halves, batch=1, threads=1, progress=silent)
    here = runtimes()["onnx"].load(artifacts["onnx"], 1)
    expected = np.concatenate([run_padded(here, one[None], 1) for one in halves])
    np.testing.assert_array_equal(logits, expected)


def test_what_lies_there_whole_is_not_pushed_again_and_what_is_damaged_is(
    artifacts: Mapping[str, Path], pixels: NDArray[np.float32], remote: Remote, shell: Shell
) -> None:
    size = artifacts["onnx"].stat().st_size

    def infer() -> NDArray[np.float32]:
        shell.pushed.clear()
        return remote.infer(jobs(artifacts)[1], pixels, batch=1, threads=1, progress=silent)

    first = infer()
    assert size in shell.pushed
    infer()
    assert shell.pushed == []
    [stored] = [p for p in (shell.home / ROOT / "files").iterdir() if p.stat().st_size == size]
    stored.write_bytes(bytes(size))
    np.testing.assert_array_equal(infer(), first)
    assert shell.pushed == [size]


def test_what_arrives_damaged_is_an_error(remote: Remote, shell: Shell) -> None:
    def damage() -> Answer:
        return Answer(code=0, out="", err="")  # says that it was written, and writes nothing

    shell.before = at("push", damage)
    with pytest.raises(DeviceError, match=r"arrived with SHA-256 None, not [0-9a-f]{64}"):
        remote.measure([], np.zeros((1, 3, 2, 2), np.float32), **ONCE)
    assert left(shell) == []


ONCE: dict[str, Any] = {"rounds": 1, "per_round": 1, "threads": 1, "progress": silent}


@pytest.mark.parametrize("word", ["mkdir -p", "sha256sum", "push", "nohup", "tail -n 1", "pull"])
def test_a_lost_link_costs_only_time(
    word: str,
    artifacts: Mapping[str, Path],
    pixels: NDArray[np.float32],
    remote: Remote,
    shell: Shell,
) -> None:
    shell.before = at(word, lose)
    samples = remote.measure(jobs(artifacts), pixels[:1], **ONCE)
    assert [len(s.wall_ms) for s in samples] == [1, 1]
    assert left(shell) == []


@pytest.mark.parametrize("word", ["mkdir -p", "mv -f", "ln -sf", "nohup"])
def test_a_link_may_be_lost_after_the_command_was_carried_out(
    word: str,
    artifacts: Mapping[str, Path],
    pixels: NDArray[np.float32],
    remote: Remote,
    shell: Shell,
) -> None:
    def hook(command: str) -> Answer | None:
        if word in command and not done:
            done.append(command)
            assert shell._shell(command, None, 10).code == 0
            return lose()
        return None

    done: list[str] = []
    shell.before = hook
    samples = remote.measure(jobs(artifacts), pixels[:1], **ONCE)
    assert [len(s.wall_ms) for s in samples] == [1, 1]
    assert done


def test_a_link_that_stays_lost_is_an_error(remote: Remote, shell: Shell) -> None:
    shell.before = lambda command: lose() if "tail -n 1" in command else None
    with pytest.raises(DeviceError, match="the link is gone"):
        remote.measure([], np.zeros((1, 3, 2, 2), np.float32), **ONCE)


def test_ctrl_c_ends_what_runs_there(
    artifacts: Mapping[str, Path], pixels: NDArray[np.float32], remote: Remote, shell: Shell
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    many = {**ONCE, "rounds": 100_000, "progress": interrupt}
    with pytest.raises(KeyboardInterrupt):
        remote.measure(jobs(artifacts), pixels[:1], **many)
    assert left(shell) == []
    deadline = time.monotonic() + 10
    while processes_in(shell.home) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_in(shell.home) == []
    assert shell.closed == 1


def test_what_waits_in_another_thread_ends_with_all_work(
    artifacts: Mapping[str, Path], pixels: NDArray[np.float32], remote: Remote, shell: Shell
) -> None:
    seen = threading.Event()
    many = {**ONCE, "rounds": 100_000, "progress": lambda *_: seen.set()}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(remote.measure, jobs(artifacts), pixels[:1], **many)
        assert seen.wait(60)
        end_all()
        try:
            with pytest.raises(DeviceError, match="interrupted"):
                running.result(timeout=60)
        finally:
            ending.clear()
    assert left(shell) == []
    deadline = time.monotonic() + 10
    while processes_in(shell.home) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_in(shell.home) == []


@pytest.mark.parametrize("word", ["mkdir -p", "tail -n 1"])
def test_garbage_is_an_error(word: str, remote: Remote, shell: Shell) -> None:
    shell.before = at(word, lambda: Answer(code=0, out="\x1b[2Jhello", err=""))
    with pytest.raises(DeviceError, match="does not answer as the runner does") as raised:
        remote.measure([], np.zeros((1, 3, 2, 2), np.float32), **ONCE)
    assert "\x1b" not in str(raised.value)


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (b"junk", "Invalid JSON"),
        (b'{"runner": 1}', "machine"),
        (b'{"runner": 2}', "runner"),
    ],
)
def test_a_result_that_is_none_is_an_error(
    result: bytes, said: str, remote: Remote, shell: Shell
) -> None:
    def overwrite() -> None:
        [path] = (shell.home / ROOT / "runs").glob("*/RESULT.json")
        path.write_bytes(result)

    shell.before = at("pull", overwrite)
    with pytest.raises(DeviceError, match=said):
        remote.measure([], np.zeros((1, 3, 2, 2), np.float32), **ONCE)


def test_a_result_that_is_cut_off_on_its_way_is_an_error(remote: Remote, shell: Shell) -> None:
    shell.lost_bytes = 5
    with pytest.raises(DeviceError, match="not the same here and there"):
        remote.measure([], np.zeros((1, 3, 2, 2), np.float32), **ONCE)


def test_a_full_disk_is_said(remote: Remote, shell: Shell) -> None:
    full = Answer(code=1, out="", err="cat: write error: No space left on device\n")
    shell.before = at("push", lambda: full)
    with pytest.raises(DeviceError, match="the disk is full there"):
        remote.measure([], np.zeros((1, 3, 2, 2), np.float32), **ONCE)
    assert left(shell) == []


def test_python_that_is_missing_is_said(shell: Shell) -> None:
    remote = Remote(shell, root=ROOT, python="python3.0", patience=QUICK)
    found = remote.probe()
    assert isinstance(found, NotRun)
    assert "has no Python 3" in found.reason


@pytest.mark.parametrize(("package", "runtime"), [("numpy", "onnx"), ("onnxruntime", "onnx")])
def test_a_package_that_is_missing_is_said(
    package: str,
    runtime: str,
    artifacts: Mapping[str, Path],
    pixels: NDArray[np.float32],
    remote: Remote,
    shell: Shell,
    tmp_path: Path,
) -> None:
    shell.packages = tmp_path / "packages"
    shell.packages.mkdir()
    missing = f"raise ModuleNotFoundError(\"No module named '{package}'\")"
    (shell.packages / f"{package}.py").write_text(missing)
    with pytest.raises(DeviceError, match=f"has no {package}.*Install {package} there"):
        remote.measure(jobs(artifacts, runtime)[1:], pixels[:1], **ONCE)


def test_what_runs_nowhere_but_here_is_said(remote: Remote) -> None:
    found = remote.can_run(runtimes()["reference"])
    assert found is not None
    assert "reference" in found.reason


def test_a_runner_that_dies_is_said(remote: Remote, shell: Shell) -> None:
    def kill() -> None:
        [pid] = (shell.home / ROOT / "runs").glob("*/pid")
        while True:
            try:
                return os.killpg(int(pid.read_text()), signal.SIGKILL)
            except ProcessLookupError:  # it is about to have a group of its own
                time.sleep(0.01)

    shell.before = at("tail -n 1", kill)
    many = {**ONCE, "rounds": 100_000}
    null = Job(label="harness", runtime="onnx", path=None)
    with pytest.raises(DeviceError, match="was killed, or the device restarted"):
        remote.measure([null], np.zeros((1, 3, 2, 2), np.float32), **many)


def test_a_runner_that_says_nothing_is_given_up(shell: Shell) -> None:
    sleeper = shell.home / "sleeper"
    sleeper.write_text("#!/bin/sh\nsleep 60\n")
    sleeper.chmod(0o755)
    hurried = Patience(command=30, silence=0.3, poll=(0.1,))
    remote = Remote(shell, root=ROOT, python=str(sleeper), patience=hurried)
    found = remote.probe()
    assert isinstance(found, NotRun)
    assert "has said nothing for" in found.reason
    assert processes_in(shell.home) == []


def test_what_was_left_long_ago_is_removed(remote: Remote, shell: Shell) -> None:
    old = [shell.home / ROOT / "files" / "old", shell.home / ROOT / "runs" / "old" / "JOBS.json"]
    for path in old:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({}))
    ago = time.time() - 9 * 86400
    for path in [*old, old[1].parent]:
        os.utime(path, (ago, ago))
    assert isinstance(remote.probe(), DeviceInfo)
    assert not any(path.exists() for path in old)
    assert list((shell.home / ROOT / "files").iterdir())
