"""Hugging Face's parquet: labels by number and name, splits, lazy rows, damage."""

from __future__ import annotations

import builtins
import importlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from calib.images import ImageSet, open_images
from calib.sources import base, parquet
from calib.sources.base import Unreadable
from pipeline.errors import DataError

# It ships no types.
pa: Any = importlib.import_module("pyarrow")
pq: Any = importlib.import_module("pyarrow.parquet")
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def _write(
    path: Path,
    labels: list[Any] | None,
    *,
    names: list[str] | None = None,
    group: int = 5,
    images: Any = None,
    first: int = 0,
) -> Path:
    count = len(labels) if labels is not None else 4
    if images is None:
        rows = [{"bytes": _png(first + i), "path": f"{i}.png"} for i in range(count)]
        images = pa.array(rows, STRUCT)
    columns = {"image": images} | ({"label": pa.array(labels)} if labels is not None else {})
    table = pa.table(columns)
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        stated = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": stated})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)
    return path


def _labels(found: ImageSet) -> list[int | None]:
    return [entry.label for entry in found.entries]


def test_numbers_with_names_are_names(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.parquet", [1, 0, 1], names=["ox", "emu", "yak"])
    found = open_images(str(path), "evaluation")
    assert (found.classes, found.numbered) == (("emu", "ox", "yak"), False)
    assert _labels(found) == [0, 1, 0]
    assert _labels(found.for_model(["yak", "ox", "emu"], 3)) == [2, 1, 2]


def test_numbers_without_names_index_the_logits(tmp_path: Path) -> None:
    found = open_images(str(_write(tmp_path / "a.parquet", [2, 0, 2])), "evaluation")
    assert found.numbered
    assert _labels(found.for_model(["a", "b", "c"], 3)) == [2, 0, 2]


@pytest.mark.parametrize(
    ("labels", "classes"), [(["b", "a"], ("a", "b")), (["7", "3"], ("3", "7"))]
)
def test_strings_are_names(tmp_path: Path, labels: list[str], classes: tuple[str, ...]) -> None:
    found = open_images(str(_write(tmp_path / "a.parquet", labels)), "evaluation")
    assert (found.classes, found.numbered, _labels(found)) == (classes, False, [1, 0])


@pytest.mark.parametrize("labels", [None, [-1, -1], [None, None]])
def test_labels_that_are_withheld_are_none(tmp_path: Path, labels: list[int | None] | None) -> None:
    path = _write(tmp_path / "a.parquet", labels and pa.array(labels, pa.int64()))
    assert open_images(str(path), "calibration").classes is None


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), STRUCT])
def test_images_are_read_from_any_column_of_bytes(tmp_path: Path, kind: Any) -> None:
    data = [_png(i) for i in range(3)]
    rows: list[Any] = [{"bytes": d, "path": None} for d in data] if kind == STRUCT else list(data)
    path = _write(tmp_path / "a.parquet", [0, 1, 2], images=pa.array(rows, kind))
    found = open_images(str(path), "evaluation")
    assert [found.read(e) for e in found.entries] == data


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("train/0000.parquet", "validation/0000.parquet"),
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("train.parquet", "val.parquet"),
    ],
)
def test_splits_are_files_or_folders(tmp_path: Path, train: str, val: str) -> None:
    _write(tmp_path / train, [0, 1], first=10)
    _write(tmp_path / val, [1, 0, 1], first=20)
    found = open_images(str(tmp_path), "evaluation")
    assert _labels(found) == [1, 0, 1]
    assert [found.read(e) for e in found.entries] == [_png(20), _png(21), _png(22)]
    assert _labels(open_images(str(tmp_path), "calibration")) == [0, 1]


def test_rows_are_read_in_any_order_and_process(tmp_path: Path) -> None:
    count = 53
    path = _write(tmp_path / "a.parquet", list(range(count)), group=20)
    found = open_images(str(path), "evaluation")
    order = [*range(count), 41, 3, 40, 0, 52, 19, 20, 17, 16, 15]
    for i in order:
        assert found.read(found.entries[i]) == _png(i)
    again: ImageSet = pickle.loads(pickle.dumps(found))  # noqa: S301 - its own
    assert again.read(again.entries[30]) == _png(30)


