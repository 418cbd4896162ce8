"""Label files in every form, and the order of a model's classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from calib.labels import read_labels, read_order
from pipeline.errors import DataError

NAMES = ["val/a.JPEG", "val/b.JPEG", "val/c.JPEG"]


def _file(tmp_path: Path, text: str, name: str = "labels.txt") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "b.JPEG dog\na.JPEG great cat\nc.JPEG dog\n",
        "b.JPEG\tdog\na.JPEG\tgreat cat\nc.JPEG\tdog",
        "c.JPEG,dog\nb.JPEG,dog\na.JPEG,great cat\nother.JPEG,emu\n",
        "val/c.JPEG,dog\nval/b.JPEG,dog\nval/a.JPEG,great cat\n",
        "a,great cat\nb,dog\nc,dog\n",
        "ImageId,PredictionString\nc,dog 1 2 3 4 dog 5 6 7 8\nb,dog 1 2 3 4 \na,great 9 9 9 9\n",
        "great cat\ndog\ndog\n\n",
    ],
)
def test_every_form_gives_one_label_per_image(tmp_path: Path, text: str) -> None:
    values = read_labels(_file(tmp_path, text), NAMES).values
    first = "great" if "ImageId" in text else "great cat"
    assert values == (first, "dog", "dog")


@pytest.mark.parametrize("text", ["a 2\nb 0\nc 11\n", "2\n0\n11\n"])
def test_numbers_are_numbers(tmp_path: Path, text: str) -> None:
    assert read_labels(_file(tmp_path, text), NAMES).values == (2, 0, 11)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1 is empty"),
        ("a cat\n\nb dog\n", "line 2 is empty"),
        ("a cat\nb dog\n", r"1 of 3 images have no label, as val/c\.JPEG"),
        ("cat\ndog\n", "2 lines for 3 images"),
        ("x cat\na dog\nb dog\nc dog\n", "4 lines for 3 images, and the first begins with no"),
        ("a cat\na dog\nb dog\nc dog\n", "a has the labels cat and dog"),
        ("a,cat\nb,\nc,dog\n", "entry 2 has no label"),
        ("ImageId,PredictionString\na,\n", "entry 1 has no label"),
        ("ImageId,PredictionString\na\n", "entry 1 has no label"),
        (f"a {'x' * 200_000},y\n", "cannot be read"),
        ("ImageId,PredictionString\n", "3 of 3 images have no label"),
    ],
)
def test_what_does_not_label_every_image_once_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_labels(_file(tmp_path, text), NAMES)


def test_a_name_that_several_images_share_is_refused(tmp_path: Path) -> None:
    names = ["1/a.png", "2/a.png"]
    with pytest.raises(DataError, match=r"a\.png stands for several images"):
        read_labels(_file(tmp_path, "a.png cat\n"), names)
    path = _file(tmp_path, "1/a.png cat\n2/a.png dog\n")
    assert read_labels(path, names).values == ("cat", "dog")


def test_what_is_no_text_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_bytes(b"\xff\xff")
    with pytest.raises(DataError, match=r"l\.txt cannot be read"):
        read_labels(tmp_path / "l.txt", NAMES)
    with pytest.raises(DataError, match="cannot be read"):
        read_labels(tmp_path / "absent.txt", NAMES)
    with pytest.raises(DataError, match="cannot be read"):
        read_labels(tmp_path, NAMES)


TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def _meta(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O")]
    rows = [(1, "n02119789"), (2, "n02100735"), (490, "n01440764"), (1001, "n00001740")]
    savemat(path, {"synsets": np.array(rows, kinds)[:, None]})


@pytest.mark.parametrize("place", ["meta.mat", "data/meta.mat"])
def test_the_devkits_numbers_become_wnids(tmp_path: Path, place: str) -> None:
    path = _file(tmp_path, "490\n2\n1\n", TRUTH)
    with pytest.raises(DataError, match="the devkit's own order, which is no model's"):
        read_labels(path, NAMES)
    _meta(tmp_path / place)
    assert read_labels(path, NAMES).values == ("n01440764", "n02100735", "n02119789")


def test_the_devkits_numbers_must_be_classes(tmp_path: Path) -> None:
    _meta(tmp_path / "meta.mat")
    with pytest.raises(DataError, match="line 2 is '1001', not a number in"):
        read_labels(_file(tmp_path, "1\n1001\n2\n", TRUTH), NAMES)
    with pytest.raises(DataError, match="2 lines for 3 images"):
        read_labels(_file(tmp_path, "1\n2\n", TRUTH), NAMES)
    (tmp_path / "meta.mat").write_bytes(b"not a mat file")
    with pytest.raises(DataError, match=r"meta\.mat cannot be read"):
        read_labels(_file(tmp_path, "1\n2\n1\n", TRUTH), NAMES)


def test_an_order_is_sorted_or_a_file(tmp_path: Path) -> None:
    assert read_order("sorted", ("a", "b")) == ("a", "b")
    path = _file(tmp_path, "great cat\ndog\n\n")
    assert read_order(str(path), ("dog",)) == ("great cat", "dog")
    with pytest.raises(DataError, match="names 'dog' more than once"):
        read_order(str(_file(tmp_path, "dog\ncat\ndog\n")), ())
    with pytest.raises(DataError, match="is empty"):
        read_order(str(_file(tmp_path, "\n")), ())
    with pytest.raises(DataError, match="cannot be read"):
        read_order(str(tmp_path / "absent"), ())
