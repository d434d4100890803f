"""What publishers send of tasks: answers on their way in, from the head to the last byte, and failures."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import trio

from .directory import Directory
from .errors import (
    InvalidRequest,
    OffsetGap,
    PublisherError,
    ResultInProgress,
    SessionNotFound,
    TaskAlreadySettled,
    TaskCancelled,
    TaskNotFound,
    TaskOver,
    WakeFailed,
)
from .results import Results
from .task import Infer
from .wake import Wake

if TYPE_CHECKING:
    from .dispatch import Dispatcher
    from .session import Session

__all__ = ["Intake", "Upload"]

#: How much of a failed wake's text is its message, in bytes.
_WAKE_TEXT_BYTES: Final = 1024

#: What says that another publisher may be asked: nothing has been generated.
_REFUSALS: Final = frozenset({429, 503})
_MOST_REFUSAL_BYTES: Final = 64 * 1024


class Upload:
    """Made by `Broker.open_upload`; hold it in a `with` block: leaving that without `finish` means that it broke off.

    Two kinds. A *final* one (`…/result`) ends the task, well or badly. One that is not (`…/chunks`) carries a piece: if it
    breaks off, what has arrived counts, and its sender goes on from there.
    """

    __slots__ = ("_ended", "_final", "_intake", "_on_over", "_skip", "content_type", "status", "task", "task_id")

    def __init__(
        self, intake: Intake, task: Infer | Wake, status: int, content_type: str | None, skip: int, final: bool
    ) -> None:
        self._intake = intake
        self._final = final
        self._skip = skip  # bytes at its beginning that are here already
        self._ended = False
        self._on_over: Callable[[], None] | None = None
        self.task: Final = task
        self.task_id: Final = task.task_id
        self.status: Final = status
        self.content_type: Final = content_type

    @property
    def _is_over(self) -> bool:
        """Whether the task has ended, or is another publisher's by now."""
        return self.task.is_over or self.task.task_id != self.task_id

    def on_over(self, callback: Callable[[], None]) -> None:
        """Have `callback` called, once and synchronously, if the task ends before this upload does."""
        if self._is_over and not self._ended:
            callback()
        else:
            self._on_over = callback

    async def send(self, data: bytes) -> None:
        """Pass on a piece, once the slowest reader has room. It waits before a piece and not after it: the task ends with
        its last byte, whatever its readers have still before them.

        Raises:
            TaskCancelled: the client, a deadline, the channel or a shutdown has ended the task.
            TaskAlreadySettled: the publisher has, by a failure.
        """
        task = self.task
        if self._is_over:
            raise self._intake.over_error(self.task_id)
        if self._skip:
            known = min(self._skip, len(data))
            self._skip -= known
            data = data[known:]
        if not data:
            return
        if isinstance(task, Wake):
            self._intake.feed_wake(task, data)
            return
        if not task.stream.has_room:
            await task.stream.wait_room()
            if self._is_over:
                raise self._intake.over_error(self.task_id)
        if self.status in _REFUSALS or task.refusal is not None:
            self._intake.feed_refusal(task, data, self.status, self.content_type)
        else:
            self._intake.feed(task, data, self.status, self.content_type)

    async def finish(self) -> None:
        """The last byte is in. A final upload settles its task; for a wake this returns once that is committed.

        Raises:
            TaskCancelled, TaskAlreadySettled: the task ended before.
            InvalidRequest: the answer is shorter than what has arrived of it; the task fails.
            StoreUnavailable: the wake counts, but is not committed yet.
        """
        if self._is_over:
            raise self._intake.over_error(self.task_id)
        if self._final and self._skip:
            raise InvalidRequest("The answer ends before what has arrived of it.", param="Wakecall-Offset")
        self._release()
        if not self._final:
            return
        if isinstance(self.task, Wake):
            await self._intake.complete_wake(self.task, self.status)
        else:
            self._intake.complete(self.task, self.status, self.content_type)

    def abort(self) -> None:
        """It broke off. Idempotent, and nothing after `finish`."""
        if self._ended:
            return
        self._release()
        if self._final and not self._is_over:
            self._intake.break_off(self.task)

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def _release(self) -> None:
        self._ended = True
        self._on_over = None
        if self.task.upload is self:
            self.task.upload = None

    def _task_is_over(self) -> None:
        callback, self._on_over = self._on_over, None
        if callback is not None:
            callback()


