"""What a soak calls a leak, on figures made up: the verdict has to be right before the figures matter."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.soak.measure import BLOCKS, GAUGES, GROWTH_BYTES, MIB, Rest, Sample, findings, grown, rise, table

ENDED = "wakecall_infers_ended_total{outcome=%s}"
START = dict.fromkeys(GAUGES, 0.0) | {"process_open_fds": 15.0, "wakecall_trio_tasks": 17.0}
BEFORE = Rest(START | {"wakecall_infers_accepted_total": 100, ENDED % "failed": 100}, 300_000, {"dict": 5000}, 70 * MIB)
AFTER = Rest(
    START | {"wakecall_infers_accepted_total": 2100, ENDED % "failed": 600, ENDED % "completed": 1500},
    300_500,
    {"dict": 5100, "trio.Event": 12},
    90 * MIB,
)
FLAT = [Sample(float(at), 90 * MIB) for at in range(600)]


def leaks(after: Rest = AFTER, samples: list[Sample] = FLAT) -> list[str]:
    return [each.what for each in findings(START, BEFORE, after, samples) if not each.is_good]


def test_what_comes_back_is_no_leak() -> None:
    assert leaks() == []


@pytest.mark.parametrize("gauge", GAUGES)
def test_one_more_of_anything_is_a_leak(gauge: str) -> None:
    more = replace(AFTER, metrics=AFTER.metrics | {gauge: START[gauge] + 1})
    assert leaks(more) == [gauge]


def test_an_infer_that_was_accepted_and_never_ended_is_a_leak() -> None:
    more = replace(AFTER, metrics=AFTER.metrics | {ENDED % "completed": 1499.0})
    assert leaks(more) == ["infers ended"]


def test_one_block_for_each_infer_is_a_leak() -> None:
    """And what fills up once is none."""
    assert leaks(replace(AFTER, blocks=BEFORE.blocks + 2000)) == ["memory blocks"]
    assert leaks(replace(AFTER, blocks=BEFORE.blocks + BLOCKS)) == []
    assert grown(BEFORE, AFTER) == [("dict", 100), ("trio.Event", 12)]


def test_memory_that_rises_in_the_second_half_is_a_leak() -> None:
    """A steady rise is, swings and a high start are none."""
    dice = random.Random(1)
    rising = [Sample(at, int(90 * MIB + 2.2 * GROWTH_BYTES * at / 600)) for at in range(601)]
    assert rise(rising) == pytest.approx(1.1 * GROWTH_BYTES, rel=0.01)
    assert leaks(samples=rising) == ["resident, second half"]
    swinging = [Sample(at, 90 * MIB + dice.randrange(20 * MIB)) for at in range(600)]
    warming = [Sample(at, 90 * MIB + min(at, 250) * MIB) for at in range(600)]
    assert leaks(samples=swinging) == leaks(samples=warming) == []


def test_half_a_minute_may_swing_by_more() -> None:
    for most, is_leak in ((22, False), (26, True)):
        rising = [Sample(at / 10, int(90 * MIB + 2 * most * MIB * at / 300)) for at in range(301)]
        assert bool(leaks(samples=rising)) is is_leak


def test_the_table_says_what_is_left_over() -> None:
    shown = table(findings(START, BEFORE, replace(AFTER, metrics=AFTER.metrics | {"process_open_fds": 16.0}), FLAT))
    assert [line.split() for line in shown.splitlines() if "LEFT OVER" in line] == [
        ["process_open_fds", "15", "16", "15", "LEFT", "OVER"]
    ]