def test_a_sample_keeps_the_order_of_rows(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.parquet", list(range(40)))
    found = open_images(str(path), "evaluation")
    drawn = found.sample(10, 3)
    names = [entry.name for entry in drawn.entries]
    assert names == sorted(names)
    assert drawn.entries == found.sample(10, 3).entries != found.sample(10, 4).entries


def test_reading_on_decodes_each_row_once_and_labels_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path / "a.parquet", list(range(100)), group=50)
    started: list[int] = []
    held: list[int] = []
    original = parquet._Position

    class Watched(original):  # type: ignore[misc, valid-type]
        def __init__(self, name: str, path: Path, group: int) -> None:
            started.append(group)
            super().__init__(name, path, group)

        def at(self, row: int) -> object:
            value = super().at(row)
            held.append(len(self.rows))
            return value

    monkeypatch.setattr(parquet, "_Position", Watched)
    found = open_images(str(path), "evaluation")
    assert started == []
    assert len(set(found.hashes())) == 100
    assert started == [0, 1]
    assert max(held) == parquet.ROWS_AT_ONCE


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, None], r"1 rows have no label, as a\.parquet/000000001"),
        ([0.5, 1.0], "holds floats"),
        ([True, False], "holds bools"),
        ([-2, 0], "labels from -2 to 0"),
        ([2**40, 0], "labels from 0 to 1099511627776"),
    ],
)
def test_labels_that_cannot_be_are_refused(tmp_path: Path, labels: list[Any], message: str) -> None:
    path = _write(tmp_path / "a.parquet", labels)
    with pytest.raises(DataError, match=message):
        open_images(str(path), "evaluation")


def test_class_names_that_cannot_be_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.parquet", [0, 2], names=["ox", "emu"])
    with pytest.raises(DataError, match="labels from 0 to 2"):
        open_images(str(path), "evaluation")
    _write(path, [0, 1], names=["ox", "ox"])
    with pytest.raises(DataError, match="declares 2 class names, 1 of them different"):
        open_images(str(path), "evaluation")
    _write(tmp_path / "b.parquet", [0, 1], names=["ox", "emu"])
    with pytest.raises(DataError, match="do not declare the same class names"):
        open_images(str(tmp_path), "evaluation")


def test_a_row_without_an_image_is_unreadable(tmp_path: Path) -> None:
    rows = pa.array(
        [{"bytes": None, "path": "/etc/passwd"}, {"bytes": _png(1), "path": None}], STRUCT
    )
    found = open_images(str(_write(tmp_path / "a.parquet", [0, 1], images=rows)), "evaluation")
    with pytest.raises(Unreadable, match="has no image in it"):
        found.read(found.entries[0])
    assert found.read(found.entries[1]) == _png(1)


def test_other_tables_and_damage_are_data_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x"], "label": [0]}), path)
    with pytest.raises(DataError, match=r"has the columns text, label\. Allowed: a column image"):
        open_images(str(path), "evaluation")
    path.write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        open_images(str(path), "evaluation")
    _write(path, list(range(64)), group=64)
    found = open_images(str(path), "evaluation")
    content = bytearray(path.read_bytes())
    content[4:2000] = b"\xff" * 1996
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        found.hashes()


def test_without_pyarrow_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path / "a.parquet", [0])

    def absent(name: str) -> Any:
        raise builtins.ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(DataError, match=r"pip install convnext-edge\[parquet\]"):
        open_images(str(path), "evaluation")


def test_a_row_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = open_images(str(_write(tmp_path / "a.parquet", [0, 1])), "evaluation")
    monkeypatch.setattr(base, "MAX_FILE_BYTES", 10)
    with pytest.raises(DataError, match=r"a\.parquet/000000000 is \d+ bytes"):
        found.read(found.entries[0])


@pytest.mark.parametrize("rows", [1, 16])
def test_a_bomb_is_refused_before_it_is_unpacked(rows: int, tmp_path: Path) -> None:
    """A few kilobytes that would take a gigabyte: no image compresses so."""
    column = pa.array(
        [{"bytes": bytes(80 * 2**20), "path": f"{i}.png"} for i in range(rows)], STRUCT
    )
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"image": column}), path, compression="zstd")
    assert path.stat().st_size < 2**20
    with pytest.raises(DataError, match="decompress to"):
        open_images(str(path), "calibration")
