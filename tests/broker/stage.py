"""A Trio run in a thread of its own that stands still unless it is told to move.

Hypothesis calls a state machine's rules from synchronous code. So the run's main task takes one order at a time from the
machine's thread and *blocks the loop* while it waits for the next: between two orders no task runs and no time passes, and
an order that awaits nothing is one step of the broker, with nothing before or after it. `settle` lets everything run until
nothing can; the clock is a `MockClock` that only `pass_time` moves. Only one of the two threads ever runs, so an example
replays exactly.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from trio.testing import MockClock, wait_all_tasks_blocked


class Stage:
    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[Callable[[], Awaitable[Any]] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._clock = MockClock()
        self._over = False
        self._thread = threading.Thread(target=self._run, name="stage", daemon=True)
        self._thread.start()
        self._answers.get()

    def do(self, act: Callable[..., Any], *args: Any) -> Any:
        """One synchronous step."""

        async def order() -> Any:
            return act(*args)

        return self._give(order)

    def wait(self, run: Callable[[], Awaitable[Any]]) -> Any:
        """Await something that has to end without time passing: an AssertionError if it does not."""

        async def order() -> Any:
            async def watch() -> None:
                await wait_all_tasks_blocked()
                scope.cancel()

            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(watch)
                    result, error = None, None
                    try:
                        result = await run()
                    except Exception as raised:
                        error = raised  # as it is, not in a group
                    nursery.cancel_scope.cancel()
            assert not scope.cancelled_caught, "it waits for what cannot come"
            if error is not None:
                raise error
            return result

        return self._give(order)

    def start(self, run: Callable[..., Awaitable[None]], *args: Any) -> None:
        """A task beside; it first runs at the next `settle`."""
        self.do(lambda: self._nursery.start_soon(run, *args))

    def settle(self) -> None:
        """Let every task run as far as it gets."""
        self._give(wait_all_tasks_blocked)

    def now(self) -> float:
        return self._clock.current_time()

    def pass_time(self, seconds: float) -> None:
        """Let so much time pass in one leap, and everything that was due by then happen."""

        async def order() -> None:
            self._clock.jump(seconds)
            await wait_all_tasks_blocked()

        self._give(order)

    def until_next_deadline(self) -> float:
        """Seconds."""
        return max(self.do(lambda: trio.lowlevel.current_statistics().seconds_to_next_deadline), 0.0)

    def close(self) -> None:
        """End the run, whatever is left in it."""
        if not self._over:
            self._orders.put(None)
            _, error = self._answers.get()
            if error is not None:
                raise error
        self._thread.join()

    def _give(self, order: Callable[[], Awaitable[Any]]) -> Any:
        assert not self._over, "one of its tasks has failed"
        self._orders.put(order)
        result, error = self._answers.get()
        if error is not None:
            raise error
        return result

    def _run(self) -> None:
        error = None
        try:
            trio.run(self._main, clock=self._clock)
        except BaseException as raised:  # Trio's thread ends here: whatever ended it is raised in the one that waits
            error = raised
        self._over = True
        self._answers.put((None, error))

    async def _main(self) -> None:
        async with trio.open_nursery() as self._nursery:
            self._answers.put((None, None))
            while (order := self._orders.get()) is not None:
                try:
                    self._answers.put((await order(), None))
                except Exception as error:
                    self._answers.put((None, error))
            self._nursery.cancel_scope.cancel()
