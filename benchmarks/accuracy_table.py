"""What `accuracy.py` says of its rows: medians over draws, verdicts, the table.

In: measured rows. Out: further rows, and lines on a console. Runs nothing.
"""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

Row = dict[str, Any]

MEASURES = ("top1", "drop_pp", "agreement_with_float", "sqnr_db")
COLUMNS = {
    "top-1": ("top1", ".4f"),
    "drop, points": ("drop_pp", "+.2f"),
    "agrees": ("agreement_with_float", ".4f"),
    "SQNR dB": ("sqnr_db", ".1f"),
    "CPU ms": ("cpu_p50_ms", ".3f"),
}
NO_ERROR = float("inf")


def group(scheme: str) -> int:
    """Return where a scheme's rows stand in the table."""
    order = ("float", "w8a8", "w8a8-dynamic", "w8a16", "w4a8", "w8")
    return order.index(scheme) if scheme in order else len(order)


def summary(draws: Sequence[Row]) -> Row:
    """Lay out the measurements of a method's draws.

    Args:
        draws: At least one, each with its `seed`.

    Returns:
        Medians over the draws; `spread`, the least and the greatest SQNR, None with one draw; the
        draws themselves. An SQNR of None is one without any error.
    """
    row: Row = {name: median(draw[name] for draw in draws) for name in MEASURES[:-1]}
    values = sorted(_decibels(draw) for draw in draws)
    ends = [_finite(values[0]), _finite(values[-1])]
    row["sqnr_db"] = _finite(median(values))
    return {**row, "spread": ends if len(draws) > 1 else None, "draws": list(draws)}


def _decibels(row: Row) -> float:
    return NO_ERROR if row["sqnr_db"] is None else float(row["sqnr_db"])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def verdicts(rows: Sequence[Row]) -> list[Row]:
    """Hold each of our quantized artifacts against the best peer of its runtime and scheme.

    Args:
        rows: As the document has them.

    Returns:
        One per artifact of ours that was measured: the `peer`, the one with the most SQNR; by how
        many decibels ours is ahead of it; whether by more than the spread, which is that our least
        draw beats its best one (None where neither calibrates more than once); and our CPU time
        over the peer's. Where the scheme has no peer, `peer` is None and nothing is said.
    """
    measured = [r for r in rows if r["outcome"] == "measured" and r["scheme"] != "float"]
    found = []
    for ours in (row for row in measured if row["ours"]):
        verdict: Row = {name: ours[name] for name in ("runtime", "scheme", "placement")}
        same = ("runtime", "scheme")
        peers = [p for p in measured if not p["ours"] and all(p[k] == ours[k] for k in same)]
        best = max(peers, key=_decibels, default=None)
        verdict["peer"] = best["method"] if best else None
        if best:
            by = _decibels(ours) - _decibels(best)
            verdict |= {
                "ahead": by > 0,
                "by_db": _finite(by),
                "beyond_spread": _beyond(ours, best),
                "cpu_ratio": _ratio(ours.get("cpu_p50_ms"), best.get("cpu_p50_ms")),
            }
        found.append(verdict)
    return found


def _beyond(ours: Row, best: Row) -> bool | None:
    if ours["spread"] is None and best["spread"] is None:
        return None
    worst_of_ours = min(map(_decibels, ours["draws"]))
    return worst_of_ours > max(map(_decibels, best["draws"]))


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over and under else None


def say(verdict: Row) -> str:
    """Return a verdict as a person reads it."""
    if verdict["peer"] is None:
        return "no peer in this scheme"
    by, beyond = verdict["by_db"], verdict["beyond_spread"]
    spread = {None: "one draw", True: "beyond the spread", False: "within the spread"}[beyond]
    if not verdict["ahead"]:
        spread = "one draw" if beyond is None else "behind"
    cpu = verdict["cpu_ratio"]
    parts = [f"{by:+.1f} dB" if by is not None else "no error", f"on {verdict['peer']}, {spread}"]
    return " ".join(parts) + (f", {cpu:.2f} x its CPU" if cpu else "")


def print_table(document: Row, console: Console) -> None:
    """Print the rows with the verdicts, then what did not run and why."""
    settings = document["settings"]
    table = Table(
        title=f"{document['variant']}, float top-1 {document['float_top1']:.4f} of"
        f" {document['n']} images; {settings['calibration_images']} calibrate,"
        f" {settings['draws']} draw(s); {document['cpu']}, one thread"
    )
    table.add_column("runtime")
    table.add_column("scheme")
    table.add_column("method", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("SQNR of draws", justify="right", no_wrap=True)
    table.add_column("ours beside the best peer")
    said = {(v["runtime"], v["scheme"], v["placement"]): say(v) for v in document["verdicts"]}
    last = None
    for row in document["rows"]:
        if row["runtime"] != last and last is not None:
            table.add_section()
        last = row["runtime"]
        cells = [_cell(row.get(name), form) for name, form in COLUMNS.values()]
        spread = row.get("spread")
        cells.append("–".join(_cell(end, ".1f") for end in spread) if spread else "")
        verdict = row["outcome"] if row["outcome"] != "measured" else ""
        if row["ours"] and not verdict:
            verdict = said.get((row["runtime"], row["scheme"], row["placement"]), "")
        style = "bold" if row["ours"] else None
        table.add_row(
            row["runtime"],
            row["scheme"],
            f"{row['method']} {_place(row)}",
            *cells,
            verdict,
            style=style,
        )
    console.print(table)
    for row in document["rows"]:
        name = f"{row['runtime']} {row['method']} {row['scheme']} {_place(row)}".strip()
        for text in (row.get("reason") and f"{row['outcome']}: {row['reason']}", row.get("note")):
            if text:
                console.print(escape(f"  {name}: {text}"), soft_wrap=True, highlight=False)


def _place(row: Row) -> str:
    return row["placement"] or "" if row["scheme"] != "float" else ""


def _cell(value: float | None, form: str) -> str:
    return "—" if value is None else format(value, form)
