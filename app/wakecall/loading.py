"""What a directory takes over from a store, once, before anybody else has it: quickly, for there may be very many rows, and
some of it at a time, so that signals are answered meanwhile.

Nothing is active until its publisher is back: what was live is lost from now on, and the store is told so in one word. For
what was inactive before, retention goes on. No instant is ahead of our clock, or what stands behind it in its list would
wait for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Final, TypeVar

import trio

from . import lifecycle
from .directory import Directory
from .drafts import changed_llm, changed_session
from .lifecycle import RowEvent
from .models import LLM, Kind, SessionRecord, Snapshot, Status
from .row import Row
from .session import Session

__all__ = ["load"]

T = TypeVar("T")

#: A few milliseconds.
_AT_ONCE: Final = 1000


async def load(directory: Directory, snapshot: Snapshot) -> None:
    """Take what a store held into a directory that has nothing yet."""
    now = directory.clock.now()
    for key in snapshot.keys:
        directory.keyring.add(key)
        directory.keyring.close()
    directory.aliases = {alias.name: alias for alias in snapshot.aliases}
    for records in _some_at_a_time(sorted(snapshot.sessions, key=lambda s: _unused_since(s, now))):
        await trio.lowlevel.checkpoint()
        for record in records:
            directory.sessions[record.session_id] = Session(_past(record, now))
            directory.owned[record.owner] = directory.owned.get(record.owner, 0) + 1
    retired: list[Row] = []
    has_lost = False
    for llms in _some_at_a_time(snapshot.llms):
        await trio.lowlevel.checkpoint()
        for llm in llms:
            row = directory.place_row(_lost(llm, now))
            if llm.kind is not Kind.VIRTUAL:
                continue
            retired.append(row)
            if llm.status is not Status.INACTIVE:
                if not has_lost:
                    directory.journal.lose_rows(now)
                    has_lost = True
                if llm.last_heartbeat_at > now:
                    directory.journal.put_row(llm.name, row.llm)  # in this, too, it is not what the store holds
    # Those that were inactive before come first in the order of retirement.
    retired.sort(key=_inactive_since)
    directory.inactive.update((row.llm.name, row) for row in retired)
    for sessions in _some_at_a_time(list(directory.sessions.values())):
        await trio.lowlevel.checkpoint()
        for session in sessions:
            directory.detach_longest_withdrawn(session)
            directory.review_unused(session)


def _some_at_a_time(items: Iterable[T]) -> Iterator[tuple[T, ...]]:
    rest = iter(items)
    while some := tuple(islice(rest, _AT_ONCE)):
        yield some


def _lost(llm: LLM, now: float) -> LLM:
    """A row as it is from now on."""
    changes: dict[str, Any] = {}
    if llm.last_heartbeat_at > now:
        changes["last_heartbeat_at"] = now
    if llm.kind is Kind.VIRTUAL and llm.status is not Status.INACTIVE:
        after = lifecycle.step(lifecycle.state_of(llm), RowEvent.LOST)
        changes |= {"status": after.status, "remembers": after.remembers, "inactive_since": now}
    elif llm.inactive_since is None:
        # A file that somebody wrote to by hand must not stop every sweep.
        if llm.status is Status.INACTIVE:
            changes["inactive_since"] = now
    elif llm.inactive_since > now:
        changes["inactive_since"] = now
    return changed_llm(llm, **changes) if changes else llm


def _past(record: SessionRecord, now: float) -> SessionRecord:
    if record.last_heartbeat_at > now:
        record = changed_session(record, last_heartbeat_at=now)
    if record.unused_since is not None and record.unused_since > now:
        record = changed_session(record, unused_since=now)
    return record


def _unused_since(record: SessionRecord, now: float) -> float:
    return now if record.unused_since is None else min(record.unused_since, now)


def _inactive_since(row: Row) -> float:
    since = row.llm.inactive_since
    assert since is not None
    return since
