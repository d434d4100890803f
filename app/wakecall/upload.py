"""One upload of a publisher's answer, from its head to its last byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from .task import Infer
from .wake import Wake

if TYPE_CHECKING:
    from .dispatch import Dispatcher

__all__ = ["Upload"]


class Upload:
    """Made by `Broker.open_upload`; hold it in a `with` block: leaving that without `finish` means that it broke off.

    Two kinds. A *final* one (`…/result`) ends the task, well or badly. One that is not (`…/chunks`) carries a piece: if it
    breaks off, what has arrived counts, and its sender goes on from there.
    """

    __slots__ = ("_dispatcher", "_ended", "_final", "_on_over", "_skip", "content_type", "status", "task")

    def __init__(
        self, dispatcher: Dispatcher, task: Infer | Wake, status: int, content_type: str | None, skip: int, final: bool
    ) -> None:
        self._dispatcher = dispatcher
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
            raise self._dispatcher.over_error(task.task_id)
        if self._skip:
            known = min(self._skip, len(data))
            self._skip -= known
            data = data[known:]
        if not data:
            return
        if isinstance(task, Wake):
            self._dispatcher.feed_wake(task, data)
            return
        if not task.stream.has_room:
            await task.stream.wait_room()
            if task.is_over:
                raise self._dispatcher.over_error(task.task_id)
        self._dispatcher.feed(task, data, self.status, self.content_type)

    async def finish(self) -> None:
        """The last byte is in. A final upload settles its task; for a wake this returns once that is committed.

        Raises:
            TaskCancelled, TaskAlreadySettled: the task ended before.
            StoreUnavailable: the wake counts, but is not committed yet.
        """
        if self.task.is_over:
            raise self._dispatcher.over_error(self.task.task_id)
        self._release()
        if not self._final:
            return
        if isinstance(self.task, Wake):
            await self._dispatcher.finish_wake(self.task, self.status)
        else:
            self._dispatcher.complete(self.task, self.status, self.content_type)

    def abort(self) -> None:
        """It broke off. Idempotent, and nothing after `finish`."""
        if self._ended:
            return
        self._release()
        if self._final and not self.task.is_over:
            self._dispatcher.break_off(self.task)

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
