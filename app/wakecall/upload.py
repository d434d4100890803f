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
    TaskAlreadySettled,
    TaskCancelled,
    TaskNotFound,
    TaskOver,
    WakeFailed,
)
from .task import Infer
from .wake import Wake

if TYPE_CHECKING:
    from .dispatch import Dispatcher

__all__ = ["Intake", "Upload"]

#: How much of a failed wake's text is its message, in bytes.
_WAKE_TEXT_BYTES: Final = 1024


class Upload:
    """Made by `Broker.open_upload`; hold it in a `with` block: leaving that without `finish` means that it broke off.

    Two kinds. A *final* one (`…/result`) ends the task, well or badly. One that is not (`…/chunks`) carries a piece: if it
    breaks off, what has arrived counts, and its sender goes on from there.
    """

    __slots__ = ("_ended", "_final", "_intake", "_on_over", "_skip", "content_type", "status", "task")

    def __init__(
        self, intake: Intake, task: Infer | Wake, status: int, content_type: str | None, skip: int, final: bool
    ) -> None:
        self._intake = intake
        self._final = final
        self._skip = skip  # bytes at its beginning that are here already
        self._ended = False
        self._on_over: Callable[[], None] | None = None
        self.task: Final = task
        self.status: Final = status
        self.content_type: Final = content_type

    def on_over(self, callback: Callable[[], None]) -> None:
        """Have `callback` called, once and synchronously, if the task ends before this upload does."""
        if self.task.is_over and not self._ended:
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
        if task.is_over:
            raise self._intake.over_error(task.task_id)
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
            if task.is_over:
                raise self._intake.over_error(task.task_id)
        self._intake.feed(task, data, self.status, self.content_type)

    async def finish(self) -> None:
        """The last byte is in. A final upload settles its task; for a wake this returns once that is committed.

        Raises:
            TaskCancelled, TaskAlreadySettled: the task ended before.
            InvalidRequest: the answer is shorter than what has arrived of it; the task fails.
            StoreUnavailable: the wake counts, but is not committed yet.
        """
        if self.task.is_over:
            raise self._intake.over_error(self.task.task_id)
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
        if self._final and not self.task.is_over:
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

    def find_task(self, task_id: str, owner: str) -> Infer | Wake:
        """A task that is under way at this owner's publisher.

        Raises:
            TaskNotFound, TaskAlreadySettled, TaskCancelled: it is not.
        """
        task = self._directory.tasks.get(task_id)
        if task is None:
            remembered = self._directory.recall(task_id)
            if remembered is not None and remembered.owner == owner:
                raise self.over_error(task_id)
            raise TaskNotFound
        assert task.channel is not None
        if task.channel.session.record.owner != owner:
            raise TaskNotFound
        return task

    def over_error(self, task_id: str) -> TaskOver:
        """What a publisher is told of a task that is over."""
        remembered = self._directory.recall(task_id)
        if remembered is None:
            return TaskNotFound()
        return TaskAlreadySettled() if remembered.by_publisher else TaskCancelled()

    def feed(self, infer: Infer, data: bytes, status: int, content_type: str | None) -> None:
        """A piece of an answer has arrived."""
        config, now = self._config, trio.current_time()
        if infer.first_byte_at is None:
            infer.take_head(now, status, content_type)
        infer.received += len(data)
        infer.last_byte_at = now
        infer.stream.put_nowait(data, now)
        assert infer.deadline is not None
        assert infer.channel is not None
        infer.channel.hasten(infer.deadline, now + min(config.idle_s, config.peer_stall_s))

    def feed_wake(self, wake: Wake, data: bytes) -> None:
        """A piece of a wake's result: only the beginning of its text is kept."""
        wake.received += len(data)
        wake.text += data[: _WAKE_TEXT_BYTES - len(wake.text)]

    def complete(self, infer: Infer, status: int, content_type: str | None) -> None:
        """The last byte of its answer is in."""
        if infer.first_byte_at is None:
            infer.take_head(trio.current_time(), status, content_type)
        self._dispatcher.settle(infer, "completed", None)

    async def complete_wake(self, wake: Wake, status: int) -> None:
        """Its result is in: any 2xx means awake. Returns once that is committed.

        Raises:
            StoreUnavailable: it counts, but is not committed yet.
        """
        if not 200 <= status <= 299:
            text = bytes(wake.text).decode("utf-8", "replace").strip()
            self._dispatcher.settle_wake(wake, "failed", WakeFailed(text or None), by_publisher=True)
            return
        self._dispatcher.settle_wake(wake, "succeeded", None, by_publisher=True)
        await self._directory.journal.commit().wait()

    def break_off(self, task: Infer | Wake) -> None:
        """The upload that was to end it broke off."""
        self.fail(task, "The publisher's answer broke off.", None)

    def fail(self, task: Infer | Wake, message: str, status: int | None) -> None:
        """Its publisher says that it failed. `status` is for an infer's caller."""
        if isinstance(task, Wake):
            self._dispatcher.settle_wake(task, "failed", WakeFailed(message or None), by_publisher=True)
        else:
            error = PublisherError(message or None, status=status)
            self._dispatcher.settle(task, "failed", error, by_publisher=True)
