"""A scripted broker, a scripted engine, and an agent between them."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from tests.publisher.scripted import Exchange, Handler, Peer
from wakecall.publisher import (
    PublishedModel,
    PublisherConfig,
    PublisherError,
    PublisherEvent,
    StopReason,
    run_publisher,
)

PATIENCE_S = 10.0


class Channel:
    """The broker's end of one control channel."""

    def __init__(self, exchange: Exchange, epoch: int) -> None:
        self.exchange = exchange
        self.epoch = epoch
        self.over = trio.Event()
        self._sequence = 0

    async def send(self, event: str, **data: Any) -> None:
        self._sequence += 1
        text = f"id: {self.epoch}-{self._sequence}\nevent: {event}\ndata: {json.dumps(data)}\n\n"
        await self.exchange.send(text.encode())

    async def infer(self, task_id: str, body: str | None = '{"model":"m","n":1.0}', **data: Any) -> None:
        frame = {
            "task_id": task_id,
            "llm": "m",
            "model": "m",
            "method": "POST",
            "path": "/v1/chat/completions",
            "headers": {"content-type": "application/json", "accept": "text/event-stream"},
            "stream": True,
            "deadline_s": 60,
            **data,
        }
        if body is not None:
            frame["body"] = body
        await self.send("infer", **frame)

    async def wake(self, task_id: str, deadline_s: float = 30, **data: Any) -> None:
        frame = {"task_id": task_id, "llm": "m", "model": "m", "deadline_s": deadline_s, **data}
        await self.send("wake", **frame)

    async def bye(self, reason: str) -> None:
        await self.send("bye", reason=reason)
        await self.exchange.finish()
        self.over.set()

    def cut(self) -> None:
        self.exchange.reset()
        self.over.set()


class Broker:
    """The publisher's side of the protocol, by the script: `on[...]` replaces what it does by default.

    Keys of `on`: register, frames, heartbeat, goodbye, body, result, chunks, failure, cancelled, results.
    """

    def __init__(self) -> None:
        self.peer = Peer(self._handle)
        self.on: dict[str, Handler] = {}
        self.seen: list[tuple[str, Exchange]] = []
        self.registered = False
        self.heartbeat_interval_s = 30.0
        self.keepalive_s = 15.0
        self.bodies: dict[str, bytes] = {}
        self.drop: list[str] = []
        self.features: list[str] = []
        self._epoch = 0
        self._channels_in, self._channels = trio.open_memory_channel[Channel](math.inf)
        self._changed = trio.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.peer.port}"

    async def next_channel(self) -> Channel:
        with trio.fail_after(PATIENCE_S):
            return await self._channels.receive()

    def all(self, kind: str, task_id: str | None = None) -> list[Exchange]:
        return [
            one for name, one in self.seen if name == kind and (task_id is None or f"/tasks/{task_id}/" in one.path)
        ]

    async def wait(self, kind: str, task_id: str | None = None, count: int = 1) -> Exchange:
        """The count-th request of a kind, as soon as its head is here."""
        with trio.fail_after(PATIENCE_S):
            while len(found := self.all(kind, task_id)) < count:
                await self._changed.wait()
        return found[count - 1]

    async def wait_whole(self, kind: str, task_id: str | None = None, count: int = 1) -> Exchange:
        """The same, with its body."""
        exchange = await self.wait(kind, task_id, count)
        with trio.fail_after(PATIENCE_S):
            await exchange.whole.wait()
        return exchange

    async def _handle(self, exchange: Exchange) -> None:
        kind = _kind(exchange)
        self.seen.append((kind, exchange))
        self._changed.set()
        self._changed = trio.Event()
        handler = self.on.get(kind) or getattr(self, f"_{kind}")
        await handler(exchange)

    async def _register(self, exchange: Exchange) -> None:
        await exchange.read()
        self.registered = True
        rows = [
            {"name": row["name"], "status": row.get("status", "active"), "outcome": "created"}
            for row in exchange.json["llms"]
        ]
        await exchange.respond_json(
            200,
            {
                "session_id": exchange.path.rpartition("/")[2],
                "heartbeat_interval_s": self.heartbeat_interval_s,
                "llms": rows,
            },
        )

    async def _frames(self, exchange: Exchange) -> None:
        await exchange.read()
        if not self.registered:
            await exchange.refuse(404, "session_not_found")
            return
        self._epoch += 1
        channel = Channel(exchange, self._epoch)
        await exchange.start(200, {"content-type": "text/event-stream"})
        await channel.send(
            "hello",
            session_id="s",
            epoch=self._epoch,
            heartbeat_interval_s=self.heartbeat_interval_s,
            keepalive_s=self.keepalive_s,
            features=self.features,
        )
        self._channels_in.send_nowait(channel)
        await channel.over.wait()

    async def _heartbeat(self, exchange: Exchange) -> None:
        await exchange.read()
        if not self.registered:
            await exchange.refuse(404, "session_not_found")
            return
        await exchange.respond_json(200, {"llms": {}, "drop": self.drop})

    async def _goodbye(self, exchange: Exchange) -> None:
        await exchange.read()
        self.registered = False
        await exchange.start(204)
        await exchange.finish()

    async def _body(self, exchange: Exchange) -> None:
        await exchange.read()
        await exchange.respond(200, self.bodies[exchange.path.split("/")[-2]])

    async def _cancelled(self, exchange: Exchange) -> None:
        await exchange.read()
        await exchange.start(204)
        await exchange.finish()

    async def _results(self, exchange: Exchange) -> None:
        # The test acknowledges.
        await exchange.read()
        await exchange.respond_json(200, {"outcome": "ended", "taken": 0})

    async def _settle(self, exchange: Exchange) -> None:
        await exchange.read()
        await exchange.respond_json(200, {"outcome": "completed"})

    _result = _chunks = _failure = _settle


