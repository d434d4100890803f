"""Many deadlines, one Trio task.

An infer has a deadline in each of its phases, moved with nearly every chunk. A task or a cancel scope for each would cost
more than the chunk, so they share a heap: moving a deadline *later* (which is what a chunk does) assigns one float, and
the heap's entry, come too early, is put back where it belongs. Moving it *earlier* pushes a second entry, and the first is
passed over. What is disarmed lets go of what it held at once; entries that will be passed over are swept out when they
outnumber the rest, so the heap stays as small as what is armed.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from itertools import count

import trio

__all__ = ["Deadline", "Deadlines"]


class Deadline:
    """One deadline. `fire` is called, in `Deadlines.run`, at the first instant at or after `due` (`trio.current_time()`)."""

    __slots__ = ("_entry", "_number", "due", "fire")

    def __init__(self, fire: Callable[[], None]) -> None:
        self.due = math.inf
        self.fire: Callable[[], None] | None = fire
        # Its one valid entry in the heap: the instant, and the number that tells it from older ones at the same instant.
        self._entry = math.inf
        self._number = -1


class Deadlines:
    """The heap, and the task that waits for its head."""

    def __init__(self) -> None:
        # The entire state: entries (instant, number, deadline); `_dead` counts those that will be passed over.
        self._heap: list[tuple[float, int, Deadline]] = []
        self._dead = 0
        self._sequence = count()
        self._sleep: trio.CancelScope | None = None

    def __len__(self) -> int:
        """Entries in the heap, those that will be passed over too."""
        return len(self._heap)

    @property
    def armed(self) -> int:
        """Deadlines that will fire."""
        return len(self._heap) - self._dead

    def arm(self, deadline: Deadline, due: float, soonest: float = math.inf) -> None:
        """Let `deadline` fire at `due`, whenever it was to fire before. Of equals that were never moved, the one armed
        first fires first.

        Args:
            deadline: which.
            due: when.
            soonest: it will be moved to this instant, or later, before long: it is looked at then, so that moving it costs
                nothing.
        """
        deadline.due = due
        if soonest < due:
            due = soonest
        if due < deadline._entry:
            older = deadline._entry != math.inf
            deadline._entry, deadline._number = due, next(self._sequence)
            heapq.heappush(self._heap, (due, deadline._number, deadline))
            if older:
                self._add_dead()
            if self._sleep is not None and due < self._sleep.deadline:
                self._sleep.deadline = due

    def disarm(self, deadline: Deadline) -> None:
        """Forget `deadline` for good. Idempotent."""
        if deadline.fire is None:
            return
        deadline.fire = None
        deadline.due = math.inf
        if deadline._entry != math.inf:
            deadline._entry, deadline._number = math.inf, -1
            self._add_dead()

    def _add_dead(self) -> None:
        self._dead += 1
        if self._dead > 32 and self._dead * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2]._number == entry[1]]
            heapq.heapify(self._heap)
            self._dead = 0

    def fire_due(self, now: float) -> float:
        """Fire what is due at `now`; returns the instant at which to look again (`inf`: nothing is armed)."""
        while self._heap:
            instant, number, deadline = self._heap[0]
            if number != deadline._number:
                heapq.heappop(self._heap)
                self._dead -= 1
            elif instant > now:
                return instant
            else:
                heapq.heappop(self._heap)
                deadline._entry, deadline._number = math.inf, -1
                if deadline.due > now:
                    self.arm(deadline, deadline.due)
                elif deadline.fire is not None:
                    deadline.due = math.inf
                    deadline.fire()
        return math.inf

    async def run(self) -> None:
        """Fire deadlines as they fall due, until cancelled."""
        while True:
            due = self.fire_due(trio.current_time())
            with trio.CancelScope(deadline=due) as self._sleep:
                await trio.sleep_forever()
            self._sleep = None
