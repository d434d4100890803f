"""One at a time, in turn by key: who brings much delays himself.

Within a key it is first come, first served. Between keys the line goes round: whose turn has just ended comes behind all
others who wait. So a newcomer waits for what is under way, and for one of each other key at most.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

import trio

__all__ = ["Turns"]


class Turns:
    """A lock with a line for each key.

    The entire state: who waits, by key, the next key first; and whether somebody has the turn. It is handed from one to the
    next in one step, so nobody overtakes the line.
    """

    def __init__(self) -> None:
        self._lines: OrderedDict[Hashable, deque[trio.Event]] = OrderedDict()
        self._is_taken = False

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return sum(map(len, self._lines.values()))

    @asynccontextmanager
    async def turn(self, key: Hashable) -> AsyncIterator[None]:
        """The turn, for the block. Cancelled while it waits, it leaves the line.

        Args:
            key: on whose account.
        """
        if self._is_taken:
            await self._wait(key)
        self._is_taken = True
        try:
            yield
        finally:
            self._hand_on(key)

    async def _wait(self, key: Hashable) -> None:
        called = trio.Event()
        self._lines.setdefault(key, deque()).append(called)
        try:
            await called.wait()
        except trio.Cancelled:
            if called.is_set():
                # Between his cancellation and this moment.
                self._hand_on(key)
            else:
                self._lines[key].remove(called)
                if not self._lines[key]:
                    del self._lines[key]
            raise

    def _hand_on(self, key: Hashable) -> None:
        if key in self._lines:
            self._lines.move_to_end(key)
        if not self._lines:
            self._is_taken = False
            return
        following, line = next(iter(self._lines.items()))
        line.popleft().set()
        if not line:
            del self._lines[following]
