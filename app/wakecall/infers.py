"""Infers: accepting, sending, moving and settling them. (`waking` wakes rows for them, `upload` takes their answers in.)

Every decision here is one synchronous step. A step may set off others (a
settled infer frees its slot, which sends the next one), and it goes like this:

1. the task leaves the place it was in: its line, or its slot and its channel;
2. it is over: counted, remembered, its waiters and readers told;
3. then only, whatever that made possible: a `cancel` frame, the next infers of the row.

So whoever looks in the middle sees a task either wholly in its place or over.

An infer is bound to a row late: it waits in the line of a pool, and whichever row of it has a slot first takes it. Until its
publisher can have begun to generate it may move: its row is lost with the frame untaken, or its publisher answers 429 or
503 itself. From then on, never.
"""

from __future__ import annotations

import secrets
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, cast

import trio

from .deadlines import Deadline
from .directory import Directory, Pool, Row, Target
from .errors import (
    DeadlineExceeded,
    InferCancelled,
    ModelNotFound,
    ModelOffline,
    Phase,
    PublisherLostWhileWaking,
    QueueFull,
    ShuttingDown,
    WakecallError,
)
from .frames import CancelReason
from .keyring import Claim
from .models import InferRequest, InferSettled, Status
from .placing import Place, Placer, is_hopeful
from .stopping import Stops
from .task import Due, Infer, InferState
from .usage import UNSAID
from .waking import Waker

if TYPE_CHECKING:
    from .dispatch import Dispatcher

__all__ = ["Infers"]

_PHASE_OF: Final[dict[Due, Phase]] = {Due.FIRST_BYTE: "first_byte", Due.IDLE: "idle", Due.TOTAL: "total"}

#: Seconds between looks at a row that is avoided for so many infers, while some wait.
_PROBE_S: Final = 1.0

_HELD: Final = "The model takes no requests for the time being: it is paused, or being drained."

#: A caller's own timeout tells something of a row where it is so many times what the answers of its pool take.
_AMPLE: Final = 10.0

Outcome = Literal["completed", "failed", "cancelled"]


def new_task_id() -> str:
    """An id with 128 random bits, never used twice."""
    return secrets.token_urlsafe(16)


