"""What infers used: counted in the step of their outcome, in the store within seconds, read with all that is counted."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.broker.helpers import CALL, STREAM, observe
from tests.broker.test_store import FakeStore
from wakecall import BrokerConfig, LLMSpec, open_broker
from wakecall.errors import StoreUnavailable, WakecallError
from wakecall.ledger import OTHERS, Usage, hour_of
from wakecall.models import InferSettled
from wakecall.testing import FakePublisher, open_test_broker

SSE = "text/event-stream"
PLAIN = json.dumps({"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 3}}).encode()
EVENTS = [
    b'data: {"choices":[{"delta":{"content":"Hi"}}],"usage":null}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":4}}\n\nda',
    b"ta: [DONE]\n\n",
]
ONE = Usage(requests=1, completed=1, tokens_in=12, tokens_out=3)


async def serve_one(broker, publisher, name="qwen", claim=None, after_s=0.0):
    """One infer, answered with `PLAIN`."""
    infer = broker.infer_nowait(name, CALL, claim=claim)
    frame = await publisher.next("infer")
    await trio.sleep(after_s)
    await publisher.answer(frame, PLAIN)
    assert await (await infer.wait_head()).read() == PLAIN
    infer.cancel()


def written(store):
    return sum(store._usage.values(), Usage())


async def test_tokens_and_seconds_of_service_are_told_with_the_outcome(autojump_clock):
    """Plain and streamed; the seconds begin when it is sent, not when it is accepted."""
    rows = [LLMSpec("qwen", max_concurrency=1)]
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", rows) as publisher:
        events = observe(broker)
        infers = [broker.infer_nowait("qwen", request) for request in (CALL, STREAM)]
        await trio.sleep(2)
        await publisher.answer(await publisher.next("infer"), PLAIN[:30], PLAIN[30:])
        await trio.sleep(3)
        await publisher.answer(await publisher.next("infer"), *EVENTS, content_type=SSE)
        for infer in infers:
            infer.cancel()
        settled = [event for event in events if isinstance(event, InferSettled)]
        assert [(e.seconds, e.service_s, e.tokens_in, e.tokens_out) for e in settled] == [(2, 2, 12, 3), (5, 3, 5, 4)]


async def test_what_is_not_said_is_unknown_and_what_was_not_made_is_not(autojump_clock):
    """An answer without usage is unknown, and so is one that broke off; an engine's error took nothing, nor did what was
    never sent."""
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:

        async def usage_of(end):
            before = (await broker.usage("llm", 0)).get("qwen", Usage())
            infer = broker.infer_nowait("qwen", STREAM)
            frame = await publisher.next("infer")
            await end(infer, frame)
            infer.cancel()
            after = (await broker.usage("llm", 0))["qwen"]
            assert after.requests == before.requests + 1
            return tuple(
                getattr(after, name) - getattr(before, name) for name in ("unknown", "tokens_in", "tokens_out")
            )

        async def says_nothing(infer, frame):
            await publisher.answer(frame, EVENTS[0], content_type=SSE)

        async def is_audio(infer, frame):
            await publisher.answer(frame, PLAIN, content_type="audio/mpeg")

        async def breaks_off(infer, frame):
            with publisher.upload(frame, content_type=SSE) as upload:
                await upload.send(EVENTS[0])

        async def breaks_off_late(infer, frame):
            with publisher.upload(frame, content_type=SSE) as upload:
                await upload.send(EVENTS[1])

        async def is_left(infer, frame):
            infer.cancel()

        async def is_an_error(infer, frame):
            await publisher.answer(frame, PLAIN, status=429)

        async def says_all(infer, frame):
            await publisher.answer(frame, PLAIN)

        assert await usage_of(says_nothing) == (1, 0, 0)
        assert await usage_of(is_audio) == (1, 0, 0)
        assert await usage_of(breaks_off) == (1, 0, 0)
        assert await usage_of(breaks_off_late) == (0, 5, 4)
        assert await usage_of(is_left) == (1, 0, 0)
        assert await usage_of(is_an_error) == (0, 0, 0)
        assert await usage_of(says_all) == (0, 12, 3)
        publisher.disconnect()
        with pytest.raises(WakecallError):
            broker.infer_nowait("qwen", CALL)
        assert (await broker.usage("llm", 0))["qwen"] == Usage(8, 4, 3, 1, 4, 17, 7)


async def test_one_that_moves_counts_once_and_with_whoever_served_it(autojump_clock):
    """What the one that refused it said is nobody's, and neither are its seconds."""
    rows = [LLMSpec(name, pool="pool", max_concurrency=1) for name in ("one", "two")]
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", rows) as publisher:
        infer = broker.infer_nowait("pool", CALL)
        first = await publisher.next("infer")
        await trio.sleep(4)
        await publisher.answer(first, PLAIN, status=429)
        second = await publisher.next("infer")
        assert second.data["llm"] != first.data["llm"]
        await trio.sleep(2)
        await publisher.answer(second, PLAIN)
        infer.cancel()
        assert await broker.usage("llm", 0) == {second.data["llm"]: replace(ONE, seconds=2.0)}


