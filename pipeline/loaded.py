"""What the checkpoint stage leaves in its folder, as far as it is no tensor.

In: the folder. Out: the `Checkpoint`. `pipeline.checkpoint` has the rest, and needs torch for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from pipeline.records import Checkpoint

if TYPE_CHECKING:
    from pathlib import Path

RECORD, TENSORS = "checkpoint.json", "tensors.safetensors"


def read_record(folder: Path) -> Checkpoint:
    """Read the record alone."""
    return TypeAdapter(Checkpoint).validate_json((folder / RECORD).read_bytes())
