"""Rows that an operator holds or their publisher has paused: what still comes, what waits, what goes on."""

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.broker.helpers import CALL, start_call, start_calls, statuses, view
from wakecall import BrokerConfig, LLMSpec, MemoryStore, Status
from wakecall.errors import ModelOffline
from wakecall.testing import FakePublisher, open_test_broker

ONE_SLOT = {"max_concurrency": 1}
HOLDS = ["drain", "pause", "publisher"]
ASLEEP = Status.HIBERNATING


async def hold(broker, how, llm="qwen", session="laptop"):
    if how == "publisher":
        await broker.pause_session(session, [llm])
    else:
        await broker.hold(llm, how)


async def let_go(broker, how, llm="qwen", session="laptop"):
    if how == "publisher":
        await broker.resume_session(session, [llm])
    else:
        await broker.resume(llm)


async def answer(publisher, body=b"x"):
    frame = await publisher.next("infer", within_s=1)
    await publisher.answer(frame, body)
    return frame.data["llm"]


@pytest.mark.parametrize("how", HOLDS)
async def test_it_takes_nobody_new_and_what_is_at_work_goes_on(autojump_clock, how):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ["qwen"]) as publisher,
        trio.open_nursery() as nursery,
    ):
        call = start_call(nursery, broker)
        frame = await publisher.next("infer")
        await hold(broker, how)
        with pytest.raises(ModelOffline, match="paused, or being drained"):
            broker.infer_nowait("qwen", CALL)
        assert statuses(broker) == {"qwen": Status.ACTIVE}
        await publisher.answer(frame, b"x")
        await call.over.wait()
        assert (call.body, publisher.events("cancel")) == (b"x", [])
        with pytest.raises(ModelOffline):
            broker.infer_nowait("qwen", CALL)
        await let_go(broker, how)
        again = start_call(nursery, broker)
        await answer(publisher)
        await again.over.wait()


@pytest.mark.parametrize("how", HOLDS)
async def test_who_asks_for_it_once_its_publisher_is_gone_hears_that(autojump_clock, how):
    """It would not help him to know of a hold."""
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
        await hold(broker, how)
        publisher.disconnect()
        await wait_all_tasks_blocked()
        with pytest.raises(ModelOffline, match="not connected"):
            broker.infer_nowait("qwen", CALL)


@pytest.mark.parametrize("how", HOLDS)
async def test_those_who_come_to_its_pool_go_to_the_others(autojump_clock, how):
    rows = [LLMSpec(name, pool="chat", **ONE_SLOT) for name in ("qwen", "phi")]
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", rows) as publisher,
        trio.open_nursery() as nursery,
    ):
        await hold(broker, how)
        await start_calls(nursery, broker, 3, "chat")
        assert [await answer(publisher) for _ in range(3)] == ["phi", "phi", "phi"]
        start_call(nursery, broker, "chat")
        await publisher.next("infer")
        waits = start_call(nursery, broker, "chat")
        await wait_all_tasks_blocked()
        await let_go(broker, how)
        assert await answer(publisher) == "qwen"
        await waits.over.wait()
        nursery.cancel_scope.cancel()


async def test_under_drain_who_waits_by_name_is_served_and_who_waits_for_the_pool_is_not(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", pool="chat", **ONE_SLOT)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        await start_calls(nursery, broker, 1)
        anybody, named = await start_calls(nursery, broker, 1, "chat"), await start_calls(nursery, broker, 2)
        await broker.hold("qwen", "drain")
        await wait_all_tasks_blocked()
        assert anybody[0].code == "model_offline", "nobody is left for it"
        for body in (b"-", b"0", b"1"):
            await answer(publisher, body)
        for call in named:
            await call.over.wait()
        assert [call.body for call in named] == [b"0", b"1"]


async def test_under_drain_who_waits_for_the_pool_waits_for_the_others(autojump_clock):
    rows = [LLMSpec(name, pool="chat", **ONE_SLOT) for name in ("qwen", "phi")]
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", rows) as publisher,
        trio.open_nursery() as nursery,
    ):
        await start_calls(nursery, broker, 3, "chat")
        await broker.hold("qwen", "drain")
        frames = {frame.data["llm"]: frame for frame in [await publisher.next("infer") for _ in range(2)]}
        await publisher.answer(frames["qwen"], b"x")
        await wait_all_tasks_blocked()
        assert len(publisher.events("infer")) == 2
        await publisher.answer(frames["phi"], b"x")
        assert (await publisher.next("infer")).data["llm"] == "phi"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("how", ["pause", "publisher"])