class Intake:
    """Finds the tasks that publishers speak of, and takes in what they send. Made by the broker."""

    def __init__(self, directory: Directory, dispatcher: Dispatcher) -> None:
        self._directory = directory
        self._dispatcher = dispatcher
        self._config = directory.config

    def open_upload(
        self, task_id: str, owner: str, status: int, content_type: str | None, offset: int | None, final: bool
    ) -> Upload:
        """See `Broker.open_upload`."""
        if not 200 <= status <= 599:
            raise InvalidRequest("An engine's status is 200 to 599.", param="Wakecall-Status")
        task = self.find_task(task_id, owner)
        if task.upload is not None:
            raise ResultInProgress
        if offset is None and (task.pieces or not final):
            raise InvalidRequest("A result in pieces says where each begins.", param="Wakecall-Offset")
        if offset is not None:
            if offset < 0:
                raise InvalidRequest("An offset is a number of bytes.", param="Wakecall-Offset")
            if offset > task.received:
                raise OffsetGap(f"This piece begins at {offset}; {task.received} bytes have arrived.")
            task.pieces = True
        upload = Upload(self, task, status, content_type, 0 if offset is None else task.received - offset, final)
        task.upload = upload
        return upload

    def open_results(self, session: Session, key_id: str | None, needs_open: bool) -> Results:
        """See `Broker.open_results`."""
        channel = session.channel
        if channel is None:
            raise SessionNotFound("This session has no open channel.")
        if channel.results is not None:
            raise ResultInProgress("Another upload of results is under way on this channel.")
        return Results(self._directory, self, channel, key_id, needs_open)

    def find_task(self, task_id: str, owner: str) -> Infer | Wake:
        """A task that is under way at this owner's publisher.

        Raises:
            TaskNotFound, TaskAlreadySettled, TaskCancelled: it is not.
        """
        task = self._directory.tasks.get(task_id)
        if task is None:
            remembered, stopping = self._directory.recall(task_id), self._directory.held_slots.get(task_id)
            theirs = remembered.owner if remembered is not None else None
            if stopping is not None:
                theirs = stopping.channel.session.record.owner  # a drained one may outlive what is remembered
            if theirs == owner:
                raise self.over_error(task_id)
            raise TaskNotFound
        assert task.channel is not None
        if task.channel.session.record.owner != owner:
            raise TaskNotFound
        return task

    def over_error(self, task_id: str) -> TaskOver:
        """What a publisher is told of a task that is over."""
        if (stopping := self._directory.held_slots.get(task_id)) is not None:
            stopping.answered = True
            return TaskCancelled()
        remembered = self._directory.recall(task_id)
        if remembered is None:
            return TaskNotFound()
        return TaskAlreadySettled() if remembered.by_publisher else TaskCancelled()

    def feed(self, infer: Infer, data: bytes, status: int, content_type: str | None) -> None:
        """A piece of an answer has arrived."""
        config, now = self._config, trio.current_time()
        self._put(infer, data, now, status, content_type)
        assert infer.deadline is not None
        assert infer.channel is not None
        infer.channel.hasten(infer.deadline, now + min(infer.idle_s, config.peer_stall_s))

    def take_whole(self, infer: Infer, data: bytes, status: int, content_type: str | None) -> None:
        """A whole answer has arrived, and nothing of it before: as an upload that begins and ends in this step."""
        if status in _REFUSALS:
            if data:
                self.feed_refusal(infer, data, status, content_type)
            self.complete(infer, status, content_type)
            return
        # No deadline between its first byte and its last.
        now = trio.current_time()
        if data:
            self._put(infer, data, now, status, content_type)
        else:
            self._take_head(infer, now, status, content_type)
        self._dispatcher.settle(infer, "completed", None)

    def _put(self, infer: Infer, data: bytes, now: float, status: int, content_type: str | None) -> None:
        if infer.first_byte_at is None:
            self._take_head(infer, now, status, content_type)
        infer.received += len(data)
        infer.last_byte_at = now
        infer.stream.put_nowait(data, now)
        if infer.meter is not None:
            infer.meter.feed(data)

    def feed_wake(self, wake: Wake, data: bytes) -> None:
        """A piece of a wake's result: only the beginning of its text is kept."""
        wake.received += len(data)
        wake.text += data[: _WAKE_TEXT_BYTES - len(wake.text)]

    def complete(self, infer: Infer, status: int, content_type: str | None) -> None:
        """The last byte of its answer is in. If that is 429 or 503, another row may have it, as if nothing had been said."""
        if infer.first_byte_at is None:
            if infer.refusal is not None:
                status, content_type = infer.engine_status, infer.content_type  # they count with the first byte
            if status in _REFUSALS and self._dispatcher.placer.can_move(infer) and self._dispatcher.move_refused(infer):
                return
            refusal, infer.refusal = bytes(infer.refusal or b""), None
            if refusal:
                infer.received -= len(refusal)
                self.feed(infer, refusal, status, content_type)
            else:
                self._take_head(infer, trio.current_time(), status, content_type)
        self._dispatcher.settle(infer, "completed", None)

    def feed_refusal(self, infer: Infer, data: bytes, status: int, content_type: str | None) -> None:
        """A piece of an answer of 429 or 503 has arrived, while another row may still have the infer: it is kept, for it is
        the answer if none does. One of more than `_MOST_REFUSAL_BYTES` is no mere refusal, and is passed on."""
        if infer.refusal is None and not (infer.first_byte_at is None and self._dispatcher.placer.can_move(infer)):
            self.feed(infer, data, status, content_type)
            return
        if infer.first_byte_at is None:
            if infer.refusal is None:
                infer.refusal, infer.engine_status, infer.content_type = bytearray(), status, content_type
            kept = infer.refusal
            kept += data
            infer.received += len(data)
            infer.last_byte_at = trio.current_time()
            assert infer.deadline is not None
            assert infer.channel is not None
            infer.channel.hasten(infer.deadline, infer.last_byte_at + infer.idle_s)
            if len(kept) <= _MOST_REFUSAL_BYTES:
                return
            infer.received -= len(kept)
            data, status, content_type = bytes(kept), infer.engine_status, infer.content_type
        infer.refusal = None
        self.feed(infer, data, status, content_type)

    def _take_head(self, infer: Infer, now: float, status: int, content_type: str | None) -> None:
        infer.take_head(now, status, content_type)
        if infer.row is not None and status < 400:
            infer.row.health.note_first_byte(now - infer.sent_at)

    async def complete_wake(self, wake: Wake, status: int) -> None:
        """Its result is in: any 2xx means awake. Returns once that is committed.

        Raises:
            StoreUnavailable: it counts, but is not committed yet.
        """
        if self.settle_wake(wake, status):
            await self._directory.journal.commit().wait()

    def settle_wake(self, wake: Wake, status: int) -> bool:
        """The same without the wait; returns whether there is a commit to be waited for."""
        if not 200 <= status <= 299:
            text = bytes(wake.text).decode("utf-8", "replace").strip()
            self._dispatcher.waker.settle(wake, "failed", WakeFailed(text or None), by_publisher=True)
            return False
        self._dispatcher.waker.settle(wake, "succeeded", None, by_publisher=True)
        return True

    def break_off(self, task: Infer | Wake) -> None:
        """The upload that was to end it broke off."""
        self.fail(task, "The publisher's answer broke off.", None)

    def confirm_cancelled(self, task_id: str, owner: str) -> None:
        """See `Broker.confirm_cancelled`."""
        directory = self._directory
        stopping = directory.held_slots.get(task_id)
        if stopping is not None and stopping.channel.session.record.owner == owner:
            self._dispatcher.stops.release(stopping, "confirmed")
            return
        remembered = directory.recall(task_id)
        if remembered is not None and remembered.owner == owner:
            return
        self.fail(self.find_task(task_id, owner), "The publisher has stopped working on it.", None)

    def fail(self, task: Infer | Wake, message: str, status: int | None) -> None:
        """Its publisher says that it failed. `status` is for an infer's caller."""
        if isinstance(task, Wake):
            self._dispatcher.waker.settle(task, "failed", WakeFailed(message or None), by_publisher=True)
        else:
            if status in _REFUSALS and self._dispatcher.placer.can_move(task) and self._dispatcher.move_refused(task):
                return
            error = PublisherError(message or None, status=status)
            self._dispatcher.settle(task, "failed", error, by_publisher=True)
