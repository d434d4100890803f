"""The waiting line of a pool: who is next, fair between keys. Pure: it knows neither clock nor row.

How it works. There are two classes, and in each a ring of *flows*, one for each key that has something waiting. The flow at
the head of the ring has the turn: it gives one infer and goes to the tail, so each of K keys has every K-th pop, however
many another key has piled up. A flow that empties leaves the ring and is forgotten. One that comes joins at the tail, but
before the flow that was served last: beside one key with a thousand waiting, another's infer has the very next slot.

That is deficit round robin (M. Shreedhar, G. Varghese, "Efficient Fair Queueing using Deficit Round Robin", SIGCOMM 1995)
with a quantum and a cost of one mean service: what a service really costs is known only when it is over, and `charge`
corrects the flow's deficit then. Below zero, the flow owes: its turn pays one back, and it gives nothing. At a whole credit
it gives one more in its turn. Where everybody owes, the rounds in which nobody would be served are counted, not walked.

Not every infer may go to every row, so a flow keeps its infers in lanes, each first come first served, and a row takes the
first come of all the lanes that are open to it. A flow with nothing for this row keeps its place in the ring for one that
has. The sequence numbers of what is put back count down from zero, those of what comes count up.

Costs. All is a step or two, except: a pop passes by the flows that have nothing for its row or owe; it asks `accepts` about
moved infers until one fits; taking one out of the middle of a flow moves the numbers behind it, eight bytes each.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Final, Generic, NamedTuple, TypeVar

from .models import Priority

__all__ = ["FairLine", "Lane"]

T = TypeVar("T")

# Of so many pops that find both classes, one goes to batch: it must not starve, nor be felt.
_BATCH_EVERY: Final = 10

# In mean services. One very long answer must not shut its key out for minutes, nor a row of short ones buy a burst.
_MOST_OWED: Final = -8.0
_MOST_CREDIT: Final = 1.0


class Lane(Enum):
    """Who may take an infer. Beside these, a lane is a row's name: the infer waits for that row alone."""

    ANY = "any row of the pool"
    MOVED = "any row that has not had it yet"

    # An Enum's own hash is a Python function, and each pop looks lanes up in every flow that it passes by.
    __hash__ = object.__hash__


class _Entry(NamedTuple):
    number: int
    key: str | None
    lane: Lane | str
    priority: Priority


class _Flow(Generic[T]):
    """What one key has waiting in one class. `numbers`: of all its infers, in order."""

    __slots__ = ("deficit", "key", "lanes", "numbers")

    def __init__(self, key: str | None) -> None:
        self.key: Final = key
        self.deficit = 0.0
        self.lanes: dict[Lane | str, OrderedDict[T, int]] = {}
        self.numbers: list[int] = []

    def head(self, row: str, accepts: Callable[[T], bool], only_named: bool) -> T | None:
        """The first come of those that the row may take."""
        best: T | None = None
        least = math.inf
        for lane in (row,) if only_named else (row, Lane.ANY):
            if waiting := self.lanes.get(lane):
                item, number = next(iter(waiting.items()))
                if number < least:
                    best, least = item, number
        if not only_named:
            for item, number in self.lanes.get(Lane.MOVED, {}).items():
                if number > least:
                    break
                if accepts(item):
                    return item
        return best


