"""How the broker stands at an instant: records for operators, metrics and tests, made of the directory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import trio

from .directory import Directory
from .models import Kind, LLMView, PoolView, SessionView, Statistics, Status, TaskView
from .row import Pool, Row
from .session import Session
from .task import Infer
from .wake import Wake

__all__ = ["statistics", "view_llm", "view_pool", "view_session", "view_tasks"]


def statistics(directory: Directory) -> Statistics:
    """The counters."""
    counters = directory.counters
    by_status = {Status.ACTIVE: 0, Status.HIBERNATING: 0, Status.INACTIVE: len(directory.inactive)}
    for row in directory.live.values():
        by_status[row.llm.status] += 1
    ended = counters.wakes_succeeded + counters.wakes_failed
    return Statistics(
        accepted=counters.accepted,
        completed=counters.completed,
        failed=counters.failed,
        cancelled=counters.cancelled,
        waiting=counters.waiting,
        in_flight=counters.in_flight,
        wakes_started=counters.wakes_started,
        wakes_succeeded=counters.wakes_succeeded,
        wakes_failed=counters.wakes_failed,
        wakes_in_flight=counters.wakes_started - ended,
        sessions=len(directory.sessions),
        channels=sum(1 for session in directory.sessions.values() if session.channel is not None),
        llms=by_status,
        public_llms=len(directory.rows) - len(directory.live) - len(directory.inactive),
        stopping=len(directory.held_slots),
    )


def view_llm(row: Row) -> LLMView:
    """A row at work."""
    session = row.session
    held = row.llm.paused or row.llm.hold is not None
    connected = session is not None and session.channel is not None
    routable = row.llm.status is not Status.INACTIVE and connected and not held
    penalty = row.health.penalty(trio.current_time())
    return LLMView(row.llm, row.in_flight, row.waiting, row.wake is not None, routable, row.stopping, penalty)


def view_pool(pool: Pool) -> PoolView:
    """A pool and its line."""
    assert pool.name is not None
    return PoolView(pool.name, pool.owner, tuple(sorted(pool.rows)), pool.waiting)


def view_session(session: Session) -> SessionView:
    """A session, and the names of its rows."""
    return SessionView(session.record, session.channel is not None, tuple(sorted(session.rows)))


def view_tasks(directory: Directory, place_of: Callable[[Infer], tuple[int, float | None] | None]) -> list[TaskView]:
    """All infers and wakes under way: those sent, then those that wait, oldest first.

    Args:
        directory: where they are.
        place_of: of one that waits: its place in its line, and about how many seconds it will wait.
    """
    now = trio.current_time()
    found = []
    for task in directory.tasks.values():
        session_id = None if task.channel is None else task.channel.session_id
        assert task.row is not None
        name = task.row.llm.name
        if task.row.llm.kind is Kind.PUBLIC:
            session_id = None  # the one that it has is nobody's business
        if isinstance(task, Wake):
            found.append(TaskView(task.task_id, "wake", name, session_id, "sent", now - task.started_at))
        else:
            sent: Literal["sent", "answering"] = "sent" if task.first_byte_at is None else "answering"
            found.append(TaskView(task.task_id, "infer", name, session_id, sent, now - task.accepted_at))
    waiting = [infer for pool in directory.pools_made() for infer in pool.line]
    for infer in sorted(waiting, key=lambda infer: infer.accepted_at):
        assert infer.pool is not None
        state: Literal["waking", "queued"] = "waking" if infer.phase == "wake" else "queued"
        row = None if infer.only is None else infer.pool.rows[infer.only]
        name = infer.only or infer.pool.name or infer.asked
        session_id = None if row is None else row.llm.session_id
        position, estimate_s = place_of(infer) or (None, None)
        age_s = now - infer.accepted_at
        found.append(TaskView(infer.task_id, "infer", name, session_id, state, age_s, position, estimate_s))
    return found
