"""As many connections as there are descriptors for: who makes room, who is told no, and what the log says of it."""

from __future__ import annotations

import errno
import logging
import os
import resource
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
import trio
import trio.testing

from tests.http.wire import Answer, Wire, http_app, open_server, request_bytes
from wakecall.http.barrier import BarrierSettings
from wakecall.http.capacity import Capacity, calm_shortages, measure_capacity


class Waiting:
    """An app whose `/wait` answers when it is let go; everything else at once."""

    def __init__(self) -> None:
        self.release = trio.Event()
        self.busy = 0
        self._news = trio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/wait":
            self.busy += 1
            self._news.set()
            self._news = trio.Event()
            await self.release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def make_busy(self, *wires: Wire) -> None:
        """Each of these connections has a request under way when this returns."""
        wanted = self.busy + len(wires)
        for wire in wires:
            await wire.send(request_bytes("GET", "/wait"))
        while self.busy < wanted:
            await self._news.wait()


def assert_turned_away(answer: Answer) -> None:
    assert (answer.status, answer.code) == (503, "too_many_connections")
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["connection"] == "close"


async def test_one_too_many_is_told_so_while_all_others_are_busy() -> None:
    """Nothing of those that are busy is lost; when one has its answer, there is room again."""
    waiting = Waiting()
    async with open_server(http_app(waiting), BarrierSettings(max_connections=2)) as server:
        async with server.connect() as first, server.connect() as second:
            await waiting.make_busy(first, second)
            assert_turned_away(await server.ask("GET", "/", "x: " + "y" * 5000))
            waiting.release.set()
            for wire in (first, second):
                assert (await wire.read_answer()).status == 200
            assert (await server.ask("GET", "/")).status == 200


async def test_of_a_flood_only_so_many_are_told_why_they_end() -> None:
    """Words take a moment each, and a descriptor for so long: the rest is reset, or the room would not be there in time."""
    settings = BarrierSettings(max_connections=2, max_turned_away=1)
    async with open_server(http_app(Waiting()), settings) as server:
        async with server.connect() as told, server.connect() as reset:
            for wire in (told, reset):
                await wire.send(b"GET / HTTP/1.1\r\nhost: x\r\n")
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert server.barrier.make_room()
            assert server.barrier.make_room()
            assert_turned_away(await told.read_answer())
            assert await reset.read_to_end() == b""
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert server.barrier.turned_away == 0


async def test_who_has_been_idle_for_the_longest_makes_room() -> None:
    """Connections that say nothing cannot keep others out; the one that ends hears no error, for it asked nothing."""
    waiting = Waiting()
    async with open_server(http_app(waiting), BarrierSettings(max_connections=3)) as server:
        async with server.connect() as used, server.connect() as silent, server.connect() as busy:
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert (await used.ask("GET", "/")).status == 200
            await waiting.make_busy(busy)
            async with server.connect() as newcomer:
                assert (await newcomer.ask("GET", "/")).status == 200
                assert await silent.read_to_end() == b""
                assert (await used.ask("GET", "/")).status == 200
                async with server.connect() as another:
                    assert (await another.ask("GET", "/")).status == 200
                    assert await newcomer.read_to_end() == b""
            waiting.release.set()
            assert (await busy.read_answer()).status == 200
            assert (await used.ask("GET", "/")).status == 200


async def test_a_head_that_trickles_in_makes_room_as_well() -> None:
    """It is told why. Its bytes do not make it younger than one that has been silent for less long."""
    async with open_server(http_app(Waiting()), BarrierSettings(max_connections=2)) as server:
        async with server.connect() as half, server.connect() as silent:
            await trio.testing.wait_all_tasks_blocked(0.01)
            await half.send(b"GET / HTTP/1.1\r\nx: ")
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert (await server.ask("GET", "/")).status == 200
            assert_turned_away(await half.read_answer())
            assert await half.read_to_end() == b""
            assert (await silent.ask("GET", "/")).status == 200


