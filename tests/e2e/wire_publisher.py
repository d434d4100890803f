"""A publisher by hand: exact requests and frames over raw sockets, against a real `wakecall serve`."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import h11
import trio

from tests.e2e.stack import PATIENCE_S, BrokerProcess, connect
from tests.e2e.way import agents_way
from tests.http.wire import Answer, Wire, request_bytes

#: A classic BPF program of one instruction: `ret 0`, drop everything.
_DROP_ALL = struct.pack("HBBI", 0x06, 0, 0, 0)
_SO_ATTACH_FILTER = 26


class WireChannel:
    """A control channel that is open.

    Attributes:
        frames: all that have come, as `(event, data)`.
        ended: set when the stream has, cleanly or not.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.frames: list[tuple[str, dict[str, Any]]] = []
        self.ended = trio.Event()
        self._seen: dict[str, int] = {}
        self._news = trio.Event()

    async def next(self, event: str) -> dict[str, Any]:
        """The data of the next frame of this event that no earlier call has returned."""
        with trio.fail_after(PATIENCE_S):
            while True:
                found = self.all(event)
                if len(found) > (index := self._seen.get(event, 0)):
                    self._seen[event] = index + 1
                    return found[index]
                assert not self.ended.is_set(), f"the channel ended before {event}: {self.events}"
                await self._news.wait()

    def all(self, event: str) -> list[dict[str, Any]]:
        return [data for name, data in self.frames if name == event]

    @property
    def events(self) -> list[str]:
        """The names of all frames so far."""
        return [name for name, _ in self.frames]

    def fall_silent(self) -> None:
        """Neither hear nor acknowledge anything from now on, as a machine that lost its network: half-open."""
        # The kernel wants a struct sock_fprog: the count of instructions and a pointer to them.
        import ctypes

        program = ctypes.create_string_buffer(_DROP_ALL)
        packed = struct.pack("HL", 1, ctypes.addressof(program))
        self.wire.stream.socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, packed)

    def reset(self) -> None:
        """End it with a RST."""
        self.wire.reset()

    async def run(self, session_id: str, port: int, task_status: trio.TaskStatus[None]) -> None:
        await self.wire.send(
            request_bytes(
                "GET",
                f"/publisher/v1/sessions/{session_id}/frames",
                "accept: text/event-stream",
                host=f"127.0.0.1:{port}",
            )
        )
        http = h11.Connection(h11.CLIENT)
        http.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
        http.send(h11.EndOfMessage())
        rest = b""
        try:
            while True:
                event = http.next_event()
                if event is h11.NEED_DATA:
                    http.receive_data(await self.wire.read_some())
                elif isinstance(event, h11.Response):
                    assert event.status_code == 200, event
                elif isinstance(event, h11.Data):
                    *whole, rest = (rest + bytes(event.data)).split(b"\n\n")
                    for block in whole:
                        self._take(block.decode(), task_status)
                else:
                    break
        except (h11.RemoteProtocolError, trio.ClosedResourceError, trio.BrokenResourceError):
            pass
        finally:
            self.ended.set()
            self._tell()

    def _take(self, block: str, task_status: trio.TaskStatus[None]) -> None:
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if not fields:
            return
        self.frames.append((fields["event"], json.loads(fields["data"])))
        self._tell()
        if fields["event"] == "hello":
            task_status.started()

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()


