"""Sessions that live through a fault: a stream under way all the time, and whole infers beside it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from tests.e2e.clients import open_chat, start_crowd
from tests.e2e.scripted_engine import EVENT
from tests.e2e.stack import PATIENCE_S, BrokerProcess
from tests.e2e.wire_publisher import WireChannel, WirePublisher, WireUpload, open_wire_publisher
from tests.http.wire import Wire


class Live:
    """A publisher with a channel, and a client who is reading a long stream of its row `live`.

    Attributes:
        publisher: whose session is `alive`.
    """

    def __init__(self, broker: BrokerProcess, publisher: WirePublisher, channel: WireChannel) -> None:
        self.broker = broker
        self.publisher = publisher
        self.channel = channel
        self._upload: WireUpload
        self._client: Wire
        self._read = b""

    async def start(self, client: Wire, upload: WireUpload) -> None:
        self._client, self._upload = client, upload
        await self._pass_on()

    async def go_on(self) -> None:
        """The stream moves on by an event, and a whole infer is served beside it."""
        with trio.fail_after(PATIENCE_S):
            await self._pass_on()
            async with trio.open_nursery() as nursery:
                crowd = start_crowd(nursery, self.broker, "live", 1)
                frame = await self.channel.next("infer")
                assert (await self.publisher.result(frame, b'{"whole": true}')).status == 200
            assert [(answer.status, answer.body) for answer in crowd.answers] == [(200, b'{"whole": true}')]

    async def finish(self) -> None:
        """End the stream; its client sees a clean end, and saw every event."""
        with trio.fail_after(PATIENCE_S):
            await self._upload.send(b"data: [DONE]\n\n")
            assert (await self._upload.finish()).json == {"outcome": "completed"}
            while not self._read.endswith(b"\r\n0\r\n\r\n"):
                await self._read_on()
        assert b"data: [DONE]\n\n" in self._read
        assert b"event: error" not in self._read
        assert not self.channel.ended.is_set()

    async def _pass_on(self) -> None:
        seen = self._read.count(EVENT)
        await self._upload.send(EVENT)
        while self._read.count(EVENT) == seen:
            await self._read_on()

    async def _read_on(self) -> None:
        piece = await self._client.read_some()
        assert piece, f"the stream was cut after {self._read!r}"
        self._read += piece


@asynccontextmanager
async def open_live(broker: BrokerProcess) -> AsyncIterator[Live]:
    """One for the block. Its stream has begun; whoever does not `finish` it cuts it."""
    async with open_wire_publisher(broker, "live", session_id="alive") as (publisher, channel):
        live = Live(broker, publisher, channel)
        async with open_chat(broker, "live", stream=True) as client:
            async with publisher.open_result(await channel.next("infer")) as upload:
                await live.start(client, upload)
                yield live
