"""A folder of images.

In: a path. Out: its images by relative name, with each image's folder as its class. Links that lead
out of the folder are not followed; they are named in `skipped`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from calib.sources.base import (
    Labels,
    cannot_read,
    check_count,
    check_size,
    class_folders,
    is_image,
    read_capped,
)
from pipeline.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NOT_UTF8 = "its name is not UTF-8"
LEADS_OUT = "a link out of the folder"
LEADS_NOWHERE = "a link to nothing"
TO_FOLDER = "a link to a folder"


class Folder:
    """The images below a path.

    Args:
        path: The folder, which may itself be a link.

    Raises:
        DataError: It cannot be listed, or holds too many files.
    """

    sequential = False
    own_labels = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.label = str(path)
        self._root = path.resolve()
        skipped: list[str] = []
        try:
            self.files = sorted(self._files(skipped))
        except OSError as error:
            raise cannot_read(self.label, error) from error
        self.skipped = tuple(sorted(skipped))

    def names(self) -> list[str]:
        """Return the relative POSIX names of all images, sorted."""
        return [name for name in self.files if is_image(name)]

    def labels(self, names: Sequence[str], depth: int) -> Labels:
        """Return each image's folder as its class."""
        return class_folders(names, depth, self.label)

    def read(self, name: str) -> bytes:
        """Return one image file's bytes.

        Raises:
            DataError: It vanished, may not be read, or is too large.
        """
        return read_below(self.path, name)

    def _files(self, skipped: list[str]) -> Iterator[str]:
        pending, count = [""], 0
        while pending:
            below = pending.pop()
            with os.scandir(self.path / below) as entries:
                for entry in entries:
                    name = f"{below}/{entry.name}" if below else entry.name
                    if os.fsencode(name) != name.encode(errors="replace"):
                        # Neither a report nor an archive can hold such a name.
                        skipped.append(f"{printable(name)} ({NOT_UTF8})")
                        continue
                    if entry.is_symlink():
                        reason = self._refused_link(entry)
                        if reason:
                            skipped.append(f"{name} ({reason})")
                            continue
                    elif entry.is_dir():
                        pending.append(name)
                        continue
                    if entry.is_file():
                        count += 1
                        check_count(self.label, count)
                        yield name

    def _refused_link(self, entry: os.DirEntry[str]) -> str | None:
        try:
            target = Path(entry.path).resolve(strict=True)
        except (OSError, RuntimeError):
            # Absent, or a circle of links.
            return LEADS_NOWHERE
        if not target.is_relative_to(self._root):
            return LEADS_OUT
        # A link to a folder within would count its images twice, or without end.
        return TO_FOLDER if target.is_dir() else None


def read_below(folder: Path, name: str) -> bytes:
    """Return the bytes of one image file.

    Raises:
        DataError: It vanished, may not be read, or is too large.
    """
    try:
        with (folder / name).open("rb") as file:
            check_size(name, os.fstat(file.fileno()).st_size)
            return read_capped(file, name)
    except OSError as error:
        raise cannot_read(f"{folder}/{name}", error) from error
