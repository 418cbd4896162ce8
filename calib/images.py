"""Images: where they lie, which split serves what, and a reproducible selection of them.

In: a folder, a zip, or the word `digits`. Out: an `ImageSet`, a list of names with labels, whose
bytes are read one at a time; nothing is unpacked to disk.
"""

from __future__ import annotations

import functools
import io
import random
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, Protocol

from pipeline.errors import DataError
from pipeline.store import sha256_bytes, sha256_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipeline.records import Checkpoint, Selection

Purpose = Literal["calibration", "evaluation"]

DIGITS = "digits"
IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"]
)
SPLITS: Mapping[Purpose, tuple[str, ...]] = {
    "calibration": ("train",),
    "evaluation": ("val", "validation", "test"),
}
MAX_FILE_BYTES = 128 * 2**20
# RuntimeError covers an encrypted file and NotImplementedError; the rest is what damage leads to.
ZIP_ERRORS = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)
DIGITS_EVALUATION = 540
DIGITS_SEED = 20


class Source(Protocol):
    """Something with named files in it."""

    label: str

    def names(self) -> list[str]:
        """Return the relative POSIX names of all files, sorted."""

    def read(self, name: str) -> bytes:
        """Return one file's bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One image: its name in the source and its class index, None where it has no label."""

    name: str
    label: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSet:
    """A selection of images of one source. `classes` is None where the images are unlabelled."""

    source: Source = field(repr=False)
    entries: tuple[Entry, ...]
    classes: tuple[str, ...] | None

    @property
    def label(self) -> str:
        """What a person would call the source."""
        return self.source.label

    def read(self, entry: Entry) -> bytes:
        """Return one image file's bytes."""
        return self.source.read(entry.name)

    def hashes(self) -> list[str]:
        """Return the SHA-256 of every selected image's bytes, in order."""
        return [sha256_bytes(self.read(entry)) for entry in self.entries]

    def sample(self, n: int | None, seed: int) -> ImageSet:
        """Return `n` images drawn without replacement, in a shuffled, reproducible order.

        Args:
            n: How many; None or more than there are gives all, in their own order.
            seed: Of the draw.
        """
        if n is None or n >= len(self.entries):
            return self
        drawn = random.Random(seed).sample(range(len(self.entries)), n)
        return replace(self, entries=tuple(self.entries[i] for i in drawn))

    def for_model(self, labels: Sequence[str] | None, classes: int) -> ImageSet:
        """Return the set with labels that count in the model's order of classes.

        Args:
            labels: The model's class names, None where it carries none.
            classes: How many classes it has.

        Raises:
            DataError: The data's classes cannot be those of the model.
        """
        if self.classes is None:
            raise DataError(
                f"{self.label} holds images without labels: they calibrate but do not evaluate",
                allowed="one folder per class, or a val/ folder with one",
                do="Give labelled images with --eval, or leave evaluation out with --eval none",
            )
        if labels is not None and set(self.classes) <= set(labels):
            index = [labels.index(name) for name in self.classes]
        elif len(self.classes) == classes and labels is None:
            index = list(range(classes))
        else:
            raise self._wrong_classes(labels, classes)
        entries = tuple(
            replace(e, label=index[e.label]) if e.label is not None else e for e in self.entries
        )
        return replace(self, entries=entries, classes=tuple(labels or self.classes))

    def _wrong_classes(self, labels: Sequence[str] | None, classes: int) -> DataError:
        assert self.classes is not None
        strange = [name for name in self.classes if labels is not None and name not in labels]
        named = f"; unknown to the model: {', '.join(strange[:5])}" if strange else ""
        return DataError(
            f"{self.label} has {len(self.classes)} classes, the model {classes}{named}",
            allowed="exactly the model's classes, or a subset of the names it carries",
            do='Name the model\'s classes as "classes" in the sidecar .json, or correct --eval',
        )


def select(selection: Selection, model: Checkpoint | None = None) -> ImageSet:
    """Open the images of a selection.

    Args:
        selection: Where, what for, how many, and the seed of the draw.
        model: Where given, labels count in its order of classes.

    Raises:
        DataError: As `open_images` and `ImageSet.for_model`.
    """
    images = open_images(selection.where, selection.purpose)
    if model is not None:
        images = images.for_model(model.labels, model.architecture.classes)
    return images.sample(selection.n, selection.seed)


def digest(images: ImageSet, hashes: Sequence[str]) -> str:
    """Return one hash for a selection: its images' hashes and labels, in order."""
    labels = [entry.label for entry in images.entries]
    return sha256_json(list(zip(hashes, labels, strict=True)))


