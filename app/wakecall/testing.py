"""What our own tests use, for those who embed Wakecall and test their programs.

    async def test_my_program(autojump_clock):
        async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
            ...
            frame = await publisher.next("infer")
            await publisher.answer(frame, b'{"ok": true}')

Everything runs in memory and on Trio's clock, so a virtual one crosses hours in no time.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Any

import trio

from .broker import Broker, open_broker
from .config import BrokerConfig
from .errors import PublisherError
from .frames import Frame
from .hosting import Upstream
from .models import LLM, HeartbeatReply, InferRequest, LLMSpec, Registered, Statistics, Status
from .records import encode_record
from .results import Results
from .session import Channel
from .store.base import Store
from .upload import Upload

__all__ = ["FakePublisher", "FakeUpstream", "UpstreamCall", "check_invariants", "open_test_broker"]


def check_invariants(broker: Broker) -> Statistics:
    """Assert what holds at every instant, and return the counters.

    Raises:
        AssertionError: with the counters, where it does not.
    """
    counted = broker.statistics()
    ended = counted.completed + counted.failed + counted.cancelled
    assert counted.accepted == ended + counted.waiting + counted.in_flight, counted
    views = broker.llm_views()
    waiting = sum(view.waiting for view in views) + sum(pool.waiting for pool in broker.pool_views())
    assert counted.waiting == waiting, counted
    tasks = broker.task_views()
    assert counted.waiting + counted.in_flight == sum(task.kind == "infer" for task in tasks), (counted, tasks)
    assert counted.wakes_in_flight == sum(task.kind == "wake" for task in tasks), (counted, tasks)
    for view in views:
        assert view.in_flight >= 0, view
        assert view.stopping >= 0, view
        if view.llm.status is Status.INACTIVE:
            assert view.waiting == 0, "nobody waits for an inactive row"
    return counted


@asynccontextmanager
async def open_test_broker(
    config: BrokerConfig | None = None, store: Store | None = None, upstream: Upstream | None = None
) -> AsyncIterator[Broker]:
    """A broker like `open_broker`'s, checked as it closes: the invariants hold, and nothing is left in it."""
    async with open_broker(store, config, upstream) as broker:
        yield broker
        check_invariants(broker)
    counted = check_invariants(broker)
    assert (counted.waiting, counted.in_flight, counted.wakes_in_flight, counted.channels) == (0, 0, 0, 0), counted


class FakePublisher:
    """A publisher without a wire: it registers, holds a channel while the block lasts, and does what the test says.

    Args:
        broker: where.
        session_id: as whom.
        llms: names, or specs where more is to be said.
        owner: of the session.
        key_id: the key that it comes with.
        connect: False: register only.

    Attributes:
        frames: all frames that it got, over all its channels.
        channel: the one that it holds, or held last.
    """

    def __init__(
        self,
        broker: Broker,
        session_id: str,
        llms: Sequence[str | LLMSpec],
        *,
        owner: str = "local",
        key_id: str | None = None,
        connect: bool = True,
    ) -> None:
        self.broker = broker
        self.session_id = session_id
        self.owner = owner
        self.key_id = key_id
        self.llms = [LLMSpec(llm) if isinstance(llm, str) else llm for llm in llms]
        self.frames: list[Frame] = []
        self.channel: Channel | None = None
        self._connect = connect
        self._seen: dict[str, int] = {}
        self._news = trio.Event()
        self._stack = AsyncExitStack()
        self._nursery: trio.Nursery | None = None

    async def __aenter__(self) -> FakePublisher:
        await self.register(self.llms)
        await self._stack.__aenter__()
        self._nursery = await self._stack.enter_async_context(trio.open_nursery())
        if self._connect:
            await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._nursery is not None
        self._nursery.cancel_scope.cancel()
        if isinstance(error, Exception):
            # Kept from the nursery, which would put it into a group: a test's failure comes out as it is.
            await self._stack.__aexit__(None, None, None)
        else:
            await self._stack.__aexit__(kind, error, trace)

    async def connect(self) -> Channel:
        """Open a (further) channel, and return it once its `hello` has come."""
        assert self._nursery is not None
        channel: Channel = await self._nursery.start(self._hold_channel)
        self.channel = channel
        return channel

    async def register(self, llms: Sequence[str | LLMSpec]) -> Registered:
        """Register again, these rows and no others."""
        self.llms = [LLMSpec(llm) if isinstance(llm, str) else llm for llm in llms]
        return await self.broker.register(self.session_id, self.llms, owner=self.owner, key_id=self.key_id)

    async def heartbeat(
        self, statuses: Mapping[str, Status] | None = None, tasks: Sequence[str] = ()
    ) -> HeartbeatReply:
        """Give a sign of life."""
        return await self.broker.heartbeat(self.session_id, statuses, tasks, owner=self.owner)

    async def goodbye(self) -> None:
        """End the session."""
        await self.broker.goodbye(self.session_id, owner=self.owner)

    def disconnect(self) -> None:
        """Vanish: the current channel ends in this step."""
        assert self.channel is not None
        self.channel.disconnect()

    async def next(self, event: str, *, within_s: float = 3600.0) -> Frame:
        """The next frame of this event that no earlier call has returned; those of other events stay for theirs.

        Raises:
            trio.TooSlowError: none came in time. (On a virtual clock, where a wait for nothing would spin for ever.)
        """
        with trio.fail_after(within_s):
            while True:
                for place in range(self._seen.get(event, 0), len(self.frames)):
                    if self.frames[place].event == event:
                        self._seen[event] = place + 1
                        return self.frames[place]
                self._seen[event] = len(self.frames)
                await self._news.wait()

    def events(self, event: str) -> list[dict[str, Any]]:
        """The data of all frames of this event so far."""
        return [frame.data for frame in self.frames if frame.event == event]

    def upload(self, frame: Frame, *, status: int = 200, content_type: str | None = "application/json") -> Upload:
        """Begin the answer to an infer or a wake."""
        return self.broker.open_upload(
            frame.data["task_id"], owner=self.owner, status=status, content_type=content_type
        )

    async def answer(
        self, frame: Frame, *pieces: bytes, status: int = 200, content_type: str | None = "application/json"
    ) -> None:
        """Answer an infer or a wake whole."""
        with self.upload(frame, status=status, content_type=content_type) as upload:
            for piece in pieces:
                await upload.send(piece)
            await upload.finish()

    def results(self) -> Results:
        """Begin the shared upload; what is fed to it may be made by `record`."""
        return self.broker.open_results(self.session_id, owner=self.owner, key_id=self.key_id)

    def record(
        self, frame: Frame, answer: bytes, *, status: int = 200, content_type: str | None = "application/json"
    ) -> bytes:
        """The whole answer to an infer or a wake, as it goes on the shared upload."""
        return encode_record(frame.data["task_id"], status, content_type, answer)

    def fail(self, frame: Frame, message: str, status: int | None = None) -> None:
        """Report a failure."""
        self.broker.fail(frame.data["task_id"], message, status=status, owner=self.owner)

    async def _hold_channel(self, task_status: trio.TaskStatus[Channel]) -> None:
        async with self.broker.open_channel(self.session_id, owner=self.owner, key_id=self.key_id) as channel:
            async for frame in channel:
                self.frames.append(frame)
                news, self._news = self._news, trio.Event()
                news.set()
                if frame.event == "hello":
                    task_status.started(channel)


