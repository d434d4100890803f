"""The one who does nothing wrong, while beside him somebody does.

    async with sibling(served) as s:
        ...  # a hostile peer does its worst
        await s.beat()  # in the middle of it, if a test wants to know it there and then

A sibling is a session and a client of their own: the publisher streams numbered events, one at a time, and the client has
each, byte for byte, before the next is sent. It goes on by itself for as long as the block lasts; leaving the block ends
the stream well and checks that nothing of what happened in it was felt.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from tests.http.served import JSON, SSE, Reading, Served, Upload, WirePublisher, as_bytes
from wakecall.models import ChannelEvent, Event, InferSettled, Status
from wakecall.testing import check_invariants

__all__ = ["Sibling", "sibling"]

NAME = "sibling"
SESSION = "sibling"

#: So long a sibling is silent between two events: `send_until_stuck` has to find moments at which nothing moves.
_PAUSE_S = 0.06
_LEAST_EVENTS = 3


class Sibling:
    """Made by `sibling`.

    Attributes:
        arrived: events that its client has had so far.
        infers: its infers so far. More than one only where the broker's `total_s` is short: each ends well before that.
        slowest_s: the longest that an event was on its way.
    """

    def __init__(self, served: Served, publisher: WirePublisher, patience_s: float) -> None:
        self.arrived = 0
        self.infers = 0
        self.slowest_s = 0.0
        self._served = served
        self._publisher = publisher
        self._patience_s = patience_s
        self._stop = trio.Event()
        self._done = trio.Event()
        self._news = trio.Event()
        self._told: list[Event] = []
        served.broker.add_observer(self._told.append)

    async def beat(self) -> None:
        """Return once its client has an event that was sent after this call.

        Raises:
            trio.TooSlowError: for `patience_s` it had none.
        """
        with trio.fail_after(self._patience_s):
            until = self.arrived + 2  # one may have been under way
            while self.arrived < until:
                await self._news.wait()

    async def _run(self, task_status: trio.TaskStatus[None]) -> None:
        while not self._stop.is_set():
            body = as_bytes({"model": NAME, "stream": True})
            async with self._served.calling(body) as client:
                frame = await self._publisher.next("infer")
                self.infers += 1
                async with self._publisher.upload(frame, SSE) as upload:
                    await self._stream(client, upload, task_status)
                    answer = await upload.finish()
                    assert (answer.status, answer.json) == (200, {"outcome": "completed"}), answer
                assert await client.rest() == (b"", False)
        self._done.set()

    async def _stream(self, client: Reading, upload: Upload, task_status: trio.TaskStatus[None]) -> None:
        """Events until it is told to stop, or its own time is getting short."""
        until = trio.current_time() + self._served.broker.config.total_s / 4
        while True:
            event = b'data: {"n": %d, "text": "undisturbed"}\n\n' % self.arrived
            start = trio.current_time()
            with trio.fail_after(self._patience_s):
                await upload.send(event)
                if not client.status:
                    await client.read_head()
                    assert (client.status, client.headers["content-type"]) == (200, "text/event-stream")
                got = b""
                while len(got) < len(event):
                    piece = await client.piece()
                    assert piece, f"the sibling's stream ended after {got!r}"
                    got += piece
            assert got == event
            self.slowest_s = max(self.slowest_s, trio.current_time() - start)
            self.arrived += 1
            self._news.set()
            self._news = trio.Event()
            if self.arrived == 1:
                task_status.started()
            if self.arrived >= _LEAST_EVENTS and (self._stop.is_set() or trio.current_time() > until):
                return
            with trio.move_on_after(_PAUSE_S):
                await self._stop.wait()

    async def _heartbeat(self) -> None:
        while True:
            await trio.sleep(self._served.broker.config.heartbeat_interval_s)
            answer = await self._served.ask("POST", f"/publisher/v1/sessions/{SESSION}/heartbeat", JSON, body=b"{}")
            assert (answer.status, answer.json["llms"]) == (200, {NAME: "active"}), answer

    async def _end(self) -> None:
        """End the stream, and check that all of it went as if nobody else had been there."""
        broker = self._served.broker
        self._stop.set()
        await self._done.wait()
        # The next frame of its channel is this call's: nothing was cancelled on it, and it never ended.
        with trio.fail_after(self._patience_s):
            async with self._served.calling({"model": NAME}) as client:
                answer = await self._publisher.answer(await self._publisher.next("infer"), b'{"still": "here"}')
                assert answer.status == 200, answer
                await client.read_head()
                assert (client.status, await client.rest()) == (200, (b'{"still": "here"}', False))
        settled = [each for each in self._told if isinstance(each, InferSettled) and each.llm == NAME]
        assert [each.outcome for each in settled] == ["completed"] * (self.infers + 1), settled
        ends = [each for each in self._told if isinstance(each, ChannelEvent) and each.session_id == SESSION]
        assert not ends, ends
        (session,) = [each for each in broker.session_views() if each.record.session_id == SESSION]
        assert (session.record.epoch, session.connected) == (1, True), session
        view = broker.llm_view(NAME)
        assert (view.llm.status, view.in_flight, view.waiting) == (Status.ACTIVE, 0, 0), view
        check_invariants(broker)


@asynccontextmanager
async def sibling(served: Served, *, patience_s: float = 5.0) -> AsyncIterator[Sibling]:
    """A streaming infer of another session and another client for the block; it has begun when this returns.

    Args:
        served: where.
        patience_s: the longest that one of its events may be on its way.

    Raises:
        AssertionError: at any time, and at the end: an event was lost, doubled, out of order or not as it was sent; an infer
            did not complete; its channel ended, or was sent a frame that was not its own; the broker's counters disagree.
        trio.TooSlowError: an event took too long.
    """
    async with served.publishing({"name": NAME}, session_id=SESSION) as publisher:
        each = Sibling(served, publisher, patience_s)
        async with trio.open_nursery() as nursery:
            await nursery.start(each._run)
            nursery.start_soon(each._heartbeat)
            yield each
            await each._end()
            nursery.cancel_scope.cancel()
