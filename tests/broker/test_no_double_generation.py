"""Ten thousand infers over publishers that die at random moments: nobody is served twice, and everybody once at the most.

A simulation: seeded, on the virtual clock. Six publishers in one pool, whose transports take frames late, refuse infers,
answer in pieces, hang, and end in every way that a channel can end in; clients that lose patience. The publishers keep book
of what they took, and so can say what the broker may never do:

1. An infer that one of them has taken goes to no other, but where that one has refused it, with 429 or 503 and not a byte.
2. Each works on as many infers as it has slots at the most, be its clients gone or not.
3. Every client has one outcome, and what he reads is what the last one who took his infer wrote.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import trio

from wakecall import Broker, BrokerConfig, InferRequest, LLMSpec, Status, WakecallError
from wakecall.errors import SessionNotFound, TaskOver
from wakecall.frames import Frame
from wakecall.models import Event, InferSettled
from wakecall.session import Channel
from wakecall.testing import check_invariants, open_test_broker

INFERS = 10_000
CONFIG = BrokerConfig(
    queue_s=20.0, first_byte_s=8.0, idle_s=6.0, total_s=60.0, peer_stall_s=15.0, wake_s=10.0, cancel_lease_s=10.0
)
POOL = "qwen"
SPECS = [{}, {"cancel": "drain"}, {"status": Status.HIBERNATING}, {}, {"cancel": "drain"}, {}]


@dataclass(eq=False)
class Taken:
    """An infer's frame, in a publisher's hands."""

    publisher: str
    task_id: str
    refused: bool = False
    written: bytes = b""


@dataclass
class Book:
    """What all of them have seen, by the bodies of the infers: each is its client's alone."""

    taken: defaultdict[bytes, list[Taken]] = field(default_factory=lambda: defaultdict(list))
    deaths: Counter[str] = field(default_factory=Counter)
    cancels: Counter[str] = field(default_factory=Counter)
    most_at_work: Counter[str] = field(default_factory=Counter)

    def take(self, publisher: str, task_id: str, body: bytes) -> Taken:
        before = self.taken[body]
        assert all(each.refused for each in before), f"{publisher} has what {before[-1].publisher} may have generated"
        assert publisher not in {each.publisher for each in before}, "each is asked once"
        taken = Taken(publisher, task_id)
        before.append(taken)
        return taken


