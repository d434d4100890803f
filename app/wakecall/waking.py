"""Wakes: one for a row at a time, shared by all who wait for it; and the rows that take turns in being awake.

Rows of one session that share a *group* share what only one of them can have (a GPU). So to wake one of them the other has
to sleep first, and may be asked to only when it is idle and has been awake for `residence_s`: two callers of two models
would otherwise spend their time in swapping. From then on it yields: it takes no more infers, and when the last one has
left the next row is woken, with a `hibernate` in its wake's frame that names the one to be put to sleep. Next is the row for
which somebody has been waiting the longest.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import trio

from .deadlines import Deadline
from .directory import Directory
from .errors import PublisherLostWhileWaking, ShuttingDown, WakecallError, WakeTimeout
from .fairness import Lane
from .frames import CancelReason
from .lifecycle import RowEvent
from .models import Status, WakeSettled
from .placement import choose_wake
from .row import Pool, Row
from .wake import Wake

if TYPE_CHECKING:
    from .dispatch import Dispatcher
    from .session import Channel, Session
    from .task import Infer

__all__ = ["Waker"]

WakeOutcome = Literal["succeeded", "failed", "timed_out", "lost"]


class Waker:
    """The dispatcher's other half; made by it."""

    def __init__(self, directory: Directory, dispatcher: Dispatcher) -> None:
        self._directory = directory
        self._dispatcher = dispatcher
        self._config = directory.config
        self._counters = directory.counters

    # Whom to wake ---------------------------------------------------------------------------------------------------

    def is_awaited(self, rows: Sequence[Row]) -> bool:
        """Whether those who wait for these rows wait for a wake, rather than for a slot or for their turn."""
        if any(row.llm.status is Status.ACTIVE for row in rows):
            return False
        return any(
            row.wake is not None or (row.llm.status is Status.HIBERNATING and row.llm.group is None) for row in rows
        )

    def consider(self, pool: Pool) -> None:
        """Wake what has to be woken for those who wait in a pool's line."""
        asleep = [row for row in pool.rows.values() if row.llm.status is Status.HIBERNATING]
        if not asleep:
            return
        for row in asleep:
            if pool.line.count(row.llm.name):
                self.want(row)
        if pool.line.count(Lane.ANY):
            self._consider_without(pool, frozenset())
        if pool.line.count(Lane.MOVED):
            # A row that would not have them, or did not wake, is woken for nobody who cannot go there.
            for refused_by in dict.fromkeys(infer.refused_by for infer in pool.line.lane(Lane.MOVED)):
                self._consider_without(pool, refused_by)

    def _consider_without(self, pool: Pool, refused_by: frozenset[str]) -> None:
        now = trio.current_time()
        rows = [row for name, row in pool.rows.items() if name not in refused_by]
        name = choose_wake([self._dispatcher.placer.load_of(row, now) for row in rows], pool.waiting - 1)
        if name is not None:
            self.want(pool.rows[name])

    def want(self, row: Row) -> None:
        """Somebody waits for this row: wake it, if it sleeps and can be woken now; or as soon as its group lets it."""
        if row.wake is not None or row.llm.status is not Status.HIBERNATING or row.session is None:
            return
        if row.session.channel is None or row.llm.paused or row.llm.hold == "pause":
            return
        if row.llm.group is None:
            self._start(row, ())
        else:
            row.wanted = True
            self.review_group(row.session, row.llm.group)

    def spare(self, pool: Pool) -> None:
        """Nobody waits for any row of a pool any more: whoever was to make way for one of them goes on."""
        for row in list(pool.rows.values()):
            if row.wanted and not pool.line.count(row.llm.name):
                row.wanted = False
                if row.llm.group is not None and row.session is not None:
                    self.review_group(row.session, row.llm.group)

    def takes_turns(self, row: Row) -> bool:
        """Whether a row sleeps and shares a group, so that others may be making way for it."""
        return row.llm.group is not None and row.session is not None and row.llm.status is Status.HIBERNATING

    def review_group(self, session: Session, group: str) -> None:
        """Let the next row of a group have its turn, if it is time.

        1. One of them is waking: not now.
        2. Nobody waits for one that sleeps: whoever is awake goes on.
        3. One is awake that has not been so for long enough: later.
        4. One is awake and at work: it takes no more, and its last infer's end brings us here again.
        5. The one for which somebody has been waiting the longest is woken, and those that are awake sleep.
        """
        rows = [row for row in session.rows.values() if row.llm.group == group]
        if session.channel is None:
            return
        # 1
        if any(row.wake is not None for row in rows):
            return
        awake = [row for row in rows if row.llm.status is Status.ACTIVE]
        wanting = [(since, row) for row in rows if (since := self._wanted_since(row)) is not None]
        # 2
        if not wanting:
            for row in awake:
                if row.yielding:
                    row.yielding = False
                    self._dispatcher.pump(row)
            return
        now = trio.current_time()
        # 3
        until = max((row.woken_at for row in awake), default=0.0) + self._config.residence_s
        if awake and now < until:
            self._look_again(session, group, until)
            return
        # 4
        for row in awake:
            row.yielding = True
        if any(row.in_flight or row.stopping for row in awake):
            return
        # 5
        _, row = min(wanting, key=lambda each: each[0])
        self._start(row, [each.llm.name for each in awake])

    def _wanted_since(self, row: Row) -> float | None:
        """From when on somebody has been waiting for a row that sleeps; None: nobody is."""
        llm = row.llm
        if llm.status is not Status.HIBERNATING or llm.paused or llm.hold == "pause":
            return None
        line = row.pool.line
        named = line.oldest(llm.name)
        if named is not None:
            return named.accepted_at
        if not row.wanted:
            return None
        if not row.pool.waiting:
            row.wanted = False
            return None
        return min(infer.accepted_at for infer in line if infer.only is None)

    def _look_again(self, session: Session, group: str, at: float) -> None:
        if group in session.turns:
            return

        def look() -> None:
            del session.turns[group]
            self.review_group(session, group)

        assert session.channel is not None
        session.turns[group] = deadline = Deadline(look)
        self._directory.waiting_deadlines.arm(deadline, at)

    # Waking ---------------------------------------------------------------------------------------------------------

    def _start(self, row: Row, hibernate: Sequence[str]) -> None:
        assert row.wake is None, "one wake a row"
        assert row.session is not None
        channel = row.session.channel
        assert channel is not None
        row.wanted = False
        limit = row.llm.wake_s or self._config.wake_s
        wake = Wake(secrets.token_urlsafe(16), row, channel, trio.current_time(), tuple(hibernate))
        row.wake = wake
        wake.deadline = Deadline(partial(self.on_due, wake))
        self._directory.tasks[wake.task_id] = wake
        self._counters.wakes_started += 1
        channel.send_wake(wake, limit)
        if row.llm.group is not None:
            self._dispatcher.review_phases(row.pool, row)  # their turn has come

    def on_due(self, wake: Wake) -> None:
        """Its own time is up."""
        self.settle(wake, "timed_out", WakeTimeout(), cancel="deadline_exceeded")

    def settle(
        self,
        wake: Wake,
        outcome: WakeOutcome,
        error: WakecallError | None,
        *,
        cancel: CancelReason | None = None,
        by_publisher: bool = False,
    ) -> None:
        """Give a wake its one outcome. `error` is what those who wait for it get, unless it succeeded, or another row can
        serve them."""
        if wake.is_over:
            return
        directory, row, channel = self._directory, wake.row, wake.channel
        now = trio.current_time()
        # 1
        del directory.tasks[wake.task_id]
        channel.forget(wake)
        directory.remember(channel.session, wake.task_id, by_publisher, trio.current_time())
        # 2
        wake.is_over = True
        name = row.llm.name
        waiters = [
            infer
            for infer in row.pool.line
            if infer.phase == "wake" and infer.only in (None, name) and name not in infer.refused_by
        ]
        if outcome == "succeeded":
            self._counters.wakes_succeeded += 1
            row.health.note_wake(now - wake.started_at)
        else:
            self._counters.wakes_failed += 1
            row.health.note_failure(now, row.pool.sent)
        if wake.upload is not None:
            wake.upload._task_is_over()
        directory.notify(WakeSettled(wake.task_id, name, outcome, now - wake.started_at, len(waiters)))
        # 3
        if cancel is not None and wake.frame_taken:
            channel.send_cancel(wake.task_id, cancel)
        elif cancel is not None:
            channel.withdraw(wake.task_id)
        # While this is still its wake, for nobody else's turn has come.
        self._put_to_sleep(wake)
        if outcome == "succeeded":
            row.wake = None
            self._dispatcher.step(row, RowEvent.WOKEN, bump=True)
            return
        assert error is not None
        for infer in waiters:
            # Whoever may go elsewhere does; this row he has tried.
            self._dispatcher.avoid(infer, row)
            if self._has_others(infer):
                self._dispatcher.enter_phase(infer)  # it begins anew: this wake may have taken all that there was of it
            elif not self._dispatcher.move_on(infer):
                self._dispatcher.settle(infer, "failed", type(error)(error.message))
        # Only now: with its wake gone, the end of the first would have woken the row again for the rest.
        row.wake = None
        self._dispatcher.step(row, RowEvent.WAKE_FAILED)
        self.consider(row.pool)
        if row.llm.group is not None and row.session is not None:
            self.review_group(row.session, row.llm.group)

    def _has_others(self, infer: Infer) -> bool:
        """Whether one that waits for any row of a pool can be served by another than those that he has tried."""
        if infer.only is not None or infer.pool is None:
            return False
        now = trio.current_time()
        return any(
            self._dispatcher.placer.load_of(each, now).is_routable for each in self._dispatcher.placer.candidates(infer)
        )

    def _put_to_sleep(self, wake: Wake) -> None:
        """The rows that the publisher was to put to sleep first. If one of them is awake all the same, waking it again is
        nothing to it; if it were taken for awake and slept, its callers would wait in vain."""
        session = wake.channel.session
        for name in wake.hibernate:
            row = session.rows.get(name)
            if (
                row is not None
                and row.llm.status is Status.ACTIVE
                and self._directory.sessions.get(session.record.session_id) is session
            ):
                self._dispatcher.step(row, RowEvent.REPORT_HIBERNATING)

    def lose_wakes(self, channel: Channel, *, shutdown: bool) -> None:
        """A channel has ended, or is about to: fail all wakes that were sent on it."""
        cancel: CancelReason | None = "shutdown" if shutdown else None
        for wake in [task for task in channel.tasks.values() if isinstance(task, Wake)]:
            self.settle(wake, "lost", ShuttingDown() if shutdown else PublisherLostWhileWaking(), cancel=cancel)
