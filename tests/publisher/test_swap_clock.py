"""A swap group under a crowd, on a virtual clock: whatever comes when, one is awake and everybody is served."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from wakecall.publisher import PublishedModel, PublisherConfig
from wakecall.publisher.commands import Commands
from wakecall.publisher.power import WakeError
from wakecall.publisher.process import CommandFailed
from wakecall.publisher.swap import SwapGroup

NAMES = ("a", "b", "c")


class Room:
    """What is loaded, and who works with it; it shouts when two would have to fit or somebody loses what they use."""

    def __init__(self) -> None:
        self.loaded: str | None = None
        self.at_work = dict.fromkeys(NAMES, 0)
        self.served = 0
        self.loads = 0

    def load(self, name: str) -> None:
        assert self.loaded in (None, name), f"{name} beside {self.loaded}"
        self.loads += self.loaded != name
        self.loaded = name

    def unload(self, name: str) -> None:
        assert not self.at_work[name], f"{name} is in use"
        if self.loaded == name:
            self.loaded = None


class RoomCommands(Commands):
    """Commands that take their time, and now and then fail."""

    def __init__(self, config: PublisherConfig, room: Room, chance: random.Random, failing: float) -> None:
        self._config = config
        self._room = room
        self._chance = chance
        self._failing = failing

    async def is_healthy(self) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    async def bring_up(self, model: PublishedModel | None, *, always: bool = False) -> bool:
        assert model is not None
        await trio.sleep(self._chance.uniform(0, 5))
        if self._chance.random() < self._failing:
            raise CommandFailed("no memory")
        self._room.load(model.name)
        return True

    async def put_down(self, model: PublishedModel | None) -> str | None:
        assert model is not None
        self._room.unload(model.name)
        await trio.sleep(self._chance.uniform(0, 3))
        return None


@pytest.mark.parametrize("failing", [0.0, 0.2])
@pytest.mark.parametrize("seed", range(20))
async def test_one_is_awake_and_nobody_loses_what_they_use(
    seed: int, failing: float, tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Requests for all three, wakes by the broker, cancels and idle times; each ends served, or told that a wake failed."""
    chance = random.Random(seed)
    room = Room()
    room.loaded = "a"
    ends = dict.fromkeys(("served", "cancelled", "failed"), 0)
    config = PublisherConfig(
        broker_url="http://broker",
        engine_url="http://engine",
        models=tuple(PublishedModel(name) for name in NAMES),
        group="gpu",
        wake_s=3600.0,
        hibernate_after_s=20.0,
        wake_command="unused",
    )

    async def announce(llms: Iterable[str]) -> None:
        await trio.sleep(chance.uniform(0, 2))

    async def ask(llm: str) -> None:
        end = "cancelled"
        visit = group.infer_arrived(llm)
        try:
            with trio.move_on_after(chance.choice([2.0, 3600.0])):
                await trio.sleep(chance.uniform(0, 1))
                try:
                    await group.admit(visit)
                except WakeError:
                    end = "failed"
                    return
                assert room.loaded == llm
                room.at_work[llm] += 1
                try:
                    await trio.sleep(chance.expovariate(1.0))
                finally:
                    room.at_work[llm] -= 1
                assert room.loaded == llm
                end = "served"
        finally:
            group.infer_left(visit)
            ends[end] += 1

    async def wake(llm: str) -> None:
        try:
            await group.wake(llm, chance.uniform(1, 60), [name for name in NAMES if name != llm])
        except WakeError:
            return

    async with trio.open_nursery() as daemons:
        group = SwapGroup(
            config,
            RoomCommands(config, room, chance, failing),
            emit=lambda event: None,
            nursery=daemons,
            announce=announce,
            on_change=lambda: None,
        )
        await group.begin(config.models)
        daemons.start_soon(group.run_idle)
        with trio.fail_after(24 * 3600):
            async with trio.open_nursery() as crowd:
                for _ in range(150):
                    crowd.start_soon(chance.choice([ask, ask, ask, wake]), chance.choice(NAMES))
                    await trio.sleep(chance.choice([0.0, chance.expovariate(2.0), chance.choice([0.0, 30.0])]))
        await trio.sleep(300)
        assert group.in_flight == 0
        assert set(group.heartbeat_statuses().values()) == {"hibernating"}
        daemons.cancel_scope.cancel()
    assert room.loads > 3
    assert ends["served"] > 20
    assert failing or not ends["failed"]


async def test_two_in_demand_take_turns_and_a_turn_serves_all_who_wait(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """However many want one of them, whoever wants the other waits for one turn of it and no more."""
    chance = random.Random(1)
    room = Room()
    room.loaded = "a"
    config = PublisherConfig(
        broker_url="http://broker",
        engine_url="http://engine",
        models=tuple(PublishedModel(name) for name in NAMES),
        group="gpu",
        wake_s=3600.0,
    )
    served: list[str] = []

    async def ask(llm: str) -> None:
        visit = group.infer_arrived(llm)
        await group.admit(visit)
        await trio.sleep(10)
        served.append(llm)
        group.infer_left(visit)

    async with trio.open_nursery() as daemons:
        group = SwapGroup(
            config,
            RoomCommands(config, room, chance, 0.0),
            emit=lambda event: None,
            nursery=daemons,
            announce=lambda llms: trio.sleep(0),
            on_change=lambda: None,
        )
        await group.begin(config.models)
        async with trio.open_nursery() as crowd:
            # A new request for `a` every second: it would never be idle.
            crowd.start_soon(ask, "a")
            await trio.sleep(1)
            crowd.start_soon(ask, "b")
            for _ in range(60):
                await trio.sleep(1)
                crowd.start_soon(ask, "a")
        assert served.index("b") == 1
        assert len(served) == 62
        assert room.loads <= 3
        daemons.cancel_scope.cancel()