class Publisher:
    """One publisher, who lives and dies as `dice` has it. Dies with its channel: all its work is given up at once."""

    def __init__(self, broker: Broker, name: str, slots: int, dice: random.Random, book: Book, **spec: object) -> None:
        self.broker = broker
        self.name = name
        self.slots = slots
        self.drains = spec.get("cancel") == "drain"
        self.spec = LLMSpec(f"{name}-{POOL}", pool=POOL, max_concurrency=slots, **spec)
        self.dice = dice
        self.book = book
        self.engines: dict[str, trio.CancelScope] = {}
        self.at_work = 0
        self.known: set[str] = set()

    async def run(self) -> None:
        while True:
            await self.broker.register(self.name, [self.spec])
            async with trio.open_nursery() as nursery:
                await self.live(nursery)
                nursery.cancel_scope.cancel()
            assert self.at_work == 0
            await trio.sleep(self.dice.expovariate(1 / 2.0))

    async def live(self, nursery: trio.Nursery) -> None:
        """From a channel's beginning until the last one of its successors is dead."""
        channel = self.broker.open_channel_nowait(self.name)
        read = await nursery.start(self.read, channel, nursery)
        nursery.start_soon(self.beat)
        while True:
            with trio.move_on_after(self.dice.expovariate(1 / 15.0)):
                await channel.joined.wait()
            how = self.dice.choice(["disconnect", "disconnect", "goodbye", "superseded", "withdrawn"])
            self.book.deaths[how] += 1
            match how:
                case "superseded":
                    # The same publisher, on a new connection: whatever it did for the old one it gives up.
                    channel = self.broker.open_channel_nowait(self.name)
                    self.give_up()
                    read = await nursery.start(self.read, channel, nursery)
                    continue
                case "goodbye":
                    await self.broker.goodbye(self.name)
                    self.give_up()
                    await read.wait()
                case "withdrawn":
                    await self.broker.register(self.name, [])
                    await trio.sleep(self.dice.expovariate(1.0))
                    channel.disconnect()
                case _:
                    channel.disconnect()
            return

    def give_up(self) -> None:
        for scope in self.engines.values():
            scope.cancel()

    async def read(self, channel: Channel, nursery: trio.Nursery, task_status: trio.TaskStatus[trio.Event]) -> None:
        """Take the frames of one channel to its end, now and then late, and do as they say."""
        over = trio.Event()
        task_status.started(over)
        while True:
            if self.dice.random() < 0.3:
                await trio.sleep(self.dice.expovariate(1 / 0.5))
            frames = await channel.receive()
            if not frames:
                break
            for frame in frames:
                self.take(frame, nursery)
        over.set()

    def take(self, frame: Frame, nursery: trio.Nursery) -> None:
        task_id = frame.data.get("task_id")
        match frame.event:
            case "infer":
                taken = self.book.take(self.name, task_id, frame.data["body"].encode())
                scope = self.engines[task_id] = trio.CancelScope()
                nursery.start_soon(self.infer, taken, scope, nursery)
            case "wake":
                nursery.start_soon(self.wake, task_id)
            case "cancel" if task_id in self.engines:
                self.book.cancels[frame.data["reason"]] += 1
                if not self.drains:
                    self.engines[task_id].cancel()

    async def wake(self, task_id: str) -> None:
        await trio.sleep(self.dice.uniform(0.5, 5.0))
        with suppress(TaskOver):
            await self.broker.complete(task_id, status=self.dice.choice([200, 200, 200, 500]))

    @contextmanager
    def engine(self, task_id: str, scope: trio.CancelScope) -> Iterator[None]:
        self.at_work += 1
        self.book.most_at_work[self.name] = max(self.book.most_at_work[self.name], self.at_work)
        assert self.at_work <= self.slots, f"{self.name} is at work for more than it can be"
        try:
            with scope:
                yield
        finally:
            self.at_work -= 1
            del self.engines[task_id]

    async def infer(self, taken: Taken, scope: trio.CancelScope, nursery: trio.Nursery) -> None:
        with self.engine(taken.task_id, scope), suppress(TaskOver):
            await self.generate(taken)
            return
        # It was stopped, or nobody would have its answer: most say so, and for the others there is a lease.
        if self.dice.random() < 0.7:
            nursery.start_soon(self.confirm, taken.task_id)

    async def confirm(self, task_id: str) -> None:
        await trio.sleep(self.dice.uniform(0.0, 1.0))
        with suppress(TaskOver):
            self.broker.confirm_cancelled(task_id)

    async def generate(self, taken: Taken) -> None:
        dice, task_id = self.dice, taken.task_id
        await trio.sleep(dice.expovariate(1 / 0.3))
        what = dice.random()
        if what < 0.08:
            taken.refused = True  # before the broker hears of it: it may be elsewhere in the same step
            if dice.random() < 0.5:
                self.broker.fail(task_id, "busy", status=dice.choice([429, 503]))
            else:
                taken.written = b"busy"
                await self.broker.complete(task_id, taken.written, status=dice.choice([429, 503]))
            return
        if what < 0.11:
            self.broker.fail(task_id, "no", status=dice.choice([None, 500]))
            return
        if what < 0.12:
            await trio.sleep(30.0)  # it hangs
        with self.broker.open_upload(task_id) as upload:
            for number in range(dice.randrange(1, 4)):
                piece = f"{self.name} {number};".encode()
                taken.written += piece
                await upload.send(piece)
                await trio.sleep(dice.expovariate(1 / 0.4))
                if dice.random() < 0.02:
                    if dice.random() < 0.5:
                        self.broker.fail(task_id, "no more", status=503)  # which is no refusal any more
                    return  # it breaks off
            await upload.finish()

    async def beat(self) -> None:
        while True:
            await trio.sleep(5.0)
            with suppress(SessionNotFound):  # it has said goodbye, and reads on to the end
                await self.broker.heartbeat(self.name, tasks=list(self.engines))


@dataclass(eq=False)
class Client:
    number: int
    name: str
    stream: bool
    patience_s: float
    outcomes: list[str] = field(default_factory=list)
    read: bytes = b""

    @property
    def body(self) -> bytes:
        return f"infer {self.number}".encode()

    async def run(self, broker: Broker) -> None:
        request = InferRequest("/v1/x", self.body, stream=self.stream, request_id=str(self.number))
        try:
            with trio.move_on_after(self.patience_s):
                async with broker.infer(self.name, request) as reply:
                    while data := await reply.receive():
                        self.read += data
                    self.outcomes.append(f"completed {reply.status}")
                    return
            self.outcomes.append("left")
        except WakecallError as error:
            self.outcomes.append(error.code)


