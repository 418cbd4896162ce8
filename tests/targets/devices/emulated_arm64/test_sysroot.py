"""The sysroot is built once, whole or not at all, and what is missing is said in a line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pipeline import store
from pipeline.errors import DeviceError
from pipeline.worker import silent
from targets.devices.emulated_arm64 import guest, plugin, sysroot
from targets.devices.emulated_arm64.profiles import PROFILES

ROOT = Path(__file__).parents[4]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(store.CACHE_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for what is downloaded and started; return what was done."""
    done: list[str] = []

    def debian(root: Path) -> None:
        done.append("debian")
        for name in sysroot.KEPT:
            (root / name).mkdir(parents=True)
            (root / name / "file").write_text(name)

    monkeypatch.setattr(sysroot, "require_tools", lambda _: None)
    monkeypatch.setattr(sysroot, "_debian", debian)
    monkeypatch.setattr(sysroot, "_wheels", lambda _: done.append("wheels"))
    monkeypatch.setattr(sysroot, "_start", lambda _: done.append("start"))
    return done


def test_the_board_has_the_releases_that_are_tested_here() -> None:
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    assert {name: pinned[name] for name in sysroot.DISTRIBUTIONS} == sysroot.DISTRIBUTIONS


def test_it_is_built_once(built: list[str]) -> None:
    assert sysroot.find() is None
    steps: list[str] = []
    first = sysroot.setup(lambda _done, _total, note="": steps.append(note))
    assert sysroot.setup(silent) == first == sysroot.find()
    assert built == ["debian", "wheels", "start"]
    assert len(steps) == sysroot.STEPS + 1


def test_one_that_has_changed_is_built_again(built: list[str]) -> None:
    made = sysroot.setup(silent)
    (made / guest.ROOT / "usr" / "file").write_text("other")
    sysroot._store.cache_clear()  # as the next process finds it
    assert sysroot.find() is None
    sysroot.setup(silent)
    assert built.count("debian") == 2
    assert (made / guest.ROOT / "usr" / "file").read_text() == "usr"


@pytest.mark.usefixtures("built")
def test_that_of_another_version_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    other = sysroot.setup(silent)
    monkeypatch.setattr(sysroot, "SUITE", "trixie")
    made = sysroot.setup(silent)
    assert list(made.parent.iterdir()) == [made]
    assert made != other


@pytest.mark.usefixtures("built")
def test_a_view_shows_its_cpu_beside_what_all_share() -> None:
    made = sysroot.setup(silent)
    for name, profile in PROFILES.items():
        view = made / guest.VIEWS / name
        assert (view / "usr" / "file").read_text() == "usr"
        info = (view / "proc" / "cpuinfo").read_text()
        assert info.count(f"CPU part\t: {profile.part:#05x}\n") == 4
        assert info.count(f"Features\t: {profile.features}\n") == 4
        assert (view / "sys/devices/system/cpu/online").read_text() == "0-3\n"


def test_a_failed_download_is_one_line_and_leaves_nothing(
    built: list[str], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    def fail(_: Path) -> None:
        words = [sys.executable, "-c", "import sys; sys.exit('E: no\\n\\nE: route to host\\n')"]
        sysroot._run(words, "the wheels could not be fetched")

    monkeypatch.setattr(sysroot, "_wheels", fail)
    with pytest.raises(DeviceError, match=r"wheels could not be fetched \(.*: E: route to host\)"):
        sysroot.setup(silent)
    assert built == ["debian"]
    assert list((cache / "emulated-arm64").iterdir()) == []


def test_missing_tools_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DeviceError, match=r"apt-get install -y qemu-user mmdebstrap gcc") as caught:
        guest.require_tools(tuple(guest.TOOLS))
    assert "\n" not in str(caught.value)
    with pytest.raises(DeviceError, match=r"needs qemu-aarch64, mmdebstrap"):
        sysroot.setup(silent)
    with pytest.raises(DeviceError, match="needs gcc"):
        plugin.built()


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(store.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    assert store.cache_folder() == tmp_path / "mine" / "convnext-edge"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store.cache_folder() == Path.home() / ".cache" / "convnext-edge"


def test_commas_reach_the_emulator_doubled() -> None:
    words = guest.command(
        Path("/s"), PROFILES["phone"], ["x.py"], plugin=Path("/a,b/c.so"), counts=Path("/o,p")
    )
    assert words[words.index("-plugin") + 1] == "/a,,b/c.so,out=/o,,p"
    assert words[words.index("-cpu") + 1] == "max,sme=off,sve=off"
    assert words[-2:] == ["/s/root/usr/bin/python3.11", "x.py"]
    assert "-plugin" not in guest.command(Path("/s"), PROFILES["pi3"], [])
