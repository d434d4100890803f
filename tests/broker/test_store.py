"""The way to the store: what is acknowledged is committed, what fails is repeated, and no infer ever waits for it."""

from dataclasses import replace
from functools import partial

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.broker.helpers import start_call, statuses, view
from wakecall import BrokerConfig, LLMSpec, MemoryStore, Status, StoreError, open_broker
from wakecall.errors import StoreUnavailable
from wakecall.models import LLM, Batch, SessionRecord
from wakecall.testing import FakePublisher, open_test_broker

ACTIVE, HIBERNATING, INACTIVE = Status.ACTIVE, Status.HIBERNATING, Status.INACTIVE


class FakeStore(MemoryStore):
    """A memory store with a switch for each trouble."""

    def __init__(self):
        super().__init__()
        self.failing = False
        self.hanging = False
        self.gate = None  # an event: writes wait for it
        self.batches = []  # every one that was tried
        self.busy = 0

    async def write(self, batch):
        self.busy += 1
        assert self.busy == 1, "one call at a time"
        try:
            self.batches.append(batch)
            if self.hanging:
                await trio.sleep_forever()
            if self.gate is not None:
                await self.gate.wait()
            if self.failing:
                raise StoreError("disk full")
            await super().write(batch)
        finally:
            self.busy -= 1

    def held(self):
        return {name: llm.status for name, llm in self._llms.items()}


ROWS = ["qwen", LLMSpec("phi", status=HIBERNATING)]


async def test_what_is_acknowledged_is_committed(autojump_clock):
    store = FakeStore()
    async with open_test_broker(store=store) as broker, FakePublisher(broker, "laptop", ROWS) as publisher:
        assert store.held() == {"qwen": ACTIVE, "phi": HIBERNATING}
        await trio.sleep(10)
        await publisher.heartbeat({"qwen": HIBERNATING})
        assert store.held() == {"qwen": HIBERNATING, "phi": HIBERNATING}
        assert store._llms["phi"].last_heartbeat_at == broker.now()
        await publisher.goodbye()
        assert store.held() == {"qwen": INACTIVE, "phi": INACTIVE}
        assert store._sessions == {}
        await broker.delete_llm("qwen")
        assert store.held() == {"phi": INACTIVE}


async def test_a_wakes_success_is_committed_before_its_200_and_its_waiters_do_not_wait(autojump_clock):
    store = FakeStore()
    async with (
        open_test_broker(store=store) as broker,
        FakePublisher(broker, "laptop", ROWS) as publisher,
        trio.open_nursery() as nursery,
    ):
        call = start_call(nursery, broker, "phi")
        wake = await publisher.next("wake")
        store.hanging = True
        acknowledged = trio.Event()

        async def answer():
            with pytest.raises(StoreUnavailable):
                await publisher.answer(wake)
            acknowledged.set()

        nursery.start_soon(answer)
        await publisher.answer(await publisher.next("infer"), b"served")
        await call.over.wait()
        assert call.body == b"served"
        assert not acknowledged.is_set()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("act", ["register", "heartbeat", "wake", "goodbye", "sweep"])
async def test_a_commit_that_fails_is_503_and_the_decision_stays(autojump_clock, act):
    """And the writer repeats it until it is down, without anybody asking again."""
    store = FakeStore()
    async with (
        open_test_broker(BrokerConfig(sweep_interval_s=1e9), store) as broker,
        FakePublisher(broker, "laptop", ROWS) as publisher,
        trio.open_nursery() as nursery,
    ):
        start_call(nursery, broker, "phi")
        wake = await publisher.next("wake")
        await trio.sleep(90)
        acts = {
            "register": partial(publisher.register, [LLMSpec("qwen", status=HIBERNATING), "phi"]),
            "heartbeat": partial(publisher.heartbeat, {"qwen": HIBERNATING}),
            "wake": partial(publisher.answer, wake),
            "goodbye": publisher.goodbye,
            "sweep": broker.sweep,
        }
        expected = {
            "register": {"qwen": HIBERNATING, "phi": HIBERNATING},
            "heartbeat": {"qwen": HIBERNATING, "phi": HIBERNATING},
            "wake": {"qwen": ACTIVE, "phi": ACTIVE},
            "goodbye": {"qwen": INACTIVE, "phi": INACTIVE},
            "sweep": {"qwen": INACTIVE, "phi": INACTIVE},
        }[act]
        store.failing = True
        with pytest.raises(StoreUnavailable) as caught:
            await acts[act]()
        assert (caught.value.status, caught.value.code) == (503, "store_unavailable")
        assert statuses(broker) == expected
        assert store.held() == {"qwen": ACTIVE, "phi": HIBERNATING}
        assert not broker.store_ok
        tried = len(store.batches)
        await trio.sleep(3)
        assert len(store.batches) > tried
        store.failing = False
        await trio.sleep(5)
        assert store.held() == expected
        assert broker.store_ok
        nursery.cancel_scope.cancel()


