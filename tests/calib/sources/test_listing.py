"""A .csv that lists images: header or none, and paths that stay where they belong."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from calib.images import ImageSet, open_images
from pipeline.errors import DataError


def _image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2)).save(path, "PNG")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ("a.png", "b c.png", "sub/c"):
        _image(tmp_path / "data" / name)
    _image(tmp_path / "outside.png")
    return tmp_path / "data"


def _open(place: Path, text: str) -> ImageSet:
    (place / "list.csv").write_bytes(text.encode())
    return open_images(str(place / "list.csv"), "evaluation")


@pytest.mark.parametrize(
    "text",
    [
        'a.png,cat\n"b c.png",dog\n./sub/c,cat\n',
        "path,label\na.png,cat\nb c.png,dog\nsub/c,cat\n",
        "\ufeffPath,Label\r\na.png,cat\r\nb c.png,dog\r\nsub/c,cat\r\n",
        "id,label,path\n1,cat,a.png\n2,dog,b c.png\n3,cat,sub/c\n",
    ],
)
def test_rows_are_images_with_labels(place: Path, text: str) -> None:
    found = _open(place, text)
    assert [(e.name, e.label) for e in found.entries] == [
        ("a.png", 0),
        ("b c.png", 1),
        ("sub/c", 0),
    ]
    assert found.classes == ("cat", "dog")
    assert found.read(found.entries[2]) == (place / "sub" / "c").read_bytes()


def test_numbers_index_the_logits_and_names_do_not(place: Path) -> None:
    found = _open(place, "a.png,5\nsub/c,0\n")
    assert found.numbered
    assert [e.label for e in found.entries] == [5, 0]
    assert not _open(place, "a.png,5\nsub/c,cat\n").numbered
    assert not _open(place, "a.png,05\nsub/c,00\n").numbered


def test_splits_are_folders(place: Path) -> None:
    for name in ("train/1.png", "val/2.png"):
        _image(place / name)
    found = _open(place, "train/1.png,cat\nval/2.png,dog\n")
    assert [e.name for e in found.entries] == ["val/2.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{outside},cat\n", "not a relative path"),
        ("../outside.png,cat\n", "leads out of the folder"),
        ("sub/../../outside.png,cat\n", "leads out of the folder"),
        ("C:/a.png,cat\n", "not a relative path"),
        ("sub\\c,cat\n", "not a relative path"),
        ("link.png,cat\n", "a link out of the folder"),
        ("a.png,cat\nabsent.png,dog\n", "row 2 names 'absent.png': no such file"),
        ("image,class\na.png,cat\n", "row 1 names 'image': no such file"),
        ("a.png\n", "row 1 is 'a.png'"),
        ("a.png,\n", "row 1 is 'a.png,'"),
        ("a.png,cat\na.png,dog\n", "has the labels cat and dog"),
        ("sub,cat\n", "no such file"),
        ("", "holds no images"),
        ("path,label\n", "holds no images"),
        (f"{'x' * 5000},cat\n", "row 1 names"),
        ("a\0.png,cat\n", "row 1 names|cannot be read"),
    ],
)
def test_rows_that_cannot_be_are_refused(place: Path, text: str, message: str) -> None:
    (place / "link.png").symlink_to(place.parent / "outside.png")
    with pytest.raises(DataError, match=message):
        _open(place, text.replace("{outside}", str(place.parent / "outside.png")))


def test_bytes_that_are_no_text_are_a_data_error(place: Path) -> None:
    (place / "list.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"list\.csv cannot be read"):
        open_images(str(place / "list.csv"), "evaluation")


def test_an_image_may_be_called_path(place: Path) -> None:
    _image(place / "path")
    found = _open(place, "path,label\na.png,cat\n")
    assert [(e.name, e.label) for e in found.entries] == [("a.png", 0), ("path", 1)]
    assert found.classes == ("cat", "label")