def open_images(where: str, purpose: Purpose) -> ImageSet:
    """List the images that serve a purpose.

    Args:
        where: A folder, a .zip, or `digits`. Where it holds train/ and val/ (or validation/,
            test/), calibration reads train and evaluation the other.
        purpose: What they are for.

    Returns:
        All images there, in the order of their names.

    Raises:
        DataError: There is no such place, it is not readable, or it holds no images.
    """
    source = _source(where)
    names = [name for name in source.names() if _is_image(name)]
    names = _of_split(names, purpose)
    if not names:
        raise DataError(
            f"{source.label} holds no images for {purpose}",
            allowed="image files, or folders of them, ending in "
            + " ".join(sorted(IMAGE_SUFFIXES)),
            do="Check the path",
        )
    parents = [PurePosixPath(name).parent for name in names]
    depth = Counter(len(parent.parts) for parent in parents)
    if len(set(parents)) == 1:
        return ImageSet(
            source=source, entries=tuple(Entry(name=n, label=None) for n in names), classes=None
        )
    if len(depth) > 1:
        raise DataError(
            f"{source.label} is mixed: {len(depth)} depths, as {names[0]} and {names[-1]}",
            allowed="either images alone, or one folder per class with its images in it",
            do="Move the images into their class folders",
        )
    classes = tuple(sorted({parent.name for parent in parents}))
    index = {name: i for i, name in enumerate(classes)}
    entries = tuple(
        Entry(name=name, label=index[parent.name])
        for name, parent in zip(names, parents, strict=True)
    )
    return ImageSet(source=source, entries=entries, classes=classes)


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    # What macOS and editors leave behind carries an image's ending, too.
    hidden = path.name.startswith(".") or "__MACOSX" in path.parts
    return path.suffix.lower() in IMAGE_SUFFIXES and not hidden


def _source(where: str) -> Source:
    if where == DIGITS:
        return _Digits()
    path = Path(where)
    if path.is_dir():
        return _Folder(path)
    if path.is_file() and zipfile.is_zipfile(path):
        return _Zip(path)
    got = "no such folder or file" if not path.exists() else "not a folder and not a zip"
    raise DataError(
        f"{where}: {got}",
        allowed=f"a folder of images, a .zip of one, or the word {DIGITS}",
        do="Correct --data or --eval",
    )


def _of_split(names: list[str], purpose: Purpose) -> list[str]:
    """Keep the split that serves the purpose, where there are splits (one folder down at most)."""
    parts = [PurePosixPath(name).parts for name in names]
    for level in (0, 1):
        found = {p[level] for p in parts if len(p) > level + 1}
        train = [s for s in SPLITS["calibration"] if s in found]
        held_out = [s for s in SPLITS["evaluation"] if s in found]
        if train and held_out:
            wanted = (train if purpose == "calibration" else held_out)[0]
            return [n for n, p in zip(names, parts, strict=True) if p[level] == wanted]
        if len(found) != 1:
            break
    return names


class _Folder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.label = str(path)

    def names(self) -> list[str]:
        # A link out of the folder is not followed: os.walk's default, which rglob shares.
        files = (p for p in self.path.rglob("*") if p.is_file())
        return sorted(p.relative_to(self.path).as_posix() for p in files)

    def read(self, name: str) -> bytes:
        path = self.path / name
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise _too_large(name, path.stat().st_size)
            return path.read_bytes()
        except OSError as error:
            raise _unreadable(f"{self.label}/{name}", error) from error


class _Zip:
    def __init__(self, path: Path) -> None:
        self.label = str(path)
        try:
            self.file = zipfile.ZipFile(path)
        except ZIP_ERRORS as error:
            raise _unreadable(self.label, error) from error

    def names(self) -> list[str]:
        return sorted(i.filename for i in self.file.infolist() if not i.is_dir())

    def read(self, name: str) -> bytes:
        info = self.file.getinfo(name)
        if info.file_size > MAX_FILE_BYTES:
            raise _too_large(name, info.file_size)
        try:
            return self.file.read(info)
        except ZIP_ERRORS as error:
            raise _unreadable(f"{self.label}:{name}", error) from error


class _Digits:
    """scikit-learn's 1,797 scanned digits as 8x8 PNG files in train/ and val/."""

    label = DIGITS

    def names(self) -> list[str]:
        return sorted(_digit_files())

    def read(self, name: str) -> bytes:
        return _digit_files()[name]


@functools.cache
def _digit_files() -> dict[str, bytes]:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = list(range(len(digits.images)))
    random.Random(DIGITS_SEED).shuffle(order)
    held_out = set(order[:DIGITS_EVALUATION])
    files = {}
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        buffer = io.BytesIO()
        # Sixteen grey levels; 255 / 16 a level puts white at white.
        Image.fromarray((pixels * (255 / 16)).round().astype("uint8")).save(buffer, "PNG")
        split = "val" if i in held_out else "train"
        files[f"{split}/{label}/{i:04d}.png"] = buffer.getvalue()
    return files


def _too_large(name: str, size: int) -> DataError:
    return DataError(
        f"{name} is {size} bytes",
        allowed=f"image files of at most {MAX_FILE_BYTES} bytes",
        do="Take it out of the data",
    )


def _unreadable(name: str, error: Exception) -> DataError:
    return DataError(
        f"{name} cannot be read ({error})",
        allowed="readable files",
        do="Check the file or the archive",
    )
