"""A peer that sends exactly the bytes it is told to, and a server on a free port to send them to."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import h11
import msgspec
import trio
import trio.testing

from wakecall.http.barrier import Barrier, BarrierSettings, barrier_of
from wakecall.http.cors import Cors
from wakecall.http.server import hypercorn_config, serve_app
from wakecall.http.sockets import bind
from wakecall.http.tls import Certificates

__all__ = ["Answer", "Server", "TlsWire", "Wire", "http_app", "open_server", "request_bytes", "send_until_stuck"]

#: No test here waits longer for a real socket.
PATIENCE_S = 15.0


def request_bytes(method: str, target: str, *headers: str, body: bytes = b"", host: str = "x") -> bytes:
    """An HTTP/1.1 request, with a Content-Length where there is a body."""
    lines = [f"{method} {target} HTTP/1.1", f"host: {host}", *headers]
    if body:
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def http_app(handler: Callable[[Any, Any, Any], Awaitable[None]]) -> Callable[[Any, Any, Any], Awaitable[None]]:
    """A bare ASGI app out of what handles its requests: knows the lifespan, nothing else."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await handler(scope, receive, send)
            return
        for _ in range(2):
            message = await receive()
            await send({"type": message["type"] + ".complete"})

    return app


@dataclass(frozen=True)
class Answer:
    """One response, whole unless `is_cut`."""

    status: int
    headers: dict[str, str]
    body: bytes
    is_cut: bool = False
    interim: list[int] = field(default_factory=list)

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def code(self) -> str:
        """The error's code; checks the error's shape on the way."""
        error = self.json["error"]
        assert set(error) >= {"message", "type", "param", "code"}
        assert self.headers["x-request-id"]
        return str(error["code"])


class Wire:
    """One raw TCP connection, from the peer's side."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._left = b""

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def half_close(self) -> None:
        """FIN: nothing more will be sent."""
        await self.stream.send_eof()

    def reset(self) -> None:
        """RST, at once."""
        self.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.stream.socket.close()

    async def read_some(self, count: int = 65536) -> bytes:
        """Raw bytes; empty at the server's FIN or RST."""
        if self._left:
            data, self._left = self._left, b""
            return data
        try:
            return bytes(await self.stream.receive_some(count))
        except trio.BrokenResourceError:
            return b""

    async def read_to_end(self) -> bytes:
        """All bytes until the server ends the connection."""
        pieces = []
        while data := await self.read_some():
            pieces.append(data)
        return b"".join(pieces)

    async def read_answer(self, method: str = "GET") -> Answer:
        """The next response. `is_cut` if the connection ended in the middle of it."""
        http = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
        http.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
        http.send(h11.EndOfMessage())
        answer = Answer(0, {}, b"")
        body: list[bytes] = []
        interim: list[int] = []
        while True:
            try:
                event = http.next_event()
                if event is h11.NEED_DATA:
                    http.receive_data(await self.read_some())
                elif isinstance(event, h11.InformationalResponse):
                    interim.append(event.status_code)
                elif isinstance(event, h11.Response):
                    headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
                    answer = Answer(event.status_code, headers, b"")
                elif isinstance(event, h11.Data):
                    body.append(bytes(event.data))
                elif isinstance(event, h11.EndOfMessage):
                    self._left = http.trailing_data[0]
                    return replace(answer, body=b"".join(body), interim=interim)
                else:
                    return replace(answer, body=b"".join(body), interim=interim, is_cut=True)
            except h11.RemoteProtocolError:
                return replace(answer, body=b"".join(body), interim=interim, is_cut=True)

    async def ask(self, method: str, target: str, *headers: str, body: bytes = b"") -> Answer:
        """One ordinary request and its answer."""
        await self.send(request_bytes(method, target, *headers, body=body))
        return await self.read_answer(method)


class TlsWire(Wire):
    """The same inside TLS; its ends are TCP's, and one of TLS's own.

    Args:
        stream: whose handshake is done.
    """

    stream: Any

    def __init__(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        super().__init__(stream)  # type: ignore[arg-type]
        self.tcp = stream.transport_stream

    async def half_close(self) -> None:
        """FIN, without a word."""
        await self.tcp.send_eof()

    async def say_goodbye(self) -> None:
        """close_notify; TCP stays open."""
        with contextlib.suppress(trio.BrokenResourceError):
            await self.stream.unwrap()

    def reset(self) -> None:
        self.tcp.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.tcp.socket.close()


async def send_until_stuck(send: Callable[[], Awaitable[None]]) -> None:
    """Call `send` again and again, until all that is between it and its reader is full and nothing moves any more."""
    async with trio.open_nursery() as nursery:

        async def go_on() -> None:
            while True:
                await send()

        nursery.start_soon(go_on)
        await trio.testing.wait_all_tasks_blocked(0.02)
        nursery.cancel_scope.cancel()


@dataclass
class Server:
    """A server that runs, and what a test does to it. With `trust`, clients speak TLS with that."""

    port: int
    barrier: Barrier
    stop: Callable[[], None]
    wait_stopped: Callable[[], Any]
    trust: ssl.SSLContext | None = None

    @asynccontextmanager
    async def connect(
        self, *, receive_buffer: int | None = None, send_buffer: int | None = None, raw: bool = False
    ) -> AsyncIterator[Wire]:
        """A connection, closed at the end. Buffers in bytes, for peers that should soon be full; `raw` is without TLS."""
        sock = trio.socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        if send_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        await sock.connect(("127.0.0.1", self.port))
        async with trio.SocketStream(sock) as stream:
            if self.trust is None or raw:
                yield Wire(stream)
                return
            tls = trio.SSLStream(stream, self.trust, server_hostname="localhost", https_compatible=True)
            await tls.do_handshake()
            yield TlsWire(tls)

    async def ask(self, method: str, target: str, *headers: str, body: bytes = b"") -> Answer:
        """One ordinary request on a connection of its own."""
        async with self.connect() as wire:
            return await wire.ask(method, target, *headers, body=body)


@asynccontextmanager
async def open_server(
    app: Any,
    settings: BarrierSettings | None = None,
    *,
    patience_s: float = PATIENCE_S,
    certificates: Certificates | None = None,
    trust: ssl.SSLContext | None = None,
    cors: Cors | None = None,
) -> AsyncIterator[Server]:
    """Serve `app` on 127.0.0.1, on a free port, for the block; everything in it under one deadline.

    Args:
        app: an ASGI app.
        settings: the barrier's.
        patience_s: seconds (of Trio's clock) that the block may take.
        certificates: to serve TLS, and
        trust: for its clients.
        cors: the barrier's.
    """
    config = hypercorn_config(settings, certificates, cors)
    stop, stopped = trio.Event(), trio.Event()
    sockets = bind("127.0.0.1", 0, peer_stall_s=(settings or BarrierSettings()).peer_stall_s)
    port = sockets[0].getsockname()[1]

    async def run(task_status: trio.TaskStatus[list[str]]) -> None:
        await serve_app(app, config, sockets, shutdown_trigger=stop.wait, task_status=task_status)
        stopped.set()

    with trio.fail_after(patience_s):
        async with trio.open_nursery() as nursery:
            await nursery.start(run)
            yield Server(port, barrier_of(config), stop.set, stopped.wait, trust)
            nursery.cancel_scope.cancel()
