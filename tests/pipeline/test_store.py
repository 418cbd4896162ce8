"""Atomic writes, and the cache's keys."""

from __future__ import annotations

import errno
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline import store
from pipeline.errors import OutputError
from pipeline.store import Stage, Store, publish, sha256_file, write_atomic, writing


def _stage(**changes: Any) -> Stage:
    stated: dict[str, Any] = {
        "name": "fold",
        "modules": ("pipeline.fold",),
        "inputs": {"checkpoint": "abc"},
        "settings": {"size": 32},
        "libraries": ("torch",),
    }
    return Stage(**(stated | changes))


def _listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def _write_half(target: Path, failure: BaseException) -> None:
    with writing(target) as partial:
        partial.write_text("half")
        assert target.read_text() == "before"
        raise failure


def _write_half_folder(target: Path) -> None:
    with writing(target) as partial:
        partial.mkdir()
        (partial / "new.txt").write_text("half")
        raise RuntimeError


def test_a_file_appears_with_its_parents(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "file.bin"
    write_atomic(target, b"one")
    write_atomic(target, b"two")
    assert target.read_bytes() == b"two"
    assert _listing(tmp_path / "a" / "b") == ["file.bin"]


@pytest.mark.parametrize("failure", [RuntimeError("no"), KeyboardInterrupt()])
def test_a_failure_leaves_the_file_as_it_was(tmp_path: Path, failure: BaseException) -> None:
    target = tmp_path / "file.txt"
    target.write_text("before")
    with pytest.raises(type(failure)):
        _write_half(target, failure)
    assert target.read_text() == "before"
    assert _listing(tmp_path) == ["file.txt"]


def test_a_failure_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").write_text("before")
    with pytest.raises(RuntimeError):
        _write_half_folder(target)
    assert _listing(tmp_path) == ["out", "out/old.txt"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old.txt").write_text("before")
    with writing(target) as partial:
        partial.mkdir()
        (partial / "new.txt").write_text("after")
    assert _listing(tmp_path) == ["out", "out/new.txt"]


def test_a_full_disk_is_an_output_error(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("before")
    with pytest.raises(OutputError, match="No space left"):
        _write_half(target, OSError(errno.ENOSPC, "No space left on device"))
    assert target.read_text() == "before"
    assert _listing(tmp_path) == ["file.txt"]


def test_somebody_elses_os_error_passes_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), writing(tmp_path / "file.txt"):
        (tmp_path / "absent").read_bytes()
    assert _listing(tmp_path) == []


def test_a_parent_that_is_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_atomic(tmp_path / "file" / "inside.txt", b"")


def test_a_stage_made_anew_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    texts = iter(["first", "second"])

    def make(folder: Path) -> None:
        (folder / "result.txt").write_text(next(texts))

    def fail(folder: Path) -> None:
        (folder / "result.txt").write_text("half")
        raise KeyboardInterrupt

    cache = Store(tmp_path)
    first = cache.get(_stage(), make)
    assert cache.get(_stage(), make, anew=True) == first
    assert (first / "result.txt").read_text() == "second"
    assert (cache.made, cache.reused) == (["fold", "fold"], [])
    # One that is interrupted leaves what was measured before.
    with pytest.raises(KeyboardInterrupt):
        cache.get(_stage(), fail, anew=True)
    assert (Store(tmp_path).get(_stage(), make) / "result.txt").read_text() == "second"


def test_a_stage_is_made_once(tmp_path: Path) -> None:
    calls: list[Path] = []

    def make(folder: Path) -> None:
        calls.append(folder)
        (folder / "result.txt").write_text("made")

    cache = Store(tmp_path)
    assert cache.find(_stage()) is None
    first = cache.get(_stage(), make)
    second = cache.get(_stage(), make)
    assert first == second == cache.find(_stage())
    assert len(calls) == 1
    assert calls[0] != first
    assert (cache.made, cache.reused) == (["fold"], ["fold"])
    assert (first / "result.txt").read_text() == "made"
    record = json.loads((first / "stage.json").read_text())
    assert record["stage"] == "fold"
    assert record["inputs"] == {"checkpoint": "abc"}
    assert record["settings"] == {"size": 32}
    assert Store(tmp_path).find(_stage()) == first


def test_two_threads_make_a_stage_once(tmp_path: Path) -> None:
    calls: list[Path] = []
    both = threading.Barrier(2)

    def make(folder: Path) -> None:
        calls.append(folder)
        time.sleep(0.05)  # long enough for the other to want it too
        (folder / "result.txt").write_text("made")

    def get(_: int) -> Path:
        both.wait()
        return cache.get(_stage(), make)

    cache = Store(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(get, range(2))
    assert first == second
    assert len(calls) == 1


def test_a_stage_that_another_run_has_finished_is_copied(tmp_path: Path) -> None:
    stage = Stage(name="one", modules=(), inputs={}, settings={})
    theirs = Store(tmp_path / "theirs")

    def make(folder: Path) -> None:
        (folder / "file").write_text("made")

    source = theirs.get(stage, make)
    mine = Store(tmp_path / "mine", tmp_path / "theirs")
    folder = mine.get(stage, lambda _: pytest.fail("it is there"))
    assert folder.parent == tmp_path / "mine"
    assert (folder / "file").read_text() == "made"
    assert (mine.reused, mine.made) == (["one"], [])
    # A damaged one is none.
    (source / "file").write_text("changed")
    other = Store(tmp_path / "other", tmp_path / "theirs")
    other.get(stage, make)
    assert (other.reused, other.made) == ([], ["one"])


@pytest.mark.parametrize("damage", ["cut", "gone", "more", "record"])
def test_a_damaged_stage_is_made_again(tmp_path: Path, damage: str) -> None:
    def make(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner" / "result.txt").write_text("made")

    folder = Store(tmp_path).get(_stage(), make)
    match damage:
        case "cut":
            (folder / "inner" / "result.txt").write_text("mad")
        case "gone":
            (folder / "inner" / "result.txt").unlink()
        case "more":
            (folder / "other.txt").write_text("odd")
        case "record":
            (folder / "stage.json").write_text("{}")
    cache = Store(tmp_path)
    assert cache.find(_stage()) is None
    assert cache.get(_stage(), make) == folder
    assert cache.made == ["fold"]
    assert (folder / "inner" / "result.txt").read_text() == "made"
    assert Store(tmp_path).find(_stage()) == folder


def test_a_stage_that_fails_is_made_again(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        (folder / "half.txt").write_text("half")
        raise RuntimeError

    cache = Store(tmp_path)
    with pytest.raises(RuntimeError):
        cache.get(_stage(), broken)
    assert _listing(tmp_path) == []
    assert cache.made == []
    folder = cache.get(_stage(), lambda _: None)
    assert _listing(folder) == ["stage.json"]


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"inputs": {"checkpoint": "abd"}},
        {"inputs": {"data": "abc"}},
        {"settings": {"size": 64}},
        {"settings": {"size": 32, "seed": 0}},
        {"modules": ("pipeline.sidecar",)},
        {"libraries": ("torch", "numpy")},
    ],
)
def test_the_key_follows_what_could_change_the_result(changes: dict[str, Any]) -> None:
    assert _stage(**changes).key() != _stage().key()


def test_the_key_does_not_follow_the_order_of_settings() -> None:
    one, other = _stage(settings={"a": 1, "b": 2}), _stage(settings={"b": 2, "a": 1})
    assert one.key() == other.key()


def test_the_key_follows_library_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    before = _stage().key()
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.0.0.test")
    assert _stage().key() != before


def test_the_code_hash_follows_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def place(name: str) -> Path | None:
        path = tmp_path / f"{name.removeprefix('pipeline.')}.py"
        return path if name.startswith("pipeline.") and path.is_file() else None

    monkeypatch.setattr(store, "module_path", place)
    hashed = store.sha256_code.__wrapped__
    (tmp_path / "a.py").write_text("def f():\n    from pipeline.b import g\n")
    (tmp_path / "b.py").write_text("import pipeline.c\nimport pipeline.a\n")
    (tmp_path / "c.py").write_text("x = 1\n")
    (tmp_path / "unrelated.py").write_text("x = 1\n")
    before = hashed("pipeline.a")
    (tmp_path / "unrelated.py").write_text("x = 2\n")
    assert hashed("pipeline.a") == before
    (tmp_path / "c.py").write_text("x = 2\n")
    assert hashed("pipeline.a") != before


def test_imports_of_this_project_are_found_wherever_they_stand() -> None:
    source = (
        "import numpy\nif True:\n    from pipeline import fold\ndef f():\n    import calib.images"
    )
    assert store.imported_modules(source) == {"pipeline", "pipeline.fold", "calib.images"}


def test_a_folders_hash_is_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a").write_text("1")
    (tmp_path / "x" / "b").write_text("22")
    before = sha256_file(tmp_path / "x")
    assert store.size_bytes(tmp_path / "x") == 3
    (tmp_path / "x" / "a").rename(tmp_path / "x" / "c")
    renamed = sha256_file(tmp_path / "x")
    (tmp_path / "x" / "c").rename(tmp_path / "x" / "a")
    assert renamed != before == sha256_file(tmp_path / "x")
    (tmp_path / "x" / "b").write_text("23")
    assert sha256_file(tmp_path / "x") != before


def test_publish_copies_what_is_named_and_drops_the_rest(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "out" / "artifacts"
    (source / "model.mlpackage").mkdir(parents=True)
    (source / "model.mlpackage" / "weights").write_text("w")
    (source / "model.onnx").write_text("o")
    (source / "stage.json").write_text("private")
    target.mkdir(parents=True)
    (target / "stale").write_text("from another run")
    publish(source, target, ["model.onnx", "model.mlpackage"])
    assert _listing(target) == ["model.mlpackage", "model.mlpackage/weights", "model.onnx"]
    assert _listing(target.parent)[0] == "artifacts"


def test_publish_leaves_the_same_contents_alone(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "a").write_text("a")
    publish(source, target, ["a"])
    before = (target / "a").stat().st_ino, target.stat().st_ino
    publish(source, target, ["a"])
    assert ((target / "a").stat().st_ino, target.stat().st_ino) == before
    (source / "a").write_text("b")
    publish(source, target, ["a"])
    assert (target / "a").read_text() == "b"
