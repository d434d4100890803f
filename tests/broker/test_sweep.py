"""90 s without a heartbeat: inactive; 4 h inactive: deleted. And what a restart makes of what a store holds."""

import gc
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from itertools import pairwise

import pytest
import trio

from tests.broker.helpers import CALL, start_call, statuses, view
from wakecall import BrokerConfig, LLMSpec, MemoryStore, Status
from wakecall.errors import ModelOffline
from wakecall.models import Batch, SessionRecord
from wakecall.row import Row
from wakecall.testing import FakePublisher, open_test_broker

ACTIVE, HIBERNATING, INACTIVE = Status.ACTIVE, Status.HIBERNATING, Status.INACTIVE
BOTH = ["qwen", LLMSpec("phi", status=HIBERNATING)]
NOTHING = ((), ())
BY_HAND = BrokerConfig(sweep_interval_s=1e9)


def report(swept):
    return swept.inactivated, swept.deleted


async def test_90_seconds_without_a_heartbeat_and_a_row_is_inactive(autojump_clock):
    """Whatever its connection says: the channel ends as stale, and with it go all the session's rows and tasks."""
    async with (
        open_test_broker(BY_HAND) as broker,
        FakePublisher(broker, "laptop", BOTH) as publisher,
        trio.open_nursery() as nursery,
    ):
        call = start_call(nursery, broker)
        await trio.sleep(89.9)
        assert report(await broker.sweep()) == NOTHING
        assert statuses(broker) == {"qwen": ACTIVE, "phi": HIBERNATING}
        await trio.sleep(0.2)
        assert report(await broker.sweep()) == (("qwen", "phi"), ())
        assert statuses(broker) == {"qwen": INACTIVE, "phi": INACTIVE}
        await call.over.wait()
        assert call.code == "publisher_disconnected"
        assert (await publisher.next("bye")).data == {"reason": "stale"}


