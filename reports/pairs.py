"""What stands beside what: float beside quantized, and times taken in one place together.

In: the artifacts of a report. Out: `Pair` and `Lane` records, which charts and pages share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pipeline.records import Latency
    from reports.document import ArtifactRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A quantized artifact beside the float artifact of its runtime; either may be missing."""

    label: str
    runtime: str
    float_row: ArtifactRow | None
    row: ArtifactRow | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One device at one number of threads: times are compared inside a lane only."""

    device: str
    threads: int | None

    def find(self, row: ArtifactRow | None) -> Latency | None:
        """Return the artifact's latency in this lane; one that was not run fits every lane."""
        for latency in row.latency if row else ():
            if latency.device == self.device and latency.threads in (self.threads, None):
                return latency
        return None

    def measured(self, row: ArtifactRow | None) -> Latency | None:
        """Return the artifact's latency in this lane where it was measured."""
        found = self.find(row)
        return found if found and found.outcome == "measured" else None


def pair_up(rows: Sequence[ArtifactRow]) -> tuple[Pair, ...]:
    """Set each quantized artifact beside its runtime's float artifact, of its form if there is one.

    Args:
        rows: All artifacts of a report.

    Returns:
        The pairs in the report's order; a float artifact alone in its runtime makes one too.
    """
    pairs = []
    for runtime in dict.fromkeys(row.runtime for row in rows):
        ours = [row for row in rows if row.runtime == runtime]
        floats = [row for row in ours if row.scheme == "float"]
        quantized = [row for row in ours if row.scheme != "float"]
        alone: list[ArtifactRow | None] = [None]
        for row in quantized or alone:
            same = [one for one in floats if row is not None and one.graph_form == row.graph_form]
            twin = next(iter(same or floats), None)
            label = _label(row, quantized) if row is not None else runtime
            pairs.append(Pair(label=label, runtime=runtime, float_row=twin, row=row))
    return tuple(pairs)


def tell_apart(rows: Sequence[ArtifactRow], row: ArtifactRow) -> str:
    """Return what tells an artifact from others of its runtime and scheme, if there are any."""
    same = [one for one in rows if (one.runtime, one.scheme) == (row.runtime, row.scheme)]
    words = (row.placement, row.graph_form, row.profile)
    return ", ".join(word for word in words if word) if len(same) > 1 else ""


def find_lanes(rows: Iterable[ArtifactRow]) -> tuple[Lane, ...]:
    """Return every device with every number of threads measured on it, in the report's order."""
    threads: dict[str, list[int | None]] = {}
    for row in rows:
        for latency in row.latency:
            seen = threads.setdefault(latency.device, [])
            if latency.threads is not None and latency.threads not in seen:
                seen.append(latency.threads)
    return tuple(
        Lane(device=device, threads=count)
        for device, seen in threads.items()
        for count in seen or [None]
    )


def _label(row: ArtifactRow, siblings: Sequence[ArtifactRow]) -> str:
    # Only what tells siblings apart: a lone artifact is known by its runtime.
    fields = ("scheme", "placement", "graph_form", "profile")
    telling = [one for one in fields if len({getattr(row, one) for row in siblings}) > 1]
    return " · ".join([row.runtime, *(str(getattr(row, one) or "—") for one in telling)])


def describe(lane: Lane, rows: Iterable[ArtifactRow]) -> str:
    """Name a lane: its device, threads, and where the times were taken."""
    kinds = dict.fromkeys(
        found.kind for row in rows if (found := lane.measured(row)) and found.kind
    )
    threads = "" if lane.threads is None else f"{lane.threads} thread{'s' * (lane.threads != 1)}"
    return " · ".join(word for word in (lane.device, threads, *kinds) if word)
