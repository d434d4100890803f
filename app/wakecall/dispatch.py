"""What becomes of those who wait and those at work when a row or a channel changes."""

from __future__ import annotations

from collections.abc import Iterable

import trio

from .errors import (
    ModelOffline,
    PublisherDisconnected,
    ShutDownAtWork,
    WakecallError,
)
from .frames import CancelReason
from .infers import Infers
from .lifecycle import RowEvent
from .models import Kind, Status
from .row import Pool, Row, Target
from .session import Channel
from .task import Infer, InferState

__all__ = ["Dispatcher"]


class Dispatcher(Infers):
    """Works on a `Directory`; made by the broker."""

    def step(self, row: Row, event: RowEvent, *, bump: bool = False) -> None:
        """Move a row along its lifecycle, with all that hangs on it: what makes it active frees those who wait for it,
        what makes it inactive fails them (or has them go on), and what puts it to sleep with some still waiting wakes it."""
        if row.wake is not None:
            hibernating = row.llm.status is Status.HIBERNATING
            # `hibernating` needs nothing said: it was sent before the wake was heard of, and changes nothing.
            if event is RowEvent.REGISTER_ACTIVE or (hibernating and event is RowEvent.REPORT_ACTIVE):
                # It counts as the wake's success, and does what this event would have done.
                self.waker.settle(row.wake, "succeeded", None, by_publisher=True)
        before = row.llm.status
        self._directory.step(row, event, bump=bump)
        after = row.llm.status
        if after is not before:
            row.yielding = False
            if after is Status.ACTIVE:
                row.woken_at = trio.current_time()
            if after is Status.INACTIVE:
                self.row_is_gone(row.pool, lost=event is RowEvent.LOST)
            else:
                self.review_phases(row.pool, row)
        self.pump(row)
        if row.llm.group is not None and row.session is not None and after is not before:
            self.waker.review_group(row.session, row.llm.group)

    def row_is_gone(self, pool: Pool, *, lost: bool = False) -> None:
        """One of a pool's rows can be had no more: whoever waits goes on with the others, one of which may have to be woken
        now, or be tried whatever it has failed; or he fails.

        Args:
            pool: where it was.
            lost: whether that was for its publisher's end.
        """
        if not pool.line:
            return
        self.strand(pool, lost=lost)
        self.pump_pool(pool)

    def welcome(self, row: Row) -> None:
        """A row has come: those who wait for its pool are its own too."""
        pool = row.pool_if_made
        if pool is not None and pool.line:
            self.review_phases(pool, row)
            self.pump(row)

    def lose_tasks(self, channel: Channel, *, shutdown: bool = False) -> int:
        """A channel has ended, or is about to: fail all that was sent on it and may be at work. What never left waits again.

        Returns how many infers failed.
        """
        infers = [task for task in channel.tasks.values() if isinstance(task, Infer)]
        cancel: CancelReason | None = "shutdown" if shutdown else None
        for stopping in list(channel.stopping.values()):
            self.stops.release(stopping, "lost")
        self.waker.lose_wakes(channel, shutdown=shutdown)
        failed = 0
        again = []
        # From the last on: each goes to the head of its key's place.
        for infer in reversed(infers):
            if not (shutdown or infer.frame_taken) and infer.attempts <= self.placer.most_attempts(infer):
                again.append(infer)
                self._requeue(infer)
        pools = {}
        for infer in infers:
            if infer.state is InferState.SENT and infer.channel is channel:
                failed += 1
                assert infer.row is not None
                pools[id(infer.row.pool)] = infer.row.pool
                self.settle(infer, "failed", ShutDownAtWork() if shutdown else PublisherDisconnected(), cancel=cancel)
        for infer in again:
            if infer.state is not InferState.WAITING or infer.pool is None:
                continue
            if all(row.llm.status is Status.INACTIVE for row in self.placer.candidates(infer)):
                self.strand(infer.pool)  # withdrawn before, and no step to come says so
            else:
                pools[id(infer.pool)] = infer.pool
        for pool in pools.values():
            # Others may have room for them now; or may be tried whatever they have failed, since these have failed too.
            self.pump_pool(pool)
        return failed

    def lose_rows(self, rows: Iterable[Row]) -> None:
        """A channel has ended without a successor: its rows are lost, in one step. Who waits for hundreds of them in one
        pool is looked at once, and not for each."""
        pools = {}
        for row in rows:
            if row.llm.status is not Status.INACTIVE:
                assert row.wake is None, "a wake ends with its channel"
                self._directory.step(row, RowEvent.LOST)
                row.yielding = False
                pools[id(row.pool)] = row.pool
        for pool in pools.values():
            self.row_is_gone(pool, lost=True)

    def refuse_all_waiting(self, error: type[WakecallError]) -> None:
        """Fail all who wait, for whatever row."""
        for pool in self._directory.pools_made():
            for infer in list(pool.line):
                self.settle(infer, "failed", error())

    def fail_row(self, row: Row, message: str = "The model was deleted while it worked on this request.") -> None:
        """A row is about to be no more its session's: fail everything on it, and tell its publisher to stop. Whoever waits
        for it by name goes on to the next one, if his has any.

        Args:
            row: which.
            message: for those whose frame was sent.
        """
        if row.llm.status is not Status.INACTIVE and row.llm.kind is Kind.VIRTUAL:
            self.step(row, RowEvent.WITHDRAWN)  # or what follows would wake it again, or send more
        for infer in list(row.pool.line):
            if infer.only == row.llm.name and not self.move_on(infer):
                self.settle(infer, "failed", ModelOffline())
        # First of all: else whoever waits for its pool would be sent to each slot that is freed here, or have it woken.
        self.move_row(row, None)
        if row.wake is not None:
            self.waker.settle(row.wake, "lost", ModelOffline(), cancel="shutdown")
        for task in list(self._directory.tasks.values()) if row.in_flight else ():
            if isinstance(task, Infer) and task.row is row:
                # Its publisher may have generated already: nobody is to repeat it.
                self.settle(task, "failed", PublisherDisconnected(message), cancel="shutdown")
        for stopping in [each for each in self._directory.held_slots.values() if each.row is row]:
            self.stops.release(stopping, "lost")

    def review(self, row: Row) -> None:
        """An operator or its publisher has held a row, or let it go."""
        self.row_is_gone(row.pool)
        self.pump(row)
        if row.llm.group is not None and row.session is not None:
            self.waker.review_group(row.session, row.llm.group)

    def move_row(self, row: Row, pool: str | None) -> None:
        """A row is in another pool from now on. Whoever waits for it by name goes with it."""
        if row.llm.pool == pool:
            return
        before = self._directory.move_row(row, pool)
        for infer in list(before.line):
            if infer.only == row.llm.name:
                before.line.discard(infer)
                infer.pool = row.pool
                self.placer.add_to_line(infer, Target(row.pool, infer.only), first=False)
        self.row_is_gone(before)
        self.review_phases(row.pool, row)
