"""Who used how much of what: sums by hour, key and LLM, on their way to the store.

A *cell* is the sum of one hour (UTC), one key and one LLM. What is in memory are the cells of this hour, and those of hours
before that are not committed yet. A cell is written as it stands, not what was added to it: so a commit that is repeated
changes nothing. For that what is in memory has to be the whole cell. It is, because an infer counts in the hour in which it
ends, the clock only grows, no cell leaves within its hour, and at the start those that may go on are read (`load`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

__all__ = ["HOUR_S", "OTHERS", "CellKey", "Ledger", "Usage", "UsageBy", "hour_of"]

HOUR_S: Final = 3600

#: The hour (whole hours since the epoch), the key's id (empty: no key was needed), and the LLM's name.
CellKey = tuple[int, str, str]

#: What sums are asked by.
UsageBy = Literal["key", "llm"]

#: Stands for a key and for an LLM in the cell of whatever was one too many for the bound. No id and no name is like it.
OTHERS: Final = "*"


def hour_of(now: float) -> int:
    """The hour of an instant (seconds since the epoch)."""
    return int(now // HOUR_S)


@dataclass(slots=True)  # not frozen: one is made for every infer, which took twice as long
class Usage:
    """What was used.

    `requests` came to an end, as so many `completed`, `failed` and `cancelled`. Of `unknown` of them a publisher may have
    used tokens and not said how many; all others' are in `tokens_in` and `tokens_out`. `seconds`: that publishers worked.
    """

    requests: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    unknown: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        total = replace(self)
        total += other
        return total

    def __iadd__(self, other: Usage) -> Usage:
        # Written out: it is done for every infer, and a loop over the fields took five times as long.
        self.requests += other.requests
        self.completed += other.completed
        self.failed += other.failed
        self.cancelled += other.cancelled
        self.unknown += other.unknown
        self.tokens_in += other.tokens_in
        self.tokens_out += other.tokens_out
        self.seconds += other.seconds
        return self


class Ledger:
    """The cells that are in memory.

    Args:
        max_cells: of them. What is one too many is counted in its hour's cell of `OTHERS`.
    """

    def __init__(self, max_cells: int) -> None:
        self._max_cells = max_cells
        # These are added to where they are, so what comes in and what goes out are copies of them.
        self._cells: dict[CellKey, Usage] = {}
        self._unwritten: set[CellKey] = set()
        self._hour = 0

    @property
    def is_written(self) -> bool:
        """Whether the store has it all."""
        return not self._unwritten

    def __len__(self) -> int:
        return len(self._cells)

    def load(self, cells: Mapping[CellKey, Usage]) -> None:
        """Take what a store holds of this hour, and of those to come, if its last broker's clock was ahead of ours."""
        self._cells.update((cell, replace(usage)) for cell, usage in cells.items())

    def add(self, hour: int, key_id: str | None, llm: str, usage: Usage) -> None:
        """Count what has just been used."""
        if hour > self._hour:
            self._hour = hour
            self._drop([cell for cell in self._cells if cell[0] < hour])
        cell = (hour, key_id or "", llm)
        before = self._cells.get(cell)
        if before is None and len(self._cells) >= self._max_cells:
            cell = (hour, OTHERS, OTHERS)
            before = self._cells.get(cell)
        if before is None:
            self._cells[cell] = replace(usage)
        else:
            before += usage
        self._unwritten.add(cell)

    def unwritten(self) -> dict[CellKey, Usage]:
        """The cells that the store does not have as they stand."""
        return {cell: replace(self._cells[cell]) for cell in self._unwritten}

    def note_written(self, written: Mapping[CellKey, Usage]) -> None:
        """The store has these now. What has been added since is still to be written."""
        self._unwritten -= {cell for cell, usage in written.items() if self._cells.get(cell) == usage}
        self._drop([cell for cell in written if cell[0] < self._hour])

    def _drop(self, cells: list[CellKey]) -> None:
        """Let go of those of hours that are over, as far as they are written."""
        for cell in cells:
            if cell not in self._unwritten:
                self._cells.pop(cell, None)
