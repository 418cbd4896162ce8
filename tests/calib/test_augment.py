"""Training's images: what varies, and that it can be repeated, resumed and divided."""

from __future__ import annotations

import multiprocessing
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from torch.nn import functional

from calib import augment
from calib.augment import batches_per_epoch, crop_box, training_batches
from calib.images import ImageSet, open_images
from calib.preprocess import cropped, preprocess
from calib.sources.base import Unreadable
from pipeline.errors import DataError, MissingRuntimeError, UsageError
from pipeline.records import Augmentation, Preprocessing

COUNT = 26
HOW = Preprocessing(input_size=16)
PLAIN = Augmentation(crop=1, flip=0)
CROPPED = Augmentation(crop=0.3)
ALL = Augmentation(crop=0.3, flip=0.5, colour=0.4, randaugment=2)

Batches = list[tuple[NDArray[np.float32], NDArray[np.int64]]]


@pytest.fixture
def found(tmp_path: Path) -> ImageSet:
    """Noise of several sizes, in two classes."""
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (int(rng.integers(20, 60)), int(rng.integers(20, 60)), 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return open_images(str(tmp_path / "data"), "calibration")


def _epoch(
    images: ImageSet,
    how: Augmentation = ALL,
    *,
    preprocessing: Preprocessing = HOW,
    batch: int = 4,
    seed: int = 3,
    epoch: int = 0,
    start: int = 0,
    share: tuple[int, int] = (0, 1),
    workers: int = 0,
    skipped: set[str] | None = None,
) -> Batches:
    return list(
        training_batches(
            images,
            preprocessing,
            how,
            batch=batch,
            seed=seed,
            epoch=epoch,
            start=start,
            share=share,
            workers=workers,
            skipped=skipped,
        )
    )


def _same(some: Batches, others: Batches) -> bool:
    return len(some) == len(others) and all(
        np.array_equal(a, b) and np.array_equal(x, y)
        for (a, x), (b, y) in zip(some, others, strict=True)
    )


def _levels(root: Path, count: int, *, damaged: tuple[int, ...] = ()) -> ImageSet:
    """Images that are one level of grey all over: their index in the set."""
    root.mkdir(exist_ok=True)
    for i in range(count):
        path = root / f"{i:03d}.png"
        Image.new("RGB", (20, 20), (i, i, i)).save(path)
        if i in damaged:
            path.write_bytes(path.read_bytes()[:40])
    return open_images(str(root), "calibration")


def _indices(batches: Batches) -> list[int]:
    return [int(image[0, 0, 0]) for pixels, _ in batches for image in pixels]


def test_batches_are_what_the_network_takes(found: ImageSet) -> None:
    state = torch.get_rng_state()
    batches = _epoch(found)
    assert (torch.get_rng_state() == state).all()
    assert len(batches) == batches_per_epoch(COUNT, 4) == 6
    for pixels, labels in batches:
        assert pixels.shape == (4, 3, 16, 16)
        assert pixels.dtype == np.float32
        assert pixels.min() >= 0
        assert 200 < pixels.max() <= 255
        assert labels.shape == (4,)
        assert labels.dtype == np.int64


@pytest.mark.parametrize(
    ("n", "batch", "count"), [(26, 4, 6), (24, 4, 6), (4, 4, 1), (3, 4, 1), (7, 4, 1), (0, 4, 0)]
)
def test_the_last_incomplete_batch_is_dropped(n: int, batch: int, count: int) -> None:
    assert batches_per_epoch(n, batch) == count


def test_a_set_smaller_than_a_batch_is_one(tmp_path: Path) -> None:
    batches = _epoch(_levels(tmp_path / "few", 5), PLAIN, batch=8)
    assert len(batches) == 1
    assert sorted(_indices(batches)) == list(range(5))


def test_an_epoch_shows_each_image_once_and_its_label(found: ImageSet) -> None:
    """Without augmentation, that is `preprocess`, in another order."""
    expected = {
        preprocess(found.read(entry), entry.name, HOW).tobytes(): entry.label
        for entry in found.entries
    }
    assert len(expected) == COUNT
    assert set(expected.values()) == {0, 1}
    shown = [
        (image.tobytes(), int(label))
        for pixels, labels in _epoch(found, PLAIN)
        for image, label in zip(pixels, labels, strict=True)
    ]
    assert len({image for image, _ in shown}) == len(shown) == 24
    assert all(expected[image] == label for image, label in shown)


def test_without_antialias_too_it_is_the_preprocessing(found: ImageSet) -> None:
    how = replace(HOW, antialias=False)
    expected = {preprocess(found.read(e), e.name, how).tobytes() for e in found.entries}
    assert {
        i.tobytes() for pixels, _ in _epoch(found, PLAIN, preprocessing=how) for i in pixels
    } < (expected)


def test_the_same_seed_gives_the_same_pixels_and_another_does_not(found: ImageSet) -> None:
    first = _epoch(found)
    torch.manual_seed(99)
    assert _same(first, _epoch(found))
    assert not _same(first, _epoch(found, seed=4))
    assert not _same(first, _epoch(found, seed=-3))


def test_another_epoch_has_another_order_and_other_draws(tmp_path: Path, found: ImageSet) -> None:
    levels = _levels(tmp_path / "levels", 40)
    orders = [_indices(_epoch(levels, PLAIN, epoch=epoch)) for epoch in range(3)]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert list(range(40)) not in orders
    only = replace(found, entries=found.entries[:1])
    drawn = [_epoch(only, replace(CROPPED, flip=0), epoch=epoch) for epoch in range(3)]
    assert not _same(drawn[0], drawn[1])
    assert not _same(drawn[1], drawn[2])


def test_images_of_an_epoch_are_drawn_for_each_alone(found: ImageSet) -> None:
    """The same image at twenty places looks different at each."""
    twenty = replace(found, entries=found.entries[:1] * 20)
    for how in (CROPPED, Augmentation(crop=1, flip=0, colour=0.3)):
        images = {i.tobytes() for pixels, _ in _epoch(twenty, how) for i in pixels}
        assert len(images) == 20
    kinds = _epoch(twenty, replace(PLAIN, randaugment=1))
    assert len({i.tobytes() for pixels, _ in kinds for i in pixels}) > 5


@pytest.mark.parametrize("start", [0, 2, 6])
def test_what_is_behind_is_left_out(found: ImageSet, start: int) -> None:
    assert _same(_epoch(found, start=start), _epoch(found)[start:])


def test_what_is_behind_is_not_read(tmp_path: Path) -> None:
    levels = _levels(tmp_path / "levels", 12)
    whole = _epoch(levels, PLAIN)
    for index in _indices(whole[:2]):
        (tmp_path / "levels" / f"{index:03d}.png").unlink()
    assert _same(_epoch(levels, PLAIN, start=2), whole[2:])


@pytest.mark.parametrize("how", [ALL, CROPPED], ids=["all", "cropped"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_shares_are_the_whole(found: ImageSet, how: Augmentation, ranks: int) -> None:
    parts = [_epoch(found, how, share=(rank, ranks), start=1) for rank in range(ranks)]
    assert all(len(pixels) == 4 // ranks for part in parts for pixels, _ in part)
    whole = [
        (np.concatenate([p for p, _ in batch]), np.concatenate([label for _, label in batch]))
        for batch in zip(*parts, strict=True)
    ]
    assert _same(whole, _epoch(found, how, start=1))


@pytest.mark.parametrize(("count", "batch", "got"), [(9, 5, 5), (3, 4, 3)])
def test_a_batch_that_cannot_be_divided_is_refused(
    tmp_path: Path, count: int, batch: int, got: int
) -> None:
    levels = _levels(tmp_path / "levels", count)
    with pytest.raises(UsageError, match=f"batches of {got} images among 2 processes"):
        _epoch(levels, batch=batch, share=(1, 2))


def test_it_is_what_decoding_here_gives(tmp_path: Path, found: ImageSet) -> None:
    damaged = tmp_path / "data" / "a" / "06.png"
    damaged.write_bytes(damaged.read_bytes()[:100])
    here, ahead = set[str](), set[str]()
    assert _same(_epoch(found, skipped=here), _epoch(found, workers=1, skipped=ahead))
    assert here == ahead == {"a/06.png"}


def test_errors_cross_from_the_process_and_processes_end(tmp_path: Path) -> None:
    levels = _levels(tmp_path / "levels", 8, damaged=(5,))
    batches = training_batches(
        levels, HOW, PLAIN, batch=2, seed=0, epoch=0, workers=1, skipped=None
    )
    with pytest.raises(DataError, match=r"005\.png is not a readable image") as caught:
        list(batches)
    assert type(caught.value) is DataError
    for process in multiprocessing.active_children():
        process.join(10)
        assert not process.is_alive()


def test_unreadable_images_are_replaced_by_the_next_and_named(tmp_path: Path) -> None:
    levels = _levels(tmp_path / "levels", 12, damaged=(3, 4, 11))
    skipped: set[str] = set()
    indices = _indices(_epoch(levels, PLAIN, skipped=skipped))
    assert Counter(indices) == Counter([0, 0, 1, 2, 5, 5, 5, 6, 7, 8, 9, 10])
    assert skipped == {"003.png", "004.png", "011.png"}
    whole = _indices(_epoch(_levels(tmp_path / "sound", 12), PLAIN))
    instead = {3: 5, 4: 5, 11: 0}
    assert indices == [instead.get(index, index) for index in whole]
    with pytest.raises(DataError, match="is not a readable image") as caught:
        _epoch(levels, PLAIN)
    assert not isinstance(caught.value, Unreadable)


def test_a_replacement_has_its_own_label(found: ImageSet, tmp_path: Path) -> None:
    damaged = tmp_path / "data" / "a" / "24.png"  # The last of its class.
    damaged.write_bytes(b"")
    for seed in range(3):
        _, labels = _epoch(found, batch=COUNT, seed=seed, skipped=set())[0]
        assert Counter(labels.tolist()) == {0: 12, 1: 14}


@pytest.mark.parametrize("damaged", [tuple(range(7)), (0, 2, 4, 6)])
def test_a_set_that_is_mostly_unreadable_is_refused(
    tmp_path: Path, damaged: tuple[int, ...]
) -> None:
    levels = _levels(tmp_path / "levels", 7, damaged=damaged)
    with pytest.raises(DataError, match="more than half of 7 images are unreadable"):
        _epoch(levels, batch=7, skipped=set())
    one = replace(levels, entries=levels.entries[:1])
    with pytest.raises(DataError, match=r"more than half of 1 images are unreadable, as 000\.png"):
        _epoch(one, skipped=set())


def test_half_of_a_set_unreadable_is_not_more_than_half(tmp_path: Path) -> None:
    levels = _levels(tmp_path / "levels", 8, damaged=(0, 1, 2, 3))
    assert Counter(_indices(_epoch(levels, PLAIN, skipped=set()))) == {4: 5, 5: 1, 6: 1, 7: 1}


def test_images_without_labels_have_minus_one(tmp_path: Path) -> None:
    (_, labels), *_ = _epoch(_levels(tmp_path / "levels", 4))
    assert labels.tolist() == [-1] * 4


@pytest.mark.parametrize("antialias", [True, False])
def test_grey_is_one_channel(found: ImageSet, *, antialias: bool) -> None:
    grey = Preprocessing(input_size=16, antialias=antialias, mean=(0.5,), std=(0.5,))
    plain = _epoch(found, PLAIN, preprocessing=grey)
    assert plain[0][0].shape == (4, 1, 16, 16)
    expected = {preprocess(found.read(e), e.name, grey).tobytes() for e in found.entries}
    assert {image.tobytes() for pixels, _ in plain for image in pixels} < expected
    varied = _epoch(found, replace(ALL, randaugment=15), preprocessing=grey)
    assert varied[0][0].shape == (4, 1, 16, 16)
    assert not _same(plain, varied)


def test_the_stated_share_is_mirrored(tmp_path: Path) -> None:
    """Of 1200 images 0.3, give or take 0.053 (four standard deviations)."""
    root = tmp_path / "one"
    root.mkdir()
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(image).save(root / "0.png")
    one = open_images(str(root), "calibration")
    images = replace(one, entries=one.entries * 40)
    plain = preprocess(images.read(images.entries[0]), "0.png", HOW)
    for share in (0.0, 0.3, 1.0):
        how = Augmentation(crop=1, flip=share)
        shown = [
            image
            for epoch in range(30)
            for pixels, _ in _epoch(images, how, epoch=epoch)
            for image in pixels
        ]
        straight = sum(bool((image == plain).all()) for image in shown)
        mirrored = sum(bool((image == plain[:, :, ::-1]).all()) for image in shown)
        assert straight + mirrored == len(shown) == 1200
        assert mirrored / 1200 == pytest.approx(share, abs=0.053 if share == 0.3 else 0)


def _part_of(box: tuple[int, int, int, int]) -> tuple[int, int]:
    left, top, right, bottom = box
    return right - left, bottom - top


@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    least=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=300, deadline=None)
def test_a_part_stays_within_the_image(width: int, height: int, least: float, seed: int) -> None:
    box = crop_box(width, height, least, np.random.default_rng(seed))
    left, top, right, bottom = box
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    across, down = _part_of(box)
    # Sides are rounded; only a part that is as small as a pixel is less square for it.
    assert (across - 0.5) / (down + 0.5) <= 4 / 3
    assert (across + 0.5) / (down - 0.5) >= 3 / 4


@given(
    width=st.integers(100, 130),
    height=st.integers(100, 130),
    least=st.floats(0.05, 0.7),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=300, deadline=None)
def test_a_part_has_the_stated_area(width: int, height: int, least: float, seed: int) -> None:
    across, down = _part_of(crop_box(width, height, least, np.random.default_rng(seed)))
    assert (across + 0.5) * (down + 0.5) >= least * width * height


def test_parts_are_of_all_areas_ratios_and_places() -> None:
    rng = np.random.default_rng(0)
    boxes = [crop_box(1000, 1000, 0.2, rng) for _ in range(2000)]
    sides = [_part_of(box) for box in boxes]
    areas = np.array([across * down for across, down in sides]) / 1e6
    assert areas.min() == pytest.approx(0.2, abs=0.02)
    # Above 0.75 not all ratios fit; below, areas are evenly distributed.
    assert areas.max() > 0.95
    assert np.median(areas[areas < 0.75]) == pytest.approx(0.475, abs=0.03)
    ratios = np.log([across / down for across, down in sides])
    assert np.exp(ratios.max()) == pytest.approx(4 / 3, abs=0.02)
    assert np.exp(ratios.min()) == pytest.approx(3 / 4, abs=0.02)
    assert abs(ratios.mean()) < 0.02
    # Where the part lies, as a share of where it could: only what leaves ten pixels says that.
    lefts = np.array([b[0] / (1000 - w) for b, (w, _) in zip(boxes, sides, strict=True) if w < 990])
    tops = np.array([b[1] / (1000 - h) for b, (_, h) in zip(boxes, sides, strict=True) if h < 990])
    for places in (lefts, tops):
        assert places.mean() == pytest.approx(0.5, abs=0.03)
        assert places.min() == 0
        assert places.max() == 1


def test_where_no_part_fits_it_is_the_centre() -> None:
    rng = np.random.default_rng(0)
    assert crop_box(900, 30, 0.7, rng) == (430, 0, 470, 30)
    assert crop_box(30, 900, 0.7, rng) == (0, 430, 30, 470)
    assert crop_box(1, 1, 0.0, rng) == (0, 0, 1, 1)


def test_a_part_is_resized_as_the_preprocessing_says() -> None:
    rng = np.random.default_rng(1)
    array = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image, box = Image.fromarray(array), (11, 3, 50, 33)
    smooth = cropped(image, box, replace(HOW, interpolation="bilinear"))
    expected = image.resize((16, 16), Image.Resampling.BILINEAR, box=box)
    assert (smooth == np.asarray(expected).transpose(2, 0, 1)).all()
    part = torch.from_numpy(array[3:33, 11:50]).permute(2, 0, 1)[None].float()
    for mode in ("bilinear", "bicubic"):
        sharp = cropped(image, box, replace(HOW, interpolation=mode, antialias=False))
        whole = functional.interpolate(part, (16, 16), mode=mode, align_corners=False)
        assert (sharp == whole[0].clamp(0, 255).numpy()).all()
        assert sharp.flags["C_CONTIGUOUS"]


def test_a_random_part_is_shown_and_not_the_centre_alone(tmp_path: Path) -> None:
    """Of an image whose pixels say where they are, the part has about the stated area."""
    root = tmp_path / "ramp"
    root.mkdir()
    ramp = np.zeros((200, 200, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(200), np.arange(200)[:, None]
    for i in range(60):
        Image.fromarray(ramp).save(root / f"{i:02d}.png")
    images = open_images(str(root), "calibration")
    how = Preprocessing(input_size=50, interpolation="bilinear")
    pixels = np.concatenate(
        [p for p, _ in _epoch(images, replace(CROPPED, flip=0), preprocessing=how)]
    )
    across = (pixels[:, 0, 0, -1] - pixels[:, 0, 0, 0]) * 50 / 49
    down = (pixels[:, 1, -1, 0] - pixels[:, 1, 0, 0]) * 50 / 49
    areas = across * down / 200**2
    assert areas.min() > 0.28
    assert areas.max() < 1.02
    assert areas.std() > 0.1
    assert pixels[:, 0, 0, 0].std() > 10
    assert pixels[:, 1, 0, 0].std() > 10


def test_brightness_moves_as_far_as_stated(tmp_path: Path) -> None:
    levels = _levels(tmp_path / "levels", 200)
    dark = replace(levels, entries=levels.entries[100:101] * 200)
    how = Augmentation(crop=1, flip=0, colour=0.2)
    # One level all over has neither contrast nor saturation: only brightness shows.
    bright = np.concatenate([p for p, _ in _epoch(dark, how)])[:, 0, 0, 0]
    assert bright.min() == pytest.approx(80, abs=1)
    assert bright.max() == pytest.approx(120, abs=1)
    assert bright.mean() == pytest.approx(100, abs=4)


def test_contrast_and_saturation_by_hand() -> None:
    image = np.array([[[100, 120]], [[100, 120]], [[100, 120]]], np.float32)
    assert augment._coloured(image, 1.0, 1.5, 1.0)[0].ravel().tolist() == pytest.approx([95, 125])
    assert augment._coloured(image, 1.0, 1.0, 0.5) == pytest.approx(image, abs=1e-3)
    assert augment._coloured(image, 3.0, 1.0, 1.0).max() == 255
    # 100 and 60 become 300 and 180: white is white before the contrast.
    bright = np.array([[[100, 60]]] * 3, np.float32)
    assert augment._coloured(bright, 3.0, 0.5, 1.0)[0, 0] == pytest.approx([236.25, 198.75])
    red = np.array([200, 0, 0], np.float32).reshape(3, 1, 1)
    grey = 0.299 * 200
    half = augment._coloured(red, 1.0, 1.0, 0.5).ravel()
    assert half == pytest.approx([(200 + grey) / 2, grey / 2, grey / 2])
    assert half.dtype == np.float32


def test_operations_are_drawn_by_the_images_seed_and_see_its_whole_range() -> None:
    """One of them is known by what it leaves: the negative."""
    pixels = np.linspace(0, 255, 3 * 16 * 16, dtype=np.float32).reshape(3, 16, 16)
    found = [
        augment._randaugmented(pixels, Augmentation(randaugment=1), seed) for seed in range(60)
    ]
    inverted = sum(bool(np.allclose(one, 255 - pixels, atol=1e-3)) for one in found)
    assert 1 <= inverted <= 12
    assert len({one.tobytes() for one in found}) >= 12
    assert all(one.min() >= 0 and one.max() <= 255 for one in found)


def test_the_magnitude_and_the_number_of_operations_are_used(found: ImageSet) -> None:
    once, strong, often = (
        _epoch(found, replace(PLAIN, randaugment=operations, magnitude=magnitude))
        for operations, magnitude in ((1, 9), (1, 29), (3, 9))
    )
    assert not _same(once, strong)
    assert not _same(once, often)


@pytest.mark.parametrize("magnitude", [0, 30])
def test_a_magnitude_that_kornia_does_not_take_is_refused(magnitude: int) -> None:
    with pytest.raises(ValidationError, match="magnitude"):
        replace(ALL, magnitude=magnitude)


def test_without_kornia_its_extra_is_named(
    found: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    augment._randaugment.cache_clear()
    monkeypatch.setitem(sys.modules, "kornia.augmentation.auto", None)
    with pytest.raises(MissingRuntimeError, match=r"pip install 'convnext-edge\[train\]'"):
        _epoch(found)
    assert _epoch(found, CROPPED)
