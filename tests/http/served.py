"""The app over a real broker and a real socket, with a publisher and clients who speak bare HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import h11
import msgspec
import trio

from tests.http.described import Description, description_of
from tests.http.wire import Answer, Server, Wire, open_server
from wakecall.broker import Broker, open_broker
from wakecall.config import BrokerConfig
from wakecall.hosting import Upstream
from wakecall.http import create_app
from wakecall.http.barrier import BarrierSettings
from wakecall.http.cors import Cors
from wakecall.store import Store

HOST = "127.0.0.1"
JSON = "content-type: application/json"
SSE = "content-type: text/event-stream"


def as_bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else msgspec.json.encode(value)


def head(method: str, target: str, *headers: str, host: str = HOST) -> bytes:
    """A request's head; whatever it says of a body follows later."""
    return "\r\n".join([f"{method} {target} HTTP/1.1", f"host: {host}", *headers, "", ""]).encode("latin-1")


class Reading:
    """An answer as it arrives: first its head, then piece by piece what the server wrote."""

    def __init__(self, wire: Wire, method: str) -> None:
        self.wire = wire
        self.status = 0
        self.headers: dict[str, str] = {}
        self._http = h11.Connection(h11.CLIENT)
        self._http.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
        self._http.send(h11.EndOfMessage())

    async def _next(self) -> Any:
        while True:
            event = self._http.next_event()
            if event is not h11.NEED_DATA:
                return event
            self._http.receive_data(await self.wire.read_some())

    async def read_head(self) -> Reading:
        event = await self._next()
        assert isinstance(event, h11.Response), event
        self.status = event.status_code
        self.headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
        return self

    async def piece(self) -> bytes:
        """The next piece; empty at a clean end. Raises h11.RemoteProtocolError: the end is missing."""
        event = await self._next()
        return bytes(event.data) if isinstance(event, h11.Data) else b""

    async def until(self, mark: bytes) -> bytes:
        """All that comes up to `mark`, and what came with it."""
        got = b""
        while mark not in got:
            piece = await self.piece()
            assert piece, f"ended before {mark!r}: {got!r}"
            got += piece
        return got

    async def rest(self) -> tuple[bytes, bool]:
        """All that is still to come, and whether it was cut."""
        got = b""
        try:
            while piece := await self.piece():
                got += piece
        except h11.RemoteProtocolError:
            return got, True
        return got, False


@dataclass
class Frame:
    event: str
    data: dict[str, Any]
    id: str

    @property
    def task_id(self) -> str:
        return str(self.data["task_id"])


