"""Tables: rich on a terminal, plain aligned columns everywhere else. Names are never cut."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from loratools.cli.text import one_line, plain_output

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["plain_table", "show_table"]


def show_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table.

    Args:
        columns: their titles; one that begins with ``>`` is aligned to the right.
        rows: what :func:`str` makes of each cell is shown, escaped; None is an empty cell.
    """
    cells = [["" if cell is None else one_line(cell) for cell in row] for row in rows]
    plain = plain_table(columns, cells)
    if sys.stdout.isatty():
        _rich_table(columns, cells, max(map(len, plain.splitlines())))
    else:
        click.echo(plain)


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart, one line for each row however long.

    >>> print(plain_table(["name", ">rank"], [["q_proj", "8"], ["k", "16"]]))
    name    rank
    q_proj     8
    k         16
    """
    titles = [title.lstrip(">") for title in columns]
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    lines = []
    for row in [titles, *rows]:
        padded = [
            cell.rjust(width) if title.startswith(">") else cell.ljust(width)
            for cell, width, title in zip(row, widths, columns, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> None:
    """Print on a terminal; one too narrow wraps whole rows, so that a name can be copied in one piece."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    console = Console(
        markup=False, highlight=False, emoji=False, color_system=None if plain_output() else "auto"
    )
    for title in columns:
        right = title.startswith(">")
        table.add_column(Text(title.lstrip(">")), justify="right" if right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text, so that brackets in a name stay brackets
    console.width = max(console.width, width + 2)
    console.print(table)
