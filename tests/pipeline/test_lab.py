"""Places beside the run's own device: who takes turns, who is asked, what is kept."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from pipeline.errors import ArtifactError, UsageError
from pipeline.lab import Known, Lab, check_threads, kept_places, places_json
from pipeline.records import Place
from targets import base
from targets.base import HOST, DeviceInfo, NotRun


def info(name: str, machine: str = "", cores: int = 4) -> DeviceInfo:
    return DeviceInfo(
        name=name, kind="device", isa=(), description="", cores=cores, machine=machine
    )


class Board:
    """A device that says where and when it was asked."""

    def __init__(self, name: str, machine: str, *, answers: bool = True) -> None:
        self.name = name
        self.machine = machine
        self.answers = answers
        self.asked = 0

    def probe(self) -> DeviceInfo | NotRun:
        self.asked += 1
        return info(self.name, self.machine) if self.answers else NotRun(reason="it is off")


@pytest.fixture
def boards(monkeypatch: pytest.MonkeyPatch) -> dict[str, Board]:
    known = {
        "a": Board("a", "one"),
        "b": Board("b", "one"),
        "c": Board("c", ""),
        "h": Board("h", HOST),
        "off": Board("off", "", answers=False),
    }

    def device(name: str) -> Board:
        if name not in known:
            raise UsageError(f"unknown device: {name}", allowed="a", do="Correct --device")
        return known[name]

    monkeypatch.setattr(base, "device", device)
    return known


def lab(*asked: str, known: Sequence[Known] = (), images: int | None = None) -> Lab:
    stages: Any = None
    places = [Place(device=name) for name in asked]
    return Lab(stages, known, asked=places, images=images, image_shape=(1, 3, 8, 8))


@pytest.mark.usefixtures("boards")
def test_places_of_one_machine_take_turns_and_this_host_s_come_first() -> None:
    both = threading.Barrier(2, timeout=20)
    running: set[str] = set()
    seen: list[str] = []

    def work(spot: Any) -> str:
        machine = spot.machine
        assert machine not in running, "two spots of one machine at the same time"
        running.add(machine)
        seen.append(spot.device.name)
        if machine == HOST:
            assert running == {HOST}, "nothing runs beside this host's"
        elif spot.device.name in {"a", "c"}:
            both.wait()  # two machines do work at the same time
        running.discard(machine)
        return str(spot.device.name)

    of = lab("a", "b", "c", "h")
    assert of._everywhere(of.spots, work) == ["a", "b", "c", "h"]
    assert seen[0] == "h"


def test_a_place_that_answered_is_not_asked_again(boards: dict[str, Board]) -> None:
    before = Known(place=Place(device="a"), info=info("a", "one"), images=8)
    of = lab("c", known=[before], images=100)
    assert (boards["a"].asked, boards["c"].asked) == (0, 1)
    assert of.known() == [before, Known(place=Place(device="c"), info=info("c"), images=100)]


@pytest.mark.usefixtures("boards")
def test_of_one_device_what_it_says_now_comes_last() -> None:
    was = replace(info("c"), description="a Pi 4")
    known = [Known(place=Place(device="c", threads=n), info=was) for n in (1, 2)]
    assert lab("c", known=known).described() == [was, info("c")]


@pytest.mark.usefixtures("boards")
def test_a_place_that_is_off_keeps_what_it_said() -> None:
    before = Known(place=Place(device="off"), info=info("off"), images=8)
    of = lab("off", known=[before])
    assert of.known() == [before]
    assert of.spots[0].info == NotRun(reason="it is off")
    assert lab("off").known() == []


@pytest.mark.usefixtures("boards")
def test_more_threads_than_cores_are_refused() -> None:
    with pytest.raises(UsageError, match="--threads 5 on a, which has 4 cores"):
        check_threads(info("a"), 5)
    stages: Any = None
    with pytest.raises(UsageError, match="--threads 9 on a"):
        Lab(
            stages,
            [],
            asked=[Place(device="a", threads=9)],
            images=None,
            image_shape=(1, 3, 8, 8),
        )


@pytest.mark.usefixtures("boards")
def test_places_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "devices.json"
    assert kept_places(file) == ()
    known = (Known(place=Place(device="a", threads=2), info=info("a"), images=None),)
    file.write_bytes(places_json(known))
    assert kept_places(file) == known


@pytest.mark.usefixtures("boards")
@pytest.mark.parametrize("damage", [b"", b"{}", b'[{"place": 1}]'])
def test_a_damaged_file_is_one_line(damage: bytes, tmp_path: Path) -> None:
    file = tmp_path / "devices.json"
    file.write_bytes(damage)
    with pytest.raises(ArtifactError, match="names no devices"):
        kept_places(file)


@pytest.mark.usefixtures("boards")
def test_a_device_that_is_gone_is_named_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "devices.json"
    gone = Known(place=Place(device="z"), info=info("z"), images=None)
    file.write_bytes(TypeAdapter(list[Known]).dump_json([gone]))
    with pytest.raises(ArtifactError, match=r"devices.json names a device 'z'"):
        kept_places(file)
