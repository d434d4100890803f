"""Which way an infer goes. Pure: from what the rows are at this instant to one decision."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

from .models import Status

__all__ = ["Decision", "LineLoad", "Placement", "RowLoad", "choose", "choose_wake", "estimate_wait"]

#: What a row without a bound is taken to bear, where loads are compared.
_ASSUMED_SLOTS: Final = 16
#: How long a wake that has never been seen takes, as a part of the most that it may take.
_ASSUMED_WAKE: Final = 0.25


class Placement(Enum):
    DISPATCH = "send it now"
    QUEUE = "wait for a free slot, or for a wake"
    OFFLINE = "refuse: nobody is there"
    FULL = "refuse: too many wait, or for too long"


@dataclass(slots=True)  # not frozen: there is one for each row of each choice, and freezing took most of its time
class RowLoad:
    """A row at one instant.

    Args:
        name: its name.
        status: as its record says.
        connected: its session has a current channel.
        succeeding: its session's channel has ended and a newer one is about to be current.
        room: its channel takes further infers (what it has not taken yet is below half the bound).
        held: an operator or its publisher keeps it from new infers.
        yielding: it takes no more, for another row of its group is to be woken.
        taken: slots that are taken, by infers at work and by those that are being stopped.
        max_concurrency: how many may be; None: any number.
        waking: a wake is under way.
        avoided: it has failed of late, and its time to be tried again has not come.
        on_trial: it has failed of late: one infer at a time is enough for it.
        first_byte_s, service_s: as `health.Health` has them.
        wake_s: the most that a wake of it may take, or what it has been seen to take (`wake_is_measured`).
        wake_is_measured: which of the two.
        last_sent_at: when it last got an infer, in seconds of a clock that only grows.
    """

    name: str
    status: Status
    connected: bool = True
    succeeding: bool = False
    room: bool = True
    held: bool = False
    yielding: bool = False
    taken: int = 0
    max_concurrency: int | None = None
    waking: bool = False
    avoided: bool = False
    on_trial: bool = False
    first_byte_s: float | None = None
    service_s: float | None = None
    wake_s: float = 120.0
    wake_is_measured: bool = False
    last_sent_at: float = -math.inf

    @property
    def is_routable(self) -> bool:
        """Whether anything may come of waiting for it."""
        return self.status is not Status.INACTIVE and (self.connected or self.succeeding) and not self.held

    @property
    def serves(self) -> bool:
        """Whether it takes infers, or will as soon as a slot is free."""
        return self.is_routable and self.status is Status.ACTIVE and not self.yielding

    def has_slot(self, *, alone: bool) -> bool:
        """Whether it takes one now; `alone`: nobody else can, so that its penalty does not matter."""
        if not (self.serves and self.connected and self.room):
            return False
        if self.max_concurrency is not None and self.taken >= self.max_concurrency:
            return False
        return alone or not (self.avoided or (self.on_trial and self.taken > 0))

    @property
    def slots(self) -> int:
        return self.max_concurrency or max(self.taken, _ASSUMED_SLOTS)

    @property
    def load(self) -> float:
        return self.taken / self.slots


@dataclass(slots=True)
class LineLoad:
    """Who waits, at one instant.

    Args:
        before: infers that go before this one, by the rules of the line.
        waiting: infers that wait in it.
        room: how many more may wait, over all bounds.
        patience_s: how long this one can wait.
    """

    before: int = 0
    waiting: int = 0
    room: int = 1
    patience_s: float = math.inf


class Decision(NamedTuple):
    """`row`: to which it is sent. `wake`: what is to be woken for those who wait. `wait_s`: about how long that takes, in
    seconds; None: nothing has been measured."""

    placement: Placement
    row: str | None = None
    wake: str | None = None
    wait_s: float | None = None


def choose(rows: Sequence[RowLoad], line: LineLoad, affinity: bytes | None = None) -> Decision:
    """Decide for one infer that has just come, over all rows that it may go to.

    1. Routable before not: a row that is inactive, held, or without a channel now or in a moment counts for nothing. None
       is left: OFFLINE. It is never woken.
    2. Free before full, where nobody waits before us: DISPATCH. A row that has failed of late counts as full, as long as
       another one that can be had has not (its penalty decays, and then it is tried with one infer at a time).
       Of several that are free:
       a. the fewest in flight, relative to `max_concurrency`;
       b. among equals the better time to the first byte of late (in steps of a quarter; one that is unmeasured is best, so
          that it gets measured);
       c. among equals the one that this conversation met before, so that its prefix cache is used (rendezvous hashing of
          `affinity`); without one, whoever has waited for an infer the longest.
    3. As many wait as may: FULL.
    4. By the estimate it would wait for longer than it can, and nobody is being woken who would shorten that: FULL.
    5. QUEUE. Active before hibernating: `choose_wake` says whether one is woken all the same.

    Args:
        rows: those that it may go to, in any order.
        line: who waits for them.
        affinity: what calls that share a beginning have in common; None: nothing is known.
    """
    # 1
    routable = [row for row in rows if row.is_routable]
    if not routable:
        return Decision(Placement.OFFLINE)
    alone = all(row.avoided or row.on_trial for row in routable)
    # 2
    if line.before == 0:
        free = [row for row in routable if row.has_slot(alone=alone)]
        if len(free) == 1:
            return Decision(Placement.DISPATCH, free[0].name)
        if free:
            best = min(free, key=lambda row: _rank(row, affinity))
            return Decision(Placement.DISPATCH, best.name)
    wait_s = estimate_wait(routable, line.before)
    # 3
    if line.room <= 0:
        return Decision(Placement.FULL, wait_s=wait_s)
    wake = choose_wake(routable, line.before)
    # 4
    helped = wake is not None or any(row.waking for row in routable)
    if wait_s is not None and wait_s > line.patience_s and not helped:
        return Decision(Placement.FULL, wait_s=wait_s)
    # 5
    return Decision(Placement.QUEUE, wake=wake, wait_s=wait_s)


def _rank(row: RowLoad, affinity: bytes | None) -> tuple[bool, float, float, float, str]:
    if affinity is None:
        tie = row.last_sent_at
    else:
        digest = hashlib.blake2b(row.name.encode(), digest_size=8, key=affinity[:64]).digest()
        tie = float(int.from_bytes(digest))
    return row.avoided, row.load, _step(row.first_byte_s), tie, row.name


def _step(first_byte_s: float | None) -> float:
    """Times within a quarter of each other are the same."""
    if first_byte_s is None:
        return -math.inf
    return math.floor(math.log(max(first_byte_s, 1e-4)) / math.log(1.25))


def choose_wake(rows: Sequence[RowLoad], before: int) -> str | None:
    """Which sleeping row is to be woken for those who wait for any of these, if one is.

    1. One at a time: while one of them is waking, none.
    2. Nobody serves: one is woken. (Whoever serves and is avoided counts, if those that sleep are avoided too: a wake that
       fails at once would be tried again at once.)
    3. All that serve are full: one is woken that is not avoided, if that is estimated to be quicker than to wait. (Where
       nothing has been measured there is no estimate of the wait, and nobody is woken; a wake that has not been seen is
       taken to last a quarter of what it may.)

    Of several: not avoided before avoided, then the quickest to wake.

    Args:
        rows: those that they may go to; what is not routable counts for nothing.
        before: how many go before the one that came last.
    """
    routable = [row for row in rows if row.is_routable]
    asleep = [row for row in routable if row.status is Status.HIBERNATING and row.connected]
    # 1
    if not asleep or any(row.waking for row in routable):
        return None
    best = min(asleep, key=lambda row: (row.avoided, _wake_s(row), row.name))
    # 2
    if not any(row.serves and (best.avoided or not row.avoided) for row in routable):
        return best.name
    # 3
    if best.avoided:
        return None
    wait_s = estimate_wait(routable, before)
    return best.name if wait_s is not None and _wake_s(best) < wait_s else None


def _wake_s(row: RowLoad) -> float:
    return row.wake_s if row.wake_is_measured else row.wake_s * _ASSUMED_WAKE


def estimate_wait(rows: Sequence[RowLoad], before: int) -> float | None:
    """Seconds until one that has `before` others before it is sent, if all goes on as it has; None: nothing is measured.

    One that is unmeasured is taken to be as fast as those that are. One that is avoided counts where all are.
    """
    rate, measured, unmeasured = 0.0, 0, 0
    serving = [row for row in rows if row.serves]
    for row in [row for row in serving if not row.avoided] or serving:
        if row.service_s is None:
            unmeasured += row.slots
        else:
            measured += row.slots
            rate += row.slots / max(row.service_s, 1e-3)
    return (before + 1) * measured / (rate * (measured + unmeasured)) if rate else None
