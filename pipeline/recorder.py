"""A training's metrics, written down as they come.

In: a folder, and a line of figures every few updates. Out: metrics.jsonl, a line of JSON each, and
TensorBoard's event files where TensorBoard is installed.
"""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING, Any

from pipeline.store import write_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

METRICS, EVENTS = "metrics.jsonl", "tensorboard"
CHECKPOINT = "checkpoint.pt"
"""What an unfinished training goes on from; it lies beside its metrics."""


class Recorder:
    """Writes the metrics of one training.

    Args:
        folder: Takes metrics.jsonl and tensorboard/.
        before: Lines of the part that this one goes on from; what was written behind it is
            taken back.
    """

    def __init__(self, folder: Path, before: Sequence[dict[str, Any]]) -> None:
        self.path = folder / METRICS
        write_atomic(self.path, "".join(map(_line, before)).encode())
        self.events: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            step = before[-1]["step"] + 1 if before else 0
            self.events = SummaryWriter(str(folder / EVENTS), purge_step=step)

    def add(self, line: dict[str, Any]) -> None:
        """Write one line of figures; `step` says which."""
        with self.path.open("a") as file:
            file.write(_line(line))
        if self.events is not None:
            for name, value in line.items():
                if name != "step" and value is not None:
                    self.events.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Write what TensorBoard still holds."""
        if self.events is not None:
            self.events.close()


def _line(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n"
