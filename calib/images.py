"""Images: where they lie, which split serves what, and a reproducible selection of them.

In: a place that holds images (`calib.sources.opening.KINDS`). Out: an `ImageSet`, a list of names
with labels, whose bytes are read one at a time; nothing is unpacked to disk.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from calib.labels import read_labels, read_order
from calib.sources.base import IMAGE_SUFFIXES, SPLIT_NAMES, Unreadable
from calib.sources.digits import Digits
from calib.sources.opening import open_source
from calib.sources.synthetic import Synthetic
from pipeline.errors import DataError
from pipeline.store import sha256_bytes, sha256_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from calib.sources.base import Labels, Source
    from pipeline.records import Checkpoint, Selection

Purpose = Literal["calibration", "evaluation"]

DIGITS = Digits.label
NOTHING = Synthetic.label
"""The places that are always there."""
SPLITS: Mapping[Purpose, tuple[str, ...]] = {
    "calibration": ("train",),
    "evaluation": ("val", "validation", "test"),
}
MAX_NUMBERED = 1_000_000
"""Numbers of classes from here on are taken for damage."""
FEW = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One image: its name in the source and its class index, None where it has no label."""

    name: str
    label: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSet:
    """A selection of images of one source.

    Attributes:
        source: Where their bytes are read.
        entries: The images, in order.
        classes: What labels count in; None where the images are unlabelled.
        numbered: Whether the data gives the indices of the model's logits instead of names.
    """

    source: Source = field(repr=False)
    entries: tuple[Entry, ...]
    classes: tuple[str, ...] | None
    numbered: bool = False

    @property
    def label(self) -> str:
        """What a person would call the source."""
        return self.source.label

    @property
    def skipped(self) -> tuple[str, ...]:
        """What the source left out, each with its reason: links that lead out of it."""
        return self.source.skipped

    def read(self, entry: Entry) -> bytes:
        """Return one image file's bytes.

        Raises:
            Unreadable: The image is damaged within a sound archive, or a row has none.
            DataError: The source cannot be read any more, or the image is too large.
        """
        return self.source.read(entry.name)

    def hashes(self) -> list[str]:
        """Return the SHA-256 of every selected image's bytes, in order.

        An image that is `Unreadable` stands for its name: `batches` leaves it out.
        """
        return [self._hash(entry) for entry in self.entries]

    def sample(self, n: int | None, seed: int) -> ImageSet:
        """Return `n` images drawn without replacement, reproducibly.

        They come shuffled, except from a source that reads well in its own order only.

        Args:
            n: How many; None or more than there are gives all, in their own order.
            seed: Of the draw.
        """
        if n is None or n >= len(self.entries):
            return self
        drawn = random.Random(seed).sample(range(len(self.entries)), n)
        if self.source.sequential:
            drawn.sort()
        return replace(self, entries=tuple(self.entries[i] for i in drawn))

    def for_model(
        self, labels: Sequence[str] | None, classes: int, order: Sequence[str] | None = None
    ) -> ImageSet:
        """Return the set with labels that count in the model's order of classes.

        Args:
            labels: The model's class names, None where it carries none.
            classes: How many classes it has.
            order: The data's names in the model's order, where they are not to be matched with
                the model's own.

        Raises:
            DataError: The data's classes cannot be those of the model.
        """
        if self.classes is None:
            raise DataError(
                f"{self.label} holds images without labels: they calibrate but do not evaluate",
                allowed="one folder per class, a source with labels in it, or a label file",
                do="Give labelled images with --eval, or leave evaluation out with --eval none",
            )
        if self.numbered:
            return self._by_number(labels, classes, order)
        names = self._names_in_order(self.classes, labels, classes, order)
        place = {name: i for i, name in enumerate(names)}
        index = [place[name] for name in self.classes]
        entries = tuple(
            replace(e, label=index[e.label]) if e.label is not None else e for e in self.entries
        )
        return replace(self, entries=entries, classes=tuple(names))

    def _hash(self, entry: Entry) -> str:
        try:
            return sha256_bytes(self.read(entry))
        except Unreadable:
            return sha256_bytes(f"unreadable: {entry.name}".encode())

    def _by_number(
        self, labels: Sequence[str] | None, classes: int, order: Sequence[str] | None
    ) -> ImageSet:
        assert self.classes is not None
        highest = len(self.classes) - 1
        if order is not None:
            raise DataError(
                f"{self.label} numbers its classes, so there are no names to put in order",
                allowed="a class order for data whose labels are names",
                do="Leave the class order out, or name the labels",
            )
        if highest >= classes:
            raise DataError(
                f"{self.label} has the label {highest}, the model {classes} classes",
                allowed=f"numbers from 0 to {classes - 1}, which index the model's logits",
                do="Count from 0 in the model's order, or use names",
            )
        numerals = tuple(map(str, range(classes)))
        if labels is not None and set(labels) == set(numerals) and tuple(labels) != numerals:
            raise DataError(
                f"{self.label} has numbers for labels, and the model's names are other numbers",
                allowed="numbers that mean the same both ways",
                do="Name the classes so that they are not numbers",
            )
        return replace(self, classes=tuple(labels or numerals))

    def _names_in_order(
        self,
        own: Sequence[str],
        labels: Sequence[str] | None,
        classes: int,
        order: Sequence[str] | None,
    ) -> Sequence[str]:
        if order is not None:
            strange = sorted(set(own) - set(order))
            if len(order) != classes or strange:
                raise self._wrong_order(order, classes, strange)
            return order
        if labels is None and len(own) == classes:
            if all(name.isdecimal() for name in own) and list(own) != sorted(own, key=int):
                raise DataError(
                    f"{self.label} has the classes {_some(own)}: numbers whose order as names is"
                    " another than as numbers, and the model carries no names",
                    allowed="an order that is stated",
                    do="Give --class-order: the word sorted for names, or a file",
                )
            return own
        if labels is None or not set(own) <= set(labels):
            raise self._wrong_classes(own, labels, classes)
        twice = next((name for name in own if labels.count(name) > 1), None)
        if twice is not None:
            raise DataError(
                f"{self.label}: the model has several classes named {twice}",
                allowed="names that stand for one class each",
                do="Give the data's class names in the model's order as the class order",
            )
        return labels

    def _wrong_order(self, order: Sequence[str], classes: int, strange: list[str]) -> DataError:
        what = f"; it lacks {_some(strange)} of {self.label}" if strange else ""
        return DataError(
            f"the class order has {len(order)} names, the model {classes} classes{what}",
            allowed="as many names as the model has classes, and all of the data's among them",
            do="Correct the class order",
        )

    def _wrong_classes(
        self, own: Sequence[str], labels: Sequence[str] | None, classes: int
    ) -> DataError:
        got = f"{self.label} has {len(own)} classes, the model {classes}"
        do = 'Name the model\'s classes as "classes" in the sidecar .json, or correct --eval'
        if labels is not None:
            got += f"; unknown to the model: {_some(sorted(set(own) - set(labels)))}"
            absent = sorted(set(labels) - set(own))
            if absent and len(own) == classes:
                got += f"; not in the data: {_some(absent)}"
                do = (
                    "If they are the same classes, give the data's names in the model's order as"
                    " the class order: a file with one per line, or the word sorted"
                )
        return DataError(
            got, allowed="exactly the model's classes, or a subset of the names it carries", do=do
        )


