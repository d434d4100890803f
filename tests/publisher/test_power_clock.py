"""When the engine goes to sleep, on a virtual clock and without a command."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from wakecall.publisher import Asleep, Engine, PublishedModel, PublisherConfig, PublisherEvent
from wakecall.publisher.commands import Commands
from wakecall.publisher.power import Power, WakeError

HOUR_S = 3600.0


class StillEngine(Engine):
    """Answers its health question after `answers_after_s` of virtual time."""

    def __init__(self, answers_after_s: float = 0.0) -> None:
        self._awake_at = trio.current_time() + answers_after_s

    async def is_healthy(self) -> bool:
        await trio.lowlevel.checkpoint()
        return trio.current_time() >= self._awake_at


class Slept:
    """What a Power did, and when."""

    def __init__(self) -> None:
        self.power: Power
        self.events: list[tuple[float, PublisherEvent]] = []
        self.announced_at: list[float] = []

    def at(self, kind: type) -> list[float]:
        return [moment for moment, event in self.events if isinstance(event, kind)]


@asynccontextmanager
async def open_power(directory: Path, engine: Engine, wake_command: str | None = None) -> AsyncIterator[Slept]:
    slept = Slept()
    config = PublisherConfig(
        broker_url="http://broker",
        engine_url="http://engine",
        models=(PublishedModel("m"),),
        hibernate_after_s=HOUR_S,
        wake_command=wake_command,
    )

    async def announce(llms: Iterable[str]) -> None:
        await trio.lowlevel.checkpoint()
        slept.announced_at.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        slept.power = Power(
            config,
            Commands(config, engine, directory / "log"),
            emit=lambda event: slept.events.append((trio.current_time(), event)),
            nursery=nursery,
            announce=announce,
            on_change=lambda: None,
        )
        await slept.power.begin(config.models)
        nursery.start_soon(slept.power.run_idle)
        yield slept
        nursery.cancel_scope.cancel()


async def test_it_sleeps_after_exactly_the_idle_time(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_power(tmp_path, StillEngine()) as slept:
        await trio.sleep(HOUR_S - 1)
        assert slept.power.heartbeat_statuses() == {"m": "active"}
        visit = slept.power.infer_arrived("m")
        await trio.sleep(10 * HOUR_S)
        assert not slept.announced_at, "an infer in flight keeps it awake, however long it takes"
        slept.power.infer_left(visit)
        left_at = trio.current_time()
        await trio.sleep(HOUR_S + 1)
        assert slept.announced_at == [pytest.approx(left_at + HOUR_S)]
        assert slept.at(Asleep) == slept.announced_at
        assert slept.power.heartbeat_statuses() == {"m": slept.power.register_status("m")} == {"m": "hibernating"}
        await trio.sleep(10 * HOUR_S)
        assert len(slept.announced_at) == 1


async def test_a_wake_starts_the_idle_time_anew(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with open_power(tmp_path, StillEngine()) as slept:
        await trio.sleep(HOUR_S + 1)
        await slept.power.wake("m", 60)
        woken_at = trio.current_time()
        assert slept.power.register_status("m") == "active"
        await trio.sleep(HOUR_S + 1)
        assert slept.announced_at[1:] == [pytest.approx(woken_at + HOUR_S)]


async def test_the_latest_deadline_of_those_who_wait_counts(tmp_path: Path) -> None:
    """Not on a virtual clock: the command is a process."""
    async with open_power(tmp_path, StillEngine(0.6), wake_command="true") as slept:
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(slept.power.wake, "m", 0.2)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(slept.power.wake, "m", 30)
        assert slept.power.is_awake


async def test_a_wake_without_an_answer_ends_at_its_deadline(tmp_path: Path) -> None:
    async with open_power(tmp_path, StillEngine(HOUR_S), wake_command="true") as slept:
        with trio.fail_after(10), pytest.raises(WakeError, match="did not answer"):
            await slept.power.wake("m", 0.2)
        assert not slept.power.is_awake
