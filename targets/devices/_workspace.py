"""A folder on a device where a program runs: files checked there, work that outlives the link.

In: a `Transport`, which runs a line of POSIX shell on the device and moves files; a `Program`. Out:
the files that it leaves. What is pushed is named by its SHA-256, which the device computes: a file
that lies there with the right one is not pushed again. The program is detached, so that a dropped
link costs nothing but the time to reconnect.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shlex
import time
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol

from pipeline.errors import DeviceError
from pipeline.store import sha256_file
from pipeline.worker import ending
from targets.devices import _exchange as exchange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from pipeline.worker import Progress

READY = "ready"
NOT_FOUND = 127
"""A shell's exit code for a command that is not there."""
POLLED = re.compile(r"progress (?P<line>[^\n]*)\ncode (?P<code>\d*)\nalive (?P<alive>y?)\n")
HASHED = re.compile(r"([0-9a-f]{64}) [ *](.+)")
NO_ROOM = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "File size limit exceeded",
)
FREE_KB = re.compile(r"(\d+) +\d+% ")
"""In what `df -P` prints."""
LEAST_KB = 64
"""Where less is free, what failed failed for want of room."""
KEPT_DAYS = 7
"""That a pushed file stays on a device after its last use."""
_OURS = '[ "/proc/$p/cwd" -ef {place} ]'
"""Whether a process still runs, and is not another one that got its number after a restart."""
SLOWEST_LINK = 50_000
"""Bytes per second."""


class LostLinkError(DeviceError):
    """A link that was there and is gone; it may come back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a command gave."""

    code: int
    out: str
    err: str


