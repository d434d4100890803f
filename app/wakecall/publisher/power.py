"""Whether the engine is awake: one belief for the whole engine, and the two ways to change it.

All models of a publisher live in one engine and share its commands, so that they sleep and wake together; a wake is
joined by whoever needs one, be it a wake frame of any of them or an infer that reached a sleeping engine.

    AWAKE ── idle for long enough ──> GOING ── 200, nothing in flight ──> ASLEEP (the hibernate command may still run)
      ^                                 │                                    │
      ├── a wake frame, or no 200 ──────┘                                    │
      └── a wake: health, else the command and then health ──────────────────┘

A wake outlives those who wait for it: the machine is booting anyway. It ends at its own deadline.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from ..faults import stacks_of
from .config import AnnouncedStatus, PublisherConfig
from .engine import Engine
from .events import (
    Asleep,
    Awake,
    GoingToSleep,
    PublisherEvent,
    SleepFailed,
    WakeFailed,
    Waking,
)
from .process import CommandFailed, cut_log, last_line, open_command

logger = logging.getLogger(__name__)


class WakeError(Exception):
    """The wake failed; the message is for its waiters."""


class AnnounceFailed(Exception):
    """The broker did not acknowledge that the engine goes to sleep."""


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
        config: commands and times.
        engine: asked for its health.
        log: the commands' error output.
        emit: takes events.
        nursery: in which wakes run.
        announce: tells the broker `hibernating` and returns after its 200.

    `on_change` is called when the status to announce has changed without the broker knowing.
    """

    def __init__(
        self,
        config: PublisherConfig,
        engine: Engine,
        log: Path,
        *,
        emit: Callable[[PublisherEvent], None],
        nursery: trio.Nursery,
        announce: Callable[[], Awaitable[None]],
        on_change: Callable[[], None],
    ) -> None:
        self._config = config
        self._engine = engine
        self._log = log
        self._emit = emit
        self._nursery = nursery
        self._announce = announce
        self._on_change = on_change
        # The entire mutable state.
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
        return self._config.wake_command is not None

    def register_status(self) -> AnnouncedStatus:
        """What a register says of the rows."""
        return "active" if self._state is _State.AWAKE else "hibernating"

    def heartbeat_status(self) -> AnnouncedStatus | None:
        """What a heartbeat says of the rows; None where it had better say nothing.

        During a wake, `active` would count as its success before the engine answers. While going to sleep, the
        announcement is a heartbeat of its own. An engine whose sleep is not ours is whatever its rows were.
        """
        if not self._config.manages_sleep or self._wake is not None or self._state is _State.GOING:
            return None
        return "active" if self._state is _State.AWAKE else "hibernating"

    async def probe(self) -> None:
        """At the start: an engine that can be woken and does not answer is asleep, whatever nobody said."""
        if self._state is _State.AWAKE and self.can_wake and not await self._engine.is_healthy():
            self._state = _State.ASLEEP

    def infer_arrived(self) -> None:
        self._in_flight += 1
        self._notify()

    def infer_left(self) -> None:
        assert self._in_flight > 0
        self._in_flight -= 1
        self._notify()

    def found_asleep(self) -> None:
        """The engine refused a connection: believe that, unless a wake is under way to prove otherwise."""
        if self._state is _State.AWAKE and self._wake is None:
            self._state = _State.ASLEEP
            self._notify()

    async def wait_until_idle(self) -> None:
        """Return when no infer is in flight."""
        while self._in_flight:
            await self._changed.wait()

    async def ensure_awake(self, deadline_s: float) -> None:
        """Wake the engine, or join the wake that is under way; a cancelled waiter leaves it running.

        Args:
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
                ran_command = await self._bring_up()
                run.error = None
            if run.scope.cancelled_caught:
                run.error = self._overdue(run.scope.deadline - started)
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

    async def _bring_up(self) -> bool:
        if await self._engine.is_healthy():
            return False
        if self._config.wake_command is None:
            raise CommandFailed("the engine does not answer, and its publisher has no command to wake it")
        command = self._config.wake_command
        async with open_command(command, self._log, grace_s=self._config.terminate_grace_s) as group:
            # A server that is starting tells nobody when it is done: it has to be asked.
            while not await self._engine.is_healthy():
                group.is_alive()
                await trio.sleep(self._config.health_interval_s)
        return True

    def _overdue(self, seconds: float) -> str:
        said = last_line(self._log) if self.can_wake else None
        message = f"the engine did not answer within {seconds:.0f} s"
        return f"{message}: {said}" if said else message

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
                await self._announce()
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
            failure = await self._run_hibernate_command()
            if failure is not None and await self._engine.is_healthy():
                self._state = _State.AWAKE
        finally:
            self._command_over.set()
            self._command_over = None
            self._notify()
        self._emit(Asleep() if failure is None else SleepFailed(failure))
        self._on_change()

    async def _run_hibernate_command(self) -> str | None:
        command = self._config.hibernate_command
        if command is None:
            return None
        try:
            with trio.move_on_after(self._config.hibernate_s) as limit:
                async with open_command(command, self._log, grace_s=self._config.terminate_grace_s):
                    return None
        except CommandFailed as error:
            return str(error)
        assert limit.cancelled_caught
        return f"the hibernate command did not end within {self._config.hibernate_s:.0f} s"

    def trim_log(self) -> None:
        """Keep the commands' error output small: a daemon may write to it for months."""
        cut_log(self._log)

    def _notify(self) -> None:
        self._last_activity = trio.current_time()
        self._changed.set()
        self._changed = trio.Event()
