"""Work shared between the processes that torchrun starts.

In: `RANK`, `WORLD_SIZE` and the rendezvous that torchrun puts into the environment. Out: a `Group`
for the stages whose images can be divided. Rank 0 runs the pipeline as ever; the other ranks serve:
rank 0 announces a stage, all ranks call its function, each takes its shard of the images, and what
they found is gathered. Where torchrun is not used, a group is this one process.

    torchrun --nproc-per-node 2 -m pipeline.cli run --data FOLDER ...
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import EdgeError, WorkerError
from pipeline.worker import silent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch.distributed.distributed_c10d import Store

_Result = TypeVar("_Result")
_Item = TypeVar("_Item")

PATIENCE = timedelta(hours=24)
"""How long ranks wait for each other: a stage over a large data set takes as long as it takes."""
END = "end"
POLL_SECONDS = 0.05
TORCHRUN = frozenset(["TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"])
"""What torchrun puts into the environment of its processes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The processes that share a stage; alone, rank 0 of 1."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes what the group found."""
        return self.rank == 0

    def shard(self, items: Sequence[_Item]) -> Sequence[_Item]:
        """Return this rank's part: contiguous, so that parts in order of rank are the whole."""
        bounds = [len(items) * rank // self.size for rank in (self.rank, self.rank + 1)]
        return items[bounds[0] : bounds[1]]

    def gather(self, work: Callable[[], _Result]) -> list[_Result]:
        """Do this rank's work and return what every rank found, in order of rank.

        Args:
            work: All that can fail on one rank and not on another, reading included: a rank that
                failed elsewhere would leave the others waiting. Its result must be picklable.

        Raises:
            EdgeError: As the first rank that failed raised it, on every rank.
            WorkerError: A rank failed otherwise.
        """
        if self.size == 1:
            return [work()]
        from torch import distributed as dist

        try:
            mine: tuple[_Result | None, EdgeError | None] = (work(), None)
        except EdgeError as error:
            mine = (None, error)
        except Exception as error:  # noqa: BLE001 - the process boundary: no rank may wait for ever
            traceback.print_exc()
            mine = (None, _crashed(self.rank, error))
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, mine)
        for _, failure in every:
            if failure is not None:
                raise failure
        return [result for result, _ in every]

    def of_leader(self, work: Callable[[], _Result]) -> _Result:
        """Do work on rank 0 and return its result on every rank.

        Raises:
            EdgeError: As of `gather`.
        """
        found: list[Any] = [None]

        def led() -> None:
            if self.leads:
                found[0] = work()

        self.gather(led)
        if self.size > 1:
            from torch import distributed as dist

            dist.broadcast_object_list(found, src=0)
        result: _Result = found[0]
        return result


def world_size() -> int:
    """Return how many processes torchrun started; 1 without it.

    RANK and WORLD_SIZE alone do not count: clusters set them for other purposes.
    """
    return int(os.environ["WORLD_SIZE"]) if os.environ.keys() >= TORCHRUN else 1


def rank() -> int:
    """Return which of them this one is."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def ranks_here() -> int:
    """Return how many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size() > 1 else 1


@contextlib.contextmanager
def group(call: int | None, *, training: bool = False) -> Iterator[Group]:
    """Join the processes that share one announced stage.

    Args:
        call: The number that `announce` gave it; None where nobody else takes part.
        training: Whether gradients are exchanged.

    Yields:
        The group, on gloo: what is gathered are objects, and inference runs on CPUs. Gradients on
        GPUs are exchanged over NCCL.
    """
    if call is None:
        yield Group()
        return
    from torch import cuda
    from torch import distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore

    # Every stage has its own keys: a process takes part in many groups, one after the other.
    store = PrefixStore(f"stage/{call}", _rendezvous())
    dist.init_process_group(
        # Two processes on one GPU are none of NCCL's.
        "cpu:gloo,cuda:nccl" if training and ranks_here() <= cuda.device_count() else "gloo",
        store=store,
        rank=rank(),
        world_size=world_size(),
        timeout=PATIENCE,
    )
    try:
        yield Group(rank=rank(), size=world_size())
    finally:
        dist.destroy_process_group()


def announce(function: str, arguments: dict[str, Any]) -> int | None:
    """Have every other rank call `module:function`; rank 0 does so itself.

    Returns:
        The call's number, for `group`; None where torchrun is not used.
    """
    if world_size() == 1:
        return None
    return _tell({"function": function, "arguments": arguments})


def release() -> None:
    """Let the other ranks go."""
    if world_size() > 1:
        _tell(END)


def _tell(message: object) -> int:
    store = _rendezvous()
    call = int(store.add("calls", 1)) - 1
    store.set(f"call/{call}", json.dumps(message))
    return call


def serve() -> None:
    """Take part in every stage that rank 0 announces, until it lets go."""
    store = _rendezvous()
    for call in count():
        while not store.check([f"call/{call}"]):
            time.sleep(POLL_SECONDS)  # not in the store's own wait, which no Ctrl-C ends
        message = json.loads(store.get(f"call/{call}"))
        if message == END:
            return
        module, _, name = message["function"].partition(":")
        function = getattr(importlib.import_module(module), name)
        # What failed is rank 0's to say: `Group.gather` tells it, and all that can fail is there.
        with contextlib.suppress(EdgeError):
            function(**message["arguments"], call=call, folder="", progress=silent)


def _rendezvous() -> Store:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its __all__
    from torch.distributed.distributed_c10d import PrefixStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return PrefixStore("convnext-edge", TCPStore(address, port, is_master=False, timeout=PATIENCE))


def _crashed(rank_: int, error: Exception) -> WorkerError:
    return WorkerError(
        f"rank {rank_} failed: {type(error).__name__}: {error}",
        allowed="a run to the end",
        do="See its output above and report it: this is a bug",
    )
