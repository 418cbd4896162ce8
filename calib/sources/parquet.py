"""Hugging Face's parquet: rows of an `image` and a `label`.

In: paths of .parquet files. Out: each row as an image, named by its file and row. Labels are read
alone; images stream by a few rows at a time, so nothing grows with the file. Needs pyarrow.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from typing import TYPE_CHECKING, Any

from calib.sources.base import (
    UNLABELLED,
    Labels,
    Unreadable,
    cannot_read,
    check_count,
    check_size,
    under_split,
)
from pipeline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

IMAGES, LABELS = ("image", "img"), ("label", "labels")
"""What data sets on the hub call their columns."""
ROWS_AT_ONCE = 16
BUFFER_BYTES = 2**20
FREE_BYTES = 64 * 2**20
MAX_GROWTH = 8
"""How far a column of images may decompress beyond FREE_BYTES."""
MISSING_LABEL = -1
"""How Hugging Face writes that a test image's label is withheld."""


class Parquet:
    """The rows of parquet files, which together are one source.

    Args:
        paths: The files, each with its relative name.
        label: What a person would call them together.

    Raises:
        DataError: pyarrow is not installed, a file is damaged, or it has no images.
    """

    sequential = True
    own_labels = True
    skipped: tuple[str, ...] = ()

    def __init__(self, paths: Sequence[tuple[Path, str]], label: str) -> None:
        self.label = label
        self.paths = {under_split(name): path for path, name in paths}
        self._position: _Position | None = None
        self._rows: dict[str, list[int]] = {}
        count = 0
        for name, path in self.paths.items():
            with _reading(path) as file:
                self._rows[name] = _group_sizes(file, path)
            count += sum(self._rows[name])
            check_count(label, count)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_position": None}

    def names(self) -> list[str]:
        """Return FILE/ROW of every row, sorted."""
        return [
            f"{name}/{row:09d}"
            for name in sorted(self._rows)
            for row in range(sum(self._rows[name]))
        ]

    def labels(self, names: Sequence[str], depth: int) -> Labels:
        """Return the label column's values, by name where the schema has names.

        Raises:
            DataError: Some rows have a label and others none, or it is neither number nor name.
        """
        wanted: dict[str, list[int]] = {}
        for name in names:
            file, _, row = name.rpartition("/")
            wanted.setdefault(file, []).append(int(row))
        found: dict[str, str | int | None] = {}
        classes: set[tuple[str, ...] | None] = set()
        for name, rows in wanted.items():
            values, declared = self._column(self.paths[name])
            classes.add(declared)
            found.update({f"{name}/{row:09d}": values[row] for row in rows})
        if len(classes) > 1:
            raise DataError(
                f"{self.label}: its files do not declare the same class names",
                allowed="one list of class names",
                do="Give the files of one data set",
            )
        return self._labels([found[name] for name in names], names, next(iter(classes)))

    def read(self, name: str) -> bytes:
        """Return one row's image file.

        Raises:
            Unreadable: The row has no image.
            DataError: It is too large, or the file is damaged.
        """
        file, _, row = name.rpartition("/")
        data = self._image(file, int(row))
        if isinstance(data, dict):
            data = data.get("bytes")
        if not isinstance(data, bytes):
            raise Unreadable(
                f"{self.label}: {name} has no image in it",
                allowed="rows with the image's bytes",
                do="Save the data set again with its images embedded",
            )
        check_size(name, len(data))
        return data

    def _labels(
        self,
        values: Sequence[str | int | None],
        names: Sequence[str],
        declared: tuple[str, ...] | None,
    ) -> Labels:
        present = [value for value in values if value is not None]
        if not present:
            return UNLABELLED
        if len(present) < len(values):
            raise DataError(
                f"{self.label}: {len(values) - len(present)} rows have no label,"
                f" as {names[values.index(None)]}",
                allowed="a label for every row, or for none",
                do="Give a split whose labels are known",
            )
        return Labels(values=tuple(present), names=declared)

    def _column(self, path: Path) -> tuple[list[str | int | None], tuple[str, ...] | None]:
        with _reading(path) as file:
            schema = file.schema_arrow
            column = _first(LABELS, schema)
            if column is None:
                return [None] * file.metadata.num_rows, None
            values = file.read(columns=[column]).column(column).to_pylist()
            declared = _declared(schema, column)
            if len(values) != file.metadata.num_rows:
                raise cannot_read(str(path), EOFError("its labels end early"))
        for value in values:
            if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
                raise DataError(
                    f"{path}: the column {column} holds {type(value).__name__}s",
                    allowed="whole numbers or names",
                    do="Give a data set for classification",
                )
        return [None if value == MISSING_LABEL else value for value in values], declared

    def _image(self, name: str, row: int) -> object:
        group = 0
        for size in self._rows[name]:
            if row < size:
                break
            row -= size
            group += 1
        here = self._position
        if here is None or not here.reaches(name, group, row):
            here = self._position = _Position(name, self.paths[name], group)
        return here.at(row)


