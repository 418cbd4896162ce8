"""A .csv that lists images and their labels.

In: the file, with columns path and label. Out: its images, read below the folder it lies in.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

from calib.sources.base import Labels, cannot_read, check_count, from_texts
from calib.sources.folder import LEADS_OUT, read_below
from pipeline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

COLUMNS = ("path", "label")


class Listing:
    """The images that a .csv lists.

    Args:
        path: The file. Its first line is a header where it names the columns path and label and
            no such file exists; otherwise the first column is the path, the second the label.

    Raises:
        DataError: It is not such a table, or a path is absent or leads out of its folder.
    """

    sequential = False
    own_labels = True
    skipped: tuple[str, ...] = ()

    def __init__(self, path: Path) -> None:
        self.label = str(path)
        self.folder = path.parent
        self._labels: dict[str, str] = {}
        self._root = self.folder.resolve()
        for number, (name, label) in enumerate(self._rows(path), 1):
            check_count(self.label, number)
            plain = self._checked(name, number)
            if self._labels.setdefault(plain, label) != label:
                raise DataError(
                    f"{path}: {plain} has the labels {self._labels[plain]} and {label}",
                    allowed="one label per image",
                    do="Correct the file",
                )

    def names(self) -> list[str]:
        """Return the listed paths, sorted."""
        return sorted(self._labels)

    def labels(self, names: Sequence[str], depth: int) -> Labels:
        """Return the label column: numbers where every label in the file is one."""
        values = dict(zip(self._labels, from_texts(list(self._labels.values())), strict=True))
        return Labels(values=tuple(values[name] for name in names))

    def read(self, name: str) -> bytes:
        """Return one image file's bytes.

        Raises:
            DataError: As `read_below`.
        """
        return read_below(self.folder, name)

    def _rows(self, path: Path) -> list[tuple[str, str]]:
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = [[cell.strip() for cell in row] for row in csv.reader(file) if row]
        except (OSError, ValueError, csv.Error) as error:
            raise cannot_read(self.label, error) from error
        at = {name: i for i, name in enumerate(COLUMNS)}
        header = [cell.lower() for cell in rows[0]] if rows else []
        if set(COLUMNS) <= set(header) and not os.path.isfile(self.folder / rows[0][0]):  # noqa: PTH113 - takes any text for a name
            at = {name: header.index(name) for name in COLUMNS}
            rows = rows[1:]
        for number, row in enumerate(rows, 1):
            if len(row) <= max(at.values()) or not row[at["path"]] or not row[at["label"]]:
                raise DataError(
                    f"{path}: row {number} is {','.join(row)[:80]!r}",
                    allowed="a path and a label in every row",
                    do="Correct the file",
                )
        return [(row[at["path"]], row[at["label"]]) for row in rows]

    def _checked(self, name: str, number: int) -> str:
        def refused(why: str) -> DataError:
            return DataError(
                f"{self.label}: row {number} names {name!r}: {why}",
                allowed="paths of image files below the .csv's own folder, relative to it",
                do="Correct the row, or move the .csv beside the images",
            )

        parts = PurePosixPath(name).parts
        if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or "\\" in name:
            raise refused("not a relative path with forward slashes")
        if ".." in parts:
            raise refused("it leads out of the folder")
        plain = "/".join(parts)
        try:
            resolved = (self.folder / plain).resolve()
            exists = resolved.is_file()
        except (OSError, ValueError) as error:
            raise refused(str(error)) from error
        if not exists:
            raise refused("no such file")
        if not resolved.is_relative_to(self._root):
            raise refused(LEADS_OUT)
        return plain
