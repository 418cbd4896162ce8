"""What a person sees while a run goes on.

In: stages that begin, advance and end. Out: progress bars on a terminal, plain lines elsewhere.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from pipeline.records import Preprocessing
    from pipeline.worker import Progress as Callback
    from reports.document import DataSource

SHOWN = 5
"""How many names a line shows before it only counts."""


class Display:
    """A live list of the stages at work; finished ones stay as lines above it."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, emoji=False)
        self._lock = threading.Lock()
        self._found: dict[str, None] = {}
        self._bars = Progress(
            TextColumn("[cyan]{task.description:<24}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=self.console,
            transient=True,
        )

    def __enter__(self) -> Self:
        """Start the live part."""
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the live part."""
        self._say_reused()
        self._bars.stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[Callback]:
        """Show a stage while the block runs; give what the block reports its progress to."""
        with self._lock:
            task = self._bars.add_task(name, total=None, note="")
        started = time.monotonic()

        def advance(done: int, total: int, note: str = "") -> None:
            self._bars.update(task, completed=done, total=total, note=note)

        try:
            yield advance
        finally:
            self._bars.remove_task(task)
        self._say_reused()
        self.console.print(f"  {name:<24} {time.monotonic() - started:6.1f} s", highlight=False)

    def reused(self, name: str) -> None:
        """Say that a stage was found finished: in one line with those found next to it."""
        with self._lock:
            self._found.setdefault(name)

    def _say_reused(self) -> None:
        with self._lock:
            names, self._found = ", ".join(self._found), {}
        if names:
            self.console.print(f"  [dim]reused: {escape(names)}[/]", highlight=False)

    def note(self, text: str) -> None:
        """Say something that does not stop the run."""
        self._say_reused()
        self.console.print(f"  {text}", highlight=False)

    def preprocessing(self, how: Preprocessing, source: str | None) -> None:
        """Say how images are prepared, and which file said so."""
        fit = (
            "squashed"
            if how.crop_mode == "squash"
            else f"shorter side to {how.shorter_side}, centre crop"
        )
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (how.mean, how.std))
        self.note(
            f"preprocessing ({escape(source or 'defaults')}): {how.input_size} px, "
            f"{how.interpolation}{'' if how.antialias else ' without antialias'}, {fit}, "
            f"mean {mean}, std {std}"
        )

    def skipped(self, source: DataSource) -> None:
        """Name the images that could not be decoded, where there are any."""
        if not source.skipped:
            return
        shown = ", ".join(source.skipped[:SHOWN])
        more = f" and {len(source.skipped) - SHOWN} more" if len(source.skipped) > SHOWN else ""
        self.note(
            f"[yellow]skipped:[/] {len(source.skipped)} of {source.n} images of "
            f"{escape(f'{source.source}: {shown}{more}')}"
        )