def select(selection: Selection, model: Checkpoint | None = None) -> ImageSet:
    """Open the images of a selection.

    Args:
        selection: Where, what for, how many, the seed of the draw, and where labels come from.
        model: Where given, labels count in its order of classes.

    Raises:
        DataError: As `open_images` and `ImageSet.for_model`.
    """
    images = open_images(selection.where, selection.purpose, selection.label_file)
    if model is not None:
        order = None
        if selection.class_order is not None and images.classes is not None:
            order = read_order(selection.class_order, images.classes)
        images = images.for_model(model.labels, model.architecture.classes, order)
    return images.sample(selection.n, selection.seed)


def select_labelled(selection: Selection, model: Checkpoint, *, needed: bool) -> ImageSet:
    """Open the images of a selection, with labels where they are those of the model's classes.

    Args:
        selection: Where, how many, the seed of the draw, and the order of classes.
        model: Its classes are what labels count in.
        needed: Whether images without such labels are of no use.

    Raises:
        DataError: As `open_images`; and of labels that are not the model's, where they are needed.
    """
    try:
        return select(selection, model)
    except DataError:
        if needed:
            raise
    images = select(selection)
    return replace(images, entries=tuple(replace(e, label=None) for e in images.entries))


def digest(images: ImageSet, hashes: Sequence[str]) -> str:
    """Return one hash for a selection: its images' hashes and labels, in order."""
    labels = [entry.label for entry in images.entries]
    return sha256_json(list(zip(hashes, labels, strict=True)))


