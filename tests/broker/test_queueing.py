"""The line: how long it is, who is told what of it, whose budgets rule, and when somebody is woken for those in it."""

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.broker.helpers import CALL, STREAM, start_call, start_calls, view
from wakecall import BrokerConfig, InferRequest, LLMSpec, Status
from wakecall.errors import QueueFull
from wakecall.testing import FakePublisher, open_test_broker

ACTIVE, HIBERNATING = Status.ACTIVE, Status.HIBERNATING
ONE_SLOT = {"max_concurrency": 1}


def within(seconds, *, stream=False, priority="interactive"):
    return InferRequest("/v1/chat/completions", b"{}", stream=stream, timeout_s=seconds, priority=priority)


async def beat(publisher):
    while True:
        await trio.sleep(30)
        await publisher.heartbeat()


async def measure(nursery, broker, publisher, seconds, name="qwen"):
    """Have the broker see that an infer of this row takes so long."""
    call = start_call(nursery, broker, name)
    frame = await publisher.next("infer")
    await trio.sleep(seconds)
    await publisher.answer(frame, b"measured")
    await call.over.wait()


# What a refusal says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("service_s", "slots", "retry_s"), [(2.0, 1, 20.0), (2.0, 4, 5.0), (0.01, 1, 1.0), (9, 1, 60)])
async def test_the_retry_after_is_what_the_wait_would_be(autojump_clock, service_s, slots, retry_s):
    """As the service was measured, between a second and a minute."""
    config = BrokerConfig(max_waiting_per_llm=9, queue_s=1000)
    async with (
        open_test_broker(config) as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", max_concurrency=slots)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        await measure(nursery, broker, publisher, service_s)
        await start_calls(nursery, broker, slots + 9)
        with pytest.raises(QueueFull) as caught:
            broker.infer_nowait("qwen", CALL)
        assert caught.value.retry_after_s == pytest.approx(retry_s)
        nursery.cancel_scope.cancel()


async def test_whoever_would_be_out_of_time_is_refused_at_once(autojump_clock):
    """By the estimate: 20 s each, and a minute to wait at the most."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", **ONE_SLOT)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(beat, publisher)
        await measure(nursery, broker, publisher, 20)
        await start_calls(nursery, broker, 3)
        for seconds, waits in ((30, False), (59, False), (60.5, True)):
            began = trio.current_time()
            if waits:
                broker.infer_nowait("qwen", within(seconds)).cancel()
                continue
            with pytest.raises(QueueFull) as caught:
                broker.infer_nowait("qwen", within(seconds))
            assert trio.current_time() == began
            assert "time" in caught.value.message
            assert (caught.value.status, caught.value.retry_after_s) == (429, 60)
        await start_calls(nursery, broker, 1)
        accepted = broker.statistics().accepted
        with pytest.raises(QueueFull):
            broker.infer_nowait("qwen", CALL)
        assert broker.statistics().accepted == accepted, "refused is not accepted"
        nursery.cancel_scope.cancel()


async def test_who_names_a_row_is_not_taken_to_wait_for_all_of_its_pool(autojump_clock):
    """Ten rows, and forty who wait for any of them: four go before him to his own, and not forty."""
    names = [f"row{number}" for number in range(10)]
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec(name, pool="chat", **ONE_SLOT) for name in names]) as publisher,
        trio.open_nursery() as nursery,
    ):
        for name in names:
            await measure(nursery, broker, publisher, 5, name)
            await publisher.heartbeat()
        await start_calls(nursery, broker, 50, "chat")
        infer = broker.infer_nowait("row0", within(26))
        assert broker.place_of(infer) == (41, pytest.approx(25))
        with pytest.raises(QueueFull):
            broker.infer_nowait("row0", within(24))
        with pytest.raises(QueueFull):
            broker.infer_nowait("row0", within(26))  # behind the other who named it
        infer.cancel()
        nursery.cancel_scope.cancel()


async def test_where_nothing_is_measured_nobody_is_refused_for_an_estimate(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", **ONE_SLOT)]),
        trio.open_nursery() as nursery,
    ):
        await start_calls(nursery, broker, 50)
        broker.infer_nowait("qwen", within(0.5)).cancel()
        nursery.cancel_scope.cancel()


async def test_one_key_may_have_so_many_waiting_and_another_as_many(autojump_clock):
    config = BrokerConfig(max_waiting_per_key=3)
    async with (
        open_test_broker(config) as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", **ONE_SLOT)]) as box,
    ):
        callers = [broker.authenticate((await broker.create_key("client")).secret) for _ in range(2)]
        one, other = callers
        infers = [broker.infer_nowait("qwen", CALL, claim=broker.claim(one)) for _ in range(4)]
        with pytest.raises(QueueFull):
            with broker.claim(one) as claim:
                broker.infer_nowait("qwen", CALL, claim=claim)
        assert (one.in_flight, one.waiting) == (4, 3), "what is refused counts for nothing"
        infers += [broker.infer_nowait("qwen", CALL, claim=broker.claim(other)) for _ in range(3)]
        infers[1].cancel()
        infers += [broker.infer_nowait("qwen", CALL, claim=broker.claim(one))]
        await box.answer(await box.next("infer"), b"x")
        for infer in infers:
            infer.cancel()
        assert [(caller.in_flight, caller.waiting) for caller in callers] == [(0, 0), (0, 0)]


# The place in the line ----------------------------------------------------------------------------------------------


async def test_everybody_can_be_told_his_place_and_about_how_long_it_takes(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", **ONE_SLOT)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        infers = [broker.infer_nowait("qwen", CALL) for _ in range(4)]
        assert [broker.place_of(infer) for infer in infers] == [None, (1, None), (2, None), (3, None)]
        frame = await publisher.next("infer")
        await trio.sleep(4)
        await publisher.answer(frame, b"x")
        assert [broker.place_of(infer) for infer in infers] == [None, None, (1, 4), (2, 8)]
        views = {task.task_id: task for task in broker.task_views()}
        assert [(views[infer.task_id].position, views[infer.task_id].estimate_s) for infer in infers[1:]] == [
            (None, None),
            (1, 4),
            (2, 8),
        ]
        assert [views[infer.task_id].state for infer in infers[1:]] == ["sent", "queued", "queued"]
        infers[2].cancel()
        assert broker.place_of(infers[3]) == (1, 4)
        for infer in infers:
            infer.cancel()
        nursery.cancel_scope.cancel()


async def test_in_a_pool_the_estimate_is_of_all_its_rows(autojump_clock):
    rows = [LLMSpec(name, pool="chat", **ONE_SLOT) for name in "ab"]
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", rows) as publisher,
        trio.open_nursery() as nursery,
    ):
        for name in "ab":
            await measure(nursery, broker, publisher, 6, name)
        infers = [broker.infer_nowait("chat", CALL) for _ in range(4)]
        named = broker.infer_nowait("a", CALL)
        assert [broker.place_of(infer) for infer in infers[2:]] == [(1, 3), (2, 6)]
        assert broker.place_of(named) == (3, 12), "one of the two before him goes to the other row"
        assert [task.llm for task in broker.task_views() if task.position] == ["chat", "chat", "a"]
        for infer in (*infers, named):
            infer.cancel()
        nursery.cancel_scope.cancel()


# Budgets ------------------------------------------------------------------------------------------------------------


async def ended_at(call, began, phase):
    await call.over.wait()
    assert (call.code, call.error.phase) == ("deadline_exceeded", phase)
    return pytest.approx(call.over_at - began)


async def test_a_rows_budget_for_the_queue(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", queue_s=7, **ONE_SLOT)]),
        trio.open_nursery() as nursery,
    ):
        began = trio.current_time()
        _, waits = await start_calls(nursery, broker, 2)
        assert await ended_at(waits, began, "queue") == 7
        nursery.cancel_scope.cancel()


async def test_a_pools_queue_has_the_longest_of_its_rows_budgets(autojump_clock):
    rows = [LLMSpec("a", pool="chat", queue_s=7, **ONE_SLOT), LLMSpec("b", pool="chat", queue_s=90, **ONE_SLOT)]
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", rows) as publisher,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(beat, publisher)
        began = trio.current_time()
        calls = await start_calls(nursery, broker, 3, "chat")
        assert await ended_at(calls[2], began, "queue") == 90
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("budget_s", [3.0, 400.0])
async def test_a_rows_budget_for_the_first_byte(autojump_clock, budget_s):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", first_byte_s=budget_s)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(beat, publisher)
        began = trio.current_time()
        call = start_call(nursery, broker, request=STREAM)
        assert await ended_at(call, began, "first_byte") == budget_s
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("budget_s", [3.0, 90.0, 400.0])
async def test_a_rows_budget_for_a_pause(autojump_clock, budget_s):
    """Shorter or longer than what the broker looks at by itself."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", idle_s=budget_s)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(beat, publisher)
        call = start_call(nursery, broker, request=STREAM)
        upload = publisher.upload(await publisher.next("infer"))
        await upload.send(b"x")
        for _ in range(3):
            await trio.sleep(budget_s * 0.9)
            await upload.send(b"x")
        began = trio.current_time()
        assert await ended_at(call, began, "idle") == budget_s
        nursery.cancel_scope.cancel()


