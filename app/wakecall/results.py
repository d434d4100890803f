"""A shared upload: one stream of whole answers, each of which settles its task as an upload of its own would.

It belongs to a channel, one at a time, and never outlives it. What has been taken is acknowledged on that channel, many
records at once; it is nothing to wait for: a record whose task takes nothing any more is dropped, and counts as taken.

A record is taken in one synchronous step, and no record waits for the one before it. What could make one wait are a slow
client (but an answer is whole and bounded, and a task has one at the most) and, for a wake, the disk: so the wake is settled
in its step, and only the acknowledgement stays behind until that is committed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import trio

from .deadlines import Deadline
from .directory import Directory
from .journal import Commit
from .records import Head, RecordParser
from .wake import Wake

if TYPE_CHECKING:
    from .session import Channel
    from .upload import Intake

__all__ = ["Results"]

#: So many records unacknowledged are acknowledged at once, fewer after so many seconds.
_MOST_UNTOLD: Final = 64
_UNTOLD_S: Final = 1.0


class Results:
    """Made by `Broker.open_results`; hold it in a `with` block: leaving that ends it. What has been taken stays taken.

    Attributes:
        key_id: the key that it came with; None: none was needed.
        needs_open: whether it ends once the broker wants keys.
        is_over: whether it has ended, for instance with its channel: it takes nothing more.
        taken: how many records it has taken.
    """

    __slots__ = (
        "_channel",
        "_commit",
        "_directory",
        "_due",
        "_held_at",
        "_intake",
        "_on_over",
        "_owner",
        "_parser",
        "_told",
        "is_over",
        "key_id",
        "needs_open",
        "taken",
    )

    def __init__(
        self, directory: Directory, intake: Intake, channel: Channel, key_id: str | None, needs_open: bool
    ) -> None:
        self.key_id: Final = key_id
        self.needs_open: Final = needs_open
        self.is_over = False
        self.taken = 0
        self._directory = directory
        self._intake = intake
        self._channel = channel
        self._owner = channel.session.record.owner
        self._parser = RecordParser(self._take)
        self._told = 0
        self._due = Deadline(self._tell)
        self._commit: Commit | None = None  # of a wake that it has settled, and
        self._held_at = 0  # what may be acknowledged until that is down
        self._on_over: Callable[[], None] | None = None
        channel.results = self
        channel.send_results(0)

    @property
    def counted(self) -> int:
        """How many records may be acknowledged: all that have been taken, but for a wake that is not committed yet and what
        came after it."""
        return self.taken if self._commit is None or self._commit.went_well else self._held_at

    def on_over(self, callback: Callable[[], None]) -> None:
        """Have `callback` called, once and synchronously, if this ends before its sender has ended it."""
        if self.is_over:
            callback()
        else:
            self._on_over = callback

    def feed(self, data: bytes) -> None:
        """Take the next piece, with all records that it completes. Nothing once it is over, as it is when this has raised.

        Raises:
            InvalidRequest: what comes is no record. Those before it are taken; then it is over.
        """
        if self.is_over:
            return
        before = self.taken
        try:
            self._parser.feed(data if type(data) is bytes else bytes(data))
        except Exception:
            self.close()
            raise
        if self.taken == before or self.is_over:
            return
        if self.taken - self._told >= _MOST_UNTOLD:
            self._tell()
        elif before == self._told:
            self._channel.deadlines.arm(self._due, trio.current_time() + _UNTOLD_S)

    async def finish(self) -> None:
        """The last byte is in. Returns once the wakes that it has settled are committed.

        Raises:
            InvalidRequest: it ends in the middle of a record.
            StoreUnavailable: they count, but are not committed yet.
        """
        if self.is_over:
            return
        try:
            self._parser.finish()
            if self._commit is not None:
                await self._commit.wait()
            self._tell()
        finally:
            self.close()

    def end(self) -> None:
        """It has lost its channel, or its key: whoever feeds it hears of that. Idempotent."""
        callback, self._on_over = self._on_over, None
        self.close()
        if callback is not None:
            callback()

    def close(self) -> None:
        """Take nothing more. Idempotent."""
        if self.is_over:
            return
        self.is_over = True
        self._on_over = None
        self._channel.results = None
        self._channel.deadlines.disarm(self._due)

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, head: Head, answer: bytes) -> None:
        self.taken += 1
        task_id = head.task_id
        task = self._directory.tasks.get(task_id)
        if task is None:
            stopping = self._directory.held_slots.get(task_id)
            if stopping is not None and stopping.channel.session.record.owner == self._owner:
                # The whole answer is there: its engine works on it no more.
                self._intake.confirm_cancelled(task_id, self._owner)
            return
        channel = task.channel
        if channel is not self._channel and (channel is None or channel.session.record.owner != self._owner):
            return
        if task.upload is not None or task.pieces:
            return
        if not isinstance(task, Wake):
            self._intake.take_whole(task, answer, head.status, head.content_type)
            return
        self._intake.feed_wake(task, answer)
        if self._intake.settle_wake(task, head.status):
            if self._commit is None or self._commit.went_well:
                self._held_at = self.taken - 1
            self._commit = self._directory.journal.commit()  # it carries those before it, too

    def _tell(self) -> None:
        """Acknowledge what may be, and look again at the rest."""
        if self._commit is not None and self._commit.failed:
            self._commit = self._directory.journal.commit()
        may_tell = self.counted
        if may_tell > self._told:
            self._told = may_tell
            self._channel.send_results(may_tell)
        if self.taken > self._told and not self.is_over:
            self._channel.deadlines.arm(self._due, trio.current_time() + _UNTOLD_S)
