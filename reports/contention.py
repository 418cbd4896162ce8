"""Whether something else had the processor while an artifact was timed.

In: a `Latency`. Out: how much longer the wall time is than the CPU time, where that says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.records import Latency

CONTENTION = 1.3
"""Wall over CPU time at one thread above which something else had the processor."""


def wall_over_cpu(latency: Latency) -> float | None:
    """Return wall over CPU time where one thread of the CPU computes everything, else None.

    A thread that waits for a GPU waits for no processor.
    """
    wall, cpu = latency.wall_p50_ms, latency.cpu_p50_ms
    elsewhere = latency.accelerated
    if latency.operations_on is not None:
        elsewhere = bool(latency.operations_on.keys() - {"CPU"})
    if latency.threads != 1 or elsewhere or not wall or not cpu:
        return None
    return wall / cpu


def contention(latency: Latency) -> float | None:
    """Return wall over CPU time where one thread waited for a processor, else None."""
    times = wall_over_cpu(latency)
    return times if times is not None and times > CONTENTION else None
