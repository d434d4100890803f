"""Every test here runs on a virtual clock, and leaves nothing behind in any broker that it opened."""

from types import SimpleNamespace

import pytest
import trio
from trio.testing import MockClock

from wakecall.broker import Broker
from wakecall.deadlines import Deadlines
from wakecall.session import Channel


def _recorded(monkeypatch, kind):
    made = []
    make = kind.__init__

    def init(self, *args, **kwargs):
        assert isinstance(trio.lowlevel.current_clock(), MockClock), "ask for `autojump_clock`: no test waits for real"
        make(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(kind, "__init__", init)
    return made


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch):
    """Invariant 1 at the end of every test; and no task, slot, waiter, channel, or deadline is left in any broker.

    It is synchronous, because pytest-trio runs no asynchronous fixture that a test does not ask for by name.
    """
    # The wall clock goes with the virtual one, so that a second broker on the same store starts later than the first.
    monkeypatch.setattr("wakecall.directory.time", SimpleNamespace(time=lambda: 1_700_000_000 + trio.current_time()))
    brokers = _recorded(monkeypatch, Broker)
    channels = _recorded(monkeypatch, Channel)
    heaps = _recorded(monkeypatch, Deadlines)
    yield
    for broker in brokers:
        counted, directory = broker.statistics(), broker._directory
        assert counted.accepted == counted.completed + counted.failed + counted.cancelled, counted
        assert (counted.waiting, counted.in_flight, counted.wakes_in_flight, counted.channels) == (0, 0, 0, 0), counted
        assert directory.tasks == {}
        assert directory.held_slots == {}
        for name, row in directory.rows.items():
            assert (row.in_flight, row.stopping, len(row.pool.line), row.wake) == (0, 0, 0, None), name
        for session_id, session in directory.sessions.items():
            assert (session.channel, session.pending, session.leaving) == (None, None, None), session_id
        held = sorted(task_id for session in directory.sessions.values() for task_id in session.settled)
        assert held == sorted(directory.settled), "an outcome is remembered for no session"
    for channel in channels:
        assert channel.ended is not None
        assert channel.joined.is_set()
        assert channel.tasks == {}
        assert channel.stopping == {}
    for heap in heaps:
        assert heap.armed == 0
