"""Placement: each numbered rule by example, and what must hold of any rows at all."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wakecall.models import Status
from wakecall.placement import Decision, LineLoad, Placement, RowLoad, choose, choose_wake, estimate_wait

ONE = RowLoad("one", Status.ACTIVE, max_concurrency=1)
TWO = replace(ONE, name="two")
FULL = replace(ONE, name="full", taken=1)
ASLEEP = RowLoad("asleep", Status.HIBERNATING, max_concurrency=1)
NOBODY = LineLoad()
SOMEBODY = LineLoad(before=1, waiting=1)


def sent_to(rows, line=NOBODY, affinity=None):
    decision = choose(rows, line, affinity)
    assert decision.placement is Placement.DISPATCH, decision
    return decision.row


# 1 ------------------------------------------------------------------------------------------------------------------

GONE = [
    replace(ONE, status=Status.INACTIVE),
    replace(ONE, status=Status.INACTIVE, waking=True),
    replace(ONE, connected=False),
    replace(ONE, held=True),
    replace(ASLEEP, connected=False),
    replace(ASLEEP, connected=False, waking=True),
    replace(ASLEEP, held=True),
]


@pytest.mark.parametrize("row", GONE)
@pytest.mark.parametrize("line", [NOBODY, SOMEBODY, LineLoad(room=0)])
def test_1_where_nobody_is_there_it_is_refused_and_nobody_is_woken(row: RowLoad, line: LineLoad) -> None:
    """Said even where too many wait."""
    assert choose([row], line) == Decision(Placement.OFFLINE)


def test_1_no_rows_at_all_are_nobody() -> None:
    assert choose([], NOBODY) == Decision(Placement.OFFLINE)


@pytest.mark.parametrize("row", GONE)
def test_1_what_is_not_there_counts_for_nothing_beside_one_that_is(row: RowLoad) -> None:
    assert sent_to([row, TWO]) == "two"
    assert choose([row, FULL], SOMEBODY) == choose([FULL], SOMEBODY)


# 2 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        ONE,
        replace(ONE, max_concurrency=None, taken=10_000),
        replace(ONE, max_concurrency=3, taken=2),
        replace(ONE, succeeding=True),
        replace(ONE, avoided=True),
        replace(ONE, on_trial=True),
        replace(ONE, on_trial=True, max_concurrency=4, taken=3),
    ],
)
def test_2_a_lone_row_with_a_free_slot_gets_it(row: RowLoad) -> None:
    """Even where nobody may wait at all, and whatever it has failed of late."""
    assert sent_to([row], LineLoad(room=0)) == "one"


@pytest.mark.parametrize(
    "row",
    [
        FULL,
        replace(ONE, room=False),
        replace(ONE, yielding=True),
        replace(ONE, connected=False, succeeding=True),
        replace(ONE, max_concurrency=2, taken=3),
    ],
)
def test_2_one_that_takes_nothing_now_is_waited_for(row: RowLoad) -> None:
    assert choose([row], NOBODY).placement is Placement.QUEUE
    assert sent_to([row, TWO]) == "two"


def test_2_nobody_overtakes_those_who_wait() -> None:
    assert choose([ONE], SOMEBODY).placement is Placement.QUEUE


@pytest.mark.parametrize(
    ("bad", "is_tried"),
    [
        (replace(ONE, avoided=True), False),
        (replace(ONE, on_trial=True, max_concurrency=9, taken=1), False),
        (replace(ONE, on_trial=True), True),
    ],
    ids=["avoided", "on trial and at work", "on trial and idle"],
)
def test_2_one_that_has_failed_counts_as_full_while_another_has_not(bad: RowLoad, is_tried: bool) -> None:
    """Even one that is full itself, for it will be free; one on trial gets one at a time."""
    decision = choose([bad, FULL], NOBODY)
    assert (decision.placement is Placement.DISPATCH) is is_tried
    assert decision.row == ("one" if is_tried else None)


def test_2_where_all_have_failed_the_one_whose_time_has_come_is_first() -> None:
    assert sent_to([replace(ONE, avoided=True), replace(TWO, on_trial=True)]) == "two"
    assert sent_to([replace(ONE, avoided=True), replace(FULL, on_trial=True)]) == "one"


def test_2a_the_fewest_in_flight_for_what_it_bears() -> None:
    half, third = replace(ONE, max_concurrency=2, taken=1), replace(TWO, max_concurrency=6, taken=2)
    assert sent_to([half, third]) == sent_to([third, half]) == "two"


def test_2a_load_comes_before_the_first_byte() -> None:
    quick = replace(ONE, max_concurrency=2, taken=1, first_byte_s=0.01)
    assert sent_to([quick, replace(TWO, first_byte_s=9.0)]) == "two"


def test_2a_a_row_without_a_bound_is_taken_to_bear_some() -> None:
    """Or it would be free of load for ever, and all would go to it."""
    endless = replace(ONE, max_concurrency=None, taken=8)
    assert sent_to([endless, replace(TWO, max_concurrency=10, taken=4)]) == "two"
    assert sent_to([endless, replace(TWO, max_concurrency=10, taken=6)]) == "one"


@pytest.mark.parametrize(("other_s", "best"), [(0.2, "one"), (0.05, "two"), (None, "two")])
def test_2b_the_better_first_byte_and_the_unmeasured_before_all(other_s: float | None, best: str) -> None:
    rows = [replace(ONE, first_byte_s=0.1), replace(TWO, first_byte_s=other_s)]
    assert sent_to(rows) == sent_to(rows[::-1]) == best


def test_2b_times_within_a_quarter_are_equal() -> None:
    """So that noise decides nothing which affinity could."""
    rows = [replace(ONE, first_byte_s=1.0, last_sent_at=2.0), replace(TWO, first_byte_s=1.2, last_sent_at=1.0)]
    assert sent_to(rows) == "two"


def test_2c_without_affinity_whoever_has_waited_the_longest_for_one() -> None:
    rows = [replace(ONE, last_sent_at=5.0), replace(TWO, last_sent_at=4.0)]
    assert sent_to(rows) == sent_to(rows[::-1]) == "two"


def test_2c_affinity_decides_among_equals_and_moves_few_when_a_row_goes() -> None:
    """Rendezvous hashing: conversations spread over the rows, and only those of the row that went go elsewhere."""
    rows = [replace(ONE, name=f"row{number}", last_sent_at=float(number)) for number in range(4)]
    talks = [str(number).encode() for number in range(400)]
    before = {talk: sent_to(rows, affinity=talk) for talk in talks}
    counts = [list(before.values()).count(row.name) for row in rows]
    assert min(counts) > 60, counts
    after = {talk: sent_to(rows[1:], affinity=talk) for talk in talks}
    assert all(after[talk] == row for talk, row in before.items() if row != "row0")
    assert {after[talk] for talk, row in before.items() if row == "row0"} == {"row1", "row2", "row3"}


def test_2c_affinity_draws_nobody_to_a_busier_row() -> None:
    for talk in range(50):
        rows = [replace(ONE, max_concurrency=4, taken=1), replace(TWO, max_concurrency=4)]
        assert sent_to(rows, affinity=str(talk).encode()) == "two"


@pytest.mark.parametrize("affinity", [b"", b"x" * 64, b"x" * 1000])
def test_2c_a_hint_may_be_of_any_length(affinity: bytes) -> None:
    assert sent_to([ONE, TWO], affinity=affinity) == sent_to([TWO, ONE], affinity=affinity)


# 3, 4 ---------------------------------------------------------------------------------------------------------------

SLOW = replace(FULL, service_s=20.0)


@pytest.mark.parametrize("row", [FULL, ASLEEP, replace(ASLEEP, waking=True), replace(ONE, yielding=True)])
@pytest.mark.parametrize("room", [0, -1])
def test_3_where_as_many_wait_as_may_it_is_refused(row: RowLoad, room: int) -> None:
    assert choose([row], LineLoad(before=1, waiting=1, room=room)).placement is Placement.FULL


def test_3_the_refusal_says_how_long_the_wait_would_be() -> None:
    assert choose([SLOW], LineLoad(before=2, room=0)).wait_s == pytest.approx(60)


@pytest.mark.parametrize(("before", "placement"), [(2, Placement.QUEUE), (3, Placement.FULL)])
def test_4_whoever_would_wait_for_longer_than_he_can_is_refused(before: int, placement: Placement) -> None:
    decision = choose([SLOW], LineLoad(before=before, waiting=before, patience_s=60.0))
    assert decision.placement is placement
    assert decision.wait_s == pytest.approx(20 * (before + 1))


def test_4_where_nothing_is_measured_nobody_is_refused() -> None:
    assert choose([FULL], LineLoad(before=999, patience_s=1.0)).placement is Placement.QUEUE


@pytest.mark.parametrize("row", [replace(ASLEEP, wake_s=10.0, wake_is_measured=True), replace(ASLEEP, waking=True)])
def test_4_one_that_wakes_shortens_the_wait(row: RowLoad) -> None:
    """By how much nobody knows: so nobody is refused for the estimate."""
    assert choose([SLOW, row], LineLoad(before=9, waiting=9, patience_s=60.0)).placement is Placement.QUEUE
    assert choose([SLOW, replace(row, held=True)], LineLoad(before=9, patience_s=60.0)).placement is Placement.FULL


# 5: whom to wake ----------------------------------------------------------------------------------------------------

QUICK = replace(ASLEEP, name="quick", wake_s=10.0, wake_is_measured=True)


def test_5_a_sleeping_row_is_woken_where_nobody_serves() -> None:
    assert choose([ASLEEP], NOBODY) == Decision(Placement.QUEUE, wake="asleep")
    assert choose([replace(ONE, yielding=True), ASLEEP], NOBODY).wake == "asleep"


def test_5_active_before_hibernating() -> None:
    assert choose([QUICK, ONE], NOBODY) == Decision(Placement.DISPATCH, "one")


@pytest.mark.parametrize(
    ("rows", "before", "woken"),
    [
        ([QUICK, SLOW], 0, "quick"),
        ([replace(QUICK, wake_s=30.0), SLOW], 0, None),
        ([replace(QUICK, wake_s=30.0), SLOW], 1, "quick"),
        ([QUICK, FULL], 99, None),
        ([replace(ASLEEP, wake_s=40.0), SLOW], 0, "asleep"),
        ([replace(ASLEEP, wake_s=120.0), SLOW], 0, None),
        ([QUICK, replace(ONE, avoided=True)], 0, "quick"),
        ([QUICK, replace(SLOW, on_trial=True)], 0, "quick"),
        ([replace(QUICK, connected=False, succeeding=True)], 0, None),
        ([QUICK, replace(ASLEEP, waking=True)], 0, None),
        ([QUICK, replace(ASLEEP, wake_s=9.0, wake_is_measured=True)], 0, "asleep"),
        ([replace(QUICK, avoided=True), ASLEEP], 0, "asleep"),
        ([replace(QUICK, avoided=True)], 0, "quick"),
        ([replace(QUICK, held=True)], 0, None),
    ],
    ids=[
        "waking is quicker",
        "waiting is quicker",
        "with more before it waking is",
        "nothing measured: nobody is woken",
        "an unseen wake is a quarter of its most",
        "and that is too long",
        "whoever serves is avoided",
        "one on trial serves",
        "no channel to say it on",
        "one at a time",
        "the quickest",
        "not avoided first",
        "avoided and alone",
        "held",
    ],
)
def test_5_whom_to_wake(rows: list[RowLoad], before: int, woken: str | None) -> None:
    assert choose_wake(rows, before) == choose_wake(rows[::-1], before) == woken


# The estimate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "before", "wait_s"),
    [
        ([], 0, None),
        ([FULL], 3, None),
        ([SLOW], 0, 20.0),
        ([SLOW], 4, 100.0),
        ([replace(SLOW, max_concurrency=4)], 0, 5.0),
        ([SLOW, replace(SLOW, service_s=5.0)], 0, 4.0),
        ([SLOW, FULL], 0, 10.0),
        ([SLOW, replace(SLOW, avoided=True)], 0, 20.0),
        ([SLOW, replace(SLOW, yielding=True)], 0, 20.0),
        ([SLOW, replace(SLOW, held=True)], 0, 20.0),
        ([replace(SLOW, service_s=0.0)], 0, 0.001),
    ],
    ids=[
        "nobody",
        "nothing measured",
        "one slot",
        "behind others",
        "four slots",
        "the sum of the rates",
        "one unmeasured is like those that are",
        "avoided",
        "yielding",
        "held",
        "no time at all",
    ],
)
def test_the_estimate(rows: list[RowLoad], before: int, wait_s: float | None) -> None:
    assert estimate_wait(rows, before) == (None if wait_s is None else pytest.approx(wait_s))


# Whatever the rows --------------------------------------------------------------------------------------------------

seconds = st.none() | st.floats(0.0, 1e4)
row_loads = st.builds(
    RowLoad,
    name=st.sampled_from("abcdef"),
    status=st.sampled_from(Status),
    connected=st.booleans(),
    succeeding=st.booleans(),
    room=st.booleans(),
    held=st.sampled_from([False, False, True]),
    yielding=st.sampled_from([False, False, True]),
    taken=st.integers(0, 4),
    max_concurrency=st.none() | st.integers(1, 4),
    waking=st.booleans(),
    avoided=st.booleans(),
    on_trial=st.booleans(),
    first_byte_s=seconds,
    service_s=seconds,
    wake_s=st.floats(0.1, 1e3),
    wake_is_measured=st.booleans(),
    last_sent_at=st.just(-math.inf) | st.floats(0, 10),
)
lines = st.builds(
    LineLoad,
    before=st.integers(0, 3),
    waiting=st.integers(0, 3),
    room=st.integers(-1, 2),
    patience_s=st.floats(0, 100) | st.just(math.inf),
)
some_rows = st.lists(row_loads, max_size=5, unique_by=lambda row: row.name)


def takes_one(row: RowLoad) -> bool:
    return (
        row.status is Status.ACTIVE
        and row.connected
        and row.room
        and not row.held
        and not row.yielding
        and (row.max_concurrency is None or row.taken < row.max_concurrency)
    )


@settings(max_examples=200, deadline=None)
@given(some_rows, lines, st.none() | st.binary(max_size=80), st.randoms())
def test_of_any_rows(rows: list[RowLoad], line: LineLoad, affinity: bytes | None, random) -> None:
    decision = choose(rows, line, affinity)
    by_name = {row.name: row for row in rows}
    shuffled = random.sample(rows, len(rows))
    again = choose(shuffled, line, affinity)
    assert again[:3] == decision[:3], "the order of the rows decides nothing"
    routable = [row for row in rows if row.is_routable]
    assert (decision.placement is Placement.OFFLINE) is (not routable)
    if decision.row is not None:
        row = by_name[decision.row]
        assert takes_one(row)
        assert line.before == 0
        if not (row.avoided or row.on_trial):
            healthy = [each for each in rows if takes_one(each) and not (each.avoided or each.on_trial)]
            assert row.load == min(each.load for each in healthy)
    elif line.before == 0:
        assert not any(takes_one(row) and not (row.avoided or row.on_trial) for row in rows)
    if decision.wake is not None:
        row = by_name[decision.wake]
        assert row.status is Status.HIBERNATING
        assert row.connected
        assert not row.held
        assert not any(each.waking for each in routable)
    if decision.placement is Placement.QUEUE:
        assert line.room > 0
        assert decision.row is None


@settings(max_examples=200, deadline=None)
@given(row_loads, lines)
def test_a_lone_rows_penalty_does_not_matter(row: RowLoad, line: LineLoad) -> None:
    fine = replace(row, avoided=False, on_trial=False)
    for bad in (replace(fine, avoided=True), replace(fine, on_trial=True), replace(fine, avoided=True, on_trial=True)):
        assert choose([bad], line)[:3] == choose([fine], line)[:3]
