"""Infers and wakes: accepting, sending and settling them. (`upload` takes their answers in.)

Every decision here is one synchronous step. A step may set off others (a
settled infer frees its slot, which sends the next one), and it goes like this:

1. the task leaves the place it was in: its line, or its slot and its channel;
2. it is over: counted, remembered, its waiters and readers told;
3. then only, whatever that made possible: a `cancel` frame, the next infers of the row.

So whoever looks in the middle sees a task either wholly in its place or over.
"""

from __future__ import annotations

import secrets
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

import trio

from .deadlines import Deadline
from .directory import Directory, Row
from .errors import (
    DeadlineExceeded,
    InferCancelled,
    ModelNotFound,
    ModelOffline,
    Phase,
    PublisherDisconnected,
    PublisherLostWhileWaking,
    QueueFull,
    ShutDownAtWork,
    ShuttingDown,
    WakecallError,
    WakeTimeout,
)
from .frames import CancelReason
from .keyring import Claim
from .lifecycle import RowEvent
from .models import InferRequest, InferSettled, Status, WakeSettled
from .placement import Placement, RowLoad, place
from .task import Due, Infer, InferState
from .wake import Wake

if TYPE_CHECKING:
    from .session import Channel

__all__ = ["Dispatcher"]

_PHASE_OF: Final[dict[Due, Phase]] = {Due.FIRST_BYTE: "first_byte", Due.IDLE: "idle", Due.TOTAL: "total"}

#: How fast the estimate of a row's service time follows what is measured.
_SERVICE_WEIGHT: Final = 0.2


def new_task_id() -> str:
    """An id with 128 random bits, never used twice."""
    return secrets.token_urlsafe(16)