async def test_who_has_waited_for_a_pool_has_the_whole_budget_of_the_row_that_takes_him(autojump_clock):
    rows = [LLMSpec("a", pool="chat", total_s=20, **ONE_SLOT), LLMSpec("b", pool="chat", **ONE_SLOT)]
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", rows) as publisher,
        trio.open_nursery() as nursery,
    ):
        calls = await start_calls(nursery, broker, 2, "chat")
        frames = {frame.data["llm"]: frame for frame in [await publisher.next("infer") for _ in range(2)]}
        assert (frames["a"].data["deadline_s"], frames["b"].data["deadline_s"]) == (20, 3600)
        calls += await start_calls(nursery, broker, 2, "chat")
        await trio.sleep(15)
        await publisher.answer(frames["a"], b"x")
        frame = await publisher.next("infer")
        assert frame.data["deadline_s"] == 20
        await trio.sleep(15)
        await publisher.answer(frame, b"x")
        assert (await publisher.next("infer")).data["deadline_s"] == 20, "though he came 30 s ago"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("budget_s", [9.0, 5000.0])
async def test_a_rows_budget_in_all(autojump_clock, budget_s):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", total_s=budget_s)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(beat, publisher)
        began = trio.current_time()
        call = start_call(nursery, broker)
        assert (await publisher.next("infer")).data["deadline_s"] == budget_s
        assert await ended_at(call, began, "total") == budget_s
        nursery.cancel_scope.cancel()


