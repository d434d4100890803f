"""Placement: each numbered rule by example, and all of a small world against an independent statement of them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from wakecall.models import Kind, Status
from wakecall.placement import Placement, RowLoad, place

IDLE = RowLoad(
    status=Status.ACTIVE,
    kind=Kind.VIRTUAL,
    connected=True,
    succeeding=False,
    room=True,
    in_flight=0,
    max_concurrency=1,
    waiting=0,
    waking=False,
    max_waiting=2,
)
ASLEEP = replace(IDLE, status=Status.HIBERNATING)


@pytest.mark.parametrize(
    "row",
    [
        replace(IDLE, kind=Kind.PUBLIC),
        replace(ASLEEP, kind=Kind.PUBLIC),
        replace(IDLE, status=Status.INACTIVE),
        replace(IDLE, status=Status.INACTIVE, waking=True),
        replace(IDLE, connected=False),
        replace(ASLEEP, connected=False),
        replace(ASLEEP, connected=False, waking=True),
        replace(IDLE, connected=False, waiting=2),
    ],
)
def test_1_where_nobody_is_there_it_is_refused_and_nobody_is_woken(row: RowLoad) -> None:
    """Public, inactive, or no channel now or in a moment; said even where the queue is full."""
    assert place(row) is Placement.OFFLINE


@pytest.mark.parametrize(
    "row",
    [
        IDLE,
        replace(IDLE, max_concurrency=None, in_flight=10_000),
        replace(IDLE, max_concurrency=3, in_flight=2),
        replace(IDLE, max_waiting=0),
        replace(IDLE, succeeding=True),
    ],
)
def test_2_a_free_slot_with_nobody_before_us_is_taken(row: RowLoad) -> None:
    """Even where nobody may wait at all."""
    assert place(row) is Placement.DISPATCH


@pytest.mark.parametrize(
    "row",
    [
        replace(IDLE, in_flight=1, waiting=2),
        replace(IDLE, waiting=2),
        replace(ASLEEP, waiting=2),
        replace(ASLEEP, waiting=2, waking=True),
        replace(ASLEEP, max_waiting=0),
        replace(IDLE, in_flight=1, waiting=3),
    ],
)
def test_3_where_as_many_wait_as_may_it_is_refused(row: RowLoad) -> None:
    """For a slot or for a wake alike: one bound."""
    assert place(row) is Placement.FULL


@pytest.mark.parametrize(
    "row", [replace(ASLEEP, waking=True, waiting=1), replace(ASLEEP, waking=True, connected=False, succeeding=True)]
)
def test_4_a_wake_that_is_under_way_is_joined(row: RowLoad) -> None:
    """One wake, however many want it."""
    assert place(row) is Placement.JOIN


@pytest.mark.parametrize("row", [ASLEEP, replace(ASLEEP, in_flight=1), replace(ASLEEP, waiting=1)])
def test_5_a_hibernating_row_is_woken(row: RowLoad) -> None:
    """By the call."""
    assert place(row) is Placement.WAKE


@pytest.mark.parametrize(
    "row",
    [
        replace(IDLE, in_flight=1),
        replace(IDLE, waiting=1),
        replace(IDLE, room=False),
        replace(IDLE, max_concurrency=None, room=False),
        replace(IDLE, connected=False, succeeding=True),
        replace(ASLEEP, connected=False, succeeding=True),
    ],
)
def test_6_else_it_waits(row: RowLoad) -> None:
    """For a slot, for those before it, for the channel to take what it has, or for the newer channel."""
    assert place(row) is Placement.QUEUE


def test_all_of_a_small_world() -> None:
    """Each decision holds exactly where its own condition does, in every combination that there is."""
    seen = set()
    count = 0
    for values in itertools.product(
        Status, Kind, (True, False), (True, False), (True, False), (0, 1, 2), (None, 1, 2), (0, 1, 2), (True, False),
        (0, 1, 2),
    ):  # fmt: skip
        row = RowLoad(*values)
        routable = row.kind is Kind.VIRTUAL and row.status is not Status.INACTIVE and (row.connected or row.succeeding)
        slots = float("inf") if row.max_concurrency is None else row.max_concurrency
        at_once = (
            row.status is Status.ACTIVE
            and row.connected
            and row.room
            and row.in_flight + 1 <= slots
            and not row.waiting
        )
        may_wait = row.max_waiting - row.waiting >= 1
        asleep = row.status is Status.HIBERNATING
        holds = {
            Placement.OFFLINE: not routable,
            Placement.DISPATCH: routable and at_once,
            Placement.FULL: routable and not at_once and not may_wait,
            Placement.JOIN: routable and may_wait and asleep and row.waking,
            Placement.WAKE: routable and may_wait and asleep and row.connected and not row.waking,
            Placement.QUEUE: routable
            and may_wait
            and not at_once
            and (not asleep or not (row.waking or row.connected)),
        }
        decision = place(row)
        assert [each for each, true in holds.items() if true] == [decision], row
        seen.add(decision)
        count += 1
    assert seen == set(Placement)
    assert count == 7776
