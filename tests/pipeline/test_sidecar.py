"""What is taken from the .json beside a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import pipeline.embedded
from pipeline.errors import CheckpointError
from pipeline.sidecar import Sidecar, read_sidecar


def _read(folder: Path, content: Any) -> Sidecar:
    (folder / "net.json").write_text(json.dumps(content))
    return read_sidecar(folder / "net.safetensors")


def test_without_a_sidecar_nothing_is_stated(tmp_path: Path) -> None:
    sidecar = read_sidecar(tmp_path / "net.pth")
    assert sidecar == Sidecar()
    assert sidecar.labels is None


def test_known_keys_are_taken_and_others_left(tmp_path: Path) -> None:
    sidecar = _read(
        tmp_path,
        {"input_size": 64, "mean": [0.1, 0.2, 0.3], "classes": ["cat", 7], "epochs": 90},
    )
    assert sidecar.preprocessing == {"input_size": 64, "mean": [0.1, 0.2, 0.3]}
    assert sidecar.labels == ("cat", "7")


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        (
            "bilinear from 32 to 64, no antialias; no crop",
            {"interpolation": "bilinear", "antialias": False, "crop_ratio": 1.0},
        ),
        ("Bicubic with antialias", {"interpolation": "bicubic", "antialias": True}),
        ("nearest, not bilinear", {"interpolation": "nearest"}),
        ("without antialiasing, without crop", {"antialias": False, "crop_ratio": 1.0}),
        ("to 64 somehow", {}),
    ],
)
def test_a_sentence_is_read_for_its_words(
    tmp_path: Path, sentence: str, expected: dict[str, Any]
) -> None:
    assert _read(tmp_path, {"resize": sentence}).preprocessing == expected


def test_a_stated_key_wins_over_the_sentence(tmp_path: Path) -> None:
    sidecar = _read(tmp_path, {"resize": "bilinear, no crop", "crop_ratio": 0.9})
    assert sidecar.preprocessing == {"interpolation": "bilinear", "crop_ratio": 0.9}


@pytest.mark.parametrize("text", ["{", "[1, 2]", "3", ""])
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "net.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"net\.json cannot be used"):
        read_sidecar(tmp_path / "net.pth")


def test_classes_that_are_no_list_are_left(tmp_path: Path) -> None:
    assert _read(tmp_path, {"classes": 10}).labels is None


def test_the_embedded_sidecar_names_ten_digits() -> None:
    folder = Path(pipeline.embedded.__file__).parent
    sidecar = read_sidecar(folder / "digits.safetensors")
    assert sidecar.labels == tuple("0123456789")
    assert sidecar.preprocessing["input_size"] == 32
