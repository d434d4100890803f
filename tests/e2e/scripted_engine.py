"""An engine that does exactly what a test says, in the test's own process: the scripted one of the publisher's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from tests.publisher.peers import Engine, Exchange

__all__ = ["EVENT", "Exchange", "ScriptedEngine", "open_scripted_engine", "wants_stream"]

#: One chunk of a chat completion, as an event.
EVENT = (
    b'data: {"id":"x","object":"chat.completion.chunk","created":1,"model":"m",'
    b'"choices":[{"index":0,"delta":{"content":"word "},"finish_reason":null}]}\n\n'
)


class ScriptedEngine(Engine):
    """Its exchanges wait in `next()`; what it was asked stays readable there (`exchange.body`)."""

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.peer.port}"

    async def take(self, count: int) -> list[Exchange]:
        """The next `count` requests; each is still waiting for its answer."""
        return [await self.next() for _ in range(count)]


def wants_stream(exchange: Exchange) -> Any:
    """Whether its client asked for a stream."""
    return exchange.json.get("stream", False)


@asynccontextmanager
async def open_scripted_engine(*models: str) -> AsyncIterator[ScriptedEngine]:
    """One that lists `models` (default: `m`), for the block."""
    engine = ScriptedEngine()
    engine.models = list(models or ("m",))
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.peer.run)
        yield engine
        nursery.cancel_scope.cancel()
