"""A client that stands still holds back its own upload, all the way to the engine, and nothing else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import h11
import trio

from tests.e2e.clients import ask_chat, open_chat
from tests.e2e.scripted_engine import Exchange, open_scripted_engine, wants_stream
from tests.e2e.stack import POLL_S, BrokerProcess, open_broker_process, open_publisher_process, within
from tests.http.wire import Wire

MIB = 1 << 20
#: What the kernel may keep in the sockets' buffers of three connections, on its own account.
ON_THE_WAY = 80 * MIB
#: What broker and publisher may grow by, for everything that this takes.
FLAT = 16 * MIB


def event(number: int) -> bytes:
    """64 KiB of an event stream, different each time."""
    text = b'data: {"choices":[{"index":0,"delta":{"content":"%08d' % number
    return text + b"x" * (65536 - len(text) - 6) + b'"}}]}\n\n'[-6:]


class Source:
    """An engine's stream of `size` bytes: how much of it went out, and whether its client left."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.sent = 0
        self.digest = hashlib.sha256()
        self.left = trio.Event()
        self.done = trio.Event()

    async def __call__(self, exchange: Exchange) -> None:
        if not wants_stream(exchange):
            await exchange.respond_json(200, {"ok": True})
            return
        await exchange.start(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
        try:
            while self.sent < self.size:
                piece = event(self.sent >> 16)
                await exchange.send(piece)
                self.sent += len(piece)
                self.digest.update(piece)
            await exchange.finish()
            self.done.set()
        except trio.BrokenResourceError:
            self.left.set()
            raise

    async def wait_held(self, broker: BrokerProcess) -> None:
        """Return once it has stood still while ten others were answered."""
        while True:
            before = self.sent
            for _ in range(10):
                assert (await ask_chat(broker, "m")).status == 200
            if self.sent == before:
                return
            await trio.sleep(POLL_S)


class Body:
    """A chunked answer that is read bit by bit."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.read = 0
        self.digest = hashlib.sha256()
        self.is_whole = False
        self._http = h11.Connection(h11.CLIENT)
        self._http.send(h11.Request(method="POST", target="/", headers=[("host", "x"), ("content-length", "0")]))
        self._http.send(h11.EndOfMessage())

    async def read_on(self, until: int) -> None:
        """Read until so many bytes are here in all, or to the end, which is whole or cut."""
        while self.read < until:
            try:
                received = self._http.next_event()
                if received is h11.NEED_DATA:
                    self._http.receive_data(await self.wire.read_some(1 << 20))
                elif isinstance(received, h11.Data):
                    self.read += len(received.data)
                    self.digest.update(received.data)
                elif isinstance(received, h11.EndOfMessage):
                    self.is_whole = True
                    return
            except h11.RemoteProtocolError:
                return


@within(90)
async def test_a_client_that_stands_still_is_held_back_for_and_then_cut(tmp_path: Path) -> None:
    """In the middle of 200 MiB: memory stays flat, siblings are answered; after `peer_stall_s` the engine is left."""
    source = Source(200 * MIB)
    async with open_scripted_engine() as engine, open_broker_process(tmp_path / "w.db", peer_stall_s=4) as broker:
        engine.on_infer = source
        async with open_publisher_process(tmp_path, broker.url, engine.base_url, "--name", "m") as publisher:
            await broker.wait_llm("m", routable=True)
            for _ in range(10):
                assert (await ask_chat(broker, "m")).status == 200
            before = broker.resident_bytes, publisher.resident_bytes
            async with open_chat(broker, "m", stream=True) as wire:
                body = Body(wire)
                await body.read_on(8 * MIB)
                await source.wait_held(broker)
                assert body.read <= source.sent < ON_THE_WAY
                grown = broker.resident_bytes - before[0], publisher.resident_bytes - before[1]
                assert max(grown) < FLAT, f"broker and publisher grew by {grown}"
                assert (await broker.llm("m"))["in_flight"] == 1

                await source.left.wait()
                await broker.wait_llm("m", in_flight=0)
                await body.read_on(200 * MIB)
                assert not body.is_whole
                assert body.read < ON_THE_WAY
            assert broker.resident_bytes - before[0] < FLAT
            assert (await ask_chat(broker, "m")).status == 200
            assert publisher.process.returncode is None
        counted = await broker.metrics()
        assert counted["wakecall_infers_ended_total{outcome=cancelled}"] == 1


@within(90)
async def test_a_client_that_goes_on_in_time_gets_every_byte(tmp_path: Path) -> None:
    """Standing still for less than `peer_stall_s` costs nothing but the time."""
    source = Source(64 * MIB)
    async with open_scripted_engine() as engine, open_broker_process(tmp_path / "w.db") as broker:
        engine.on_infer = source
        async with open_publisher_process(tmp_path, broker.url, engine.base_url, "--name", "m"):
            await broker.wait_llm("m", routable=True)
            async with open_chat(broker, "m", stream=True) as wire:
                body = Body(wire)
                await body.read_on(1 * MIB)
                await source.wait_held(broker)
                await body.read_on(source.size + 1)
            assert body.is_whole
            assert (body.read, body.digest.digest()) == (source.size, source.digest.digest())