class Transport(Protocol):
    """A way to a device.

    Every method raises `LostLinkError` where trying again may help, else `DeviceError`.
    """

    name: str

    def run(self, command: str, *, timeout: float) -> Answer:
        """Run a line of POSIX shell there, in the folder that relative paths start from."""

    def push(self, source: Path, target: str, *, timeout: float) -> Answer:
        """Write a file there; the answer's code is not 0 where it cannot be written."""

    def pull(self, source: str, target: Path, *, timeout: float) -> Answer:
        """Write a file of the device here; the answer's code is not 0 where it cannot be read."""

    def close(self) -> None:
        """Give back what the way holds; it may be used again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a device is waited for, in seconds.

    Attributes:
        command: For one short command.
        silence: For the next turn of a running job.
        reconnect: Before each attempt to reach it again after a lost link.
        poll: Between looks at a running job, from the first to the slowest.
    """

    command: float = 60.0
    silence: float = 900.0
    reconnect: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
    poll: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What runs on a device, in a folder of its own.

    It prints a line of JSON per step, `{"done": 1, "total": 9}`, on standard output.

    Attributes:
        command: A line of POSIX shell.
        needs: What the device lacks where its shell does not find the command.
        files: What must lie in the folder, by name there.
        outputs: What it leaves there.
    """

    command: str
    needs: str
    files: Mapping[str, Path]
    outputs: tuple[str, ...]


class Workspace:
    """This project's folder on one device.

    Args:
        transport: The way there.
        root: The folder: absolute, or relative as `Transport.run` says.
        patience: How long the device is waited for.
    """

    def __init__(self, transport: Transport, root: str, patience: Patience | None = None) -> None:
        self.name = transport.name
        self.transport = transport
        self.root = PurePosixPath(root)
        self.patience = patience or Patience()

    def perform(self, program: Program, folder: Path, progress: Progress) -> None:
        """Run a program there to its end, and remove its traces.

        Args:
            program: What to run.
            folder: Takes what it leaves.
            progress: Called as it gets on.

        Raises:
            DeviceError: The device cannot be reached, or the program does not end well.
        """
        run = self.root / "runs" / f"{int(time.time())}-{secrets.token_hex(4)}"
        with contextlib.ExitStack() as stack:
            stack.callback(self.transport.close)
            self._prepare(run)
            stack.callback(self._clear, run)
            self._bring(program.files, run)
            self._start(run, program)
            self._wait(run, program, progress)
            for name in program.outputs:
                self._fetch(run / name, folder / name)

    def _clear(self, run: PurePosixPath) -> None:
        """End a run, whatever it is doing, and remove its folder: Ctrl-C comes here too."""
        place = _quoted(run)
        # What a device out of reach keeps, a later run removes.
        with contextlib.suppress(DeviceError):
            # A kill that is no built-in may take -1234 for -1, every process; not behind `--`.
            self.transport.run(
                f"p=$(cat {place}/pid 2>/dev/null); if {_OURS.format(place=place)};"
                f' then kill -s KILL -- "-$p" || kill -s KILL "$p"; fi; rm -rf {place}',
                timeout=self.patience.command,
            )

    def _prepare(self, run: PurePosixPath) -> None:
        """Make the folders, and remove what was left long ago."""
        files, runs = _quoted(self.root / "files"), _quoted(self.root / "runs")
        old = f"-mtime +{KEPT_DAYS}"
        said = self.do(
            "make a folder",
            f"mkdir -p {files} {_quoted(run)} || exit 1"
            f"; find {files} -type f {old} -exec rm -f {{}} +"
            f"; find {runs} -mindepth 1 -maxdepth 1 {old} -exec rm -rf {{}} +"
            f"; echo {READY}",
        )
        if said != f"{READY}\n":
            raise exchange.garbage(self.name, _excerpt(said))

    def _bring(self, files: Mapping[str, Path], run: PurePosixPath) -> None:
        """Have files in a run's folder, each with the hash that it has here."""
        hashes = {name: sha256_file(path) for name, path in files.items()}
        places = {name: self.root / "files" / hashes[name] for name in files}
        there = self._hashes(places.values())
        for name, place in places.items():
            if there.get(place) != hashes[name]:
                self._push(files[name], place, hashes[name], run)
                there[place] = hashes[name]
        linked = (f"ln -sf ../../files/{hashes[n]} {_quoted(run / n)}" for n in files)
        used = " ".join(_quoted(place) for place in places.values())
        self.do("link files", f"touch -c {used} && {' && '.join(linked)}")

    def _push(self, source: Path, place: PurePosixPath, sha256: str, run: PurePosixPath) -> None:
        partial = run / "partial"
        timeout = self.patience.command + source.stat().st_size / SLOWEST_LINK
        answer = self._insist(lambda: self.transport.push(source, str(partial), timeout=timeout))
        if answer.code:
            raise self._refused(f"write {source.name}", answer)
        arrived = self._hashes([partial]).get(partial)
        if arrived != sha256:
            raise DeviceError(
                f"{self.name}: {source.name} arrived with SHA-256 {arrived}, not {sha256}",
                allowed="a link and a disk that keep what they are given, and sha256sum there",
                do="Try again; look at the device's disk where it happens twice",
            )
        left = _quoted(partial)
        self.do("rename a file", f"[ ! -e {left} ] || mv -f {left} {_quoted(place)}")

    def _hashes(self, places: Iterable[PurePosixPath]) -> dict[PurePosixPath, str]:
        """Ask for the hashes of those files that are there."""
        names = " ".join(_quoted(place) for place in places)
        said = self.do("hash files", f"sha256sum {names} 2>/dev/null; true")
        found = (HASHED.fullmatch(line) for line in said.splitlines())
        return {PurePosixPath(match[2]): match[1] for match in found if match}

    def _start(self, run: PurePosixPath, program: Program) -> None:
        """Start the runner so that it needs no link; where it was started already, do nothing."""
        inner = shlex.quote(f"{program.command} >progress 2>log; echo $? >code")
        self.do(
            "start the runner",
            f"cd {_quoted(run)} || exit 1; mkdir started 2>/dev/null || exit 0; "
            f"nohup setsid sh -c {inner} </dev/null >/dev/null 2>&1 & echo $! >pid",
        )

    def _wait(self, run: PurePosixPath, program: Program, progress: Progress) -> None:
        """Look at the runner until it has ended well."""
        last, since = "", time.monotonic()
        pauses = chain(self.patience.poll, repeat(self.patience.poll[-1]))
        for pause in pauses:
            said = self.do(
                "look at the runner",
                f"cd {_quoted(run)} || exit 1; "
                f"p=$(cat pid); alive=$({_OURS.format(place='.')} && echo y); "
                'echo "progress $(tail -n 1 progress 2>/dev/null)"; '
                'echo "code $(cat code 2>/dev/null)"; echo "alive $alive"',
            )
            match = POLLED.fullmatch(said)
            if match is None:
                raise exchange.garbage(self.name, _excerpt(said))
            if match["line"] != last:
                last, since = match["line"], time.monotonic()
                exchange.tell(last, progress)
            if match["code"] == "0":
                return
            if match["code"] or not match["alive"]:
                raise self._died(run, program, match["code"])
            if time.monotonic() - since > self.patience.silence:
                raise DeviceError(
                    f"{self.name}: the runner has said nothing for {self.patience.silence:.0f} s",
                    allowed="a turn of every artifact in that time",
                    do="Choose a smaller network or input, or look what else runs there",
                )
            if ending.wait(pause):
                raise DeviceError(
                    f"{self.name}: interrupted",
                    allowed="a run to the end",
                    do="Start it again: what was finished is kept",
                )

    def _died(self, run: PurePosixPath, program: Program, code: str) -> DeviceError:
        """Say why the runner ended without a result."""
        place = _quoted(run)
        log = self.do("read the runner's log", f"tail -c 2000 {place}/log 2>/dev/null; true")
        room = FREE_KB.search(self.do("look at the disk", f"df -Pk {place}"))
        if any(words in log for words in NO_ROOM) or (room and int(room[1]) < LEAST_KB):
            return self._full()
        if code == str(NOT_FOUND):
            return exchange.lacks(self.name, program.needs)
        words = (log.strip().splitlines() or ["its log is empty"])[-1]
        ended = f"ended with exit code {code}" if code else "was killed, or the device restarted"
        return DeviceError(
            f"{self.name}: the runner {ended}: {words[:200]}",
            allowed="a run to the end",
            do="Look at the device's memory and log, and try again",
        )

    def _fetch(self, source: PurePosixPath, target: Path) -> None:
        answer = self._insist(
            lambda: self.transport.pull(str(source), target, timeout=self.patience.silence)
        )
        if answer.code:
            raise self._refused(f"read {source.name}", answer)
        if self._hashes([source]).get(source) != sha256_file(target):
            raise exchange.garbage(self.name, f"{source.name} is not the same here and there")

    def do(self, what: str, command: str) -> str:
        """Run a command that may be run twice, and return what it prints.

        Args:
            what: It is there for, to complete "cannot … there".
            command: A line of POSIX shell.

        Raises:
            DeviceError: The device cannot be reached, or the command ends with an exit code.
        """
        line = f"export LC_ALL=C; {command}"
        answer = self._insist(lambda: self.transport.run(line, timeout=self.patience.command))
        if answer.code:
            raise self._refused(what, answer)
        return answer.out

    def _insist(self, action: Callable[[], Answer]) -> Answer:
        """Do something; after a lost link wait, and do it again."""
        for seconds in self.patience.reconnect:
            try:
                return action()
            except LostLinkError:
                if ending.wait(seconds):
                    raise
        return action()

    def _refused(self, what: str, answer: Answer) -> DeviceError:
        if any(words in answer.err for words in NO_ROOM):
            return self._full()
        words = _excerpt(answer.err or answer.out)
        return DeviceError(
            f"{self.name}: cannot {what} there (exit code {answer.code}): {words}",
            allowed=f"a POSIX shell there, and a folder {self.root} that this login may write",
            do="Log in by hand and look",
        )

    def _full(self) -> DeviceError:
        return DeviceError(
            f"{self.name}: the disk is full there, or this login's quota used up",
            allowed="room for the artifacts and the images",
            do=f"Free some space there; {self.root} itself may be removed",
        )


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Give a folder here for what goes to a device and comes from it."""
    with TemporaryDirectory(prefix="convnext-edge-") as name:
        yield Path(name)


def _excerpt(text: str) -> str:
    return repr(text.strip()[-200:]) if text.strip() else "nothing"


def _quoted(path: PurePosixPath) -> str:
    return shlex.quote(str(path))
