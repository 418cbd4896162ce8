"""What jobs gave: of those that failed the reason, and an error where nothing is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import DeviceError
from pipeline.worker import ending
from targets.base import Job, Samples, settled

JOBS = [
    Job(label=label, runtime="onnx", path=path)
    for label, path in (("harness", None), ("float", Path("f.onnx")), ("w8a8", Path("i.onnx")))
]
BROKEN = DeviceError("it broke", allowed="a whole one", do="Mend it")


def gave(*failed: str) -> dict[str, Samples | DeviceError]:
    return {
        job.label: BROKEN if job.label in failed else Samples(label=job.label, wall_ms=(1.0,))
        for job in JOBS
    }


def test_one_that_failed_says_why_beside_the_others() -> None:
    found = settled(JOBS, gave("float"))
    assert [one.label for one in found] == ["harness", "float", "w8a8"]
    assert [one.error for one in found] == [None, str(BROKEN), None]
    assert [one.wall_ms for one in found] == [(1.0,), (), (1.0,)]


@pytest.mark.parametrize("failed", [("harness",), ("float", "w8a8"), ("harness", "w8a8")])
def test_where_nothing_is_left_it_is_an_error(failed: tuple[str, ...]) -> None:
    with pytest.raises(DeviceError, match="it broke"):
        settled(JOBS, gave(*failed))


def test_where_all_work_ends_a_failure_is_nobody_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "is_set", lambda: True)
    with pytest.raises(DeviceError, match="it broke"):
        settled(JOBS, gave("float"))
    assert len(settled(JOBS, gave())) == len(JOBS)
