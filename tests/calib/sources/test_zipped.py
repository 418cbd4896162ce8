"""A zip's entries: plain, hostile, encrypted, larger than they say."""

from __future__ import annotations

import io
import os
import pickle
import stat
import struct
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from calib.images import ImageSet, open_images
from calib.sources import base
from calib.sources.base import Unreadable
from calib.sources.zipped import Zip
from pipeline.errors import DataError


def _png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def _zip(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for i, name in enumerate(names):
            # A name given as text is cleaned of what an attacker would write.
            info = zipfile.ZipInfo("x")
            info.filename = name
            archive.writestr(info, _png(i))
    return path


def _open(path: Path) -> ImageSet:
    return open_images(str(path), "evaluation")


@pytest.mark.parametrize(
    "name", ["/etc/1.png", "a/../../1.png", "C:/1.png", "C:1.png", "a\\1.png", "../x.txt"]
)
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    path = _zip(tmp_path / "a.zip", "cat/1.png", name)
    with pytest.raises(DataError, match="has an entry named") as caught:
        _open(path)
    assert repr(name) in str(caught.value)


def test_one_top_folder_around_images_is_no_class(tmp_path: Path) -> None:
    found = _open(
        _zip(tmp_path / "a.zip", "photos/1.png", "photos/2.png", "__MACOSX/._x", "README")
    )
    assert found.classes is None
    found = _open(_zip(tmp_path / "b.zip", "photos/cat/1.png"))
    assert found.classes == ("cat",)
    found = _open(_zip(tmp_path / "c.zip", "cat/1.png", "dog/"))
    assert found.classes == ("cat",)


def test_an_encrypted_entry_is_refused(tmp_path: Path) -> None:
    path = _zip(tmp_path / "a.zip", "cat/1.png")
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 8] |= 1
    content[6] |= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"cat/1\.png is encrypted"):
        _open(path)


def test_a_link_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("cat/1.png")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match=r"cat/1\.png is a link or a device"):
        _open(path)


def test_a_bomb_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", bytes(2**20))
    assert path.stat().st_size < 2000
    monkeypatch.setattr(base, "MAX_FILE_BYTES", 2**16)
    found = _open(path)
    with pytest.raises(DataError, match=r"1\.png is 1048576 bytes"):
        found.read(found.entries[0])
    # The header may lie: no more is unpacked than it says, and then the checksum is wrong.
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 24 : at + 28] = struct.pack("<I", 100)
    path.write_bytes(bytes(content))
    found = _open(path)
    with pytest.raises(DataError, match="Bad CRC"):
        found.read(found.entries[0])


def test_too_many_entries_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _zip(tmp_path / "a.zip", "1.png", "2.png", "3.png")
    monkeypatch.setattr(base, "MAX_ENTRIES", 2)
    with pytest.raises(DataError, match="more than 2 files"):
        _open(path)


def test_a_file_that_is_cut_is_a_data_error(tmp_path: Path) -> None:
    path = _zip(tmp_path / "a.zip", "1.png")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"a\.zip"):
        _open(path)


def test_it_pickles_and_opens_its_file_anew(tmp_path: Path) -> None:
    found = _open(_zip(tmp_path / "a.zip", "cat/1.png", "dog/2.png"))
    assert [found.read(e) for e in found.entries] == [_png(0), _png(1)]
    again: ImageSet = pickle.loads(pickle.dumps(found))  # noqa: S301 - its own
    assert again.entries == found.entries
    assert [again.read(e) for e in again.entries] == [_png(0), _png(1)]


def test_a_process_that_inherits_it_opens_its_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _open(_zip(tmp_path / "a.zip", "cat/1.png", "dog/2.png"))
    assert isinstance(found.source, Zip)
    before = found.source._file()
    assert found.source._file() is before
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert found.source._file() is not before
    assert found.read(found.entries[1]) == _png(1)


def test_a_stream_is_read_no_further_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MAX_FILE_BYTES", 100)
    assert base.read_capped(io.BytesIO(bytes(100)), "x") == bytes(100)
    endless = io.BytesIO(bytes(10_000))
    with pytest.raises(DataError, match="x is 101 bytes or more"):
        base.read_capped(endless, "x")
    assert endless.tell() == 101


def test_a_damaged_lzma_member_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("1.png", os.urandom(4096))
    content = bytearray(path.read_bytes())
    content[60:120] = bytes(60)
    path.write_bytes(bytes(content))
    found = _open(path)
    with pytest.raises(Unreadable, match=r"1\.png cannot be read"):
        found.read(found.entries[0])


def test_an_entry_without_a_name_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", b"")
    path.write_bytes(path.read_bytes().replace(b"\x01\x00\x00\x00x", b"\x00\x00\x00\x00x"))
    with pytest.raises(DataError):
        _open(path)