async def test_a_callers_own_time_lowers_what_he_has_and_raises_nothing(autojump_clock):
    async with (
        open_test_broker(BrokerConfig(total_s=100)) as broker,
        FakePublisher(broker, "laptop", ["qwen"]) as publisher,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(beat, publisher)
        for seconds, left in ((5, 5), (99.5, 99.5), (1000, 100)):
            began = trio.current_time()
            call = start_call(nursery, broker, request=within(seconds))
            assert (await publisher.next("infer")).data["deadline_s"] == left
            assert await ended_at(call, began, "total") == left
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("where", "phase"),
    [("queue", "queue"), ("wake", "wake"), ("first byte", "first_byte"), ("answer", "total"), ("plain", "total")],
)
async def test_a_callers_own_time_names_the_phase_that_has_spent_it(autojump_clock, where, phase):
    status = HIBERNATING if where == "wake" else ACTIVE
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", status=status, **ONE_SLOT)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        if where == "queue":
            await start_calls(nursery, broker, 1)
        began = trio.current_time()
        call = start_call(nursery, broker, request=within(8, stream=where != "plain"))
        if where == "answer":
            await publisher.upload(await publisher.next("infer")).send(b"data: 1\n\n")
        assert await ended_at(call, began, phase) == 8
        nursery.cancel_scope.cancel()


# Waking while some wait ---------------------------------------------------------------------------------------------

POOL = [LLMSpec("awake", pool="chat", **ONE_SLOT)]


def sleeper(name="sleeper", **more):
    return LLMSpec(name, pool="chat", status=HIBERNATING, **ONE_SLOT, **more)