@pytest.mark.parametrize("name", ["qwen", "chat"])
async def test_under_pause_who_waits_waits_until_it_is_resumed(autojump_clock, how, name):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", pool="chat", **ONE_SLOT)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        await start_calls(nursery, broker, 1)
        (waits,) = await start_calls(nursery, broker, 1, name)
        await hold(broker, how)
        await answer(publisher)
        await trio.sleep(30)
        assert (len(publisher.events("infer")), waits.over.is_set()) == (1, False)
        await let_go(broker, how)
        await answer(publisher, b"x")
        await waits.over.wait()
        assert waits.body == b"x"


@pytest.mark.parametrize("how", ["pause", "publisher"])
async def test_under_pause_its_own_deadline_ends_the_wait(autojump_clock, how):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", **ONE_SLOT)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        began = trio.current_time()
        _, waits = await start_calls(nursery, broker, 2)
        await hold(broker, how)
        await answer(publisher)
        await waits.over.wait()
        assert (waits.error.phase, waits.over_at - began) == ("queue", 60)


@pytest.mark.parametrize("how", HOLDS)
async def test_no_register_heartbeat_or_channel_touches_it(autojump_clock, how):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ["qwen"]) as publisher,
        trio.open_nursery() as nursery,
    ):
        await hold(broker, how)
        flags = (broker.llm("qwen").hold, broker.llm("qwen").paused)
        for touch in (
            publisher.heartbeat,
            lambda: publisher.heartbeat({"qwen": Status.ACTIVE}),
            lambda: publisher.heartbeat({"qwen": ASLEEP}),
            lambda: publisher.register(["qwen"]),
            lambda: publisher.register([LLMSpec("qwen", status=Status.ACTIVE, pool="chat", max_concurrency=3)]),
            lambda: publisher.register([]),
            lambda: publisher.register(["qwen"]),
            publisher.connect,
            publisher.goodbye,
            lambda: publisher.register(["qwen"]),
            publisher.connect,
        ):
            await touch()
            assert (broker.llm("qwen").hold, broker.llm("qwen").paused) == flags
            with pytest.raises(ModelOffline):
                broker.infer_nowait("qwen", CALL)
        await let_go(broker, how)
        start_call(nursery, broker)
        await answer(publisher)