class _Position:
    """A place in one row group that moves forward only; ROWS_AT_ONCE images are held."""

    def __init__(self, name: str, path: Path, group: int) -> None:
        self.where = (os.getpid(), name, group)
        self.path = path
        self.start = 0
        self.rows: list[object] = []
        self._batches = self._stream(group)

    def reaches(self, name: str, group: int, row: int) -> bool:
        """Tell whether a row is here or ahead, in this process."""
        return self.where == (os.getpid(), name, group) and row >= self.start

    def at(self, row: int) -> object:
        """Return the row's image, as it stands in the column."""
        while row >= self.start + len(self.rows):
            self.start += len(self.rows)
            batch = next(self._batches, None)
            if batch is None:
                raise cannot_read(str(self.path), EOFError("its rows end early"))
            self.rows = batch.column(0).to_pylist()
        return self.rows[row - self.start]

    def _stream(self, group: int) -> Iterator[Any]:
        with _reading(self.path) as file:
            yield from file.iter_batches(
                batch_size=ROWS_AT_ONCE,
                row_groups=[group],
                columns=[_first(IMAGES, file.schema_arrow)],
                use_threads=False,
            )


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """Open a parquet file; whatever pyarrow finds wrong with it is a `DataError`."""
    try:
        # It ships no types.
        arrow, parquet = (importlib.import_module(m) for m in ("pyarrow", "pyarrow.parquet"))
    except ImportError as error:
        raise DataError(
            f"{path} is parquet, and pyarrow is not installed",
            allowed="the extra `parquet`",
            do="Run: pip install convnext-edge[parquet]",
        ) from error
    try:
        # With a buffer, a column's pages are read as they are needed.
        with parquet.ParquetFile(path, buffer_size=BUFFER_BYTES) as file:
            yield file
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise cannot_read(str(path), error) from error


def _group_sizes(file: Any, path: Path) -> list[int]:
    schema = file.schema_arrow
    column = _first(IMAGES, schema)
    if column is None or not _holds_bytes(schema.field(column).type):
        raise DataError(
            f"{path} has the columns {', '.join(schema.names[:8])}",
            allowed=f"a column {IMAGES[0]} of bytes (or bytes and path) and a column {LABELS[0]}",
            do="Rename or cast the columns, or give another data set",
        )
    metadata = file.metadata
    for i in range(metadata.num_row_groups):
        _check_group(metadata.row_group(i), column, path)
    return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]


def _check_group(group: Any, column: str, path: Path) -> None:
    """Refuse a row group that would decompress to more than images do: they are compressed.

    Raises:
        DataError: It would.
    """
    chunks = [group.column(i) for i in range(group.num_columns)]
    of_images = [c for c in chunks if c.path_in_schema.split(".")[0] == column]
    whole = sum(c.total_uncompressed_size for c in of_images)
    packed = sum(c.total_compressed_size for c in of_images)
    check_size(f"{path}: an image, on average,", whole // max(group.num_rows, 1))
    if whole > max(FREE_BYTES, MAX_GROWTH * packed):
        raise DataError(
            f"{path}: {packed} bytes of images decompress to {whole}",
            allowed=f"at most {MAX_GROWTH} times as many, for images are compressed themselves",
            do="Write the file again from the images",
        )


def _holds_bytes(kind: Any) -> bool:
    binary = {"binary", "large_binary", "binary_view"}
    fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
    return str(kind) in binary or str(fields.get("bytes")) in binary


def _first(names: tuple[str, ...], schema: Any) -> str | None:
    return next((name for name in names if name in schema.names), None)


def _declared(schema: Any, column: str) -> tuple[str, ...] | None:
    """Return the class names of a ClassLabel, as Hugging Face's datasets writes them."""
    try:
        stated = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = stated["info"]["features"][column]["names"]
    except (ValueError, LookupError, TypeError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) else None
