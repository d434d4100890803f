"""What protocol.md says of a broker, as a small program without tasks, streams or a store.

`test_machine` plays it beside the real one and compares the two after every step. It is written from the protocol, not from
the code: it shares nothing with the package, knows rows, sessions, channels, infers and wakes as plain records, and decides
with `if`s. Two things it does not decide. A step that is not `settle`d leaves channels pending, as a broker does until its
tasks have run. And where several deadlines are up in one instant, `after` gives every order in which they may fall.

Statuses are words; a caller's end is (outcome, code, phase); a refusal is the set of codes that would all be right.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

#: The times and bounds of the broker under test, in its own names.
TIMES = {
    "heartbeat_timeout_s": 90.0,
    "heartbeat_interval_s": 30.0,
    "sweep_interval_s": 15.0,
    "inactive_retention_s": 400.0,
    "wake_s": 40.0,
    "queue_s": 60.0,
    "first_byte_s": 70.0,
    "idle_s": 50.0,
    "total_s": 500.0,
    "peer_stall_s": 45.0,
    "settled_memory_s": 100.0,
    "cancel_lease_s": 10.0,
}
BOUNDS = {
    "max_waiting_per_llm": 4,
    "max_waiting": 7,
    "max_waiting_per_key": 2,
    "max_settled_per_session": 4,
    "max_sessions_per_owner": 2,
    "max_llms_per_session": 3,
    "max_heartbeat_tasks": 4,
    "reply_buffer_bytes": 10,
}

NEVER = float("inf")
#: Of a publisher itself: nothing has been generated, and another may be asked.
REFUSALS = (429, 503)


class Refused(Exception):
    """The broker says no, for one of these reasons, and nothing has changed."""

    def __init__(self, *codes: str, perhaps: bool = False) -> None:
        super().__init__(*codes)
        self.codes = set(codes)
        self.perhaps = perhaps  # or does not say it


@dataclass(eq=False)
class Channel:
    key: str
    session: str
    epoch: int
    state: str = "pending"  # current, ended
    reason: str | None = None  # None, once ended: its peer is gone
    frames: list[tuple[str, ...]] = field(default_factory=list)

    def send(self, *frame: str) -> None:
        if self.state != "ended":
            self.frames.append(frame)


@dataclass(eq=False)
class Task:
    """An infer or a wake; `channel` None: it has not been sent."""

    key: str
    row: Row | None = None  # an infer that waits has none
    channel: Channel | None = None
    over: bool = False
    turn: int = 0  # which frame of all it was
    taken: bool = False  # its frame, by its channel's transport
    due: float = NEVER  # a wake's
    uploading: bool = False
    final: bool = False
    skip: int = 0
    status: int = 200
    pieces: bool = False
    body: bytes = b""


@dataclass(eq=False)
class Infer(Task):
    asked: str = ""
    who: str | None = None  # the key that it came with
    pool: Pool | None = None  # where it waits, or waited,
    only: str | None = None  # and for which row alone
    refused: set[str] = field(default_factory=set)  # rows that would not have it
    kept: bytes | None = None  # an answer of 429 or 503, while another row may still have it,
    kept_status: int = 0  # and which of them
    stream: bool = False
    reads: bool = True
    phase: str = "queue"
    phase_until: float = NEVER
    total_until: float = NEVER
    sent_at: float = NEVER
    attempts: int = 0
    headed: bool = False  # its answer has begun, and `head` is its status
    head: int = 200
    last_byte_at: float = 0.0
    unread: int = 0  # bytes before a reader that stands still,
    unread_since: float = NEVER  # and since when
    held: bytes | None = None  # a piece whose upload is held back

    @property
    def full(self) -> bool:
        return self.unread >= BOUNDS["reply_buffer_bytes"]


@dataclass(eq=False)
class Stop:
    """A slot of an infer that is over, and whose publisher has been told to stop."""

    infer: Infer
    channel: Channel
    until: float
    answered: bool = False


@dataclass(eq=False)
class Pool:
    """Rows, and all who wait for any or for one of them; a row without a pool has one of its own."""

    name: str | None
    rows: list[Row] = field(default_factory=list)
    line: list[Infer] = field(default_factory=list)
    ring: list[str | None] = field(default_factory=list)  # the keys that wait, the one whose turn it is first
    last: tuple[str | None, ...] = ()  # the key that was served last, if any was

    def join(self, infer: Infer, *, first: bool = False) -> None:
        """Each key's own come in their order; `first`: before all of them, and it is their turn."""
        if infer.who not in self.ring:
            self.ring.append(infer.who)
            self._give_way(self.last)
        self.line.insert(0 if first else len(self.line), infer)
        if first:
            self.ring.remove(infer.who)
            self.ring.insert(0, infer.who)

    def leave(self, infer: Infer) -> None:
        self.line.remove(infer)
        if not any(other.who == infer.who for other in self.line):
            self.ring.remove(infer.who)

    def serve(self, who: str | None) -> None:
        """One of this key has had its turn."""
        self.last = (who,)
        self._give_way(self.last)

    def _give_way(self, keys: tuple[str | None, ...]) -> None:
        for who in keys:
            if who in self.ring:
                self.ring.remove(who)
                self.ring.append(who)


