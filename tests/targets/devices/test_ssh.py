"""Devices over SSH, against a real sshd on loopback with keys made for the test.

Its forced command gives each login a home of its own, so that nothing of the user's is touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.errors import DeviceError, UsageError
from pipeline.worker import silent
from targets.base import DeviceInfo, Job, NotRun, device, run_padded, runtimes
from targets.devices import ssh
from targets.devices._remote import Remote
from targets.devices._workspace import Patience

REQUIRE_SSHD = "CONVNEXT_EDGE_REQUIRE_SSHD"
QUICK = Patience(command=30, silence=60, reconnect=(0.1, 0.5, 1, 2), poll=(0.05, 0.2))
SECONDS = 20
ONCE: dict[str, Any] = {"rounds": 1, "per_round": 1, "threads": 1, "progress": silent}
TMPFS_KB = 1024


class Server:
    """A real sshd on loopback, and a client's configuration for it."""

    def __init__(self, folder: Path, executable: str) -> None:
        self.folder, self.executable = folder, executable
        self.home = folder / "home"
        self.home.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        for key in ("host", "other-host", "user", "other-user"):
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
            subprocess.run(words, check=True)
        shutil.copy(folder / "user.pub", folder / "authorized")
        self.configuration = folder / "ssh_config"
        self.knows("host")
        self.process: subprocess.Popen[bytes] | None = None
        self.forces()

    def knows(self, key: str, user: str = "user", checking: str = "yes") -> None:
        """Have the client know the host by a key, and log in with another."""
        kind, data, *_ = (self.folder / f"{key}.pub").read_text().split()
        known = self.folder / "known"
        known.write_text(f"[127.0.0.1]:{self.port} {kind} {data}\n")
        self.configuration.write_text(
            f"Host board\n  HostName 127.0.0.1\n  Port {self.port}\n"
            f"  IdentityFile {self.folder / user}\n  IdentitiesOnly yes\n  IdentityAgent none\n"
            f"  UserKnownHostsFile {known}\n  GlobalKnownHostsFile /dev/null\n"
            f"  StrictHostKeyChecking {checking}\n"
        )

    def says(self, line: str) -> None:
        """Put a line before the client's configuration: what comes first counts."""
        self.configuration.write_text(f"{line}\n{self.configuration.read_text()}")

    def forces(self, before: str = "", command: str = 'exec sh -c "$SSH_ORIGINAL_COMMAND"') -> None:
        """Start the server; every login runs `before`, then the command in the home."""
        self.stop()
        forced = self.folder / "forced"
        paths = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        forced.write_text(
            f"#!/bin/sh\nexport HOME={self.home} PATH={paths} OMP_NUM_THREADS=1\n"
            f"cd {self.home}\n{before}\n{command}\n"
        )
        forced.chmod(0o755)
        settings = self.folder / "sshd_config"
        settings.write_text(
            f"ListenAddress 127.0.0.1\nPort {self.port}\nHostKey {self.folder / 'host'}\n"
            f"AuthorizedKeysFile {self.folder / 'authorized'}\nForceCommand {forced}\n"
            "PidFile none\nStrictModes no\nUsePAM no\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        )
        self.start()

    def start(self) -> None:
        words = [self.executable, "-D", "-e", "-f", str(self.folder / "sshd_config")]
        with (self.folder / "sshd.log").open("ab") as log:
            self.process = subprocess.Popen(words, stderr=log)
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.05)
        pytest.fail(f"sshd does not start: {(self.folder / 'sshd.log').read_text()}")

    def cut(self) -> int:
        """End the processes that serve logins; tell how many there were."""
        assert self.process is not None
        served = [pid for pid, parent in processes() if parent == self.process.pid]
        for pid in served:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(served)

    def stop(self) -> None:
        if self.process is not None:
            self.cut()
            self.process.terminate()
            self.process.wait()
            self.process = None

    def board(self, **how: Any) -> Remote:
        words = {"python": sys.executable, "patience": QUICK, **how}
        return ssh.board("board", config=self.configuration, **words)