async def test_the_operators_and_the_publishers_are_two(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
        await hold(broker, "pause")
        await hold(broker, "publisher")
        await let_go(broker, "publisher")
        with pytest.raises(ModelOffline):
            broker.infer_nowait("qwen", CALL)
        await hold(broker, "publisher")
        await let_go(broker, "pause")
        with pytest.raises(ModelOffline):
            broker.infer_nowait("qwen", CALL)
        await let_go(broker, "publisher")
        infer = broker.infer_nowait("qwen", CALL)
        await answer(publisher)
        assert infer.is_over


async def test_a_paused_drain_serves_nobody(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", **ONE_SLOT)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        await start_calls(nursery, broker, 2)
        await hold(broker, "drain")
        await hold(broker, "publisher")
        await answer(publisher)
        await trio.sleep(10)
        assert len(publisher.events("infer")) == 1
        await let_go(broker, "publisher")
        await answer(publisher)


@pytest.mark.parametrize("how", HOLDS)
async def test_a_sleeping_row_that_is_held_is_not_woken(autojump_clock, how):
    rows = [LLMSpec("qwen", pool="chat", status=ASLEEP), LLMSpec("phi", pool="chat", status=ASLEEP)]
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", rows) as publisher,
        trio.open_nursery() as nursery,
    ):
        await hold(broker, how)
        with pytest.raises(ModelOffline):
            broker.infer_nowait("qwen", CALL)
        call = start_call(nursery, broker, "chat")
        wake = await publisher.next("wake")
        assert wake.data["llm"] == "phi"
        publisher.fail(wake, "no")
        await call.over.wait()
        assert (call.code, len(publisher.events("wake"))) == ("wake_failed", 1)


@pytest.mark.parametrize("how", ["pause", "publisher"])
async def test_one_that_falls_asleep_while_it_is_paused_is_woken_when_it_is_resumed(autojump_clock, how):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", **ONE_SLOT)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        _, waits = await start_calls(nursery, broker, 2)
        await hold(broker, how)
        await answer(publisher)
        await publisher.heartbeat({"qwen": ASLEEP})
        await trio.sleep(20)
        assert publisher.events("wake") == []
        await let_go(broker, how)
        await publisher.answer(await publisher.next("wake", within_s=1))
        await answer(publisher, b"x")
        await waits.over.wait()
        assert waits.body == b"x"


@pytest.mark.parametrize("how", ["pause", "publisher"])
async def test_a_wake_under_way_counts_and_then_nothing_is_sent(autojump_clock, how):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", status=ASLEEP)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        call = start_call(nursery, broker)
        wake = await publisher.next("wake")
        await hold(broker, how)
        await publisher.answer(wake)
        assert statuses(broker) == {"qwen": Status.ACTIVE}
        await trio.sleep(10)
        assert publisher.events("infer") == []
        await let_go(broker, how)
        await answer(publisher)
        await call.over.wait()
        assert call.body == b"x"


@pytest.mark.parametrize("how", HOLDS)
async def test_it_survives_a_restart(autojump_clock, how):
    store = MemoryStore()
    async with open_test_broker(store=store) as broker, FakePublisher(broker, "laptop", ["qwen"]):
        await hold(broker, how)
        flags = (broker.llm("qwen").hold, broker.llm("qwen").paused)
    async with open_test_broker(store=store) as broker, FakePublisher(broker, "laptop", ["qwen"]):
        assert (broker.llm("qwen").hold, broker.llm("qwen").paused) == flags
        with pytest.raises(ModelOffline):
            broker.infer_nowait("qwen", CALL)


@pytest.mark.parametrize("how", ["drain", "pause"])
async def test_a_pool_is_held_with_all_its_rows(autojump_clock, how):
    rows = [LLMSpec(name, pool="chat", **ONE_SLOT) for name in "ab"]
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", rows) as publisher,
        trio.open_nursery() as nursery,
    ):
        await start_calls(nursery, broker, 2, "chat")
        (waits,) = await start_calls(nursery, broker, 1, "chat")
        await broker.hold("chat", how)
        await wait_all_tasks_blocked()
        assert len(publisher.events("infer")) == 2, "none of them was sent it while the other was not held yet"
        assert waits.code == ("model_offline" if how == "drain" else None)
        for name in ("a", "b", "chat"):
            with pytest.raises(ModelOffline):
                broker.infer_nowait(name, CALL)
        await broker.resume("chat")
        nursery.cancel_scope.cancel()


async def test_with_the_healthy_one_held_the_others_penalty_does_not_matter(autojump_clock):
    """Who waits does not wait for its time to be up."""
    rows = [LLMSpec(name, pool="chat", **ONE_SLOT) for name in ("qwen", "phi")]
    async with (
        open_test_broker(BrokerConfig(queue_s=600)) as broker,
        FakePublisher(broker, "laptop", rows) as publisher,
        trio.open_nursery() as nursery,
    ):
        for _ in range(5):
            start_call(nursery, broker, "phi")
            publisher.fail(await publisher.next("infer"), "no")
        start_call(nursery, broker, "chat")
        assert (await publisher.next("infer")).data["llm"] == "qwen"
        waits = start_call(nursery, broker, "chat")
        await wait_all_tasks_blocked()
        assert view(broker, "phi").in_flight == 0
        await broker.hold("qwen", "drain")
        assert await answer(publisher) == "phi"
        await waits.over.wait()
        nursery.cancel_scope.cancel()
