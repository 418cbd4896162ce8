"""Where images lie, which split serves what, and reproducible draws."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from calib import images
from calib.images import Entry, ImageSet, open_images, select
from calib.sources import base
from calib.sources.base import Unreadable
from pipeline.errors import DataError
from pipeline.records import Architecture, Checkpoint, Selection


def _png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def _tree(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_png(i))
    return root


def _names(found: ImageSet) -> list[str]:
    return [entry.name for entry in found.entries]


def _labels(found: ImageSet) -> list[int | None]:
    return [entry.label for entry in found.entries]


def test_class_folders_give_labels_in_sorted_order(tmp_path: Path) -> None:
    found = open_images(str(_tree(tmp_path, "dog/2.png", "cat/9.JPG", "dog/1.png")), "evaluation")
    assert found.classes == ("cat", "dog")
    assert _names(found) == ["cat/9.JPG", "dog/1.png", "dog/2.png"]
    assert _labels(found) == [0, 1, 1]
    assert found.label == str(tmp_path)


def test_images_alone_have_no_labels(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not an image")
    found = open_images(str(_tree(tmp_path, "b.png", "a.png")), "calibration")
    assert found.classes is None
    assert found.entries == (Entry(name="a.png", label=None), Entry(name="b.png", label=None))


@pytest.mark.parametrize("held_out", ["val", "validation", "test"])
@pytest.mark.parametrize("under", ["", "photos/"])
def test_splits_serve_their_purpose(tmp_path: Path, held_out: str, under: str) -> None:
    split = [f"{under}train/a/1.png", f"{under}train/b/2.png"]
    kept = [f"{under}{held_out}/a/3.png", f"{under}{held_out}/b/4.png"]
    root = str(_tree(tmp_path, *split, *kept))
    assert _names(open_images(root, "calibration")) == split
    assert _names(open_images(root, "evaluation")) == kept


def test_val_is_preferred_to_test(tmp_path: Path) -> None:
    root = _tree(tmp_path, "train/a/1.png", "train/b/1.png", "test/a/1.png", "val/a/1.png")
    _tree(root, "val/b/1.png")
    assert _names(open_images(str(root), "evaluation")) == ["val/a/1.png", "val/b/1.png"]


def test_a_zip_reads_as_the_folder_does(tmp_path: Path) -> None:
    root = _tree(tmp_path / "data", "train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png")
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*")):
            archive.write(file, file.relative_to(tmp_path))
    folder, packed = (open_images(str(p), "evaluation") for p in (root, path))
    assert _names(packed) == [f"data/{name}" for name in _names(folder)]
    assert _labels(packed) == _labels(folder)
    assert packed.hashes() == folder.hashes()


def test_a_damaged_zip_member_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "data.zip"
    noise = bytes((i * i) % 251 for i in range(4000))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", noise)
        archive.writestr("b.png", noise)
    content = bytearray(path.read_bytes())
    start = 30 + len("a.png")
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(bytes(content))
    found = open_images(str(path), "calibration")
    with pytest.raises(Unreadable, match=r"data\.zip:a\.png cannot be read"):
        found.read(found.entries[0])
    assert found.read(found.entries[1]) == noise
    # `batches` leaves it out; until then it stands for its own name, whatever the damage.
    first, second = found.hashes()
    assert second == hashlib.sha256(noise).hexdigest()
    assert first == hashlib.sha256(b"unreadable: a.png").hexdigest()


def test_a_file_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "MAX_FILE_BYTES", 10)
    root = _tree(tmp_path / "data", "a.png")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(root / "a.png", "a.png")
    for where in (root, tmp_path / "data.zip"):
        found = open_images(str(where), "calibration")
        with pytest.raises(DataError, match=r"a\.png is \d+ bytes"):
            found.read(found.entries[0])


def test_a_file_that_vanished_is_a_data_error(tmp_path: Path) -> None:
    found = open_images(str(_tree(tmp_path, "a.png")), "calibration")
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png cannot be read"):
        found.hashes()


def test_what_holds_no_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder or file"):
        open_images(str(tmp_path / "absent"), "calibration")
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(DataError, match="holds no images for calibration"):
        open_images(str(tmp_path), "calibration")
    with pytest.raises(DataError, match="none of the files that hold images"):
        open_images(str(tmp_path / "notes.txt"), "calibration")


def test_mixed_depths_are_refused(tmp_path: Path) -> None:
    root = _tree(tmp_path, "a.png", "cat/1.png", "dog/2.png")
    with pytest.raises(DataError, match="is mixed"):
        open_images(str(root), "evaluation")


def test_a_sample_is_reproducible_and_without_repeats() -> None:
    every = open_images("digits", "calibration")
    one, again, other = every.sample(50, 3), every.sample(50, 3), every.sample(50, 4)
    assert one.entries == again.entries
    assert one.entries != other.entries
    assert len(set(one.entries)) == 50
    assert set(one.entries) <= set(every.entries)
    assert every.sample(None, 0) is every
    assert every.sample(10**6, 0) is every


def test_the_digits_are_split_once_and_for_all() -> None:
    calibration, evaluation = (open_images("digits", p) for p in ("calibration", "evaluation"))
    assert len(calibration.entries) == 1257
    assert len(evaluation.entries) == 540
    assert not set(calibration.hashes()) & set(evaluation.hashes())
    assert evaluation.classes == tuple("0123456789")
    assert set(_labels(evaluation)) == set(range(10))
    first = evaluation.entries[0]
    assert f"/{first.label}/" in first.name
    assert Image.open(io.BytesIO(evaluation.read(first))).size == (8, 8)


def test_labels_count_in_the_models_order(tmp_path: Path) -> None:
    found = open_images(str(_tree(tmp_path, "cat/1.png", "dog/2.png")), "evaluation")
    mapped = found.for_model(["dog", "emu", "cat"], 3)
    assert _labels(mapped) == [2, 0]
    assert mapped.classes == ("dog", "emu", "cat")


def test_a_model_without_names_takes_the_sorted_order(tmp_path: Path) -> None:
    found = open_images(str(_tree(tmp_path, "cat/1.png", "dog/2.png")), "evaluation")
    mapped = found.for_model(None, 2)
    assert _labels(mapped) == [0, 1]
    assert mapped.classes == ("cat", "dog")
    with pytest.raises(DataError, match="has 2 classes, the model 3"):
        found.for_model(None, 3)


def test_classes_unknown_to_the_model_are_named(tmp_path: Path) -> None:
    found = open_images(str(_tree(tmp_path, "cat/1.png", "yak/2.png")), "evaluation")
    with pytest.raises(DataError, match="unknown to the model: yak"):
        found.for_model(["cat", "dog"], 2)


def test_unlabelled_images_do_not_evaluate(tmp_path: Path) -> None:
    found = open_images(str(_tree(tmp_path, "a.png")), "evaluation")
    with pytest.raises(DataError, match="without labels"):
        found.for_model(None, 2)


def test_a_selection_is_opened_for_its_model(tmp_path: Path) -> None:
    root = _tree(tmp_path, "cat/1.png", "cat/2.png", "dog/3.png")
    model = Checkpoint(
        path="net", sha256="0", dialect="own", variant="custom", labels=("dog", "cat"),
        architecture=Architecture(depths=(1,), dims=(4,), classes=2),
    )  # fmt: skip
    selection = Selection(where=str(root), purpose="evaluation", n=None, seed=0)
    assert _labels(select(selection, model)) == [1, 1, 0]
    assert _labels(select(selection)) == [0, 0, 1]
    drawn = Selection(where=str(root), purpose="evaluation", n=2, seed=0)
    assert len(select(drawn).entries) == 2


def test_a_digest_follows_order_contents_and_labels(tmp_path: Path) -> None:
    pets = open_images(str(_tree(tmp_path / "a", "cat/1.png", "dog/2.png")), "evaluation")
    one_class = open_images(str(_tree(tmp_path / "b", "cat/1.png", "cat/2.png")), "evaluation")
    assert images.digest(pets, ["a", "b"]) == images.digest(pets, ["a", "b"])
    assert images.digest(pets, ["a", "b"]) != images.digest(pets, ["b", "a"])
    assert images.digest(pets, ["a", "b"]) != images.digest(one_class, ["a", "b"])


def test_one_class_folder_is_one_class(tmp_path: Path) -> None:
    found = open_images(str(_tree(tmp_path / "a", "cat/1.png", "cat/2.png")), "evaluation")
    assert (found.classes, _labels(found)) == (("cat",), [0, 0])
    root = _tree(tmp_path / "b", "train/cat/1.png", "train/dog/2.png", "val/dog/3.png")
    found = open_images(str(root), "evaluation")
    assert (found.classes, _labels(found)) == (("dog",), [0])
    (tmp_path / "a" / "dog").mkdir()
    assert open_images(str(tmp_path / "a"), "evaluation").classes == ("cat",)


@pytest.mark.parametrize("names", [["val/1.png", "val/2.png"], ["train/0.png", "val/1.png"]])
def test_images_right_in_a_split_have_no_labels(tmp_path: Path, names: list[str]) -> None:
    found = open_images(str(_tree(tmp_path, *names)), "evaluation")
    assert found.classes is None
    assert {name.split("/")[0] for name in _names(found)} == {"val"}
    assert open_images(str(tmp_path), "calibration").classes is None


def test_val_alone_keeps_its_classes_and_excludes_test(tmp_path: Path) -> None:
    found = open_images(str(_tree(tmp_path, "val/cat/1.png", "test/dog/2.png")), "evaluation")
    assert (_names(found), found.classes) == (["val/cat/1.png"], ("cat",))


def test_classes_named_as_splits_are_classes_among_others(tmp_path: Path) -> None:
    root = _tree(tmp_path, "train/1.png", "bus/2.png")
    assert open_images(str(root), "evaluation").classes == ("bus", "train")


def test_names_that_differ_are_told_with_the_way_out(tmp_path: Path) -> None:
    found = open_images(str(_tree(tmp_path, "hund/1.png", "katze/2.png")), "evaluation")
    with pytest.raises(DataError) as caught:
        found.for_model(["cat", "dog"], 2)
    told = str(caught.value)
    assert "unknown to the model: hund, katze; not in the data: cat, dog" in told
    assert "class order" in told
    with pytest.raises(DataError, match="unknown to the model: hund, katze") as caught:
        found.for_model(["cat", "dog", "emu"], 3)
    assert "class order" not in str(caught.value)


def test_an_order_replaces_the_models_names(tmp_path: Path) -> None:
    found = open_images(str(_tree(tmp_path, "hund/1.png", "katze/2.png")), "evaluation")
    assert _labels(found.for_model(["cat", "dog"], 2, ["katze", "hund"])) == [1, 0]
    assert _labels(found.for_model(["cat", "dog", "emu"], 3, ["emu", "katze", "hund"])) == [2, 1]
    with pytest.raises(DataError, match="has 1 names, the model 2 classes; it lacks katze"):
        found.for_model(["cat", "dog"], 2, ["hund"])
    with pytest.raises(DataError, match="has 3 names, the model 2 classes"):
        found.for_model(None, 2, ["hund", "katze", "emu"])
    with pytest.raises(DataError, match="it lacks hund"):
        found.for_model(None, 2, ["katze", "emu"])


def test_a_selection_states_the_class_order(tmp_path: Path) -> None:
    root = _tree(tmp_path / "data", "hund/1.png", "katze/2.png")
    model = Checkpoint(
        path="net", sha256="0", dialect="own", variant="custom", labels=("cat", "dog"),
        architecture=Architecture(depths=(1,), dims=(4,), classes=2),
    )  # fmt: skip
    order = tmp_path / "order.txt"
    order.write_text("katze\nhund\n")

    def labels(class_order: str) -> list[int | None]:
        selection = Selection(
            where=str(root), purpose="evaluation", n=None, seed=0, class_order=class_order
        )
        return _labels(select(selection, model))

    assert labels("sorted") == [0, 1]
    assert labels(str(order)) == [1, 0]
    _tree(tmp_path / "data", "huhn/3.png")
    with pytest.raises(DataError, match="2 names, the model 2 classes; it lacks huhn"):
        labels(str(order))
    with pytest.raises(DataError, match="the class order has 3 names, the model 2 classes"):
        labels("sorted")


def test_a_name_that_two_classes_of_the_model_share_is_refused(tmp_path: Path) -> None:
    found = open_images(str(_tree(tmp_path, "crane/1.png", "ox/2.png")), "evaluation")
    with pytest.raises(DataError, match="several classes named crane"):
        found.for_model(["crane", "ox", "crane"], 3)


def test_a_label_file_labels_a_flat_folder(tmp_path: Path) -> None:
    root = _tree(tmp_path / "data", "val/a.png", "val/b.png", "train/cat/c.png")
    file = tmp_path / "labels.txt"
    file.write_text("b.png dog\na.png cat\n")
    selection = Selection(
        where=str(root), purpose="evaluation", n=None, seed=0, label_file=str(file)
    )
    found = select(selection)
    assert (_names(found), found.classes) == (["val/a.png", "val/b.png"], ("cat", "dog"))
    assert _labels(found) == [0, 1]


def test_numbers_index_the_models_logits(tmp_path: Path) -> None:
    root = _tree(tmp_path / "data", "a.png", "b.png")
    file = tmp_path / "labels.txt"
    file.write_text("a.png 3\nb.png 0\n")
    found = open_images(str(root), "evaluation", str(file))
    assert found.numbered
    assert _labels(found) == [3, 0]
    mapped = found.for_model(["w", "x", "y", "z"], 4)
    assert (_labels(mapped), mapped.classes) == ([3, 0], ("w", "x", "y", "z"))
    assert found.for_model(None, 9).classes == tuple("012345678")
    with pytest.raises(DataError, match="has the label 3, the model 3 classes"):
        found.for_model(None, 3)
    with pytest.raises(DataError, match="numbers its classes"):
        found.for_model(None, 4, ["a", "b", "c", "d"])
    # "3" is the name of the model's class 0: either reading could be meant.
    with pytest.raises(DataError, match="the model's names are other numbers"):
        found.for_model(["3", "2", "1", "0"], 4)
    file.write_text("a.png -1\nb.png 0\n")
    with pytest.raises(DataError, match="labels from -1 to 0"):
        open_images(str(root), "evaluation", str(file))


def test_numbers_in_the_order_of_names_are_not_guessed(tmp_path: Path) -> None:
    for name in map(str, range(12)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (2, 2)).save(tmp_path / name / "a.png")
    found = open_images(str(tmp_path), "evaluation")
    with pytest.raises(DataError, match="the model carries no names"):
        found.for_model(None, 12)
    as_folders = found.for_model(None, 12, tuple(sorted(map(str, range(12)))))
    assert [entry.label for entry in as_folders.entries] == list(range(12))