async def test_one_whose_frame_nobody_took_used_nothing(autojump_clock):
    """Nor one that only waited: that is known."""
    rows = [LLMSpec("qwen", max_concurrency=1)]
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", rows):
        await wait_all_tasks_blocked()
        sent, waiting = (broker.infer_nowait("qwen", CALL) for _ in range(2))
        waiting.cancel()
        sent.cancel()
        assert await broker.usage("llm", 0) == {"qwen": Usage(requests=2, cancelled=2)}


async def test_it_is_summed_by_key_and_by_llm(autojump_clock):
    """Those of a key that is revoked stay."""
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen", "phi"]) as publisher:
        await serve_one(broker, publisher, "phi")
        made = await broker.create_key("client")
        caller = broker.authenticate(made.secret)
        for name in ("qwen", "phi"):
            await serve_one(broker, publisher, name, broker.claim(caller), after_s=1)
        served = replace(ONE, seconds=1.0)
        by_key = {"": ONE, made.key.key_id: served + served}
        assert await broker.usage("key", 0) == by_key
        assert await broker.usage("llm", 0) == {"phi": ONE + served, "qwen": served}
        await broker.revoke_key(made.key.key_id)
        assert await broker.usage("key", 0) == by_key


async def test_an_infer_counts_in_the_hour_in_which_it_ends(autojump_clock):
    config = BrokerConfig(heartbeat_timeout_s=1e6)
    async with open_test_broker(config) as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
        await serve_one(broker, publisher)
        first = broker.now()
        await trio.sleep(3600)
        await serve_one(broker, publisher)
        assert (await broker.usage("llm", first))["qwen"] == ONE + ONE
        assert (await broker.usage("llm", broker.now()))["qwen"] == ONE
        assert await broker.usage("llm", broker.now() + 3600) == {}


async def test_it_is_in_the_store_within_the_flush_time(autojump_clock):
    """In one write for all that came meanwhile; and nothing is written where nothing was used."""
    store = FakeStore()
    async with (
        open_test_broker(BrokerConfig(usage_flush_s=5, sweep_interval_s=1e9), store) as broker,
        FakePublisher(broker, "laptop", ["qwen"]) as publisher,
    ):
        for _ in range(3):
            await serve_one(broker, publisher, after_s=1)
        await trio.sleep(2.9)
        assert written(store).requests == 0
        await trio.sleep(0.2)
        assert written(store) == Usage(3, 3, 0, 0, 0, 36, 9, 3.0)
        await wait_all_tasks_blocked()
        tried = len(store.batches)
        await trio.sleep(9)
        assert len(store.batches) == tried
        await serve_one(broker, publisher)
        await trio.sleep(5.1)
        assert written(store).requests == 4


async def test_closing_writes_what_is_left(autojump_clock):
    """The cancelled and the failed of the closing itself included; the next broker's infers of that hour are added."""
    store = FakeStore()
    for round_ in (1, 2):
        async with open_broker(store) as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
            await serve_one(broker, publisher)
            broker.infer_nowait("qwen", CALL)
        found = written(store)
        assert (found.requests, found.failed, found.tokens_in) == (2 * round_, round_, 12 * round_)
    assert len(store._usage) == 1


async def test_a_commit_that_is_repeated_counts_once(autojump_clock):
    """It may be there though the store said that it failed."""

    class Forgetful(FakeStore):
        async def write(self, batch):
            await super().write(batch)
            if self.forgets and batch.usage:
                self.batches_lost += 1
                raise StoreUnavailable  # not even a StoreError

        forgets = True
        batches_lost = 0

    store = Forgetful()
    async with open_test_broker(store=store) as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
        for _ in range(3):
            await serve_one(broker, publisher)
            await trio.sleep(20)
        assert store.batches_lost > 3
        store.forgets = False
        await trio.sleep(10)
        assert written(store) == Usage(3, 3, 0, 0, 0, 36, 9)
        assert (await broker.usage("llm", 0))["qwen"] == Usage(3, 3, 0, 0, 0, 36, 9)