class _Class(Generic[T]):
    """One class. `ring`: its flows, the one with the turn first. `lanes`: all of its infers, as they came. `last`: the key
    that was served last, if any was."""

    __slots__ = ("lanes", "last", "ring", "size")

    def __init__(self) -> None:
        self.ring: OrderedDict[str | None, _Flow[T]] = OrderedDict()
        self.lanes: dict[Lane | str, OrderedDict[T, int]] = {}
        self.last: tuple[str | None, ...] = ()
        self.size = 0

    def add(self, item: T, entry: _Entry, first: bool) -> None:
        flow = self.ring.get(entry.key)
        if flow is None:
            flow = self.ring[entry.key] = _Flow(entry.key)
            for last in self.last:
                if last in self.ring:
                    self.ring.move_to_end(last)
        for lanes in (self.lanes, flow.lanes):
            lane = lanes.setdefault(entry.lane, OrderedDict())
            lane[item] = entry.number
            if first:
                lane.move_to_end(item, last=False)
        if first:
            flow.numbers.insert(0, entry.number)
            # The turn that it was popped in is given back.
            self.ring.move_to_end(entry.key, last=False)
        else:
            flow.numbers.append(entry.number)
        self.size += 1

    def remove(self, item: T, entry: _Entry) -> None:
        flow = self.ring[entry.key]
        for lanes in (self.lanes, flow.lanes):
            lane = lanes[entry.lane]
            del lane[item]
            if not lane:
                del lanes[entry.lane]
        del flow.numbers[bisect_left(flow.numbers, entry.number)]
        if not flow.numbers:
            del self.ring[entry.key]
        self.size -= 1

    def has_for(self, row: str, accepts: Callable[[T], bool], only_named: bool) -> bool:
        if row in self.lanes:
            return True
        if only_named:
            return False
        return Lane.ANY in self.lanes or any(map(accepts, self.lanes.get(Lane.MOVED, ())))

    def take_turn(self, row: str, accepts: Callable[[T], bool], only_named: bool) -> T:
        """The next infer for a row that has one here; deficits and the ring as they are after it. It is not removed."""
        owing: list[tuple[_Flow[T], T]] = []
        chosen: tuple[_Flow[T], T] | None = None
        wanted = {row} if only_named else {row, Lane.ANY, Lane.MOVED}
        for flow in self.ring.values():
            if wanted.isdisjoint(flow.lanes):
                continue
            item = flow.head(row, accepts, only_named)
            if item is None:
                continue
            if flow.deficit >= 0:
                chosen = flow, item
                break
            owing.append((flow, item))
        if chosen is None:
            # The rounds in which all of them only pay, at once.
            rounds = min(math.ceil(-flow.deficit) for flow, _ in owing)
            for flow, _ in owing:
                flow.deficit += rounds
                self.ring.move_to_end(flow.key)
            index = next(index for index, (flow, _) in enumerate(owing) if flow.deficit >= 0)
            chosen = owing[index]
            del owing[index:]
        for flow, _ in owing:
            flow.deficit += 1.0
            self.ring.move_to_end(flow.key)
        flow, item = chosen
        self.last = (flow.key,)
        if flow.deficit >= 1.0:
            flow.deficit -= 1.0
        else:
            self.ring.move_to_end(flow.key)
        return item

    def ahead(self, key: str | None, rank: int) -> int:
        """How many of this class go before a key's infer which has `rank` others of the key before it, if nobody comes or
        is charged, and one server takes from all lanes. A key without a flow: as if it joined now."""
        own = self.ring.get(key)
        # A flow's floor of deficit is the rounds that it still only pays, or what it gives beyond one in its next turn.
        full_rounds = 0 if own is None else max(rank - math.floor(own.deficit), 0)
        behind = self.ring.get(*self.last) if own is None and self.last else None
        total = rank
        turns = full_rounds + 1
        for flow in self.ring.values():
            if flow is own:
                turns -= 1
            elif turns and flow is not behind:
                given = max(turns + math.floor(flow.deficit), 0) if flow.deficit else turns
                waiting = len(flow.numbers)
                total += given if given < waiting else waiting
        return total


