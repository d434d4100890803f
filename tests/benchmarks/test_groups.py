"""The groups of figures, with tiny numbers: that they measure what they say, not how fast it is."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest
import trio

from tests.benchmarks import start, sweeps
from wakecall import Status, open_sqlite_store


def test_start_compares_in_turn() -> None:
    figure = start.compare("spin", ["-c", "sum(range(10**7))"], ["-c", "pass"], 1, None)
    assert figure.value == pytest.approx(figure.ours / figure.floor)
    assert figure.value > 1


def test_a_program_that_fails_is_no_measurement() -> None:
    with pytest.raises(RuntimeError):
        start.cpu_ms(["-c", "raise SystemExit(1)"])


def test_a_broker_with_rows_becomes_ready() -> None:
    figure = start.serve(250, 1)
    assert figure.ours > 0
    assert figure.value == pytest.approx(figure.ours / figure.floor)


async def test_the_rows_that_a_start_reads_are_live_and_have_their_sessions(tmp_path: Path) -> None:
    await start.write_rows(tmp_path / "w.db", 250)
    async with open_sqlite_store(tmp_path / "w.db") as store:
        held = await store.load()
    assert (len(held.llms), len(held.sessions), len(held.keys)) == (250, 3, 1)
    assert {llm.status for llm in held.llms} == {Status.ACTIVE}


def test_sweeps_retire_a_cohort_each() -> None:
    """It asserts by itself that a sweep retires as many as are stale, and no other."""
    many, alone = sweeps.compare(700, 200, 2)
    found = sweeps.figures(700, many, alone, 200)
    assert all(figure.value > 0 for figure in found if "collection in it" not in figure.name)
    assert found[0].value == pytest.approx(found[0].ours / found[0].floor)
    assert gc.isenabled()


def test_the_longest_slice_is_seen_and_the_collector_is_not_part_of_it() -> None:
    slices = sweeps.Slices()

    def spin(seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    async def main() -> None:
        trio.lowlevel.add_instrument(slices)
        await trio.lowlevel.checkpoint()
        slices.begin()
        spin(0.02)
        await trio.lowlevel.checkpoint()
        spin(0.05)
        slices.on_collector("start", {})
        spin(0.2)
        slices.on_collector("stop", {})
        await trio.lowlevel.checkpoint()

    trio.run(main)
    assert 0.05 <= slices.longest < 0.2
    assert slices.collected >= 0.2