def processes() -> list[tuple[int, int]]:
    """Return every process with its parent."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            found.append(
                (int(path.parent.name), int(path.read_text().rpartition(")")[2].split()[1]))
            )
    return found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    executable = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if executable is None:
        message = (
            "devices over SSH are tested with sshd: install it (apt-get install openssh-server)"
        )
        if os.environ.get(REQUIRE_SSHD):
            pytest.fail(message)
        pytest.skip(message)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where it shuts itself in before the login
    started = Server(tmp_path, executable)
    yield started
    started.stop()


def jobs(artifacts: Mapping[str, Path], name: str = "tflite") -> list[Job]:
    null = Job(label="harness", runtime=name, path=None)
    return [null, Job(label="float", runtime=name, path=artifacts[name])]


NULL = [Job(label="harness", runtime="onnx", path=None)]
PIXEL = np.zeros((1, 3, 2, 2), np.float32)


def test_from_probe_to_logits(
    artifacts: Mapping[str, Path],
    pixels: NDArray[np.float32],
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tool = server.folder / "bin" / "vcgencmd"
    tool.parent.mkdir()
    tool.write_text(
        '#!/bin/sh\n[ $1 = get_throttled ] && echo throttled=0x4 || echo "temp=61.2\'C"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv(ssh.CONFIG, str(server.configuration))
    monkeypatch.setenv(ssh.PYTHON, sys.executable)
    board = device("ssh:board")
    info = board.probe()
    assert isinstance(info, DeviceInfo)
    assert (info.name, info.kind, info.cores) == (
        "ssh:board",
        "device",
        len(os.sched_getaffinity(0)),
    )
    assert board.can_run(runtimes()["tflite"]) is None
    harness, timed = board.measure(
        jobs(artifacts), pixels[:1], rounds=2, per_round=3, threads=1, progress=silent
    )
    assert len(timed.wall_ms) == len(harness.wall_ms) == 6
    assert timed.after is not None
    assert timed.after.throttled == "0x4"
    assert timed.after.temperatures_c["vcgencmd"] == 61.2
    logits = board.infer(jobs(artifacts)[1], pixels, batch=1, threads=1, progress=silent)
    here = runtimes()["tflite"].load(artifacts["tflite"], 1)
    expected = np.concatenate([run_padded(here, one[None], 1) for one in pixels])
    np.testing.assert_array_equal(logits, expected)
    assert list((server.home / ssh.ROOT / "runs").iterdir()) == []


def test_python_of_its_environment_is_taken(server: Server) -> None:
    place = server.home / "convnext-edge" / "bin" / "python3"
    place.parent.mkdir(parents=True)
    place.write_text(f'#!/bin/sh\ntouch {server.home}/taken\nexec {sys.executable} "$@"\n')
    place.chmod(0o755)
    assert isinstance(server.board(python=None).probe(), DeviceInfo)
    assert (server.home / "taken").exists()


@pytest.mark.parametrize("checking", ["yes", "no", "accept-new"])
@pytest.mark.parametrize("local", ["yes", "no"])
def test_a_host_key_that_changed_is_refused(checking: str, local: str, server: Server) -> None:
    server.knows("other-host", checking=checking)
    server.says(f"NoHostAuthenticationForLocalhost {local}")
    with pytest.raises(DeviceError, match="host's key has changed"):
        server.board().measure(NULL, PIXEL, **ONCE)
    assert list(server.home.iterdir()) == []


def test_a_host_key_that_is_not_known_is_refused(server: Server) -> None:
    (server.folder / "known").unlink()
    with pytest.raises(DeviceError, match="host's key is not known here"):
        server.board().measure(NULL, PIXEL, **ONCE)


def test_a_host_key_that_is_new_is_kept_where_the_configuration_takes_it(server: Server) -> None:
    server.knows("host", checking="no")
    known = server.folder / "known"
    known.unlink()
    assert isinstance(server.board().probe(), DeviceInfo)
    assert (server.folder / "host.pub").read_text().split()[1] in known.read_text()


@pytest.mark.parametrize("checking", ["no", "accept-new"])
@pytest.mark.parametrize("known", ["/dev/null", "none", "/no/such/folder/known"])
def test_a_configuration_that_takes_any_host_key_and_keeps_none_is_refused(
    known: str, checking: str, server: Server
) -> None:
    server.knows("host", checking=checking)
    server.says(f"UserKnownHostsFile {known}")
    with pytest.raises(DeviceError, match="takes any host key and keeps none") as said:
        server.board().measure(NULL, PIXEL, **ONCE)
    assert str(said.value).isprintable()
    assert list(server.home.iterdir()) == []


def test_a_wrong_key_is_refused(server: Server) -> None:
    server.knows("host", user="other-user")
    found = server.board().probe()
    assert isinstance(found, NotRun)
    assert "refuses the login" in found.reason
    assert "Permission denied (publickey)" in found.reason


def test_a_connection_that_is_cut_midway_is_made_again(
    artifacts: Mapping[str, Path], pixels: NDArray[np.float32], server: Server
) -> None:
    cuts: list[int] = []

    def cut(*_: object) -> None:
        if len(cuts) < 3:
            cuts.append(server.cut())

    how = {**ONCE, "rounds": 30, "per_round": 200, "progress": cut}
    samples = server.board().measure(jobs(artifacts), pixels[:1], **how)
    assert [len(s.wall_ms) for s in samples] == [6000, 6000]
    assert len(cuts) >= 2
    assert min(cuts) >= 1
    assert list((server.home / ssh.ROOT / "runs").iterdir()) == []


def test_a_server_that_is_away_for_a_while_is_waited_for(
    artifacts: Mapping[str, Path], pixels: NDArray[np.float32], server: Server
) -> None:
    starting: list[threading.Timer] = []

    def restart(*_: object) -> None:
        if not starting:
            server.stop()
            starting.append(threading.Timer(0.7, server.start))
            starting[0].start()

    how = {**ONCE, "rounds": 20, "per_round": 100, "progress": restart}
    samples = server.board().measure(jobs(artifacts), pixels[:1], **how)
    assert [len(s.wall_ms) for s in samples] == [2000, 2000]
    starting[0].join()


def test_a_server_that_stays_away_is_given_up(server: Server) -> None:
    hurried = Patience(command=30, silence=60, reconnect=(0.1, 0.1), poll=(0.05,))
    how = {**ONCE, "rounds": 1000, "per_round": 1000, "progress": lambda *_: server.stop()}
    with pytest.raises(DeviceError, match=r"connection was cut.*Connection refused"):
        server.board(patience=hurried).measure(NULL, PIXEL, **how)
    server.start()
    [run] = (server.home / ssh.ROOT / "runs").iterdir()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(int((run / "pid").read_text()), signal.SIGKILL)


def test_a_quota_that_is_used_up_is_said(
    artifacts: Mapping[str, Path], pixels: NDArray[np.float32], server: Server
) -> None:
    server.forces(before="ulimit -f 200")  # blocks of 512 bytes: the artifact fits, images do not
    many = np.repeat(pixels, 40, axis=0)
    with pytest.raises(DeviceError, match="the disk is full there"):
        server.board().infer(jobs(artifacts)[1], many, batch=1, threads=1, progress=silent)


@pytest.mark.parametrize("full", ["partial", ".RESULT.json.partial"], ids=["pushed", "written"])
def test_a_file_without_room_is_said(
    full: str,
    artifacts: Mapping[str, Path],
    pixels: NDArray[np.float32],
    server: Server,
    without_room: Callable[[Path, Path, str], None],
) -> None:
    without_room(server.folder / "bin", server.home / ssh.ROOT, full)
    with pytest.raises(DeviceError, match="the disk is full there") as said:
        server.board().measure(jobs(artifacts), pixels[:1], **ONCE)
    assert str(said.value).isprintable()
    assert list((server.home / ssh.ROOT / "runs").iterdir()) == []


@pytest.fixture
def small_disk(server: Server) -> Iterator[Path]:
    """Have the home on a file system of its own, with little room."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_KB}k", "tmpfs", str(server.home)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(
            "a whole disk that is full needs root (one file's room does not, and is tested):"
            f" {done.stderr.strip()}"
        )
    yield server.home
    server.stop()
    subprocess.run(["umount", "--lazy", str(server.home)], check=True)


