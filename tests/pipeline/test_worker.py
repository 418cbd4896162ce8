"""A worker process: what comes back from it, and what becomes of it when it dies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import UsageError, WorkerError
from pipeline.worker import Worker
from pipeline.worker import _running as running

FUNCTIONS = """
import os, signal
from pipeline.errors import UsageError

def number(progress):
    progress(1, 1)
    return os.getpid()

def policy(progress):
    return os.environ.get("OMP_WAIT_POLICY")

def die(progress):
    os.kill(os.getpid(), signal.SIGKILL)

def leave(progress):
    os._exit(3)

def refuse(progress):
    raise UsageError("got", allowed="allowed", do="do")

def fail(progress):
    raise ValueError("broken\\nby something")
"""


@pytest.fixture
def made(tmp_path: Path) -> Worker:
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths)}
    return Worker(tmp_path / "worker.log", environment=environment)


@pytest.fixture
def worker(made: Worker) -> Iterator[Worker]:
    with made:
        yield made


def test_calls_share_a_process(worker: Worker) -> None:
    first = worker.call("functions:number")
    assert first.value != os.getpid()
    assert worker.call("functions:number").value == first.value
    assert first.peak_memory_bytes > 1_000_000


@pytest.mark.parametrize(("function", "how"), [("die", "signal SIGKILL"), ("leave", "exit code 3")])
def test_the_next_call_after_a_death_has_another_process(
    worker: Worker, function: str, how: str
) -> None:
    first = worker.call("functions:number").value
    with pytest.raises(WorkerError, match=f"functions:{function} ended with {how}"):
        worker.call(f"functions:{function}")
    second = worker.call("functions:number").value
    assert second != first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)  # and the dead one was waited for
    assert first not in {one.pid for one in running}


def test_an_error_leaves_the_process_as_it_is(worker: Worker) -> None:
    first = worker.call("functions:number").value
    with pytest.raises(UsageError, match="got"):
        worker.call("functions:refuse")
    with pytest.raises(WorkerError, match="functions:fail failed: ValueError: broken") as failure:
        worker.call("functions:fail")
    assert "by something" not in str(failure.value)
    assert worker.call("functions:number").value == first


def test_the_process_ends_with_the_block(made: Worker) -> None:
    with made:
        process = made.call("functions:number").value
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_waiting_threads_sleep_unless_the_user_says_otherwise(
    made: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with made:
        assert made.call("functions:policy").value == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with made:
        assert made.call("functions:policy").value == "ACTIVE"
