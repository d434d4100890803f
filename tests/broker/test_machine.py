"""The broker against a model of it, in any order of anything: Hypothesis thinks of the order.

Each rule asks the same of `model.Model` and of a broker on the virtual clock; they must answer alike, and then everything
that can be seen of the broker (rows, sessions, tasks, counters, outcomes, what callers got, every frame, the store) must be
what the model says. Some rules may act without letting anything run in between (`settle=False`): so the next one meets a
channel that is about to be current, or an end whose tasks have not been joined.

A failure prints its steps as a program that replays it. For a long search:

    WAKECALL_MACHINE_EXAMPLES=5000 pytest tests/broker/test_machine.py      (or: just machine 5000)
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence

import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from wakecall import BrokerConfig, InferRequest, LLMSpec, Status, WakecallError, open_broker
from wakecall.broker import Broker
from wakecall.errors import ModelOffline, TaskOver
from wakecall.frames import Frame
from wakecall.health import Health
from wakecall.models import Event, InferSettled, Key, SlotReleased, WakeSettled
from wakecall.placement import estimate_wait
from wakecall.session import Channel
from wakecall.store.base import MemoryStore
from wakecall.task import Infer
from wakecall.testing import check_invariants
from wakecall.upload import Upload

from . import model as theory
from .stage import Stage

CONFIG = BrokerConfig(**theory.TIMES, **theory.BOUNDS, grace_s=20.0)
EPOCH = 1_700_000_000  # of the wall clock that conftest gives every broker

OWNERS = {"s1": "anna", "s2": "anna", "s3": "anna", "s4": "ben", "s5": "ben"}
NAMES = ["a", "b", "c", "d"]
#: How many orders of one instant's deadlines are tried before a difference is a fault.
MOST_ORDERS = 2000

names = st.sampled_from(NAMES)
statuses = st.sampled_from(["active", "hibernating"])


#: Whether rows are in pools is the machine's: see there.
pool = st.runner().flatmap(lambda machine: st.sampled_from(machine.pools))


#: Whose keys callers come with, likewise.
who = st.runner().flatmap(lambda machine: st.sampled_from(machine.keyholders))


def some_specs(*names, min_size=1):
    spec = st.builds(
        theory.Spec,
        st.sampled_from(names),
        status=st.none() | statuses,
        slots=st.sampled_from([None, 1, 1, 2]),
        wake_s=st.sampled_from([None, None, 25.0, 55.0]),
        drains=st.sampled_from([False, False, False, True]),
        pool=pool,
    )
    return st.lists(spec, unique_by=lambda spec: spec.name, min_size=min_size, max_size=4)


pieces = st.sampled_from([b"", b"x", b"abc", b"0123456789ab"])
seldom = st.sampled_from([False] * 9 + [True])
settles = st.sampled_from([True, True, False])


def chosen(pick):
    """One of what `pick` finds in the machine."""
    return st.runner().flatmap(lambda machine: st.sampled_from(pick(machine)))


def any_task(machine):
    """The latest, over or not. (A wake whose frame went with its channel nobody knows.)"""
    return [key for key in machine.model.tasks if key in machine.ids][-10:]


def sent(machine):
    return [task.key for task in machine.model.sent()]


def stopped(machine):
    return [stop.infer.key for stop in machine.model.stops()]


def free(machine):
    """Tasks that a result may begin for; wakes most often, for much waits for them."""
    found = [task for task in machine.model.sent() if not task.uploading]
    return [task.key for task in found] + 2 * [task.key for task in found if not isinstance(task, theory.Infer)]


def moving(machine):
    """Uploads that are under way and not held back."""
    return [key for key in machine.uploads if getattr(machine.model.tasks[key], "held", None) is None]


def known(machine):
    """Sessions, those that are there most often."""
    return [*OWNERS, *list(machine.model.sessions) * 6]


def absent(machine):
    """Sessions, those without a channel most often."""
    there = machine.model.sessions.values()
    return [*OWNERS, *[s.name for s in there if s.channel is None] * 8]


def with_callers(machine):
    """Sessions, those without a channel most often, and those whose rows are waited for: they are superseded."""
    model = machine.model
    return [*absent(machine), *[row.session for i in model.waiting() for row in model.candidates(i)] * 8]


def callable_rows(machine):
    """Names, those of rows that can be called most often."""
    model = machine.model
    live = [r.name for r in model.rows.values() if r.live and model.channel_of(r) is not None]
    pools = [
        pool.name for pool in model.pools() if pool.name is not None and any(row.name in live for row in pool.rows)
    ]
    return [*NAMES, *live * 6, *pools * 18]


def narrow(machine):
    """Names of rows that have few slots, and take infers."""
    model = machine.model
    return [r.name for r in model.rows.values() if r.status == "active" and r.slots and model.is_routable(r)]


sessions = chosen(known)


def orderly(frames):
    """Of several cancels that follow each other the order is nobody's business."""
    runs = itertools.groupby(frames, key=lambda frame: frame[0] == "cancel")
    return [frame for cancels, run in runs for frame in (sorted(run) if cancels else run)]


def begins(seen, frames):
    """Whether `seen` is how `frames` may begin, the order of cancels apart."""
    place = 0
    for cancels, run in itertools.groupby(frames, key=lambda frame: frame[0] == "cancel"):
        expected = list(run)
        part = seen[place : place + len(expected)]
        if len(set(part)) != len(part) or not (
            set(part) <= set(expected) if cancels else part == expected[: len(part)]
        ):
            return False
        place += len(expected)
    return place >= len(seen)


