"""A swap group: models of one engine of which one alone can be awake, as on a GPU that has room for one.

Each has a belief of its own, and the wake and hibernate commands are run for one at a time. To wake one is a *swap*: the
one that is awake is left first.

    ASLEEP ──────────────────── a swap to it: its wake command, then health ───────────────────────> AWAKE
      ^                                                                                              │   ^
      ├── nothing in flight, its hibernate command ── LEAVING <── a swap to another ─────────────────┤   │
      │                                                  └── out of time, or it does not sleep ──────│───┤
      └── 200, nothing in flight, then the command ── GOING <── idle for long enough ────────────────┘   │
                                                         └── a wake of any of them, or no 200 ───────────┘

There is one swap at a time, in the order in which they were asked for. An infer is *inside* from when its model is awake
until it leaves; who comes to a model that is LEAVING waits for its next swap, or a busy one would never be left. A swap
takes everybody in who waits for it before the next can begin, so that two models in demand take turns and both get on.

A swap goes on without those who asked for it, and ends at its deadline, the wait for its turn included.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TypeAlias

import trio

from ..faults import stacks_of
from .commands import Commands
from .config import AnnouncedStatus, PublishedModel, PublisherConfig
from .events import Asleep, Awake, GoingToSleep, PublisherEvent, SleepFailed, WakeFailed, Waking
from .power import AnnounceFailed, Power, Visit, WakeError
from .process import CommandFailed

logger = logging.getLogger(__name__)


class _Swap:
    def __init__(self, llm: str, deadline: float) -> None:
        self.llm = llm
        self.scope = trio.CancelScope(deadline=deadline)
        self.done = trio.Event()
        self.error: str | None = None
        # What else the broker wants asleep, in its order.
        self.hibernate: dict[str, None] = {}
        self.visits: set[Visit] = set()
        self.waits_for: str | None = "another model"


class SwapGroup:
    """The sleep of models that take turns. Arguments and methods as `Power` has them."""

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
        self._turn = trio.Lock()
        # The entire mutable state.
        self._models: dict[str, PublishedModel] = {}
        self._awake: str | None = None
        # What may hold the room: the one that is awake, or the last one that was or that a wake has been tried for.
        self._occupant: str | None = None
        self._leaving = False
        self._going: trio.CancelScope | None = None
        self._swaps: dict[str, _Swap] = {}
        self._inside: Counter[str] = Counter()
        self._in_flight = 0
        self._last_activity = trio.current_time()
        self._changed = trio.Event()

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @property
    def can_wake(self) -> bool:
        return self._commands.can_wake

    async def begin(self, models: Sequence[PublishedModel]) -> None:
        """Learn the models. The first is awake, unless all sleep by the configuration or nothing answers."""
        self._models = {model.name: model for model in models}
        if self._config.hibernating or (self.can_wake and not await self._commands.is_healthy()):
            return
        self._awake = self._occupant = models[0].name

    def register_status(self, llm: str) -> AnnouncedStatus:
        return "active" if llm == self._awake and self._stays else "hibernating"

    def heartbeat_statuses(self) -> dict[str, AnnouncedStatus]:
        """What a heartbeat says of which rows: nothing of one that is being woken or on its way to sleep."""
        unsettled = {*self._swaps, *(() if self._stays else (self._awake,))}
        return {llm: self.register_status(llm) for llm in self._models if llm not in unsettled}

    @property
    def _stays(self) -> bool:
        return not self._leaving and self._going is None

    # Infers

    def infer_arrived(self, llm: str) -> Visit:
        self._in_flight += 1
        visit = Visit(llm)
        self._enter_if_awake(visit)
        self._notify()
        return visit

    def infer_left(self, visit: Visit) -> None:
        assert self._in_flight > 0
        self._in_flight -= 1
        self._exit(visit)
        self._notify()

    async def admit(self, visit: Visit) -> None:
        self._enter_if_awake(visit)
        if not visit.is_inside:
            await self._wait_inside(visit)

    async def _wait_inside(self, visit: Visit) -> None:
        swap = self._join(visit.llm, self._config.wake_s)
        swap.visits.add(visit)
        try:
            await self._wait(swap)
        finally:
            swap.visits.discard(visit)

    async def recover(self, visit: Visit) -> None:
        self._exit(visit)
        if self._awake == visit.llm and not self._turn.locked():
            self._awake = None
        self._notify()
        await self._wait_inside(visit)

    def _enter_if_awake(self, visit: Visit) -> None:
        if visit.llm == self._awake and not self._leaving:
            self._enter(visit)

    def _enter(self, visit: Visit) -> None:
        if not visit.is_inside:
            visit.is_inside = True
            self._inside[visit.llm] += 1

    def _exit(self, visit: Visit) -> None:
        if visit.is_inside:
            visit.is_inside = False
            self._inside[visit.llm] -= 1

    async def wait_until_idle(self) -> None:
        while self._in_flight:
            await self._changed.wait()

    # Swaps

    async def wake(self, llm: str, deadline_s: float, hibernate: Iterable[str] = ()) -> None:
        """As `Power.wake`. `hibernate`: what the broker takes for awake; the one that is, is left in any case."""
        if llm not in self._models:
            raise WakeError(f"this publisher has no model {llm}")
        swap = self._join(llm, deadline_s)
        swap.hibernate |= {name: None for name in hibernate if name in self._models and name != llm}
        await self._wait(swap)

    def _join(self, llm: str, deadline_s: float) -> _Swap:
        deadline = trio.current_time() + deadline_s
        if self._going is not None:
            self._going.cancel()
        swap = self._swaps.get(llm)
        if swap is None:
            swap = self._swaps[llm] = _Swap(llm, deadline)
            self._nursery.start_soon(self._run_swap, swap)
        swap.scope.deadline = max(swap.scope.deadline, deadline)
        return swap

    async def _wait(self, swap: _Swap) -> None:
        await swap.done.wait()
        if swap.error is not None:
            raise WakeError(swap.error)

    async def _run_swap(self, swap: _Swap) -> None:
        started = trio.current_time()
        self._emit(Waking(llm=swap.llm))
        error: str | None = "the publisher stopped during the wake"
        ran_command = False
        try:
            with swap.scope:
                async with self._turn:
                    ran_command = await self._swap(swap)
                    # While it has the turn: the next swap must not find the model idle before its callers are inside.
                    error = None
                    self._settle(swap, error)
            if swap.scope.cancelled_caught:
                error = self._overdue(swap, swap.scope.deadline - started)
        except CommandFailed as failed:
            error = str(failed)
        except Exception as failed:
            logger.error("a wake failed in the publisher itself: %s", stacks_of(failed))
            error = f"the publisher failed: {type(failed).__name__}"
        finally:
            if not swap.done.is_set():
                self._settle(swap, error)
        if error is None:
            self._emit(Awake(seconds=trio.current_time() - started, ran_command=ran_command, llm=swap.llm))
        else:
            self._emit(WakeFailed(error, llm=swap.llm))
        self._on_change()

    async def _swap(self, swap: _Swap) -> bool:
        left = self._occupant
        if left not in (None, swap.llm):
            swap.waits_for = left
            await self._leave(self._models[left])
        for name in swap.hibernate:
            # What we believe to be asleep. If it is, its command may well fail, and nothing is lost.
            if name != left and (failure := await self._commands.put_down(self._models[name])):
                logger.info("%s was believed to be asleep, and its hibernate command failed: %s", name, failure)
        swap.waits_for = None
        was_awake = self._awake is not None
        # Not a belief any more, but what is found out now.
        self._awake, self._occupant = None, swap.llm
        return await self._commands.bring_up(self._models[swap.llm], always=not was_awake)

    async def _leave(self, model: PublishedModel) -> None:
        self._leaving = True
        try:
            await self._wait_until_left(model.name)
            # Its command may be cut in the middle, by the swap's deadline: from here on nobody knows.
            was_awake, self._awake = self._awake is not None, None
            failure = await self._commands.put_down(model)
            if failure is not None and was_awake and await self._commands.is_healthy():
                self._awake = model.name
                self._emit(SleepFailed(failure, llm=model.name))
                raise CommandFailed(f"{model.name} does not make room: {failure}")
            self._occupant = None
        finally:
            self._leaving = False
            self._notify()
        self._emit(Asleep(llm=model.name) if failure is None else SleepFailed(failure, llm=model.name))

    async def _wait_until_left(self, llm: str) -> None:
        while self._inside[llm]:
            await self._changed.wait()

    def _settle(self, swap: _Swap, error: str | None) -> None:
        del self._swaps[swap.llm]
        swap.error = error
        if error is None:
            self._awake = swap.llm
            for visit in swap.visits:
                self._enter(visit)
        swap.done.set()
        self._notify()

    def _overdue(self, swap: _Swap, seconds: float) -> str:
        if swap.waits_for is not None:
            return f"{swap.waits_for} did not make room within {seconds:.0f} s"
        return self._commands.overdue(seconds)

    # Idle

    async def run_idle(self) -> None:
        after_s = self._config.hibernate_after_s
        assert after_s is not None
        while True:
            if self._is_wanted:
                await self._changed.wait()
                continue
            with trio.move_on_at(self._last_activity + after_s) as quiet:
                await self._changed.wait()
            if quiet.cancelled_caught:
                await self._go_to_sleep()

    @property
    def _is_wanted(self) -> bool:
        return self._awake is None or self._in_flight > 0 or bool(self._swaps)

    async def _go_to_sleep(self) -> None:
        async with self._turn:
            if self._is_wanted:
                return
            assert self._awake is not None
            model = self._models[self._awake]
            self._emit(GoingToSleep(llm=model.name))
            failure: str | None = None
            with trio.CancelScope() as self._going:
                try:
                    await self._announce([model.name])
                    # Whatever was sent before the broker knew is still served.
                    await self._wait_until_left(model.name)
                except AnnounceFailed as error:
                    failure = str(error)
            if self._going.cancel_called:
                failure = failure or "a wake came first"
            self._going = None
            if failure is None:
                # No checkpoint since the last infer left: from here on an infer waits for its turn.
                self._awake = None
                failure = await self._commands.put_down(model)
                if failure is None:
                    self._occupant = None
                elif await self._commands.is_healthy():
                    self._awake = model.name
            self._notify()
        self._emit(Asleep(llm=model.name) if failure is None else SleepFailed(failure, llm=model.name))
        self._on_change()

    def trim_log(self) -> None:
        self._commands.trim_log()

    def _notify(self) -> None:
        self._last_activity = trio.current_time()
        self._changed.set()
        self._changed = trio.Event()


#: What an engine's sleep can be: of one piece, or its models' by turns.
Sleep: TypeAlias = Power | SwapGroup
