"""Those who wait: in which line, in which phase and until when, and who is next when a row has a slot.

An infer waits in the line of a pool, bound to no row. It leaves it in one of four ways: a row takes it (`pump`), nobody is
left who could and it goes on to the next of its names (`move_on`), its time is up, or its caller leaves. How it is sent, and
how it ends, is for `infers` to say.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Final, cast

import trio

from .deadlines import Deadline
from .directory import Directory
from .errors import DeadlineExceeded, ModelOffline, Phase, PublisherLostWhileWaking, WakecallError
from .frames import CancelReason
from .models import Status
from .placing import Place, Placer, is_hopeful
from .row import Pool, Row, Target
from .task import Infer, InferState, Outcome
from .waking import Waker

if TYPE_CHECKING:
    from .dispatch import Dispatcher

__all__ = ["Waiting", "out_of_time"]

#: Seconds between looks at a row that is avoided for so many infers, while some wait.
_PROBE_S: Final = 1.0

#: Seconds that one step may take between two looks at the clock.
_STEP_S: Final = 0.01

_HELD: Final = "The model takes no requests for the time being: it is paused, or being drained."


class Waiting(ABC):
    """The part of `Dispatcher` that has to do with those who wait. Works on a `Directory`."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._config = directory.config
        self._counters = directory.counters
        self.placer: Final = Placer(directory)
        self.waker: Final = Waker(directory, cast("Dispatcher", self))

    @abstractmethod
    def _take(self, infer: Infer, place: Place, now: float) -> None: ...

    @abstractmethod
    def _send(self, infer: Infer, row: Row, now: float) -> None: ...

    @abstractmethod
    def settle(
        self,
        infer: Infer,
        outcome: Outcome,
        error: WakecallError | None,
        *,
        cancel: CancelReason | None = None,
        by_publisher: bool = False,
    ) -> None: ...

    # In line --------------------------------------------------------------------------------------------------------

    def _wait(self, infer: Infer, target: Target, *, first: bool) -> None:
        infer.pool, infer.only = target
        infer.deadline = Deadline(partial(self._on_waiting_due, infer))
        self.placer.add_to_line(infer, target, first=first)
        self.enter_phase(infer)

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
        # A wake's time begins in the same step as that of the first who waits for it, but some instructions later.
        up_to = now + _STEP_S if infer.phase_until <= now else now
        for row in self.placer.candidates(infer):
            wake = row.wake
            if wake is not None and wake.deadline is not None and wake.deadline.due <= up_to:
                # Two heaps, and no order between them: all who wait for it get the one answer.
                self.waker.on_due(wake)
                if infer.state is not InferState.WAITING or min(infer.phase_until, infer.total_until) > now:
                    return
        phase: Phase = "total"
        if infer.phase_until < infer.total_until or infer.request.timeout_s is not None:
            phase = "wake" if infer.phase == "wake" else "queue"
        self.settle(infer, "failed", out_of_time(phase))

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
        now = trio.current_time()
        place, _ = self.placer.find_place(infer, infer.stage + 1, now)
        if place is None:
            return False
        infer.pool.line.discard(infer)
        self._disarm_waiting(infer)
        self._take(infer, place, now)
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

    # Whose turn it is -----------------------------------------------------------------------------------------------

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
                self._send(infer, row, now)
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


def _has_not_refused(name: str, infer: Infer) -> bool:
    return name not in infer.refused_by


def out_of_time(phase: Phase) -> DeadlineExceeded:
    """What a caller gets whose infer had no time left in this phase."""
    messages = {
        "queue": "No slot of the model was free in time.",
        "wake": "The model was not awake in this request's time.",
        "first_byte": "The model sent no first byte in time.",
        "idle": "The model's answer paused for too long.",
        "total": "The request took longer than a request may.",
    }
    return DeadlineExceeded(messages[phase], phase=phase)