class FairLine(Generic[T]):
    """Everything that waits for one pool, or for a row that has none.

    Items are told apart by their hash and equality: identity, for an infer. A key of None is one like any other.
    """

    def __init__(self) -> None:
        self._entries: dict[T, _Entry] = {}
        self._interactive: _Class[T] = _Class()
        self._batch: _Class[T] = _Class()
        self._came = 0
        self._put_back = 0
        # Pops that found both classes, since one of them went to batch.
        self._contested = 0

    def add(self, item: T, *, key: str | None, lane: Lane | str, priority: Priority, first: bool = False) -> None:
        """Let it wait, behind all of its key and class.

        Args:
            first: before them instead, and its key has the turn: an infer that was popped and did not go after all.

        Raises:
            AssertionError: it waits already.
        """
        assert item not in self._entries, "an infer waits once"
        if first:
            self._put_back -= 1
            entry = _Entry(self._put_back, key, lane, priority)
        else:
            entry = _Entry(self._came, key, lane, priority)
            self._came += 1
        self._entries[item] = entry
        self._class(priority).add(item, entry, first)

    def discard(self, item: T) -> bool:
        """Whether it waited; it does no more. Its key keeps its place and what it owes, if anything of it is left."""
        entry = self._entries.pop(item, None)
        if entry is None:
            return False
        self._class(entry.priority).remove(item, entry)
        return True

    def pop(self, row: str, accepts: Callable[[T], bool], *, only_named: bool = False) -> T | None:
        """Take the next infer that this row may have.

        Args:
            row: its name.
            accepts: whether the row may take this moved infer. Asked about those in lane MOVED alone; it must not change
                the line.
            only_named: from the row's own lane alone.

        Returns:
            None: nothing here is for this row.
        """
        urgent = self._interactive.has_for(row, accepts, only_named)
        chosen = self._interactive
        if self._batch.has_for(row, accepts, only_named):
            if not urgent:
                chosen = self._batch
            elif self._contested == _BATCH_EVERY - 1:
                chosen = self._batch
                self._contested = 0
            else:
                self._contested += 1
        elif not urgent:
            return None
        item = chosen.take_turn(row, accepts, only_named)
        chosen.remove(item, self._entries.pop(item))
        return item

    def note_unwaited(self, key: str | None, priority: Priority) -> None:
        """One of this key went without waiting: that was its turn."""
        each = self._class(priority)
        each.last = (key,)
        if key in each.ring:
            each.ring.move_to_end(key)

    def charge(self, key: str | None, priority: Priority, amount: float) -> None:
        """Correct what a key was charged for an infer of its, which counted as one mean service when it was popped.

        A key with nothing waiting in this class owes nothing: its next infer begins anew.

        Args:
            amount: in mean services: what it took / the mean - 1.
        """
        flow = self._class(priority).ring.get(key)
        if flow is not None:
            flow.deficit = min(max(flow.deficit - amount, _MOST_OWED), _MOST_CREDIT)

    def has_for(self, row: str, accepts: Callable[[T], bool], *, only_named: bool = False) -> bool:
        """Whether `pop` would give one."""
        return self._interactive.has_for(row, accepts, only_named) or self._batch.has_for(row, accepts, only_named)

    def ahead(self, item: T) -> int:
        """About how many go before it: exact, if one server took from all lanes, nobody came, and services were equal.

        Raises:
            KeyError: it does not wait.
        """
        entry = self._entries[item]
        rank = bisect_left(self._class(entry.priority).ring[entry.key].numbers, entry.number)
        return self._ahead(entry.key, entry.priority, rank)

    def ahead_of_next(self, key: str | None, priority: Priority) -> int:
        """About how many would go before one of this key that came now."""
        flow = self._class(priority).ring.get(key)
        return self._ahead(key, priority, 0 if flow is None else len(flow.numbers))

    def _ahead(self, key: str | None, priority: Priority, rank: int) -> int:
        within = self._class(priority).ahead(key, rank)
        between = _BATCH_EVERY - 1
        if priority == "batch":
            others = min(self._interactive.size, between - self._contested + between * within)
        else:
            others = min(self._batch.size, (self._contested + within) // between)
        return within + others

    def oldest(self, lane: str) -> T | None:
        """The first come of a row's own lane, whatever its key and class; what was put back came before all else."""
        heads = [
            next(iter(waiting.items()))
            for each in (self._interactive, self._batch)
            if (waiting := each.lanes.get(lane)) is not None
        ]
        return min(heads, key=lambda head: head[1])[0] if heads else None

    def lane(self, lane: Lane | str) -> list[T]:
        """All that wait in a lane."""
        return [item for each in (self._interactive, self._batch) for item in each.lanes.get(lane, ())]

    def count(self, lane: Lane | str) -> int:
        """How many wait in a lane."""
        # Written out: it is asked several times for every infer that waits.
        urgent, batch = self._interactive.lanes.get(lane), self._batch.lanes.get(lane)
        return (len(urgent) if urgent else 0) + (len(batch) if batch else 0)

    def count_key(self, key: str | None) -> int:
        """How many of a key wait."""
        urgent, batch = self._interactive.ring.get(key), self._batch.ring.get(key)
        return (len(urgent.numbers) if urgent else 0) + (len(batch.numbers) if batch else 0)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: object) -> bool:
        return item in self._entries

    def __iter__(self) -> Iterator[T]:
        return iter(self._entries)

    def _class(self, priority: Priority) -> _Class[T]:
        return self._batch if priority == "batch" else self._interactive
