"""Publishers that are restarted, superseded, evicted, cut off and killed all the time, and an operator who looks on."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import trio

from tests.e2e.stack import BrokerProcess, open_publisher_process
from tests.e2e.wire_publisher import WireChannel, WirePublisher
from tests.faultproxy import Fault, FaultProxy, Toxics, open_fault_proxy
from tests.publisher.scripted import Exchange, Peer
from wakecall.publisher import PublishedModel, PublisherConfig, PublisherError, run_publisher

EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"word "}}]}\n\n'
DONE = b"data: [DONE]\n\n"
#: What may happen to somebody whose broker, proxy or peer has just gone.
GONE = (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, AssertionError, OSError)


def _wants_stream(body: dict[str, Any]) -> bool:
    return bool(body.get("stream"))


# The engine ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def open_engine() -> AsyncIterator[Peer]:
    """An engine in this process that does what each body says in `act`."""
    peer = Peer(_generate)
    async with trio.open_nursery() as nursery:
        await nursery.start(peer.run)
        yield peer
        nursery.cancel_scope.cancel()


async def _generate(exchange: Exchange) -> None:
    await exchange.read()
    if exchange.method == "GET":
        await exchange.respond_json(200, {"object": "list", "data": []})
        return
    act = exchange.json["act"]
    if act == "error":
        await exchange.respond_json(500, {"error": {"message": "no", "type": "x", "param": None, "code": "engine"}})
    elif not _wants_stream(exchange.json):
        await trio.sleep(1.0 if act == "slow" else 0.01)
        body = json.dumps({"echo": exchange.json.get("text", "")}).encode()[:900_000]
        await exchange.start(200, {"content-type": "application/json", "content-length": str(len(body))})
        if act == "break":
            await exchange.send(body[:-1])
            exchange.reset()
            return
        await exchange.send(body)
        await exchange.finish()
    else:
        await exchange.start(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
        for index in range(600 if act == "long" else 20):
            await exchange.send(EVENT * (30 if act == "long" else 1))
            await trio.sleep(0.05 if act == "slow" else 0.001)
            if act == "break" and index == 7:
                exchange.reset()
                return
        await exchange.send(DONE)
        await exchange.finish()


# Agents -------------------------------------------------------------------------------------------------------------


async def run_agents(broker: BrokerProcess, engine: Peer, state: Path, name: str, dice: random.Random) -> None:
    """A real agent behind a network that harms it, stopped in order or dropped, started again, until cancelled."""
    toxics = Toxics(latency_s=0.001, jitter_s=0.003, fragment=200, fragments=2, close_s=0.01)
    async with open_fault_proxy(broker.port, up=toxics, down=toxics) as proxy, trio.open_nursery() as nursery:
        nursery.start_soon(_harm, proxy, dice)
        while True:
            config = PublisherConfig(
                broker_url=proxy.url,
                engine_url=f"http://127.0.0.1:{engine.port}",
                models=(PublishedModel(name),),
                session_id=name,
                max_concurrency=dice.choice([None, 2, 8]),
                upload=dice.choice(["stream", "chunks"]),
                state_dir=state / name,
                backoff_base_s=0.05,
                backoff_cap_s=0.5,
                request_s=3,
                drain_grace_s=1,
                farewell_s=1,
            )
            stop = trio.Event()
            with trio.move_on_after(dice.uniform(2, 8)) as life:
                async with trio.open_nursery() as running:
                    running.start_soon(_stop_some_day, stop, dice)
                    try:
                        await run_publisher(config, stop=stop)
                    except PublisherError:
                        await trio.sleep(0.2)  # its name is another's at the moment
                    running.cancel_scope.cancel()
            if not life.cancelled_caught:
                await trio.sleep(dice.uniform(0, 0.5))


async def _stop_some_day(stop: trio.Event, dice: random.Random) -> None:
    await trio.sleep(dice.uniform(1, 12))
    stop.set()


async def _harm(proxy: FaultProxy, dice: random.Random) -> None:
    while True:
        await trio.sleep(dice.uniform(0.3, 2))
        kind = dice.choice(["fin", "rst", "rst", "stall"])
        proxy.strike(Fault(dice.choice(["up", "down"]), kind, dice.randrange(5000)))  # type: ignore[arg-type]
        if dice.random() < 0.2:
            proxy.reset_all()


async def run_processes(broker: BrokerProcess, engine: Peer, state: Path, name: str, dice: random.Random) -> None:
    """`wakecall publish` in a process of its own, killed and started again until cancelled."""
    while True:
        arguments = "--name", name, "--log-level", "error"
        async with open_publisher_process(state, broker.url, f"http://127.0.0.1:{engine.port}", *arguments) as one:
            await trio.sleep(dice.uniform(3, 10))
            one.send(dice.choice([signal.SIGKILL, signal.SIGTERM]))
            with trio.move_on_after(8):  # what it drains may take longer; leaving the block kills it
                await one.process.wait()


# Publishers by hand -------------------------------------------------------------------------------------------------


class ByHand:
    """A publisher that does with its infers and wakes whatever the protocol lets it, and some things that it does not."""

    def __init__(self, broker: BrokerProcess, session_id: str, rows: list[str], dice: random.Random) -> None:
        self._publisher = WirePublisher(broker, session_id)
        self._rows = rows
        self._dice = dice

    async def run(self) -> None:
        """One channel after another, some on top of each other, until cancelled."""
        while True:
            try:
                statuses = [self._dice.choice(["active", "hibernating"]) for _ in self._rows]
                rows = [
                    {"name": row, "status": status, "wake_s": 2}
                    for row, status in zip(self._rows, statuses, strict=True)
                ]
                if (await self._publisher.register(*rows)).status == 200:
                    await self._live(supersedes=self._dice.random() < 0.3)
                if self._dice.random() < 0.3:
                    await self._publisher.goodbye()
            except* GONE:
                pass
            await trio.sleep(self._dice.uniform(0, 0.5))

    async def _live(self, *, supersedes: bool) -> None:
        with trio.move_on_after(self._dice.uniform(0.5, 4)):
            async with self._publisher.open_channel() as channel, trio.open_nursery() as nursery:
                nursery.start_soon(self._beat)
                nursery.start_soon(self._serve, channel, "infer")
                nursery.start_soon(self._serve, channel, "wake")
                if supersedes:
                    await trio.sleep(self._dice.uniform(0, 1))
                    await self._live(supersedes=False)
                await channel.ended.wait()
                nursery.cancel_scope.cancel()
                if self._dice.random() < 0.3:
                    channel.reset()

    async def _beat(self) -> None:
        while True:
            await trio.sleep(self._dice.uniform(0.2, 1))
            await self._publisher.heartbeat(tasks=["nothing-of-ours"])

    async def _serve(self, channel: WireChannel, event: str) -> None:
        async with trio.open_nursery() as nursery:
            while not channel.ended.is_set():
                frame = await channel.next(event)
                nursery.start_soon(self._supervise, self._infer if event == "infer" else self._wake, frame)

    async def _supervise(self, work: Any, frame: dict[str, Any]) -> None:
        try:
            await work(frame)
        except* GONE:
            pass

    async def _wake(self, frame: dict[str, Any]) -> None:
        way = self._dice.random()
        await trio.sleep(self._dice.uniform(0, 0.2))
        if way < 0.6:
            await self._publisher.result(frame)
        elif way < 0.8:
            await self._publisher.fail(frame, "no power")

    async def _infer(self, frame: dict[str, Any]) -> None:
        way = self._dice.random()
        if way < 0.1:
            await self._publisher.fail(frame, "out of memory", status=507)
        elif way < 0.15:
            return  # never: its channel or its deadline ends it
        elif frame["stream"]:
            async with self._publisher.open_result(frame) as upload:
                for _ in range(20):
                    await upload.send(EVENT)
                if way < 0.25:
                    upload.break_off()
                    return
                await upload.send(DONE)
                await upload.finish()
        else:
            await self._publisher.result(frame, b'{"echo": ""}')
            if way < 0.3:
                await self._publisher.result(frame, b"twice")


async def run_strangers(broker: BrokerProcess, dice: random.Random) -> None:
    """Sessions that come once, take over a row or bring one, and are never seen again."""
    for number in range(1 << 30):
        publisher = WirePublisher(broker, f"stranger-{number}")
        try:
            if (await publisher.register(f"passing-{dice.randrange(6)}")).status == 200:
                async with publisher.open_channel():
                    await trio.sleep(dice.uniform(0, 0.3))
        except* GONE:
            pass
        await trio.sleep(dice.uniform(0.2, 1))


async def run_operator(broker: BrokerProcess, sessions: list[str], dice: random.Random) -> None:
    """Lists, sweeps, evictions, public rows that come and go."""
    url = {"type": "openai", "model": "x", "url": "http://127.0.0.1:1/v1"}
    while True:
        await trio.sleep(dice.uniform(0.1, 0.5))
        try:
            what = dice.randrange(6)
            if what == 0:
                await broker.list("tasks")
            elif what == 1:
                await broker.list("sessions")
            elif what == 2:
                (await broker.http.post("/admin/v1/sweep")).raise_for_status()
            elif what == 3:
                await broker.http.delete(f"/admin/v1/sessions/{dice.choice(sessions)}")
            elif what == 4:
                (await broker.http.put("/admin/v1/llms/public", json=url)).raise_for_status()
            else:
                await broker.http.delete("/admin/v1/llms/public")
        except httpx2.TransportError:
            if broker.process.returncode is not None:
                raise
