"""Tars of class folders, WebDataset samples and shards, and hostile entries."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from calib.images import ImageSet, open_images
from calib.sources import base
from pipeline.errors import DataError


def _png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def _tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def _labels(found: ImageSet) -> list[int | None]:
    return [entry.label for entry in found.entries]


def _names(found: ImageSet) -> list[str]:
    return [entry.name for entry in found.entries]


def test_class_folders_and_splits_are_those_of_a_folder(tmp_path: Path) -> None:
    files = {"./train/cat/1.png": _png(1), "./val/cat/2.png": _png(2), "./val/dog/3.png": _png(3)}
    path = _tar(tmp_path / "a.tar", files)
    found = open_images(str(path), "evaluation")
    assert _names(found) == ["val/cat/2.png", "val/dog/3.png"]
    assert (found.classes, _labels(found)) == (("cat", "dog"), [0, 1])
    assert [found.read(e) for e in found.entries] == [_png(2), _png(3)]
    again: ImageSet = pickle.loads(pickle.dumps(found))  # noqa: S301 - its own
    assert again.hashes() == found.hashes()


def test_long_names_are_read(tmp_path: Path) -> None:
    name = f"cat/{'x' * 200}.png"
    found = open_images(str(_tar(tmp_path / "a.tar", {name: _png(7)})), "evaluation")
    assert _names(found) == [name]
    assert found.read(found.entries[0]) == _png(7)


@pytest.mark.parametrize(
    ("ending", "labels", "classes", "numbered"),
    [
        ("cls", [b"2", b"0\n"], ("0", "1", "2"), True),
        ("json", [b'{"label": 2}', b'{"label": 0, "x": 1}'], ("0", "1", "2"), True),
        ("json", [b'{"label": "ox"}', b'{"label": "emu"}'], ("emu", "ox"), False),
        ("txt", [b"great ox", b"emu\n"], ("emu", "great ox"), False),
        ("txt", [b"2", b"0"], ("0", "2"), False),
    ],
)
def test_samples_have_their_label_beside_them(
    tmp_path: Path, ending: str, labels: list[bytes], classes: tuple[str, ...], *, numbered: bool
) -> None:
    files: dict[str, bytes] = {}
    for i, label in enumerate(labels):
        files |= {f"s{i}.jpg": _png(i), f"s{i}.{ending}": label, f"s{i}.seg.png": _png(9)}
    found = open_images(str(_tar(tmp_path / "a.tar", files)), "evaluation")
    assert _names(found) == ["s0.jpg", "s1.jpg"]
    assert (found.classes, found.numbered) == (classes, numbered)
    assert _labels(found) == [len(classes) - 1, 0]
    assert found.skipped == tuple(f"s{i}.seg.png (a further image of its sample)" for i in range(2))


@pytest.mark.parametrize("caption", [b"a dog\non a mat", b"word " * 100])
def test_captions_are_no_class_names(tmp_path: Path, caption: bytes) -> None:
    path = _tar(tmp_path / "a.tar", {"1.jpg": _png(), "1.txt": caption})
    assert open_images(str(path), "calibration").classes is None


def test_folders_are_classes_though_texts_lie_in_them(tmp_path: Path) -> None:
    files = {"cat/1.png": _png(), "cat/1.txt": b"0 0.5 0.5 1 1", "dog/2.png": _png()}
    assert open_images(str(_tar(tmp_path / "a.tar", files)), "evaluation").classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"1.jpg": b"", "1.cls": b"0", "2.jpg": b""}, r"1 samples have no label, as 2\.jpg"),
        ({"1.jpg": b"", "1.cls": b"cat"}, r"the \.cls of 1\.jpg holds 'cat'"),
        ({"1.jpg": b"", "1.cls": b"-1"}, r"the \.cls of 1\.jpg holds '-1'"),
        ({"1.jpg": b"", "1.cls": "٣".encode()}, r"the \.cls of 1\.jpg holds"),
        ({"1.jpg": b"", "1.json": b"{"}, r"the \.json of 1\.jpg holds 'JSONDecodeError'"),
        ({"1.jpg": b"", "1.json": b"[" * 100_000}, r"the \.json of 1\.jpg holds"),
        ({"1.jpg": b"", "1.json": b'{"label": [1]}'}, r"the \.json of 1\.jpg holds"),
        (
            {"1.jpg": b"", "1.json": b'{"label": 1}', "2.jpg": b"", "2.json": b'{"label": "a"}'},
            "some labels are numbers",
        ),
    ],
)
def test_labels_that_cannot_be_are_refused(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    path = _tar(tmp_path / "a.tar", files)
    with pytest.raises(DataError, match=message):
        open_images(str(path), "evaluation")


def test_a_label_file_beside_labelled_samples_is_refused(tmp_path: Path) -> None:
    path = _tar(tmp_path / "a.tar", {"1.jpg": _png(), "1.cls": b"0"})
    (tmp_path / "l.txt").write_text("1.jpg 0\n")
    with pytest.raises(DataError, match="has labels of its own"):
        open_images(str(path), "evaluation", str(tmp_path / "l.txt"))


def _shards(folder: Path) -> None:
    for split, first in (("train", 0), ("val", 4)):
        for shard in range(2):
            value = first + shard
            files = {f"{value}.jpg": _png(value), f"{value}.cls": str(value).encode()}
            _tar(folder / f"{split}-{shard:03d}.tar", files)


def test_shards_are_one_source(tmp_path: Path) -> None:
    _shards(tmp_path)
    for where in (str(tmp_path), f"{tmp_path}/val-{{000..001}}.tar"):
        found = open_images(where, "evaluation")
        assert _labels(found) == [4, 5]
        assert [found.read(e) for e in found.entries] == [_png(4), _png(5)]
    assert _labels(open_images(str(tmp_path), "calibration")) == [0, 1]


def test_shards_of_class_folders_keep_their_classes(tmp_path: Path) -> None:
    _tar(tmp_path / "0.tar", {"cat/1.png": _png(1), "dog/1.png": _png(2)})
    _tar(tmp_path / "1.tar", {"cat/2.png": _png(3)})
    found = open_images(str(tmp_path), "evaluation")
    assert (found.classes, _labels(found)) == (("cat", "dog"), [0, 1, 0])
    flat = tmp_path / "flat"
    for i in range(2):
        _tar(flat / f"{i}.tar", {f"{i}.png": _png(i)})
    assert open_images(str(flat), "evaluation").classes is None


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("val-{000..002}.tar", r"1 of 3 files are absent, as .*val-002\.tar"),
        ("val-{001..000}.tar", "stands for 0 files"),
        ("val-{0..999999}.tar", "stands for 1000000 files"),
        ("{train,val}-000.tar", "no such folder or file"),
    ],
)
def test_patterns_that_cannot_be_are_refused(tmp_path: Path, pattern: str, message: str) -> None:
    _shards(tmp_path)
    with pytest.raises(DataError, match=message):
        open_images(f"{tmp_path}/{pattern}", "evaluation")


def test_two_ranges_multiply(tmp_path: Path) -> None:
    for a in range(2):
        for b in range(8, 11):
            _tar(tmp_path / f"{a}-{b:02d}.tar", {f"{a}{b}.jpg": _png(b), f"{a}{b}.cls": b"1"})
    found = open_images(f"{tmp_path}/{{0..1}}-{{08..10}}.tar", "evaluation")
    assert len(found.entries) == 6


@pytest.mark.parametrize(
    ("mode", "tool"), [("w:gz", "gunzip"), ("w:bz2", "bunzip2"), ("w:xz", "unxz")]
)
def test_compressed_tars_are_refused_with_the_way_out(tmp_path: Path, mode: str, tool: str) -> None:
    path = _tar(tmp_path / f"a.tar.{mode[2:]}", {"cat/1.png": _png()}, mode)
    with pytest.raises(DataError, match=f"{tool} a.tar"):
        open_images(str(path), "evaluation")


@pytest.mark.parametrize(
    "name", ["/abs/1.png", "../1.png", "a/../../1.png", "C:/1.png", "a\\1.png"]
)
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    path = _tar(tmp_path / "a.tar", {"cat/1.png": _png(), name: _png()})
    with pytest.raises(DataError, match="has an entry named") as caught:
        open_images(str(path), "evaluation")
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE],
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("cat/1.png")
        info.type = kind
        info.linkname = "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(DataError, match=r"the entry cat/1\.png is a link, a device"):
        open_images(str(path), "evaluation")


def test_damage_in_the_middle_is_not_the_end(tmp_path: Path) -> None:
    path = _tar(tmp_path / "a.tar", {f"cat/{i}.png": _png(i) for i in range(4)})
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        second = archive.getmembers()[1].offset
    content = bytearray(whole)
    content[second : second + 512] = b"\xff" * 512
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=f"damaged at byte {second}"):
        open_images(str(path), "evaluation")
    path.write_bytes(whole[: second + 600])
    with pytest.raises(DataError, match=r"a\.tar cannot be read"):
        open_images(str(path), "evaluation")
    path.write_bytes(whole[:300])
    with pytest.raises(DataError, match=r"a\.tar cannot be read"):
        open_images(str(path), "evaluation")


def test_limits_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _tar(tmp_path / "a.tar", {f"cat/{i}.png": _png(i) for i in range(3)})
    found = open_images(str(path), "evaluation")
    monkeypatch.setattr(base, "MAX_FILE_BYTES", 10)
    with pytest.raises(DataError, match=r"cat/0\.png is \d+ bytes"):
        found.read(found.entries[0])
    monkeypatch.setattr(base, "MAX_ENTRIES", 2)
    with pytest.raises(DataError, match="more than 2 files"):
        open_images(str(path), "evaluation")


def test_a_bomb_of_zeros_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("cat/1.png")
    info.size = base.MAX_FILE_BYTES + 1
    with path.open("wb") as file:
        file.write(info.tobuf())
        # The disk holds none of them.
        file.truncate(512 + info.size + 1024)
    found = open_images(str(path), "evaluation")
    with pytest.raises(DataError, match=f"is {info.size} bytes"):
        found.read(found.entries[0])


def test_json_without_a_label_is_no_label(tmp_path: Path) -> None:
    files = {"1.jpg": _png(), "1.json": json.dumps({"caption": "x"}).encode()}
    assert open_images(str(_tar(tmp_path / "a.tar", files)), "calibration").classes is None


def test_a_tar_that_was_cut_since_is_a_data_error(tmp_path: Path) -> None:
    path = _tar(tmp_path / "a.tar", {"1.png": _png()})
    found = open_images(str(path), "calibration")
    path.write_bytes(path.read_bytes()[:520])
    with pytest.raises(DataError, match=r"1\.png cannot be read \(the file ends in it\)"):
        found.read(found.entries[0])
