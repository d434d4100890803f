"""The short way that an infer takes where there is one row to choose and nobody waits: it is `placement.choose`'s."""

from __future__ import annotations

import operator
from dataclasses import replace
from functools import reduce
from typing import Any, cast

import trio
from hypothesis import example, given
from hypothesis import strategies as st
from trio.testing import MockClock

from wakecall.config import BrokerConfig
from wakecall.directory import Directory
from wakecall.journal import Journal
from wakecall.models import LLM, InferRequest, Status
from wakecall.placement import LineLoad, Placement, choose
from wakecall.placing import Placer
from wakecall.row import Row, Target
from wakecall.session import Session
from wakecall.store.base import MemoryStore
from wakecall.task import Infer


class FakeChannel:
    def __init__(self, has_room: bool) -> None:
        self.has_room = has_room


class FakeSession:
    def __init__(self, channel: FakeChannel | None, pending: FakeChannel | None) -> None:
        self.channel = channel
        self.pending = pending


def make_infer(directory: Directory, now: float) -> Infer:
    request = InferRequest("/v1/chat/completions", b"{}")
    return Infer("t", "one", ("one",), request, directory.config, now, 600.0, lambda infer: None)


def make_row(directory: Directory, state: dict[str, Any], now: float) -> Row:
    """A row that takes infers, but for what `state` says."""
    names = {"status", "hold", "paused", "max_concurrency", "pool"}
    llm = LLM("one", "local", Status.ACTIVE, 0.0, 0.0, max_concurrency=3)
    row = directory.add_row(replace(llm, **{name: state[name] for name in names & state.keys()}), None)
    session = FakeSession(FakeChannel(has_room=True), None)
    row.session = cast("Session | None", state.get("session", session))
    row.in_flight, row.stopping = state.get("taken", (1, 1))
    row.yielding = state.get("yielding", False)
    for age_s in state.get("failures", ()):
        row.health.note_failure(now - age_s, 0)
    return row


@given(
    # Mostly all is well but for one or two things, or nothing would be sent whatever the rest.
    state=st.fixed_dictionaries(
        {},
        optional={
            "max_concurrency": st.none() | st.integers(2, 4),
            "taken": st.tuples(st.integers(0, 2), st.integers(0, 2)),
            "failures": st.lists(st.floats(0, 700), max_size=3),
            "pool": st.none() | st.just("pool"),
        },
    ),
    flaws=st.sets(st.integers(0, 7), max_size=2),
    named=st.booleans(),
)
@example(state={}, flaws=set(), named=True)
@example(state={}, flaws={0}, named=True)
@example(state={}, flaws={1}, named=True)
@example(state={}, flaws={2}, named=True)
@example(state={}, flaws={3}, named=True)
@example(state={}, flaws={4}, named=True)
@example(state={}, flaws={5}, named=True)
@example(state={}, flaws={6}, named=True)
@example(state={}, flaws={7}, named=True)
@example(state={"taken": (2, 1)}, flaws=set(), named=False)
def test_a_lone_row_gets_what_would_be_chosen_for_it(state: dict[str, Any], flaws: set[int], named: bool) -> None:
    """Whatever state it is in, and however it has failed: sent at once, or not, as the rules say."""
    each: list[dict[str, Any]] = [
        {"status": Status.HIBERNATING},
        {"status": Status.INACTIVE},
        {"hold": "drain"},
        {"paused": True},
        {"session": None},
        {"session": FakeSession(FakeChannel(has_room=False), None)},
        {"session": FakeSession(None, FakeChannel(has_room=True))},
        {"yielding": True},
    ]
    state = reduce(operator.or_, (each[flaw] for flaw in sorted(flaws)), state)

    async def main() -> None:
        directory = Directory(BrokerConfig(), Journal(MemoryStore()))
        placer = Placer(directory)
        now = trio.current_time()
        row = make_row(directory, state, now)
        target = Target(row.pool, "one" if named else None)
        infer = make_infer(directory, now)
        chosen = choose([placer.load_of(row, now)], LineLoad()).placement is Placement.DISPATCH
        assert (placer._lone_free_row(infer, target) is row) is chosen
        infer.refused_by = frozenset({"one"})
        assert placer._lone_free_row(infer, target) is None

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def test_of_two_rows_neither_is_alone(autojump_clock: MockClock) -> None:
    """Unless it is asked for by its name; and it is not while anybody waits."""
    directory = Directory(BrokerConfig(), Journal(MemoryStore()))
    placer = Placer(directory)
    rows: list[Row] = []
    for name in ("one", "two"):
        llm = LLM(name, "local", Status.ACTIVE, 0.0, 0.0, pool="pool")
        rows.append(directory.add_row(llm, None))
        rows[-1].session = cast("Session", FakeSession(FakeChannel(True), None))
    pool = rows[0].pool
    infer, other = make_infer(directory, 0.0), make_infer(directory, 0.0)
    assert placer._lone_free_row(infer, Target(pool, None)) is None
    assert placer._lone_free_row(infer, Target(pool, "two")) is rows[1]
    placer.add_to_line(other, Target(pool, None), first=False)
    assert placer._lone_free_row(infer, Target(pool, "two")) is None
