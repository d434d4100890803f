"""The wall clock leaps an hour under a running broker. It counts by a clock of its own, so nothing of what it does moves.

The leap is real for the process: every clock that it can ask for the time of day tells another one from then on.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import trio

from tests.e2e.clients import ask_chat
from tests.e2e.scripted_engine import open_scripted_engine
from tests.e2e.stack import POLL_S, BrokerProcess, open_broker_process, open_publisher_process, within
from tests.e2e.wire_publisher import WirePublisher
from tests.faults.live import open_live
from tests.faults.machine import Machine

HOUR = 3600


async def wall_clock_error(broker: BrokerProcess) -> float:
    """By how many seconds the broker's idea of the time of day differs from ours: the Date of an answer tells it."""
    date = (await broker.ask("GET", "/healthz")).headers["date"]
    return (parsedate_to_datetime(date) - datetime.now(UTC)).total_seconds()


async def instants_of(broker: BrokerProcess) -> list[float]:
    """Every instant that operators and clients are shown, as seconds of the epoch."""
    found = [row["created"] for row in (await broker.ask("GET", "/v1/models")).json["data"]]
    for shown in [*await broker.list("llms"), *await broker.list("sessions")]:
        for name, value in shown.items():
            if name.endswith("_at") and value is not None:
                found.append(datetime.fromisoformat(value).timestamp())
    assert len(found) >= 3
    return found


@within(60)
async def test_nothing_goes_stale_early_and_nothing_lives_too_long(tmp_path: Path, shim: Path) -> None:
    """Live rows stay, with their stream; the silent go stale in their seconds; the inactive are deleted in theirs."""
    async with trio.open_nursery() as nursery:
        for name, leap in (("ahead", HOUR), ("back", -HOUR)):
            folder = tmp_path / name
            folder.mkdir()
            nursery.start_soon(live_through_a_leap, folder, Machine(shim, folder / "control", "/w.db"), leap)


async def live_through_a_leap(folder: Path, machine: Machine, leap: int) -> None:
    # Far less than the leap, so that whoever counted by the wall clock would delete at once, or not within the hour.
    settings = {
        "heartbeat_interval_s": 0.5,
        "heartbeat_timeout_s": 4,
        "inactive_retention_s": 2,
        "sweep_interval_s": 0.1,
    }
    async with (
        open_broker_process(folder / "w.db", variables=machine.variables, **settings) as broker,
        open_live(broker) as live,
        trio.open_nursery() as nursery,
    ):

        async def keep_alive() -> None:
            while True:
                assert (await live.publisher.heartbeat()).status == 200
                await trio.sleep(0.3)

        nursery.start_soon(keep_alive)
        # Past the time in which a broker deletes nothing, so that only the rows' own times count.
        silent = WirePublisher(broker, "silent")
        assert (await silent.register("old")).status == 200
        await broker.wait_llm("old", status="inactive")

        registered_at = time.monotonic()
        assert (await silent.register("old", "stale")).status == 200
        shown = await broker.llm("stale")
        machine.leap(leap)
        assert abs(await wall_clock_error(broker) - leap) < 60
        swept = await broker.ask("POST", "/admin/v1/sweep")
        assert swept.json == {"inactivated": [], "deleted": []}
        assert (await broker.llm("stale"))["status"] == "active"
        await live.go_on()

        inactive = await broker.wait_llm("stale", status="inactive")
        assert 3.5 < time.monotonic() - registered_at < 20
        assert 3.9 <= seconds_between(shown["last_heartbeat_at"], inactive["inactive_since"]) < 20
        while await broker.llm("stale"):
            await trio.sleep(POLL_S)
        assert 5.5 < time.monotonic() - registered_at < 30

        row = await broker.llm("live")
        assert (row["status"], row["routable"]) == ("active", True)
        await live.go_on()
        await live.finish()
        nursery.cancel_scope.cancel()


def seconds_between(earlier: str, later: str) -> float:
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()


@within(60)
async def test_instants_grow_and_stay_true_whatever_the_clock_does(tmp_path: Path, machine: Machine) -> None:
    """To and fro, with an agent on the same machine: it heartbeats on, is called on, and no instant shown goes back."""
    variables = machine.variables
    async with (
        open_scripted_engine() as engine,
        open_broker_process(tmp_path / "w.db", variables=variables, heartbeat_interval_s=0.1) as broker,
        open_publisher_process(
            tmp_path / "state", broker.url, engine.base_url, "--name", "m", variables=variables
        ) as agent,
        trio.open_nursery() as nursery,
    ):

        async def answer() -> None:
            while True:
                await (await engine.next()).respond_json(200, {"ok": True})

        nursery.start_soon(answer)
        before = await broker.wait_llm("m", routable=True)
        (session,) = await broker.list("sessions")
        for leap in (HOUR, 0, -HOUR, HOUR, -HOUR):
            machine.leap(leap)
            assert abs(await wall_clock_error(broker) - leap) < 60
            while (after := await broker.llm("m"))["last_heartbeat_at"] == before["last_heartbeat_at"]:
                await trio.sleep(POLL_S)
            assert 0 < seconds_between(before["last_heartbeat_at"], after["last_heartbeat_at"]) < 10
            assert (await ask_chat(broker, "m")).status == 200
            assert (await broker.ask("POST", "/admin/v1/sweep")).json == {"inactivated": [], "deleted": []}
            assert all(abs(instant - time.time()) < 60 for instant in await instants_of(broker))
            before = after
        (still,) = await broker.list("sessions")
        assert (still["epoch"], still["connected"]) == (session["epoch"], True)
        assert agent.process.returncode is None
        assert not [line for line in (*broker.err, *agent.err) if "Traceback" in line]
        nursery.cancel_scope.cancel()
