"""A load generator and a publisher that cost less than what they measure: HTTP/1.1 by hand, on plain Trio sockets."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from .server import ANSWER, EVENT, EVENTS

_HOST = b"Host: 127.0.0.1\r\n"


def post(path: str, body: bytes, headers: bytes = b"Content-Type: application/json\r\n") -> bytes:
    """A POST with its length declared."""
    return b"POST %b HTTP/1.1\r\n%b%bContent-Length: %d\r\n\r\n%b" % (path.encode(), _HOST, headers, len(body), body)


def with_key(request: bytes, key: str | None) -> bytes:
    """The same request, from the holder of a key."""
    line, _, rest = request.partition(b"\r\n")
    return request if key is None else b"%b\r\nAuthorization: Bearer %b\r\n%b" % (line, key.encode(), rest)


class Connection:
    """One keep-alive connection. Answers are read by their length, or chunked; nothing else is understood."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def send(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def ask(self, data: bytes) -> bytes:
        """Send a request, and return its answer's body. Raises AssertionError on any status but a 2xx."""
        await self._stream.send_all(data)
        length, _ = await self._read_head()
        if length is None:
            return b"".join([piece async for piece in self._chunks()])
        while len(self._buffer) < length:
            await self._fill()
        body = bytes(self._buffer[:length])
        del self._buffer[:length]
        return body

    async def count_events(self, data: bytes) -> int:
        """Send a request, and count the events of the stream that answers it."""
        await self._stream.send_all(data)
        await self._read_head()
        return sum([piece.count(b"\n\n") async for piece in self._chunks()])

    async def events(self, data: bytes) -> AsyncIterator[dict[str, object]]:
        """Send a request, and iterate the JSON data of the events that answer it."""
        await self._stream.send_all(data)
        await self._read_head()
        text = bytearray()
        async for piece in self._chunks():
            text += piece
            while (end := text.find(b"\n\n")) >= 0:
                for line in bytes(text[:end]).split(b"\n"):
                    if line.startswith(b"data: "):
                        yield json.loads(line[6:])
                del text[: end + 2]

    async def _read_head(self) -> tuple[int | None, bytes]:
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            await self._fill()
        head = bytes(self._buffer[:end]).lower()
        del self._buffer[: end + 4]
        assert head.startswith(b"http/1.1 2"), head
        if head.startswith(b"http/1.1 204"):
            return 0, head
        at = head.find(b"\r\ncontent-length:")
        return (None if at < 0 else int(head[at + 17 :].split(b"\r\n", 1)[0])), head

    async def _chunks(self) -> AsyncIterator[bytes]:
        while True:
            while (end := self._buffer.find(b"\r\n")) < 0:
                await self._fill()
            size = int(bytes(self._buffer[:end]), 16)
            while len(self._buffer) < end + 2 + size + 2:
                await self._fill()
            piece = bytes(self._buffer[end + 2 : end + 2 + size])
            del self._buffer[: end + 2 + size + 2]
            if not size:
                return
            yield piece

    async def _fill(self) -> None:
        data = await self._stream.receive_some(65536)
        assert data, "the server closed the connection"
        self._buffer += data


@asynccontextmanager
async def connect(port: int) -> AsyncIterator[Connection]:
    """A connection to this machine."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        yield Connection(stream)


async def run_publisher(
    port: int, connections: int, key: str | None = None, *, task_status: trio.TaskStatus[None]
) -> None:
    """A publisher of `bench` that answers each infer with a constant, one result POST each, over kept connections."""
    async with connect(port) as control, trio.open_nursery() as nursery:
        async with connect(port) as registration:
            spec = json.dumps({"llms": [{"name": "bench"}]}).encode()
            register = post("/publisher/v1/sessions/bench", spec).replace(b"POST", b"PUT", 1)
            await registration.ask(with_key(register, key))
        send, receive = trio.open_memory_channel[dict[str, object]](10_000)
        for _ in range(connections):
            nursery.start_soon(_answer, port, receive.clone(), key)
        request = b"GET /publisher/v1/sessions/bench/frames HTTP/1.1\r\n%b\r\n" % _HOST
        async for data in control.events(with_key(request, key)):
            if "epoch" in data:
                task_status.started()
            elif "path" in data:
                await send.send(data)


async def _answer(port: int, frames: trio.MemoryReceiveChannel[dict[str, object]], key: str | None) -> None:
    chunk = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
    async with connect(port) as connection:
        async for data in frames:
            path = f"/publisher/v1/tasks/{data['task_id']}/result"
            if data["stream"]:
                headers = b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
                await connection.send(with_key(b"POST %b HTTP/1.1\r\n%b%b\r\n" % (path.encode(), _HOST, headers), key))
                for _ in range(EVENTS):
                    await connection.send(chunk)
                await connection.ask(b"0\r\n\r\n")
            else:
                await connection.ask(with_key(post(path, ANSWER), key))


async def run_callers(
    port: int, callers: int, seconds: float, work: Callable[[Connection], object]
) -> tuple[int, float]:
    """Have `callers` repeat `work` on a connection each. Returns how often it was done, and in how many seconds."""
    done = 0
    start = trio.current_time()

    async def call() -> None:
        nonlocal done
        async with connect(port) as connection:
            while trio.current_time() - start < seconds:
                await work(connection)  # type: ignore[misc]
                done += 1

    async with trio.open_nursery() as nursery:
        for _ in range(callers):
            nursery.start_soon(call)
    return done, trio.current_time() - start
