"""One tar or several: class folders, or WebDataset samples.

In: paths of plain tar files. Out: their images, read in place by offset. A WebDataset sample is all
entries that share a name up to its first dot: an image beside a .cls (a number), a .json with
`label`, or a .txt with the class's name.
"""

from __future__ import annotations

import json
import re
import tarfile
from typing import TYPE_CHECKING, NamedTuple

from calib.sources.base import (
    UNLABELLED,
    Labels,
    cannot_read,
    check_count,
    check_size,
    class_folders,
    entry_name,
    is_image,
    under_split,
)
from pipeline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

LABEL_ENDINGS = ("cls", "json", "txt")
MAX_LABEL_BYTES = 2**20
MAX_CLASS_NAME = 200
"""A .txt with more characters, or more than one line, is a caption."""
_CLASS_NUMBER = re.compile(r"[0-9]{1,9}")
COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}


class _Place(NamedTuple):
    shard: int
    offset: int
    size: int


class Tars:
    """The images in tar files, which together are one source.

    Args:
        paths: The files; names of several begin with their split, where the file's name states it.
        label: What a person would call them together.

    Raises:
        DataError: A file is compressed or damaged, or an entry's name or kind is refused.
    """

    sequential = True

    def __init__(self, paths: Sequence[tuple[Path, str]], label: str) -> None:
        self.label = label
        self.paths = [path for path, _ in paths]
        self._images: dict[str, _Place] = {}
        self._partners: dict[str, dict[str, _Place]] = {}
        self._folders: dict[str, int] = {}
        tops, count = set(), 0
        for shard, (path, name) in enumerate(paths):
            prefix = f"{under_split(name)}/" if len(paths) > 1 else ""
            for member in _members(path):
                count += 1
                check_count(label, count)
                plain = entry_name(member.name, str(path))
                if member.isdir() or "/" in plain:
                    tops.add(plain.split("/")[0])
                if member.isreg():
                    place = _Place(shard, member.offset_data, member.size)
                    self._take(prefix, plain, place)
        self._prefixed = len(paths) > 1
        self._wrapped = len(tops - {"", "__MACOSX"}) == 1
        # A partner of no image is some other file.
        stems = {_stem(name) for name in self._images}
        self._partners = {key: v for key, v in self._partners.items() if key in stems}
        self.own_labels = any({"cls", "json"} & found.keys() for found in self._partners.values())
        masks = [name for name in self._images if _ending(name) and _stem(name) in self._partners]
        for name in masks:
            del self._images[name]
        self.skipped = tuple(f"{name} (a further image of its sample)" for name in sorted(masks))

    def names(self) -> list[str]:
        """Return the names of all images, sorted."""
        return sorted(self._images)

    def labels(self, names: Sequence[str], depth: int) -> Labels:
        """Return the samples' labels, or each image's folder where there are no samples.

        Raises:
            DataError: Some samples have a label and others none, or one is not readable.
        """
        for ending, value in (("cls", self._number), ("json", self._stated)):
            labelled = [self._partners.get(_stem(name), {}).get(ending) for name in names]
            values = [place and value(place, n) for n, place in zip(names, labelled, strict=True)]
            if any(v is not None for v in values):
                return Labels(values=self._whole(values, names, ending))
        by_folder = self._by_folder(names, depth)
        if by_folder.values is not None:
            return by_folder
        texts = [self._class_name(self._partners.get(_stem(name), {}).get("txt")) for name in names]
        if any(text is None for text in texts):
            return UNLABELLED
        return Labels(values=tuple(text for text in texts if text is not None))

    def read(self, name: str) -> bytes:
        """Return one image file's bytes.

        Raises:
            DataError: It is too large, or the archive vanished or was cut.
        """
        place = self._images[name]
        check_size(name, place.size)
        return self._bytes(place, name)

    def _take(self, prefix: str, plain: str, place: _Place) -> None:
        name = prefix + plain
        if is_image(plain):
            self._images[name] = place
            self._folders[name] = prefix.count("/")
        elif plain.rpartition(".")[2].lower() in LABEL_ENDINGS:
            partners = self._partners.setdefault(_stem(name), {})
            partners[plain.rpartition(".")[2].lower()] = place

    def _by_folder(self, names: Sequence[str], depth: int) -> Labels:
        if not self._prefixed:
            return class_folders(names, depth, self.label, wrapped=self._wrapped)
        # What stands before the member's own name is the shard: no class.
        own = ["/".join(name.split("/")[self._folders[name] :]) for name in names]
        return class_folders(own, 0, self.label)

    def _whole(
        self, values: Sequence[str | int | None], names: Sequence[str], ending: str
    ) -> tuple[str | int, ...]:
        found = [value for value in values if value is not None]
        if len(found) < len(values):
            first = names[values.index(None)]
            raise DataError(
                f"{self.label}: {len(values) - len(found)} samples have no label, as {first}",
                allowed=f"a .{ending} with a label for every image",
                do="Pack the shards again",
            )
        if len({type(value) for value in found}) > 1:
            raise DataError(
                f"{self.label}: some labels are numbers and some are names",
                allowed="one kind of label",
                do="Pack the shards again",
            )
        return tuple(found)

    def _number(self, place: _Place, name: str) -> int:
        text = self._text(place, name).strip()
        if not _CLASS_NUMBER.fullmatch(text):
            raise self._bad_label(name, "cls", text, "the class's number as text, from 0")
        return int(text)

    def _stated(self, place: _Place, name: str) -> str | int | None:
        try:
            value = json.loads(self._text(place, name))
        except (ValueError, RecursionError) as error:
            raise self._bad_label(name, "json", type(error).__name__, "JSON") from error
        stated = value.get("label") if isinstance(value, dict) else None
        if stated is not None and (isinstance(stated, bool) or not isinstance(stated, str | int)):
            raise self._bad_label(name, "json", repr(stated), 'a number or a name under "label"')
        return stated

    def _class_name(self, place: _Place | None) -> str | None:
        if place is None or place.size > MAX_LABEL_BYTES:
            return None
        text = self._text(place, "").strip()
        return text if 0 < len(text) <= MAX_CLASS_NAME and "\n" not in text else None

    def _bad_label(self, name: str, ending: str, got: str, allowed: str) -> DataError:
        return DataError(
            f"{self.label}: the .{ending} of {name} holds {got[:60]!r}",
            allowed=allowed,
            do="Pack the shards again",
        )

    def _text(self, place: _Place, name: str) -> str:
        if place.size > MAX_LABEL_BYTES:
            raise self._bad_label(name, "label", f"{place.size} bytes", "a short label")
        return self._bytes(place, name).decode("utf-8", errors="replace")

    def _bytes(self, place: _Place, name: str) -> bytes:
        # Opened anew each time: it costs microseconds, and no position is shared by processes.
        path = self.paths[place.shard]
        try:
            with path.open("rb") as file:
                file.seek(place.offset)
                data = file.read(place.size)
        except OSError as error:
            raise cannot_read(f"{path}:{name}", error) from error
        if len(data) < place.size:
            raise cannot_read(f"{path}:{name}", EOFError("the file ends in it"))
        return data


