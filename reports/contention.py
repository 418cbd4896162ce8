"""Whether something else had the processor while an artifact was timed.

In: a `Latency`. Out: how much longer the wall time is than the CPU time, where that says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.records import Latency

CONTENTION = 1.3
"""Wall over CPU time at one thread above which something else had the processor."""


def contention(latency: Latency) -> float | None:
    """Return wall over CPU time where one thread waited for a processor, else None.

    A thread that waits for a GPU waits for no processor.
    """
    wall, cpu = latency.wall_p50_ms, latency.cpu_p50_ms
    if (
        latency.threads != 1
        or latency.accelerated
        or wall is None
        or not cpu
        or wall / cpu <= CONTENTION
    ):
        return None
    return wall / cpu