async def test_a_full_disk_does_not_kill_live_rows(autojump_clock):
    """A heartbeat counts from its arrival, committed or not."""
    store = FakeStore()
    async with (
        open_test_broker(store=store) as broker,
        FakePublisher(broker, "laptop", ["qwen"]) as publisher,
        trio.open_nursery() as nursery,
    ):
        store.failing = True
        for _ in range(10):
            await trio.sleep(60)
            with pytest.raises(StoreUnavailable):
                await publisher.heartbeat()
        assert statuses(broker) == {"qwen": ACTIVE}
        call = start_call(nursery, broker)
        await publisher.answer(await publisher.next("infer"), b"x")
        await call.over.wait()
        assert call.body == b"x"


async def test_infers_never_wait_for_a_store_that_hangs(autojump_clock):
    """Invariant 4: accepting, sending, feeding, completing, failing, cancelling; nor does a channel's end."""
    store = FakeStore()
    async with (
        open_test_broker(store=store) as broker,
        FakePublisher(broker, "laptop", ROWS) as publisher,
        trio.open_nursery() as nursery,
    ):
        store.hanging = True
        await publisher.connect()  # a new channel waits for nothing either
        for end in ("complete", "fail", "leave", "disconnect"):
            call = start_call(nursery, broker)
            frame = await publisher.next("infer")
            match end:
                case "complete":
                    await publisher.answer(frame, b"1", b"2")
                case "fail":
                    publisher.fail(frame, "no")
                case "leave":
                    call.leave()
                case "disconnect":
                    publisher.disconnect()
            with trio.fail_after(1):
                await call.over.wait()
        assert statuses(broker) == {"qwen": INACTIVE, "phi": INACTIVE}
        counted = broker.statistics()
        assert (counted.completed, counted.failed, counted.cancelled) == (1, 2, 1)


async def test_a_store_that_hangs_does_not_stop_the_sweeps(autojump_clock):
    store = FakeStore()
    async with open_test_broker(store=store) as broker:
        await broker.register("one", [LLMSpec("a")])
        await trio.sleep(60)
        await broker.register("two", [LLMSpec("b")])
        store.hanging = True
        await trio.sleep(60)
        assert statuses(broker) == {"a": INACTIVE, "b": ACTIVE}
        await trio.sleep(60)
        assert statuses(broker) == {"a": INACTIVE, "b": INACTIVE}


async def test_closing_does_not_wait_for_ever_and_frees_who_waits_for_a_commit(autojump_clock):
    store = FakeStore()
    refused = []

    async def register(broker, session_id):
        with pytest.raises(StoreUnavailable):
            await broker.register(session_id, [])
        refused.append(session_id)

    async with trio.open_nursery() as nursery:
        async with open_broker(store) as broker:
            store.hanging = True
            nursery.start_soon(register, broker, "in-the-write")
            await wait_all_tasks_blocked()
            nursery.start_soon(register, broker, "behind-it")
            await wait_all_tasks_blocked()
            began = trio.current_time()
        assert trio.current_time() - began <= 5
        with trio.fail_after(1):
            await wait_all_tasks_blocked()
    assert sorted(refused) == ["behind-it", "in-the-write"]


async def test_what_gathers_is_committed_together_and_in_order(autojump_clock):
    """Group commit: one batch carries all that was decided during the last, the latest state of each."""
    store = FakeStore()
    async with open_test_broker(store=store) as broker, trio.open_nursery() as nursery:
        await wait_all_tasks_blocked()
        store.batches.clear()
        for i in range(100):
            nursery.start_soon(broker.register, f"s{i}", [LLMSpec(f"m{i}")])
        await wait_all_tasks_blocked()
        assert len(store.batches) <= 3
        assert sum(len(batch.llms) for batch in store.batches) == 100
        assert len(store.held()) == 100


