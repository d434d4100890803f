"""Requests a minute: as many at once, then evenly, and never more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wakecall.limits import RequestRate


def test_a_minutes_worth_may_come_at_once_and_then_one_for_each_share() -> None:
    rate = RequestRate(3)
    assert [rate.take(100.0).allowed for _ in range(4)] == [True, True, True, False]
    assert not rate.take(119.0).allowed
    assert rate.take(120.0).allowed
    assert not rate.take(120.0).allowed


def test_it_says_how_it_stands() -> None:
    rate = RequestRate(60)
    first = rate.take(0.0)
    assert (first.limit, first.remaining, first.reset_s, first.retry_after_s) == (60, 59, 1.0, 0.0)
    for _ in range(58):
        rate.take(0.0)
    last = rate.take(0.5)
    assert (last.allowed, last.remaining, last.reset_s) == (True, 0, 59.5)
    assert last.retry_after_s == pytest.approx(0.5)
    refused = rate.take(0.6)
    assert (refused.allowed, refused.remaining) == (False, 0)
    assert refused.retry_after_s == pytest.approx(0.4)


def test_a_refused_request_costs_nothing() -> None:
    rate = RequestRate(1)
    assert rate.take(0.0).allowed
    assert not any(rate.take(0.0).allowed for _ in range(100))
    assert rate.take(60.0).allowed


def test_after_a_quiet_hour_there_is_a_minutes_worth_and_no_more() -> None:
    rate = RequestRate(10)
    assert [rate.take(3600.0).allowed for _ in range(11)] == [True] * 10 + [False]


@given(st.integers(1, 1_000_000), st.floats(0, 1e10))
def test_the_last_of_a_minute_does_not_fail_by_a_rounding(rpm: int, start: float) -> None:
    """Of shares that no float holds exactly; seen from the end, for a million of them would take long."""
    rate = RequestRate(rpm)
    rate._full_at = start + 60.0 - 60.0 / rpm
    assert rate.take(start).allowed is True
    if start < 1e6:
        assert rate.take(start).allowed is False


@given(st.integers(1, 50), st.lists(st.floats(0, 10), max_size=300))
def test_no_minute_sees_more_than_twice_the_bound_nor_a_retry_that_comes_too_early(
    rpm: int, pauses: list[float]
) -> None:
    """A full bucket and what flows in meanwhile; and whoever waits as long as he was told is let through."""
    rate, now, taken = RequestRate(rpm), 0.0, list[float]()
    for pause in pauses:
        now += pause
        state = rate.take(now)
        if not state.allowed:
            now += state.retry_after_s + 1e-6
            assert rate.take(now).allowed
        taken.append(now)
        assert sum(1 for each in taken if each > now - 60.0) <= 2 * rpm
