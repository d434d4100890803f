"""The fault proxy does what it says: what the tests behind it prove depends on that."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from tests.faultproxy import Fault, FaultProxy, Toxics, open_fault_proxy
from tests.publisher.scripted import reset

PATIENCE_S = 10.0
#: Nothing has moved for so long (of real time, whatever the clock says): loopback has delivered by then.
SETTLED_S = 0.005
#: What a connection says when its other side has reset it.
RST = "RST"


@asynccontextmanager
async def open_pair(**toxics: Toxics) -> AsyncIterator[tuple[FaultProxy, trio.SocketStream, trio.SocketStream]]:
    """A proxy, and both ends of one connection through it: client's, target's."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, open_fault_proxy(listener.socket.getsockname()[1], **toxics) as proxy:
        async with await trio.open_tcp_stream("127.0.0.1", proxy.port) as client, await listener.accept() as target:
            yield proxy, client, target


async def read(stream: trio.SocketStream, count: int = 1 << 20) -> bytes | str:
    """So many bytes, or fewer at a FIN, or `RST`."""
    got = b""
    with trio.fail_after(PATIENCE_S):
        try:
            while len(got) < count and (data := await stream.receive_some(count - len(got))):
                got += data
        except trio.BrokenResourceError:
            return RST
    return got


async def arrived(stream: trio.SocketStream) -> bytes:
    """What is there once nothing moves any more."""
    got = b""

    async def take() -> None:
        nonlocal got
        got = bytes(await stream.receive_some(65536))

    await trio.testing.wait_all_tasks_blocked(SETTLED_S)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        await trio.testing.wait_all_tasks_blocked(SETTLED_S)
        nursery.cancel_scope.cancel()
    return got


async def test_without_toxics_it_is_not_there() -> None:
    """Bytes, half-closes and resets pass in both directions, in their order."""
    async with open_pair() as (proxy, client, target):
        await client.send_all(b"question")
        await client.send_eof()
        assert await read(target) == b"question"
        await target.send_all(b"answer")
        await target.send_eof()
        assert await read(client) == b"answer"
        assert (proxy.connections, proxy.passed) == (1, 14)
    async with open_pair() as (_, client, target):
        await target.send_all(b"last words")
        reset(target)
        assert await read(client, 10) == b"last words"
        assert await read(client) == RST


async def test_large_bodies_pass_in_both_directions_at_once() -> None:
    """Nothing is lost, doubled or swapped, though both queues are full all the time."""
    sent = bytes(index * index % 251 for index in range(65536)) * 64
    mild = Toxics(latency_s=0.001, jitter_s=0.003, fragment=999, fragments=2)
    async with open_pair(up=mild, down=mild) as (_, client, target), trio.open_nursery() as nursery:
        for stream in (client, target):
            nursery.start_soon(stream.send_all, sent)
        assert await read(client, len(sent)) == sent
        assert await read(target, len(sent)) == sent


async def test_latency_delays_and_keeps_order(mock_clock: trio.testing.MockClock) -> None:
    """Not before its time, and not slower for it: what was sent together arrives together."""
    async with open_pair(up=Toxics(latency_s=5, jitter_s=1)) as (_, client, target):
        await client.send_all(b"a")
        assert await arrived(target) == b""
        mock_clock.jump(2)
        await client.send_all(b"b")
        await trio.testing.wait_all_tasks_blocked(SETTLED_S)
        mock_clock.jump(2.9)
        assert await arrived(target) == b""
        mock_clock.jump(1.2)
        assert await arrived(target) == b"a"
        mock_clock.jump(3)
        assert await arrived(target) == b"b"
        await target.send_all(b"down is as fast as ever")
        assert await arrived(client)


async def test_bandwidth_is_a_rate(mock_clock: trio.testing.MockClock) -> None:
    """30 bytes at 10 a second are 3 s, evenly."""
    async with open_pair(down=Toxics(bandwidth=10)) as (_, client, target):
        await target.send_all(b"x" * 30)
        got = []
        for _ in range(30):
            got.append(len(await arrived(client)))
            mock_clock.jump(0.1)
        assert got == [1] * 30


