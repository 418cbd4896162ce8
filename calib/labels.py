"""Labels that lie beside the images, and the order of a model's classes.

In: a label file and the names of a source's images; or a file of class names. Out: one label per
image, a name or a number; or the names in the order of the model's logits.
"""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from calib.sources.base import Labels, cannot_read, from_texts
from pipeline.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SORTED = "sorted"
KAGGLE_HEADER = ["imageid", "predictionstring"]
DEVKIT_TRUTH = "ILSVRC2012_validation_ground_truth"
DEVKIT_META = ("meta.mat", "data/meta.mat")
DEVKIT_CLASSES = 1000
MAX_TEXT_BYTES = 256 * 2**20
FORMS = (
    "lines of `name label` or `name,label`, Kaggle's ImageId,PredictionString, or one label per"
    " line in the sorted order of the images"
)


def read_labels(path: Path, names: Sequence[str]) -> Labels:
    """Read the labels of a source's images from a file.

    A line begins with an image's name, its name without folders, or either without its ending.
    Where the first line does not, each line is the label of one image in their sorted order.

    Args:
        path: The label file.
        names: Of all the source's images, sorted.

    Returns:
        One label per image: numbers where every label is one, which index the model's logits.

    Raises:
        DataError: The file is unreadable, or does not label every image exactly once.
    """
    lines = [line.strip() for line in _text(path).splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    if not lines or not all(lines):
        raise _refused(path, f"line {lines.index('') + 1 if lines else 1} is empty")
    if path.name.startswith(DEVKIT_TRUTH):
        return Labels(values=_in_order(_wnids(path, lines), path, names))
    try:
        rows = [_fields(line) for line in lines]
    except csv.Error as error:
        raise cannot_read(str(path), error) from error
    if [field.lower() for field in rows[0]] == KAGGLE_HEADER:
        # A prediction string is the wnid and a box, once per object of that class.
        kaggle = [[row[0], *" ".join(row[1:]).split()[:1]] for row in rows[1:]]
        return Labels(values=_by_name(kaggle, path, names))
    known = _known(names)
    if rows[0][0] in known and len(rows[0]) > 1:
        return Labels(values=_by_name(rows, path, names))
    return Labels(values=_in_order(lines, path, names))


def read_order(class_order: str, classes: Sequence[str]) -> tuple[str, ...]:
    """Return class names in the order of the model's logits.

    Args:
        class_order: `sorted`, or a file with one class name per line.
        classes: The data's class names, sorted.

    Raises:
        DataError: The file is unreadable, or a name is empty or stands there twice.
    """
    if class_order == SORTED:
        return tuple(classes)
    path = Path(class_order)
    order = [line.strip() for line in _text(path).splitlines()]
    while order and not order[-1]:
        order.pop()
    twice = [name for name, count in Counter(order).items() if count > 1]
    if not order or twice:
        raise DataError(
            f"{path} names {twice[0]!r} more than once" if twice else f"{path} is empty",
            allowed="one class name per line, each once",
            do="Correct the file given as class order",
        )
    return tuple(order)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
        if len(data) > MAX_TEXT_BYTES:
            raise _refused(path, f"it is larger than {MAX_TEXT_BYTES} bytes")
        return data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise cannot_read(str(path), error) from error


def _fields(line: str) -> list[str]:
    """Split `name,label` or `name label`; a label may have spaces, a name may not."""
    if "," in line:
        # A quote that is never closed is no error to csv: the field is what is left.
        return [cell.strip() for cell in next(csv.reader([line]))][:2]
    return line.split("\t" if "\t" in line else None, 1)


def _known(names: Sequence[str]) -> dict[str, str | None]:
    """Map all that may stand for an image to its name; None where several images share it."""
    known: dict[str, str | None] = {}
    for name in names:
        last = name.rpartition("/")[2]
        for alias in {last, last.rpartition(".")[0], name.rpartition(".")[0]} - {name}:
            known[alias] = None if alias in known else name
    # A whole name is never ambiguous.
    return {**known, **{name: name for name in names}}


def _by_name(
    rows: Sequence[Sequence[str]], path: Path, names: Sequence[str]
) -> tuple[str | int, ...]:
    known = _known(names)
    found: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        name, label = (*row, "", "")[:2]
        if not label:
            raise _refused(path, f"entry {number} has no label: {' '.join(row)[:80]!r}")
        # An image that is not in the source is of no matter: a part of a set may be given.
        image = known.get(name)
        if image is None:
            if name in known:
                raise _refused(path, f"{name} stands for several images: give its folder, too")
            continue
        if found.setdefault(image, label) != label:
            raise _refused(path, f"{name} has the labels {found[image]} and {label}")
    missing = [name for name in names if name not in found]
    if missing:
        raise _refused(
            path, f"{len(missing)} of {len(names)} images have no label, as {missing[0]}"
        )
    return from_texts([found[name] for name in names])


def _in_order(labels: Sequence[str], path: Path, names: Sequence[str]) -> tuple[str | int, ...]:
    if len(labels) != len(names):
        raise _refused(
            path,
            f"{len(labels)} lines for {len(names)} images, and the first begins with no image's"
            " name",
        )
    return from_texts(labels)


def _wnids(path: Path, lines: Sequence[str]) -> list[str]:
    """Translate the devkit's own numbers, which no model's classes are ordered by."""
    meta = next((p for name in DEVKIT_META if (p := path.parent / name).is_file()), None)
    if meta is None:
        raise DataError(
            f"{path} numbers the classes in the devkit's own order, which is no model's",
            allowed=f"that file with the devkit's meta.mat beside it or in {path.parent}/data",
            do="Put meta.mat there, or give Kaggle's LOC_val_solution.csv",
        )
    wnid_of = _synsets(meta)
    strange = next((i for i, line in enumerate(lines, 1) if line not in wnid_of), None)
    if strange is not None:
        raise _refused(
            path, f"line {strange} is {lines[strange - 1][:40]!r}, not a number in {meta}"
        )
    return [wnid_of[line] for line in lines]


def _synsets(meta: Path) -> Mapping[str, str]:
    from scipy.io import loadmat

    try:
        synsets = loadmat(meta, squeeze_me=True, variable_names=["synsets"])["synsets"]
        pairs = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
        # Above 1000 are the inner nodes of the hierarchy.
        return {str(int(i)): str(wnid) for i, wnid in pairs if int(i) <= DEVKIT_CLASSES}
    # A damaged .mat file can make scipy raise nearly anything.
    except Exception as error:
        raise cannot_read(str(meta), error) from error


def _refused(path: Path, why: str) -> DataError:
    return DataError(f"{path}: {why}", allowed=FORMS, do="Correct the label file")
