"""Android's own client, adb, as a way to a device.

In: a serial, as `adb devices` lists it. Out: a `targets.devices._workspace.Transport`. A device
whose serial is HOST:PORT is connected where it is not yet. The client takes its server's port from
ANDROID_ADB_SERVER_PORT, and starts one where none runs.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from typing import TYPE_CHECKING

from pipeline.errors import DeviceError
from targets.devices._meaning import Meaning, explained
from targets.devices._workspace import Answer, LostLinkError

if TYPE_CHECKING:
    from pathlib import Path

PORT = "ANDROID_ADB_SERVER_PORT"
SECONDS_TO_CONNECT = 0.5
SECONDS_HERE = 20.0
"""For what asks adb's server only: it may have to start first, and waits ten for an address."""
NETWORK = re.compile(r".+:\d+")
"""What the serial of a device that is reached over TCP looks like."""
ENDED = re.compile(r"(?P<out>.*)\nended (?P<code>\d+)\r?\n", re.DOTALL)
"""What a command prints, and the line that says that it came to its end: when a link is cut, adb
29 prints nothing and leaves with exit code 0; a device without shell v2 tells no codes at all."""
ANSWERED = (": remote ", "remote object")
"""In what the client says of a file, where the device itself had the word."""
LISTED = re.compile(r"(?P<serial>\S+)\s+(?P<state>\w.*)")

MEANINGS = (
    Meaning(
        words=("unauthorized", "still authorizing"),
        got="{name} has not allowed this machine: {said}",
        allowed="a device that trusts this machine's key",
        do="Unlock its screen and accept the question there",
    ),
    Meaning(
        words=("no permissions", "insufficient permissions"),
        got="{name}: this login may not use the USB device: {said}",
        allowed="a udev rule for it",
        do="Install the rules (Debian: android-sdk-platform-tools-common) and log in again",
    ),
    Meaning(
        words=("cannot connect to daemon", "failed to start daemon", "failed to check server"),
        got="{name}: adb's server does not start: {said}",
        allowed=f"a free port: 5037, or what {PORT} says",
        do="Try `adb start-server` by hand",
    ),
)
OFFLINE = Meaning(
    words=("offline",),
    got="{name} does not answer adb: {said}",
    allowed="a device that is awake, with USB debugging on",
    do="Plug it in again, or try `adb reconnect`",
)
ABSENT = Meaning(
    words=("not found",),
    got="{name} is not attached: {said}",
    allowed="{attached}",
    do="Correct --device, plug it in, or switch USB debugging on",
)
"""Of a device that was never reached; of another they are a lost link."""
CUT = Meaning(
    words=(),
    got="{name}: the connection was cut: {said}",
    allowed="a device that stays attached, or comes back within two minutes",
    do="Look at the cable and whether the device is on, and try again",
    lost=True,
)


class Link:
    """adb's client and one device; see `targets.devices._workspace.Transport`.

    Args:
        name: The device's, for messages.
        serial: As `adb devices` lists it.
    """

    def __init__(self, name: str, serial: str) -> None:
        self.name, self.serial = name, serial
        self._met = self._here = False

    def run(self, command: str, *, timeout: float) -> Answer:
        """Run a line of POSIX shell there, in the root folder."""
        answer = self._adb(
            "shell", "-n", f"( {command}\n); c=$?; echo; echo ended $c", timeout=timeout
        )
        ended = ENDED.fullmatch(answer.out)
        if ended is None:
            raise self._explained(answer)
        self._met = self._here = True
        return Answer(code=int(ended["code"]), out=ended["out"], err=answer.err)

    def push(self, source: Path, target: str, *, timeout: float) -> Answer:
        """Write a file there."""
        return self._moved("push", str(source), target, timeout=timeout)

    def pull(self, source: str, target: Path, *, timeout: float) -> Answer:
        """Write a file of the device here."""
        return self._moved("pull", source, str(target), timeout=timeout)

    def close(self) -> None:
        """Do nothing: the connection is the server's."""

    def _moved(self, word: str, source: str, target: str, *, timeout: float) -> Answer:
        answer = self._adb(word, source, target, timeout=timeout)
        said = answer.out + answer.err
        if answer.code and not any(words in said for words in ANSWERED):
            raise self._explained(answer)
        return Answer(code=answer.code, out="", err=said)

    def _adb(self, *words: str, timeout: float) -> Answer:
        if not self._here and NETWORK.fullmatch(self.serial):
            client(self.name, "connect", self.serial)  # where it cannot, what follows says so
        return client(self.name, "-s", self.serial, *words, timeout=timeout)

    def _explained(self, answer: Answer) -> DeviceError:
        self._here = False
        known = MEANINGS if self._met else (*MEANINGS, OFFLINE, ABSENT)
        there = ", ".join(attached(self.name)) or "none is attached"
        return explained(answer.err or answer.out, known, CUT, name=self.name, attached=there)


def server_runs() -> bool:
    """Return whether something listens where adb's server would: asking adb would start one."""
    try:
        port = int(os.environ.get(PORT, "5037"))
        socket.create_connection(("127.0.0.1", port), timeout=SECONDS_TO_CONNECT).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True


def attached(name: str) -> tuple[str, ...]:
    """Return the serials of what is attached, whatever its state.

    Args:
        name: Whose, for messages.

    Raises:
        DeviceError: There is no adb, or its server does not start.
    """
    answer = client(name, "devices")
    if answer.code:
        raise explained(answer.err, MEANINGS, CUT, name=name)
    _, _, lines = answer.out.partition("List of devices attached\n")
    found = (LISTED.fullmatch(line.strip()) for line in lines.splitlines())
    return tuple(match["serial"] for match in found if match)


def client(name: str, *words: str, timeout: float = SECONDS_HERE) -> Answer:
    """Run adb.

    Args:
        name: Of the device that this is for, for messages.
        words: On its command line.
        timeout: In seconds.

    Raises:
        LostLinkError: It has not answered in that time.
        DeviceError: There is no adb.
    """
    try:
        done = subprocess.run(
            ["adb", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            # Ctrl-C is this process's to handle: it still has to clear up there.
            start_new_session=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise DeviceError(
            f"{name}: there is no adb here",
            allowed="Android's adb on PATH",
            do="Install it (Debian: apt-get install adb)",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise LostLinkError(
            f"{name} has not answered for {timeout:.0f} s",
            allowed="a device that answers",
            do="Look whether it is on, and try again",
        ) from error
    out, err = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
    return Answer(code=done.returncode, out=out, err=err)
