"""The broker's entire mutable state, and the only steps that change a row or a session.

What is in memory is the truth. It is: `rows`, `pools`, `aliases` and `sessions`; the `keyring`; three lists of rows and
sessions in the order in which a sweep retires them (`live`, `inactive`, `unused`: since instants only grow, whatever is
touched goes to the end, and no heap is needed); `tasks` sent and not over; `held_slots`, of those that are over and whose
engine may not have stopped; `settled`, the recent outcomes; the counters; and what each row, pool and session holds of its
own. Every change of a record passes `change_row`, `remove_row`, `change_session`, `remove_session`, `add_key`, `remove_key`
or `put_alias`, which keep the lists and hand the record to the journal, in the same step.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import trio

from . import lifecycle
from .config import BrokerConfig
from .deadlines import Deadlines
from .drafts import changed_llm, changed_session
from .errors import TooMany
from .journal import Journal
from .keyring import Caller, Keyring
from .lifecycle import RowEvent
from .models import LLM, Alias, Event, Key, Kind, SessionRecord, Status
from .row import Pool, Row, Target
from .session import Session
from .stopping import Stopping
from .task import Infer, Outcome
from .wake import Wake

__all__ = ["Clock", "Counters", "Directory", "Settled"]


class Clock:
    """Wall time that never leaps: the wall clock at the start, and the monotonic time since."""

    def __init__(self) -> None:
        self._offset = time.time() - trio.current_time()

    def now(self) -> float:
        """Seconds since the epoch, UTC."""
        return self._offset + trio.current_time()


@dataclass(slots=True)
class Counters:
    accepted: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    waiting: int = 0
    in_flight: int = 0
    wakes_started: int = 0
    wakes_succeeded: int = 0
    wakes_failed: int = 0

    def count(self, outcome: Outcome) -> None:
        """One infer more has come to this end."""
        match outcome:
            case "completed":
                self.completed += 1
            case "failed":
                self.failed += 1
            case "cancelled":
                self.cancelled += 1


class Settled(NamedTuple):
    """What is remembered of a task: whose it was, whether its publisher ended it, and when (`trio.current_time()`)."""

    owner: str
    by_publisher: bool
    at: float


class Directory:
    def __init__(self, config: BrokerConfig, journal: Journal) -> None:
        self.config: Final = config
        self.clock: Final = Clock()
        self.journal: Final = journal
        self.rows: dict[str, Row] = {}
        self.pools: dict[str, Pool] = {}
        self.aliases: dict[str, Alias] = {}
        self.sessions: dict[str, Session] = {}
        self.host: Session | None = None  # whose public rows are; None: nobody's, and they are offline
        self.keyring: Final = Keyring()
        self.live: OrderedDict[str, Row] = OrderedDict()
        self.inactive: OrderedDict[str, Row] = OrderedDict()
        self.unused: OrderedDict[str, Session] = OrderedDict()
        self.owned: dict[str, int] = {}  # sessions of each owner
        self.owned_rows: dict[str, int] = {}  # virtual rows of each owner
        self.tasks: dict[str, Infer | Wake] = {}
        self.held_slots: dict[str, Stopping] = {}
        self.settled: dict[str, Settled] = {}
        self.counters = Counters()
        self.waiting_deadlines: Final = Deadlines()
        self.stopping = False
        self.observers: list[Callable[[Event], None]] = []

    # Rows

    def place_row(self, llm: LLM) -> Row:
        """A row that a store held, with its pool; it is in no list yet."""
        row = self.rows[llm.name] = Row(llm)
        self._count_row(llm, 1)
        self._join_pool(row)
        holder = None if llm.session_id is None else self.sessions.get(llm.session_id)
        # A session's id is free once it has left, and its next owner has nothing to do with the rows that it left.
        if holder is not None and holder.record.owner == llm.owner:
            row.session = holder
            holder.rows[llm.name] = row
        return row

    def add_row(self, llm: LLM, session: Session | None) -> Row:
        """A row that was not there."""
        row = Row(llm)
        self.rows[llm.name] = row
        self._count_row(llm, 1)
        self._join_pool(row)
        if session is not None:
            row.session = session
            session.rows[llm.name] = row
            self.live[llm.name] = row
            self.review_unused(session)
        elif llm.kind is Kind.PUBLIC and self.host is not None:
            row.session = self.host
            self.host.rows[llm.name] = row
        self.journal.put_row(llm.name, llm)
        return row

    def give_public_rows(self, host: Session) -> None:
        """Public rows, and those that will come, are this session's: one that is in no list."""
        self.host = host
        for name, row in self.rows.items():
            if row.llm.kind is Kind.PUBLIC:
                row.session = host
                host.rows[name] = row

    def _count_row(self, llm: LLM, change: int) -> None:
        if llm.kind is Kind.VIRTUAL:
            count = self.owned_rows.pop(llm.owner, 0) + change
            if count:
                self.owned_rows[llm.owner] = count

    def _join_pool(self, row: Row) -> None:
        """Put a row, which is in no named pool, into that of its record."""
        name = row.llm.pool
        if name is None:
            return
        pool = self.pools.get(name)
        if pool is None:
            pool = self.pools[name] = Pool(name, row.llm.owner)
        row.join(pool)

    def _leave_pool(self, row: Row) -> None:
        """Take a row out of its pool; a pool without rows is no more."""
        pool = row.leave()
        if not pool.rows:
            self._disarm_probe(pool)
            if pool.name is not None and self.pools.get(pool.name) is pool:
                del self.pools[pool.name]

    def _disarm_probe(self, pool: Pool) -> None:
        if pool.probe is not None:
            self.waiting_deadlines.disarm(pool.probe)
            pool.probe = None

    def disarm_probes(self) -> None:
        """The broker closes: nothing is tried again."""
        for pool in self.pools_made():
            self._disarm_probe(pool)

    def pools_made(self) -> Iterable[Pool]:
        """All pools in which somebody may wait, those without a name too, by the first of their rows."""
        pools = (row.pool_if_made for row in self.rows.values())
        return {id(pool): pool for pool in pools if pool is not None}.values()

    def move_row(self, row: Row, name: str | None) -> Pool:
        """A row is in another pool from now on, or in none. Returns the one that it has left.

        Whoever waits for it by name is still in that one's line.
        """
        before = row.pool
        self._leave_pool(row)
        row.llm = changed_llm(row.llm, pool=name)
        self._join_pool(row)
        return before

    def find_route(self, name: str) -> tuple[str, ...] | None:
        """The names of rows and pools that a name stands for, best first; None: it stands for nothing.

        An operator's word comes before a publisher's.
        """
        if (alias := self.aliases.get(name)) is not None:
            return alias.targets
        return (name,) if name in self.rows or name in self.pools else None

    def find_target(self, name: str) -> Target | None:
        """A row, or a pool; None: there is neither."""
        if (row := self.rows.get(name)) is not None:
            return Target(row.pool, name)
        if (pool := self.pools.get(name)) is not None:
            return Target(pool, None)
        return None

    def change_row(self, row: Row, **changes: Any) -> None:
        """Change fields other than status."""
        row.llm = changed_llm(row.llm, **changes)
        if "last_heartbeat_at" in changes and row.llm.name in self.live:
            self.live.move_to_end(row.llm.name)
        self.journal.put_row(row.llm.name, row.llm)

    def step(self, row: Row, event: RowEvent, *, bump: bool = False, **changes: Any) -> None:
        """Move a row along the lifecycle's table; `bump` counts it as a sign of life.

        Raises:
            IllegalTransition: the table has no such step.
        """
        before = lifecycle.state_of(row.llm)
        after = lifecycle.step(before, event)  # first the machine, then what hangs on it
        now = self.clock.now()
        if bump:
            changes["last_heartbeat_at"] = now
        name = row.llm.name
        if after != before:
            assert after.status is not None, "a row is removed by `remove_row`"
            inactive = after.status is Status.INACTIVE
            was_inactive = before.status is Status.INACTIVE
            changes |= {"status": after.status, "remembers": after.remembers}
            if inactive and not was_inactive:
                changes["inactive_since"] = now
                del self.live[name]
                self.inactive[name] = row
            elif was_inactive and not inactive:
                changes["inactive_since"] = None
                del self.inactive[name]
                self.live[name] = row
        if changes:
            self.change_row(row, **changes)

    def check_room_for(self, count: int, owner: str, param: str) -> None:
        """Whether an owner may have so many rows more. Raises TooMany, with `param`: he may not."""
        config = self.config
        most = min(config.max_llms_per_owner, config.max_llms_per_session * config.max_sessions_per_owner)
        if self.owned_rows.get(owner, 0) + count > most:
            raise TooMany(f"An owner has at most {most} models, withdrawn ones included.", param=param)

    def hand_over_row(self, row: Row, owner: str) -> None:
        """A row is another owner's from now on."""
        self._count_row(row.llm, -1)
        if row.pool.name is not None:
            self._leave_pool(row)  # a pool is one owner's
        row.pool.owner = owner  # and whoever waits for a row that has none goes on to wait for it
        self.change_row(row, owner=owner, pool=None)
        self._count_row(row.llm, 1)

    def detach_row(self, row: Row) -> None:
        """An inactive row is no session's any more, until one of its owner's registers it."""
        if row.session is not None:
            session, row.session = row.session, None
            del session.rows[row.llm.name]
            self.review_unused(session)
        self.change_row(row, session_id=None)

    def adopt_row(self, row: Row, session: Session) -> None:
        """An inactive row goes over to another session of its owner."""
        old = row.session
        if old is session:
            return
        if old is not None:
            del old.rows[row.llm.name]
            self.review_unused(old)
        row.session = session
        session.rows[row.llm.name] = row
        self.review_unused(session)

    def detach_longest_withdrawn(self, session: Session) -> None:
        """Keep a session within its bound of rows: the longest withdrawn stay, inactive, until their retention is over, but
        are no longer gone through with each of its heartbeats."""
        excess = len(session.rows) - self.config.max_llms_per_session
        if excess <= 0:
            return
        withdrawn = [row for row in session.rows.values() if row.llm.status is Status.INACTIVE]
        withdrawn.sort(key=lambda row: (row.llm.remembers is not None, row.llm.inactive_since or 0.0))
        for row in withdrawn[:excess]:
            row.session = None
            del session.rows[row.llm.name]

    def remove_row(self, row: Row) -> None:
        """A row that is there is no more."""
        name = row.llm.name
        del self.rows[name]
        self._leave_pool(row)
        self._count_row(row.llm, -1)
        self.live.pop(name, None)
        self.inactive.pop(name, None)
        if row.session is not None:
            del row.session.rows[name]
            self.review_unused(row.session)
            row.session = None
        self.journal.put_row(name, None)

    # Sessions

    def add_session(self, record: SessionRecord) -> Session:
        session = Session(record)
        self.sessions[record.session_id] = session
        self.owned[record.owner] = self.owned.get(record.owner, 0) + 1
        self.journal.put_session(record.session_id, record)
        self.review_unused(session)
        return session

    def change_session(self, session: Session, **changes: Any) -> None:
        session.record = changed_session(session.record, **changes)
        self.journal.put_session(session.record.session_id, session.record)

    def remove_session(self, session: Session) -> None:
        """Goodbye, eviction, or long disuse. Its rows stay, inactive, and bear its id."""
        session_id, owner = session.record.session_id, session.record.owner
        del self.sessions[session_id]
        self.unused.pop(session_id, None)
        self.owned[owner] -= 1
        if not self.owned[owner]:
            del self.owned[owner]
        for row in session.rows.values():
            row.session = None
        for task_id in session.settled:
            del self.settled[task_id]
        self.journal.put_session(session_id, None)

    def hand_over_session(self, session: Session, owner: str) -> None:
        """A session, with its rows, is another owner's from now on; the key that it came with is not his."""
        before = session.record.owner
        self.owned[before] -= 1
        if not self.owned[before]:
            del self.owned[before]
        self.owned[owner] = self.owned.get(owner, 0) + 1
        self.change_session(session, owner=owner, key_id=None)
        for row in session.rows.values():
            self.hand_over_row(row, owner)

    def review_unused(self, session: Session) -> None:
        """Note from when a session has had neither row nor channel."""
        session_id = session.record.session_id
        if self.sessions.get(session_id) is not session:
            return
        if session.rows or session.channel is not None or session.pending is not None:
            self.unused.pop(session_id, None)
            if session.record.unused_since is not None:
                self.change_session(session, unused_since=None)
        elif session_id not in self.unused:
            self.unused[session_id] = session
            if session.record.unused_since is None:
                self.change_session(session, unused_since=self.clock.now())

    # Keys

    def add_key(self, key: Key) -> Caller:
        """A key that was not there."""
        self.journal.put_key(key.key_id, key)
        return self.keyring.add(key)

    def remove_key(self, key_id: str) -> Caller:
        """A key that is there is no more. Raises KeyError: it is not there."""
        caller = self.keyring.remove(key_id)
        self.journal.put_key(key_id, None)
        return caller

    # Aliases

    def put_alias(self, name: str, alias: Alias | None) -> None:
        """An alias is now so; None: it is gone."""
        if alias is None:
            del self.aliases[name]
        else:
            self.aliases[name] = alias
        self.journal.put_alias(name, alias)

    # Outcomes

    def remember(self, session: Session, task_id: str, by_publisher: bool, now: float) -> None:
        """Keep a task's end for its publisher, within bounds of time and number. `now`: `trio.current_time()`."""
        if self.sessions.get(session.record.session_id) is not session:
            return
        self.settled[task_id] = Settled(session.record.owner, by_publisher, now)
        settled = session.settled
        if isinstance(settled, tuple):
            settled = session.settled = deque()
        settled.append(task_id)
        horizon = now - self.config.settled_memory_s
        while len(settled) > self.config.max_settled_per_session or self.settled[settled[0]].at <= horizon:
            del self.settled[settled.popleft()]

    def recall(self, task_id: str) -> Settled | None:
        """What is remembered of a task that is over."""
        found = self.settled.get(task_id)
        if found is None or trio.current_time() - found.at >= self.config.settled_memory_s:
            return None
        return found

    def notify(self, event: Event) -> None:
        for observer in self.observers:
            observer(event)
