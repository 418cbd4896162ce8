"""How a stage is done: found in the store, or made by a worker and kept.

In: a `Stage` and the function that makes it. Out: a `Done`: its folder, its result, what it cost.
A stage's function takes JSON and a folder, writes files into it and returns JSON; the result is
kept beside the files.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.distributed import announce
from pipeline.store import Stage, Store
from pipeline.worker import NOTHING, Worker, end_all, ending

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from pipeline.display import Display
    from pipeline.worker import Progress

RESULT, STAGES = "result.json", "stages"

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A finished stage: its files, what its function returned, and what that cost."""

    folder: Path
    value: Any
    seconds: float
    peak_memory_bytes: int


class Stages:
    """The stages of one run folder.

    Args:
        out: The run folder.
        display: Where progress is shown.
        cores: How many stages may run side by side.
        beside: Another run folder, whose finished stages count as well; None for none.
    """

    def __init__(
        self, out: Path, display: Display, *, cores: int, beside: Path | None = None
    ) -> None:
        self.out = out
        self.display = display
        self.cores = cores
        self.store = Store(out / STAGES, beside and beside / STAGES)

    def worker(
        self, name: str, patience: float = 0.0, environment: Mapping[str, str] = NOTHING
    ) -> Worker:
        """Return a worker that logs under this name; it starts at its first call."""
        return Worker(self.out / "logs" / f"{name}.log", patience, environment)

    def finished(self, stage: Stage) -> Path | None:
        """Return the folder of a stage; None where it is not finished."""
        return self.store.find(stage)

    def is_done(self, stage: Stage) -> bool:
        """Tell whether a stage is finished."""
        return self.finished(stage) is not None

    def do(
        self,
        stage: Stage,
        function: str,
        *,
        worker: Worker | None = None,
        shared: bool = False,
        anew: bool = False,
        **arguments: object,
    ) -> Done:
        """Return a finished stage, made now where it is missing.

        Args:
            stage: What it depends on.
            function: `module:function`, called in a worker with the arguments, `folder` and
                `progress`.
            shared: Whether the processes that torchrun started divide its images; the function
                then takes `call` too, for `pipeline.distributed.group`.
            worker: To share one process between stages; None starts one for this stage.
            anew: Whether it is made now in any case.
            **arguments: JSON values.

        Raises:
            EdgeError: As the function raised it; nothing is kept of the stage.
        """

        def make(folder: Path, progress: Progress) -> None:
            with ExitStack() as stack:
                hand = worker or stack.enter_context(self.worker(stage.name))
                if shared:
                    arguments["call"] = announce(function, arguments)
                reply = hand.call(function, progress=progress, folder=str(folder), **arguments)
            (folder / RESULT).write_text(json.dumps(asdict(reply), indent=1))

        folder = self.do_here(stage, make, anew=anew)
        return Done(folder=folder, **json.loads((folder / RESULT).read_text()))

    def do_here(
        self, stage: Stage, make: Callable[[Path, Progress], None], *, anew: bool = False
    ) -> Path:
        """Return a finished stage's folder, filled by `make`, here, where it is missing."""

        def shown(folder: Path) -> None:
            with self.display.stage(stage.name) as progress:
                make(folder, progress)

        if not anew and self.is_done(stage):
            self.display.reused(stage.name)
        return self.store.get(stage, shown, anew=anew)

    def side_by_side(
        self, function: Callable[[_Item], _Result], items: Sequence[_Item]
    ) -> list[_Result]:
        """Apply a function to every item, as many at a time as there are cores, in order."""
        pool = ThreadPoolExecutor(max_workers=self.cores)
        try:
            return list(pool.map(function, items))
        except BaseException:
            # Ctrl-C included: the threads wait for workers, which know nothing of it.
            end_all()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            ending.clear()  # nothing is left that should see it
