"""One writer, many readers: each gets the same bytes from its start on, and the slowest holds the writer back."""

import math

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from wakecall.bytestream import ByteStream
from wakecall.errors import PublisherError

LIMIT = 8


def steps():
    """A random interleaving: pieces that arrive, readers that come, take, and go."""
    piece = st.tuples(st.just("put"), st.binary(min_size=1, max_size=12))
    reader = st.tuples(st.sampled_from(["open", "take", "close"]), st.integers(0, 3))
    return st.lists(st.one_of(piece, reader), max_size=60)


@given(steps(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_every_reader_gets_the_same_bytes_from_its_start_on(plan, ends_well):
    """Whatever came before an error is delivered before it; nothing is held for one that has closed."""

    async def main():
        room = []
        stream = ByteStream(LIMIT, lambda: room.append(True))
        readers = {}  # slot → [reader, bytes expected, bytes got]
        for verb, what in plan:
            if verb == "put":
                if not stream.has_room:
                    continue  # a writer that keeps to the rules
                stream.put_nowait(what, trio.current_time())
                for each in readers.values():
                    each[1] += what
            elif verb == "open" and what not in readers:
                readers[what] = [stream.open_reader(), b"", b""]
            elif verb == "take" and what in readers and readers[what][0].buffered:
                readers[what][2] += await readers[what][0].receive()
            elif verb == "close" and what in readers:
                reader = readers.pop(what)[0]
                reader.close()
                reader.close()
                assert reader.buffered == 0
                with pytest.raises(trio.ClosedResourceError):
                    await reader.receive()
            assert stream.readers == len(readers)
            assert stream.has_room == all(each[0].buffered < LIMIT for each in readers.values())
            assert all(each[0].buffered < LIMIT + 12 for each in readers.values()), "held without bound"
        stream.end(None if ends_well else PublisherError("broken"))
        stream.end(PublisherError("a second end counts for nothing"))
        assert stream.has_room
        for reader, expected, got in readers.values():
            if reader.buffered:
                got += await reader.receive()
            assert got == expected
            for _ in range(2):
                if ends_well:
                    assert await reader.receive() == b""
                else:
                    with pytest.raises(PublisherError, match="broken"):
                        await reader.receive()

    trio.run(main)


async def test_the_writer_waits_for_the_slowest_reader():
    on_room = []
    stream = ByteStream(LIMIT, lambda: on_room.append(True))
    fast, slow = stream.open_reader(), stream.open_reader()
    stream.put_nowait(b"x" * LIMIT, 0.0)
    async with trio.open_nursery() as nursery:
        went_on = trio.Event()

        async def write():
            await stream.wait_room()
            went_on.set()

        nursery.start_soon(write)
        await fast.receive()
        await wait_all_tasks_blocked()
        assert not went_on.is_set()
        assert on_room == []
        await slow.receive()
        await went_on.wait()
        assert on_room == [True]


async def test_closing_the_slowest_reader_makes_room():
    on_room = []
    stream = ByteStream(LIMIT, lambda: on_room.append(True))
    stream.open_reader()
    slow = stream.open_reader()
    stream.put_nowait(b"x" * LIMIT, 0.0)
    slow.close()
    assert not stream.has_room  # the other has taken nothing either
    for reader in list(stream._readers):
        reader.close()
    assert stream.has_room
    assert on_room == [True]


async def test_an_end_frees_the_writer_and_wakes_the_readers():
    stream = ByteStream(LIMIT, lambda: None)
    reader = stream.open_reader()
    got = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.wait_room)

        async def read():
            with pytest.raises(PublisherError):
                await reader.receive()
            got.append("over")

        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        stream.end(PublisherError())
    assert got == ["over"]


async def test_one_reader_serves_one_task():
    stream = ByteStream(LIMIT, lambda: None)
    reader = stream.open_reader()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader.receive)
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await reader.receive()
        stream.end()


async def test_stalled_since_names_the_reader_that_takes_nothing(autojump_clock):
    stream = ByteStream(LIMIT, lambda: None)
    first, second = stream.open_reader(), stream.open_reader()
    assert stream.stalled_since() == math.inf
    await trio.sleep(5)
    began = trio.current_time()
    stream.put_nowait(b"a", began)
    await trio.sleep(1)
    await first.receive()
    stream.put_nowait(b"b", trio.current_time())
    assert stream.stalled_since() == began
    await second.receive()
    assert stream.stalled_since() == began + 1
    await first.receive()
    assert stream.stalled_since() == math.inf


async def test_what_is_read_together_is_joined():
    """A slow reader makes few large writes rather than many small ones."""
    stream = ByteStream(LIMIT, lambda: None)
    reader = stream.open_reader()
    for piece in (b"a", b"b", b"c"):
        stream.put_nowait(piece, 0.0)
    assert await reader.receive() == b"abc"
