"""How a row has been doing: what a failure costs it, by time and by infers, and how it is forgiven."""

from __future__ import annotations

import pytest

from wakecall.health import Health


def failed(times, *, sent=0):
    """A row that has failed so many times in a row, each time as soon as it was tried. Returns it, and when that was."""
    health, now = Health(), 0.0
    for _ in range(times):
        now = max(now, health.avoided_until)
        health.note_failure(now, sent)
    return health, now


def avoided_for(health, now, sent):
    """Seconds that it is avoided for, if infers are no obstacle."""
    return next(tenth / 10 for tenth in range(10_000) if not health.is_avoided(now + tenth / 10, sent))


def test_one_in_good_health_is_neither_avoided_nor_on_trial():
    health = Health()
    assert (health.is_avoided(0.0, 0), health.is_on_trial(0.0), health.penalty(0.0)) == (False, False, 0.0)


@pytest.mark.parametrize(("failures", "seconds"), [(1, 1), (2, 2), (3, 4), (4, 8), (7, 60), (8, 60), (20, 60)])
def test_each_failure_doubles_the_time_for_which_it_is_avoided(failures, seconds):
    """Up to a minute. While it is avoided its penalty does not decay, so that one which always fails gets there."""
    health, now = failed(failures)
    assert avoided_for(health, now, sent=1000) == pytest.approx(seconds, abs=0.2)


@pytest.mark.parametrize(("failures", "infers"), [(1, 2), (2, 4), (5, 32), (6, 64), (50, 64)])
def test_it_is_avoided_until_so_many_went_to_its_pool(failures, infers):
    """However slowly they come: else in a quiet pool every one would find it forgiven."""
    health, _ = failed(failures, sent=7)
    later = health.avoided_until + 1.0
    assert health.is_avoided(later, 7 + infers - 1)
    assert not health.is_avoided(later, 7 + infers)


@pytest.mark.parametrize(("failures", "seconds"), [(1, 10), (2, 20), (6, 320), (7, 600), (50, 600)])
def test_after_some_time_it_is_tried_however_few_there_were(failures, seconds):
    """A single failure costs it ten seconds at the most, though nobody else be free."""
    health, now = failed(failures)
    assert health.is_avoided(now + seconds - 1, 0)
    assert not health.is_avoided(now + seconds, 0)


def test_the_infers_of_another_pool_do_not_count():
    """A row that has moved from a busy pool to a quiet one is not avoided for all the infers between the two."""
    health, now = failed(8, sent=1_000_000)
    assert not health.is_avoided(now + 61.0, 3)


def test_it_is_on_trial_until_one_has_gone_well():
    """However long ago it failed."""
    health, now = failed(3)
    later = now + 3600.0
    assert health.penalty(later) < 0.01
    assert health.is_on_trial(later)
    health.note_success(later, 1.0)
    assert not health.is_on_trial(later)


def test_it_is_on_trial_until_its_penalty_is_small():
    """Each success halves it. After the last of them nothing is left."""
    health, _ = failed(3)
    now = health.avoided_until
    seen = []
    for _ in range(3):
        health.note_success(now, 1.0)
        seen.append(health.is_on_trial(now))
    assert seen == [True, True, False]
    assert (health.penalty(now), health.is_avoided(0.0, 0)) == (0.0, False)


def test_a_penalty_halves_each_half_minute_in_which_it_is_not_avoided():
    health, now = failed(1)
    assert [health.penalty(now + seconds) for seconds in (0, 1, 31, 61)] == pytest.approx([1, 1, 0.5, 0.25])


def test_what_is_measured_is_followed():
    """The first as it is, each further one for a fifth."""
    health = Health()
    assert (health.first_byte_s, health.service_s, health.wake_s) == (None, None, None)
    for note in (health.note_first_byte, health.note_wake, lambda seconds: health.note_success(0.0, seconds)):
        note(10.0)
        note(20.0)
    assert (health.first_byte_s, health.service_s, health.wake_s) == (12.0, 12.0, 12.0)
