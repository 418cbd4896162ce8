"""What every table on a terminal shares.

In: a Rich table. Out: the table, whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDEST = 1000


def print_whole(table: Table, console: Console) -> None:
    """Print a table as wide as it is: a cell that is cut is worse than a line that is broken."""
    before = console.width
    whole = console.measure(table, options=console.options.update(max_width=WIDEST))
    console.width = max(whole.maximum, before)
    console.print(table, crop=False)
    console.width = before
