"""What has been decided, on its way to the store.

The broker decides in memory and puts the new record here in the same step; one writer commits whatever has gathered
since its last commit (group commit). Only the last state of each row, session, key, alias and cell of usage is kept, so the
journal is bounded by what there is and, while the store is down, by a number (`is_overfull`). An acknowledgement waits for
the commit that carries its step; if that fails it is refused with `StoreUnavailable`, but the step stays, and the writer
repeats it until it is down.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import trio

from .errors import StoreUnavailable
from .faults import stacks_of
from .ledger import CellKey, Usage
from .models import LLM, Alias, Batch, Key, SessionRecord
from .store.base import Store, StoreError

__all__ = ["Commit", "Journal"]

logger = logging.getLogger("wakecall.store")

_FIRST_RETRY_S = 0.25
_LAST_RETRY_S = 5.0
#: A commit under way for so long counts as a fault, in seconds.
_SLOW_S = 10.0

#: Rows, sessions, keys and aliases.
_MOST_UNWRITTEN = 100_000


class Commit:
    """The commit that will carry what has been decided until now."""

    __slots__ = ("_done", "_error")

    def __init__(self) -> None:
        self._done = trio.Event()
        self._error: StoreError | None = None

    @property
    def went_well(self) -> bool:
        """Whether it is committed."""
        return self._done.is_set() and self._error is None

    @property
    def failed(self) -> bool:
        """Whether the store failed: what it was to carry is written again by a later one."""
        return self._error is not None

    async def wait(self) -> None:
        """Return once it is committed.

        Raises:
            StoreUnavailable: the store failed. The decision stands and is written again.
        """
        await self._done.wait()
        if self._error is not None:
            raise StoreUnavailable from self._error

    def _finish(self, error: StoreError | None) -> None:
        self._error = error
        self._done.set()


class Journal:
    """Made by `open_broker`, which runs its writer."""

    def __init__(self, store: Store) -> None:
        self._store = store
        # The entire state: what has gathered, the commit that will carry it, and whether the last one went well.
        self._llms: dict[str, LLM | None] = {}
        self._sessions: dict[str, SessionRecord | None] = {}
        self._keys: dict[str, Key | None] = {}
        self._aliases: dict[str, Alias | None] = {}
        self._usage: dict[CellKey, Usage] = {}
        self._usage_before = 0
        self._lost_at: float | None = None
        self._next: Commit | None = None
        self._work = trio.Event()
        self._writing = trio.Lock()
        self._closed = False
        self._last_went_well = True
        self._writing_since = math.inf

    def put_row(self, name: str, llm: LLM | None) -> None:
        """A row is now so; None: it is gone."""
        self._llms[name] = llm
        self._work.set()

    def lose_rows(self, at: float) -> None:
        """Whatever the store holds as live was lost at this instant. It comes before all that is put here, so only who has
        put nothing yet may say it."""
        assert not self._llms
        self._lost_at = at
        self._work.set()

    def put_session(self, session_id: str, session: SessionRecord | None) -> None:
        """A session is now so; None: it is gone."""
        self._sessions[session_id] = session
        self._work.set()

    def put_key(self, key_id: str, key: Key | None) -> None:
        """A key is now so; None: it is revoked."""
        self._keys[key_id] = key
        self._work.set()

    def put_alias(self, name: str, alias: Alias | None) -> None:
        """An alias is now so; None: it is gone."""
        self._aliases[name] = alias
        self._work.set()

    def put_usage(self, cells: Mapping[CellKey, Usage]) -> None:
        """These cells stand so now. Whoever puts them bounds how many there are."""
        self._usage.update(cells)
        self._work.set()

    def drop_usage(self, before_hour: int) -> None:
        """The cells of hours before this one are gone."""
        self._usage_before = max(self._usage_before, before_hour)
        self._work.set()

    @property
    def ok(self) -> bool:
        """Whether the last commit went well, and the one under way has not been so for long."""
        return self._last_went_well and trio.current_time() - self._writing_since < _SLOW_S

    @property
    def is_overfull(self) -> bool:
        """Whether a store that fails or hangs has left so much here that no new names may come: what is deleted is kept too
        until that is written, so publishers that come and go would fill the memory."""
        return len(self._llms) + len(self._sessions) + len(self._keys) + len(self._aliases) > _MOST_UNWRITTEN

    def commit(self) -> Commit:
        """The commit that carries everything put so far. Call it in the step that put it."""
        if self._closed:
            refused = Commit()
            refused._finish(StoreError("the broker is closed"))
            return refused
        if self._next is None:
            self._next = Commit()
        self._work.set()
        return self._next

    async def run(self) -> None:
        """Commit what gathers, until cancelled."""
        retry_s = _FIRST_RETRY_S
        while True:
            await self._work.wait()
            async with self._writing:
                await self._flush()
            if self._last_went_well:
                retry_s = _FIRST_RETRY_S
            else:
                # The disk gives no event when it is well again.
                await trio.sleep(retry_s)
                retry_s = min(retry_s * 2, _LAST_RETRY_S)

    async def _flush(self) -> None:
        """Commit once what has gathered. A failure is kept for the next time."""
        self._work = trio.Event()
        batch = Batch(
            self._llms, self._sessions, self._keys, self._aliases, self._usage, self._usage_before, self._lost_at
        )
        commit, self._next = self._next, None
        self._llms, self._sessions, self._keys, self._aliases = {}, {}, {}, {}
        self._usage, self._usage_before, self._lost_at = {}, 0, None
        error: StoreError | None = StoreError("the broker closed before the store had answered")
        self._writing_since = trio.current_time()
        try:
            await self._store.write(batch)
            error = None
        except StoreError as failure:
            error = failure
            if self._last_went_well:
                logger.error("the store failed: %s", failure)
        except Exception as failure:
            # Not a store's to raise; but it is no reason for all who are served to be dropped.
            error = StoreError(f"the store raised {type(failure).__name__}")
            if self._last_went_well:
                logger.error("the store failed in a way that a store must not: %s", stacks_of(failure))
        finally:
            self._writing_since = math.inf
            # However it ended, a cancelled write included: nobody waits on for a commit that will not come.
            if error is not None:
                # Under what has been decided meanwhile.
                self._llms = batch.llms | self._llms
                self._sessions = batch.sessions | self._sessions
                self._keys = batch.keys | self._keys
                self._aliases = batch.aliases | self._aliases
                self._usage = batch.usage | self._usage
                self._usage_before = max(batch.usage_before, self._usage_before)
                self._lost_at = batch.lost_at
                self._work.set()
            elif not self._last_went_well:
                logger.warning("the store is well again")
            self._last_went_well = error is None
            if commit is not None:
                commit._finish(error)

    async def close(self) -> None:
        """Commit what is left, once. From then on, and if that is cancelled, every commit is refused."""
        try:
            async with self._writing:
                if self._work.is_set():
                    await self._flush()
        finally:
            self._closed = True
            if self._next is not None:
                self._next._finish(StoreError("the broker is closed"))