class Infers:
    """The part of `Dispatcher` that has to do with a single infer. Works on a `Directory`."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._config = directory.config
        self._counters = directory.counters
        self._quiet: trio.Event | None = None
        self.placer: Final = Placer(directory)
        self.waker: Final = Waker(directory, cast("Dispatcher", self))
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
        infer = Infer(new_task_id(), name, route, request, self._config, now, total_s, self.cancel)
        infer.claim = claim
        place, full = self.placer.find_place(infer, 0)
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
        self._take(infer, place)
        return infer

    def _take(self, infer: Infer, place: Place) -> None:
        """Send it, or have it wait, as has been decided. It is counted as waiting."""
        infer.stage = place.stage
        infer.pool, infer.only = place.target
        if place.decision.row is not None:
            key = None if infer.claim is None else infer.claim.caller.key_id
            infer.pool.line.note_unwaited(key, infer.request.priority)
            self._send(infer, infer.pool.rows[place.decision.row])
            return
        infer.deadline = Deadline(partial(self._on_waiting_due, infer))
        self.placer.add_to_line(infer, place.target, first=False)
        self.enter_phase(infer)
        if place.decision.wake is not None:
            self.waker.want(infer.pool.rows[place.decision.wake])
        for row in self.placer.candidates(infer):
            # Those that wait may be waiting for others than the one that is free.
            if self.placer.has_slot(row):
                self.pump(row)

    # Waiting --------------------------------------------------------------------------------------------------------

    def enter_phase(self, infer: Infer) -> None:
        """A waiting infer's phase begins, with a clock of its own; `total` spans all."""
        assert infer.pool is not None
        config, rows = self._config, self.placer.candidates(infer)
        infer.phase = "wake" if self.waker.is_awaited(rows) else "queue"
        if infer.phase == "queue":
            limit = self.placer.queue_s(Target(infer.pool, infer.only))
        else:
            # The wake has a clock of its own; where both are up at once it is the wake that failed (`_on_waiting_due`).
            limit = max((row.llm.wake_s or 0.0 for row in rows), default=0.0)
            limit = max(limit, config.wake_s)
        infer.phase_until = trio.current_time() + limit
        assert infer.deadline is not None
        self._directory.waiting_deadlines.arm(infer.deadline, min(infer.phase_until, infer.total_until))

    def review_phases(self, pool: Pool, row: Row | None = None) -> None:
        """Whoever waits there, for this row at the least, is in the phase that he is in now."""
        awaited: dict[tuple[str | None, frozenset[str]], bool] = {}  # for thousands may wait for hundreds
        for infer in list(pool.line):
            if row is not None and infer.only is not None and infer.only != row.llm.name:
                continue
            whom = infer.only, infer.refused_by
            if whom not in awaited:
                awaited[whom] = self.waker.is_awaited(self.placer.candidates(infer))
            if (infer.phase == "wake") is not awaited[whom]:
                self.enter_phase(infer)

    def _on_waiting_due(self, infer: Infer) -> None:
        now = trio.current_time()
        for row in self.placer.candidates(infer):
            wake = row.wake
            if wake is not None and wake.deadline is not None and wake.deadline.due <= now:
                # Two heaps, and no order between them: all who wait for it get the one answer.
                self.waker.on_due(wake)
                if infer.state is not InferState.WAITING or min(infer.phase_until, infer.total_until) > now:
                    return
        phase: Phase = "total"
        if infer.phase_until < infer.total_until or infer.request.timeout_s is not None:
            phase = "wake" if infer.phase == "wake" else "queue"
        self.settle(infer, "failed", _out_of_time(phase))

    def strand(self, pool: Pool, *, lost: bool = False) -> None:
        """A row of the pool can be had no more: whoever waits and has none left goes on to the next name, or fails.

        Args:
            pool: where they wait.
            lost: whether that was for its publisher's end.
        """
        hopeful: dict[tuple[str | None, frozenset[str]], bool] = {}  # for thousands may wait for hundreds
        for infer in list(pool.line):
            if infer.pool is not pool or infer.state is not InferState.WAITING:
                continue  # an earlier one's end has seen to it
            whom = infer.only, infer.refused_by
            if whom not in hopeful:
                hopeful[whom] = any(is_hopeful(row, infer) for row in self.placer.candidates(infer))
            if hopeful[whom]:
                continue
            if not self.move_on(infer):
                waking = lost and infer.phase == "wake"
                self.settle(infer, "failed", PublisherLostWhileWaking() if waking else self._offline(infer))
        if pool.line:
            # Those who have one left may have to have it woken.
            self.review_phases(pool)
            self.waker.consider(pool)

    def _offline(self, infer: Infer) -> ModelOffline:
        """Nobody is there for it; or somebody who takes nothing, by his own or an operator's will."""
        return ModelOffline(_HELD if self.placer.is_held(infer) else None)

    def move_on(self, infer: Infer) -> bool:
        """Have one that waits go on to the names after the one that it waits for. Returns whether one of them has it."""
        assert infer.pool is not None
        place, _ = self.placer.find_place(infer, infer.stage + 1)
        if place is None:
            return False
        infer.pool.line.discard(infer)
        self._disarm_waiting(infer)
        self._take(infer, place)
        return True

    def avoid(self, infer: Infer, row: Row) -> None:
        """One that waits for any row of a pool shall not go to this one."""
        assert infer.pool is not None
        infer.refused_by |= {row.llm.name}
        if infer.only is None:
            infer.pool.line.discard(infer)
            self.placer.add_to_line(infer, Target(infer.pool, None), first=False)

    def _disarm_waiting(self, infer: Infer) -> None:
        if infer.deadline is not None:
            self._directory.waiting_deadlines.disarm(infer.deadline)
            infer.deadline = None

    # Sending --------------------------------------------------------------------------------------------------------

    def _send(self, infer: Infer, row: Row) -> None:
        """Take a slot, and put the frame on the channel."""
        directory = self._directory
        assert row.session is not None
        channel = row.session.channel
        assert channel is not None
        taken, most = row.in_flight + row.stopping, row.llm.max_concurrency
        assert most is None or taken < most, "no slot is free"
        self._disarm_waiting(infer)
        now = trio.current_time()
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
            phase = _PHASE_OF[why]
            if why is Due.TOTAL and infer.request.timeout_s is not None and infer.request.stream:
                phase = "first_byte" if infer.first_byte_at is None else "total"
            self.settle(infer, "failed", _out_of_time(phase), cancel="deadline_exceeded")

    def pump(self, row: Row) -> None:
        """Let those who wait for a row go, as far as there are slots; or have rows woken for them."""
        pool, session = row.pool, row.session
        if not pool.line or session is None or session.channel is None:
            return
        channel, llm, health = session.channel, row.llm, row.health
        if llm.status is Status.ACTIVE and not llm.paused and llm.hold != "pause":
            now = trio.current_time()
            alone = self.placer.is_alone(pool, now)
            named = llm.hold == "drain"
            if not alone and health.is_avoided(now, pool.sent):
                # Whoever asked for it by name gets it all the same.
                named = True
                self._probe_avoided(pool, now)
            # On trial: one at a time of those who could have gone elsewhere.
            on_trial = not alone and not named and health.is_on_trial(now)
            accepts = partial(_has_not_refused, llm.name)
            while channel.has_room and channel.ended is None and not row.yielding:
                taken = row.in_flight + row.stopping
                if llm.max_concurrency is not None and taken >= llm.max_concurrency:
                    break
                infer = pool.line.pop(llm.name, accepts, only_named=named or (on_trial and taken > 0))
                if infer is None:
                    break
                self._send(infer, row)
        if pool.line:
            self.waker.consider(pool)
        if not pool.waiting:
            self.waker.spare(pool)

    def pump_pool(self, pool: Pool) -> None:
        """Let those who wait for a pool go, as far as any of its rows has slots."""
        for row in list(pool.rows.values()):
            if not pool.line:
                return
            self.pump(row)

    def _probe_avoided(self, pool: Pool, now: float) -> None:
        """Look again when a row that is avoided may be tried: for whoever waits, nothing else need happen until then."""

        def look() -> None:
            pool.probe = None
            self.pump_pool(pool)

        for row in pool.rows.values():
            if row.health.is_avoided(now, pool.sent):
                until = row.health.avoided_until
                at = until if now < until else now + _PROBE_S
                if pool.probe is None:
                    pool.probe = Deadline(look)
                if at < pool.probe.due:
                    self._directory.waiting_deadlines.arm(pool.probe, at)

    # Moving ---------------------------------------------------------------------------------------------------------

    def move_refused(self, infer: Infer) -> bool:
        """Its publisher would not have it (it answered 429 or 503 itself): let another row have it, if there is one.

        Each row is asked once. Returns whether another has it now: then it has a new id, and the old one is settled.
        """
        row = infer.row
        assert row is not None
        before, infer.refused_by = infer.refused_by, infer.refused_by | {row.llm.name}
        place, _ = self.placer.find_place(infer, infer.stage)
        if place is None:
            infer.refused_by = before
            return False  # the end that this will be is held against it
        row.health.note_failure(trio.current_time(), row.pool.sent)
        assert infer.channel is not None
        self._directory.remember(infer.channel.session, infer.task_id, by_publisher=True)
        self._leave_channel(infer)
        upload, infer.upload = infer.upload, None
        infer.task_id = new_task_id()
        if upload is not None:
            upload._task_is_over()
        infer.received = 0
        infer.pieces = False
        infer.refusal, infer.engine_status, infer.content_type = None, 200, None
        infer.retry_after_s = None
        self._wait_again(infer)
        self._take(infer, place)
        self._slot_is_free(row)
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
        infer.pool, infer.only = target
        infer.deadline = Deadline(partial(self._on_waiting_due, infer))
        self.placer.add_to_line(infer, target, first=True)
        self.enter_phase(infer)

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
            directory.remember(channel.session, infer.task_id, by_publisher or outcome == "completed")
            self._judge(infer, row, outcome, by_publisher, now)
        # 2
        infer.state = InferState.OVER
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
        if row is not None and channel is not None:
            if cancel is not None and infer.frame_taken:
                self.stops.hold(infer, row, channel, now)
                channel.send_cancel(infer.task_id, cancel)
            elif cancel is not None:
                channel.withdraw(infer.task_id)
            self._slot_is_free(row)
        for each in wanted:
            # Nobody may want it any more: whoever was to make way for it goes on.
            assert each.session is not None
            assert each.llm.group is not None
            self.waker.review_group(each.session, each.llm.group)
        if self._quiet is not None and counters.in_flight == counters.waiting == 0:
            self._quiet.set()
            self._quiet = None

    def _slot_is_free(self, row: Row) -> None:
        """Whatever an infer's end, or its going elsewhere, makes possible."""
        if row.health.is_avoided(trio.current_time(), row.pool.sent):
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

    # The lifecycle's consequences -----------------------------------------------------------------------------------


def _has_not_refused(name: str, infer: Infer) -> bool:
    return name not in infer.refused_by


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


def _out_of_time(phase: Phase) -> DeadlineExceeded:
    messages = {
        "queue": "No slot of the model was free in time.",
        "wake": "The model was not awake in this request's time.",
        "first_byte": "The model sent no first byte in time.",
        "idle": "The model's answer paused for too long.",
        "total": "The request took longer than a request may.",
    }
    return DeadlineExceeded(messages[phase], phase=phase)