def _ending(name: str) -> str:
    """Return what stands between a name's first dot and its last: `mask` of 1.mask.png."""
    return name.rpartition("/")[2].partition(".")[2].rpartition(".")[0]


def _stem(name: str) -> str:
    """Return what the entries of one sample share: the name up to its first dot."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    try:
        with path.open("rb") as file:
            start = file.read(6)
            compressed = next(
                (tool for magic, tool in COMPRESSED.items() if start.startswith(magic)), None
            )
            if compressed:
                raise DataError(
                    f"{path} is compressed: its images cannot be read in place",
                    allowed="a plain .tar",
                    do=f"Decompress it first: {compressed} {path.name}",
                )
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    # The list of members is of no use here and grows by a kilobyte each.
                    tar.members = []  # type: ignore[attr-defined]
                    _check_kind(member, path)
                    yield member
                file.seek(tar.offset)
                if any(file.read(tarfile.BLOCKSIZE)):
                    raise cannot_read(str(path), ValueError(f"damaged at byte {tar.offset}"))
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError) as error:
        raise cannot_read(str(path), error) from error


def _check_kind(member: tarfile.TarInfo, path: Path) -> None:
    if not (member.isdir() or member.isreg()) or member.issparse():
        raise DataError(
            f"{path}: the entry {member.name} is a link, a device or a sparse file",
            allowed="plain files and folders",
            do="Pack the archive again with --dereference",
        )