def open_images(where: str, purpose: Purpose, label_file: str | None = None) -> ImageSet:
    """List the images that serve a purpose.

    Args:
        where: A place (`calib.sources.opening.KINDS`). Where it holds train/ and val/ (or
            validation/, test/), calibration reads train and evaluation the other.
        purpose: What they are for.
        label_file: Their labels (`calib.labels`); None where the source has its own.

    Returns:
        All images there, in the order of their names.

    Raises:
        DataError: There is no such place, it is not readable, or it holds no images.
    """
    source = _source(where)
    names, depth = _of_split(source.names(), purpose)
    if not names:
        left_out = f" but {_some(source.skipped)}" if source.skipped else ""
        raise DataError(
            f"{source.label} holds no images for {purpose}{left_out}",
            allowed="image files, or folders of them, ending in "
            + " ".join(sorted(IMAGE_SUFFIXES)),
            do="Check the path",
        )
    if label_file is None:
        labels = source.labels(names, depth)
    elif source.own_labels:
        raise DataError(
            f"{source.label} has labels of its own, and {label_file} is given as well",
            allowed="one place for labels",
            do="Leave the label file out",
        )
    else:
        labels = read_labels(Path(label_file), names)
    return _labelled(source, names, labels)


def _source(where: str) -> Source:
    if where == DIGITS:
        return Digits()
    return Synthetic() if where == NOTHING else open_source(where)


def _labelled(source: Source, names: Sequence[str], labels: Labels) -> ImageSet:
    if labels.values is None:
        entries = tuple(Entry(name=name, label=None) for name in names)
        return ImageSet(source=source, entries=entries, classes=None)
    numbered = isinstance(labels.values[0], int)
    if numbered:
        numbers = [int(value) for value in labels.values]
        limit = len(labels.names) if labels.names else MAX_NUMBERED
        if min(numbers) < 0 or max(numbers) >= limit:
            raise DataError(
                f"{source.label} has labels from {min(numbers)} to {max(numbers)}",
                allowed=f"numbers of classes from 0 to {limit - 1}",
                do="Correct the labels",
            )
        texts = labels.names or tuple(map(str, range(max(numbers) + 1)))
        values = [texts[number] for number in numbers]
    else:
        values = [str(value) for value in labels.values]
        texts = tuple(values)
    by_number = numbered and labels.names is None
    classes = tuple(texts) if by_number else tuple(sorted(set(texts)))
    if labels.names is not None and len(classes) < len(labels.names):
        raise DataError(
            f"{source.label} declares {len(labels.names)} class names, {len(classes)} of them"
            " different",
            allowed="names that stand for one class each",
            do="Correct the names",
        )
    index = {name: i for i, name in enumerate(classes)}
    entries = tuple(
        Entry(name=name, label=index[value]) for name, value in zip(names, values, strict=True)
    )
    return ImageSet(source=source, entries=entries, classes=classes, numbered=by_number)


def _of_split(names: list[str], purpose: Purpose) -> tuple[list[str], int]:
    """Keep the split that serves the purpose, where there are splits (one folder down at most).

    Returns:
        The names, and how many of their leading folders are the split and what it lies in.
    """
    parts = [name.split("/") for name in names]
    for level in (0, 1):
        found = {p[level] for p in parts if len(p) > level + 1}
        alone = bool(found) and found <= set(SPLIT_NAMES)
        held_out = [split for split in SPLITS["evaluation"] if split in found]
        wanted = [split for split in SPLITS[purpose] if split in found]
        if ("train" in found and held_out) or (alone and wanted):
            split = wanted[0]
            return [
                n for n, p in zip(names, parts, strict=True) if p[level:-1][:1] == [split]
            ], level + 1
        if alone:
            return names, level + 1
        if len(found) != 1:
            break
    return names, 0


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + more