@pytest.mark.parametrize("when", ["before the push", "while it runs"])
def test_a_full_disk_is_said(
    when: str,
    artifacts: Mapping[str, Path],
    pixels: NDArray[np.float32],
    server: Server,
    small_disk: Path,
) -> None:
    filled: list[OSError] = []

    def fill(*_: object) -> None:
        if not filled:
            with pytest.raises(OSError, match="No space left") as full:
                (small_disk / "filler").write_bytes(bytes(2 * 1024 * TMPFS_KB))
            filled.append(full.value)

    if when == "before the push":
        fill()
    # Many turns: it must still be running when its first progress is seen.
    how = {**ONCE, "rounds": 2000, "per_round": 10, "progress": fill}
    with pytest.raises(DeviceError, match="the disk is full there") as said:
        server.board().measure(jobs(artifacts), pixels[:1], **how)
    assert filled
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    "junk", ["head -c 3000 /dev/urandom", "echo Welcome to this board", "exit 0", "exit 7"]
)
def test_garbage_is_said(junk: str, server: Server) -> None:
    server.forces(command=junk)
    with pytest.raises(
        DeviceError, match=r"does not answer as the runner does|exit code 7"
    ) as said:
        server.board().measure(NULL, PIXEL, **ONCE)
    assert str(said.value).isprintable()


