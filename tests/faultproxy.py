"""A TCP proxy for 127.0.0.1 that does to a connection what networks do: late, slow, in crumbs, cut, or just silent.

    async with open_fault_proxy(broker.port) as proxy:
        proxy.down = Toxics(latency_s=0.05, fragment=7)                             # how bytes travel, from now on
        proxy.strike(Fault("up", "rst", after=100, mark=b"/result HTTP/1.1"))       # what happens to one connection, once
        …  # somebody uses proxy.url instead of the broker's
        await proxy.wait_struck()

It knows nothing of HTTP: a mark is a run of bytes to count from. *up* is what the side that connected says, *down* what
the target answers.

Each direction is a reader, a bounded queue and a writer, so that latency delays bytes without making them slow. The ends of
a connection are bytes too: FIN and RST come through behind what was sent before them, half-closes included. So a test that
passes here with mild toxics has seen what it would have seen without, only later and cut elsewhere.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import trio

__all__ = ["Direction", "Fault", "FaultProxy", "Kind", "Toxics", "open_fault_proxy"]

Direction: TypeAlias = Literal["up", "down"]
#: `fin`: both sides see an orderly end. `rst`: both see a reset. `stall`: bytes stop in this direction, the connection
#: stays. `silence`: they stop in both, and neither side's end reaches the other any more: a cable pulled out.
Kind: TypeAlias = Literal["fin", "rst", "stall", "silence"]
_OTHER: dict[Direction, Direction] = {"up": "down", "down": "up"}

_READ_BYTES = 65536
#: Reads between reader and writer of a direction: what is on the way at one moment.
_QUEUED = 32
#: How long a side that is being let go may still talk before its socket is closed.
_LAST_WORDS_S = 1.0
#: Between two pieces of what came as one.
_GAP_S = 0.001
#: With a bandwidth, writes are so long.
_SLICE_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Toxics:
    """How bytes of one direction travel.

    Args:
        latency_s, jitter_s: each read is passed on so much later, and up to `jitter_s` more; never out of order.
        bandwidth: bytes in a second; None: as fast as they come.
        fragment: no write is larger than so many bytes, and their sizes are random; None: whole.
        fragments: of each read only so many pieces are cut off, what is left of it goes in one; None: all of it.
        close_s: an end (FIN) is passed on so much later.
    """

    latency_s: float = 0.0
    jitter_s: float = 0.0
    bandwidth: float | None = None
    fragment: int | None = None
    fragments: int | None = None
    close_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens, once, to the first connection on which it applies.

    Args:
        direction: whose bytes are counted.
        kind: what happens then.
        after: bytes that still pass.
        mark: they are counted from behind its first appearance in this direction of a connection; empty: from the start.
    """

    direction: Direction
    kind: Kind
    after: int = 0
    mark: bytes = b""


@dataclass(slots=True)
class _Count:
    """How far a fault is away on one direction of one connection."""

    fault: Fault
    tail: bytes = b""
    left: int | None = None

    def take(self, data: bytes) -> int | None:
        """How many of these bytes still pass before it strikes; None: all of them, and it does not strike yet."""
        if self.left is None:
            seen = self.tail + data
            at = seen.find(self.fault.mark)
            if at < 0:
                self.tail = seen[max(0, len(seen) - len(self.fault.mark) + 1) :]
                return None
            behind = at + len(self.fault.mark) - len(self.tail)
            self.left = behind + self.fault.after
        if len(data) < self.left:
            self.left -= len(data)
            return None
        return self.left


