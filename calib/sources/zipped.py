"""A zip of images.

In: a path. Out: its images by name in the archive, decompressed one at a time in memory.
"""

from __future__ import annotations

import lzma
import os
import stat
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

from calib.sources.base import (
    Labels,
    Unreadable,
    cannot_read,
    check_count,
    check_size,
    class_folders,
    entry_name,
    is_image,
    read_capped,
)
from pipeline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

ENCRYPTED = 0x1
# What damage in a member leads to; RuntimeError covers NotImplementedError (a rare compression).
DAMAGED = (EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)


class Zip:
    """The images in a zip file.

    Args:
        path: The file.

    Raises:
        DataError: It is damaged, or an entry's name, kind, size or encryption is refused.
    """

    sequential = False
    own_labels = False
    skipped: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self.path = path
        self.label = str(path)
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        infos = self._file().infolist()
        check_count(self.label, len(infos))
        # Where a name stands twice, the later entry counts, as it does when one unpacks.
        self._members: dict[str, str] = {}
        tops = set()
        for info in infos:
            name = entry_name(info.filename, self.label)
            is_folder = info.filename.endswith("/")
            if is_folder or "/" in name:
                tops.add(name.split("/")[0])
            if is_folder:
                continue
            self._check_kind(info)
            self._members[name] = info.filename
        self._wrapped = len(tops - {"__MACOSX"}) == 1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def names(self) -> list[str]:
        """Return the names of all images, sorted."""
        return sorted(name for name in self._members if is_image(name))

    def labels(self, names: Sequence[str], depth: int) -> Labels:
        """Return each image's folder as its class."""
        return class_folders(names, depth, self.label, wrapped=self._wrapped)

    def read(self, name: str) -> bytes:
        """Return one image file's bytes.

        Raises:
            Unreadable: The member is damaged.
            DataError: It is too large, or the archive vanished.
        """
        file = self._file()
        try:
            info = file.getinfo(self._members[name])
        except KeyError as error:
            raise cannot_read(f"{self.label}:{name}", error) from error
        check_size(name, info.file_size)
        try:
            with file.open(info) as stream:
                return read_capped(stream, name)
        except DAMAGED as error:
            raise Unreadable(
                f"{self.label}:{name} cannot be read ({error})",
                allowed="whole members",
                do="Pack the archive again",
            ) from error
        except OSError as error:
            raise cannot_read(f"{self.label}:{name}", error) from error

    def _file(self) -> zipfile.ZipFile:
        # A file's position is shared with the process it was inherited from: each opens its own.
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = os.getpid(), zipfile.ZipFile(self.path)
            except (*DAMAGED, OSError) as error:
                raise cannot_read(self.label, error) from error
        return self._opened[1]

    def _check_kind(self, info: zipfile.ZipInfo) -> None:
        mode = info.external_attr >> 16
        what = None
        if info.flag_bits & ENCRYPTED:
            what = "is encrypted"
        elif stat.S_IFMT(mode) and not stat.S_ISREG(mode):
            what = "is a link or a device"
        if what:
            raise DataError(
                f"{self.label}: the entry {info.filename} {what}",
                allowed="plain files without a password",
                do="Pack the archive again",
            )
