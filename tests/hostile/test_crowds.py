"""Crowds, against the real `wakecall serve`: ten thousand who wait for one wake, five thousand who say nothing.

They are in a process of their own (`tests.hostile.crowd`), for a process has at most 20,000 descriptors. A sibling's stream
goes on all the while.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from tests.e2e.clients import open_chat
from tests.e2e.stack import (
    PATIENCE_S,
    POLL_S,
    ROOT,
    BrokerProcess,
    clean_environment,
    connect,
    open_broker_process,
    within,
)
from tests.e2e.wire_publisher import WireChannel, open_wire_publisher
from tests.http.served import Reading
from tests.http.wire import request_bytes

WAITING = 10_000
TOO_MANY = 100
SILENT = 5_000
#: More would mean that a caller who waits, or a connection on which nothing is said, holds more than it did.
MOST_BYTES_PER_CALLER = 64 * 1024
MOST_BYTES_PER_SILENT = 32 * 1024
#: The longest that one of the sibling's events may be on its way: the broker's one thread, and two cores for four processes.
PATIENCE_OF_SIBLINGS_S = 10.0


class Crowd:
    """A crowd's process.

    Attributes:
        answers: how many have been answered how, as `tests.hostile.crowd` describes an answer.
        connected: set once all are, and have said what they say.
    """

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.answers: dict[str, int] = {}
        self.connected = trio.Event()

    async def follow(self) -> None:
        assert self.process.stdout is not None
        rest = b""
        async for data in self.process.stdout:
            *lines, rest = (rest + data).split(b"\n")
            for said in map(json.loads, lines):
                self.answers = said.get("answers", self.answers)
                if "connected" in said:
                    self.connected.set()

    async def leave(self) -> None:
        """All of them go at once."""
        assert self.process.stdin is not None
        await self.process.stdin.aclose()
        await self.process.wait()


@asynccontextmanager
async def open_crowd(broker: BrokerProcess, count: int, state: Path, *model: str) -> AsyncIterator[Crowd]:
    """It for the block; it has gone when this ends, one way or the other."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "tests.hostile.crowd", str(broker.port), str(count), *model],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=clean_environment(state),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    crowd = Crowd(process)
    try:
        async with process.stdin, process.stdout, trio.open_nursery() as nursery:
            nursery.start_soon(crowd.follow)
            yield crowd
            with trio.fail_after(PATIENCE_S):
                await process.wait()
    finally:
        with trio.CancelScope(shield=True):
            if process.returncode is None:
                process.kill()
            await process.wait()


class Sibling:
    """A stream of another session and another client; each event has arrived before the next is sent.

    Attributes:
        arrived: events so far.
        slowest_s: the longest that one was on its way.
    """

    arrived = 0
    slowest_s = 0.0


@asynccontextmanager
async def open_sibling(broker: BrokerProcess) -> AsyncIterator[Sibling]:
    """One for the block. In the end its stream was whole and in order, and nothing else has come down its channel."""
    sibling, stop = Sibling(), trio.Event()
    async with open_wire_publisher(broker, "sibling", session_id="sibling") as (publisher, channel):
        async with open_chat(broker, "sibling", stream=True) as client:
            reading = Reading(client, "POST")
            async with publisher.open_result(await channel.next("infer")) as upload, trio.open_nursery() as nursery:

                async def stream(task_status: trio.TaskStatus[None]) -> None:
                    while not stop.is_set():
                        event = b"data: %d\n\n" % sibling.arrived
                        start = trio.current_time()
                        with trio.fail_after(PATIENCE_OF_SIBLINGS_S):
                            await upload.send(event)
                            if not reading.status:
                                assert (await reading.read_head()).status == 200
                            assert await reading.until(b"\n\n") == event
                        sibling.slowest_s = max(sibling.slowest_s, trio.current_time() - start)
                        sibling.arrived += 1
                        if sibling.arrived == 1:
                            task_status.started()
                        with trio.move_on_after(POLL_S):
                            await stop.wait()
                    assert (await upload.finish()).status == 200
                    assert await reading.rest() == (b"", False)

                await nursery.start(stream)
                yield sibling
                stop.set()
        assert channel.events == ["hello", "infer"]
        (row,) = [each for each in await broker.list("llms") if each["name"] == "sibling"]
        assert (row["status"], row["in_flight"], row["routable"]) == ("active", 0, True)


async def wait_for(holds: Callable[[], Awaitable[bool]]) -> None:
    """Return once it holds: of another process there is no event to wait for, so this asks."""
    with trio.fail_after(60):
        while not await holds():
            await trio.sleep(POLL_S)


