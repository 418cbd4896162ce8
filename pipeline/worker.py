"""Work in a process of its own: frameworks kept apart, memory given back, crashes contained.

In: the name of a function and JSON arguments. Out: its JSON result, with the seconds it took and
the process's peak memory. A worker is `python -P -m pipeline.worker`; requests and replies are
lines of JSON on its standard input and output, and whatever libraries print goes to a log file.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, Protocol, Self, TextIO

from safetensors import SafetensorError

from pipeline import errors
from pipeline.errors import EdgeError, WorkerError
from pipeline.store import cannot_write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType

PROGRESS_SECONDS = 0.05
PATIENT: Mapping[str, str] = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that wait for one another sleep: by default they spin, and where another process has a
core, that multiplies the time of a small network. What the user has set goes before it."""
NOTHING: Mapping[str, str] = {}
NO_ROOM = os.strerror(errno.ENOSPC)
UNWRITABLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG})


class Progress(Protocol):
    """What a long function calls as it goes."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Say that `done` of `total` steps are behind, and how things stand."""


def silent(done: int, total: int, note: str = "") -> None:
    """Report to nobody."""
    del done, total, note


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a call gave and what it cost."""

    value: Any
    seconds: float
    peak_memory_bytes: int


_running: set[subprocess.Popen[str]] = set()
ending = threading.Event()
"""Set where all work is to end: what waits for something else than a process looks at it."""


def end_all() -> None:
    """Kill every worker of this process: what waits for one gets a `WorkerError` at once."""
    ending.set()
    for process in tuple(_running):
        process.kill()


@contextlib.contextmanager
def ended_with_all(process: subprocess.Popen[str]) -> Iterator[None]:
    """Let `end_all` kill a process that is no worker, while the block runs."""
    _running.add(process)
    try:
        yield
    finally:
        _running.discard(process)


@contextlib.contextmanager
def log_without_a_run() -> Iterator[Path]:
    """Give a place for the log of a command that has no run folder; it stays where a worker fails.

    Then a message points at it.
    """
    folder = Path(mkdtemp(prefix="convnext-edge-"))
    try:
        yield folder / "worker.log"
    except WorkerError:
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


class Worker:
    """One worker process, started at its first call and ended with the `with` block.

    Where the process dies, the next call starts another.

    Args:
        log: The file that takes the process's standard error.
        patience: Seconds that the process has to save its work when it is ended in the middle of
            it; 0 ends it at once.
        environment: Variables that the process has beside this one's.
    """

    def __init__(
        self, log: Path, patience: float = 0.0, environment: Mapping[str, str] = NOTHING
    ) -> None:
        self.log = log
        self.patience = patience
        self.environment = environment
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        """Return the worker; nothing is started yet."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the process, whatever it is doing."""
        try:
            if self._process is not None and self.patience and error is not None:
                self._let_save()
        finally:
            self._end()

    def _end(self) -> int:
        """Kill the process, where there is one, and return how it ended."""
        process, self._process = self._process, None
        if process is None:
            return 0
        assert process.stdin is not None
        assert process.stdout is not None
        process.kill()
        code = process.wait()
        _running.discard(process)
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        return code

    def _let_save(self) -> None:
        """Ask the process to end, and give it time to."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.terminate()
        with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
            # It ends once it has answered: nothing more will be asked.
            self._process.stdin.close()
            self._process.wait(self.patience)

    def call(self, function: str, *, progress: Progress = silent, **arguments: object) -> Reply:
        """Call `module:function` in the worker.

        Args:
            function: It takes the arguments by keyword, and `progress` as well.
            progress: Called in this process.
            **arguments: JSON values.

        Returns:
            What the function returned, and its cost.

        Raises:
            EdgeError: As the function raised it.
            WorkerError: The function failed otherwise, or the process died.
        """
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"function": function, "arguments": arguments}) + "\n")
            process.stdin.flush()
            while line := process.stdout.readline():
                if not line.endswith("\n"):
                    break  # killed in the middle of it
                message = json.loads(line)
                if "progress" in message:
                    progress(*message["progress"])
                    continue
                return self._reply(function, message)
        except BrokenPipeError:
            pass
        process.wait()
        raise self._died(function, self._end())

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "pipeline.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env={**PATIENT, **os.environ, **self.environment},
                    # Ctrl-C is this process's to handle: it ends its workers itself.
                    start_new_session=True,
                )
            _running.add(self._process)
        return self._process

    def _reply(self, function: str, message: dict[str, Any]) -> Reply:
        if "error" in message:
            error = message["error"]
            kind = getattr(errors, error.pop("kind"))
            raise kind(error.pop("got"), **error)
        if "crash" in message:
            raise WorkerError(
                f"{function} failed: {message['crash']}",
                allowed="a run to the end",
                do=f"See {self.log} and report it: this is a bug",
            )
        return Reply(
            value=message["value"],
            seconds=message["seconds"],
            peak_memory_bytes=message["peak_memory_bytes"],
        )

    def _died(self, function: str, code: int) -> WorkerError:
        what = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return WorkerError(
            f"{function} ended with {what}",
            allowed="a run to the end",
            do=f"See {self.log}; SIGKILL often means that memory ran out",
        )


def main() -> None:
    """Serve requests until standard input ends."""
    replies = _take_standard_output()
    for line in sys.stdin:
        request = json.loads(line)
        started = time.monotonic()
        message = _answer(request["function"], request["arguments"], _Announcer(replies))
        message["seconds"] = time.monotonic() - started
        message["peak_memory_bytes"] = peak_memory_bytes()
        _send(replies, message)


def peak_memory_bytes() -> int:
    """Return the largest resident size this process has had."""
    if sys.platform == "linux":
        # getrusage would count what the parent held when it started this process.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _take_standard_output() -> TextIO:
    # Libraries print to standard output, from C++ too: point it at standard error.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies


def _answer(function: str, arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    module, _, name = function.partition(":")
    try:
        target: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return {"value": target(**arguments, progress=progress)}
    except EdgeError as error:
        return {"error": _described(error)}
    except OSError as error:
        if error.errno not in UNWRITABLE:
            return _crash(error)
        return {"error": _described(cannot_write(error.filename or "the run folder", error))}
    except SafetensorError as error:
        if NO_ROOM not in str(error):  # it gives no errno
            return _crash(error)
        return {"error": _described(cannot_write("the run folder", OSError(errno.ENOSPC, NO_ROOM)))}
    except Exception as error:  # noqa: BLE001 - the process boundary: the parent says it in a line
        return _crash(error)


def _crash(error: Exception) -> dict[str, Any]:
    traceback.print_exc()
    first = (str(error).strip().splitlines() or [""])[0]
    return {"crash": f"{type(error).__name__}: {first[:200]}"}


def _described(error: EdgeError) -> dict[str, str]:
    # What a module refines of its own crosses as the class of `pipeline.errors` that it is.
    kind = next(c.__name__ for c in type(error).__mro__ if c.__module__ == errors.__name__)
    return {"kind": kind, "got": error.got, "allowed": error.allowed, "do": error.do}


class _Announcer:
    """Sends progress, at most twenty times a second."""

    def __init__(self, replies: TextIO) -> None:
        self.replies = replies
        self.last = 0.0

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if done >= total or now - self.last > PROGRESS_SECONDS:
            self.last = now
            _send(self.replies, {"progress": [done, total, note]})


def _send(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
