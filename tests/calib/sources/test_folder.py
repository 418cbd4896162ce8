"""What lies in a folder, and what links in it lead to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from calib.images import open_images
from calib.sources import base
from pipeline.errors import DataError


def _image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2)).save(path)
    return path


def test_links_out_of_the_folder_are_named_and_not_followed(tmp_path: Path) -> None:
    outside = _image(tmp_path / "outside" / "secret.png")
    root = tmp_path / "data"
    inside = _image(root / "cat" / "1.png")
    (root / "cat" / "2.png").symlink_to(outside)
    (root / "cat" / "3.png").symlink_to(inside)
    (root / "dog").symlink_to(outside.parent)
    (root / "again").symlink_to(root)
    (root / "circle.png").symlink_to(root / "circle.png")
    (root / "gone.png").symlink_to(root / "absent.png")
    found = open_images(str(root), "evaluation")
    assert [e.name for e in found.entries] == ["cat/1.png", "cat/3.png"]
    assert found.skipped == (
        "again (a link to a folder)",
        "cat/2.png (a link out of the folder)",
        "circle.png (a link to nothing)",
        "dog (a link out of the folder)",
        "gone.png (a link to nothing)",
    )
    assert found.sample(1, 0).skipped == found.skipped


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    _image(tmp_path / "data" / "1.png")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    found = open_images(str(tmp_path / "link"), "evaluation")
    assert [e.name for e in found.entries] == ["1.png"]
    assert found.skipped == ()


def test_a_folder_of_links_out_says_why_it_is_empty(tmp_path: Path) -> None:
    outside = _image(tmp_path / "outside" / "1.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "1.png").symlink_to(outside)
    with pytest.raises(DataError, match=r"no images .* but 1\.png \(a link out of the folder\)"):
        open_images(str(tmp_path / "data"), "evaluation")


def test_what_an_operating_system_leaves_behind_is_no_image(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/._1.png", "__MACOSX/cat/1.png"):
        _image(tmp_path / name)
    found = open_images(str(tmp_path), "evaluation")
    assert [e.name for e in found.entries] == ["cat/1.png"]


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abc":
        _image(tmp_path / f"{name}.png")
    monkeypatch.setattr(base, "MAX_ENTRIES", 2)
    with pytest.raises(DataError, match="more than 2 files"):
        open_images(str(tmp_path), "calibration")


def test_a_name_that_is_not_utf_8_is_left_out_and_shown(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "good.png")
    odd = os.fsencode(tmp_path) + b"/bad\xff.png"
    Path(os.fsdecode(odd)).write_bytes(b"")
    found = open_images(str(tmp_path), "calibration")
    assert [entry.name for entry in found.entries] == ["good.png"]
    (skipped,) = found.skipped
    assert skipped.encode()
    assert "not UTF-8" in skipped
