"""The short way that an infer takes where there is one row to choose and nobody waits: it is `placement.choose`'s."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from wakecall.config import BrokerConfig
from wakecall.directory import Directory, Row, Target
from wakecall.journal import Journal
from wakecall.models import LLM, InferRequest, Status
from wakecall.placement import LineLoad, Placement, choose
from wakecall.placing import Placer
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


channels = st.none() | st.booleans().map(FakeChannel)


@given(
    record=st.fixed_dictionaries(
        {
            "status": st.sampled_from(Status),
            "max_concurrency": st.none() | st.integers(1, 3),
            "hold": st.sampled_from([None, "drain", "pause"]),
            "paused": st.booleans(),
        }
    ),
    session=st.none() | st.builds(FakeSession, channels, channels),
    taken=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    yielding=st.booleans(),
    failures=st.integers(0, 3),
    succeeded=st.booleans(),
    age_s=st.floats(0, 700),
    pooled=st.booleans(),
    named=st.booleans(),
    refused=st.booleans(),
)
def test_a_lone_row_gets_what_would_be_chosen_for_it(
    record: dict[str, Any],
    session: FakeSession | None,
    taken: tuple[int, int],
    yielding: bool,
    failures: int,
    succeeded: bool,
    age_s: float,
    pooled: bool,
    named: bool,
    refused: bool,
) -> None:
    """Whatever state it is in, and however it has failed: sent at once, or not, as the rules say."""

    async def main() -> None:
        directory = Directory(BrokerConfig(), Journal(MemoryStore()))
        placer = Placer(directory)
        llm = LLM("one", "local", Status.ACTIVE, 0.0, 0.0, pool="pool" if pooled else None)
        row = directory.add_row(replace(llm, **record), None)
        row.session = cast("Session | None", session)
        row.in_flight, row.stopping = taken
        row.yielding = yielding
        now = trio.current_time()
        for _ in range(failures):
            row.health.note_failure(now - age_s, 0)
        if succeeded:
            row.health.note_success(now, 1.0)
        target = Target(row.pool, "one" if named else None)
        request = InferRequest("/v1/chat/completions", b"{}")
        infer = Infer("t", "one", ("one",), request, directory.config, now, 600.0, lambda infer: None)
        infer.refused_by = frozenset({"one"}) if refused else frozenset()
        loads = [] if refused else [placer.load_of(row, now)]
        chosen = choose(loads, LineLoad()).placement is Placement.DISPATCH
        assert (placer._lone_free_row(infer, target) is row) is chosen

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
    request = InferRequest("/v1/chat/completions", b"{}")
    infer, other = (
        Infer("t", "one", ("one",), request, directory.config, 0.0, 600.0, lambda infer: None) for _ in range(2)
    )
    assert placer._lone_free_row(infer, Target(pool, None)) is None
    assert placer._lone_free_row(infer, Target(pool, "two")) is rows[1]
    placer.add_to_line(other, Target(pool, None), first=False)
    assert placer._lone_free_row(infer, Target(pool, "two")) is None
