"""The interface of every store, and the one that forgets."""

from __future__ import annotations

from typing import Protocol

from ..drafts import changed_llm
from ..ledger import CellKey, Usage, UsageBy
from ..models import LLM, Alias, Batch, Key, Kind, SessionRecord, Snapshot, Status

__all__ = ["MemoryStore", "Store", "StoreError", "StoreInUse"]


class StoreError(Exception):
    """A store could not do what it was asked. What it was given may be there or not: writing it again is harmless."""


class StoreInUse(StoreError):
    """Another broker has it open."""


class Store(Protocol):
    """What the broker needs of a store. Each method raises `StoreError` and nothing else."""

    async def load(self) -> Snapshot:
        """All rows and aliases, by name, and all sessions and keys, by id."""

    async def write(self, batch: Batch) -> None:
        """Commit a batch whole, its `lost_at` first; when it returns, the batch outlives the process."""

    async def rows_of_session(self, session_id: str) -> tuple[LLM, ...]:
        """The rows of a session, by name."""

    async def stale_rows(self, cutoff: float) -> tuple[LLM, ...]:
        """Live virtual rows whose last heartbeat is at or before `cutoff`, oldest first, then by name."""

    async def expired_rows(self, cutoff: float) -> tuple[LLM, ...]:
        """Inactive virtual rows that have been so since `cutoff` or before, oldest first, then by name."""

    async def usage(self, since_hour: int, by: UsageBy) -> dict[str, Usage]:
        """All usage from an hour on, summed by the keys' ids or by the LLMs' names."""

    async def usage_cells(self, since_hour: int) -> dict[CellKey, Usage]:
        """The cells from an hour on."""

    async def aclose(self) -> None:
        """Let go of everything held. Idempotent."""


class MemoryStore:
    """A store that lives as long as its process: for tests, and for brokers that need not remember."""

    def __init__(self) -> None:
        self._llms: dict[str, LLM] = {}
        self._sessions: dict[str, SessionRecord] = {}
        self._keys: dict[str, Key] = {}
        self._aliases: dict[str, Alias] = {}
        self._usage: dict[CellKey, Usage] = {}

    async def load(self) -> Snapshot:
        return Snapshot(
            tuple(self._llms[name] for name in sorted(self._llms)),
            tuple(self._sessions[session_id] for session_id in sorted(self._sessions)),
            tuple(self._keys[key_id] for key_id in sorted(self._keys)),
            tuple(self._aliases[name] for name in sorted(self._aliases)),
        )

    async def write(self, batch: Batch) -> None:
        if batch.lost_at is not None:
            for name, llm in self._llms.items():
                if llm.kind is Kind.VIRTUAL and llm.status is not Status.INACTIVE:
                    self._llms[name] = changed_llm(
                        llm, status=Status.INACTIVE, remembers=llm.status, inactive_since=batch.lost_at
                    )
        for name, change in batch.llms.items():
            if change is None:
                self._llms.pop(name, None)
            else:
                self._llms[name] = change
        for session_id, session in batch.sessions.items():
            if session is None:
                self._sessions.pop(session_id, None)
            else:
                self._sessions[session_id] = session
        for key_id, key in batch.keys.items():
            if key is None:
                self._keys.pop(key_id, None)
            else:
                self._keys[key_id] = key
        for name, alias in batch.aliases.items():
            if alias is None:
                self._aliases.pop(name, None)
            else:
                self._aliases[name] = alias
        self._usage |= batch.usage
        if batch.usage_before:
            self._usage = {cell: usage for cell, usage in self._usage.items() if cell[0] >= batch.usage_before}

    async def rows_of_session(self, session_id: str) -> tuple[LLM, ...]:
        return tuple(sorted((x for x in self._llms.values() if x.session_id == session_id), key=lambda x: x.name))

    async def stale_rows(self, cutoff: float) -> tuple[LLM, ...]:
        found = (
            x
            for x in self._llms.values()
            if x.kind is Kind.VIRTUAL and x.status is not Status.INACTIVE and x.last_heartbeat_at <= cutoff
        )
        return tuple(sorted(found, key=lambda x: (x.last_heartbeat_at, x.name)))

    async def expired_rows(self, cutoff: float) -> tuple[LLM, ...]:
        found = [
            (x.inactive_since, x.name, x)
            for x in self._llms.values()
            if x.kind is Kind.VIRTUAL and x.status is Status.INACTIVE and x.inactive_since is not None
        ]
        return tuple(x for since, _, x in sorted(found, key=lambda f: f[:2]) if since <= cutoff)

    async def usage(self, since_hour: int, by: UsageBy) -> dict[str, Usage]:
        found: dict[str, Usage] = {}
        for (hour, key_id, llm), usage in self._usage.items():
            if hour >= since_hour:
                name = key_id if by == "key" else llm
                found[name] = found.get(name, Usage()) + usage
        return dict(sorted(found.items()))

    async def usage_cells(self, since_hour: int) -> dict[CellKey, Usage]:
        return {cell: usage for cell, usage in self._usage.items() if cell[0] >= since_hour}

    async def aclose(self) -> None:
        pass