@dataclass(eq=False)
class Row:
    name: str
    owner: str
    status: str
    session: str | None
    public: bool = False
    remembers: str | None = None
    since: float | None = None  # inactive since
    beat: float = 0.0
    slots: int | None = None
    wake_s: float | None = None
    drains: bool = False  # its publisher lets what is cancelled finish
    pool: Pool = field(default_factory=lambda: Pool(None))
    hold: str | None = None  # an operator's
    paused: bool = False  # by its publisher
    sent: list[Infer] = field(default_factory=list)
    stops: list[Stop] = field(default_factory=list)
    wake: Task | None = None

    def __post_init__(self) -> None:
        self.pool.rows.append(self)

    @property
    def waiting(self) -> list[Infer]:
        """Who asked for it by its name."""
        return [infer for infer in self.pool.line if infer.only == self.name]

    @property
    def held(self) -> bool:
        return self.paused or self.hold is not None

    @property
    def stands_still(self) -> bool:
        return self.paused or self.hold == "pause"

    @property
    def free(self) -> bool:
        return self.slots is None or len(self.sent) + len(self.stops) < self.slots

    @property
    def live(self) -> bool:
        return not self.public and self.status != "inactive"

    @property
    def withdrawn(self) -> bool:
        return self.status == "inactive" and self.remembers is None


@dataclass(eq=False)
class Session:
    name: str
    owner: str
    epoch: int = 0
    channel: Channel | None = None
    pending: Channel | None = None
    settled: list[tuple[str, bool, float, int]] = field(
        default_factory=list
    )  # task, by its publisher, when, in which step
    # Whether a session "has" a row that was withdrawn from it the protocol does not say (a row bears the id of a session
    # that left, too), so there are two answers to since when it has had none.
    unused_at_least: float | None = None
    unused_at_most: float | None = None
    may_be_gone: bool = False


