"""A publisher's session, and its channels.

A session is a sticky registration: it outlives its channels. A channel is one live stream of frames, named by its epoch,
and has a task of its own in the broker's tree (`run_session`) that owns the deadlines of all that was sent on it. Three
states:

    pending  →  current  →  ended

A channel is pending until the task of the one before it has been joined; so nothing of an old epoch can act once the new
one is current. `ended` is decided in one synchronous step (`registry.Registry.end_channel`), which settles all that was
sent; the task is cancelled in that step and awaits nothing on its way out. The transport takes frames with `receive`,
and nothing here waits for it to.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

import trio

from . import frames
from .config import BrokerConfig
from .deadlines import Deadline, Deadlines
from .faults import stacks_of
from .frames import ByeReason, CancelReason, Frame
from .models import SessionRecord

if TYPE_CHECKING:
    from .results import Results
    from .row import Row
    from .stopping import Stopping
    from .task import Infer
    from .wake import Wake

__all__ = ["Channel", "Session", "run_session"]

logger = logging.getLogger("wakecall.broker")


class Session:
    """A registered publisher. `rows` holds all that bear its id, the longest withdrawn perhaps excepted."""

    __slots__ = ("channel", "leaving", "pending", "record", "rows", "settled", "turn", "turns")

    def __init__(self, record: SessionRecord) -> None:
        self.record = record
        self.rows: dict[str, Row] = {}
        self.channel: Channel | None = None  # the current one
        self.pending: Channel | None = None  # the one that will be current once `leaving` has been joined
        self.leaving: Channel | None = None  # the last that was current
        self.turn = 0  # which of its rows is the first to send when there is room again
        self.turns: dict[str, Deadline] = {}  # when a group is to be looked at again
        # Ids of its ended tasks, oldest first; made with the first, for an empty deque holds more than all else here.
        self.settled: deque[str] | tuple[()] = ()


class Channel:
    """One live stream of frames to a publisher. Made by `Broker.open_channel`.

    Attributes:
        session_id: whose it is.
        epoch: which of the session's channels it is; it grows.
        key_id: the key that opened it; None: none was needed.
        needs_open: whether it ends once the broker wants keys.
    """

    def __init__(
        self,
        session: Session,
        epoch: int,
        config: BrokerConfig,
        *,
        key_id: str | None = None,
        needs_open: bool = False,
        on_disconnect: Callable[[Channel], None],
        on_overflow: Callable[[Channel], None],
        on_room: Callable[[Channel], None],
    ) -> None:
        self.session: Final = session
        self.session_id: Final = session.record.session_id
        self.epoch: Final = epoch
        self.key_id: Final = key_id
        self.needs_open: Final = needs_open
        self.tasks: dict[str, Infer | Wake] = {}  # sent on it and not over
        self.stopping: dict[str, Stopping] = {}  # over, and their slots still taken
        self.deadlines: Final = Deadlines()
        self.scope = trio.CancelScope()
        self.joined = trio.Event()
        self.ended: str | None = None  # why
        self.results: Results | None = None  # its shared upload
        self._config = config
        self._on_disconnect = on_disconnect
        self._on_overflow = on_overflow
        self._on_room = on_room
        # Thousands of channels say nothing for hours, so no deques: an empty one holds 600 bytes.
        self._outbox: list[Frame] = []
        self._withdrawn: set[str] = set()  # tasks that are over and whose frames are in there
        self._taken: Iterator[Frame] = iter(())  # by iteration, and not given out
        self._weight = 0
        self._full = False
        self._sequence = 0
        self._closed = False
        self._wakeup: trio.Event | None = None
        self._stall = Deadline(self._on_stall)
        self._taken_at = 0.0

    @property
    def has_room(self) -> bool:
        """Whether further infers may be sent: what is untaken weighs less than half the bound.

        The other half is for frames that cannot wait (wakes, cancels). So a burst, such as the thousand who waited for one
        wake, goes out as fast as the publisher takes it; and one that takes nothing is noticed by its stall.
        """
        return not self._full

    # What the broker does with it ----------------------------------------------------------------------------------

    def send_hello(self) -> None:
        """Tell the publisher that the channel is open."""
        config = self._config
        self._push(
            frames.hello(self._next_id(), self.session_id, self.epoch, config.heartbeat_interval_s, config.keepalive_s)
        )

    def send_infer(self, infer: Infer, due: float, now: float) -> None:
        """Take an infer on, to be ended at `due` if nothing happens, and tell the publisher."""
        # With the first byte its pauses begin to count, and mostly sooner than what it has in all.
        self._hold(infer, due, now + min(infer.idle_s, self._config.peer_stall_s))
        assert infer.row is not None
        llm = infer.row.llm
        left_s = max(infer.total_until - now, 0.0)
        limit = self._config.max_inline_body_bytes
        self._push(frames.infer(self._next_id(), infer.task_id, llm.name, llm.model, infer.request, left_s, limit), now)

    def send_wake(self, wake: Wake, limit_s: float) -> None:
        """Take a wake on, to be ended after `limit_s`, and tell the publisher."""
        self._hold(wake, wake.started_at + limit_s)
        llm = wake.row.llm
        self._push(frames.wake(self._next_id(), wake.task_id, llm.name, llm.model, limit_s, wake.hibernate))

    def send_cancel(self, task_id: str, reason: CancelReason) -> None:
        """Tell the publisher that a task has ended without it; nothing once the channel has ended, for then it knows."""
        if self.ended is None:
            self._push(frames.cancel(self._next_id(), task_id, reason))

    def send_results(self, taken: int) -> None:
        """Tell the publisher how many records of its shared upload have been taken."""
        self._push(frames.results(self._next_id(), taken))

    def withdraw(self, task_id: str) -> None:
        """A task is over whose frame nobody has taken: it need not be sent."""
        self._withdrawn.add(task_id)

    def forget(self, task: Infer | Wake) -> None:
        """A task that was sent on it is over."""
        assert task.deadline is not None
        del self.tasks[task.task_id]
        self.deadlines.disarm(task.deadline)

    def hasten(self, deadline: Deadline, due: float) -> None:
        """Let a deadline fire at `due`, unless it does before."""
        if due < deadline.due:
            self.deadlines.arm(deadline, due)

    def _hold(self, task: Infer | Wake, due: float, soonest: float = math.inf) -> None:
        assert task.deadline is not None
        self.tasks[task.task_id] = task
        self.deadlines.arm(task.deadline, due, soonest)

    def _next_id(self) -> str:
        self._sequence += 1
        return f"{self.epoch}-{self._sequence}"

    def _push(self, frame: Frame, now: float | None = None) -> None:
        """Queue a frame. A channel whose untaken frames pass the bound ends, as `stale`."""
        if self._closed:
            return
        if not self._outbox:
            self._taken_at = trio.current_time() if now is None else now
            self.deadlines.arm(self._stall, self._taken_at + self._config.peer_stall_s)
        self._outbox.append(frame)
        self._weight += frame.weight
        if self._weight * 2 >= self._config.max_untaken_frame_bytes:
            self._full = True
        if self._wakeup is not None:
            self._wakeup.set()
        if self._weight > self._config.max_untaken_frame_bytes:
            self._on_overflow(self)

    def close(self, reason: ByeReason | None) -> None:
        """Take no more frames: after what is queued and `bye` the stream ends; without a reason (nobody reads) at once."""
        if self._closed:
            return
        if self.results is not None:
            self.results.end()
        if reason is None:
            self._outbox.clear()
        else:
            # What it has not begun it shall not begin: that may be another's by then.
            self._outbox = [frame for frame in self._take_outbox() if frame.event not in ("infer", "wake")]
            self._outbox.append(frames.bye(self._next_id(), reason))
        self._closed = True
        self.deadlines.disarm(self._stall)
        if self._wakeup is not None:
            self._wakeup.set()

    # What its transport does ----------------------------------------------------------------------------------------

    async def receive(self) -> list[Frame]:
        """All frames that have queued up, at least one; an empty list once the channel has ended.

        Raises:
            trio.BusyResourceError: another task is receiving.
        """
        while True:
            while not self._outbox:
                if self._closed:
                    return []
                if self._wakeup is not None:
                    raise trio.BusyResourceError("another task is receiving from this channel")
                self._wakeup = trio.Event()
                try:
                    await self._wakeup.wait()
                finally:
                    self._wakeup = None
            taken = self._take_outbox()
            for frame in taken:
                if frame.event in ("infer", "wake") and (task := self.tasks.get(frame.data["task_id"])) is not None:
                    task.frame_taken = True
            self._weight = 0
            if self._full:
                self._full = False
                if not self._closed:
                    self._on_room(self)
            if taken:
                return taken

    def _take_outbox(self) -> list[Frame]:
        """All frames that have queued up, but those of tasks that are over."""
        taken, withdrawn = self._outbox, self._withdrawn
        self._outbox = []
        if withdrawn:
            taken = [frame for frame in taken if frame.data.get("task_id") not in withdrawn]
            self._withdrawn = set()
        return taken

    # No generator: whoever breaks off a loop would leave it to the collector, and Trio would say so.
    def __aiter__(self) -> Channel:
        return self

    async def __anext__(self) -> Frame:
        frame = next(self._taken, None)
        if frame is None:
            self._taken = iter(await self.receive())
            frame = next(self._taken, None)
        if frame is None:
            raise StopAsyncIteration
        return frame

    def note_progress(self) -> None:
        """What `receive` gave is still being written, and the peer has just taken some of it: it is slow, not stalled."""
        self._taken_at = trio.current_time()

    def disconnect(self) -> None:
        """The peer is gone: acts at once, whatever the transport is stuck in. Idempotent."""
        self._on_disconnect(self)

    def _on_stall(self) -> None:
        if not self._outbox:
            return
        due = self._taken_at + self._config.peer_stall_s
        if due <= trio.current_time():
            self._on_overflow(self)
        else:
            self.deadlines.arm(self._stall, due)


async def run_session(channel: Channel, before: Channel | None, on_current: Callable[[Channel], None]) -> None:
    """Be one epoch of a session: wait for the one before to be joined, be current, own its deadlines, until cancelled.

    It supervises itself: a fault of ours in here ends this one channel, never the broker.

    Args:
        channel: this epoch.
        before: the epoch before it, while that has not been joined.
        on_current: makes it the current one; raises nothing.
    """
    try:
        with channel.scope:
            await trio.lowlevel.checkpoint()  # it may have ended before it began
            if before is not None:
                await before.joined.wait()
            if channel.ended is not None:
                return  # it ended after that wait was over and before this task ran
            on_current(channel)
            # In this task itself: one of its own, and a nursery, would be a tenth of what an idle channel holds.
            await channel.deadlines.run()
    except Exception as error:
        logger.error("session %s: epoch %d failed: %s", channel.session_id, channel.epoch, stacks_of(error))
        channel.disconnect()
    finally:
        channel.joined.set()
        if channel.session.leaving is channel:
            channel.session.leaving = None  # with all the frames that nobody took