async def test_fragments_are_small_and_of_all_sizes() -> None:
    """A reader sees pieces of up to 7 bytes; with a bound on their number, the rest in one."""
    async with open_pair(down=Toxics(fragment=7)) as (proxy, client, target):
        await target.send_all(bytes(200))
        sizes = []
        while sum(sizes) < 200:
            with trio.fail_after(PATIENCE_S):
                sizes.append(len(await client.receive_some(65536)))
        # Two pieces now and then arrive as one.
        assert len(sizes) > 20
        assert len(set(sizes)) > 3
        proxy.down = Toxics(fragment=7, fragments=1)
        await target.send_all(bytes(200))
        with trio.fail_after(PATIENCE_S):
            assert len(await client.receive_some(65536)) <= 7
        assert len(await read(client, 193)) == 193


async def test_a_slow_close_comes_after_all_bytes(mock_clock: trio.testing.MockClock) -> None:
    """The end is late, what was said is not."""
    async with open_pair(down=Toxics(close_s=30)) as (_, client, target):
        await target.send_all(b"all")
        await target.send_eof()
        assert await arrived(client) == b"all"
        ended = trio.Event()
        async with trio.open_nursery() as nursery:

            async def wait_end() -> None:
                assert await client.receive_some(1) == b""
                ended.set()

            nursery.start_soon(wait_end)
            mock_clock.jump(29)
            await trio.testing.wait_all_tasks_blocked(SETTLED_S)
            assert not ended.is_set()
            mock_clock.jump(2)


@pytest.mark.parametrize("kind", ["fin", "rst"])
@pytest.mark.parametrize("direction", ["up", "down"])
async def test_a_cut_lets_exactly_so_many_bytes_pass(direction: str, kind: str) -> None:
    """Counted behind the mark, wherever reads happen to split it; both sides see the end, and it happens once."""
    for after, split in itertools.product((0, 1, 5), (1, 3, 100)):
        async with open_pair() as (proxy, client, target):
            source, sink = (client, target) if direction == "up" else (target, client)
            proxy.strike(Fault(direction, kind, after=after, mark=b"mark"))  # type: ignore[arg-type]
            said = b"before mark behind it"
            heard = ""
            for start in range(0, len(said), split):
                try:
                    await source.send_all(said[start : start + split])
                except trio.BrokenResourceError:
                    # The kernel says it once; reading afterwards it would look like a FIN.
                    heard = RST
                    break
                await trio.testing.wait_all_tasks_blocked()
            with trio.fail_after(PATIENCE_S):
                await proxy.wait_struck()
            if kind == "fin":
                assert await read(sink) == said[: len(b"before mark") + after]
                assert await read(source) == b""
            else:
                assert await read(sink, len(b"before mark") + after + 1) in (RST, said[: len(b"before mark") + after])
                assert RST in (heard, await read(source))
            # Another connection has nothing to fear.
            async with await trio.open_tcp_stream("127.0.0.1", proxy.port) as again:
                await again.send_all(said)
                assert len(proxy.struck) == 1


async def test_a_stall_stops_one_direction_and_keeps_the_connection() -> None:
    """The other direction goes on, its end too; with that end the whole is over."""
    async with open_pair() as (proxy, client, target):
        proxy.strike(Fault("down", "stall", after=3))
        await target.send_all(b"abcdef")
        assert await arrived(client) == b"abc"
        await client.send_all(b"hello?")
        assert await read(target, 6) == b"hello?"
        assert await arrived(client) == b""
        assert proxy.open_connections == 1
        await client.send_eof()
        assert await read(client) == RST
        await trio.testing.wait_all_tasks_blocked()
        assert proxy.open_connections == 0


async def test_silence_hides_even_the_ends() -> None:
    """Neither bytes, nor FIN, nor RST reach the other side; the connection is there until the proxy is gone."""
    async with open_pair() as (proxy, client, target):
        proxy.strike(Fault("up", "silence", after=2))
        await client.send_all(b"abc")
        assert await arrived(target) == b"ab"
        await target.send_all(b"answer")
        reset(target)
        assert await arrived(client) == b""
        assert proxy.open_connections == 1
    async with open_pair() as (proxy, client, target):
        proxy.strike(Fault("up", "silence"))
        await client.send_all(b"a")
        await proxy.wait_struck()
        proxy.reset_all()
        assert await read(client) == RST


async def test_a_target_that_is_not_there_is_a_reset() -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    async with open_fault_proxy(port) as proxy, await trio.open_tcp_stream("127.0.0.1", proxy.port) as client:
        assert await read(client) == RST
