"""What a sweep retires, and how little it reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Generic, TypeVar

from hypothesis import given
from hypothesis import strategies as st

from wakecall.models import LLM, SessionRecord, Status
from wakecall.sweep import SweepDecision, decide

T = TypeVar("T")

NOW = 1_700_000_000.0
TIMEOUT_S = 90.0
RETENTION_S = 4 * 3600.0


class Counting(Generic[T]):
    """An iterable that knows how many of its items were taken."""

    def __init__(self, items: Iterable[T]) -> None:
        self._items = list(items)
        self.taken = 0

    def __iter__(self) -> Iterator[T]:
        for item in self._items:
            self.taken += 1
            yield item


def live(age_s: float) -> LLM:
    return LLM(f"live {age_s}", "local", Status.ACTIVE, 0.0, NOW - age_s)


def inactive(age_s: float) -> LLM:
    return LLM(f"inactive {age_s}", "local", Status.INACTIVE, 0.0, 0.0, inactive_since=NOW - age_s)


def unused(age_s: float) -> SessionRecord:
    return SessionRecord(f"unused {age_s}", "local", 0.0, 0.0, unused_since=NOW - age_s)


def sweep(
    rows: Iterable[LLM] = (),
    gone: Iterable[LLM] = (),
    sessions: Iterable[SessionRecord] = (),
    *,
    now: float = NOW,
    deletes: bool = True,
) -> SweepDecision:
    return decide(
        rows,
        gone,
        sessions,
        now=now,
        heartbeat_timeout_s=TIMEOUT_S,
        inactive_retention_s=RETENTION_S,
        deletes=deletes,
    )


def test_nothing_there_nothing_done() -> None:
    assert sweep() == SweepDecision((), (), ())


def test_what_is_due_goes_and_what_is_not_stays() -> None:
    """At the timeout itself a row is stale, at the retention time itself it is deleted, a session likewise."""
    decision = sweep(
        [live(1000.0), live(90.0), live(89.75)],
        [inactive(20_000.0), inactive(14_400.0), inactive(14_399.75)],
        [unused(20_000.0), unused(14_400.0), unused(14_399.75)],
    )
    assert decision.stale == ("live 1000.0", "live 90.0")
    assert decision.expired == ("inactive 20000.0", "inactive 14400.0")
    assert decision.unused == ("unused 20000.0", "unused 14400.0")


def test_it_reads_no_further_than_the_first_that_stays() -> None:
    """A sweep costs what it retires, not what there is."""
    rows = Counting([live(100.0), live(95.0), *(live(1.0) for _ in range(1000))])
    gone = Counting([inactive(20_000.0), *(inactive(1.0) for _ in range(1000))])
    sessions = Counting([unused(1.0) for _ in range(1000)])
    decision = sweep(rows, gone, sessions)
    assert (len(decision.stale), len(decision.expired), len(decision.unused)) == (2, 1, 0)
    assert (rows.taken, gone.taken, sessions.taken) == (3, 2, 1)


def test_a_young_broker_deletes_nothing() -> None:
    """Within its first heartbeat timeout publishers are on their way: rows go inactive, none is deleted, nothing is
    even looked at."""
    gone, sessions = Counting([inactive(1e6)]), Counting([unused(1e6)])
    assert sweep([live(100.0)], gone, sessions, deletes=False) == SweepDecision(("live 100.0",), (), ())
    assert (gone.taken, sessions.taken) == (0, 0)


def test_a_heartbeat_from_after_now_is_no_trouble() -> None:
    """A file from a machine whose clock went ahead: the row is simply not stale."""
    assert sweep([live(-50.0)], [inactive(-50.0)], [unused(-50.0)]) == SweepDecision((), (), ())


ages = st.lists(st.floats(-100, 200_000), max_size=12)


@given(ages, ages, ages, st.floats(0, 100_000), st.booleans())
def test_sweeping_twice_finds_nothing_new(
    rows: list[float], gone: list[float], sessions: list[float], later_s: float, deletes: bool
) -> None:
    """Once applied, the same sweep has nothing to do; and what was due stays due while nobody heartbeats."""
    table = {f"r{index}": replace(live(age), name=f"r{index}") for index, age in enumerate(rows)}
    table |= {f"i{index}": replace(inactive(age), name=f"i{index}") for index, age in enumerate(gone)}
    known = {f"s{index}": replace(unused(age), session_id=f"s{index}") for index, age in enumerate(sessions)}

    def run(now: float) -> SweepDecision:
        alive = [row for row in table.values() if row.status is not Status.INACTIVE]
        dead = [row for row in table.values() if row.status is Status.INACTIVE]
        return sweep(
            sorted(alive, key=lambda row: row.last_heartbeat_at),
            sorted(dead, key=lambda row: row.inactive_since or 0.0),
            sorted(known.values(), key=lambda session: session.unused_since or 0.0),
            now=now,
            deletes=deletes,
        )

    first = run(NOW)
    after = run(NOW + later_s)
    assert set(first.stale) <= set(after.stale)
    assert set(first.expired) <= set(after.expired)
    assert set(first.unused) <= set(after.unused)
    assert first.stale == tuple(
        row.name
        for row in sorted(table.values(), key=lambda row: row.last_heartbeat_at)
        if row.status is not Status.INACTIVE and row.last_heartbeat_at <= NOW - TIMEOUT_S
    )
    for name in first.stale:
        table[name] = replace(table[name], status=Status.INACTIVE, inactive_since=NOW)
    for name in first.expired:
        del table[name]
    for session_id in first.unused:
        del known[session_id]
    assert run(NOW) == SweepDecision((), (), ())
