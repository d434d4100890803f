"""An infer: one client's call, from being accepted to its one outcome.

An `Infer` is data with two waits on it, not a task of Trio's: it is moved by whoever acts on it (a route, a channel's end, a
deadline), in one synchronous step each, through

    waiting (for a wake or a slot)  →  sent (holds a slot; its frame is on a channel)  →  over

and only `dispatch.Dispatcher` moves it. It may go back from sent to waiting, or on to another row: as long as its publisher
cannot have begun to generate, for the frame never left or was refused. Who waits for it waits on two events: `wait_head`,
for the first byte of an answer, and `Reply.wait_done`, for the outcome.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Final, Literal

import trio

from .bytestream import ByteReader, ByteStream
from .config import BrokerConfig
from .deadlines import Deadline
from .errors import TooMany, WakecallError
from .models import InferRequest
from .usage import UsageMeter, meter_for

if TYPE_CHECKING:
    from .keyring import Claim
    from .row import Pool, Row
    from .session import Channel
    from .upload import Upload

__all__ = ["Due", "Infer", "InferPhase", "InferState", "Outcome", "Reader", "Reply"]


#: Where an infer is, or was when it ended, in logs; `offline`: nobody was there to be asked.
InferPhase = Literal["offline", "wake", "queue", "first_byte", "idle"]

#: How an infer ended, as it is counted.
Outcome = Literal["completed", "failed", "cancelled"]


class Due(Enum):
    """What the clock ends a sent infer for: one of its phases, or its reader's stall."""

    FIRST_BYTE = "no first byte"
    IDLE = "a pause"
    TOTAL = "its whole time"
    STALL = "a reader that takes nothing"


class InferState(Enum):
    WAITING = "waiting"
    SENT = "sent"
    OVER = "over"


class Infer:
    """One infer in the broker's hands. Made by `Broker.infer_nowait`; whoever holds it calls `cancel` when he leaves.

    Attributes:
        task_id: names it on the wire; a new one for each publisher that it is sent to.
        request: the client's call.
        asked: the name that the client called.
        route: names of the rows and pools to which it may go, best first; `stage` is where in it it is now.
        pool, only: in whose line it waits, or waited; and for which row alone. None: for any.
        row: the one that it was sent to; None while it waits.
        refused_by: rows that would not have it.
        refusal: what the one that refuses it now has answered so far, should nobody else take it.
    """

    __slots__ = (
        "_cancel",
        "_done",
        "_headed",
        "accepted_at",
        "asked",
        "attempts",
        "channel",
        "claim",
        "content_type",
        "deadline",
        "engine_status",
        "error",
        "first_byte_at",
        "frame_taken",
        "idle_s",
        "last_byte_at",
        "max_readers",
        "meter",
        "only",
        "phase",
        "phase_until",
        "pieces",
        "pool",
        "reader",
        "received",
        "refusal",
        "refused_by",
        "request",
        "retry_after_s",
        "room_at",
        "route",
        "row",
        "sent_at",
        "stage",
        "state",
        "stream",
        "task_id",
        "total_until",
        "upload",
    )

    def __init__(
        self,
        task_id: str,
        asked: str,
        route: Sequence[str],
        request: InferRequest,
        config: BrokerConfig,
        now: float,
        total_s: float,
        cancel: Callable[[Infer], None],
    ) -> None:
        self.task_id = task_id
        self.asked: Final = asked
        self.request: Final = request
        self.route: Final = route
        self.stage = 0
        self.pool: Pool | None = None
        self.only: str | None = None
        self.row: Row | None = None
        self.refused_by: frozenset[str] = frozenset()
        self.refusal: bytearray | None = None
        self.attempts = 0
        self._cancel = cancel
        self.state = InferState.WAITING
        self.phase: InferPhase = "queue"
        self.accepted_at = now  # this and all that end in _at or _until: `trio.current_time()`
        self.phase_until = math.inf
        self.total_until = now + total_s
        self.deadline: Deadline | None = None
        self.channel: Channel | None = None
        self.claim: Claim | None = None
        self.sent_at = math.inf
        self.frame_taken = False  # by its channel's transport: from then on its publisher may have it
        self.first_byte_at: float | None = None
        self.last_byte_at = now
        self.room_at = now
        self.received = 0
        self.pieces = False  # whether any of it came by …/chunks
        self.upload: Upload | None = None
        self.engine_status = 200
        self.content_type: str | None = None
        self.meter: UsageMeter | None = None
        self.retry_after_s: int | None = None  # as an upstream said
        self.idle_s = config.idle_s
        self.max_readers: Final = config.max_readers_per_reply
        self.stream = ByteStream(config.reply_buffer_bytes, self._on_room)
        self.reader: Final = self.stream.open_reader(now=now)
        # Most answers are here before anybody waits for their end.
        self._headed: trio.Event | None = None
        self._done: trio.Event | None = None
        self.error: WakecallError | None = None

    @property
    def is_over(self) -> bool:
        return self.state is InferState.OVER

    async def wait_head(self) -> Reply:
        """The answer, at its first byte (or at its end, if it has none). A wait that is cancelled may be repeated.

        Raises:
            InferFailed: it ended before any byte came: offline, lost, not woken, out of time, …
            ShuttingDown: the broker stopped first.
        """
        if self.first_byte_at is None and not self.is_over:
            if self._headed is None:
                self._headed = trio.Event()
            await self._headed.wait()
        else:
            await trio.lowlevel.checkpoint()
        if self.error is not None and self.first_byte_at is None:
            raise self.error.with_traceback(None)
        return Reply(self)

    async def wait_done(self) -> None:
        """Return once it is over."""
        if self.is_over:
            await trio.lowlevel.checkpoint()
            return
        if self._done is None:
            self._done = trio.Event()
        await self._done.wait()

    def end(self, error: WakecallError | None) -> None:
        """It is over: whoever waits for it, or reads it, is told so."""
        self.state = InferState.OVER
        self.error = error
        self.stream.end(error)
        if self._headed is not None:
            self._headed.set()
        if self._done is not None:
            self._done.set()

    def cancel(self) -> None:
        """The caller leaves: frees the slot, or the place in the queue. Idempotent; nothing once it is over."""
        self._cancel(self)

    def next_due(self, config: BrokerConfig) -> tuple[float, Due]:
        """When this infer, sent, is next to be ended by the clock, and for what."""
        due, why = self.total_until, Due.TOTAL
        if self.first_byte_at is None:
            first_byte_s = config.first_byte_s
            if self.row is not None and self.row.llm.first_byte_s is not None:
                first_byte_s = self.row.llm.first_byte_s
            if self.request.stream and (until := self.sent_at + first_byte_s) < due:
                due, why = until, Due.FIRST_BYTE
            if self.refusal is not None and (until := self.last_byte_at + self.idle_s) < due:
                due, why = until, Due.IDLE
            return due, why
        if (until := self.stream.stalled_since() + config.peer_stall_s) < due:
            due, why = until, Due.STALL
        if self.stream.has_room and (until := max(self.last_byte_at, self.room_at) + self.idle_s) < due:
            due, why = until, Due.IDLE
        return due, why

    def take_head(self, now: float, status: int, content_type: str | None) -> None:
        """The first byte of its answer is here, or its end: from now on there is a `Reply`."""
        self.first_byte_at = now
        self.engine_status = status
        self.content_type = content_type
        self.meter = meter_for(status, content_type)
        self.phase = "idle"
        if self._headed is not None:
            self._headed.set()

    def _on_room(self) -> None:
        # While the client held the upload back nobody waited for the publisher: its idle clock starts here.
        self.room_at = trio.current_time()
        if self.channel is not None and self.deadline is not None:
            self.channel.hasten(self.deadline, self.room_at + self.idle_s)