class Caller:
    """One client. One that does not read takes the head, and then stands still until `reads` is set."""

    def __init__(self, infer: Infer, reads: bool) -> None:
        self.infer = infer
        self.reads = trio.Event()
        if reads:
            self.reads.set()
        self.status: int | None = None
        self.body: bytes | None = None
        self.error: WakecallError | None = None
        self.over = False

    async def run(self) -> None:
        try:
            reply = await self.infer.wait_head()
            self.status = reply.status
            await self.reads.wait()
            self.body = await reply.read()
        except WakecallError as error:
            self.error = error
        finally:
            self.infer.cancel()
            self.over = True


class Line:
    """A publisher's end of a channel, which takes every frame at once."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.frames: list[Frame] = []
        self.over = False

    async def run(self) -> None:
        async for frame in self.channel:
            self.frames.append(frame)
        self.over = True


class Machine(RuleBasedStateMachine):
    #: The pools that a row may be in.
    pools: Sequence[str | None] = (None,)
    #: The keys that callers may have; None: none is needed.
    keyholders: Sequence[str | None] = (None,)

    def __init__(self) -> None:
        super().__init__()
        self.stage = Stage()
        self.model = theory.Model()
        self.store = MemoryStore()
        self.ids: dict[str, str] = {}  # the model's key → task id
        self.keys: dict[str, str] = {}
        self.callers: dict[str, Caller] = {}
        self.lines: dict[str, Line] = {}
        self.uploads: dict[str, Upload] = {}
        self.events: list[Event] = []
        self.taken: dict[str, tuple[int, int | None]] = {}
        self.oversubscribed: list[tuple[str, int, int]] = []
        self.ended: dict[str, InferSettled | WakeSettled] = {}
        self.released: set[tuple[str, str]] = set()
        self.offline = 0
        self.checked: set[str] = set()
        self.open()

    # The broker under test

    def open(self) -> None:
        self.closing = trio.Event()
        self.closed = False
        self.broker: Broker = self.stage.wait(lambda: self.stage._nursery.start(self.keep))
        self.check()

    async def keep(self, task_status: trio.TaskStatus[Broker]) -> None:
        async with open_broker(self.store, CONFIG) as broker:
            broker.add_observer(self.on_event)
            for who in {*self.keyholders} - {None}:
                # Not of the store's: it is their turns that matter here, not who may call.
                broker._directory.keyring.add(Key(who, "client", "anna", who, 0.0))
            task_status.started(broker)
            await self.closing.wait()
        self.closed = True

    def on_event(self, event: Event) -> None:
        """In the middle of a step too, no row has more than it has slots, unless a register has just lowered them."""
        self.events.append(event)
        self.look()

    def look(self) -> None:
        for name, row in self.broker._directory.rows.items():
            taken, most = row.in_flight + row.stopping, row.llm.max_concurrency
            before, most_before = self.taken.get(name, (0, most))
            if most is not None and most == most_before and taken > max(most, before):
                self.oversubscribed.append((name, taken, most))  # an observer must not raise
            self.taken[name] = taken, most

    def close(self) -> None:
        """Everything is joined, and nothing is left."""
        self.stage.do(self.closing.set)
        self.stage.settle()
        assert self.closed
        counted = self.stage.do(check_invariants, self.broker)
        assert (counted.waiting, counted.in_flight, counted.wakes_in_flight, counted.channels) == (0, 0, 0, 0)
        directory = self.broker._directory
        assert directory.tasks == {}
        assert directory.held_slots == {}
        assert directory.waiting_deadlines.armed == 0
        assert all(
            (r.in_flight, r.stopping, len(r.pool.line), r.wake) == (0, 0, 0, None) for r in directory.rows.values()
        )
        assert all((s.channel, s.pending, s.leaving) == (None, None, None) for s in directory.sessions.values())
        for line in self.lines.values():
            channel = line.channel
            assert line.over
            assert channel.joined.is_set()
            assert channel.tasks == {}
            assert channel.stopping == {}
            assert channel.deadlines.armed == 0
        self.uploads.clear()

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:
                for key in list(self.callers):
                    self.read_on(key)
                self.restart(crash=False)
                self.close()
                assert all(caller.over for caller in self.callers.values())
        finally:
            self.stage.close()

    # Asking both

    def ask(self, ask_model, ask_broker, *, settle=True, task=None):
        """Returns what the model answered, and what the broker did; both None if they refused alike.

        `task`: the one that its publisher speaks of, and is told of if it is over.
        """
        expected = refused = answer = error = None
        self.model.step += 1
        try:
            answer = ask_broker()
        except WakecallError as raised:
            error = raised
        infer = self.callers[task].infer if task in self.callers else None
        self.model.pick = None if infer is None or infer.row is None else infer.row.llm.name
        try:
            expected = ask_model()
        except theory.Refused as raised:
            refused = raised
        if infer is not None and task in self.model.moved:
            self.note_moved(task, infer.task_id)
        if refused is not None and (error is not None or not refused.perhaps):
            assert error is not None, f"refused by the model alone: {refused}"
            assert error.code in refused.codes, (error.code, refused.codes)
            if task is not None and error.code != "task_not_found":
                self.model.note_answered(task)
        elif error is not None:
            raise error
        if settle:
            self.check()
        return expected, answer

    def note_moved(self, key, task_id):
        """An infer has been refused, and goes by another name now; by its old one it is over."""
        old = self.model.moved.pop(key)
        assert task_id != self.ids[key]
        self.ids[old.key], self.keys[self.ids[key]] = self.ids[key], old.key
        self.ids[key], self.keys[task_id] = task_id, key
        if (upload := self.uploads.pop(key, None)) is not None:
            upload.abort()

    def check(self) -> None:
        """Everything moves, and is as the model says."""
        self.stage.settle()
        self.model.settle()
        self.compare_with(self.model)
        self.after_check()

    def after_check(self) -> None:
        for key in [key for key in self.uploads if self.model.tasks[key].over]:
            # Whoever still uploads for a task that is over is refused, and nothing changes.
            upload = self.uploads.pop(key)
            assert upload.task.upload in (None, upload)
            upload.abort()
        if self.model.stopped:
            self.restart(crash=False)

    def id_of(self, key: str) -> str:
        if key not in self.ids:
            self.check()  # a wake's is in a frame
        return self.ids[key]

    # Publishers

    @initialize(ours=some_specs("a", "b"), theirs=some_specs("c", "d"))
    def begin_with_two(self, ours, theirs):
        self.arrive("s1", ours)
        self.arrive("s4", theirs)

    @rule(session=sessions, stranger=seldom, specs=some_specs(*NAMES, min_size=0))
    def register(self, session, stranger, specs):
        owner = self.owner(session, stranger)
        expected, answer = self.ask(
            lambda: self.model.register(session, owner, specs),
            lambda: self.stage.wait(lambda: self.broker.register(session, self.llm_specs(specs), owner=owner)),
            settle=False,
        )
        if expected is not None:
            assert {llm.name: (llm.status, llm.outcome) for llm in answer.llms} == expected
        self.check()

    @rule(session=chosen(absent), specs=some_specs(*NAMES))
    def arrive(self, session, specs):
        """As most do: register, and open a channel."""
        self.register(session, False, specs)
        self.open_channel(session, False, True)

    @precondition(lambda self: any(row.live for row in self.model.rows.values()))
    @rule(name=chosen(lambda m: [r.name for r in m.model.rows.values() if r.live]), to=st.sampled_from(list(OWNERS)))
    def move(self, name, to):
        """A row is withdrawn, whatever it is at, and turns up at another session of its owner, or tries to."""
        row = self.model.rows[name]
        holder = self.model.sessions[row.session]
        others = [
            theory.Spec(r.name, slots=r.slots, pool=r.pool.name)
            for r in self.model.rows_of(holder)
            if r.live and r is not row
        ]
        self.register(holder.name, holder.owner != OWNERS[holder.name], others)
        self.register(to, False, [theory.Spec(name)])

    @rule(
        session=sessions,
        stranger=seldom,
        reported=st.dictionaries(names, statuses, max_size=2),
        tasks=st.runner().flatmap(lambda m: st.lists(st.sampled_from([*any_task(m), "t0"]), max_size=5, unique=True)),
    )
    def heartbeat(self, session, stranger, reported, tasks):
        owner = self.owner(session, stranger)
        ids = {(self.id_of(key) if key != "t0" else "unknown"): key for key in tasks}
        said = {name: Status(status) for name, status in reported.items()}
        expected, answer = self.ask(
            lambda: self.model.heartbeat(session, owner, reported, tasks),
            lambda: self.stage.wait(lambda: self.broker.heartbeat(session, said, list(ids), owner=owner)),
            settle=False,
        )
        if expected is not None:
            assert [ids[task_id] for task_id in answer.drop] == expected
            rows = {row.name: row for row in self.model.rows_of(self.model.sessions[session])}
            assert {n for n, r in rows.items() if not r.withdrawn} <= set(answer.llms) <= set(rows)
            assert all(rows[name].status == status for name, status in answer.llms.items())
        self.check()

    @rule(session=chosen(with_callers), stranger=seldom, settle=settles)
    def open_channel(self, session, stranger, settle):
        owner = self.owner(session, stranger)
        expected, answer = self.ask(
            lambda: self.model.open_channel(session, owner),
            lambda: self.stage.do(lambda: self.broker.open_channel_nowait(session, owner=owner)),
            settle=False,
        )
        if expected is not None:
            line = self.lines[expected.key] = Line(answer)
            self.stage.start(line.run)
        if settle:
            self.check()

    @precondition(lambda self: self.lines)
    @rule(channel=chosen(lambda m: list(m.lines)[-5:]), settle=settles)
    def disconnect(self, channel, settle):
        self.ask(
            lambda: self.model.end_channel(self.model.channels[channel], None),
            lambda: self.stage.do(self.lines[channel].channel.disconnect),
            settle=settle,
        )

    def goodbye(self, session, stranger):
        owner = self.owner(session, stranger)
        self.ask(
            lambda: self.model.goodbye(session, owner),
            lambda: self.stage.wait(lambda: self.broker.goodbye(session, owner=owner)),
        )

    # Clients

    @rule(
        name=chosen(callable_rows),
        stream=st.booleans(),
        reads=st.sampled_from([True, True, False]),
        settle=settles,
        who=who,
    )
    def infer(self, name, stream, reads, settle, who=None):
        late = self.stage.do(self.would_be_late, name)
        picked = []

        def ask_broker():
            try:
                infer = self.stage.do(self.accept, name, InferRequest("/v1/x", b"{}", stream=stream), who)
            except ModelOffline:
                return None  # accepted all the same
            picked.append(None if infer.row is None else infer.row.llm.name)
            return infer

        expected, answer = self.ask(
            lambda: self.model.infer(name, stream, reads, late, picked[0] if picked else None, who),
            ask_broker,
            settle=False,
        )
        assert (expected is None) == (answer is None)
        if expected is not None:
            self.learn(expected.key, answer.task_id)
            caller = self.callers[expected.key] = Caller(answer, reads)
            self.stage.start(caller.run)
        if settle:
            self.check()

    def accept(self, name, request, who):
        if who is None:
            return self.broker.infer_nowait(name, request)
        with self.broker.claim(self.broker._directory.keyring.callers[who]) as claim:
            return self.broker.infer_nowait(name, request, claim=claim)

    def would_be_late(self, name):
        """By the broker's own estimate: what it measures is not the model's business, but what it makes of that is."""
        row = self.broker._directory.rows.get(name)
        if row is None:
            return False
        load = self.broker._dispatcher.placer.load_of(row, trio.current_time())
        line = [i for i in self.model.rows[name].pool.line if i.only in (None, name)]
        wait_s = estimate_wait([load], len(line))
        return wait_s is not None and wait_s > min(CONFIG.queue_s, CONFIG.total_s)

    @rule(name=chosen(callable_rows), whose=st.lists(who, min_size=2, max_size=4))
    def infers(self, name, whose):
        """Several in one instant."""
        for who in whose:
            self.infer(name, False, True, False, who)
        self.check()

    @rule(
        name=chosen(callable_rows),
        count=st.integers(1, 3),
        then=st.lists(
            st.sampled_from(["leave", "disconnect", "open_channel", "withdraw", "goodbye", "evict", "delete_llm"]),
            min_size=1,
            max_size=3,
        ),
    )
    def before_it_is_taken(self, name, count, then):
        """Frames are sent, and before a transport has taken them something becomes of their publisher or their callers."""
        for _ in range(count):
            self.infer(name, False, True, False)
        row = self.model.rows.get(name)
        session = None if row is None else self.model.sessions.get(row.session)
        for what in then:
            if session is None or self.model.sessions.get(session.name) is not session or self.model.stopping:
                break
            stranger = session.owner != OWNERS[session.name]
            match what:
                case "leave" if self.callers:
                    self.leave(list(self.callers)[-1], False)
                case "disconnect" if (channel := session.channel or session.pending) is not None:
                    self.disconnect(channel.key, False)
                case "open_channel":
                    self.open_channel(session.name, stranger, False)
                case "withdraw":
                    # As one step, where a register would let what was sent be taken while it is committed.
                    self.ask(
                        lambda: self.model.register(session.name, session.owner, []),
                        lambda: self.stage.do(
                            self.broker._registry.register_nowait, session.name, [], session.owner, "", "", None
                        ),
                        settle=False,
                    )
                case "goodbye":
                    self.goodbye(session.name, stranger)
                case "evict":
                    self.evict(session.name)
                case "delete_llm" if name in self.model.rows:
                    self.delete_llm(name)
        self.check()

    @precondition(lambda self: self.callers)
    @rule(infer=chosen(lambda m: list(m.callers)[-6:]), settle=settles)
    def leave(self, infer, settle):
        self.ask(
            lambda: self.model.leave(self.model.tasks[infer]),
            lambda: self.stage.do(self.callers[infer].infer.cancel),
            settle=settle,
        )

    @precondition(lambda self: any(not c.reads.is_set() for c in self.callers.values()))
    @rule(infer=chosen(lambda m: [key for key, c in m.callers.items() if not c.reads.is_set()]))
    def read_on(self, infer):
        self.check()
        self.ask(
            lambda: self.model.read_on(self.model.tasks[infer]),
            lambda: self.stage.do(self.callers[infer].reads.set),
        )

    # Results

    @precondition(sent)
    @rule(
        task=chosen(lambda m: free(m) or sent(m)),
        data=pieces,
        status=st.sampled_from([200, 200, 204, 404, 429, 500, 503]),
    )
    def answer(self, task, data, status):
        """Whole, at once."""
        if getattr(self.model.tasks[task], "full", False):
            return
        self.result(task, False, data, status, None, True)

    @precondition(any_task)
    @rule(
        task=chosen(lambda m: [*any_task(m), *free(m) * 3]),
        stranger=seldom,
        data=pieces,
        status=st.sampled_from([200, 200, 500, 503]),
        back=st.sampled_from([None, 0, 0, 0, 2, -3]),
        final=st.booleans(),
    )
    def result(self, task, stranger, data, status, back, final):
        """A piece, or the last one, that begins `back` bytes before the end of what there is (None: it does not say)."""
        task_id, theirs = self.id_of(task), self.model.tasks[task]
        if getattr(theirs, "full", False) and not theirs.over:
            return
        offset = None if back is None else max(len(theirs.body) - back, 0)
        owner = self.owner_of(task, stranger)

        def ask_model():
            self.model.open_upload(task, owner, status, offset, final)
            self.model.send(theirs, data)
            self.model.finish(theirs)

        async def ask_broker():
            if final:
                await self.broker.complete(task_id, data, status=status, offset=offset, owner=owner)
            else:
                await self.broker.push_chunk(task_id, data, status=status, offset=offset, owner=owner)

        if not final and offset is None:
            return
        self.ask(ask_model, lambda: self.stage.wait(ask_broker), task=task)

    @precondition(any_task)
    @rule(
        task=chosen(lambda m: free(m) or any_task(m)),
        stranger=seldom,
        status=st.sampled_from([200, 503]),
        back=st.sampled_from([None, None, None, 0, 2]),
        final=st.sampled_from([True, True, False]),
    )
    def begin(self, task, stranger, status, back, final):
        task_id, theirs, owner = self.id_of(task), self.model.tasks[task], self.owner_of(task, stranger)
        offset = None if back is None else max(len(theirs.body) - back, 0)
        _, upload = self.ask(
            lambda: self.model.open_upload(task, owner, status, offset, final),
            lambda: self.stage.do(
                lambda: self.broker.open_upload(task_id, owner=owner, status=status, offset=offset, final=final)
            ),
            settle=False,
            task=task,
        )
        if upload is not None:
            self.uploads[task] = upload
        self.check()

    @precondition(moving)
    @rule(task=chosen(moving), data=pieces)
    def send(self, task, data):
        self.check()
        if task not in moving(self):
            return
        upload = self.uploads[task]
        if self.model.send(self.model.tasks[task], data):
            self.stage.wait(lambda: upload.send(data))
        else:
            self.stage.start(self.send_held, upload, data)
        self.check()

    async def send_held(self, upload: Upload, data: bytes) -> None:
        try:
            await upload.send(data)
        except TaskOver:
            assert upload.task.is_over

    @precondition(lambda self: moving(self) or free(self))
    @rule(
        task=chosen(lambda m: moving(m) or free(m)),
        steps=st.lists(st.tuples(pieces, st.sampled_from([0.5, 20.0, 40.0, 55.0])), min_size=2, max_size=4),
    )
    def trickle(self, task, steps):
        """An answer that comes by and by, and may pause for too long."""
        if task not in self.uploads:
            self.begin(task, False, 200, None, True)
        for data, seconds in steps:
            if task in moving(self):
                self.send(task, data)
            self.wait(seconds, True)

    @precondition(free)
    @rule(
        task=chosen(free),
        steps=st.lists(st.tuples(pieces, st.sampled_from([0, 0, 1, 2, 5, -1])), min_size=2, max_size=4),
        final=st.booleans(),
    )
    def in_pieces(self, task, steps, final):
        """A result by `chunks`, each beginning at, before or after what there is."""
        for number, (data, back) in enumerate(steps, 1):
            self.result(task, False, data, 200, back, final and number == len(steps))

    @precondition(moving)
    @rule(task=chosen(moving))
    def finish(self, task):
        self.check()
        if task not in moving(self):
            return
        upload = self.uploads.pop(task)

        async def finish():
            with upload:
                await upload.finish()

        self.ask(lambda: self.model.finish(self.model.tasks[task]), lambda: self.stage.wait(finish), task=task)

    @precondition(moving)
    @rule(task=chosen(moving))
    def break_off(self, task):
        self.check()
        if task not in moving(self):
            return
        upload = self.uploads.pop(task)
        self.ask(lambda: self.model.abort(self.model.tasks[task]), lambda: self.stage.do(upload.abort))

    @precondition(any_task)
    @rule(
        task=chosen(lambda m: sent(m) or any_task(m)),
        stranger=seldom,
        status=st.sampled_from([None, 429, 500, 503]),
        settle=settles,
    )
    def fail(self, task, stranger, status, settle):
        task_id, owner = self.id_of(task), self.owner_of(task, stranger)
        self.ask(
            lambda: self.model.fail(task, owner, status),
            lambda: self.stage.do(lambda: self.broker.fail(task_id, "no", status=status, owner=owner)),
            settle=settle,
            task=task,
        )

    @precondition(any_task)
    @rule(task=chosen(lambda m: stopped(m) * 4 + any_task(m)), stranger=seldom, settle=settles)
    def confirm_cancelled(self, task, stranger, settle):
        task_id, owner = self.id_of(task), self.owner_of(task, stranger)
        self.ask(
            lambda: self.model.confirm_cancelled(task, owner),
            lambda: self.stage.do(lambda: self.broker.confirm_cancelled(task_id, owner=owner)),
            settle=settle,
        )

    # Operators, and what happens seldom

    @rule(
        what=st.sampled_from(["goodbye", "evict", "put_public", "delete_llm", "sweep", "restart", "crash", "drain"]),
        session=sessions,
        stranger=seldom,
        name=names,
        grace_s=st.sampled_from([0.5, 20.0, 100.0]),
    )
    def once_in_a_while(self, what, session, stranger, name, grace_s):
        """One rule for all, so that they do not come more often than the rest."""
        match what:
            case "goodbye":
                self.goodbye(session, stranger)
            case "evict":
                self.evict(session)
            case "put_public":
                self.put_public(name)
            case "delete_llm":
                self.delete_llm(name)
            case "sweep":
                self.sweep()
            case "restart" | "crash":
                self.restart(crash=what == "crash")
            case "drain":
                self.drain(grace_s)

    def evict(self, session):
        self.ask(lambda: self.model.evict(session), lambda: self.stage.wait(lambda: self.broker.evict(session)))

    def put_public(self, name):
        self.ask(
            lambda: self.model.put_public(name),
            lambda: self.stage.wait(lambda: self.broker.put_public_llm(name, type="t", model="m", url="https://x")),
        )

    def delete_llm(self, name):
        self.ask(lambda: self.model.delete_llm(name), lambda: self.stage.wait(lambda: self.broker.delete_llm(name)))

    def sweep(self):
        expected, report = self.ask(self.model.sweep, lambda: self.stage.wait(self.broker.sweep), settle=False)
        assert (sorted(report.inactivated), sorted(report.deleted)) == expected
        self.check()
        again, report = self.ask(self.model.sweep, lambda: self.stage.wait(self.broker.sweep))
        assert again == ([], []) == (list(report.inactivated), list(report.deleted)), "a sweep is idempotent"

    def restart(self, crash):
        """A broker that was killed has told its store no more than one that was closed, once both are at rest."""
        self.check_only()
        store = MemoryStore()
        store._llms, store._sessions = dict(self.store._llms), dict(self.store._sessions)
        if not self.model.stopped:
            self.model._stop()
        self.close()
        self.compare_callers(self.model)
        self.compare_frames(self.model)
        self.collect()
        if crash:
            self.store = store
        self.model.restart()
        self.open()

    def drain(self, grace_s):
        if self.model.stopping:
            return
        self.check()
        self.model.drain(grace_s)
        self.stage.start(self.broker.drain, grace_s)
        self.check()

    # Time

    @rule(seconds=st.sampled_from([0.5, 5.0, 14.5, 30.0, 45.0, 60.0, 90.0, 150.0, 400.0]), beats=st.booleans())
    def wait(self, seconds, beats):
        """From deadline to deadline; `beats`: whoever has a channel heartbeats, as publishers do."""
        self.check()
        until = self.stage.now() + seconds
        while (left := until - self.stage.now()) > 0:
            if beats:
                for session in [s for s in self.model.sessions.values() if s.channel is not None]:
                    if session.name in self.model.sessions:
                        self.heartbeat(session.name, session.owner != OWNERS[session.name], {}, [])
                left = min(left, CONFIG.heartbeat_interval_s)
            stop = self.stage.now() + left
            while (left := stop - self.stage.now()) > 0:
                self.stage.pass_time(min(left, self.stage.until_next_deadline()))
                self.check_time()

    @rule(seconds=st.sampled_from([15.0, 40.0, 70.0, 500.0]))
    def leap(self, seconds):
        """All deadlines at once: the machine was busy, or suspended."""
        self.check()
        self.stage.pass_time(seconds)
        self.check_time()

    def check_time(self) -> None:
        """Where several deadlines were up at once the model says what may be: one of that it must be."""
        self.collect()
        first: AssertionError | None = None
        for tries, model in enumerate(self.model.after(self.stage.now(), self.is_possible)):
            try:
                self.compare_with(model)
            except AssertionError as error:
                first = first or error
                if tries >= MOST_ORDERS:
                    break
            else:
                self.model = model
                self.after_check()
                return
        raise first or AssertionError(f"no order of what was due gives this: {self.model.causes()}")

    def is_possible(self, model: theory.Model) -> bool:
        for key, (outcome, code, _) in model.ends.items():
            event = self.ended.get(self.ids[key])
            if event is None or (event.outcome, event.code) != (outcome, code):
                return False
        return all((self.ids[key], how) in self.released for key, how in model.released)

    # Comparing

    def compare_with(self, model: theory.Model) -> None:
        self.collect()
        self.stage.do(self.compare_state, model)
        self.compare_frames(model)
        self.compare_outcomes(model)
        self.compare_callers(model)

    def check_only(self) -> None:
        self.stage.settle()
        self.model.settle()
        self.compare_with(self.model)

    def collect(self) -> None:
        for event in self.events:
            if isinstance(event, InferSettled) and event.phase == "offline":
                self.offline += 1
            elif isinstance(event, SlotReleased):
                self.released.add((event.task_id, event.how))
            elif isinstance(event, (InferSettled, WakeSettled)):
                assert event.task_id not in self.ended, "invariant 2: one outcome"
                self.ended[event.task_id] = event
        self.events.clear()

    def compare_state(self, model: theory.Model) -> None:
        broker = self.broker
        counted = check_invariants(broker)
        self.look()
        assert self.oversubscribed == [], "invariant 3"
        ends, held = model.counted, [t for t in model.sent() if not isinstance(t, theory.Infer)]
        assert {
            "accepted": counted.accepted,
            "completed": counted.completed,
            "failed": counted.failed,
            "cancelled": counted.cancelled,
            "wakes": counted.wakes_started,
            "woken": counted.wakes_succeeded,
            "unwoken": counted.wakes_failed,
        } == ends
        assert counted.wakes_in_flight == len(held)
        assert counted.waiting == len(model.waiting())
        for who, caller in broker._directory.keyring.callers.items():
            assert caller.waiting == sum(infer.who == who for infer in model.waiting())
            assert caller.in_flight == sum(
                isinstance(t, theory.Infer) and t.who == who and not t.over for t in model.tasks.values()
            )

        # A session may have been forgotten: see the model.
        known = {view.record.session_id: view for view in broker.session_views()}
        for name in [n for n, s in model.sessions.items() if s.may_be_gone and n not in known]:
            del model.sessions[name]
        for session in model.sessions.values():
            session.may_be_gone = False
        assert {n: (v.record.owner, v.connected, v.record.epoch) for n, v in known.items()} == {
            s.name: (s.owner, s.channel is not None, s.epoch) for s in model.sessions.values()
        }
        for name, view in known.items():
            rows = model.rows_of(model.sessions[name])
            assert {r.name for r in rows if not r.withdrawn} <= set(view.llms) <= {r.name for r in rows}, name
        assert counted.channels == sum(s.channel is not None for s in model.sessions.values())

        views = {view.llm.name: self.seen_row(view) for view in broker.llm_views()}
        assert views.keys() == model.rows.keys()
        for name, seen in views.items():
            expected = self.expected_row(model, model.rows[name])
            wrong = {word: (seen[word], expected[word]) for word in seen if seen[word] != expected[word]}
            assert not wrong, (name, wrong)
        # Which of a session's or a pool's rows is asked first is the broker's business.
        order = [name for session in broker._directory.sessions.values() for name in session.rows]
        model.rows = {name: model.rows[name] for name in dict.fromkeys([*order, *model.rows])}
        for pool in model.pools():
            if pool.name is not None:
                theirs = broker._directory.pools[pool.name]
                assert {row.name for row in pool.rows} == set(theirs.rows)
                pool.rows.sort(key=lambda row, order=list(theirs.rows): order.index(row.name))
        assert {view.name for view in broker.pool_views()} == {p.name for p in model.pools() if p.name is not None}
        # At rest the store has what memory has.
        assert self.store._llms == {llm.name: llm for llm in broker.llms()}
        assert self.store._sessions == {name: view.record for name, view in known.items()}

        tasks = {self.keys.get(t.task_id, t.kind): (t.llm, t.state) for t in broker.task_views()}
        expected = {}
        for task in [*model.sent(), *model.waiting()]:
            state = "sent"
            if isinstance(task, theory.Infer):
                state = "answering" if task.headed else {"queue": "queued", "wake": "waking"}.get(task.phase, "sent")
            name = task.row.name if task.row is not None else task.only or task.pool.name
            expected[task.key if task.key in self.ids else "wake"] = (name, state)
        assert tasks == expected, set(tasks.items()) ^ set(expected.items())

        # Nothing grows without bound (5), and only what waits or was sent has a deadline.
        directory = broker._directory
        probes = sum(pool.probe is not None for pool in {row.pool for row in directory.rows.values()})
        assert directory.waiting_deadlines.armed == counted.waiting + probes
        assert len(directory.settled) == sum(len(s.settled) for s in directory.sessions.values())
        assert all(len(s.settled) <= CONFIG.max_settled_per_session for s in directory.sessions.values())
        for session in directory.sessions.values():
            if session.channel is not None:
                channel, stall = session.channel, 1  # its own, which is disarmed only when it falls due
                assert 0 <= channel.deadlines.armed - len(channel.tasks) - len(channel.stopping) <= stall
        assert set(directory.rows) == {*directory.live, *directory.inactive} | {
            row.name for row in model.rows.values() if row.public
        }
        assert set(directory.unused) <= set(directory.sessions)

    def seen_row(self, view):
        llm = view.llm
        loose = llm.kind == "public" or (llm.status == "inactive" and llm.remembers is None)
        return {
            "kind": llm.kind,
            "owner": llm.owner,
            "status": llm.status,
            "remembers": llm.remembers,
            "session": llm.session_id,
            "since": llm.inactive_since,
            "beat": None if loose else llm.last_heartbeat_at,
            "slots": llm.max_concurrency,
            "in_flight": view.in_flight,
            "stopping": view.stopping,
            "waiting": view.waiting,
            "waking": view.waking,
            "routable": view.routable,
            "pool": llm.pool,
            "held": (llm.hold, llm.paused),
        }

    def expected_row(self, model, row):
        return {
            "kind": "public" if row.public else "virtual",
            "owner": row.owner,
            "status": row.status,
            "remembers": row.remembers,
            "session": row.session,
            "since": None if row.since is None else EPOCH + row.since,
            "beat": None if row.public or row.withdrawn else EPOCH + row.beat,
            "slots": row.slots,
            "in_flight": len(row.sent),
            "stopping": len(row.stops),
            "waiting": len(row.waiting),
            "waking": row.wake is not None,
            "routable": row.live and model.channel_of(row) is not None and not row.held,
            "pool": row.pool.name,
            "held": (row.hold, row.paused),
        }

    def compare_frames(self, model: theory.Model) -> None:
        """Each row's frames in their order; that of two rows' in one step is nobody's business. And no infer's twice: what
        was refused goes by another id."""
        given = [f.data["task_id"] for line in self.lines.values() for f in line.frames if f.event == "infer"]
        assert len(given) == len(set(given)), "one generation"
        for key, line in self.lines.items():
            if key in self.checked:
                continue
            channel, expected = model.channels[key], {}
            for event, *rest in channel.frames:
                expected.setdefault(rest[0] if len(rest) > 1 else None, []).append((event, *rest))
            seen, wakes = {}, {}
            sequence = [int(frame.id.removeprefix(f"{channel.epoch}-")) for frame in line.frames]
            assert sequence == sorted(set(sequence))
            for number, frame in enumerate(line.frames, 1):
                data = frame.data
                if frame.event == "hello":
                    assert (number, data["epoch"], data["session_id"]) == (1, channel.epoch, channel.session)
                    seen.setdefault(None, []).append(("hello",))
                elif frame.event == "bye":
                    assert number == len(line.frames)
                    seen.setdefault(None, []).append(("bye", data["reason"]))
                else:
                    task_id = data["task_id"]
                    name = self.keys.get(task_id) or wakes.get(task_id)
                    if name is None and frame.event == "wake":
                        # A wake that is new here: the model's next of this row.
                        group = expected.get(data["llm"], [])
                        place = len(seen.get(data["llm"], []))
                        assert place < len(group), f"a frame too many: {frame}"
                        assert group[place][0] == "wake", (group, frame)
                        name = wakes[task_id] = group[place][2]
                    assert name is not None, frame
                    row = model.tasks[name].row.name
                    reason = (data["reason"],) if frame.event == "cancel" else ()
                    seen.setdefault(row, []).append((frame.event, row, name, *reason))
            if channel.state == "ended" and channel.reason is None:
                # What had not been taken went with its peer.
                assert all(begins(frames, expected.get(row, [])) for row, frames in seen.items())
            else:
                assert {r: orderly(f) for r, f in seen.items()} == {r: orderly(f) for r, f in expected.items()}, key
            for task_id, name in wakes.items():
                self.learn(name, task_id)
            if channel.state == "ended":
                assert line.over
                self.checked.add(key)

    def learn(self, key: str, task_id: str) -> None:
        assert self.ids.setdefault(key, task_id) == task_id
        assert self.keys.setdefault(task_id, key) == key

    def compare_outcomes(self, model: theory.Model) -> None:
        """Every accepted infer, and every wake, has the one outcome that the model gives it, or none yet."""
        seen = {self.keys[i]: (e.outcome, e.code) for i, e in self.ended.items() if isinstance(e, InferSettled)}
        assert seen == {key: (outcome, code) for key, (outcome, code, _) in model.ends.items()}
        assert self.offline == model.offline
        assert {(self.keys[task_id], how) for task_id, how in self.released} == set(model.released)
        wakes = [e.outcome for e in self.ended.values() if isinstance(e, WakeSettled)]
        assert sorted(wakes) == sorted(model.wake_ends.values())
        for task_id, event in self.ended.items():
            if isinstance(event, WakeSettled) and task_id in self.keys:
                assert event.outcome == model.wake_ends[self.keys[task_id]]

    def compare_callers(self, model: theory.Model) -> None:
        for key, caller in self.callers.items():
            infer = model.tasks[key]
            assert caller.infer.is_over == infer.over
            if not infer.over or not infer.reads:
                assert not caller.over or not infer.headed
                continue
            outcome, code, phase = model.ends[key]
            assert caller.over
            if infer.headed:
                assert caller.status == infer.head
            if outcome == "completed":
                assert caller.error is None
                assert caller.body == infer.body
            else:
                assert (caller.error.code, caller.error.phase) == (code, phase if phase != "stall" else None)

    # Words

    def owner(self, session: str, stranger: bool) -> str:
        owner = OWNERS[session]
        return {"anna": "ben", "ben": "anna"}[owner] if stranger else owner

    def owner_of(self, task: str, stranger: bool) -> str:
        theirs = self.model.tasks[task]
        return self.owner(theirs.channel.session if theirs.channel is not None else "s1", stranger)

    def llm_specs(self, specs):
        return [
            LLMSpec(
                s.name,
                status=s.status and Status(s.status),
                max_concurrency=s.slots,
                wake_s=s.wake_s,
                cancel="drain" if s.drains else "abort",
                pool=s.pool,
            )
            for s in specs
        ]


class PooledMachine(Machine):
    """Rows in pools, and rows that are held.

    What a row's health has to do with the choice among several is `test_placement`'s and `test_health`'s: here all are as
    good as new for ever, so that whoever has a slot takes whoever waits, and no estimate is made.
    """

    pools = (None, "p", "p", "p", "q")
    keyholders = (None, "k1", "k1", "k2", "k3")

    @rule(name=chosen(callable_rows), hold=st.sampled_from(["drain", "pause", None, None]))
    def hold(self, name, hold):
        self.ask(
            lambda: self.model.hold(name, hold),
            lambda: self.stage.wait(lambda: self.broker.resume(name) if hold is None else self.broker.hold(name, hold)),
        )

    @precondition(narrow)
    @rule(name=chosen(narrow), whose=st.permutations(["k1", "k1", "k2", "k3"]), answers=st.integers(2, 5))
    def in_turns(self, name, whose, answers):
        """Several wait for one slot or two, and one after another is answered."""
        self.infers(name, whose)
        for _ in range(answers):
            for task in [task for task in free(self) if self.model.tasks[task].row.name == name][:1]:
                self.answer(task, b"", 200)

    @rule(session=sessions, stranger=seldom, paused=st.sampled_from([True, False, False]))
    def pause(self, session, stranger, paused):
        owner = self.owner(session, stranger)
        views = {view.record.session_id: view.llms for view in self.broker.session_views()}
        self.ask(
            lambda: self.model.pause(session, owner, paused, views.get(session, ())),
            lambda: self.stage.wait(
                lambda: (self.broker.pause_session if paused else self.broker.resume_session)(session, owner=owner)
            ),
        )


EXAMPLES = os.environ.get("WAKECALL_MACHINE_EXAMPLES")


def play(machine, examples):
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=int(EXAMPLES or examples),
            stateful_step_count=50,
            # The same examples each time, unless someone has come to search.
            derandomize=EXAMPLES is None,
            database=None,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_the_broker_does_what_the_model_says_in_any_order():
    play(Machine, 120)


def test_the_broker_does_what_the_model_says_of_pools_and_holds(monkeypatch):
    for name in ("note_failure", "note_success", "note_first_byte", "note_wake"):
        monkeypatch.setattr(Health, name, lambda *_: None)
    play(PooledMachine, 120)
