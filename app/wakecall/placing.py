"""Where an infer may go, as things stand: what `placement` decides on is gathered here, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import trio

from .directory import Directory
from .fairness import Lane
from .models import InferRequest, Status
from .placement import Decision, LineLoad, Placement, RowLoad, choose, estimate_wait
from .row import Pool, Row, Target
from .task import Infer, InferState

__all__ = ["Full", "Place", "Placer", "is_hopeful"]

#: Seconds that an infer is taken to last where none has been measured; that a caller is told to stay away at the least, and
#: at the most.
_UNMEASURED_S: Final = 1.0
_LEAST_RETRY_S: Final = 1.0
_MOST_RETRY_S: Final = 60.0


class Place(NamedTuple):
    """Where an infer goes: which name of its route, what that is, and what has been decided."""

    stage: int
    target: Target
    decision: Decision


class Full(NamedTuple):
    """Too many wait. `late`: it could stand in the line, but not for long enough."""

    decision: Decision
    late: bool
    waiting: int

    @property
    def retry_after_s(self) -> float:
        wait_s = self.decision.wait_s
        return min(max(self.waiting * _UNMEASURED_S if wait_s is None else wait_s, _LEAST_RETRY_S), _MOST_RETRY_S)


class Placer:
    """Looks at a `Directory`; made by the dispatcher."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._config = directory.config
        self._counters = directory.counters

    def total_s(self, route: tuple[str, ...], request: InferRequest) -> float:
        """Seconds that an infer has in all: what its first target allows, or what its caller grants it, if that is less."""
        total_s = self._config.total_s
        target = self._directory.find_target(route[0])
        if target is not None:
            if target.only is not None:
                total_s = target.pool.rows[target.only].llm.total_s or total_s
            else:
                total_s = max((row.llm.total_s or total_s for row in target.rows), default=total_s)
        return total_s if request.timeout_s is None else min(total_s, request.timeout_s)

    def find_place(self, infer: Infer, stage: int, now: float) -> tuple[Place | None, Full | None]:
        """The first of the names from `stage` on that would have it; else why not, if that is for too many waiting."""
        full: Full | None = None
        for index in range(stage, len(infer.route)):
            target = self._directory.find_target(infer.route[index])
            if target is None:
                continue
            if (row := self._lone_free_row(infer, target)) is not None:
                return Place(index, target, Decision(Placement.DISPATCH, row.llm.name)), None
            decision = self._decide(infer, target, now)
            if decision.placement in (Placement.DISPATCH, Placement.QUEUE):
                return Place(index, target, decision), None
            if decision.placement is Placement.FULL:
                refused = Full(decision, self._room(infer, target) > 0, len(target.pool.line))
                full = refused if full is None or refused.retry_after_s < full.retry_after_s else full
        return None, full

    def _lone_free_row(self, infer: Infer, target: Target) -> Row | None:
        """The row that `choose` would send it to, where there is only one to choose from, it has a slot, and nobody waits.

        So it is for most infers. No penalty counts then, and no bound of the line, so none of them is looked at.
        """
        pool, only = target
        if pool.line:
            return None
        if only is not None:
            row = pool.rows[only]
        elif len(pool.rows) == 1:
            (row,) = pool.rows.values()
        else:
            return None
        session, llm = row.session, row.llm
        if (
            session is None
            or session.channel is None
            or not session.channel.has_room
            or llm.paused
            or llm.hold is not None
            or row.yielding
            or llm.name in infer.refused_by
            or not self.has_slot(row)
        ):
            return None
        return row

    def _decide(self, infer: Infer, target: Target, now: float) -> Decision:
        rows = [self.load_of(row, now) for row in target.rows if row.llm.name not in infer.refused_by]
        pool, line = target.pool, target.pool.line
        waiting = 0
        if line:
            waiting = pool.waiting + (0 if target.only is None else line.count(target.only))
        before = 0
        if waiting:
            key = None if infer.claim is None else infer.claim.caller.key_id
            before = line.ahead(infer) if infer in line else line.ahead_of_next(key, infer.request.priority)
            if target.only is not None:
                before = _before_at_row(before, line.count(target.only), _serving(pool))
            before = max(before, 1)  # whoever waits for what it would have goes first, if it can be had
        patience_s = min(self.queue_s(target), infer.total_until - now)
        load = LineLoad(before, waiting, self._room(infer, target), patience_s)
        return choose(rows, load, infer.request.affinity)

    def _room(self, infer: Infer, target: Target) -> int:
        """How many more may wait there, over all bounds.

        A key has no more waiting, in a line or in all, than there is still room for: so one key takes half of it, two of
        them two thirds, and no number of them the last place, which is for whoever has nothing there.
        """
        config, line = self._config, target.pool.line
        waiting = target.pool.waiting if target.only is None else line.count(target.only)
        # One that is accepted already, and moves, is counted.
        counted = infer.pool is not None and infer.state is InferState.WAITING
        in_line = counted and infer.pool is target.pool
        room_in_line = config.max_waiting_per_llm - waiting + in_line
        room_in_all = config.max_waiting - self._counters.waiting + counted
        if infer.claim is None or infer.claim.caller.key is None:
            return min(room_in_line, room_in_all)
        caller = infer.claim.caller
        own = caller.waiting - counted
        own_in_line = line.count_key(caller.key_id) - in_line
        return min(room_in_line - own_in_line, room_in_all - own, config.max_waiting_per_key - own)

    def queue_s(self, target: Target) -> float:
        config = self._config
        return max((row.llm.queue_s or config.queue_s for row in target.rows), default=config.queue_s)

    def load_of(self, row: Row, now: float) -> RowLoad:
        """How a row stands."""
        session, llm, health = row.session, row.llm, row.health
        channel = None if session is None else session.channel
        return RowLoad(
            name=llm.name,
            status=llm.status,
            connected=channel is not None,
            succeeding=session is not None and session.pending is not None,
            room=channel is not None and channel.has_room,
            held=llm.paused or llm.hold is not None,
            yielding=row.yielding,
            taken=row.in_flight + row.stopping,
            max_concurrency=llm.max_concurrency,
            waking=row.wake is not None,
            avoided=health.is_avoided(now, row.pool.sent),
            on_trial=health.is_on_trial(now),
            first_byte_s=health.first_byte_s,
            service_s=health.service_s,
            wake_s=health.wake_s or llm.wake_s or self._config.wake_s,
            wake_is_measured=health.wake_s is not None,
            last_sent_at=row.last_sent_at,
        )

    def has_slot(self, row: Row) -> bool:
        """Whether a row could take an infer now, if its health and those who hold it allow."""
        most = row.llm.max_concurrency
        return row.llm.status is Status.ACTIVE and (most is None or row.in_flight + row.stopping < most)

    def add_to_line(self, infer: Infer, target: Target, *, first: bool) -> None:
        key = None if infer.claim is None else infer.claim.caller.key_id
        lane = target.only or (Lane.MOVED if infer.refused_by else Lane.ANY)
        target.pool.line.add(infer, key=key, lane=lane, priority=infer.request.priority, first=first)

    def candidates(self, infer: Infer) -> list[Row]:
        """The rows that an infer, which waits, may go to."""
        assert infer.pool is not None
        if infer.only is not None:
            return [infer.pool.rows[infer.only]]
        return [row for row in infer.pool.rows.values() if row.llm.name not in infer.refused_by]

    def place_of(self, infer: Infer) -> tuple[int, float | None] | None:
        """Which place in its line a waiting infer has (1: next), and about how many seconds it will wait, if that is known;
        None: it does not wait."""
        return self.places()(infer)

    def places(self) -> Callable[[Infer], tuple[int, float | None] | None]:
        """`place_of`, for many at this one instant: what they wait for is looked at once."""
        now = trio.current_time()
        turns: dict[tuple[int, str | None, frozenset[str]], tuple[float | None, int]] = {}

        def place_of(infer: Infer) -> tuple[int, float | None] | None:
            if infer.state is not InferState.WAITING or infer.pool is None:
                return None
            pool, only = infer.pool, infer.only
            whom = id(pool), only, infer.refused_by
            if whom not in turns:
                # Seconds until the first of them is sent, and how many rows share the line.
                first_s = estimate_wait([self.load_of(row, now) for row in self.candidates(infer)], 0)
                turns[whom] = first_s, _serving(pool)
            turn_s, serving = turns[whom]
            before = pool.line.ahead(infer)
            at_row = before if only is None else _before_at_row(before, pool.line.count(only) - 1, serving)
            return before + 1, None if turn_s is None else (at_row + 1) * turn_s

        return place_of

    def is_alone(self, pool: Pool, now: float) -> bool:
        """Whether none of the rows of a pool that can be had is in good health, so that no penalty matters."""
        if len(pool.rows) == 1:
            return True
        for row in pool.rows.values():
            if row.llm.status is Status.INACTIVE:
                continue  # at once: when a publisher is lost that may be hundreds, for each of hundreds
            load = self.load_of(row, now)
            if load.is_routable and not (load.avoided or load.on_trial):
                return False
        return True

    def can_move(self, infer: Infer) -> bool:
        """Whether an infer that its publisher refuses has anywhere else to go."""
        return infer.first_byte_at is None and (
            infer.stage + 1 < len(infer.route)
            or (infer.only is None and any(row is not infer.row for row in self.candidates(infer)))
        )

    def is_held(self, infer: Infer) -> bool:
        """Whether an infer could go somewhere, but for those who hold that back."""
        targets = (self._directory.find_target(name) for name in infer.route)
        return any(
            row.llm.status is not Status.INACTIVE and row.session is not None and row.session.channel is not None
            for target in targets
            if target is not None
            for row in target.rows
            if row.llm.paused or row.llm.hold is not None
        )

    def most_attempts(self, infer: Infer) -> int:
        targets = (self._directory.find_target(name) for name in infer.route)
        return sum(1 if target.only else len(target.pool.rows) for target in targets if target is not None)


def _serving(pool: Pool) -> int:
    return sum(1 for row in pool.rows.values() if row.llm.status is Status.ACTIVE)


def _before_at_row(before: int, named: int, serving: int) -> int:
    """How many of those that go before one that waits for a row by name will go to that row.

    Args:
        before: how many go before it, for whichever row of the pool.
        named: how many others wait for that row by name.
        serving: how many rows the others are shared among.
    """
    named = min(named, before)
    return named + (before - named) // max(serving, 1)


def is_hopeful(row: Row, infer: Infer) -> bool:
    """Whether waiting for a row may come to anything. One that is paused may be resumed; one that is drained still serves
    whoever asked for it by name."""
    session = row.session
    if row.llm.status is Status.INACTIVE or session is None:
        return False
    if row.llm.hold == "drain" and infer.only is None:
        return False
    return session.channel is not None or session.pending is not None