@pytest.mark.parametrize(("service_s", "is_woken"), [(5, False), (15, True)])
async def test_a_sleeping_member_is_woken_when_that_is_quicker_than_to_wait(autojump_clock, service_s, is_woken):
    """A wake that has not been seen is taken for a quarter of what it may last: 10 s."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", POOL) as one,
        FakePublisher(broker, "two", [sleeper(wake_s=40)]) as two,
        trio.open_nursery() as nursery,
    ):
        await measure(nursery, broker, one, service_s, "awake")
        await start_calls(nursery, broker, 2, "chat")
        assert len(two.events("wake")) == is_woken
        await start_calls(nursery, broker, 1, "chat")
        assert len(two.events("wake")) == is_woken, "10 s: as long as waiting for two of 5"
        await start_calls(nursery, broker, 1, "chat")
        assert len(two.events("wake")) == 1
        nursery.cancel_scope.cancel()


async def test_whoever_has_a_slot_first_takes_it_and_the_wake_then_simply_counts(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", POOL) as one,
        FakePublisher(broker, "two", [sleeper(wake_s=40)]) as two,
        trio.open_nursery() as nursery,
    ):
        await measure(nursery, broker, one, 15, "awake")
        first, second = await start_calls(nursery, broker, 2, "chat")
        wake = await two.next("wake")
        await one.answer(await one.next("infer"), b"1")
        await one.answer(await one.next("infer"), b"2")
        for call in (first, second):
            await call.over.wait()
        assert second.body == b"2"
        assert two.events("cancel") == [], "the machine is booting already"
        await two.answer(wake)
        assert broker.llm("sleeper").status is ACTIVE
        assert (two.events("infer"), broker.statistics().wakes_succeeded) == ([], 1)


async def test_the_woken_one_takes_who_waits_while_the_other_is_still_at_work(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", POOL) as one,
        FakePublisher(broker, "two", [sleeper(wake_s=40)]) as two,
        trio.open_nursery() as nursery,
    ):
        await measure(nursery, broker, one, 15, "awake")
        _, second = await start_calls(nursery, broker, 2, "chat")
        await two.answer(await two.next("wake"))
        await two.answer(await two.next("infer"), b"2")
        await second.over.wait()
        assert second.body == b"2"
        nursery.cancel_scope.cancel()


async def test_whoever_comes_while_one_wakes_is_not_refused_for_an_estimate_without_it(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", POOL) as one,
        FakePublisher(broker, "two", [sleeper(wake_s=20)]),
        trio.open_nursery() as nursery,
    ):
        await measure(nursery, broker, one, 25, "awake")
        await start_calls(nursery, broker, 10, "chat")
        assert broker.pool_views()[0].waiting == 9
        nursery.cancel_scope.cancel()


async def test_a_failed_wake_tries_the_next_and_fails_only_who_has_nobody_else(autojump_clock):
    rows = [sleeper("a", wake_s=20), sleeper("b", wake_s=30), sleeper("c", wake_s=40)]
    async with (
        open_test_broker(BrokerConfig(wake_s=600)) as broker,
        FakePublisher(broker, "two", rows) as two,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(beat, two)
        anybody = start_call(nursery, broker, "chat")
        wake = await two.next("wake")
        assert wake.data["llm"] == "a"
        named = start_call(nursery, broker, "a")
        await trio.sleep(15)
        two.fail(wake, "a is broken")
        await named.over.wait()
        assert (named.code, named.error.message) == ("wake_failed", "a is broken")
        # It fails late: by then nothing is held against `a` any more, and it is not woken for him again.
        assert (await two.next("wake")).data["llm"] == "b"
        await trio.sleep(31)
        wake = await two.next("wake")
        assert wake.data["llm"] == "c"
        await trio.sleep(20)
        assert not anybody.over.is_set()
        two.fail(wake, "c is broken")
        await anybody.over.wait()
        assert (anybody.code, anybody.error.message) == ("wake_failed", "c is broken")
        assert [data["llm"] for data in two.events("wake")] == ["a", "b", "c"]
        nursery.cancel_scope.cancel()


async def test_a_wake_that_fails_beside_one_at_work_fails_nobody(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", POOL) as one,
        FakePublisher(broker, "two", [sleeper(wake_s=40)]) as two,
        trio.open_nursery() as nursery,
    ):
        await measure(nursery, broker, one, 15, "awake")
        first, second = await start_calls(nursery, broker, 2, "chat")
        two.fail(await two.next("wake"), "no")
        await wait_all_tasks_blocked()
        assert not second.over.is_set()
        for body in (b"1", b"2"):
            await one.answer(await one.next("infer"), body)
        for call in (first, second):
            await call.over.wait()
        assert (first.body, second.body) == (b"1", b"2")


# A thousand ---------------------------------------------------------------------------------------------------------


async def test_a_thousand_of_one_key_delay_another_by_one_service_at_the_most(autojump_clock):
    service_s = 0.5
    config = BrokerConfig(queue_s=3000, max_waiting_per_llm=2000, heartbeat_timeout_s=1e6)
    async with (
        open_test_broker(config) as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", **ONE_SLOT)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        many, few = [broker.authenticate((await broker.create_key("client")).secret) for _ in range(2)]

        async def serve():
            while True:
                frame = await publisher.next("infer")
                await trio.sleep(service_s)
                await publisher.answer(frame, b"x")

        nursery.start_soon(serve)
        thousand = [broker.infer_nowait("qwen", CALL, claim=broker.claim(many)) for _ in range(1000)]
        waits = []
        for turn in range(20):
            await trio.sleep(0.37 + turn * 0.11)
            began = trio.current_time()
            infer = broker.infer_nowait("qwen", CALL, claim=broker.claim(few))
            while view(broker).waiting and broker.place_of(infer) is not None:
                await trio.sleep(0.01)
            waits.append(trio.current_time() - began)
            await infer.wait_head()
        assert max(waits) <= service_s + 0.011
        assert sum(infer.is_over for infer in thousand) > 50, "and it has not stood still"
        for infer in thousand:
            infer.cancel()
        nursery.cancel_scope.cancel()