async def test_the_broker_sweeps_by_itself(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", BOTH):
        await trio.sleep(90 + 15.1)
        assert statuses(broker) == {"qwen": INACTIVE, "phi": INACTIVE}
        await trio.sleep(4 * 3600 + 15.1)
        assert broker.llms() == []


async def test_a_heartbeat_after_the_sweep_brings_back_what_was(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", BOTH) as publisher:
        await trio.sleep(120)
        assert statuses(broker) == {"qwen": INACTIVE, "phi": INACTIVE}
        await publisher.heartbeat()
        await publisher.connect()
        assert statuses(broker) == {"qwen": ACTIVE, "phi": HIBERNATING}
        assert view(broker).routable


async def test_rows_that_have_no_channel_go_stale_one_by_one(autojump_clock):
    async with open_test_broker() as broker:
        await broker.register("one", [LLMSpec("a")])
        await trio.sleep(30)
        await broker.register("two", [LLMSpec("b")])
        await trio.sleep(61)
        assert statuses(broker) == {"a": INACTIVE, "b": ACTIVE}


async def test_a_sweep_goes_by_the_last_sign_of_life_and_not_by_the_order_of_registering(autojump_clock):
    async with open_test_broker(BY_HAND) as broker:
        for name in "abc":
            await broker.register(name, [LLMSpec(name)])
        await trio.sleep(50)
        await broker.heartbeat("a")
        await trio.sleep(41)
        await broker.sweep()
        assert statuses(broker) == {"a": ACTIVE, "b": INACTIVE, "c": INACTIVE}


async def test_sweeping_twice_does_nothing_new(autojump_clock):
    async with open_test_broker() as broker:
        await broker.register("laptop", [LLMSpec("qwen")])
        await trio.sleep(89)
        await broker.heartbeat("laptop")
        await trio.sleep(4 * 3600)
        before = broker.llm("qwen")
        assert before.status is INACTIVE
        assert report(await broker.sweep()) == NOTHING
        assert report(await broker.sweep()) == NOTHING
        assert broker.llm("qwen") == before


async def test_a_row_is_deleted_four_hours_after_it_went_inactive_and_not_before(autojump_clock):
    async with open_test_broker(BY_HAND) as broker:
        async with FakePublisher(broker, "laptop", ["qwen"]):
            await trio.sleep(60)
        await trio.sleep(4 * 3600 - 1)
        assert report(await broker.sweep()) == NOTHING
        assert statuses(broker) == {"qwen": INACTIVE}
        await trio.sleep(1)
        assert report(await broker.sweep()) == ((), ("qwen",))
        assert broker.llms() == []
        assert report(await broker.sweep()) == NOTHING


async def register_many(broker, sessions, rows):
    for number in range(sessions):
        await broker.register(f"s{number}", [LLMSpec(f"{number}/{row}") for row in range(rows)])


@asynccontextmanager
async def looking_on(look):
    """Whoever else runs here: he looks each time that it is his turn. Yields what he saw."""
    seen = [look()]

    async def keep_looking():
        while True:
            seen.append(look())
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_looking)
        yield seen
        seen.append(look())
        nursery.cancel_scope.cancel()


def assert_went_by_and_by(seen):
    """From 400 to none. Which of two tasks is first in a turn of Trio's is chance, so two looks may be two steps apart."""
    assert (seen[0], seen[-1]) == (400, 0)
    assert max(before - after for before, after in pairwise(seen)) <= 2 * 70


@pytest.mark.parametrize("with_channels", [False, True])
async def test_a_sweep_of_many_rows_lets_everybody_else_run(mock_clock, with_channels):
    """A few rows a step, or those of one session whose channel ends; and the report is of all of them."""
    config = BrokerConfig(sweep_interval_s=1e9, peer_stall_s=1e9)
    async with open_test_broker(config) as broker, AsyncExitStack() as stack:
        await register_many(broker, 40, 10)
        if with_channels:
            for number in range(40):
                await stack.enter_async_context(broker.open_channel(f"s{number}"))
            await trio.testing.wait_all_tasks_blocked()
        names = [row.llm.name for row in broker._directory.live.values()]
        assert len(names) == 400
        mock_clock.jump(91)
        async with looking_on(lambda: len(broker._directory.live)) as seen:
            assert report(await broker.sweep()) == (tuple(names), ())
        assert_went_by_and_by(seen)
        mock_clock.jump(4 * 3600)
        async with looking_on(lambda: len(broker._directory.rows)) as seen:
            assert report(await broker.sweep()) == ((), tuple(names))
        assert_went_by_and_by(seen)


async def test_sessions_that_nobody_uses_are_forgotten_a_few_at_a_time(mock_clock):
    async with open_test_broker(BY_HAND) as broker:
        await register_many(broker, 400, 0)
        mock_clock.jump(4 * 3600)
        async with looking_on(lambda: len(broker._directory.sessions)) as seen:
            await broker.sweep()
        assert_went_by_and_by(seen)


async def test_whoever_comes_back_during_a_sweep_is_not_retired_by_it(mock_clock):
    """A heartbeat and a deletion, between two steps."""
    async with open_test_broker(BY_HAND) as broker:
        await register_many(broker, 200, 1)
        mock_clock.jump(91)

        def come_back():
            if len(broker._directory.live) < 200 and not came:
                came.append("back")
                broker._registry.heartbeat_nowait("s199", {}, (), "local")
                broker._registry.delete_llm_nowait("198/0")

        came = []
        async with looking_on(come_back):
            swept = await broker.sweep()
        assert came
        assert broker.llm("199/0").status is ACTIVE
        assert swept.inactivated == tuple(f"{number}/0" for number in range(198))
        assert report(await broker.sweep()) == NOTHING


async def test_two_sweeps_at_once_retire_each_row_once(mock_clock):
    async with open_test_broker(BY_HAND) as broker:
        await register_many(broker, 200, 1)
        mock_clock.jump(91)
        reports = []

        async def sweep():
            reports.append(await broker.sweep())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(sweep)
            nursery.start_soon(sweep)
        assert sorted(name for each in reports for name in each.inactivated) == sorted(statuses(broker))


@pytest.mark.parametrize("pool", [None, "big"])
async def test_a_deleted_row_leaves_no_circle_behind(autojump_clock, pool):
    """`serve` has the collector pass by what was there at its start, so what goes later has to go by itself."""
    store = MemoryStore()
    async with open_test_broker(BY_HAND, store) as broker:
        await broker.register("laptop", [LLMSpec("qwen", pool=pool), LLMSpec("phi", pool=pool)])
    async with open_test_broker(BY_HAND, store) as broker:
        # Asked for its pool, as whoever calls it would.
        ids = {id(row) for row in broker._directory.rows.values() if row.pool.rows}
        await trio.sleep(4 * 3600 + 1)
        gc.disable()
        try:
            assert report(await broker.sweep()) == ((), ("phi", "qwen"))
            assert [each.llm.name for each in gc.get_objects() if type(each) is Row and id(each) in ids] == []
        finally:
            gc.enable()


async def test_heartbeats_do_not_keep_a_withdrawn_row_from_being_deleted(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", BOTH) as publisher:
        await publisher.register(["qwen"])
        for _ in range(4 * 60 + 1):
            await trio.sleep(60)
            await publisher.heartbeat()
        assert statuses(broker) == {"qwen": ACTIVE}


async def test_a_public_row_is_never_touched(autojump_clock):
    async with open_test_broker() as broker:
        await broker.put_public_llm("gpt", type="openai", model="gpt", url="http://127.0.0.1:1/v1")
        before = broker.llm("gpt")
        await trio.sleep(24 * 3600)
        assert report(await broker.sweep()) == NOTHING
        assert broker.llm("gpt") == before


async def test_after_a_restart_nothing_is_active_until_its_publisher_is_back(autojump_clock):
    """All rows inactive, remembering what they were; the publisher's channel or register brings them back in place."""
    store = MemoryStore()
    async with open_test_broker(store=store) as broker, FakePublisher(broker, "laptop", BOTH) as publisher:
        await publisher.register([*BOTH, "third"])
        await publisher.register(BOTH)
        made = broker.llm("qwen").created_at
        epoch = publisher.channel.epoch
        await trio.sleep(10)
    async with open_test_broker(store=store) as broker:
        assert statuses(broker) == {"qwen": INACTIVE, "phi": INACTIVE, "third": INACTIVE}
        with pytest.raises(ModelOffline):
            broker.infer_nowait("qwen", CALL)
        async with FakePublisher(broker, "laptop", []) as publisher:
            pass
    async with open_test_broker(store=store) as broker:
        # An empty register has withdrawn them, and so they stay.
        assert {llm.remembers for llm in broker.llms()} == {None}
        async with FakePublisher(broker, "laptop", BOTH) as publisher:
            assert statuses(broker) == {"qwen": ACTIVE, "phi": HIBERNATING, "third": INACTIVE}
            assert broker.llm("qwen").created_at == made
            assert publisher.channel.epoch > epoch


async def test_a_restart_gives_nobody_the_rows_of_another_owner_who_had_his_session_id_before(autojump_clock):
    """A session's id is free after a goodbye; who takes it then neither sees nor bumps the rows that were left."""
    store = MemoryStore()
    async with open_test_broker(store=store) as broker:
        await broker.register("laptop", [LLMSpec("hers")], owner="anna")
        await broker.goodbye("laptop", owner="anna")
        await broker.register("laptop", [LLMSpec("his")], owner="ben")
    await trio.sleep(10)
    async with open_test_broker(store=store) as broker:
        left = broker.llm("hers")
        assert (await broker.heartbeat("laptop", owner="ben")).llms == {"his": ACTIVE}
        assert [view.llms for view in broker.session_views()] == [("his",)]
        assert broker.llm("hers") == left


async def test_after_a_crash_rows_come_back_as_what_they_were(autojump_clock):
    """A crash leaves live rows in the store; they are lost as of the start, and a channel alone revives them."""
    store = MemoryStore()
    async with open_test_broker(store=store) as broker, FakePublisher(broker, "laptop", BOTH):
        await trio.testing.wait_all_tasks_blocked()
        held = await store.load()
    assert {llm.name: llm.status for llm in held.llms} == {"qwen": ACTIVE, "phi": HIBERNATING}
    crashed = MemoryStore()
    await crashed.write(Batch({x.name: x for x in held.llms}, {x.session_id: x for x in held.sessions}))
    await trio.sleep(3600)
    async with open_test_broker(store=crashed) as broker:
        assert statuses(broker) == {"qwen": INACTIVE, "phi": INACTIVE}
        assert {llm.inactive_since for llm in broker.llms()} == {broker.now()}
        async with broker.open_channel("laptop") as channel:
            frames = await channel.receive()
            assert [frame.event for frame in frames] == ["hello"]
            assert frames[0].data["epoch"] == held.sessions[0].epoch + 1
            assert statuses(broker) == {"qwen": ACTIVE, "phi": HIBERNATING}


async def test_retention_goes_on_across_a_restart_but_nothing_is_deleted_in_its_first_90_seconds(autojump_clock):
    store = MemoryStore()
    async with open_test_broker(BY_HAND, store) as broker, FakePublisher(broker, "laptop", ["qwen"]):
        pass
    await trio.sleep(3 * 3600)
    async with open_test_broker(BY_HAND, store) as broker:
        await trio.sleep(3600 - 30)
        assert statuses(broker) == {"qwen": INACTIVE}
    await trio.sleep(3600)
    async with open_test_broker(BY_HAND, store) as broker:
        # Due long ago, but its publisher may be on its way.
        await trio.sleep(89.9)
        assert report(await broker.sweep()) == NOTHING
        assert statuses(broker) == {"qwen": INACTIVE}
        await trio.sleep(0.2)
        assert report(await broker.sweep()) == ((), ("qwen",))


async def test_a_store_written_by_a_clock_ahead_of_ours_holds_nothing_up(autojump_clock):
    """Instants are cut to our own start: a row from the future would stand before all that fall due behind it."""
    store = MemoryStore()
    async with open_test_broker(store=store) as broker:
        async with FakePublisher(broker, "ahead", ["ahead"]), FakePublisher(broker, "old", ["old"]):
            pass
        now = broker.now()
    held = await store.load()
    rows = {x.name: x for x in held.llms}

    rows["ahead"] = replace(rows["ahead"], inactive_since=now + 1e6, last_heartbeat_at=now + 1e6)
    sessions = {
        "a-used": SessionRecord("a-used", "local", now, now),
        "b-ahead": SessionRecord("b-ahead", "local", now, now, unused_since=now + 1e6),
        "c-old": SessionRecord("c-old", "local", now, now, unused_since=now - 4 * 3600),
    }
    await store.write(Batch(rows, sessions))
    async with open_test_broker(store=store) as broker:
        await trio.sleep(120)
        assert "c-old" not in {s.record.session_id for s in broker.session_views()}
        await trio.sleep(4 * 3600)
        assert broker.llms() == []