class WireUpload:
    """A result that is being uploaded, chunk by chunk."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    async def send(self, data: bytes) -> None:
        await self.wire.send(b"%x\r\n%s\r\n" % (len(data), data))

    async def finish(self) -> Answer:
        await self.wire.send(b"0\r\n\r\n")
        return await self.wire.read_answer("POST")

    async def answer(self) -> Answer:
        """What the broker answers, though the upload has not ended."""
        return await self.wire.read_answer("POST")

    def break_off(self) -> None:
        """Close in the middle. No RST: that could overtake what was sent, and the broker would never have seen it."""
        self.wire.stream.socket.close()


class WirePublisher:
    """A session at a broker, and one request for each thing that a publisher can say.

    Args:
        broker: where.
        session_id: as whom.
        is_straight: to the broker itself even when the run goes through faults (way.py), for a test that asks the kernel
            about these very connections.
    """

    def __init__(self, broker: BrokerProcess, session_id: str = "by-hand", *, is_straight: bool = False) -> None:
        self.broker = broker
        self._is_straight = is_straight
        self.session_id = session_id
        self._session = f"/publisher/v1/sessions/{session_id}"

    async def register(self, *llms: str | dict[str, Any]) -> Answer:
        rows = [{"name": llm} if isinstance(llm, str) else llm for llm in llms]
        return await self._json("PUT", self._session, {"llms": rows})

    async def heartbeat(self, **members: Any) -> Answer:
        return await self._json("POST", f"{self._session}/heartbeat", members)

    async def goodbye(self) -> Answer:
        return await self._json("DELETE", self._session, None)

    @asynccontextmanager
    async def open_channel(self) -> AsyncIterator[WireChannel]:
        """A channel whose `hello` has come; its connection is closed at the end."""
        async with self._connect() as wire, trio.open_nursery() as nursery:
            channel = WireChannel(wire)
            with trio.fail_after(PATIENCE_S):
                await nursery.start(channel.run, self.session_id, self.broker.port)
            yield channel
            nursery.cancel_scope.cancel()

    async def result(
        self, task: dict[str, Any], body: bytes = b"", *, status: int = 200, content_type: str = "application/json"
    ) -> Answer:
        """An answer in one piece."""
        headers = [f"wakecall-status: {status}", f"content-type: {content_type}"]
        headers += [] if body else ["content-length: 0"]
        return await self._ask("POST", f"/publisher/v1/tasks/{task['task_id']}/result", *headers, body=body)

    @asynccontextmanager
    async def open_result(
        self, task: dict[str, Any], *, status: int = 200, content_type: str = "text/event-stream"
    ) -> AsyncIterator[WireUpload]:
        """An answer that is streamed; nothing of its body is sent yet."""
        target = f"/publisher/v1/tasks/{task['task_id']}/result"
        headers = [f"wakecall-status: {status}", f"content-type: {content_type}", "transfer-encoding: chunked"]
        async with self._connect() as wire:
            await wire.send(request_bytes("POST", target, *headers, host=self._host))
            yield WireUpload(wire)

    async def fail(self, task: dict[str, Any], message: str, **members: Any) -> Answer:
        return await self._json(
            "POST", f"/publisher/v1/tasks/{task['task_id']}/failure", {"message": message, **members}
        )

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[Wire]:
        port = urlsplit(self.broker.url if self._is_straight else await agents_way(self.broker.url)).port
        assert port is not None
        async with connect(port) as wire:
            yield wire

    @property
    def _host(self) -> str:
        return f"127.0.0.1:{self.broker.port}"

    async def _json(self, method: str, target: str, value: Any) -> Answer:
        body = b"" if value is None else json.dumps(value).encode()
        return await self._ask(method, target, "content-type: application/json", body=body)

    async def _ask(self, method: str, target: str, *headers: str, body: bytes = b"") -> Answer:
        async with self._connect() as wire:
            await wire.send(request_bytes(method, target, *headers, body=body, host=self._host))
            return await wire.read_answer(method)


@asynccontextmanager
async def open_wire_publisher(
    broker: BrokerProcess, *llms: str | dict[str, Any], session_id: str = "by-hand", is_straight: bool = False
) -> AsyncIterator[tuple[WirePublisher, WireChannel]]:
    """A publisher that has registered `llms` (names or rows) and holds a channel."""
    publisher = WirePublisher(broker, session_id, is_straight=is_straight)
    assert (await publisher.register(*llms)).status == 200
    async with publisher.open_channel() as channel:
        yield publisher, channel