class Watch:
    """Looks at every row whenever something has ended, and at every settled second: what is taken of it, and by whom."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.ended: dict[str | None, InferSettled] = {}
        self.counted = broker.statistics()
        self.faults: list[str] = []  # an observer must not raise
        broker.add_observer(self.on_event)

    def on_event(self, event: Event) -> None:
        if isinstance(event, InferSettled):
            if event.request_id in self.ended:
                self.faults.append(f"infer {event.request_id} has ended twice")
            self.ended[event.request_id] = event
        self.look()

    def look(self) -> None:
        for row in self.broker._directory.rows.values():
            if row.in_flight + row.stopping > row.llm.max_concurrency:
                self.faults.append(f"{row.llm.name}: {row.in_flight} + {row.stopping}")

    async def run(self) -> None:
        """No slot is free beside those who wait for it."""
        while True:
            await trio.sleep(1.0)
            await trio.testing.wait_all_tasks_blocked()
            check_invariants(self.broker)
            self.look()
            now = trio.current_time()
            for row in self.broker._directory.rows.values():
                load = self.broker._dispatcher.placer.load_of(row, now)
                if load.has_slot(alone=False) and not load.on_trial:  # for which a second may pass
                    name = row.llm.name
                    assert not row.pool.line.has_for(name, lambda infer, name=name: name not in infer.refused_by)


async def test_nobody_is_served_twice(autojump_clock, monkeypatch):
    seed = 20_261_124
    # Trio runs what is ready in a random order. This one replays.
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)
    monkeypatch.setattr("trio._core._run._r", random.Random(seed))
    dice, book = random.Random(seed), Book()
    clients = [
        Client(
            number,
            name=POOL if dice.random() < 0.9 else f"p{dice.randrange(len(SPECS))}-{POOL}",
            stream=dice.random() < 0.7,
            patience_s=dice.uniform(0.0, 4.0) if dice.random() < 0.2 else math.inf,
        )
        for number in range(INFERS)
    ]
    async with open_test_broker(CONFIG) as broker, trio.open_nursery() as nursery:
        watch = Watch(broker)
        nursery.start_soon(watch.run)
        publishers = [
            Publisher(broker, f"p{number}", 2 + number % 3, random.Random(seed + number), book, **spec)
            for number, spec in enumerate(SPECS)
        ]
        for publisher in publishers:
            nursery.start_soon(publisher.run)
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as calls:
            for client in clients:
                calls.start_soon(client.run, broker)
                await trio.sleep(dice.expovariate(9.0))
        watch.counted = check_invariants(broker)
        nursery.cancel_scope.cancel()

    outcomes = Counter(client.outcomes[0] for client in clients)
    attempts = sum(event.attempts for event in watch.ended.values())
    taken = sum(map(len, book.taken.values()))
    told = f"{outcomes}, {book.deaths}, {book.cancels}, {attempts} sent, {taken} taken, {trio.current_time():.0f} s"

    # 1 has been looked at with each frame that was taken, 2 with each engine that began.
    assert watch.faults == [], told
    assert dict(book.most_at_work) == {publisher.name: publisher.slots for publisher in publishers}, told
    # 3
    assert all(len(client.outcomes) == 1 for client in clients)
    for client in clients:
        (outcome,), given = client.outcomes, book.taken[client.body]
        assert (str(client.number) in watch.ended) is (outcome != "queue_full")
        written = given[-1].written if given else b""
        assert client.read == written if outcome.startswith("completed") else written.startswith(client.read), client
        if client.name == POOL and not given:
            assert outcome not in {"model_offline", "wake_failed"}, "there were others"
    assert watch.counted.accepted == len(watch.ended)
    assert watch.counted.completed == sum(outcomes[each] for each in outcomes if each.startswith("completed")), told
    assert watch.counted.cancelled == outcomes["left"], told

    # It was no idyll.
    assert outcomes["completed 200"] > INFERS / 2, told
    assert all(book.deaths[how] > 40 for how in ("disconnect", "goodbye", "superseded", "withdrawn")), told
    assert all(book.cancels[why] > 20 for why in ("client_disconnected", "deadline_exceeded")), told
    assert sum(len(each) > 1 for each in book.taken.values()) > 300, "refused, and taken by another"
    assert attempts - taken > 50, "sent, and lost before a transport took them"
