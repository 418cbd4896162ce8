"""The ways to lay a runtime's artifacts out, and who of them is faster.

In: what a runtime can express, and raw samples. Out: the exports worth measuring; a `Candidate` for
each with its figures, every one against the best float candidate of its heat; their order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.placements import PLACEMENTS
from pipeline.records import ACTIVATION_BITS, FLOATING, Candidate, Export
from pipeline.statistics import percentile, ratio_interval

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from targets.base import Capabilities, Samples

Effort = Literal["off", "quick", "full"]
Clock = Literal["cpu", "wall", "instructions"]


def candidates(
    can: Capabilities,
    defaults: Sequence[Export],
    effort: Effort,
    *,
    asked: bool = False,
    flags: Collection[str] = (),
) -> tuple[Export, ...]:
    """Return every way to lay out a runtime's artifacts that is worth measuring.

    Args:
        can: Of the runtime.
        defaults: What it exports by default: the float artifact and, unless that is all, the
            quantized one.
        effort: `quick` keeps to the default placement's layers, so that integers stay what they
            are; `full` takes every placement, and float16 where the CPU computes in it.
        asked: Whether the placement was asked for, and stays.
        flags: Of the device's CPU.

    Returns:
        Every form of the float artifact, then every form and placement of the others.
    """
    found, half = list[Export](), bool(can.half_flags & set(flags))
    for one in defaults:
        if one.scheme in FLOATING:
            found += [replace(one, graph_form=form) for form in can.graph_forms]
            continue
        for placement in [one.placement] if asked else _placements(can, one, effort):
            found += [
                replace(one, placement=placement, graph_form=form)
                for form in can.graph_forms
                if placement in can.placements_in(form)
            ]
    if half and effort == "full" and any(one.scheme not in FLOATING for one in found):
        found += [replace(one, scheme="float16") for one in found if one.scheme == "float"]
    return tuple(found)


def _placements(can: Capabilities, one: Export, effort: Effort) -> list[str]:
    layers = PLACEMENTS[one.placement].layers
    names = [n for n in can.placements if effort == "full" or PLACEMENTS[n].layers == layers]
    if one.scheme in ACTIVATION_BITS:
        return names
    # Without sites placements of the same layers are the same function.
    first = {PLACEMENTS[name].layers: name for name in reversed(names)}
    return [name for name in names if name in first.values()]


def faster_half(heat: Sequence[Candidate], clock: Clock) -> list[Candidate]:
    """Return who stays after a heat: of the float ones and of the others the faster half each."""
    stay = list[Candidate]()
    for floats in (True, False):
        group = [one for one in heat if (one.scheme == "float") == floats]
        group.sort(key=lambda one: _time(one, clock))
        stay += group[: max(1, len(group) // 2)]
    return stay


def in_order(found: Sequence[Candidate], clock: Clock) -> list[int]:
    """Return the indices of the candidates, float ones apart, that were measured, best first.

    Who stayed longer is better, and who was faster in the last heat of both.
    """
    measured = [
        index for index, one in enumerate(found) if one.scheme != "float" and figures(one, clock)[1]
    ]
    return sorted(measured, key=lambda index: rank(found[index], clock))


def figures(
    one: Candidate, clock: Clock
) -> tuple[float | None, float | None, tuple[float, float] | None]:
    """Return what a candidate took, that over the best float one of its heat, and its interval."""
    match clock:
        case "cpu":
            return one.cpu_p50_ms, one.cpu_ratio, one.cpu_ratio_ci95
        case "wall":
            return one.wall_p50_ms, one.wall_ratio, one.wall_ratio_ci95
        case "instructions":
            return one.instructions, one.instruction_ratio, one.instruction_ratio_ends


def ratio_of(one: Candidate, clock: Clock) -> tuple[float, tuple[float, float]]:
    """Return a measured candidate's time over that of the best float one, and its interval."""
    _, ratio, ends = figures(one, clock)
    assert ratio is not None, "in_order gives those that were measured"
    assert ends is not None
    return ratio, ends