class Reader:
    """A further reader of one answer: all that the first had not taken when it began, and every chunk from then on.

    Hold it in a `with` block, or `close` it.
    """

    def __init__(self, reader: ByteReader) -> None:
        self._reader = reader

    async def receive(self) -> bytes:
        """All that has come since the last call, joined; `b""` at the end. Raises the outcome's error if it ended badly."""
        return await self._reader.receive()

    def close(self) -> None:
        """Take no more, and hold nobody back. Idempotent."""
        self._reader.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> Reader:
        return self

    async def __anext__(self) -> bytes:
        if data := await self.receive():
            return data
        raise StopAsyncIteration


class Reply:
    """An engine's answer on its way.

    Attributes:
        status: the engine's HTTP status.
        headers: lower-case; `content-type` and `retry-after` (seconds) at the most.
    """

    def __init__(self, infer: Infer) -> None:
        self._infer = infer
        self.status: Final = infer.engine_status
        self.headers: Final[dict[str, str]] = {}
        if infer.content_type is not None:
            self.headers["content-type"] = infer.content_type
        if infer.retry_after_s is not None:
            self.headers["retry-after"] = str(infer.retry_after_s)

    @property
    def settled(self) -> bool:
        """Whether the answer has ended: all of it is here, or it failed."""
        return self._infer.is_over

    async def receive(self) -> bytes:
        """All that has come since the last call, joined; `b""` at the good end.

        Raises:
            WakecallError: the outcome, if it is a bad one, after the last byte that came.
        """
        return await self._infer.reader.receive()

    # No generator: whoever breaks off a loop would leave it to the collector, and Trio would say so.
    def __aiter__(self) -> Reply:
        return self

    async def __anext__(self) -> bytes:
        if data := await self.receive():
            return data
        raise StopAsyncIteration

    async def read(self) -> bytes:
        """The whole body. Raises as `receive` does."""
        pieces = []
        while data := await self.receive():
            pieces.append(data)
        return b"".join(pieces)

    async def wait_done(self) -> None:
        """Wait for the outcome. Raises it (`WakecallError`) if it is a bad one."""
        await self._infer.wait_done()
        if self._infer.error is not None:
            raise self._infer.error.with_traceback(None)

    def note_progress(self) -> None:
        """For transports: what `receive` gave is still being written, and the peer has just taken some of it. A reader that
        neither takes nor says this for `peer_stall_s`, while bytes wait, has stalled."""
        self._infer.reader.note_progress()

    def subscribe(self) -> Reader:
        """A further reader, of all that this one has not taken yet and every chunk from then on; the slowest reader holds
        back the upload.

        Raises:
            TooMany: as many read as may.
        """
        limit = self._infer.max_readers
        if self._infer.stream.readers >= limit:
            raise TooMany(f"An answer has at most {limit} readers.")
        return Reader(self._infer.stream.open_reader(beside=self._infer.reader))
