"""What this machine's own worker processes tell."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.worker import silent
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