class _OnceTheReaderIsWoken(trio.abc.Instrument):
    """Acts when a connection's reader is about to get what came for it, and not before."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act: Callable[[], object] | None = act

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:
        if self._act is not None and task.name.endswith("_run_handler"):
            act, self._act = self._act, None
            act()


@pytest.mark.parametrize("when", ["it is unread", "it is being read"])
async def test_who_asks_in_the_instant_in_which_he_makes_room_is_told_so(when: str) -> None:
    """His request is not begun and then cut: it is answered, with the reason."""
    waiting = Waiting()
    async with open_server(http_app(waiting), BarrierSettings(max_connections=1)) as server:
        async with server.connect() as idle:
            assert (await idle.ask("GET", "/")).status == 200
            await trio.testing.wait_all_tasks_blocked(0.01)
            watch = _OnceTheReaderIsWoken(server.barrier.make_room)
            if when == "it is being read":
                trio.lowlevel.add_instrument(watch)
                await idle.send(request_bytes("GET", "/wait"))
            else:
                request = request_bytes("GET", "/wait")
                assert idle.stream.socket._sock.send(request) == len(request)
                assert server.barrier.make_room()
            assert_turned_away(await idle.read_answer())
            assert await idle.read_to_end() == b""
            assert waiting.busy == 0
            if when == "it is being read":
                trio.lowlevel.remove_instrument(watch)


async def test_clients_leave_room_for_publishers() -> None:
    """Those who wait for answers have at most seven eighths; who brings the answers is let in, and so are probes."""
    waiting = Waiting()
    async with open_server(http_app(waiting), BarrierSettings(max_connections=16)) as server, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(server.connect()) for _ in range(14)]
        await waiting.make_busy(*clients)
        for _ in range(20):
            # Told on a connection that is then closed, and does not take the others' room while it is.
            wire = await stack.enter_async_context(server.connect())
            assert_turned_away(await wire.ask("POST", "/v1/chat/completions", body=b"{}"))
        for spelling in ("http://x/v1/models", "/%76%31/chat/completions", "/v1%2Fmodels", "http://x/%761/models"):
            assert_turned_away(await server.ask("GET", spelling))
        for path in ("/publisher/v1/tasks/x/result", "/healthz"):
            assert (await server.ask("POST", path)).status == 200
        waiting.release.set()
        for client in clients:
            assert (await client.read_answer()).status == 200
        assert (await server.ask("POST", "/v1/chat/completions")).status == 200
        await stack.aclose()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert (server.barrier.connections, len(server.barrier.idle), len(server.barrier.leaving)) == (set(), 0, 0)


async def test_a_flood_of_silent_connections_keeps_nobody_out() -> None:
    """However many come, no more than the bound are held, and whoever asks something is answered."""
    async with open_server(http_app(Waiting()), BarrierSettings(max_connections=20)) as server:
        sockets = []
        try:
            for _ in range(300):
                sock = trio.socket.socket()
                sockets.append(sock)
                await sock.connect(("127.0.0.1", server.port))
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert len(server.barrier.connections) == len(server.barrier.idle) == 20
            assert (await server.ask("GET", "/")).status == 200
        finally:
            for sock in sockets:
                sock.close()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not server.barrier.connections
        assert not server.barrier.idle
        assert not server.barrier.leaving


@pytest.mark.parametrize("limit", [64, 256, 1024, 20000])
def test_some_descriptors_are_kept_back_to_say_no_with(limit: int) -> None:
    """Connections, those turned away and all else together stay below the limit; most of a usual one is connections."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    already = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        capacity = measure_capacity()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert capacity.connections is not None
    assert capacity.connections >= 1
    assert 1 <= capacity.turned_away <= 64
    if limit > already + 64:
        assert capacity.connections + capacity.turned_away + already + 30 <= limit
    if limit >= 1024:
        assert capacity.connections > limit * 0.8


def test_without_a_limit_there_is_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert measure_capacity() == Capacity(None, 64)


async def test_a_shortage_is_said_once_and_without_a_traceback(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    """Trio tries again ten times a second, and logs each. A shortage after some calm is a new one."""

    class Exhausted(trio.abc.Listener[trio.SocketStream]):
        code = errno.EMFILE

        async def accept(self) -> trio.SocketStream:
            await trio.lowlevel.checkpoint()
            raise OSError(self.code, os.strerror(self.code))

        async def aclose(self) -> None:
            await trio.lowlevel.checkpoint()

    def said() -> list[logging.LogRecord]:
        return [each for each in caplog.records if each.name.startswith(("wakecall", "trio"))]

    for error in (errno.EMFILE, errno.ENFILE):
        Exhausted.code = error
        with calm_shortages(), trio.move_on_after(60):
            await trio.serve_listeners(lambda _: trio.lowlevel.checkpoint(), [Exhausted()])
        (record,) = said()
        assert os.strerror(error) in record.getMessage()
        assert record.exc_info is None
        caplog.clear()
    with calm_shortages():
        for _ in range(2):
            with trio.move_on_after(5):
                await trio.serve_listeners(lambda _: trio.lowlevel.checkpoint(), [Exhausted()])
            await trio.sleep(11)
    assert len(said()) == 2
    logging.getLogger("trio.serve_listeners").error("another error")
    assert len(said()) == 3
