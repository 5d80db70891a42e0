"""Tables of numbers as plain text."""

from io import StringIO

from rich.console import Console
from rich.table import Table

WIDTH = 120


def number_table(name: str, *columns: str) -> Table:
    """The first column is left-aligned; the others, numbers, are right-aligned."""
    table = Table(name, box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in columns:
        table.add_column(column, justify="right")
    return table


def drawn(table: Table) -> str:
    out = StringIO()
    Console(file=out, width=WIDTH).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
