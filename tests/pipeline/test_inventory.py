"""A lab's devices by names of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import cli_run
from pipeline.errors import UsageError
from pipeline.inventory import places_of, read_inventory
from pipeline.records import Place

LAB = """
[desk]
device = "local"
[kitchen]
device = "ssh:pi@kitchen.local"
threads = 4
"""


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    file = tmp_path / "lab.toml"
    file.write_text(LAB)
    return file


def test_names_mean_places(lab: Path) -> None:
    known = read_inventory(lab)
    kitchen = Place(device="ssh:pi@kitchen.local", threads=4)
    assert places_of(["kitchen"], None, known) == (kitchen,)
    assert places_of(["kitchen"], 1, known) == (Place(device="ssh:pi@kitchen.local"),)
    assert places_of(["all", "desk", "local"], None, known) == (Place(device="local"), kitchen)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", None),
        ("[x", "is no inventory"),
        ("[x]\nplace = 1", "x.device"),
        ('[x]\ndevice = "local"\nthreads = 0', "x.threads"),
        ('[all]\ndevice = "local"', "calls a device 'all'"),
        ('["a\\u001b[31m"]\ndevice = "local"', r"calls a device 'a\x1b[31m'"),
        ('[" "]\ndevice = "local"', "calls a device ' '"),
        ('[x]\ndevice = "nosuch"', "[x]: unknown device: nosuch"),
        ('[x]\ndevice = ""', "[x]: unknown device: no name"),
        ('[x]\ndevice = "cpu:sse9"', "[x]: unknown instruction set: sse9"),
    ],
)
def test_a_wrong_inventory_is_one_line(text: str, said: str | None, tmp_path: Path) -> None:
    file = tmp_path / "lab.toml"
    file.write_text(text)
    if said is None:
        assert read_inventory(file) == {}
        return
    with pytest.raises(UsageError) as raised:
        read_inventory(file)
    assert said in str(raised.value)
    assert str(file) in str(raised.value)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("data", [b"\xff\xfe", None])
def test_a_file_that_is_none_is_one_line(data: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "lab.toml"
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(UsageError, match="is no inventory"):
        read_inventory(file)


def test_all_needs_an_inventory() -> None:
    with pytest.raises(UsageError, match="means every device of an inventory"):
        places_of(["all"], None)


def test_an_inventory_needs_a_device(lab: Path) -> None:
    with pytest.raises(UsageError, match="without --device"):
        cli_run._places(None, None, lab)
    assert cli_run._places(None, None, None) == ()
