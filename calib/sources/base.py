"""What every kind of source shares: its protocol, the rules for names, the limits.

In: names and sizes as a source states them. Out: checked names, labels taken from class folders,
and the errors that every source raises alike. A source is read in place: nothing is unpacked.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pipeline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import IO

IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"]
)
SPLIT_NAMES = ("train", "val", "validation", "test")
MAX_FILE_BYTES = 128 * 2**20
"""Of one image; no more is ever read, whatever an archive's header says."""
MAX_ENTRIES = 2_000_000
_SPLIT_WORD = re.compile(rf"(?:^|[-_.])({'|'.join(SPLIT_NAMES)})(?:[-_.]|$)")
_DRIVE = re.compile(r"[A-Za-z]:")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,8})")


class Unreadable(DataError):  # noqa: N818 - it says what the image is
    """An image that is no image or is damaged; `calib.batches` can leave it out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """The labels of a list of images.

    Attributes:
        values: One per image: a class's name, or its number; None where there are no labels.
        names: The classes that numbers stand for, where the source names them.
    """

    values: tuple[str | int, ...] | None
    names: tuple[str, ...] | None = None


UNLABELLED = Labels(values=None)


class Source(Protocol):
    """Something with named images in it. It pickles, and opens its files anew in each process.

    Attributes:
        label: What a person would call it.
        sequential: Whether images are cheap to read only in the order of their names.
        own_labels: Whether labels lie in it otherwise than as folders.
        skipped: What was left out of `names`, with the reason.
    """

    label: str
    sequential: bool
    own_labels: bool
    skipped: tuple[str, ...]

    def names(self) -> list[str]:
        """Return the relative POSIX names of all images, sorted."""

    def labels(self, names: Sequence[str], depth: int) -> Labels:
        """Return the labels of these images; the first `depth` folders are no classes."""

    def read(self, name: str) -> bytes:
        """Return one image file's bytes."""


def is_image(name: str) -> bool:
    """Tell whether a name is that of an image, going by its ending."""
    *folders, last = name.split("/")
    # What macOS and editors leave behind carries an image's ending, too.
    hidden = last.startswith(".") or "__MACOSX" in folders
    _, dot, ending = last.rpartition(".")
    return bool(dot) and f".{ending.lower()}" in IMAGE_SUFFIXES and not hidden


def entry_name(name: str, archive: str) -> str:
    """Return an archive entry's name in plain form.

    Raises:
        DataError: The name leads out of the archive, or would elsewhere.
    """
    parts = name.split("/")
    if name.startswith("/") or _DRIVE.match(name) or "\\" in name or "\0" in name or ".." in parts:
        raise DataError(
            f"{archive} has an entry named {name!r}",
            allowed="relative names with forward slashes that stay inside the archive",
            do="Pack the archive again from inside its folder",
        )
    return "/".join(part for part in parts if part not in {"", "."})


def class_folders(names: Sequence[str], depth: int, label: str, *, wrapped: bool = False) -> Labels:
    """Return each image's folder as its class.

    Args:
        names: Of the images.
        depth: How many leading folders are no classes (a split, and what it lies in).
        label: The source, for messages.
        wrapped: Whether all of an archive lies in one top folder: images right in it have none.

    Raises:
        DataError: Some images lie deeper than others.
    """
    folders = [tuple(name.split("/")[depth:-1]) for name in names]
    depths = Counter(map(len, folders))
    if set(depths) == {0} or (wrapped and depth == 0 and set(depths) == {1}):
        return UNLABELLED
    if len(depths) > 1:
        least, most = min(depths), max(depths)
        first, last = (
            next(name for name, f in zip(names, folders, strict=True) if len(f) == wanted)
            for wanted in (least, most)
        )
        raise DataError(
            f"{label} is mixed: {len(depths)} depths, as {first} and {last}",
            allowed="either images alone, or one folder per class with its images in it",
            do="Move the images into their class folders",
        )
    return Labels(values=tuple(folder[-1] for folder in folders))


def from_texts(texts: Sequence[str]) -> tuple[str | int, ...]:
    """Return labels written as text: numbers where all of them are, names otherwise."""
    if all(_NUMBER.fullmatch(text) for text in texts):
        return tuple(map(int, texts))
    return tuple(texts)


def under_split(name: str) -> str:
    """Put a data file's relative name under the split that its own name states, if any."""
    *folders, last = name.split("/")
    if any(folder in SPLIT_NAMES for folder in folders):
        return name
    word = _SPLIT_WORD.search(last)
    return f"{word[1]}/{name}" if word else name


def read_capped(stream: IO[bytes], name: str) -> bytes:
    """Read a stream to its end, which must come within MAX_FILE_BYTES.

    Raises:
        DataError: It goes on.
    """
    data = stream.read(MAX_FILE_BYTES + 1)
    check_size(name, len(data))
    return data


def check_size(name: str, size: int) -> None:
    """Refuse an image file of more than MAX_FILE_BYTES.

    Raises:
        DataError: It is larger.
    """
    if size > MAX_FILE_BYTES:
        raise DataError(
            f"{name} is {size} bytes or more",
            allowed=f"image files of at most {MAX_FILE_BYTES} bytes",
            do="Take it out of the data",
        )


def check_count(label: str, count: int) -> None:
    """Refuse a source of more than MAX_ENTRIES files.

    Raises:
        DataError: There are more.
    """
    if count > MAX_ENTRIES:
        raise DataError(
            f"{label} has more than {MAX_ENTRIES} files",
            allowed=f"at most {MAX_ENTRIES}",
            do="Give a part of the data",
        )


def cannot_read(name: str, error: Exception) -> DataError:
    """Return the error for a file that the system or a library would not read."""
    return DataError(
        f"{name} cannot be read ({error})",
        allowed="readable files",
        do="Check the file or the archive",
    )
