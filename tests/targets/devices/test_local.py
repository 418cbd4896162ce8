"""What this machine's own worker processes tell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.worker import silent
from targets.base import Job
from targets.devices import local


def test_a_turn_tells_its_energy_where_a_counter_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_job", [(lambda image: image, np.zeros((1, 3, 2, 2)))])
    looks = iter([5_000, 7_500])
    monkeypatch.setattr(local, "energy_uj", lambda: {"package-0": (next(looks), 99_999)})
    told = local.time_job(4, silent)
    assert told["energy_mj"] == pytest.approx(2.5)
    assert len(told["wall_ms"]) == len(told["cpu_ms"]) == 4
    monkeypatch.setattr(local, "energy_uj", dict)
    assert local.time_job(4, silent)["energy_mj"] is None


def test_a_job_that_fails_says_why_beside_the_others(
    artifacts: Mapping[str, Path], pixels: NDArray[np.float32], tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"nothing")
    files = {"harness": None, "float": artifacts["onnx"], "w8a8": damaged}
    jobs = [Job(label=label, runtime="onnx", path=path) for label, path in files.items()]
    found = local.DEVICE.measure(
        jobs, pixels[:1], rounds=2, per_round=3, threads=1, progress=silent
    )
    assert [len(one.wall_ms) for one in found] == [6, 6, 0]
    assert [one.error is None for one in found] == [True, True, False]
    assert "damaged.onnx" in (found[2].error or "")
    assert found[1].versions
    assert found[1].peak_memory_bytes
    assert found[1].before is not None
    assert found[1].after is not None
    assert found[1].after.load is not None
