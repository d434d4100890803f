"""A slot that is still taken by an infer that is over: its publisher has been told to stop, and has not said that it has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import trio

from .deadlines import Deadline
from .models import SlotReleased

if TYPE_CHECKING:
    from .directory import Directory
    from .dispatch import Dispatcher
    from .row import Row
    from .session import Channel
    from .task import Infer

__all__ = ["Stopping", "Stops"]


class Stopping:
    """Only `Stops` makes and ends it.

    Attributes:
        since: when the infer ended (`trio.current_time()`).
        answered: whether its publisher has been told of the end by an answer: its next heartbeat then says whether it
            still works on it.
    """

    __slots__ = ("answered", "channel", "deadline", "row", "since", "task_id")

    def __init__(self, task_id: str, row: Row, channel: Channel, since: float, deadline: Deadline) -> None:
        self.task_id: Final = task_id
        self.row: Final = row
        self.channel: Final = channel
        self.since: Final = since
        self.deadline: Final = deadline
        self.answered = False


class Stops:
    """All of them; made by the dispatcher."""

    def __init__(self, directory: Directory, dispatcher: Dispatcher) -> None:
        self._directory = directory
        self._dispatcher = dispatcher
        self._config = directory.config

    def hold(self, infer: Infer, row: Row, channel: Channel, now: float) -> None:
        """Its engine works on until it has heard of the end: the slot stays taken until the publisher says that it has
        stopped, or for as long as it may well take to say so."""
        config = self._config
        if channel.ended is not None or len(channel.stopping) >= config.max_settled_per_session:
            return
        lease_s = config.cancel_lease_s
        if row.llm.cancel == "drain":
            # Nobody stops it: it works on to its end.
            lease_s = max(infer.total_until - now, lease_s)
        deadline = Deadline(lambda: self.release(stopping, "expired"))
        stopping = Stopping(infer.task_id, row, channel, now, deadline)
        row.stopping += 1
        self._directory.held_slots[infer.task_id] = stopping
        channel.stopping[infer.task_id] = stopping
        channel.deadlines.arm(deadline, now + lease_s)

    def release(self, stopping: Stopping, how: Literal["confirmed", "reported", "lost", "expired"]) -> None:
        """The slot of an infer that is over is free. Idempotent."""
        row, channel = stopping.row, stopping.channel
        if channel.stopping.pop(stopping.task_id, None) is None:
            return
        del self._directory.held_slots[stopping.task_id]
        channel.deadlines.disarm(stopping.deadline)
        row.stopping -= 1
        seconds = trio.current_time() - stopping.since
        self._directory.notify(SlotReleased(stopping.task_id, row.llm.name, how, seconds))
        self._dispatcher.pump(row)
        if row.llm.group is not None and row.session is not None:
            self._dispatcher.waker.review_group(row.session, row.llm.group)