async def test_a_batch_that_failed_goes_under_what_was_decided_meanwhile(autojump_clock):
    """Never back to an older state: in every batch, each row only ever moves on."""
    store = FakeStore()
    async with open_test_broker(store=store) as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
        await wait_all_tasks_blocked()
        store.failing = True
        store.batches.clear()
        for status in (HIBERNATING, ACTIVE, HIBERNATING):
            await trio.sleep(1)
            with pytest.raises(StoreUnavailable):
                await publisher.heartbeat({"qwen": status})
        await publisher_says(publisher, broker)
        store.failing = False
        await trio.sleep(6)
        seen = [batch.llms["qwen"].last_heartbeat_at for batch in store.batches if "qwen" in batch.llms]
        assert seen == sorted(seen)
        assert store.held() == {"qwen": HIBERNATING, "new": ACTIVE}
        assert store._llms["qwen"] == view(broker).llm


async def test_what_is_decided_during_a_write_that_fails_is_not_undone_by_its_repetition(autojump_clock):
    store = FakeStore()
    async with (
        open_test_broker(store=store) as broker,
        FakePublisher(broker, "laptop", ["qwen"]) as publisher,
        trio.open_nursery() as nursery,
    ):

        async def say(status):
            with pytest.raises(StoreUnavailable):
                await publisher.heartbeat({"qwen": status})

        await wait_all_tasks_blocked()
        store.failing, store.gate = True, trio.Event()
        nursery.start_soon(say, ACTIVE)
        await wait_all_tasks_blocked()
        nursery.start_soon(say, HIBERNATING)
        await wait_all_tasks_blocked()
        store.gate.set()
        await trio.sleep(2)
        store.failing = False
        await trio.sleep(6)
        assert store.held() == {"qwen": HIBERNATING}


async def publisher_says(publisher, broker):
    with pytest.raises(StoreUnavailable):
        await publisher.register(["qwen", "new"])
    assert view(broker, "new").routable


async def test_a_start_says_in_one_word_that_all_that_was_live_is_lost(autojump_clock):
    """Not row by row: with very many of them the store would be busy for seconds, and what waits to be written full. It is
    said until it is down, under all that was decided since."""
    store = FakeStore()
    async with (
        open_test_broker(store=store) as broker,
        FakePublisher(broker, "laptop", ["qwen"]),
        FakePublisher(broker, "desk", [LLMSpec("phi", status=HIBERNATING)]),
    ):
        held = dict(store._llms)
    store._llms = held
    store.batches.clear()
    store.failing = True
    async with open_test_broker(store=store) as broker:
        started = broker.now()
        await wait_all_tasks_blocked()
        assert [(batch.lost_at, batch.llms) for batch in store.batches] == [(started, {})]
        with pytest.raises(StoreUnavailable):
            await broker.register("laptop", [LLMSpec("qwen")])
        assert store.held() == {"qwen": ACTIVE, "phi": HIBERNATING}
        store.failing = False
        await trio.sleep(6)
        assert store.held() == {"qwen": ACTIVE, "phi": INACTIVE}
        assert store._llms["phi"] == view(broker, "phi").llm
        assert store._llms["phi"].inactive_since == started
        store.batches.clear()
        await broker.heartbeat("laptop")
        assert [batch.lost_at for batch in store.batches] == [None]


@pytest.mark.parametrize("what", ["rows", "sessions"])
async def test_a_start_that_has_much_to_read_lets_everybody_else_run(autojump_clock, what):
    store = FakeStore()
    rows = {f"m{n}": LLM(f"m{n}", "local", ACTIVE, 0.0, 0.0) for n in range(6000)}
    sessions = {f"s{n}": SessionRecord(f"s{n}", "local", 0.0, 0.0) for n in range(6000)}
    await store.write(Batch(llms=rows) if what == "rows" else Batch(sessions=sessions))
    loaded = trio.Event()
    turns = 0

    async def count_turns():
        nonlocal turns
        while not loaded.is_set():
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count_turns)
        async with open_broker(store) as broker:
            loaded.set()
            assert len(broker.llms() if what == "rows" else broker.session_views()) == 6000
    assert turns >= 5


