"""The shared upload of one channel: whole, small answers, many to a write, instead of a POST for each.

It is an offer: `give` says whether it has taken an answer, and who hears no posts it himself. What has been given stays here
until the broker has acknowledged it on the channel; an upload that breaks, or is not acknowledged in time, has all that is
left posted task by task. Some of it may have arrived: then the broker says that it is over, and nothing is lost or doubled.

An upload on which nothing goes carries a record of no task every so often. So no proxy ends it, and if one has, that is
noticed before an answer depends on it. For HTTP reads nothing while it sends: that a connection is gone shows in a write
alone, so an acknowledgement that is late asks for one, too.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Final

import trio

from ..records import encode_record
from .backoff import Backoff
from .wire import BrokerClient, BrokerError, BrokerLost, BrokerRefused

__all__ = ["SharedUpload"]

logger = logging.getLogger(__name__)

#: How long the broker may take to begin to read: longer, and a proxy keeps the upload for itself until it ends.
_OPENING_S: Final = 5.0
#: How long it may owe the next acknowledgement. It owes one for at most a second.
_OWED_S: Final = 10.0
#: When it is late.
_LATE_S: Final = 1.5
_MOST_UNACKNOWLEDGED: Final = 256
_MOST_UNACKNOWLEDGED_BYTES: Final = 4 * 1024 * 1024
#: Posts at a time of what a broken upload has left.
_POSTING: Final = 16
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 60.0

#: A record that no broker has a task for.
_NOTHING: Final = encode_record("-", 200, None, b"")


class _Given:
    """An answer that the broker has not acknowledged."""

    __slots__ = ("answer", "content_type", "status", "task_id")

    def __init__(self, task_id: str, status: int, content_type: str | None, answer: bytes) -> None:
        self.task_id: Final = task_id
        self.status: Final = status
        self.content_type: Final = content_type
        self.answer: Final = answer


class SharedUpload:
    """One for each channel; `run` in its nursery, so that it ends with it.

    Args:
        broker: where to.
        keepalive_s: an upload with nothing to carry says so as often.
        on_key_refused: called when the broker does not know us any more.
    """

    def __init__(self, broker: BrokerClient, keepalive_s: float, on_key_refused: Callable[[], None]) -> None:
        self._broker = broker
        self._on_key_refused = on_key_refused
        self._keepalive_s = keepalive_s
        # The entire mutable state.
        self._is_opening = False  # it is under way, and the broker has not said that it reads it
        self._is_open = False  # it has
        self._acknowledged = 0  # of the upload under way
        self._unacknowledged: deque[_Given | None] = deque()  # oldest first; None: of no task
        self._bytes = 0
        self._unsent: list[bytes] = []
        self._wanted = trio.Event()
        self._settled = trio.Event()
        self._posting = 0
        self._patience = trio.CancelScope()

    @property
    def is_open(self) -> bool:
        """Whether it is worth asking."""
        return self._is_open

    def give(self, task_id: str, status: int, content_type: str | None, answer: bytes) -> bool:
        """Have an answer sent; False: it is not taken, for now or for good."""
        if not 200 <= status <= 599:
            return False  # no record has it, and one that is none would end the upload of all others
        if (
            not self._is_open
            or len(self._unacknowledged) >= _MOST_UNACKNOWLEDGED
            or self._bytes + len(answer) > _MOST_UNACKNOWLEDGED_BYTES
        ):
            return False
        try:
            record = encode_record(task_id, status, content_type, answer)
        except ValueError:
            return False
        self._bytes += len(answer)
        self._put(record, _Given(task_id, status, content_type, answer))
        return True

    def acknowledge(self, taken: int) -> None:
        """The broker has taken so many records since the upload began."""
        if not self._is_open:
            if self._is_opening and taken == 0:  # else it speaks of an upload before this one
                self._is_opening, self._is_open = False, True
                self._patience.deadline = float("inf")
            return
        for _ in range(min(taken - self._acknowledged, len(self._unacknowledged))):
            given = self._unacknowledged.popleft()
            self._acknowledged += 1
            if given is not None:
                self._bytes -= len(given.answer)
        self._patience.deadline = trio.current_time() + _OWED_S if self._unacknowledged else float("inf")
        self._review()

    async def wait_settled(self) -> None:
        """Return when nothing that was given is on its way any more."""
        while self._unacknowledged or self._posting:
            await self._settled.wait()

    async def run(self) -> None:
        """Keep an upload open while the broker takes one, until cancelled. Raises nothing."""
        backoff = Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S)
        try:
            while True:
                if not await self._run_one(backoff):
                    return
                await trio.sleep(backoff.next_pause())
        finally:
            # What was sent on a channel dies with it.
            self._close()
            self._posting = 0
            self._review()

    async def _run_one(self, backoff: Backoff) -> bool:
        """One upload, from its opening until its end and that of what it has left; whether to try another."""
        self._acknowledged = 0
        self._is_opening, again = True, False
        with trio.CancelScope(deadline=trio.current_time() + _OPENING_S) as self._patience:
            try:
                await self._broker.send_results(_Records(self))
            except BrokerLost as error:
                again = self._is_open
                if again:
                    backoff.reset()
                logger.info("the shared upload broke: %s", error)
            except BrokerRefused as error:
                # The broker may still hold one of ours that broke without its noticing.
                again = error.code == "result_in_progress"
                logger.info("the broker ended the shared upload: %s", error)
        if self._patience.cancelled_caught:
            again = self._is_open
            if again:
                logger.info("the shared upload is broken: its answers are not acknowledged any more")
            else:
                logger.info(
                    "the shared upload is given up: the broker says nothing of it; is there a proxy that buffers?"
                )
        left = self._close()
        self._posting = len(left)
        self._review()
        if left:
            limiter = trio.CapacityLimiter(_POSTING)
            async with trio.open_nursery() as nursery:
                for given in left:
                    nursery.start_soon(self._post, given, limiter)
        return again

    def _close(self) -> list[_Given]:
        """Take nothing more; returns what is not acknowledged."""
        left = [given for given in self._unacknowledged if given is not None]
        self._is_opening = self._is_open = False
        self._unsent.clear()
        self._unacknowledged.clear()
        self._bytes = 0
        return left

    async def _post(self, given: _Given, limiter: trio.CapacityLimiter) -> None:
        """Send an answer by itself. That its task is over means that it had arrived, or is not wanted any more."""
        async with limiter:
            try:
                await self._broker.send_result(
                    given.task_id, given.answer, status=given.status, content_type=given.content_type
                )
            except BrokerError as error:
                if not (isinstance(error, BrokerRefused) and error.is_over):
                    if isinstance(error, BrokerRefused) and error.status == 401:
                        self._on_key_refused()
                    logger.warning("the answer of task %s is lost: %s", given.task_id, error)
                    await self._report(given.task_id, error)
        self._posting -= 1
        self._review()

    async def _report(self, task_id: str, error: BrokerError) -> None:
        try:
            await self._broker.send_failure(task_id, f"the upload of the answer broke off ({error})")
        except BrokerError as refused:
            logger.debug("the failure of an infer could not be reported: %s", refused)

    def _review(self) -> None:
        if not self._unacknowledged and not self._posting:
            settled, self._settled = self._settled, trio.Event()
            settled.set()

    def _put(self, record: bytes, given: _Given | None) -> None:
        if not self._unacknowledged:
            self._patience.deadline = trio.current_time() + _OWED_S
        self._unacknowledged.append(given)
        self._unsent.append(record)
        self._wanted.set()

    async def _take(self) -> bytes:
        """All that has been given since the last time."""
        while not self._unsent:
            self._wanted = trio.Event()
            is_idle = not self._unacknowledged
            with trio.move_on_after(self._keepalive_s if is_idle else _LATE_S) as pause:
                await self._wanted.wait()
            if pause.cancelled_caught and self._is_open and (is_idle or self._unacknowledged):
                self._put(_NOTHING, None)
        data = b"".join(self._unsent)
        self._unsent.clear()
        return data


class _Records:
    """The body of one upload. No generator: an upload that breaks leaves it where it is."""

    def __init__(self, upload: SharedUpload) -> None:
        self._upload = upload

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        return await self._upload._take()