class Model:
    def __init__(self) -> None:
        self.now = 0.0
        self.step = 0  # what happens in one step has no order
        self.rows: dict[str, Row] = {}
        self.sessions: dict[str, Session] = {}
        self.channels: dict[str, Channel] = {}
        self.tasks: dict[str, Task] = {}
        self.ends: dict[str, tuple[str, str, str | None]] = {}  # every infer that is over
        self.offline = 0  # infers that were over as soon as accepted
        self.wake_ends: dict[str, str] = {}
        self.released: list[tuple[str, str]] = []  # infers whose slots were held after their ends, and until what
        self.numbers: dict[str, int] = {}
        self.turn = 0
        self.pick: str | None = None  # the row that the broker has sent the infer to that it was just told of
        self.moved: dict[str, Task] = {}  # by infer, what was last refused of it
        self.begin()

    def begin(self) -> None:
        """A broker starts."""
        self.started_at = self.now
        self.next_sweep = self.now + TIMES["sweep_interval_s"]
        self.counted = dict.fromkeys(("accepted", "completed", "failed", "cancelled", "wakes", "woken", "unwoken"), 0)
        self.stopping = False
        self.stop_at = NEVER
        self.stopped = False

    def _key(self, kind: str) -> str:
        self.numbers[kind] = self.numbers.get(kind, 0) + 1
        return f"{kind}{self.numbers[kind]}"

    def _next_turn(self) -> int:
        self.turn += 1
        return self.turn

    # What can be asked of it

    def rows_of(self, session: Session) -> list[Row]:
        return [r for r in self.rows.values() if r.session == session.name and r.owner == session.owner]

    def sent(self) -> list[Task]:
        """In the order in which they were."""
        found = [t for t in self.tasks.values() if t.channel is not None and not t.over]
        return sorted(found, key=lambda task: task.turn)

    def stops(self) -> list[Stop]:
        return [s for r in self.rows.values() for s in r.stops]

    def pools(self) -> list[Pool]:
        found: list[Pool] = []
        for row in self.rows.values():
            if row.pool not in found:
                found.append(row.pool)
        return found

    def find_pool(self, name: str) -> Pool | None:
        return next((pool for pool in self.pools() if pool.name == name), None)

    def waiting(self) -> list[Infer]:
        return [infer for pool in self.pools() for infer in pool.line]

    def is_reachable(self, row: Row) -> bool:
        session = self.sessions.get(row.session or "")
        return row.live and session is not None and (session.channel or session.pending) is not None

    def is_routable(self, row: Row) -> bool:
        return self.is_reachable(row) and not row.held

    def is_hopeful(self, row: Row, infer: Infer) -> bool:
        """A pause may end, and a drained row still serves whoever has asked for it by name."""
        return self.is_reachable(row) and (infer.only is not None or row.hold != "drain")

    def candidates(self, infer: Infer) -> list[Row]:
        rows = infer.pool.rows
        return [r for r in rows if r.name == infer.only or (infer.only is None and r.name not in infer.refused)]

    def can_move(self, infer: Infer) -> bool:
        others = [row for row in self.candidates(infer) if row is not infer.row]
        return not infer.headed and infer.only is None and bool(others)

    def channel_of(self, row: Row) -> Channel | None:
        session = self.sessions.get(row.session or "")
        return None if session is None else session.channel

    def find_session(self, name: str, owner: str) -> Session:
        session = self.sessions.get(name)
        if session is None or session.owner != owner:
            raise Refused("session_not_found")
        return session

    def find_task(self, key: str, owner: str) -> Task:
        task = self.tasks[key]
        if task.channel is not None:
            session = self.sessions.get(task.channel.session)
            if not task.over and session is not None and session.owner == owner:
                return task
            if task.over and session is not None and session.owner == owner:
                if any(stop.infer.key == key for stop in self.stops()):
                    raise Refused("task_cancelled")  # for as long as its slot is held, remembered or not
                raise Refused(*self._recall(session, key))
        raise Refused("task_not_found")

    def _recall(self, session: Session, key: str) -> set[str]:
        """What its publisher may be told of a task that is over. Of those that ended in one step any may be forgotten."""
        _, by_publisher, at, step = next((s for s in session.settled if s[0] == key), ("", False, -NEVER, -1))
        newer = sum(other > step for *_, other in session.settled)
        beside = sum(other == step for *_, other in session.settled) - 1
        codes = set()
        if newer < BOUNDS["max_settled_per_session"] and self.now - at < TIMES["settled_memory_s"]:
            codes.add("task_already_settled" if by_publisher else "task_cancelled")
        if not codes or newer + beside >= BOUNDS["max_settled_per_session"]:
            codes.add("task_not_found")
        return codes

    # Publishers: sessions, rows, channels

    def register(self, name: str, owner: str, specs: list[Spec]) -> dict[str, tuple[str, str]]:
        session = self.sessions.get(name)
        wrong = set()
        if self.stopping:
            wrong.add("shutting_down")
        if session is not None and session.owner != owner:
            wrong.add("session_taken")
        owned = sum(s.owner == owner for s in self.sessions.values())
        if session is None and owned >= BOUNDS["max_sessions_per_owner"]:
            wrong.add("too_many")
        if len(specs) > BOUNDS["max_llms_per_session"]:
            wrong.add("too_many")
        for spec in specs:
            row = self.rows.get(spec.name)
            if row is not None and row.public:
                wrong.add("llm_is_public")
            elif row is not None and (row.owner != owner or (row.session != name and row.live)):
                wrong.add("llm_name_taken")
            pool = None if spec.pool is None else self.find_pool(spec.pool)
            if pool is not None and pool.rows[0].owner != owner:
                wrong.add("llm_name_taken")
        if wrong:
            raise Refused(*wrong)
        if session is None:
            session = self.sessions[name] = Session(name, owner)
        for row in self.rows_of(session):
            if row.name not in {spec.name for spec in specs}:
                self._withdraw(row)
        return {spec.name: self._register_row(session, spec) for spec in specs}

    def _register_row(self, session: Session, spec: Spec) -> tuple[str, str]:
        row = self.rows.get(spec.name)
        if row is None:
            outcome, status = "created", spec.status or "active"
            row = self.rows[spec.name] = Row(spec.name, session.owner, status, session.name)
        else:
            outcome = "reactivated" if row.session == session.name else "adopted"
            kept = row.remembers if row.status == "inactive" else row.status
            status = spec.status or kept or "active"
            gone = row.wake is not None and self.sessions.get(row.wake.channel.session) is not session
            if gone:  # it was asked of another, whose row this no longer is
                self._end_wake(row.wake, "lost", "model_offline", cancel="client_disconnected")
            row.session = session.name
        self._join(row, spec.pool)
        row.slots, row.wake_s, row.drains = spec.slots, spec.wake_s, spec.drains
        if row.wake is not None and status == "active":
            self._end_wake(row.wake, "succeeded", by_publisher=True)
        self._revive(row, status)
        return status, outcome

    def _join(self, row: Row, name: str | None) -> None:
        """It is in this pool from now on, and whoever waits for it by name too."""
        before = row.pool
        if before.name == name:
            return
        named = row.waiting
        pool = Pool(None) if name is None else self.find_pool(name) or Pool(name)
        before.rows.remove(row)
        pool.rows.append(row)
        for infer in named:
            before.leave(infer)
            pool.join(infer)
            infer.pool = pool
        row.pool = pool
        self._strand(before)

    def heartbeat(self, name: str, owner: str, statuses: dict[str, str], tasks: list[str]) -> list[str]:
        session = self.find_session(name, owner)
        if len(tasks) > BOUNDS["max_heartbeat_tasks"]:
            raise Refused("too_many")
        for row in self.rows_of(session):
            if row.withdrawn:
                continue
            reported = statuses.get(row.name)
            kept = row.remembers if row.status == "inactive" else row.status
            if reported == "active" and row.status == "hibernating" and row.wake is not None:
                self._end_wake(row.wake, "succeeded", by_publisher=True)
            self._revive(row, reported or kept)
        for stop in self.stops():
            if stop.channel is session.channel and stop.answered and stop.infer.key not in tasks:
                self._release(stop, "reported")
        held = {t.key for t in self.sent() if t.channel.session == name}
        return [key for key in tasks if key not in held]

    def open_channel(self, name: str, owner: str) -> Channel:
        if self.stopping:
            raise Refused("shutting_down")
        session = self.find_session(name, owner)
        session.epoch += 1
        channel = Channel(f"{name}#{session.epoch}@{self._key('c')}", name, session.epoch)
        self.channels[channel.key] = channel
        before, session.pending = session.pending, channel
        self._note_unused()
        for older in (before, session.channel):
            if older is not None:
                self.end_channel(older, "superseded")
        return channel

    def settle(self) -> None:
        """Everything that can move has moved."""
        for session in list(self.sessions.values()):
            if (channel := session.pending) is not None:
                session.pending, session.channel = None, channel
                channel.state = "current"
                channel.send("hello")
                for row in self.rows_of(session):
                    if not row.withdrawn:
                        self._revive(row, row.remembers if row.status == "inactive" else row.status)
        for channel in self.channels.values():
            self._take(channel)
        for stop in self.stops():
            stop.answered |= stop.infer.held is not None  # an upload that was held back has been refused
        if self.stopping and not self.stopped and self._is_quiet():
            self._stop()
        self._note_unused()

    def _take(self, channel: Channel) -> None:
        """Its transport takes what there is."""
        for task in self.sent():
            task.taken |= task.channel is channel

    def end_channel(self, channel: Channel, reason: str | None) -> None:
        """Its peer is gone (no reason), or the broker ends it."""
        if channel.state == "ended":
            return
        session = self.sessions[channel.session]
        if session.channel is channel:
            session.channel = None
        if session.pending is channel:
            session.pending = None
        on_it = [t for t in self.sent() if t.channel is channel]
        for task in on_it:
            if not task.taken:
                self._withdraw_frame(task)
        if reason is not None:
            channel.send("bye", reason)
        channel.state, channel.reason = "ended", reason
        for stop in [s for s in self.stops() if s.channel is channel]:
            self._release(stop, "lost")
        for task in on_it:
            if not isinstance(task, Infer):
                self._end_wake(task, "lost", "publisher_disconnected")
        again = [t for t in on_it if isinstance(t, Infer) and not t.taken and t.attempts <= self.most_attempts(t)]
        for infer in reversed(again):
            self._requeue(infer)
        for task in on_it:
            if isinstance(task, Infer) and task not in again:
                self._end(task, "failed", "publisher_disconnected")
        for infer in reversed(again):
            if not infer.over and infer.channel is None:
                if not any(row.live for row in self.candidates(infer)):  # they were withdrawn before
                    self._strand(infer.pool)
                else:
                    self._pump_pool(infer.pool)
        if session.channel is None and session.pending is None:
            for row in self.rows_of(session):
                self._lose(row)

    def goodbye(self, name: str, owner: str) -> None:
        self._remove_session(self.find_session(name, owner), "goodbye")

    def evict(self, name: str) -> None:
        if name not in self.sessions:
            raise Refused("session_not_found")
        self._remove_session(self.sessions[name], "evicted")

    def _remove_session(self, session: Session, reason: str) -> None:
        for row in self.rows_of(session):
            self._withdraw(row)
        for channel in (session.pending, session.channel):
            if channel is not None:
                self.end_channel(channel, reason)
        del self.sessions[session.name]

    # The life of a row

    def _revive(self, row: Row, status: str) -> None:
        """It is `status` from now on, and a sign of life came with it."""
        row.status, row.remembers, row.since, row.beat = status, None, None, self.now
        self._review_phases(row.pool)
        self._pump(row)

    def _lose(self, row: Row) -> None:
        if row.live:
            row.status, row.remembers, row.since = "inactive", row.status, self.now
            self._strand(row.pool, lost=True)
            self._review_phases(row.pool)

    def _withdraw(self, row: Row) -> None:
        if row.live:
            row.since = self.now
        row.status, row.remembers = "inactive", None
        self._strand(row.pool)
        self._review_phases(row.pool)

    def _strand(self, pool: Pool, *, lost: bool = False) -> None:
        """Whoever waits there and has nobody to hope for is offline; for the others another may have to be woken."""
        for infer in list(pool.line):
            if not any(self.is_hopeful(row, infer) for row in self.candidates(infer)):
                waking = lost and infer.phase == "wake"
                self._end(infer, "failed", "publisher_disconnected" if waking else "model_offline")
        self._review_phases(pool)
        self._consider(pool)

    def _remove_row(self, row: Row) -> None:
        for infer in row.waiting:
            self._end(infer, "failed", "model_offline")
        del self.rows[row.name]
        before, row.pool = row.pool, Pool(None)
        before.rows.remove(row)
        if row.wake is not None:
            self._end_wake(row.wake, "lost", "model_offline", cancel="shutdown")
        for infer in list(row.sent):
            self._end(infer, "failed", "publisher_disconnected", cancel="shutdown")
        for stop in list(row.stops):
            self._release(stop, "lost")
        self._strand(before)

    def hold(self, name: str, hold: str | None) -> None:
        """An operator's, of a row or of a pool's rows; None: it ends."""
        pool = self.find_pool(name)
        rows = [self.rows[name]] if name in self.rows else list(pool.rows) if pool is not None else []
        if not rows:
            raise Refused("model_not_found")
        changed = [row for row in rows if row.hold != hold]
        for row in changed:
            row.hold = hold
        self._review(changed)

    def pause(self, name: str, owner: str, paused: bool, rows: Collection[str]) -> None:
        """All rows of a session, by its publisher. Whether it "has" one that was withdrawn long ago is left open: `rows`."""
        session = self.find_session(name, owner)
        theirs = [row for row in self.rows_of(session) if not row.withdrawn or row.name in rows]
        changed = [row for row in theirs if row.paused != paused]
        for row in changed:
            row.paused = paused
        self._review(changed)

    def _review(self, rows: list[Row]) -> None:
        for row in rows:
            self._strand(row.pool)
            self._pump(row)

    def _review_phases(self, pool: Pool) -> None:
        for infer in pool.line:
            if self._phase(infer) != infer.phase:
                self._wait(infer)

    def _phase(self, infer: Infer) -> str:
        statuses = {row.status for row in self.candidates(infer)}
        return "wake" if "active" not in statuses and "hibernating" in statuses else "queue"

    def _pump(self, row: Row) -> None:
        """Those who wait for a row go as far as they can."""
        channel = self.channel_of(row)
        if channel is None or row.name not in self.rows:
            return
        if row.status == "active" and not row.stands_still:
            while row.free and (infer := self._next(row)) is not None:
                row.pool.serve(infer.who)
                row.pool.leave(infer)
                self._send(infer, row)
        self._consider(row.pool)

    def _pump_pool(self, pool: Pool) -> None:
        for row in list(pool.rows):
            self._pump(row)

    def _next(self, row: Row) -> Infer | None:
        drained = row.hold == "drain"
        line = row.pool.line
        for who in row.pool.ring:
            for infer in line:
                if infer.who == who and (infer.only == row.name or (not drained and row in self.candidates(infer))):
                    return infer
        return None

    def _consider(self, pool: Pool) -> None:
        """Wake what those who wait need: the row that one has named, or one of those that he may go to where none serves."""
        for row in pool.rows:
            if row.waiting and not row.stands_still:
                self._want(row)
        for infer in pool.line:
            if infer.only is None:
                rows = [row for row in self.candidates(infer) if self.is_routable(row)]
                if not any(row.status == "active" or row.wake is not None for row in rows):
                    asleep = [r for r in rows if r.status == "hibernating" and self.channel_of(r) is not None]
                    if asleep:
                        self._want(min(asleep, key=lambda row: (row.wake_s or TIMES["wake_s"], row.name)))

    def _want(self, row: Row) -> None:
        if row.status == "hibernating" and row.wake is None and (channel := self.channel_of(row)) is not None:
            self._start_wake(row, channel)

    # Infers and wakes

    def infer(
        self, name: str, stream: bool, reads: bool, late: bool, pick: str | None, who: str | None
    ) -> Infer | None:
        """None: accepted, and offline at once.

        Args:
            name: a row's or a pool's.
            stream: as asked.
            reads: whether its caller reads on.
            late: by what has been measured it would wait for longer than it can.
            pick: of several rows that are free, the one that the broker chose.
            who: whose key it came with.
        """
        if self.stopping:
            raise Refused("shutting_down")
        row, pool = self.rows.get(name), self.find_pool(name)
        if row is None and pool is None:
            raise Refused("model_not_found")
        infer = Infer(self._key("i"), asked=name, stream=stream, reads=reads, total_until=self.now + TIMES["total_s"])
        infer.who = who
        infer.pool, infer.only = (pool, None) if row is None else (row.pool, name)
        place = self._place(infer, late, pick)
        if place == "full":
            raise Refused("queue_full")
        self.counted["accepted"] += 1
        if place == "offline":
            self.counted["failed"] += 1
            self.offline += 1
            return None
        self.tasks[infer.key] = infer
        self._go(infer, place)
        return infer

    def _place(self, infer: Infer, late: bool, pick: str | None) -> Row | str:
        """The row that it is sent to, or `queue`, `full`, `offline`."""
        routable = [row for row in self.candidates(infer) if self.is_routable(row)]
        if not routable:
            return "offline"
        line = infer.pool.line
        before = [each for each in line if each.only is None or each.only == infer.only]
        free = [r for r in routable if r.status == "active" and r.free and self.channel_of(r) is not None]
        if free and not before:
            assert pick is None or pick in {row.name for row in free}, (pick, free)
            return next((row for row in free if row.name == pick), free[0])
        same = [each for each in line if each.only == infer.only]
        in_line, in_all = BOUNDS["max_waiting_per_llm"] - len(same), BOUNDS["max_waiting"] - len(self.waiting())
        room = min(in_line, in_all)
        if infer.who is not None:  # nobody may have more waiting, in a line or in all, than there is still room for
            own = sum(each.who == infer.who for each in self.waiting())
            own_in_line = sum(each.who == infer.who for each in line)
            room = min(in_line - own_in_line, in_all - own, BOUNDS["max_waiting_per_key"] - own)
        return "full" if room <= 0 or late else "queue"

    def _go(self, infer: Infer, place: Row | str) -> None:
        if isinstance(place, Row):
            infer.pool.serve(infer.who)
            self._send(infer, place)
            return
        infer.pool.join(infer)
        self._wait(infer)
        self._consider(infer.pool)
        for row in self.candidates(infer):
            if row.status == "active" and row.free:
                self._pump(row)

    def _wait(self, infer: Infer) -> None:
        infer.phase = self._phase(infer)
        wakes = [row.wake_s or 0 for row in self.candidates(infer)]
        limit = TIMES["queue_s"] if infer.phase == "queue" else max(TIMES["wake_s"], *wakes)
        infer.phase_until = self.now + limit

    def _send(self, infer: Infer, row: Row) -> None:
        assert row.free, "invariant 3"
        assert row.name not in infer.refused, "each is asked once"
        channel = infer.channel = self.channel_of(row)
        infer.row, infer.sent_at, infer.phase, infer.taken = row, self.now, "sent", False
        infer.attempts += 1
        infer.turn = self._next_turn()
        row.sent.append(infer)
        channel.send("infer", row.name, infer.key)

    def _move(self, infer: Infer, pick: str | None) -> bool:
        """Its publisher would not have it: another row of its pool may, if there is one."""
        row, channel = infer.row, infer.channel
        infer.refused.add(row.name)
        place = self._place(infer, False, pick)
        if place in ("full", "offline"):
            infer.refused.discard(row.name)
            return False
        # What its publisher has had of it is over; under that name it is remembered.
        old = Task(f"{infer.key}@{row.name}", row, channel, over=True)
        self.tasks[old.key] = self.moved[infer.key] = old
        channel.frames = [tuple(old.key if word == infer.key else word for word in frame) for frame in channel.frames]
        self.sessions[channel.session].settled.append((old.key, True, self.now, self.step))
        row.sent.remove(infer)
        infer.row = infer.channel = infer.kept = None
        infer.uploading = infer.pieces = infer.final = False
        infer.body, infer.skip, infer.status = b"", 0, 200
        self._go(infer, place)
        self._pump(row)
        return True

    def most_attempts(self, infer: Infer) -> int:
        pool = self.find_pool(infer.asked)
        return 1 if infer.asked in self.rows else 0 if pool is None else len(pool.rows)

    def _requeue(self, infer: Infer) -> None:
        """Its frame never left: it waits again, before all others."""
        infer.row.sent.remove(infer)
        infer.row = infer.channel = None
        row, pool = self.rows.get(infer.asked), self.find_pool(infer.asked)
        infer.pool, infer.only = (pool, None) if row is None else (row.pool, row.name)
        infer.pool.join(infer, first=True)
        self._wait(infer)

    def _withdraw_frame(self, task: Task) -> None:
        task.channel.frames = [f for f in task.channel.frames if f[0] not in ("infer", "wake") or f[2] != task.key]

    def _end(self, infer: Infer, outcome: str, code: str, phase: str | None = None, **how: object) -> None:
        assert infer.key not in self.ends, "invariant 2"
        row = infer.row
        if row is None:
            infer.pool.leave(infer)
        else:
            row.sent.remove(infer)
        self.ends[infer.key] = (outcome, code, phase)
        self.counted[outcome] += 1
        self._over(infer, **how)
        if row is not None:
            self._pump(row)

    def _over(self, task: Task, cancel: str | None = None, by_publisher: bool = False) -> None:
        task.over = True
        if task.channel is None:
            return
        session = self.sessions.get(task.channel.session)
        if session is not None:
            session.settled.append((task.key, by_publisher, self.now, self.step))
        if cancel is not None and not task.taken:
            self._withdraw_frame(task)
        elif cancel is not None:
            if isinstance(task, Infer):
                self._hold(task, task.channel)
            task.channel.send("cancel", task.row.name, task.key, cancel)

    def _hold(self, infer: Infer, channel: Channel) -> None:
        """Its slot stays taken until its publisher has stopped, as far as can be told."""
        rows = {id(row): row for row in (*self.rows.values(), infer.row)}  # its own may just be going
        on_it = sum(stop.channel is channel for row in rows.values() for stop in row.stops)
        if channel.state != "ended" and on_it < BOUNDS["max_settled_per_session"]:
            until = self.now + TIMES["cancel_lease_s"]
            if infer.row.drains:
                until = max(until, infer.total_until)
            infer.row.stops.append(Stop(infer, channel, until))

    def _release(self, stop: Stop, how: str) -> None:
        row = stop.infer.row
        row.stops.remove(stop)
        self.released.append((stop.infer.key, how))
        self._pump(row)

    def confirm_cancelled(self, key: str, owner: str) -> None:
        for stop in self.stops():
            if stop.infer.key == key and self.sessions[stop.channel.session].owner == owner:
                self._release(stop, "confirmed")
                return
        try:
            task = self.find_task(key, owner)
        except Refused as refused:
            if refused.codes == {"task_not_found"}:
                raise
            if "task_not_found" in refused.codes:
                raise Refused("task_not_found", perhaps=True) from None
            return
        self._fail(task)

    def note_answered(self, key: str) -> None:
        """Its publisher has been told that it is over."""
        for stop in self.stops():
            stop.answered |= stop.infer.key == key

    def _start_wake(self, row: Row, channel: Channel) -> None:
        wake = Task(
            self._key("w"), row, channel, turn=self._next_turn(), due=self.now + (row.wake_s or TIMES["wake_s"])
        )
        self.tasks[wake.key] = row.wake = wake
        self.counted["wakes"] += 1
        channel.send("wake", row.name, wake.key)

    def _end_wake(self, wake: Task, outcome: str, code: str = "", **how: object) -> None:
        assert wake.key not in self.wake_ends, "invariant 2"
        row = wake.row
        row.wake = None
        self.wake_ends[wake.key] = outcome
        self.counted["woken" if outcome == "succeeded" else "unwoken"] += 1
        self._over(wake, **how)
        if outcome == "succeeded":
            if row.live:
                self._revive(row, "active")
            return
        waiters = [i for i in row.pool.line if i.phase == "wake" and i.only in (None, row.name)]
        held, row.wake = row.wake, wake  # none of them begins another
        for infer in waiters:
            if infer.only is None:  # whoever may go to another row does
                infer.refused.add(row.name)
                infer.pool.leave(infer)
                infer.pool.join(infer)
            if infer.only is None and any(self.is_routable(other) for other in self.candidates(infer)):
                self._wait(infer)
            else:
                self._end(infer, "failed", code)
        row.wake = held
        self._pump(row)
        self._consider(row.pool)

    def leave(self, infer: Infer) -> None:
        if not infer.over:
            self._end(infer, "cancelled", "client_disconnected", cancel="client_disconnected")

    def read_on(self, infer: Infer) -> None:
        """A reader that stood still takes what there is, and so the upload goes on."""
        infer.reads = True
        was_full = infer.full
        infer.unread, infer.unread_since = 0, NEVER
        if infer.over:
            return
        if was_full:
            infer.last_byte_at = self.now
        if (piece := infer.held) is not None:
            infer.held = None
            self._feed(infer, piece)

    # Results

    def open_upload(self, key: str, owner: str, status: int, offset: int | None, final: bool) -> Task:
        task = self.find_task(key, owner)
        if task.uploading:
            raise Refused("result_in_progress")
        if offset is None and (task.pieces or not final):
            raise Refused("invalid_request")
        if offset is not None and offset > len(task.body):
            raise Refused("offset_gap")
        task.uploading, task.final, task.status = True, final, status
        task.pieces |= offset is not None
        task.skip = 0 if offset is None else len(task.body) - offset
        return task

    def send(self, task: Task, data: bytes) -> bool:
        """False: it is held back until the reader reads on."""
        known = min(task.skip, len(data))
        task.skip -= known
        data = data[known:]
        if data and isinstance(task, Infer) and task.full:
            task.held = data
            return False
        if data:
            self._feed(task, data)
        return True

    def _feed(self, task: Task, data: bytes) -> None:
        task.body += data
        if isinstance(task, Infer):
            if task.kept is not None or (task.status in REFUSALS and self.can_move(task)):
                task.kept, task.kept_status = (task.kept or b"") + data, task.kept_status or task.status
                task.last_byte_at = self.now
                return
            self._head(task)
            task.last_byte_at = self.now
            if not task.reads:
                task.unread_since = task.unread_since if task.unread else self.now
                task.unread += len(data)

    def _head(self, infer: Infer) -> None:
        if not infer.headed:
            infer.headed, infer.head = True, infer.status

    def finish(self, task: Task) -> None:
        if task.final and task.skip:
            self.abort(task)  # the answer ends before what has arrived of it
            raise Refused("invalid_request")
        task.uploading = False
        if not task.final:
            return
        if isinstance(task, Infer):
            if task.kept is not None:
                task.status = task.kept_status
            if task.status in REFUSALS and self.can_move(task) and self._move(task, self.pick):
                return
            self._head(task)
            self._end(task, "completed", "completed", by_publisher=True)
        elif 200 <= task.status <= 299:
            self._end_wake(task, "succeeded", by_publisher=True)
        else:
            self._end_wake(task, "failed", "wake_failed", by_publisher=True)

    def abort(self, task: Task) -> None:
        task.uploading = False
        if isinstance(task, Infer):
            task.held = None
        if task.final and not task.over:
            self._fail(task)

    def fail(self, key: str, owner: str, status: int | None) -> None:
        task = self.find_task(key, owner)
        refuses = isinstance(task, Infer) and status in REFUSALS and self.can_move(task)
        if not (refuses and self._move(task, self.pick)):
            self._fail(task)

    def _fail(self, task: Task) -> None:
        if isinstance(task, Infer):
            self._end(task, "failed", "publisher_error", by_publisher=True)
        else:
            self._end_wake(task, "failed", "wake_failed", by_publisher=True)

    # Operators

    def put_public(self, name: str) -> None:
        if name in self.rows and not self.rows[name].public:
            raise Refused("llm_is_virtual")
        self.rows.setdefault(name, Row(name, "local", "active", None, public=True, beat=self.now))

    def delete_llm(self, name: str) -> None:
        if name not in self.rows:
            raise Refused("model_not_found")
        self._remove_row(self.rows[name])

    def sweep(self) -> tuple[list[str], list[str]]:
        """Names that it makes inactive, and that it deletes."""
        was_live = {r.name for r in self.rows.values() if r.live}
        was_there = set(self.rows)
        for row in list(self.rows.values()):
            if row.live and row.beat <= self.now - TIMES["heartbeat_timeout_s"]:
                channel = self.channel_of(row)
                if channel is not None:  # with it go all its rows
                    self.end_channel(channel, "stale")
                self._lose(row)
        self._note_unused()
        if self.now >= self.started_at + TIMES["heartbeat_timeout_s"]:
            long_ago = self.now - TIMES["inactive_retention_s"]
            for row in list(self.rows.values()):
                if row.since is not None and row.since <= long_ago:
                    self._remove_row(row)
            for session in list(self.sessions.values()):
                if session.unused_at_least is not None and session.unused_at_least <= long_ago:
                    del self.sessions[session.name]
                elif session.unused_at_most is not None and session.unused_at_most <= long_ago:
                    session.may_be_gone = True
        self._note_unused()
        inactive = {r.name for r in self.rows.values() if r.status == "inactive"}
        return sorted(was_live & inactive), sorted(was_there - set(self.rows))

    def _note_unused(self) -> None:
        for session in self.sessions.values():
            channel = session.channel or session.pending
            rows = self.rows_of(session)
            if channel is not None or rows:
                session.unused_at_least = None
            elif session.unused_at_least is None:
                session.unused_at_least = self.now
            if channel is not None or not all(row.withdrawn for row in rows):
                session.unused_at_most = None
            elif session.unused_at_most is None:
                session.unused_at_most = self.now

    # Stopping

    def drain(self, grace_s: float) -> None:
        self.stopping, self.stop_at = True, self.now + grace_s

    def _is_quiet(self) -> bool:
        return not (self.waiting() or any(row.sent for row in self.rows.values()))

    def _stop(self) -> None:
        self.stopping = self.stopped = True
        for infer in self.waiting():
            if not infer.over:
                self._end(infer, "failed", "shutting_down")
        for stop in self.stops():
            self._release(stop, "lost")
        for task in self.sent():
            if isinstance(task, Infer):
                self._end(task, "failed", "shutting_down", cancel="shutdown")
            else:
                self._end_wake(task, "lost", "shutting_down", cancel="shutdown")
        for session in self.sessions.values():
            for channel in (session.pending, session.channel):
                if channel is not None:
                    self.end_channel(channel, "shutdown")

    def restart(self) -> None:
        """It is closed, and another begins on its store."""
        self._stop()
        self._note_unused()
        self.begin()
        for row in self.rows.values():
            row.sent, row.stops, row.wake = [], [], None
            row.pool.line, row.pool.ring, row.pool.last = [], [], ()
            self._lose(row)
        for session in self.sessions.values():
            session.settled = []

    # Time

    def _due(self, infer: Infer) -> tuple[float, str]:
        """When the clock ends it, and in which phase."""
        ends = [(infer.total_until, "total")]
        if infer.channel is None:
            ends.append((infer.phase_until, infer.phase))
        elif not infer.headed:
            if infer.kept is not None:
                ends.append((infer.last_byte_at + TIMES["idle_s"], "idle"))
            ends.append((infer.sent_at + TIMES["first_byte_s"] if infer.stream else NEVER, "first_byte"))
        else:
            ends.append((infer.unread_since + TIMES["peer_stall_s"], "stall"))
            ends.append((NEVER if infer.full else infer.last_byte_at + TIMES["idle_s"], "idle"))
        return min(ends, key=lambda end: end[0])

    def causes(self) -> list[tuple[float, str, Callable[[Model], None]]]:
        """What is due now, the longest due first: since when, what, and how it is done."""
        found: list[tuple[float, str, Callable[[Model], None]]] = []
        for task in self.tasks.values():
            if task.over:
                continue
            if isinstance(task, Infer):
                wakes = [] if task.row is not None else [row.wake for row in self.candidates(task)]
                if any(wake is not None and wake.due <= self.now for wake in wakes):
                    continue  # it is the wake that failed, for all who wait
                due = self._due(task)[0]
                found.append((due, task.key, lambda model, key=task.key: model._time_out(key)))
            else:
                found.append((task.due, task.key, lambda model, key=task.key: model._time_out(key)))
        found += [(s.until, s.infer.key, lambda model, key=s.infer.key: model._expire(key)) for s in self.stops()]
        # Whether a transport has taken what is sent in this instant, when something else is due in it, is open.
        full = {task.channel.key for task in self.sent() if not task.taken}
        found += [(self.now, key, lambda model, key=key: model._take(model.channels[key])) for key in sorted(full)]
        found.append((self.next_sweep, "sweep", Model._sweep_by_clock))
        if self.stopping and not self.stopped:
            found.append((self.now if self._is_quiet() else self.stop_at, "stop", Model._stop))
        return sorted((c for c in found if c[0] <= self.now), key=lambda c: c[:2])

    def _time_out(self, key: str) -> None:
        task = self.tasks[key]
        if not isinstance(task, Infer):
            self._end_wake(task, "timed_out", "wake_timeout", cancel="deadline_exceeded")
            return
        phase = self._due(task)[1]
        if phase == "stall":
            self.leave(task)
        else:
            self._end(task, "failed", "deadline_exceeded", phase, cancel="deadline_exceeded")

    def _expire(self, key: str) -> None:
        for stop in [s for s in self.stops() if s.infer.key == key]:
            self._release(stop, "expired")

    def _sweep_by_clock(self) -> None:
        self.sweep()
        self.next_sweep = self.now + TIMES["sweep_interval_s"]

    def after(self, now: float, is_possible: Callable[[Model], bool]) -> Iterator[Model]:
        """Every model that may be, once it is `now`; `is_possible` cuts off those that are already wrong."""
        self.now = now
        self.step += 1
        yield from self._after(is_possible, set())

    def _after(self, is_possible: Callable[[Model], bool], been: set[object]) -> Iterator[Model]:
        causes = self.causes()
        if not causes:
            self.settle()
            if self.causes():
                yield from self._after(is_possible, been)
            else:
                yield self
        for _, _, act in causes:
            model = copy.deepcopy(self) if len(causes) > 1 else self
            act(model)
            # Most orders lead to the same, and so need not be followed twice.
            if (where := model._where()) not in been and is_possible(model):
                been.add(where)
                yield from model._after(is_possible, been)

    def _where(self) -> object:
        """All in it that what is due in one instant can change."""
        frames = [
            (c.key, c.state, c.reason, tuple(f for f in c.frames if name in f))
            for c in self.channels.values()
            for name in self.rows
        ]
        rows = [
            (
                r.name,
                r.status,
                r.remembers,
                r.since,
                tuple((i.key, i.phase, len(i.refused)) for i in r.pool.line),
                tuple(r.pool.ring),
                tuple(sorted((i.key, i.taken) for i in r.sent)),
                frozenset(s.infer.key for s in r.stops),
                r.wake is not None and (r.wake.key, r.wake.taken),
            )
            for r in self.rows.values()
        ]
        return (
            tuple(frames),
            tuple(rows),
            tuple((s.name, s.channel is None) for s in self.sessions.values()),
            frozenset(self.ends.items()),
            frozenset(self.wake_ends.items()),
            frozenset(self.released),
            (self.next_sweep, self.stopped),
        )


@dataclass(frozen=True)
class Spec:
    """One entry of a register."""

    name: str
    status: str | None = None
    slots: int | None = None
    wake_s: float | None = None
    drains: bool = False
    pool: str | None = None