class UpstreamCall:
    """One call of a public row, as its upstream gets it; the test answers.

    Attributes:
        llm: the row, as it was when this began.
        request: the client's call.
        left: set once the broker has left it, be it at its end or before.
        taken: how many chunks the broker has taken.
    """

    def __init__(self, llm: LLM, request: InferRequest) -> None:
        self.llm = llm
        self.request = request
        self.left = trio.Event()
        self.taken = 0
        self.status = 200
        self.content_type: str | None = None
        self.retry_after_s: int | None = None
        self.answered = trio.Event()
        self._error: Exception | None = None
        self._chunks_in, self._chunks_out = trio.open_memory_channel[bytes | Exception](math.inf)

    @property
    def chunks(self) -> AsyncIterator[bytes]:
        return self

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            chunk = await self._chunks_out.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None
        if isinstance(chunk, Exception):
            raise chunk
        self.taken += 1
        return chunk

    def start(
        self, status: int = 200, content_type: str | None = "application/json", *, retry_after_s: int | None = None
    ) -> None:
        """Send the head of the answer."""
        self.status, self.content_type, self.retry_after_s = status, content_type, retry_after_s
        self.answered.set()

    def send(self, data: bytes) -> None:
        """Send a piece of its body."""
        self._chunks_in.send_nowait(data)

    def end(self) -> None:
        """End the body well."""
        self._chunks_in.close()

    def answer(self, data: bytes, status: int = 200, *, retry_after_s: int | None = None) -> None:
        """All of it at once."""
        self.start(status, retry_after_s=retry_after_s)
        if data:
            self.send(data)
        self.end()

    def fail(self, error: Exception | None = None) -> None:
        """Give no answer, or break off in it; by default as an upstream that is gone."""
        error = PublisherError("The upstream is gone.") if error is None else error
        if self.answered.is_set():
            self._chunks_in.send_nowait(error)
        else:
            self._error = error
            self.answered.set()

    async def wait_left(self, *, within_s: float = 3600.0) -> None:
        """Return once the broker has left it. Raises trio.TooSlowError: it has not, in this time."""
        with trio.fail_after(within_s):
            await self.left.wait()

    async def _wait_answered(self) -> None:
        await self.answered.wait()
        if self._error is not None:
            raise self._error


class FakeUpstream:
    """What public rows are relayed to in a test, without a socket: give it to `open_test_broker`.

    Attributes:
        calls: all that it got.
    """

    def __init__(self) -> None:
        self.calls: list[UpstreamCall] = []
        self._seen = 0
        self._news = trio.Event()

    async def next(self, *, within_s: float = 3600.0) -> UpstreamCall:
        """The next call that this has not returned yet. Raises trio.TooSlowError: none came in time."""
        with trio.fail_after(within_s):
            while self._seen == len(self.calls):
                await self._news.wait()
        self._seen += 1
        return self.calls[self._seen - 1]

    @asynccontextmanager
    async def open_answer(self, llm: LLM, request: InferRequest) -> AsyncIterator[UpstreamCall]:
        """See `hosting.Upstream`."""
        call = UpstreamCall(llm, request)
        self.calls.append(call)
        news, self._news = self._news, trio.Event()
        news.set()
        try:
            await call._wait_answered()
            yield call
        finally:
            call.left.set()
