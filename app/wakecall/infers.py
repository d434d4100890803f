"""Infers: accepting, sending, moving and settling them. (`waiting` keeps those in line, `waking` wakes rows for them,
`upload` takes their answers in.)

Every decision here is one synchronous step. A step may set off others (a settled infer frees its slot, which sends the next
one), and it goes like this:

1. the task leaves the place it was in: its line, or its slot and its channel;
2. it is over: counted, remembered, its waiters and readers told;
3. then only, whatever that made possible: a `cancel` frame, the next infers of the row.

So whoever looks in the middle sees a task either wholly in its place or over.

An infer is bound to a row late: it waits in the line of a pool, and whichever row of it has a slot first takes it. Until its
publisher can have begun to generate it may move: its row is lost with the frame untaken, or its publisher answers 429 or
503 itself. From then on, never.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final, cast

import trio

from .deadlines import Deadline
from .directory import Directory
from .errors import (
    InferCancelled,
    ModelNotFound,
    ModelOffline,
    Phase,
    QueueFull,
    ShuttingDown,
    WakecallError,
)
from .frames import CancelReason
from .keyring import Claim
from .models import InferRequest, InferSettled
from .placing import Place
from .row import Row
from .stopping import Stops
from .task import Due, Infer, InferState, Outcome
from .taskids import TaskIds
from .usage import UNSAID
from .waiting import Waiting, out_of_time

if TYPE_CHECKING:
    from .dispatch import Dispatcher

__all__ = ["Infers"]

_PHASE_OF: Final[dict[Due, Phase]] = {Due.FIRST_BYTE: "first_byte", Due.IDLE: "idle", Due.TOTAL: "total"}

#: A caller's own timeout tells something of a row where it is so many times what the answers of its pool take.
_AMPLE: Final = 10.0


class Infers(Waiting):
    """The part of `Dispatcher` that has to do with a single infer. Works on a `Directory`."""

    def __init__(self, directory: Directory) -> None:
        super().__init__(directory)
        self._quiet: trio.Event | None = None
        self._ids: Final = TaskIds()
        self.stops: Final = Stops(directory, cast("Dispatcher", self))

    # Accepting ------------------------------------------------------------------------------------------------------

    def accept(self, name: str, request: InferRequest, claim: Claim | None) -> Infer:
        """Take an infer on, as `placement.choose` decides for each name that it may go to. Once accepted, it holds the claim
        until its outcome.

        Raises:
            ShuttingDown, ModelNotFound, QueueFull: not accepted.
            ModelOffline: accepted, and failed in the same step.
        """
        directory, counters = self._directory, self._counters
        if directory.stopping:
            raise ShuttingDown
        route = directory.find_route(name)
        if route is None or (claim is not None and not claim.caller.may_use(name)):
            raise ModelNotFound(param="model")
        now = trio.current_time()
        total_s = self.placer.total_s(route, request)
        infer = Infer(self._ids.new(), name, route, request, self._config, now, total_s, self.cancel)
        infer.claim = claim
        place, full = self.placer.find_place(infer, 0, now)
        if place is None and full is not None:
            infer.claim = None
            raise QueueFull(
                "So many wait that this request would not be served in its time." if full.late else None,
                retry_after_s=full.retry_after_s,
            )
        if claim is not None:
            claim.take_over()
            claim.caller.waiting += 1
        counters.accepted += 1
        counters.waiting += 1
        if place is None:
            infer.phase = "offline"
            error = self._offline(infer)
            self.settle(infer, "failed", error)
            raise error
        self._take(infer, place, now)
        return infer

    def _take(self, infer: Infer, place: Place, now: float) -> None:
        """Send it, or have it wait, as has been decided. It is counted as waiting."""
        infer.stage = place.stage
        if place.decision.row is not None:
            infer.pool, infer.only = place.target
            key = None if infer.claim is None else infer.claim.caller.key_id
            infer.pool.line.note_unwaited(key, infer.request.priority)
            self._send(infer, infer.pool.rows[place.decision.row], now)
            return
        self._wait(infer, place.target, first=False)
        assert infer.pool is not None
        if place.decision.wake is not None:
            self.waker.want(infer.pool.rows[place.decision.wake])
        for row in self.placer.candidates(infer):
            # Those that wait may be waiting for others than the one that is free.
            if self.placer.has_slot(row):
                self.pump(row)

    # Sending --------------------------------------------------------------------------------------------------------

    def _send(self, infer: Infer, row: Row, now: float) -> None:
        """Take a slot, and put the frame on the channel."""
        directory = self._directory
        assert row.session is not None
        channel = row.session.channel
        assert channel is not None
        taken, most = row.in_flight + row.stopping, row.llm.max_concurrency
        assert most is None or taken < most, "no slot is free"
        self._disarm_waiting(infer)
        row.in_flight += 1
        row.last_sent_at = now
        row.pool.sent += 1
        self._counters.waiting -= 1
        self._counters.in_flight += 1
        if infer.claim is not None:
            infer.claim.caller.waiting -= 1
        infer.state = InferState.SENT
        infer.phase = "first_byte"
        infer.row = row
        infer.channel = channel
        infer.sent_at = now
        infer.frame_taken = False
        infer.attempts += 1
        infer.idle_s = row.llm.idle_s or self._config.idle_s
        if row.llm.total_s is not None:
            # From now on: he may have waited in the line of a pool for longer than that.
            infer.total_until = min(infer.total_until, now + row.llm.total_s)
        directory.tasks[infer.task_id] = infer
        infer.deadline = Deadline(partial(self._on_sent_due, infer))
        channel.send_infer(infer, infer.next_due(self._config)[0], now)

    def _on_sent_due(self, infer: Infer) -> None:
        due, why = infer.next_due(self._config)
        if due > trio.current_time():
            assert infer.deadline is not None
            assert infer.channel is not None
            infer.channel.hasten(infer.deadline, due)
        elif why is Due.STALL:
            self.settle(infer, "cancelled", InferCancelled(), cancel="client_disconnected")
        else:
            phase = _PHASE_OF[why]
            if why is Due.TOTAL and infer.request.timeout_s is not None and infer.request.stream:
                phase = "first_byte" if infer.first_byte_at is None else "total"
            self.settle(infer, "failed", out_of_time(phase), cancel="deadline_exceeded")

    # Moving ---------------------------------------------------------------------------------------------------------

    def move_refused(self, infer: Infer) -> bool:
        """Its publisher would not have it (it answered 429 or 503 itself): let another row have it, if there is one.

        Each row is asked once. Returns whether another has it now: then it has a new id, and the old one is settled.
        """
        row, now = infer.row, trio.current_time()
        assert row is not None
        before, infer.refused_by = infer.refused_by, infer.refused_by | {row.llm.name}
        place, _ = self.placer.find_place(infer, infer.stage, now)
        if place is None:
            infer.refused_by = before
            return False  # the end that this will be is held against it
        row.health.note_failure(now, row.pool.sent)
        assert infer.channel is not None
        self._directory.remember(infer.channel.session, infer.task_id, True, now)
        self._leave_channel(infer)
        upload, infer.upload = infer.upload, None
        infer.task_id = self._ids.new()
        if upload is not None:
            upload._task_is_over()
        infer.received = 0
        infer.pieces = False
        infer.refusal, infer.engine_status, infer.content_type = None, 200, None
        infer.retry_after_s = None
        self._wait_again(infer)
        self._take(infer, place, now)
        self._slot_is_free(row, now)
        return True

    def _requeue(self, infer: Infer) -> None:
        """Its frame never left: it waits again, before all others of its key."""
        self._leave_channel(infer)  # its id is still its own
        self._wait_again(infer)
        target = self._directory.find_target(infer.route[infer.stage])
        if target is None:
            infer.pool = infer.only = None  # it has been in no line since its pool went
            self.settle(infer, "failed", ModelOffline())
            return
        self._wait(infer, target, first=True)

    def _wait_again(self, infer: Infer) -> None:
        infer.state = InferState.WAITING
        infer.row = None
        infer.channel = None
        self._counters.waiting += 1
        if infer.claim is not None:
            infer.claim.caller.waiting += 1

    def _leave_channel(self, infer: Infer) -> None:
        """It is on its channel no more, and its slot is free."""
        row, channel = infer.row, infer.channel
        assert row is not None
        assert channel is not None
        assert row.in_flight > 0, "a slot that nobody took cannot be freed"
        row.in_flight -= 1
        self._counters.in_flight -= 1
        del self._directory.tasks[infer.task_id]
        channel.forget(infer)
        infer.deadline = None

    # Settling -------------------------------------------------------------------------------------------------------

    def cancel(self, infer: Infer) -> None:
        """Its caller leaves."""
        self.settle(infer, "cancelled", InferCancelled(), cancel="client_disconnected")

    def settle(
        self,
        infer: Infer,
        outcome: Outcome,
        error: WakecallError | None,
        *,
        cancel: CancelReason | None = None,
        by_publisher: bool = False,
    ) -> None:
        """Give an infer its one outcome. What comes later is nothing.

        Args:
            infer: which.
            outcome: as it is counted.
            error: what its caller gets, unless it completed.
            cancel: what its publisher is told, if its frame was sent.
            by_publisher: whether its publisher ended it; one that completed, always.
        """
        if infer.state is InferState.OVER:
            return
        directory, counters, row, channel = self._directory, self._counters, infer.row, infer.channel
        now = trio.current_time()
        wanted: list[Row] = []
        # 1
        if infer.state is InferState.WAITING:
            if infer.pool is not None:
                infer.pool.line.discard(infer)
                wanted = [row for row in self.placer.candidates(infer) if self.waker.takes_turns(row)]
            counters.waiting -= 1
            if infer.claim is not None:
                infer.claim.caller.waiting -= 1
            self._disarm_waiting(infer)
        else:
            assert row is not None
            assert channel is not None
            self._leave_channel(infer)
            directory.remember(channel.session, infer.task_id, by_publisher or outcome == "completed", now)
            self._judge(infer, row, outcome, by_publisher, now)
        # 2
        counters.count(outcome)
        infer.end(error)
        if infer.upload is not None:
            infer.upload._task_is_over()
        if infer.claim is not None:
            infer.claim.release()
        self._tell(infer, outcome, now)
        # 3
        if row is not None and channel is not None:
            if cancel is not None and infer.frame_taken:
                self.stops.hold(infer, row, channel, now)
                channel.send_cancel(infer.task_id, cancel)
            elif cancel is not None:
                channel.withdraw(infer.task_id)
            self._slot_is_free(row, now)
        for each in wanted:
            # Nobody may want it any more: whoever was to make way for it goes on.
            assert each.session is not None
            assert each.llm.group is not None
            self.waker.review_group(each.session, each.llm.group)
        if self._quiet is not None and counters.in_flight == counters.waiting == 0:
            self._quiet.set()
            self._quiet = None

    def _slot_is_free(self, row: Row, now: float) -> None:
        """Whatever an infer's end, or its going elsewhere, makes possible."""
        if row.session is not None and row.session.channel is None:
            return  # of a thousand that a channel's end fails none frees anything here: `lose_tasks` looks once, in the end
        if row.health.is_avoided(now, row.pool.sent):
            self.pump_pool(row.pool)  # it may have been the last in good health: then no penalty matters
        else:
            self.pump(row)
        if row.llm.group is not None and row.session is not None:
            self.waker.review_group(row.session, row.llm.group)

    def _judge(self, infer: Infer, row: Row, outcome: Outcome, by_publisher: bool, now: float) -> None:
        """What its end says of the row that had it."""
        health = row.health
        if outcome == "completed":
            if infer.engine_status < 400:
                held_s = now - infer.sent_at
                if health.service_s:
                    key = None if infer.claim is None else infer.claim.caller.key_id
                    row.pool.line.charge(key, infer.request.priority, held_s / max(health.service_s, 1e-3) - 1.0)
                health.note_success(now, held_s)
            elif infer.engine_status >= 500 or infer.engine_status == 429:
                health.note_failure(now, row.pool.sent)
        elif outcome == "failed" and not self._directory.stopping and (by_publisher or _had_its_time(infer, row, now)):
            health.note_failure(now, row.pool.sent)

    def _tell(self, infer: Infer, outcome: Outcome, now: float) -> None:
        if not self._directory.observers:
            return
        headed = infer.first_byte_at is not None
        tokens = UNSAID if infer.meter is None else infer.meter.tokens()
        self._directory.notify(
            InferSettled(
                task_id=infer.task_id,
                request_id=infer.request.request_id,
                llm=infer.asked if infer.row is None else infer.row.llm.name,
                outcome=outcome,
                code="completed" if infer.error is None else infer.error.code,
                phase=infer.phase,
                seconds=now - infer.accepted_at,
                first_byte_s=None if infer.first_byte_at is None else infer.first_byte_at - infer.accepted_at,
                engine_status=infer.engine_status if headed else None,
                key_id=None if infer.claim is None else infer.claim.caller.key_id,
                attempts=infer.attempts,
                # One whose frame was never taken was with nobody.
                service_s=now - infer.sent_at if infer.channel is not None and infer.frame_taken else None,
                tokens_in=tokens.into,
                tokens_out=tokens.out,
            )
        )

    async def wait_quiet(self) -> None:
        """Return when nothing waits and nothing is in flight."""
        while self._counters.in_flight or self._counters.waiting:
            quiet = self._quiet = self._quiet if self._quiet is not None else trio.Event()
            await quiet.wait()


def _had_its_time(infer: Infer, row: Row, now: float) -> bool:
    """Whether an end that its publisher did not bring about is its row's doing all the same: no byte came. Where its caller
    granted less than answers take that is his: he could have any row avoided by everybody else. So may be a deadline within
    an answer."""
    if infer.first_byte_at is not None:
        return False
    timeout_s = infer.request.timeout_s
    if timeout_s is None or now < infer.accepted_at + timeout_s:
        return True
    services = [each.health.service_s for each in row.pool.rows.values() if each.health.service_s is not None]
    return bool(services) and now - infer.sent_at >= _AMPLE * max(services)