def rank(one: Candidate, clock: Clock) -> tuple[int, float]:
    """Return what candidates are sorted by: who stayed longer is better, then who was faster."""
    return -one.heat, _time(one, clock)


def _time(one: Candidate, clock: Clock) -> float:
    found, _, _ = figures(one, clock)
    return np.inf if found is None else found


def usable(clock: Clock, found: Iterable[Candidate]) -> Clock:
    """Return by which clock candidates can be ranked: not every device tells CPU time."""
    measured = [one for one in found if one.outcome == "measured"]
    silent = measured and all(one.cpu_p50_ms is None for one in measured)
    return "wall" if clock == "cpu" and silent else clock


def raw(of: Samples, clock: Clock) -> Sequence[float]:
    """Return the samples that a clock ranks by; wall time where CPU time is not told."""
    if clock == "instructions":
        return of.instructions
    return of.cpu_ms if clock == "cpu" and of.cpu_ms else of.wall_ms


def is_faster(one: Samples, other: Samples, clock: Clock, per_round: int) -> bool:
    """Return whether one took less, by the 95 % interval of the ratio; counts say it themselves."""
    if one.error or other.error:
        return False
    if clock == "instructions":
        return max(one.instructions) < min(other.instructions)
    found = ratio_interval(raw(one, clock), raw(other, clock), per_round=per_round)
    return found is not None and found[2] < 1


def described(export: Export) -> dict[str, Any]:
    """Return the fields of a candidate that say what it is."""
    return {
        "scheme": export.scheme,
        "placement": export.placement,
        "float_stages": export.float_stages,
        "graph_form": export.graph_form,
    }


def failed(export: Export, reason: str) -> Candidate:
    """Return the candidate that an export became which failed."""
    return Candidate(**described(export), outcome="failed", reason=reason)


def timed(
    exports: Sequence[Export],
    samples: Sequence[Samples],
    clock: Clock,
    *,
    per_round: int,
    heat: int,
) -> dict[Export, Candidate]:
    """Derive the figures of one heat, each against its best float candidate.

    Args:
        exports: Who ran.
        samples: What they took, in the same order.
        clock: By which the best float one is found.
        per_round: Samples of a turn: those hang together.
        heat: Which one it was, from 0.
    """
    ran = [(e, s) for e, s in zip(exports, samples, strict=True) if s.error is None]
    floats = [item for export, item in ran if export.scheme == "float"]
    best = min(floats, key=lambda of: float(np.median(raw(of, clock))), default=None)
    found = {}
    for export, item in zip(exports, samples, strict=True):
        if item.error is not None:
            found[export] = failed(export, item.error)
            continue
        cpu = best and ratio_interval(item.cpu_ms, best.cpu_ms, per_round=per_round)
        wall = best and ratio_interval(item.wall_ms, best.wall_ms, per_round=per_round)
        found[export] = Candidate(
            **described(export),
            outcome="measured",
            heat=heat,
            samples=len(item.wall_ms) or len(item.instructions),
            wall_p50_ms=percentile(item.wall_ms, 50),
            cpu_p50_ms=percentile(item.cpu_ms, 50),
            wall_ratio=wall[0] if wall else None,
            wall_ratio_ci95=wall[1:] if wall else None,
            cpu_ratio=cpu[0] if cpu else None,
            cpu_ratio_ci95=cpu[1:] if cpu else None,
            **_counted(item.instructions, best.instructions if best else ()),
        )
    return found


def _counted(ours: Sequence[int], best: Sequence[int]) -> dict[str, Any]:
    """Return the fields of a candidate that counts make; none where there are none."""
    if not ours:
        return {}
    count = int(np.median(ours))
    if not best:
        return {"instructions": count}
    return {
        "instructions": count,
        "instruction_ratio": count / float(np.median(best)),
        "instruction_ratio_ends": (min(ours) / max(best), max(ours) / min(best)),
    }