class Dispatcher:
    """Works on a `Directory`; made by the broker."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._config = directory.config
        self._counters = directory.counters
        self._quiet: trio.Event | None = None

    # Accepting ------------------------------------------------------------------------------------------------------

    def accept(self, name: str, request: InferRequest, claim: Claim | None) -> Infer:
        """Take an infer on, as `placement.place` decides. Once accepted, it holds the claim until its outcome.

        Raises:
            ShuttingDown, ModelNotFound, QueueFull: not accepted.
            ModelOffline: accepted, and failed in the same step.
        """
        directory, counters = self._directory, self._counters
        if directory.stopping:
            raise ShuttingDown
        row = directory.rows.get(name)
        if row is None or (claim is not None and not claim.caller.may_use(name)):
            raise ModelNotFound(param="model")
        decision = place(self._load_of(row))
        if decision is Placement.FULL:
            raise QueueFull(retry_after_s=self._estimate_wait(row))
        if claim is not None:
            claim.take_over()
        now = trio.current_time()
        infer = Infer(new_task_id(), row, request, self._config, now, self.cancel)
        infer.claim = claim
        counters.accepted += 1
        counters.waiting += 1
        if decision is Placement.OFFLINE:
            infer.phase = "offline"
            self.settle(infer, "failed", ModelOffline())
            raise ModelOffline
        if decision is Placement.DISPATCH:
            self._send(infer)
            return infer
        infer.deadline = Deadline(partial(self._on_waiting_due, infer))
        row.waiting[infer.task_id] = infer
        self._enter_phase(infer, "queue" if row.llm.status is Status.ACTIVE else "wake")
        if decision is Placement.WAKE:
            self._start_wake(row)
        return infer

    def _load_of(self, row: Row) -> RowLoad:
        session = row.session
        channel = None if session is None else session.channel
        waiting = len(row.waiting)
        free = self._config.max_waiting - self._counters.waiting
        return RowLoad(
            status=row.llm.status,
            kind=row.llm.kind,
            connected=channel is not None,
            succeeding=session is not None and session.pending is not None,
            room=channel is not None and channel.has_room,
            in_flight=row.in_flight,
            max_concurrency=row.llm.max_concurrency,
            waiting=waiting,
            waking=row.wake is not None,
            max_waiting=min(self._config.max_waiting_per_llm, waiting + free),
        )

    def _estimate_wait(self, row: Row) -> float:
        """Seconds after which some of those that wait will have been served: theirs, over the slots."""
        slots = row.llm.max_concurrency or max(row.in_flight, 1)
        return min(max(len(row.waiting) * row.service_s / slots, 1.0), 60.0)

    def _enter_phase(self, infer: Infer, phase: Literal["queue", "wake"]) -> None:
        """A waiting infer's phase begins, with a clock of its own; `total` spans all."""
        config, row = self._config, infer.row
        # The wake has a clock of its own; where both are up at once it is the wake that failed (`_on_waiting_due`).
        limit = config.queue_s if phase == "queue" else max(config.wake_s, row.llm.wake_s or 0.0)
        infer.phase = phase
        infer.phase_until = trio.current_time() + limit
        assert infer.deadline is not None
        self._directory.waiting_deadlines.arm(infer.deadline, min(infer.phase_until, infer.total_until))

    def _on_waiting_due(self, infer: Infer) -> None:
        wake = infer.row.wake
        if wake is not None and wake.deadline is not None and wake.deadline.due <= trio.current_time():
            # Two heaps, and no order between them: all who wait for it get the one answer.
            self._on_wake_due(wake)
            return
        phase: Phase = "total"
        if infer.phase_until < infer.total_until:
            phase = "wake" if infer.phase == "wake" else "queue"
        self.settle(infer, "failed", _out_of_time(phase))

    # Sending --------------------------------------------------------------------------------------------------------

    def _send(self, infer: Infer) -> None:
        """Take a slot, and put the frame on the channel."""
        row, directory = infer.row, self._directory
        assert row.session is not None
        channel = row.session.channel
        assert channel is not None
        assert row.llm.max_concurrency is None or row.in_flight < row.llm.max_concurrency, "no slot is free"
        if infer.deadline is not None:
            directory.waiting_deadlines.disarm(infer.deadline)
        now = trio.current_time()
        row.in_flight += 1
        self._counters.waiting -= 1
        self._counters.in_flight += 1
        infer.state = InferState.SENT
        infer.phase = "first_byte"
        infer.channel = channel
        infer.sent_at = now
        directory.tasks[infer.task_id] = infer
        infer.deadline = Deadline(partial(self._on_sent_due, infer))
        channel.send_infer(infer, infer.next_due(self._config)[0])

    def _on_sent_due(self, infer: Infer) -> None:
        due, why = infer.next_due(self._config)
        if due > trio.current_time():
            assert infer.deadline is not None
            assert infer.channel is not None
            infer.channel.hasten(infer.deadline, due)
        elif why is Due.STALL:
            self.settle(infer, "cancelled", InferCancelled(), cancel="client_disconnected")
        else:
            self.settle(infer, "failed", _out_of_time(_PHASE_OF[why]), cancel="deadline_exceeded")

    def pump(self, row: Row) -> None:
        """Let those who wait for a row go, as far as there are slots; or wake the row for them."""
        if not row.waiting or row.session is None or row.session.channel is None:
            return
        channel = row.session.channel
        if row.llm.status is Status.HIBERNATING:
            if row.wake is None:
                for infer in row.waiting.values():
                    if infer.phase != "wake":
                        self._enter_phase(infer, "wake")
                self._start_wake(row)
        elif row.llm.status is Status.ACTIVE:
            limit = row.llm.max_concurrency
            while (
                row.waiting and channel.has_room and channel.ended is None and (limit is None or row.in_flight < limit)
            ):
                _, infer = row.waiting.popitem(last=False)
                self._send(infer)

    # Settling infers ------------------------------------------------------------------------------------------------

    def cancel(self, infer: Infer) -> None:
        """Its caller leaves."""
        self.settle(infer, "cancelled", InferCancelled(), cancel="client_disconnected")

    def settle(
        self,
        infer: Infer,
        outcome: Literal["completed", "failed", "cancelled"],
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
        directory, counters, row = self._directory, self._counters, infer.row
        now = trio.current_time()
        channel = infer.channel
        # 1
        if infer.state is InferState.WAITING:
            row.waiting.pop(infer.task_id, None)
            counters.waiting -= 1
            if infer.deadline is not None:
                directory.waiting_deadlines.disarm(infer.deadline)
        else:
            assert channel is not None
            assert row.in_flight > 0, "a slot that nobody took cannot be freed"
            row.in_flight -= 1
            counters.in_flight -= 1
            del directory.tasks[infer.task_id]
            channel.forget(infer)
            directory.remember(channel.session, infer.task_id, by_publisher or outcome == "completed")
            if outcome == "completed":
                row.service_s += (now - infer.sent_at - row.service_s) * _SERVICE_WEIGHT
        # 2
        infer.state = InferState.OVER
        infer.deadline = None
        infer.error = error
        counters.count(outcome)
        infer.stream.end(error)
        infer.head_ready.set()
        infer.done.set()
        if infer.upload is not None:
            infer.upload._task_is_over()
        if infer.claim is not None:
            infer.claim.release()
        self._tell(infer, outcome, now)
        # 3
        if cancel is not None and channel is not None:
            channel.send_cancel(infer.task_id, cancel)
        self.pump(row)
        if self._quiet is not None and counters.in_flight == counters.waiting == 0:
            self._quiet.set()
            self._quiet = None

    def _tell(self, infer: Infer, outcome: Literal["completed", "failed", "cancelled"], now: float) -> None:
        if not self._directory.observers:
            return
        headed = infer.first_byte_at is not None
        self._directory.notify(
            InferSettled(
                task_id=infer.task_id,
                request_id=infer.request.request_id,
                llm=infer.row.llm.name,
                outcome=outcome,
                code="completed" if infer.error is None else infer.error.code,
                phase=infer.phase,
                seconds=now - infer.accepted_at,
                first_byte_s=None if infer.first_byte_at is None else infer.first_byte_at - infer.accepted_at,
                engine_status=infer.engine_status if headed else None,
                key_id=None if infer.claim is None else infer.claim.caller.key_id,
            )
        )

    async def wait_quiet(self) -> None:
        """Return when nothing waits and nothing is in flight."""
        while self._counters.in_flight or self._counters.waiting:
            quiet = self._quiet = self._quiet if self._quiet is not None else trio.Event()
            await quiet.wait()

    # Wakes ----------------------------------------------------------------------------------------------------------

    def _start_wake(self, row: Row) -> None:
        assert row.wake is None, "one wake a row"
        assert row.session is not None
        channel = row.session.channel
        assert channel is not None
        now = trio.current_time()
        limit = row.llm.wake_s or self._config.wake_s
        wake = Wake(new_task_id(), row, channel, now)
        row.wake = wake
        wake.deadline = Deadline(partial(self._on_wake_due, wake))
        self._directory.tasks[wake.task_id] = wake
        self._counters.wakes_started += 1
        channel.send_wake(wake, limit)

    def _on_wake_due(self, wake: Wake) -> None:
        self.settle_wake(wake, "timed_out", WakeTimeout(), cancel="deadline_exceeded")

    def settle_wake(
        self,
        wake: Wake,
        outcome: Literal["succeeded", "failed", "timed_out", "lost"],
        error: WakecallError | None,
        *,
        cancel: CancelReason | None = None,
        by_publisher: bool = False,
    ) -> None:
        """Give a wake its one outcome. `error` is what those who wait for it get, unless it succeeded."""
        if wake.is_over:
            return
        directory, row, channel = self._directory, wake.row, wake.channel
        # 1
        del directory.tasks[wake.task_id]
        channel.forget(wake)
        directory.remember(channel.session, wake.task_id, by_publisher)
        # 2
        wake.is_over = True
        waiters = [infer for infer in row.waiting.values() if infer.phase == "wake"]
        if outcome == "succeeded":
            row.wake = None
            self._counters.wakes_succeeded += 1
        else:
            self._counters.wakes_failed += 1
        if wake.upload is not None:
            wake.upload._task_is_over()
        seconds = trio.current_time() - wake.started_at
        directory.notify(WakeSettled(wake.task_id, row.llm.name, outcome, seconds, len(waiters)))
        # 3
        if cancel is not None:
            channel.send_cancel(wake.task_id, cancel)
        if outcome == "succeeded":
            self.step(row, RowEvent.WOKEN, bump=True)
        else:
            assert error is not None
            for infer in waiters:
                self.settle(infer, "failed", type(error)(error.message))
            # Only now: with its wake gone, the end of the first would have woken the row again for the rest.
            row.wake = None
            self.step(row, RowEvent.WAKE_FAILED)

    # The lifecycle's consequences -----------------------------------------------------------------------------------

    def step(self, row: Row, event: RowEvent, *, bump: bool = False) -> None:
        """Move a row along its lifecycle, with all that hangs on it: what makes it active frees those who wait for it,
        what makes it inactive fails them, and what puts it to sleep with some still waiting wakes it for them."""
        if row.wake is not None:
            hibernating = row.llm.status is Status.HIBERNATING
            # `hibernating` needs nothing said: it was sent before the wake was heard of, and changes nothing.
            if event is RowEvent.REGISTER_ACTIVE or (hibernating and event is RowEvent.REPORT_ACTIVE):
                # It counts as the wake's success, and does what this event would have done.
                self.settle_wake(row.wake, "succeeded", None, by_publisher=True)
        self._directory.step(row, event, bump=bump)
        if row.llm.status is Status.ACTIVE:
            for infer in row.waiting.values():
                if infer.phase == "wake":
                    self._enter_phase(infer, "queue")
        elif row.llm.status is Status.INACTIVE:
            lost = event is RowEvent.LOST
            for infer in list(row.waiting.values()):
                waking = lost and infer.phase == "wake"
                self.settle(infer, "failed", PublisherLostWhileWaking() if waking else ModelOffline())
        self.pump(row)

    def lose_tasks(self, channel: Channel, *, shutdown: bool = False) -> int:
        """A channel has ended, or is about to: fail all that was sent on it. Returns how many infers that were."""
        infers = [task for task in channel.tasks.values() if isinstance(task, Infer)]
        wakes = [task for task in channel.tasks.values() if isinstance(task, Wake)]
        cancel: CancelReason | None = "shutdown" if shutdown else None
        for wake in wakes:
            self.settle_wake(wake, "lost", ShuttingDown() if shutdown else PublisherLostWhileWaking(), cancel=cancel)
        for infer in infers:
            self.settle(infer, "failed", ShutDownAtWork() if shutdown else PublisherDisconnected(), cancel=cancel)
        return len(infers)

    def refuse_waiting(self, row: Row, error: type[WakecallError]) -> None:
        """Fail all who wait for a row."""
        for infer in list(row.waiting.values()):
            self.settle(infer, "failed", error())

    def fail_row(self, row: Row, message: str = "The model was deleted while it worked on this request.") -> None:
        """A row is about to be no more its session's: fail everything on it, and tell its publisher to stop.

        Args:
            row: which.
            message: for those whose frame was sent.
        """
        self.refuse_waiting(row, ModelOffline)
        if row.wake is not None:
            self.settle_wake(row.wake, "lost", ModelOffline(), cancel="shutdown")
        for task in list(self._directory.tasks.values()) if row.in_flight else ():
            if isinstance(task, Infer) and task.row is row:
                # Its publisher may have generated already: nobody is to repeat it.
                self.settle(task, "failed", PublisherDisconnected(message), cancel="shutdown")


def _out_of_time(phase: Phase) -> DeadlineExceeded:
    messages = {
        "queue": "No slot of the model was free in time.",
        "wake": "The model was not awake in this request's time.",
        "first_byte": "The model sent no first byte in time.",
        "idle": "The model's answer paused for too long.",
        "total": "The request took longer than a request may.",
    }
    return DeadlineExceeded(messages[phase], phase=phase)
