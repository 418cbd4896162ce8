"""What a .json beside a checkpoint says: preprocessing and class names.

In: the checkpoint's path. Out: the settings that its sidecar holds, as far as it holds them. Known
keys: input_size, crop_ratio, interpolation, antialias, mean, std, classes; and `resize`, a sentence
such as "bilinear from 32 to 64, no antialias; no crop", read for its words.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from pipeline.errors import CheckpointError
from pipeline.records import Preprocessing

if TYPE_CHECKING:
    from pathlib import Path

DEFAULT_INPUT_SIZE = 224
INTERPOLATIONS = ("bilinear", "bicubic", "nearest")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """Preprocessing settings by name, and class names where they are stated."""

    preprocessing: dict[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None


def read_sidecar(checkpoint: Path) -> Sidecar:
    """Read the .json with the checkpoint's name, where there is one.

    Raises:
        CheckpointError: It is not a JSON object.
    """
    path = checkpoint.with_suffix(".json")
    if not path.is_file():
        return Sidecar()
    try:
        stated = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise _unusable(path, str(error)) from error
    if not isinstance(stated, dict):
        raise _unusable(path, f"it holds a {type(stated).__name__}")
    known = {item.name for item in fields(Preprocessing)}
    settings = _from_sentence(str(stated.get("resize", "")))
    settings |= {name: value for name, value in stated.items() if name in known}
    labels = stated.get("classes")
    return Sidecar(
        preprocessing=settings,
        labels=tuple(map(str, labels)) if isinstance(labels, list) else None,
    )


def _from_sentence(sentence: str) -> dict[str, Any]:
    words = sentence.lower()
    found: dict[str, Any] = {}
    positions = {name: words.find(name) for name in INTERPOLATIONS if name in words}
    if positions:
        found["interpolation"] = min(positions, key=positions.__getitem__)
    if "antialias" in words:
        found["antialias"] = not re.search(r"\b(no|without) antialias", words)
    if re.search(r"\b(no|without) crop", words):
        found["crop_ratio"] = 1.0
    return found


def _unusable(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"the sidecar {path} cannot be used ({why})",
        allowed="a JSON object with preprocessing and classes",
        do="Correct or move the file",
    )