def test_a_board_without_python_is_said(server: Server) -> None:
    found = server.board(python="python3.0").probe()
    assert isinstance(found, NotRun)
    assert "has no Python 3" in found.reason


def test_a_board_without_numpy_is_said(server: Server) -> None:
    packages = server.folder / "packages"
    packages.mkdir()
    missing = "raise ModuleNotFoundError(\"No module named 'numpy'\")"
    (packages / "numpy.py").write_text(missing)
    server.forces(before=f"export PYTHONPATH={packages}")
    with pytest.raises(DeviceError, match=r"has no numpy.*Install numpy there"):
        server.board().measure(NULL, PIXEL, **ONCE)


def test_a_runner_that_is_killed_is_said(server: Server) -> None:
    def kill(*_: object) -> None:
        [pid] = (server.home / ssh.ROOT / "runs").glob("*/pid")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)

    with pytest.raises(DeviceError, match="was killed, or the device restarted"):
        server.board().measure(NULL, PIXEL, **{**ONCE, "rounds": 100_000, "progress": kill})
    assert list((server.home / ssh.ROOT / "runs").iterdir()) == []


def test_a_runner_that_says_nothing_is_given_up(server: Server) -> None:
    hurried = Patience(command=30, silence=0.3, poll=(0.1,))
    sleeper = "sh -c 'exec sleep 60' --"
    with pytest.raises(DeviceError, match="has said nothing for"):
        server.board(python=sleeper, patience=hurried).measure(NULL, PIXEL, **ONCE)
    assert list((server.home / ssh.ROOT / "runs").iterdir()) == []


@pytest.mark.parametrize("greeting", [b"\0\xffjunk\n", b"220 ready\r\n" * 2000])
def test_what_is_no_ssh_server_is_said(greeting: bytes, server: Server) -> None:
    server.stop()
    with socket.create_server(("127.0.0.1", server.port)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(ConnectionError):
                connection.sendall(greeting)
                connection.recv(1000)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(DeviceError, match="is no SSH server"):
            server.board().measure(NULL, PIXEL, **ONCE)
        thread.join()


def test_a_host_that_cannot_be_reached_is_said(server: Server) -> None:
    server.stop()
    with pytest.raises(DeviceError, match=r"cannot be reached.*Connection refused"):
        server.board().measure(NULL, PIXEL, **ONCE)
    with pytest.raises(DeviceError, match=r"is not known.*Could not resolve"):
        ssh.board("nobody.invalid", patience=QUICK).measure(NULL, PIXEL, **ONCE)


def test_a_wrong_configuration_is_said(server: Server) -> None:
    server.configuration.write_text("Dance yes\n")
    with pytest.raises(DeviceError, match=r"cannot read its configuration.*dance"):
        server.board().measure(NULL, PIXEL, **ONCE)


def test_without_a_client_it_is_said(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(server.folder))
    with pytest.raises(DeviceError, match="no ssh here"):
        server.board().measure(NULL, PIXEL, **ONCE)


@pytest.mark.parametrize("address", ["", "-oProxyCommand=x", "a b", "me@-x", "host:port", "h;ls"])
def test_what_is_no_address_is_a_wrong_word(address: str) -> None:
    with pytest.raises(UsageError, match="names no host"):
        device(f"ssh:{address}")


@pytest.mark.parametrize(
    "address", ["pi", "pi@raspberrypi.local", "pi@10.0.0.7:2222", "[fe80::1]:22"]
)
def test_addresses(address: str) -> None:
    assert device(f"ssh:{address}").name == f"ssh:{address}"