async def test_infers_do_not_wait_for_a_store_that_hangs_and_nothing_is_lost(autojump_clock):
    store = FakeStore()
    async with open_test_broker(store=store) as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
        await serve_one(broker, publisher)
        store.gate = trio.Event()
        await trio.sleep(6)
        assert store.busy
        with trio.fail_after(0.5):
            for _ in range(3):
                await serve_one(broker, publisher)
        store.gate.set()
        assert (await broker.usage("llm", 0))["qwen"].requests == 4
        assert written(store).requests == 4


async def test_a_store_that_fails_gets_it_later_and_who_asks_meanwhile_is_told(autojump_clock):
    store = FakeStore()
    async with open_test_broker(store=store) as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
        store.failing = True
        await serve_one(broker, publisher)
        with pytest.raises(StoreUnavailable):
            await broker.usage("llm", 0)
        await trio.sleep(60)
        await serve_one(broker, publisher)
        await trio.sleep(6)
        store.failing = False
        await trio.sleep(6)
        assert written(store).requests == 2


async def test_a_write_that_fails_does_not_undo_what_was_put_meanwhile(autojump_clock):
    store = FakeStore()
    async with (
        open_test_broker(store=store) as broker,
        FakePublisher(broker, "laptop", ["qwen"]) as publisher,
        trio.open_nursery() as nursery,
    ):

        async def ask():
            assert (await broker.usage("llm", 0))["qwen"].requests == 2

        await serve_one(broker, publisher)
        store.failing, store.gate = True, trio.Event()
        await trio.sleep(6)
        assert store.busy
        await serve_one(broker, publisher)
        nursery.start_soon(ask)
        await wait_all_tasks_blocked()
        store.gate.set()
        await trio.sleep(0.1)
        store.failing = False
        await trio.sleep(1)
        assert written(store).requests == 2


async def test_hours_that_are_over_leave_the_memory(autojump_clock):
    names = [f"m{number}" for number in range(20)]
    config = BrokerConfig(heartbeat_timeout_s=1e6)
    async with open_test_broker(config) as broker, FakePublisher(broker, "laptop", names) as publisher:
        for _ in range(3):
            for name in names:
                await serve_one(broker, publisher, name)
            await trio.sleep(3600)
        assert len(broker._accounting._ledger) == len(names)
        assert len(await broker.usage("llm", 0)) == len(names)
        assert sum((await broker.usage("llm", 0)).values(), Usage()).requests == 3 * len(names)


async def test_cells_have_a_bound_and_what_is_beyond_is_counted_as_others(autojump_clock):
    config = BrokerConfig(max_usage_cells=2)
    async with open_test_broker(config) as broker, FakePublisher(broker, "laptop", ["a", "b", "c", "d"]) as publisher:
        for name in ("a", "b", "c", "d", "a"):
            await serve_one(broker, publisher, name)
        found = await broker.usage("llm", 0)
        assert {name: usage.requests for name, usage in found.items()} == {OTHERS: 2, "a": 2, "b": 1}
        assert {name: usage.requests for name, usage in (await broker.usage("key", 0)).items()} == {"": 3, OTHERS: 2}


async def test_what_has_been_kept_for_long_enough_is_deleted(autojump_clock):
    """By the sweeper, also where nobody calls any more; an hour goes when all of it is that old."""
    store = FakeStore()
    async with open_test_broker(BrokerConfig(usage_retention_s=7200), store) as broker:
        now = broker.now()
        cells = {(hour_of(now) - age, "", "qwen"): ONE for age in range(6)}
        store._usage = dict(cells)
        await trio.sleep(20)
        assert {hour_of(now) - cell[0] for cell in store._usage} == {0, 1, 2}
        tried = len(store.batches)
        await trio.sleep(60)
        assert len(store.batches) == tried
        store.failing = True
        await trio.sleep(3600)
        assert len(store._usage) == 3
        store.failing = False
        await trio.sleep(6)
        assert {hour_of(now) - cell[0] for cell in store._usage} == {0, 1}
