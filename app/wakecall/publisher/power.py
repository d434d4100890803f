"""Whether the engine is awake: one belief for the whole engine, and the two ways to change it.

All models of a publisher live in one engine and share its commands, so that they sleep and wake together; a wake is
joined by whoever needs one, be it a wake frame of any of them or an infer that reached a sleeping engine. (Models that take
turns on one engine have a belief each: swap.py.)

    AWAKE ── idle for long enough ──> GOING ── 200, nothing in flight ──> ASLEEP (the hibernate command may still run)
      ^                                 │                                    │
      ├── a wake frame, or no 200 ──────┘                                    │
      └── a wake: health, else the command and then health ──────────────────┘

A wake outlives those who wait for it: the machine is booting anyway. It ends at its own deadline.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

import trio

from ..faults import stacks_of
from .commands import Commands
from .config import AnnouncedStatus, PublishedModel, PublisherConfig
from .events import (
    Asleep,
    Awake,
    GoingToSleep,
    PublisherEvent,
    SleepFailed,
    WakeFailed,
    Waking,
)
from .process import CommandFailed

logger = logging.getLogger(__name__)


class WakeError(Exception):
    """The wake failed; the message is for its waiters."""


class AnnounceFailed(Exception):
    """The broker did not acknowledge that the engine goes to sleep."""


@dataclass(eq=False, slots=True)
class Visit:
    """An infer at this publisher, from its frame to its end; inside: it works with a model that is awake."""

    llm: str
    is_inside: bool = False


class _State(enum.Enum):
    AWAKE = enum.auto()
    GOING = enum.auto()
    ASLEEP = enum.auto()


class _WakeRun:
    def __init__(self, deadline: float) -> None:
        self.scope = trio.CancelScope(deadline=deadline)
        self.done = trio.Event()
        self.error: str | None = "the publisher stopped during the wake"


class Power:
    """The engine's sleep, as this publisher believes and governs it.

    Args:
        config: what may sleep, and when.
        commands: start and stop it.
        emit: takes events.
        nursery: in which wakes run.
        announce: tells the broker that these rows hibernate, and returns after its 200.

    `on_change` is called when the status to announce has changed without the broker knowing.
    """

    def __init__(
        self,
        config: PublisherConfig,
        commands: Commands,
        *,
        emit: Callable[[PublisherEvent], None],
        nursery: trio.Nursery,
        announce: Callable[[Iterable[str]], Awaitable[None]],
        on_change: Callable[[], None],
    ) -> None:
        self._config = config
        self._commands = commands
        self._emit = emit
        self._nursery = nursery
        self._announce = announce
        self._on_change = on_change
        # The entire mutable state.
        self._models: Sequence[PublishedModel] = ()
        self._state = _State.ASLEEP if config.hibernating else _State.AWAKE
        self._in_flight = 0
        self._last_activity = trio.current_time()
        self._wake: _WakeRun | None = None
        self._going: trio.CancelScope | None = None
        self._command_over: trio.Event | None = None
        self._changed = trio.Event()

    @property
    def is_awake(self) -> bool:
        """Whether an infer may go to the engine without waking it first. A belief: the engine may have died."""
        return self._state is not _State.ASLEEP

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @property
    def can_wake(self) -> bool:
        return self._commands.can_wake

    def register_status(self, llm: str) -> AnnouncedStatus:
        """What a register says of a row: the same of all."""
        return "active" if self._state is _State.AWAKE else "hibernating"

    def heartbeat_statuses(self) -> dict[str, AnnouncedStatus]:
        """What a heartbeat says of which rows; of none where it had better say nothing.

        During a wake, `active` would count as its success before the engine answers. While going to sleep, the
        announcement is a heartbeat of its own. An engine whose sleep is not ours is whatever its rows were.
        """
        if not self._config.manages_sleep or self._wake is not None or self._state is _State.GOING:
            return {}
        return {model.name: self.register_status(model.name) for model in self._models}

    async def begin(self, models: Sequence[PublishedModel]) -> None:
        """Learn the models. An engine that can be woken and does not answer is asleep, whatever nobody said."""
        self._models = models
        if self._state is _State.AWAKE and self.can_wake and not await self._commands.is_healthy():
            self._state = _State.ASLEEP

    def infer_arrived(self, llm: str) -> Visit:
        self._in_flight += 1
        self._notify()
        return Visit(llm)

    def infer_left(self, visit: Visit) -> None:
        assert self._in_flight > 0
        self._in_flight -= 1
        self._notify()

    async def admit(self, visit: Visit) -> None:
        """Return when the infer's model is awake, to the best of our belief. Raises WakeError: it cannot be woken."""
        if not self.is_awake:
            await self.wake(visit.llm, self._config.wake_s)

    async def recover(self, visit: Visit) -> None:
        """The engine refused the infer a connection: as `admit`, but it is awake only if that proves true now."""
        if self._state is _State.AWAKE and self._wake is None:
            self._state = _State.ASLEEP
            self._notify()
        await self.wake(visit.llm, self._config.wake_s)

    async def wait_until_idle(self) -> None:
        """Return when no infer is in flight."""
        while self._in_flight:
            await self._changed.wait()

    async def wake(self, llm: str, deadline_s: float, hibernate: Iterable[str] = ()) -> None:
        """Wake the engine, or join the wake that is under way; a cancelled waiter leaves it running.

        Args:
            llm: for which model; all are woken.
            hibernate: which are to sleep first; here they share one sleep, and none are.
            deadline_s: seconds that this waiter grants it; the latest of all waiters counts.

        Raises:
            WakeError: it failed.
        """
        deadline = trio.current_time() + deadline_s
        if self._going is not None:
            self._going.cancel()
        run = self._wake
        if run is None:
            run = self._wake = _WakeRun(deadline)
            self._nursery.start_soon(self._run_wake, run)
        run.scope.deadline = max(run.scope.deadline, deadline)
        await run.done.wait()
        if run.error is not None:
            raise WakeError(run.error)

    async def _run_wake(self, run: _WakeRun) -> None:
        started = trio.current_time()
        self._emit(Waking())
        ran_command = False
        try:
            with run.scope:
                if self._command_over is not None:
                    await self._command_over.wait()
                ran_command = await self._commands.bring_up(self._the_one)
                run.error = None
            if run.scope.cancelled_caught:
                run.error = self._commands.overdue(run.scope.deadline - started)
        except CommandFailed as error:
            run.error = str(error)
        except Exception as error:
            logger.error("a wake failed in the publisher itself: %s", stacks_of(error))
            run.error = f"the publisher failed: {type(error).__name__}"
        finally:
            self._wake = None
            run.done.set()
            self._state = _State.AWAKE if run.error is None else _State.ASLEEP
            self._notify()
        if run.error is None:
            self._emit(Awake(seconds=trio.current_time() - started, ran_command=ran_command))
            self._on_change()
        else:
            self._emit(WakeFailed(run.error))

    async def run_idle(self) -> None:
        """Put the engine to sleep whenever it has been idle for `hibernate_after_s`; until cancelled."""
        after_s = self._config.hibernate_after_s
        assert after_s is not None
        while True:
            if self._state is not _State.AWAKE or self._in_flight or self._wake is not None:
                await self._changed.wait()
                continue
            with trio.move_on_at(self._last_activity + after_s) as quiet:
                await self._changed.wait()
            if quiet.cancelled_caught:
                await self._go_to_sleep()

    async def _go_to_sleep(self) -> None:
        self._emit(GoingToSleep())
        self._state = _State.GOING
        failure: str | None = None
        with trio.CancelScope() as self._going:
            try:
                await self._announce([model.name for model in self._models])
                # Whatever was sent before the broker knew is still served.
                await self.wait_until_idle()
            except AnnounceFailed as error:
                failure = str(error)
        woken = self._going.cancel_called
        self._going = None
        if failure is not None or woken:
            self._state = _State.AWAKE
            self._notify()
            self._on_change()
            self._emit(SleepFailed(failure or "a wake came first"))
            return
        # No checkpoint since the last infer left: from here on an infer waits for the command and wakes the engine.
        self._state = _State.ASLEEP
        self._command_over = trio.Event()
        try:
            failure = await self._commands.put_down(self._the_one)
            if failure is not None and await self._commands.is_healthy():
                self._state = _State.AWAKE
        finally:
            self._command_over.set()
            self._command_over = None
            self._notify()
        self._emit(Asleep() if failure is None else SleepFailed(failure))
        self._on_change()

    def trim_log(self) -> None:
        """Keep the commands' error output small: a daemon may write to it for months."""
        self._commands.trim_log()

    @property
    def _the_one(self) -> PublishedModel | None:
        return self._models[0] if len(self._models) == 1 else None

    def _notify(self) -> None:
        self._last_activity = trio.current_time()
        self._changed.set()
        self._changed = trio.Event()
