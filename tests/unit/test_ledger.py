"""The ledger: what it sums, what it holds, and that a store which gets its cells in any order of trouble has the sums."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wakecall.ledger import OTHERS, CellKey, Ledger, Usage, hour_of

ONE = Usage(requests=1, completed=1, tokens_in=3, tokens_out=2, seconds=0.5)


@pytest.mark.parametrize(
    ("now", "hour"), [(0.0, 0), (3599.999, 0), (3600.0, 1), (1_700_000_000.0, 472_222), (-0.5, -1)]
)
def test_an_hour_begins_with_its_first_second(now: float, hour: int) -> None:
    assert hour_of(now) == hour


def test_a_sum_is_of_every_member() -> None:
    each = Usage(1, 2, 3, 4, 5, 6, 7, 0.5)
    assert each + each == Usage(2, 4, 6, 8, 10, 12, 14, 1.0)


def test_cells_are_by_hour_key_and_llm() -> None:
    ledger = Ledger(10)
    for hour, key_id, llm in [(1, "k", "a"), (1, "k", "b"), (1, None, "a"), (2, "k", "a"), (2, "k", "a")]:
        ledger.add(hour, key_id, llm, ONE)
    assert ledger.unwritten() == {
        (1, "k", "a"): ONE,
        (1, "k", "b"): ONE,
        (1, "", "a"): ONE,
        (2, "k", "a"): ONE + ONE,
    }


def test_what_is_written_is_not_written_again_but_for_what_came_since() -> None:
    ledger = Ledger(10)
    ledger.add(1, "k", "a", ONE)
    ledger.add(1, "k", "b", ONE)
    written = ledger.unwritten()
    ledger.add(1, "k", "a", ONE)
    ledger.note_written(written)
    assert ledger.unwritten() == {(1, "k", "a"): ONE + ONE}
    assert not ledger.is_written
    ledger.note_written(ledger.unwritten())
    assert ledger.is_written


def test_a_cell_goes_on_as_it_was_written_for_as_long_as_its_hour_lasts() -> None:
    """The store keeps the last state, so what is in memory has to be all of it."""
    ledger = Ledger(10)
    ledger.add(1, "k", "a", ONE)
    ledger.note_written(ledger.unwritten())
    ledger.add(1, "k", "a", ONE)
    assert ledger.unwritten() == {(1, "k", "a"): ONE + ONE}


def test_a_cell_goes_on_as_it_was_loaded() -> None:
    ledger = Ledger(10)
    ledger.load({(1, "k", "a"): ONE, (9, "k", "a"): ONE})
    assert ledger.unwritten() == {}
    ledger.add(1, "k", "a", ONE)
    assert ledger.unwritten() == {(1, "k", "a"): ONE + ONE}
    # An hour in which the last broker's clock was, before it was set back.
    ledger.add(9, "k", "a", ONE)
    assert ledger.unwritten()[9, "k", "a"] == ONE + ONE


def test_what_is_written_of_an_hour_that_is_over_is_let_go() -> None:
    """Be it written before the hour ended or after."""
    ledger = Ledger(10)
    ledger.add(1, "k", "before", ONE)
    ledger.note_written(ledger.unwritten())
    ledger.add(1, "k", "after", ONE)
    ledger.add(2, "k", "now", ONE)
    assert ledger.unwritten().keys() == {(1, "k", "after"), (2, "k", "now")}
    assert len(ledger) == 2
    ledger.note_written(ledger.unwritten())
    assert len(ledger) == 1


def test_beyond_its_bound_all_is_counted_as_others() -> None:
    """So the sums are right, and what was known before goes on."""
    ledger = Ledger(3)
    for number in range(10):
        ledger.add(1, "k", f"m{number}", ONE)
    ledger.add(1, "k", "m0", ONE)
    assert ledger.unwritten() == {
        (1, "k", "m0"): ONE + ONE,
        (1, "k", "m1"): ONE,
        (1, "k", "m2"): ONE,
        (1, OTHERS, OTHERS): Usage(7, 7, 0, 0, 0, 21, 14, 3.5),
    }


def test_a_store_that_is_down_for_hours_fills_it_no_further() -> None:
    ledger = Ledger(3)
    for hour in range(1, 20):
        for number in range(10):
            ledger.add(hour, "k", f"m{number}", ONE)
    assert len(ledger) <= 3 + 19
    total = sum(ledger.unwritten().values(), Usage())
    assert (total.requests, total.tokens_in, total.seconds) == (190, 570, 95.0)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from(["a", "b", "c", "d"])),
        st.tuples(st.sampled_from(["flush", "commit", "lose", "hour", "restart"]), st.just("")),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(steps=steps, bound=st.integers(1, 4))
def test_the_store_ends_with_the_sum_of_all_that_was_added(steps: list[tuple[str, str]], bound: int) -> None:
    """Whatever is committed once, twice or not at all, whenever hours change and brokers restart in good order."""
    stored: dict[CellKey, Usage] = {}
    ledger, under_way, hour, added = Ledger(bound), dict[CellKey, Usage](), 1, 0
    for what, llm in [*steps, ("restart", "")]:
        match what:
            case "add":
                ledger.add(hour, "k", llm, ONE)
                added += 1
            case "flush":
                # As the journal does: the last state of each, until one commit has gone well.
                under_way |= ledger.unwritten()
            case "commit":
                stored |= under_way
                ledger.note_written(under_way)
                under_way = {}
            case "lose":
                stored |= under_way  # it was committed, but nobody heard of it: so it is repeated
            case "hour":
                hour += 1
            case "restart":
                stored |= under_way | ledger.unwritten()
                under_way, ledger = {}, Ledger(bound)
                ledger.load({cell: usage for cell, usage in stored.items() if cell[0] >= hour})
    total = sum(stored.values(), Usage())
    assert (total.requests, total.tokens_in, total.tokens_out, total.seconds) == (
        added,
        3 * added,
        2 * added,
        added / 2,
    )
