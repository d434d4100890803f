"""Sessions, their rows and their channels: registering, heartbeats, epochs, goodbye, sweeps.

Each operation decides in one synchronous step (`_nowait` methods), which the journal then carries to the store; the public
methods of `Broker` await the commit where the protocol promises one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Final

import trio

from . import lifecycle, sweep
from .directory import Directory
from .dispatch import Dispatcher
from .drafts import changed_llm
from .errors import (
    InvalidRequest,
    LLMIsVirtual,
    LLMNameTaken,
    ModelNotFound,
    ModelOffline,
    SessionNotFound,
    SessionTaken,
    ShuttingDown,
    StoreUnavailable,
    TooMany,
)
from .frames import ByeReason
from .keys import is_upstream_variable
from .lifecycle import RowEvent
from .models import (
    LLM,
    LOCAL_OWNER,
    ChannelEvent,
    HeartbeatReply,
    Kind,
    LLMSpec,
    Registered,
    RegisteredLLM,
    SessionEvent,
    SessionRecord,
    Status,
    SweepReport,
    is_id,
    is_llm_name,
)
from .row import Row
from .session import Channel, Session, run_session
from .specs import check_spec, check_specs
from .sweep import SweepDecision

__all__ = ["Registry"]

_REGISTER: Final = {Status.ACTIVE: RowEvent.REGISTER_ACTIVE, Status.HIBERNATING: RowEvent.REGISTER_HIBERNATING}
_REPORT: Final = {Status.ACTIVE: RowEvent.REPORT_ACTIVE, Status.HIBERNATING: RowEvent.REPORT_HIBERNATING}

#: Rows, sessions and infers that one step of a sweep may end: a millisecond or two. What hangs on one channel ends at once.
_SWEPT_AT_ONCE: Final = 64

logger = logging.getLogger("wakecall.broker")


class Registry:
    """Works on a `Directory`; made by the broker, whose nursery the sessions run in."""

    def __init__(self, directory: Directory, dispatcher: Dispatcher, nursery: Callable[[], trio.Nursery]) -> None:
        self._directory = directory
        self._dispatcher = dispatcher
        self._nursery = nursery
        self._config = directory.config
        self._deletes_from = directory.clock.now() + self._config.heartbeat_timeout_s

    def find_session(self, session_id: str, owner: str) -> Session:
        """A session of this owner. Raises SessionNotFound: there is none, or it is another's."""
        session = self._directory.sessions.get(session_id)
        if session is None or session.record.owner != owner:
            raise SessionNotFound
        return session

    # Registering ----------------------------------------------------------------------------------------------------

    def register_nowait(
        self,
        session_id: str,
        specs: Sequence[LLMSpec],
        owner: str,
        agent_name: str,
        agent_version: str,
        key_id: str | None,
    ) -> Registered:
        """Register, all or nothing: every check comes before the first change. See `Broker.register`."""
        directory, now = self._directory, self._directory.clock.now()
        if directory.stopping:
            raise ShuttingDown
        if directory.journal.is_overfull:
            raise StoreUnavailable
        session = directory.sessions.get(session_id)
        self._check_session(session, session_id, owner)
        check_specs(self._directory, session_id, specs, owner)

        if session is None:
            session = directory.add_session(
                SessionRecord(
                    session_id,
                    owner,
                    now,
                    now,
                    agent_name=agent_name,
                    agent_version=agent_version,
                    key_id=key_id,
                )
            )
        else:
            directory.change_session(
                session, last_heartbeat_at=now, agent_name=agent_name, agent_version=agent_version, key_id=key_id
            )
        named = {spec.name for spec in specs}
        for row in [row for name, row in session.rows.items() if name not in named]:
            if row.llm.remembers is not None or row.llm.status is not Status.INACTIVE:
                self._dispatcher.step(row, RowEvent.WITHDRAWN)
        llms = tuple(self._register_row(session, spec, now) for spec in specs)
        directory.detach_longest_withdrawn(session)
        directory.notify(SessionEvent("registered", session_id, len(llms)))
        return Registered(session_id, self._config.heartbeat_interval_s, llms)

    def _check_session(self, session: Session | None, session_id: str, owner: str) -> None:
        if not is_id(session_id):
            raise InvalidRequest("A session id is 1 to 128 of A-Z a-z 0-9 _ -.", param="session_id")
        if session is not None and session.record.owner != owner:
            raise SessionTaken
        if session is None and self._directory.owned.get(owner, 0) >= self._config.max_sessions_per_owner:
            raise TooMany(f"An owner has at most {self._config.max_sessions_per_owner} sessions.")

    def _register_row(self, session: Session, spec: LLMSpec, now: float) -> RegisteredLLM:
        directory, record = self._directory, session.record
        row = directory.rows.get(spec.name)
        if row is None:
            status = spec.status or Status.ACTIVE
            state = lifecycle.step(lifecycle.ABSENT, _REGISTER[status])
            assert state.status is not None
            llm = LLM(spec.name, record.owner, state.status, created_at=now, last_heartbeat_at=now)
            self._dispatcher.welcome(directory.add_row(_described(llm, spec, record.session_id), session))
            return RegisteredLLM(spec.name, status, "created")
        llm = row.llm
        adopted = llm.session_id != record.session_id
        if row.session is not session:
            if row.wake is not None:
                # It was asked of a publisher whose row this no longer is.
                self._dispatcher.waker.settle(row.wake, "lost", ModelOffline(), cancel="client_disconnected")
            directory.adopt_row(row, session)
        kept = llm.remembers if llm.status is Status.INACTIVE else llm.status
        status = spec.status or kept or Status.ACTIVE
        self._dispatcher.move_row(row, spec.pool)
        group = row.llm.group
        row.llm = _described(row.llm, spec, record.session_id)
        if spec.group != group:
            row.yielding = False  # it was for those whom it has left
        self._dispatcher.step(row, _REGISTER[status], bump=True)
        if group is not None and spec.group != group:
            self._dispatcher.waker.review_group(session, group)
        return RegisteredLLM(spec.name, row.llm.status, "adopted" if adopted else "reactivated")

    # Heartbeats -----------------------------------------------------------------------------------------------------

    def heartbeat_nowait(
        self, session_id: str, statuses: Mapping[str, Status], tasks: Sequence[str], owner: str
    ) -> HeartbeatReply:
        """See `Broker.heartbeat`."""
        directory = self._directory
        session = self.find_session(session_id, owner)
        if len(tasks) > self._config.max_heartbeat_tasks:
            raise TooMany(f"A heartbeat names at most {self._config.max_heartbeat_tasks} tasks.", param="tasks")
        if Status.INACTIVE in statuses.values():
            raise InvalidRequest("A status is active or hibernating.", param="llms")
        directory.change_session(session, last_heartbeat_at=directory.clock.now())
        # What is awake comes first: or what falls asleep would have it woken for those who wait.
        for name, row in sorted(session.rows.items(), key=lambda item: statuses.get(item[0]) is not Status.ACTIVE):
            reported = statuses.get(name)
            self._dispatcher.step(row, RowEvent.REVIVE if reported is None else _REPORT[reported], bump=True)
        if session.channel is not None:
            named = set(tasks)
            for stopping in list(session.channel.stopping.values()):
                # It has been told of the end, and does not work on it any more.
                if stopping.answered and stopping.task_id not in named:
                    self._dispatcher.stops.release(stopping, "reported")
        drop = tuple(task_id for task_id in tasks if not self._is_waited_for(task_id, session))
        return HeartbeatReply({name: row.llm.status for name, row in session.rows.items()}, drop)

    def _is_waited_for(self, task_id: str, session: Session) -> bool:
        task = self._directory.tasks.get(task_id)
        return task is not None and task.channel is not None and task.channel.session is session

    # Channels -------------------------------------------------------------------------------------------------------

    def open_channel_nowait(self, session_id: str, owner: str, key_id: str | None, needs_open: bool) -> Channel:
        """A new epoch: the one before it ends as superseded, and this is current once that has been joined."""
        directory = self._directory
        if directory.stopping:
            raise ShuttingDown
        session = self.find_session(session_id, owner)
        epoch = session.record.epoch + 1
        directory.change_session(session, epoch=epoch)
        channel = Channel(
            session,
            epoch,
            self._config,
            key_id=key_id,
            needs_open=needs_open,
            on_disconnect=lambda channel: self.end_channel(channel, None),
            on_overflow=lambda channel: self.end_channel(channel, "stale"),
            on_room=self.pump_rows,
        )
        # The successor is there before the predecessor goes, so that the rows keep their status and their lines.
        before, session.pending = session.pending, channel
        for older in (before, session.channel):
            if older is not None:
                self.end_channel(older, "superseded")
        directory.review_unused(session)
        self._nursery().start_soon(run_session, channel, session.leaving, self._make_current)
        return channel

    def _make_current(self, channel: Channel) -> None:
        session, directory = channel.session, self._directory
        assert session.pending is channel
        assert session.channel is None
        session.pending, session.channel, session.leaving = None, channel, None
        channel.send_hello()
        directory.change_session(session, last_heartbeat_at=directory.clock.now())
        directory.notify(ChannelEvent("open", channel.session_id, channel.epoch))
        for row in list(session.rows.values()):
            if channel.ended is not None:
                break  # by what its rows had to say at once: nobody is there to revive the rest
            self._dispatcher.step(row, RowEvent.REVIVE, bump=True)
        # While there was no channel nobody's turn could come, and whoever was to make way may have nobody to make way for.
        for group in dict.fromkeys(row.llm.group for row in session.rows.values() if row.llm.group is not None):
            self._dispatcher.waker.review_group(session, group)

    def pump_rows(self, channel: Channel) -> None:
        """A channel has room for further infers."""
        # Each time another row goes first, or one with many callers would leave the others no room.
        session, rows = channel.session, list(channel.session.rows.values())
        session.turn = (session.turn + 1) % max(len(rows), 1)
        for row in rows[session.turn :] + rows[: session.turn]:
            self._dispatcher.pump(row)

    def end_channel(self, channel: Channel, reason: ByeReason | None) -> None:
        """End a channel, in this one step: nothing that was sent on it is left when it returns. Idempotent.

        1. It is detached: nothing is sent on it any more.
        2. All that was sent on it fails.
        3. Without a successor its rows are lost, and those who wait for them fail.
        4. Its task is cancelled; nothing there awaits anything.

        Args:
            channel: which.
            reason: what its publisher is told in `bye`; None: nobody is there to be told.
        """
        if channel.ended is not None:
            return
        session = channel.session
        # 1
        channel.ended = reason or "disconnected"
        was_current = session.channel is channel
        if was_current:
            session.channel = None
            # (Where the whole broker is cancelled it has been joined before it ends.)
            session.leaving = None if channel.joined.is_set() else channel
        elif session.pending is channel:
            session.pending = None
        channel.close(reason)
        for turn in session.turns.values():
            self._directory.waiting_deadlines.disarm(turn)
        session.turns.clear()
        # 2
        failed = self._dispatcher.lose_tasks(channel)
        # 3
        if session.channel is None and session.pending is None:
            self._dispatcher.lose_rows(list(session.rows.values()))
            self._directory.review_unused(session)
        # 4
        channel.scope.cancel()
        if was_current:
            event = ChannelEvent("ended", channel.session_id, channel.epoch, channel.ended, failed)
            self._directory.notify(event)

    # Leaving --------------------------------------------------------------------------------------------------------

    def remove_session_nowait(self, session: Session, reason: ByeReason) -> None:
        """Goodbye or eviction: its rows are withdrawn, its tasks fail, its channel ends, and it is gone."""
        for row in list(session.rows.values()):
            self._dispatcher.step(row, RowEvent.WITHDRAWN)
        for channel in (session.pending, session.channel):
            if channel is not None:
                self.end_channel(channel, reason)
        count = len(session.rows)
        self._directory.remove_session(session)
        event: SessionEvent = SessionEvent(
            "evicted" if reason == "evicted" else "goodbye", session.record.session_id, count
        )
        self._directory.notify(event)

    # Sweeping -------------------------------------------------------------------------------------------------------

    async def sweep(self) -> SweepReport:
        """One pass, a few rows at a time: what else runs here must not wait for all of them. See `Broker.sweep`."""
        now = self._directory.clock.now()
        inactivated: list[str] = []
        deleted: list[str] = []
        decision = self._decide_sweep(now)
        while decision.has_work:
            self._retire(decision, inactivated, deleted)
            await trio.lowlevel.checkpoint()
            decision = self._decide_sweep(now)
        return SweepReport(tuple(inactivated), tuple(deleted))

    def _decide_sweep(self, now: float) -> SweepDecision:
        """What the next step of a pass has to do, if it does not come to be too much."""
        directory = self._directory
        return sweep.decide(
            (row.llm for row in islice(directory.live.values(), _SWEPT_AT_ONCE)),
            (row.llm for row in islice(directory.inactive.values(), _SWEPT_AT_ONCE)),
            (session.record for session in islice(directory.unused.values(), _SWEPT_AT_ONCE)),
            now=now,
            heartbeat_timeout_s=self._config.heartbeat_timeout_s,
            inactive_retention_s=self._config.inactive_retention_s,
            deletes=now >= self._deletes_from,
        )

    def _retire(self, decision: SweepDecision, inactivated: list[str], deleted: list[str]) -> None:
        """Do it, at least the first of it, and tell what has been done."""
        directory = self._directory
        room = _SWEPT_AT_ONCE
        for name in decision.stale:
            row = directory.rows[name]
            if row.llm.status is Status.INACTIVE:
                continue  # lost with its channel, a moment ago
            session = row.session
            live = [row]
            if session is not None and session.channel is not None:
                # A publisher that does not heartbeat is gone, whatever its connection says: with it go all its rows, and
                # all that it was at.
                live = [each for each in session.rows.values() if each.llm.status is not Status.INACTIVE]
                room -= len(session.channel.tasks)
                self.end_channel(session.channel, "stale")
            else:
                self._dispatcher.step(row, RowEvent.LOST)
            inactivated += [each.llm.name for each in live if each.llm.status is Status.INACTIVE]
            room -= len(live)
            if room <= 0:
                return
        for name in decision.expired[:room]:
            row = directory.rows[name]
            lifecycle.step(lifecycle.state_of(row.llm), RowEvent.EXPIRED)
            self.remove_row(row)
            deleted.append(name)
        room -= len(decision.expired)
        for session_id in decision.unused[: max(room, 0)]:
            directory.remove_session(directory.sessions[session_id])
            directory.notify(SessionEvent("expired", session_id, 0))

    # Operators ------------------------------------------------------------------------------------------------------

    def put_public_nowait(self, spec: LLMSpec, url: str, key_env: str | None) -> None:
        """See `Broker.put_public_llm`."""
        directory, now = self._directory, self._directory.clock.now()
        name = spec.name
        if not is_llm_name(name):
            raise InvalidRequest("This is no valid name for a model.", param="name")
        check_spec(spec, "llm")
        if key_env is not None and not is_upstream_variable(key_env):
            raise InvalidRequest("A key is read from a variable named WAKECALL_UPSTREAM_….", param="key_env")
        if name in directory.pools:
            raise LLMNameTaken("This is the name of a pool.", param="name")
        row = directory.rows.get(name)
        if row is not None and row.llm.kind is Kind.VIRTUAL:
            raise LLMIsVirtual
        if row is None:
            llm = LLM(name, LOCAL_OWNER, Status.ACTIVE, created_at=now, last_heartbeat_at=now, kind=Kind.PUBLIC)
            directory.add_row(changed_llm(_described(llm, spec, None), url=url, key_env=key_env), None)
        else:
            row.llm = _described(row.llm, spec, None)
            directory.change_row(row, url=url, key_env=key_env)
            self._dispatcher.pump(row)  # it may have more slots

    def delete_llm_nowait(self, name: str) -> None:
        """See `Broker.delete_llm`."""
        row = self._directory.rows.get(name)
        if row is None:
            raise ModelNotFound
        self.remove_row(row)

    def remove_row(self, row: Row) -> None:
        """A row is no more: all that is on it fails, and whoever waited for its pool goes elsewhere or fails."""
        pool = row.pool
        self._dispatcher.fail_row(row)
        self._directory.remove_row(row)
        self._dispatcher.row_is_gone(pool)


def _described(llm: LLM, spec: LLMSpec, session_id: str | None) -> LLM:
    """The record with what a register says of it, status apart."""
    return changed_llm(
        llm,
        session_id=session_id,
        type=spec.type,
        model=spec.model or spec.name,
        max_concurrency=spec.max_concurrency,
        wake_s=spec.wake_s,
        cancel=spec.cancel,
        pool=spec.pool,
        group=spec.group,
        queue_s=spec.queue_s,
        first_byte_s=spec.first_byte_s,
        idle_s=spec.idle_s,
        total_s=spec.total_s,
    )