async def answer_all(broker: BrokerProcess, channel: WireChannel, count: int) -> None:
    """Be the publisher of `count` infers, over a few connections that are kept."""
    left = count

    async def answer_some() -> None:
        nonlocal left
        async with connect(broker.port) as wire:
            while left:
                left -= 1
                task = await channel.next("infer")
                target = f"/publisher/v1/tasks/{task['task_id']}/result"
                await wire.send(
                    request_bytes(
                        "POST",
                        target,
                        "content-type: application/json",
                        body=b'{"ok": true}',
                        host=f"127.0.0.1:{broker.port}",
                    )
                )
                assert (await wire.read_answer("POST")).status == 200

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(answer_some)


@within(300)
async def test_ten_thousand_who_wait_for_one_wake_make_one_frame_and_all_are_answered(tmp_path: Path) -> None:
    """Those beyond the bound are told so at once; the memory of one who waits is bounded; afterwards nothing of them is
    left."""
    # Nobody sends heartbeats here, and on a slow machine this takes longer than rows live without.
    bounds = {"max_waiting_per_llm": WAITING, "max_waiting": WAITING, "heartbeat_timeout_s": 600}
    async with (
        open_broker_process(tmp_path / "w.db", arguments=["--log-level", "warning"], **bounds) as broker,
        open_wire_publisher(broker, {"name": "sleeper", "status": "hibernating"}) as (publisher, channel),
        open_sibling(broker) as sibling,
    ):
        before, descriptors = broker.resident_bytes, broker.descriptors
        async with open_crowd(broker, WAITING + TOO_MANY, tmp_path, "sleeper") as crowd:

            async def all_wait() -> bool:
                refused = sum(crowd.answers.values()) == TOO_MANY
                return refused and (await broker.llm("sleeper"))["waiting"] == WAITING

            await wait_for(all_wait)
            assert crowd.answers == {"429 queue_full - retry-after": TOO_MANY}
            each = (broker.resident_bytes - before) / WAITING
            print(
                f"each of {WAITING} who wait holds {each / 1024:.1f} KiB; the slowest event took {sibling.slowest_s:.2f} s"
            )
            assert each < MOST_BYTES_PER_CALLER
            assert broker.descriptors >= descriptors + WAITING
            assert channel.events == ["hello", "wake"]
            assert (await publisher.result(await channel.next("wake"))).status == 200
            await answer_all(broker, channel, WAITING)
        assert crowd.answers == {"429 queue_full - retry-after": TOO_MANY, '200 {"ok": true} - -': WAITING}
        assert channel.events == ["hello", "wake", *["infer"] * WAITING]
        await broker.wait_descriptors(descriptors)
        counted = await broker.metrics()
        assert counted["wakecall_infers_accepted_total"] == WAITING + 1
        assert counted["wakecall_infers_ended_total{outcome=completed}"] == WAITING
        print(f"the slowest event took {sibling.slowest_s:.2f} s")


@within(60)
async def test_five_thousand_who_say_nothing_take_nothing_from_the_others(tmp_path: Path) -> None:
    """Calls are answered while they are there; when they have gone, every descriptor is free again."""
    async with (
        open_broker_process(tmp_path / "w.db", arguments=["--log-level", "warning"]) as broker,
        open_wire_publisher(broker, "qwen") as (publisher, channel),
        open_sibling(broker) as sibling,
    ):
        before, descriptors = broker.resident_bytes, broker.descriptors
        async with open_crowd(broker, SILENT, tmp_path) as crowd:
            await crowd.connected.wait()
            with trio.fail_after(PATIENCE_S):
                while broker.descriptors < descriptors + SILENT:
                    await trio.sleep(POLL_S)
            for _ in range(20):
                async with open_chat(broker, "qwen") as client:
                    with trio.fail_after(PATIENCE_OF_SIBLINGS_S):
                        assert (await publisher.result(await channel.next("infer"), b'{"ok": true}')).status == 200
                        assert (await client.read_answer("POST")).body == b'{"ok": true}'
            each = (broker.resident_bytes - before) / SILENT
            print(f"each of {SILENT} who say nothing holds {each / 1024:.1f} KiB")
            assert each < MOST_BYTES_PER_SILENT
            assert crowd.answers == {}
            await crowd.leave()
        await broker.wait_descriptors(descriptors)
        assert (await broker.http.get("/readyz")).status_code == 200
        print(f"the slowest event took {sibling.slowest_s:.2f} s")
