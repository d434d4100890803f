"""A server of which a test decides every byte and every cut: h11 on Trio sockets."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import h11
import trio


def reset(stream: trio.SocketStream) -> None:
    """Cut with a RST, as the kernel of a killed process with unread bytes does."""
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


class Exchange:
    """One request on one connection, and the response that the script gives it."""

    def __init__(self, stream: trio.SocketStream, connection: h11.Connection, request: h11.Request) -> None:
        self.stream = stream
        self.connection = connection
        self.method = request.method.decode()
        self.path = request.target.decode()
        self.headers = {name.decode(): value.decode() for name, value in request.headers}
        self.body = bytearray()
        self.whole = trio.Event()
        self.broken = trio.Event()
        self._grown = trio.Event()

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    async def next_event(self) -> Any:
        while (event := self.connection.next_event()) is h11.NEED_DATA:
            self.connection.receive_data(await self.stream.receive_some(65536))
        return event

    async def read(self) -> bytes:
        """The whole body; ConnectionError if the peer breaks off."""
        while not self.whole.is_set():
            await self.read_some()
        return bytes(self.body)

    async def read_some(self) -> None:
        try:
            event = await self.next_event()
        except (h11.RemoteProtocolError, trio.BrokenResourceError) as error:
            self.broken.set()
            self._grown.set()
            raise ConnectionError from error
        if isinstance(event, h11.Data):
            self.body += event.data
        else:
            self.whole.set()
        self._grown.set()
        self._grown = trio.Event()

    async def wait_body(self, expected: bytes) -> None:
        """Until exactly these bytes have come, in a task beside the one that reads."""
        while bytes(self.body) != expected:
            assert expected.startswith(bytes(self.body)), self.body
            await self._grown.wait()

    async def start(self, status: int, headers: dict[str, str] | None = None) -> None:
        lines = [(name, value.encode("latin-1")) for name, value in (headers or {}).items()]
        head = h11.Response(status_code=status, headers=lines)
        await self.stream.send_all(self.connection.send(head) or b"")

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(self.connection.send(h11.Data(data=data)) or b"")

    async def finish(self) -> None:
        # Behind a Content-Length there is nothing to send, and the peer that has it all may have closed already.
        if rest := self.connection.send(h11.EndOfMessage()):
            await self.stream.send_all(rest)

    async def respond(self, status: int, body: bytes = b"", content_type: str = "application/json") -> None:
        await self.start(status, {"content-type": content_type, "content-length": str(len(body))})
        if body:
            await self.send(body)
        await self.finish()

    async def respond_json(self, status: int, value: Any) -> None:
        await self.respond(status, json.dumps(value).encode())

    async def refuse(self, status: int, code: str, message: str = "no", param: str | None = None) -> None:
        await self.respond_json(status, {"error": {"message": message, "type": "x", "param": param, "code": code}})

    def reset(self) -> None:
        reset(self.stream)

    async def wait_peer_gone(self) -> None:
        """Read until the peer's FIN or RST, then set `broken`."""
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while await self.stream.receive_some(65536):
                pass
        self.broken.set()


Handler = Callable[[Exchange], Awaitable[None]]


@dataclass
class Peer:
    """A server on port 0 that hands each request to a handler; the next `resets` connections it cuts unread."""

    handler: Handler
    port: int = 0
    connections: int = 0
    resets: int = 0
    _listeners: list[trio.SocketListener] = field(default_factory=list)
    _streams: set[trio.SocketStream] = field(default_factory=set)
    _scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        self._listeners = await trio.open_tcp_listeners(self.port, host="127.0.0.1")
        self.port = self._listeners[0].socket.getsockname()[1]
        with self._scope:
            await trio.serve_listeners(self._serve, self._listeners, task_status=_Started(task_status))

    def stop(self) -> None:
        """As `kill -9` would: listener and all connections closed at once."""
        self._scope.cancel()

    async def _serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        if self.resets:
            self.resets -= 1
            reset(stream)
            return
        connection = h11.Connection(h11.SERVER)
        async with stream:
            try:
                while True:
                    while (event := connection.next_event()) is h11.NEED_DATA:
                        connection.receive_data(await stream.receive_some(65536))
                    if not isinstance(event, h11.Request):
                        return
                    await self.handler(Exchange(stream, connection, event))
                    if connection.states != {h11.CLIENT: h11.DONE, h11.SERVER: h11.DONE}:
                        return
                    connection.start_next_cycle()
            except (ConnectionError, h11.ProtocolError, trio.BrokenResourceError, trio.ClosedResourceError):
                return


class _Started:
    def __init__(self, task_status: trio.TaskStatus[None]) -> None:
        self._task_status = task_status

    def started(self, value: object = None) -> None:
        self._task_status.started()