async def test_a_row_that_was_live_by_a_clock_ahead_of_ours_is_stored_as_it_is_held(autojump_clock):
    store = FakeStore()
    async with open_test_broker(store=store) as broker, FakePublisher(broker, "laptop", ROWS):
        held = dict(store._llms)
        ahead = broker.now() + 1e6
    store._llms = {**held, "qwen": replace(held["qwen"], last_heartbeat_at=ahead)}
    async with open_test_broker(store=store) as broker:
        await wait_all_tasks_blocked()
        for name in ("qwen", "phi"):
            assert store._llms[name] == view(broker, name).llm
        assert view(broker, "qwen").llm.last_heartbeat_at == broker.now()


async def test_what_a_store_holds_must_be_readable(autojump_clock):
    class Broken(MemoryStore):
        async def load(self):
            raise StoreError("not a database")

    with pytest.raises(StoreError):
        async with open_broker(Broken()):
            pass


async def test_closing_commits_what_is_left(autojump_clock):
    store = FakeStore()
    async with open_test_broker(store=store) as broker, FakePublisher(broker, "laptop", ROWS):
        pass
    assert store.held() == {"qwen": INACTIVE, "phi": INACTIVE}
    assert {llm.remembers for llm in store._llms.values()} == {ACTIVE, HIBERNATING}


async def test_names_that_come_and_go_while_the_store_is_down_have_a_bound(autojump_clock, monkeypatch):
    """What is deleted has to be written too, so it is kept: beyond a bound nobody new is taken until the store is well."""
    monkeypatch.setattr("wakecall.journal._MOST_UNWRITTEN", 20)
    store = FakeStore()
    async with open_test_broker(store=store) as broker:
        await broker.register("laptop", [LLMSpec("qwen")])
        store.failing = True
        refused_before_deciding = False
        for number in range(30):
            with pytest.raises(StoreUnavailable):
                await broker.register(f"guest-{number}", [])
            if f"guest-{number}" not in {view.record.session_id for view in broker.session_views()}:
                refused_before_deciding = True
                break
            with pytest.raises(StoreUnavailable):
                await broker.goodbye(f"guest-{number}")
        assert refused_before_deciding
        store.failing = False
        await trio.sleep(10)
        await broker.register("guest", [])


async def test_a_store_that_hangs_is_a_fault_after_ten_seconds_and_bounds_what_comes(autojump_clock, monkeypatch):
    """It raises nothing, so its silence has to tell; `/readyz` reads `store_ok`."""
    monkeypatch.setattr("wakecall.journal._MOST_UNWRITTEN", 20)
    store = FakeStore()
    async with open_test_broker(store=store) as broker:
        await broker.register("laptop", [LLMSpec("qwen")])
        store.hanging = True
        for number in range(11):
            with trio.move_on_after(1):
                await broker.register(f"guest-{number}", [])
            with trio.move_on_after(1):
                await broker.goodbye(f"guest-{number}")
        assert not broker.store_ok
        refused = False
        for number in range(11, 30):
            try:
                with trio.move_on_after(1):
                    await broker.register(f"guest-{number}", [])
            except StoreUnavailable:
                refused = True
        assert refused
        with pytest.raises(StoreUnavailable), trio.fail_after(1):
            await broker.register("one-more", [])
        assert "one-more" not in {each.record.session_id for each in broker.session_views()}


async def test_a_store_that_raises_what_it_must_not_ends_nothing(autojump_clock, caplog):
    """It counts as a failed commit, and is repeated like one."""

    class Broken(MemoryStore):
        broken = True

        async def write(self, batch):
            if self.broken:
                raise RuntimeError("a bug")
            await super().write(batch)

    store = Broken()
    async with open_test_broker(store=store) as broker:
        with pytest.raises(StoreUnavailable):
            await broker.register("laptop", [LLMSpec("qwen")])
        assert not broker.store_ok
        store.broken = False
        await trio.sleep(10)
        assert broker.store_ok
        assert {llm.name for llm in (await store.load()).llms} == {"qwen"}
    assert "in a way that a store must not" in caplog.text
