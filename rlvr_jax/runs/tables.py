"""Tables for a terminal: as many columns as it is wide, and no cell cut short."""

import sys
from collections.abc import Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

OTHERWISE = 120  # columns where there is no terminal
_NAMES = 12  # of names at least so many characters stand in one line


class Column(NamedTuple):
    """A column of a table.

    Attributes:
      heading: what stands above it.
      cells: one text per row.
      rank: 0: always shown; others are shown in this order while there is room.
      name: whether it holds names, which are aligned left and folded where the table would be too wide.
    """

    heading: str
    cells: Sequence[str]
    rank: int = 0
    name: bool = False


def screen() -> Console:
    """Standard output, as wide as its terminal."""
    return Console(width=None if sys.stdout.isatty() else OTHERWISE)


def fitted(title: str, columns: Sequence[Column], width: int) -> tuple[Table, list[str]]:
    """(table, headings of the columns for which a terminal of this width has no room)."""
    shown = [column for column in columns if column.rank == 0]
    left_out = []
    for column in sorted((column for column in columns if column.rank), key=lambda column: column.rank):
        wider = [one for one in columns if one in shown or one is column]
        if _natural_width(wider) <= width:
            shown = wider
        else:
            left_out.append(column.heading)
    return _table(title, shown), left_out


def whole(title: str, columns: Sequence[Column]) -> str:
    """The table with all its columns as text, as wide as it is."""
    wide = Console(width=max(_natural_width(columns), *map(len, title.split("\n"))), color_system=None)
    with wide.capture() as capture:
        wide.print(_table(title, columns))
    return "".join(line.rstrip() + "\n" for line in capture.get().splitlines())


def _natural_width(columns: Sequence[Column]) -> int:
    return Console(width=10_000).measure(_table("", columns)).maximum


def _table(title: str, columns: Sequence[Column]) -> Table:
    # Text: what a name holds in brackets is no markup.
    table = Table(title=Text(title) if title else None, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        if column.name:
            longest = max(map(len, (column.heading, *column.cells)))
            table.add_column(Text(column.heading), overflow="fold", min_width=min(_NAMES, longest))
        else:
            table.add_column(Text(column.heading), justify="right", no_wrap=True)
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(Text, row))
    return table