@dataclass(eq=False, slots=True)
class _Link:
    """One connection: its two sockets, what carries bytes between them, and how that ended."""

    client: trio.SocketStream
    target: trio.SocketStream
    counts: list[_Count]
    pumps: trio.CancelScope = field(default_factory=trio.CancelScope)
    over: dict[Direction, trio.Event] = field(default_factory=lambda: {"up": trio.Event(), "down": trio.Event()})
    end: Kind = "fin"

    def ends(self, direction: Direction) -> tuple[trio.SocketStream, trio.SocketStream]:
        """Where the bytes of this direction come from, and where they go."""
        return (self.client, self.target) if direction == "up" else (self.target, self.client)

    def stop(self, end: Kind) -> None:
        """Carry nothing more, and end in this way."""
        self.end = end
        self.pumps.cancel()

    def reset(self) -> None:
        """RST on both sides, at once."""
        self.stop("rst")
        for stream in (self.client, self.target):
            _reset(stream)


class FaultProxy:
    """See the module. What is set applies to connections that are there, too.

    Attributes:
        port: where to connect instead of to the target.
        up, down: how bytes travel.
        connections, passed: how many there have been, and the bytes of both directions.
        struck: the faults that have happened.
    """

    def __init__(self, target: int, *, up: Toxics | None = None, down: Toxics | None = None, seed: int = 1) -> None:
        self.target = target
        self.port = 0
        self.up = up or Toxics()
        self.down = down or Toxics()
        self.connections = 0
        self.passed = 0
        self.struck: list[Fault] = []
        self._dice = random.Random(seed)
        self._links: set[_Link] = set()
        self._pending: list[Fault] = []
        self._news = trio.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def open_connections(self) -> int:
        """Those whose ends have not both been passed on."""
        return len(self._links)

    def strike(self, *faults: Fault) -> None:
        """Let each of these happen once, on this or on a later connection."""
        self._pending += faults
        for link in self._links:
            link.counts += [_Count(fault) for fault in faults]

    async def wait_struck(self, count: int = 1) -> None:
        """Return once so many faults have happened."""
        while len(self.struck) < count:
            await self._news.wait()

    def reset_all(self) -> None:
        """RST to everybody who is connected."""
        for link in list(self._links):
            link.reset()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; started once `port` is known. Connections are closed then."""
        listeners = await trio.open_tcp_listeners(self.port, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, self._serve, listeners)
            task_status.started()

    async def _serve(self, client: trio.SocketStream) -> None:
        self.connections += 1
        async with client:
            try:
                target = await trio.open_tcp_stream("127.0.0.1", self.target)
            except OSError:
                # The nearest thing to a refused connection that is left to us.
                _reset(client)
                return
            async with target:
                link = _Link(client, target, [_Count(fault) for fault in self._pending])
                self._links.add(link)
                try:
                    await self._carry(link)
                finally:
                    self._links.discard(link)

    async def _carry(self, link: _Link) -> None:
        """All of one connection, to the end that it comes to."""
        with link.pumps:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pump, link, "up")
                nursery.start_soon(self._pump, link, "down")
        if link.end == "silence":
            # Sockets that are open, and nobody at them.
            await trio.sleep_forever()
        elif link.pumps.cancelled_caught and link.end == "fin":
            with trio.move_on_after(_LAST_WORDS_S):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_take_leave, link.client)
                    nursery.start_soon(_take_leave, link.target)

    async def _pump(self, link: _Link, direction: Direction) -> None:
        """Everything of one direction, its end included."""
        put, take = trio.open_memory_channel[tuple[float, bytes | None]](_QUEUED)
        async with put, take, trio.open_nursery() as nursery:
            nursery.start_soon(self._read, link, direction, put)
            await self._write(link, direction, take)
            nursery.cancel_scope.cancel()
        link.over[direction].set()

    async def _read(
        self, link: _Link, direction: Direction, put: trio.MemorySendChannel[tuple[float, bytes | None]]
    ) -> None:
        """Queue what comes, with the time at which it is due. `b""` is a FIN, None a RST."""
        source, _ = link.ends(direction)
        data: bytes | None = b"."
        while data:
            try:
                data = bytes(await source.receive_some(_READ_BYTES))
            except trio.BrokenResourceError:
                data = None
            except trio.ClosedResourceError:
                return
            toxics = self._toxics(direction)
            late_s = toxics.latency_s + self._dice.uniform(0, toxics.jitter_s)
            await put.send((trio.current_time() + late_s, data))

    async def _write(
        self, link: _Link, direction: Direction, take: trio.MemoryReceiveChannel[tuple[float, bytes | None]]
    ) -> None:
        _, sink = link.ends(direction)
        try:
            async for due, data in take:
                await trio.sleep_until(due)
                if data is None:
                    link.reset()
                    return
                if not data:
                    await trio.sleep(self._toxics(direction).close_s)
                    await sink.send_eof()
                    return
                fault, passes = self._take(link, direction, data)
                await self._send(direction, sink, data[:passes])
                if fault is not None:
                    await self._happen(link, fault)
                    return
        except trio.BrokenResourceError:
            # What the other side said before it went away comes first, as it would without us.
            with trio.move_on_after(_LAST_WORDS_S):
                await link.over[_OTHER[direction]].wait()
            link.reset()
        except trio.ClosedResourceError:
            pass

    def _take(self, link: _Link, direction: Direction, data: bytes) -> tuple[Fault | None, int]:
        """The fault that strikes within these bytes, and how many of them pass before it."""
        first: tuple[int, Fault] | None = None
        for count in link.counts:
            if count.fault.direction == direction and count.fault in self._pending:
                passes = count.take(data)
                if passes is not None and (first is None or passes < first[0]):
                    first = passes, count.fault
        if first is None:
            return None, len(data)
        self._pending.remove(first[1])
        return first[1], first[0]

    async def _send(self, direction: Direction, sink: trio.SocketStream, data: bytes) -> None:
        sent = pieces = 0
        while sent < len(data):
            toxics = self._toxics(direction)
            size = len(data) - sent
            pause_s = 0.0
            if toxics.fragment is not None and (toxics.fragments is None or pieces < toxics.fragments):
                size = min(size, self._dice.randint(1, toxics.fragment))
                # At once they would arrive as one.
                pause_s = _GAP_S
            if toxics.bandwidth is not None:
                size = min(size, max(1, int(toxics.bandwidth * _SLICE_S)))
                pause_s = max(pause_s, size / toxics.bandwidth)
            await sink.send_all(data[sent : sent + size])
            self.passed += size
            sent += size
            pieces += 1
            await trio.sleep(pause_s)

    async def _happen(self, link: _Link, fault: Fault) -> None:
        self.struck.append(fault)
        self._news.set()
        self._news = trio.Event()
        if fault.kind == "rst":
            link.reset()
        elif fault.kind == "stall":
            # Until the other direction ends: then nobody is left who could wait for this one.
            await link.over[_OTHER[fault.direction]].wait()
            link.reset()
        else:
            link.stop(fault.kind)

    def _toxics(self, direction: Direction) -> Toxics:
        return self.up if direction == "up" else self.down


def _reset(stream: trio.SocketStream) -> None:
    """Close it with a RST."""
    if stream.socket.fileno() >= 0:
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.socket.close()


async def _take_leave(stream: trio.SocketStream) -> None:
    """FIN, and hear the other side out: to close a socket with bytes unread would be a RST."""
    # Closed: by `reset_all`, meanwhile.
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.send_eof()
        while await stream.receive_some(_READ_BYTES):
            pass


@asynccontextmanager
async def open_fault_proxy(
    target: int, *, up: Toxics | None = None, down: Toxics | None = None, seed: int = 1
) -> AsyncIterator[FaultProxy]:
    """A proxy to a port of this machine, for the block.

    Args:
        target: the port; whether somebody listens there matters only when somebody connects.
        up, down: how bytes travel; at once and whole when left out.
        seed: of jitter and fragments.
    """
    proxy = FaultProxy(target, up=up, down=down, seed=seed)
    async with trio.open_nursery() as nursery:
        await nursery.start(proxy.run)
        yield proxy
        nursery.cancel_scope.cancel()
