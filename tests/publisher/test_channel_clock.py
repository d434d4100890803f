"""When a channel has been silent for too long, on a virtual clock."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from wakecall.publisher.channel import Channel
from wakecall.publisher.wire import Frame, FrameStream, Infer

KEEPALIVE_S = 15.0
HELLO = b'event: hello\ndata: {"epoch": 1, "keepalive_s": %g}\n\n'
INFER = b'event: infer\ndata: {"task_id": "t", "llm": "m", "path": "/v1/completions", "deadline_s": 60}\n\n'


class Line:
    """The bytes of one channel, sent by the test; `run` is the agent's end of it."""

    def __init__(self) -> None:
        self.into, self._chunks = trio.open_memory_channel[bytes](0)
        self.frames: list[Frame] = []
        self.given_up = trio.Event()
        self.ended: str | None = None
        self.ended_at: float | None = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[FrameStream]:
        yield FrameStream(self._chunks)

    async def run(self) -> None:
        self.ended = await Channel(KEEPALIVE_S, self._take).run(self.open())
        self.ended_at = trio.current_time()

    def _take(self, frame: Frame, epoch: trio.Nursery) -> None:
        self.frames.append(frame)
        if isinstance(frame, Infer):
            epoch.start_soon(self._work)

    async def _work(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self.given_up.set()


async def test_comments_keep_a_channel_and_silence_ends_it(autojump_clock: MockClock) -> None:
    """Any byte counts, each starts three keep-alives anew; the work of the channel ends with it."""
    line = Line()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(line.run)
        await line.into.send(HELLO % KEEPALIVE_S)
        await line.into.send(INFER)
        for _ in range(100):
            await trio.sleep(3 * KEEPALIVE_S - 1)
            await line.into.send(b": keep\n\n")
        assert line.ended is None
        assert not line.given_up.is_set()
        heard_at = trio.current_time()
    assert line.ended == "silent for 45 s"
    assert line.ended_at == pytest.approx(heard_at + 3 * KEEPALIVE_S)
    assert line.given_up.is_set()
    assert len(line.frames) == 2


@pytest.mark.parametrize("keepalive_s", [1.0, 60.0])
async def test_hello_says_how_patient_to_be(keepalive_s: float, autojump_clock: MockClock) -> None:
    line = Line()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(line.run)
        await line.into.send(HELLO % keepalive_s)
        heard_at = trio.current_time()
    assert line.ended_at == pytest.approx(heard_at + 3 * keepalive_s)


async def test_a_get_that_nobody_answers_is_given_up_as_silent(autojump_clock: MockClock) -> None:
    @asynccontextmanager
    async def never() -> AsyncIterator[FrameStream]:
        await trio.sleep_forever()
        async with Line().open() as frames:
            yield frames

    started_at = trio.current_time()
    ended = await Channel(KEEPALIVE_S, lambda frame, epoch: None).run(never())
    assert "silent" in ended
    assert trio.current_time() == pytest.approx(started_at + 3 * KEEPALIVE_S)
