"""Decoding ahead in other processes gives what decoding here gives."""

from __future__ import annotations

import multiprocessing
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from calib.batches import batches
from calib.images import ImageSet, open_images
from pipeline.errors import DataError, WorkerError
from pipeline.records import Preprocessing

HOW = Preprocessing(input_size=16)
COUNT = 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    for i in range(COUNT):
        path = root / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (int(rng.integers(9, 60)), int(rng.integers(9, 60)), 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(path)
    for damaged in ("a/06.png", "b/15.png"):
        path = root / damaged
        path.write_bytes(path.read_bytes()[:100])
    return root


def _packed(root: Path, kind: str) -> Path:
    files = sorted(root.rglob("*.png"))
    path = root.parent / f"data.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as zipped:
            for file in files:
                zipped.write(file, file.relative_to(root))
    else:
        with tarfile.open(path, "w") as tar:
            for file in files:
                tar.add(file, file.relative_to(root))
    return path


def _all(
    images: ImageSet, workers: int, batch: int = 7
) -> tuple[list[str], list[list[str]], list[np.ndarray]]:
    skipped: list[str] = []
    parts = list(batches(images, HOW, batch, workers=workers, skipped=skipped))
    names = [[entry.name for entry in entries] for entries, _ in parts]
    return skipped, names, [pixels for _, pixels in parts]


@pytest.mark.parametrize(("kind", "workers"), [("folder", 1), ("zip", 2), ("tar", 2)])
def test_it_is_what_decoding_here_gives(folder: Path, kind: str, workers: int) -> None:
    place = folder if kind == "folder" else _packed(folder, kind)
    found = open_images(str(place), "calibration").sample(35, 1)
    # Threads have run, and the source's file is open, before any process starts.
    torch.ones(300, 300) @ torch.ones(300, 300)
    here = _all(found, 0)
    state = torch.get_rng_state()
    ahead = _all(found, workers)
    assert (torch.get_rng_state() == state).all()
    assert here[0]
    assert ahead[:2] == here[:2]
    assert all((a == b).all() for a, b in zip(ahead[2], here[2], strict=True))


def test_errors_cross_from_the_process_as_they_are(folder: Path) -> None:
    found = open_images(str(folder), "calibration")
    with pytest.raises(DataError, match=r"a/06\.png is not a readable image"):
        list(batches(found, HOW, 4, workers=1))
    (folder / "a" / "02.png").unlink()
    with pytest.raises(DataError, match=r"a/02\.png cannot be read") as caught:
        list(batches(found, HOW, 4, workers=1, skipped=[]))
    assert type(caught.value) is DataError


def test_a_process_that_dies_is_one_line(folder: Path) -> None:
    found = open_images(str(folder), "calibration")
    parts = batches(found, HOW, 1, workers=1, skipped=[])
    next(parts)
    for process in multiprocessing.active_children():
        process.kill()
    with pytest.raises(WorkerError, match="a process that decodes images died"):
        list(parts)


def test_processes_end_with_who_reads_them(folder: Path) -> None:
    found = open_images(str(folder), "calibration")
    parts = batches(found, HOW, 1, workers=1)
    next(parts)
    started = multiprocessing.active_children()
    assert started
    parts.close()  # type: ignore[attr-defined]
    for process in started:
        process.join(10)
        assert not process.is_alive()
