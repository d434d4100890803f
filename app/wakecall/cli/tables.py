"""Lists for people: tables, and how long ago something was."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from .common import printable

__all__ = ["Cell", "age", "print_table", "time_left"]

_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


class Cell(NamedTuple):
    """A text that has a style of its own on a terminal (Rich's: `green`, `dim`)."""

    text: str
    style: str = ""


def age(then: str | None, now: datetime) -> str:
    """How long ago an RFC 3339 instant was, in the largest unit that fits."""
    seconds = _seconds(then, now)
    if seconds is None:
        return "-"
    return f"{_span(seconds)} ago" if seconds >= 1 else "now"


def time_left(then: str | None, now: datetime) -> str:
    """How long it is until an RFC 3339 instant, in the largest unit that fits."""
    seconds = _seconds(then, now)
    if seconds is None:
        return "-"
    return f"in {_span(-seconds)}" if seconds <= -1 else "now"


def _seconds(then: str | None, now: datetime) -> float | None:
    try:
        return (now - datetime.fromisoformat(then or "")).total_seconds()
    except (ValueError, TypeError):
        return None


def _span(seconds: float) -> str:
    size, unit = next(each for each in _UNITS if seconds >= each[0])
    return f"{seconds / size:.0f} {unit}"


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str | Cell]], *, right: Sequence[str] = ()) -> None:
    """Print rows on stdout, whatever stands in them.

    Args:
        columns: their names, as they are in the code.
        rows: a text for each column.
        right: the columns whose texts end in one line.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    # Piped, nothing is folded to fit a width: one row, one line.
    console = Console() if terminal else Console(width=10_000)
    table = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False, header_style="bold")
    for column in columns:
        if column in right:
            table.add_column(column.upper(), justify="right")
        else:
            table.add_column(column.upper(), overflow="fold")
    for row in rows:
        cells = (cell if isinstance(cell, Cell) else Cell(cell) for cell in row)
        table.add_row(*(Text(printable(cell.text), style=cell.style) for cell in cells))
    console.print(table)