class Upload:
    """A chunked upload under way."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    async def send(self, data: bytes) -> None:
        await self.wire.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def finish(self) -> Answer:
        await self.wire.send(b"0\r\n\r\n")
        return await self.wire.read_answer("POST")


class WirePublisher:
    """A publisher whose channel is open, hand-driven."""

    def __init__(self, served: Served, session_id: str, reading: Reading) -> None:
        self.served = served
        self.session_id = session_id
        self.reading = reading
        self._text = b""

    async def next(self, event: str | None = None) -> Frame:
        """The next frame, comments left out; it is to be an `event`."""
        while True:
            block, end, rest = self._text.partition(b"\n\n")
            if not end:
                piece = await self.reading.piece()
                assert piece, "the channel ended"
                self._text += piece
                continue
            self._text = rest
            if block.startswith(b":"):
                continue
            fields = dict(line.split(": ", 1) for line in block.decode("ascii").split("\n"))
            frame = Frame(fields["event"], msgspec.json.decode(fields["data"]), fields["id"])
            assert event is None or frame.event == event, frame
            return frame

    async def answer(self, frame: Frame, body: Any = b"", *headers: str) -> Answer:
        """The whole result at once."""
        return await self.served.ask(
            "POST", f"/publisher/v1/tasks/{frame.task_id}/result", *(headers or (JSON,)), body=as_bytes(body)
        )

    async def fail(self, frame: Frame, **said: Any) -> Answer:
        return await self.served.ask("POST", f"/publisher/v1/tasks/{frame.task_id}/failure", body=as_bytes(said))

    @asynccontextmanager
    async def upload(self, frame: Frame, *headers: str, to: str = "result") -> AsyncIterator[Upload]:
        """A result that comes piece by piece. Left early, it breaks off."""
        async with self.served.server.connect() as wire:
            target = f"/publisher/v1/tasks/{frame.task_id}/{to}"
            await wire.send(head("POST", target, "transfer-encoding: chunked", *headers))
            yield Upload(wire)


_descriptions: list[Description] = []


class Served:
    """An app, its broker, and what a test does to them. Each whole answer is held to what `/openapi.json` says of it."""

    def __init__(self, server: Server, broker: Broker, app: Any) -> None:
        self.server = server
        self.broker = broker
        self.app = app
        if not _descriptions:
            _descriptions.append(description_of(app))  # that of every app
        self.description = _descriptions[0]

    async def ask(self, method: str, target: str, *headers: str, body: bytes = b"", host: str = HOST) -> Answer:
        """One request on a connection of its own, and its whole answer."""
        async with self.server.connect() as wire:
            length = (f"content-length: {len(body)}",) if body or method in ("POST", "PUT") else ()
            await wire.send(head(method, target, *headers, *length, host=host) + body)
            answer = await wire.read_answer(method)
        self.description.check(method, target, answer)
        return answer

    async def call(self, body: Any, path: str = "/v1/chat/completions", *headers: str) -> Answer:
        """A client's whole call."""
        return await self.ask("POST", path, *(headers or (JSON,)), body=as_bytes(body))

    @asynccontextmanager
    async def calling(self, body: Any, path: str = "/v1/chat/completions", *headers: str) -> AsyncIterator[Reading]:
        """A client's call whose answer is read as it comes; left early, the client leaves."""
        async with self.server.connect() as wire:
            data = as_bytes(body)
            await wire.send(head("POST", path, *(headers or (JSON,)), f"content-length: {len(data)}") + data)
            yield Reading(wire, "POST")

    async def register(self, session_id: str, *llms: dict[str, Any]) -> Answer:
        return await self.ask("PUT", f"/publisher/v1/sessions/{session_id}", JSON, body=as_bytes({"llms": llms}))

    @asynccontextmanager
    async def channel(self, session_id: str) -> AsyncIterator[WirePublisher]:
        """A session's channel, `hello` read; left, it is disconnected."""
        async with self.server.connect() as wire:
            await wire.send(head("GET", f"/publisher/v1/sessions/{session_id}/frames"))
            reading = await Reading(wire, "GET").read_head()
            assert reading.status == 200, reading.status
            publisher = WirePublisher(self, session_id, reading)
            await publisher.next("hello")
            yield publisher

    @asynccontextmanager
    async def publishing(self, *llms: dict[str, Any], session_id: str = "laptop") -> AsyncIterator[WirePublisher]:
        """A registered publisher with an open channel. Without `llms`: one active row, `qwen`."""
        answer = await self.register(session_id, *(llms or ({"name": "qwen"},)))
        assert answer.status == 200, answer
        async with self.channel(session_id) as publisher:
            yield publisher


def check_counters(broker: Broker) -> None:
    """Invariant 1 of the design."""
    now = broker.statistics()
    assert now.accepted == now.completed + now.failed + now.cancelled + now.waiting + now.in_flight, now


class _Watch(trio.abc.Instrument):
    """Looks at a condition after every step of every task, until it holds."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        self._condition = condition
        self.holds = trio.Event()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if not self.holds.is_set() and self._condition():
            self.holds.set()


async def wait_until(condition: Callable[[], bool]) -> None:
    """Return once `condition` held after some task's step; the server's own deadline ends a wait that is in vain."""
    watch = _Watch(condition)
    trio.lowlevel.add_instrument(watch)
    try:
        await watch.holds.wait()
    finally:
        trio.lowlevel.remove_instrument(watch)


@asynccontextmanager
async def open_served(
    config: BrokerConfig | None = None,
    store: Store | None = None,
    *,
    loopback_only: bool = True,
    cors: Sequence[str] = (),
    settings: BarrierSettings | None = None,
    upstream: Upstream | None = None,
    **serving: Any,
) -> AsyncIterator[Served]:
    """A served app for the block. At its end the counters agree, and nothing waits or is in flight any more.

    Args:
        upstream: asks those of public rows.
        serving: what else `open_server` takes.
    """
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(open_broker(store, config or BrokerConfig(), upstream))
        app = create_app(broker, loopback_only=loopback_only, cors=cors)
        server = await stack.enter_async_context(open_server(app, settings, cors=Cors.of(cors), **serving))
        yield Served(server, broker, app)
        check_counters(broker)
    now = broker.statistics()
    check_counters(broker)
    assert (now.waiting, now.in_flight, now.wakes_in_flight) == (0, 0, 0), now