def _kind(exchange: Exchange) -> str:
    last = exchange.path.rpartition("/")[2]
    if "/tasks/" in exchange.path or last == "results":
        return last
    return {"GET": "frames", "POST": "heartbeat", "PUT": "register", "DELETE": "goodbye"}[exchange.method]


class Engine:
    """An engine by the script: `on_infer` answers POSTs; requests come in order through `next`."""

    def __init__(self) -> None:
        self.peer = Peer(self._handle)
        self.healthy = True
        self.models = ["m"]
        self.on_infer: Handler | None = None
        self.on_get: Handler | None = None
        self.asked = trio.Event()
        self._in, self._out = trio.open_memory_channel[Exchange](math.inf)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.peer.port}/v1"

    async def next(self) -> Exchange:
        with trio.fail_after(PATIENCE_S):
            return await self._out.receive()

    async def _handle(self, exchange: Exchange) -> None:
        await exchange.read()
        if exchange.method == "GET":
            self.asked.set()
            self.asked = trio.Event()
        if exchange.method == "GET" and self.on_get is not None:
            await self.on_get(exchange)
        elif exchange.path == "/health":
            await exchange.respond_json(200 if self.healthy else 503, {})
        elif exchange.path == "/v1/models":
            await exchange.respond_json(200, {"object": "list", "data": [{"id": name} for name in self.models]})
        else:
            self._in.send_nowait(exchange)
            if self.on_infer is not None:
                await self.on_infer(exchange)
            else:
                # The test answers; the peer's leaving is what ends the connection then.
                await exchange.wait_peer_gone()


def closed_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Publisher:
    """A running agent and what it has told."""

    def __init__(self) -> None:
        self.events: list[PublisherEvent] = []
        self.stop = trio.Event()
        self.ended = trio.Event()
        self.reason: StopReason | None = None
        self.error: PublisherError | None = None
        self.scope = trio.CancelScope()
        self._changed = trio.Event()

    def emit(self, event: PublisherEvent) -> None:
        self.events.append(event)
        self._changed.set()
        self._changed = trio.Event()

    def all(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    async def wait(self, kind: type, count: int = 1) -> Any:
        with trio.fail_after(PATIENCE_S):
            while len(found := self.all(kind)) < count:
                await self._changed.wait()
        return found[count - 1]

    async def wait_ended(self) -> StopReason | None:
        with trio.fail_after(PATIENCE_S):
            await self.ended.wait()
        return self.reason

    async def run(self, config: PublisherConfig) -> None:
        with self.scope:
            try:
                self.reason = await run_publisher(config, on_event=self.emit, stop=self.stop)
            except PublisherError as error:
                self.error = error
        self.ended.set()


class Stage:
    """Broker, engine and a configuration that fits them; times are small, so that a test need not wait."""

    def __init__(self, nursery: trio.Nursery, directory: Path) -> None:
        self.nursery = nursery
        self.directory = directory
        self.broker = Broker()
        self.engine = Engine()

    def config(self, **settings: Any) -> PublisherConfig:
        defaults: dict[str, Any] = {
            "broker_url": self.broker.url,
            "engine_url": self.engine.url,
            "models": (PublishedModel("m"),),
            "state_dir": self.directory,
            "backoff_base_s": 0.02,
            "backoff_cap_s": 0.1,
            "health_interval_s": 0.01,
            "terminate_grace_s": 5.0,
        }
        return PublisherConfig(**{**defaults, **settings})

    async def publish(self, **settings: Any) -> tuple[Publisher, Channel]:
        """Start an agent and wait for its channel."""
        publisher = Publisher()
        self.nursery.start_soon(publisher.run, self.config(**settings))
        return publisher, await self.broker.next_channel()


@asynccontextmanager
async def open_stage(directory: Path) -> AsyncIterator[Stage]:
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            stage = Stage(nursery, directory)
            await nursery.start(stage.broker.peer.run)
            await nursery.start(stage.engine.peer.run)
            yield stage
            nursery.cancel_scope.cancel()


async def begin_stream(stage: Stage, channel: Channel, task_id: str, kind: str = "result") -> tuple[Exchange, Exchange]:
    """An infer whose first event has come through: the engine's exchange, and the upload's."""
    await channel.infer(task_id)
    request = await stage.engine.next()
    await request.start(200, {"content-type": "text/event-stream"})
    await request.send(b"data: 1\n\n")
    upload = await stage.broker.wait(kind, task_id)
    await upload.wait_body(b"data: 1\n\n")
    return request, upload
