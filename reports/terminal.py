"""Tables as wide as they are.

In: a Rich table. Out: the table, whole.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

WIDEST = 1000


def new_table(first: str, *titles: str) -> Table:
    """Return a table without lines: names in the first column, numbers in the others."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def print_whole(table: Table, console: Console) -> None:
    """Print a table as wide as it is: a cell that is cut is worse than a line that is broken."""
    whole = console.measure(table, options=console.options.update(max_width=WIDEST))
    Console(
        file=console.file,
        width=max(whole.maximum, console.width),
        force_terminal=console.is_terminal,
        emoji=False,
    ).print(table)
