"""Swap groups: rows that share what only one of them can have, and take turns in being awake."""

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.broker.helpers import CALL, codes, start_call, start_calls, statuses, view
from wakecall import BrokerConfig, LLMSpec, Status
from wakecall.testing import FakePublisher, open_test_broker

ACTIVE, HIBERNATING, INACTIVE = Status.ACTIVE, Status.HIBERNATING, Status.INACTIVE


def group_of(awake, *asleep, **more):
    more = {"group": "gpu", "max_concurrency": 1, **more}
    rows = [LLMSpec(awake, status=ACTIVE, **more)] if awake else []
    return [*rows, *(LLMSpec(name, status=HIBERNATING, **more) for name in asleep)]


async def beat(publisher, every=30):
    while True:
        await trio.sleep(every)
        await publisher.heartbeat()


async def engine(publisher, *, wakes_s=5.0, infers_s=1.0):
    """Serve all that comes, as one with a single GPU does: what it answers while another is awake is a fault."""
    awake = {spec.name for spec in publisher.llms if spec.status is ACTIVE}
    at_work = {spec.name: 0 for spec in publisher.llms}

    async def wake(frame):
        name, hibernate = frame.data["llm"], frame.data.get("hibernate", [])
        assert not any(at_work.values()), "nobody may be at work while its model is taken away"
        awake.difference_update(hibernate)
        assert not awake, f"{awake} is awake, and was not to be put to sleep"
        await trio.sleep(wakes_s)
        awake.add(name)
        await publisher.answer(frame)

    async def infer(frame):
        name = frame.data["llm"]
        assert awake == {name}
        at_work[name] += 1
        await trio.sleep(infers_s)
        at_work[name] -= 1
        await publisher.answer(frame, name.encode())

    async def serve(event, run, nursery):
        while True:
            nursery.start_soon(run, await publisher.next(event, within_s=1e6))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, "wake", wake, nursery)
        nursery.start_soon(serve, "infer", infer, nursery)
        nursery.start_soon(beat, publisher)


def wakes(publisher):
    return [(data["llm"], data.get("hibernate", [])) for data in publisher.events("wake")]


async def test_waking_one_puts_the_other_to_sleep(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "box", group_of("a", "b")) as box,
        trio.open_nursery() as nursery,
    ):
        await trio.sleep(30)
        call = start_call(nursery, broker, "b")
        wake = await box.next("wake")
        assert wake.data["hibernate"] == ["a"]
        later = start_call(nursery, broker, "a")
        await wait_all_tasks_blocked()
        assert box.events("infer") == [], "it is about to sleep"
        await box.answer(wake)
        assert statuses(broker) == {"a": HIBERNATING, "b": ACTIVE}
        assert not view(broker, "b").waking
        await box.answer(await box.next("infer"), b"b")
        await call.over.wait()
        assert (call.body, later.over.is_set()) == (b"b", False)
        assert len(box.events("wake")) == 1
        nursery.cancel_scope.cancel()


async def test_a_wake_where_nobody_is_awake_names_nobody(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "box", group_of(None, "a", "b")) as box,
        trio.open_nursery() as nursery,
    ):
        start_call(nursery, broker, "b")
        assert "hibernate" not in (await box.next("wake")).data
        start_call(nursery, broker, "a")
        await wait_all_tasks_blocked()
        assert len(box.events("wake")) == 1, "one at a time"
        nursery.cancel_scope.cancel()


async def test_only_an_idle_one_is_put_to_sleep_and_then_it_takes_no_more(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "box", group_of("a", "b", max_concurrency=2)) as box,
        trio.open_nursery() as nursery,
    ):
        await trio.sleep(40)
        working = start_call(nursery, broker, "a")
        frame = await box.next("infer")
        wants = start_call(nursery, broker, "b")
        await wait_all_tasks_blocked()
        late = start_call(nursery, broker, "a")
        await trio.sleep(20)
        assert (box.events("wake"), len(box.events("infer"))) == ([], 1)
        await box.answer(frame, b"a")
        await working.over.wait()
        assert (await box.next("wake")).data["hibernate"] == ["a"]
        assert not wants.over.is_set()
        assert not late.over.is_set()
        nursery.cancel_scope.cancel()


async def test_a_slot_that_is_still_being_stopped_is_at_work(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "box", group_of("a", "b")) as box,
        trio.open_nursery() as nursery,
    ):
        await trio.sleep(40)
        working = start_call(nursery, broker, "a")
        frame = await box.next("infer")
        start_call(nursery, broker, "b")
        working.leave()
        await trio.sleep(5)
        assert box.events("wake") == []
        broker.confirm_cancelled(frame.data["task_id"])
        await wait_all_tasks_blocked()
        assert wakes(box) == [("b", ["a"])]
        nursery.cancel_scope.cancel()


async def test_one_that_has_just_woken_stays_for_its_residence(autojump_clock):
    async with (
        open_test_broker(BrokerConfig(residence_s=50)) as broker,
        FakePublisher(broker, "box", group_of(None, "a", "b")) as box,
        trio.open_nursery() as nursery,
    ):
        start_call(nursery, broker, "a")
        await box.answer(await box.next("wake"))
        woken = trio.current_time()
        await box.answer(await box.next("infer"), b"a")
        await trio.sleep(10)
        waits = start_call(nursery, broker, "b")
        await trio.sleep(10)
        again = start_call(nursery, broker, "a")
        await box.answer(await box.next("infer"), b"a")
        await again.over.wait()
        assert again.body == b"a", "until then it serves"
        await box.next("wake")  # the first is behind us
        assert trio.current_time() - woken == pytest.approx(50)
        assert wakes(box) == [("a", []), ("b", ["a"])]
        assert not waits.over.is_set()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("how", ["leaves", "deadline", "row withdrawn", "row deleted"])
async def test_one_that_was_to_make_way_goes_on_when_nobody_wants_it_any_more(autojump_clock, how):
    async with (
        open_test_broker(BrokerConfig(queue_s=20)) as broker,
        FakePublisher(broker, "box", group_of("a", "b", max_concurrency=2)) as box,
        trio.open_nursery() as nursery,
    ):
        await trio.sleep(40)
        start_call(nursery, broker, "a")
        await box.next("infer")
        wants = start_call(nursery, broker, "b")
        await wait_all_tasks_blocked()
        waits = start_call(nursery, broker, "a")
        await trio.sleep(1)
        assert len(box.events("infer")) == 1
        match how:
            case "leaves":
                wants.leave()
            case "row withdrawn":
                await box.register(group_of("a", max_concurrency=2))
            case "row deleted":
                await broker.delete_llm("b")
        frame = await box.next("infer", within_s=20)
        await box.answer(frame, b"a")
        await waits.over.wait()
        assert (waits.body, box.events("wake")) == (b"a", [])
        nursery.cancel_scope.cancel()


async def test_a_row_that_leaves_its_group_makes_way_for_nobody(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "box", group_of("a", "b", max_concurrency=2)) as box,
        trio.open_nursery() as nursery,
    ):
        await trio.sleep(40)
        start_call(nursery, broker, "a")
        await box.next("infer")
        start_call(nursery, broker, "b")
        await wait_all_tasks_blocked()
        waits = start_call(nursery, broker, "a")
        await wait_all_tasks_blocked()
        await box.register([LLMSpec("a", max_concurrency=2), *group_of(None, "b")])
        await box.answer(await box.next("infer"), b"a")
        await waits.over.wait()
        assert (await box.next("wake")).data.get("hibernate") is None
        nursery.cancel_scope.cancel()


async def test_of_three_the_longest_waiting_is_next(autojump_clock):
    async with (
        open_test_broker(BrokerConfig(queue_s=600)) as broker,
        FakePublisher(broker, "box", group_of("a", "b", "c")) as box,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(engine, box)
        await trio.sleep(1)
        calls = []
        for name in ("c", "b", "a", "c"):
            calls.append(start_call(nursery, broker, name))
            await trio.sleep(1)
        for call in calls:
            await call.over.wait()
        assert codes(calls) == {None}
        # Both calls of `c` are served in its one turn.
        assert wakes(box) == [("c", ["a"]), ("b", ["c"]), ("a", ["b"])]
        nursery.cancel_scope.cancel()


async def test_all_three_are_served_in_turn_however_busy_one_is(autojump_clock):
    async with (
        open_test_broker(BrokerConfig(queue_s=600)) as broker,
        FakePublisher(broker, "box", group_of("a", "b", "c")) as box,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(engine, box)

        async def caller(name):
            while True:
                call = start_call(nursery, broker, name)
                await call.over.wait()
                assert call.code is None

        for name in "aaabc":
            nursery.start_soon(caller, name)
        await trio.sleep(600)
        order = "".join(name for name, _ in wakes(box))
        assert all(len(set(order[start : start + 3])) == 3 for start in range(len(order) - 2)), order
        assert len(order) >= 12
        nursery.cancel_scope.cancel()


async def test_two_callers_cannot_make_it_thrash(autojump_clock):
    """In an hour of calls for both by turns, none of it spent waiting for the other to be done."""
    config = BrokerConfig(residence_s=60, queue_s=600, total_s=7200)
    async with (
        open_test_broker(config) as broker,
        FakePublisher(broker, "box", group_of("a", "b")) as box,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(engine, box)
        served = {"a": 0, "b": 0}

        async def caller(name):
            while True:
                call = start_call(nursery, broker, name)
                await call.over.wait()
                assert call.code is None
                served[name] += 1

        for name in "ab":
            nursery.start_soon(caller, name)
        await trio.sleep(3600)
        # A turn is a residence, an infer and a wake: 60 + 1 + 5 s.
        assert 50 <= len(box.events("wake")) <= 60
        assert min(served.values()) > 1500
        nursery.cancel_scope.cancel()


async def test_a_wake_that_fails_fails_its_waiters_and_the_next_has_its_turn(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "box", group_of("a", "b", "c")) as box,
        trio.open_nursery() as nursery,
    ):
        await trio.sleep(40)
        b = start_call(nursery, broker, "b")
        wake = await box.next("wake")
        c = start_call(nursery, broker, "c")
        await wait_all_tasks_blocked()
        box.fail(wake, "out of memory")
        await b.over.wait()
        assert (b.code, b.error.message) == ("wake_failed", "out of memory")
        # Taken for asleep: if it is awake all the same, waking it is nothing.
        assert statuses(broker) == {"a": HIBERNATING, "b": HIBERNATING, "c": HIBERNATING}
        await box.answer(await box.next("wake"))
        await box.answer(await box.next("infer"), b"c")
        await c.over.wait()
        assert c.body == b"c"
        assert wakes(box) == [("b", ["a"]), ("c", [])]


async def test_a_wake_outlives_its_waiters_and_its_row_may_have_its_residence(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "box", group_of("a", "b")) as box,
        trio.open_nursery() as nursery,
    ):
        await trio.sleep(40)
        b = start_call(nursery, broker, "b")
        wake = await box.next("wake")
        b.leave()
        a = start_call(nursery, broker, "a")
        await trio.sleep(5)
        await box.answer(wake)
        assert statuses(broker) == {"a": HIBERNATING, "b": ACTIVE}
        began = trio.current_time()
        await box.answer(await box.next("wake"))
        assert trio.current_time() - began == pytest.approx(30)
        await box.answer(await box.next("infer"), b"a")
        await a.over.wait()
        assert wakes(box) == [("b", ["a"]), ("a", ["b"])]


async def test_who_was_to_make_way_goes_on_when_nobody_wants_it_after_a_change_of_channels(autojump_clock):
    """Whoever wanted it left between two channels, when nobody's turn can come."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "box", group_of("a", "b", max_concurrency=2)) as box,
        trio.open_nursery() as nursery,
    ):
        await trio.sleep(40)
        start_call(nursery, broker, "a")
        await box.next("infer")
        wants = broker.infer_nowait("b", CALL)
        broker.open_channel_nowait("box")  # its predecessor has ended and is not joined yet
        wants.cancel()
        await box.connect()
        call = start_call(nursery, broker, "a")
        await wait_all_tasks_blocked()
        await box.answer((await box.next("infer")), b"a")
        await call.over.wait()
        assert (call.body, box.events("wake")) == (b"a", [])
        nursery.cancel_scope.cancel()


async def test_a_channel_that_dies_in_the_middle_of_a_swap(autojump_clock):
    """Both are lost; the wake's waiters fail, and those of the other; it comes back as what it says."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "box", group_of("a", "b")) as box,
        trio.open_nursery() as nursery,
    ):
        await trio.sleep(40)
        calls = [start_call(nursery, broker, "b")]
        await box.next("wake")
        calls.append(start_call(nursery, broker, "a"))
        await wait_all_tasks_blocked()
        box.disconnect()
        for call in calls:
            await call.over.wait()
        assert [call.code for call in calls] == ["publisher_disconnected", "model_offline"]
        assert statuses(broker) == {"a": INACTIVE, "b": INACTIVE}
        await box.connect()
        await box.heartbeat({"a": HIBERNATING, "b": ACTIVE})
        assert statuses(broker) == {"a": HIBERNATING, "b": ACTIVE}
        call = start_call(nursery, broker, "b")
        await box.answer(await box.next("infer"), b"b")
        await call.over.wait()
        assert call.body == b"b"
        assert len(box.events("wake")) == 1


async def test_a_publisher_may_swap_on_its_own(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "box", group_of("a", "b")) as box,
        trio.open_nursery() as nursery,
    ):
        working = start_call(nursery, broker, "a")
        frame = await box.next("infer")
        waits = start_call(nursery, broker, "b")
        await trio.sleep(10)
        await box.heartbeat({"a": HIBERNATING, "b": ACTIVE})
        await box.answer(await box.next("infer"), b"b")
        await waits.over.wait()
        assert (waits.body, box.events("wake")) == (b"b", [])
        await box.answer(frame, b"a")
        await working.over.wait()
        assert working.body == b"a", "what it had been sent goes on"
        await box.heartbeat({"b": HIBERNATING})
        start_call(nursery, broker, "a")
        assert (await box.next("wake", within_s=1)).data.get("hibernate") is None, "nobody is awake, so nobody resides"
        nursery.cancel_scope.cancel()


async def test_groups_of_two_sessions_have_nothing_to_do_with_each_other(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "box", group_of("a")),
        FakePublisher(broker, "case", group_of(None, "b")) as case,
        trio.open_nursery() as nursery,
    ):
        start_call(nursery, broker, "b")
        assert (await case.next("wake", within_s=1)).data.get("hibernate") is None
        nursery.cancel_scope.cancel()


async def test_a_pools_sleeping_member_has_its_turn_when_its_group_lets_it(autojump_clock):
    """While callers queue at the busy member the sleeping one is wanted; its sibling makes way when it may."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "box", group_of("other", "a")) as box,
        FakePublisher(broker, "laptop", [LLMSpec("b", pool="chat", max_concurrency=1)]) as laptop,
        trio.open_nursery() as nursery,
    ):
        await box.register([*group_of("other"), *group_of(None, "a", pool="chat")])
        first = start_call(nursery, broker, "chat")
        frame = await laptop.next("infer")
        await trio.sleep(60)
        await laptop.heartbeat()
        await box.heartbeat()
        await laptop.answer(frame, b"slow")
        await first.over.wait()
        # Measured: a minute. A wake is taken for half of one.
        calls = await start_calls(nursery, broker, 2, "chat")
        await laptop.next("infer")
        wake = await box.next("wake", within_s=1)
        assert wake.data["hibernate"] == ["other"]
        await box.answer(wake)
        await box.answer(await box.next("infer"), b"a")
        await calls[1].over.wait()
        assert calls[1].body == b"a"
        nursery.cancel_scope.cancel()


async def test_one_that_was_to_make_way_goes_on_when_others_have_served_who_wanted_it(autojump_clock):
    """It has a slot free, and an answer of its own that may take an hour is no reason to keep that."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "box", group_of("other", max_concurrency=2)) as box,
        FakePublisher(broker, "laptop", [LLMSpec("b", pool="chat", max_concurrency=1)]) as laptop,
        trio.open_nursery() as nursery,
    ):
        await box.register([*group_of("other", max_concurrency=2), *group_of(None, "a", pool="chat")])
        start_call(nursery, broker, "other")
        await box.next("infer")
        first = start_call(nursery, broker, "chat")
        frame = await laptop.next("infer")
        await trio.sleep(60)
        await laptop.heartbeat()
        await box.heartbeat()
        await laptop.answer(frame, b"slow")
        await first.over.wait()
        await start_calls(nursery, broker, 2, "chat")
        frame = await laptop.next("infer")
        waits = start_call(nursery, broker, "other")
        await wait_all_tasks_blocked()
        assert len(box.events("infer")) == 1  # it is to make way for `a`
        await laptop.answer(frame, b"b")
        await laptop.next("infer")
        await box.answer(await box.next("infer", within_s=1), b"other")
        await waits.over.wait()
        assert (waits.body, box.events("wake")) == (b"other", [])
        nursery.cancel_scope.cancel()


async def test_a_refused_infer_that_moves_on_lets_the_group_swap(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "box", [*group_of("a", pool="chat"), *group_of(None, "b")]) as box,
        FakePublisher(broker, "laptop", [LLMSpec("c", pool="chat", max_concurrency=1)]) as laptop,
        trio.open_nursery() as nursery,
    ):
        await trio.sleep(40)
        await start_calls(nursery, broker, 2, "chat")
        frame = await box.next("infer")
        await laptop.next("infer")
        start_call(nursery, broker, "b")
        await wait_all_tasks_blocked()
        assert box.events("wake") == []
        await box.answer(frame, b"busy", status=503)
        await wait_all_tasks_blocked()
        assert wakes(box) == [("b", ["a"])]
        nursery.cancel_scope.cancel()


async def test_two_infers_of_one_sleeping_row_make_one_wake(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "box", group_of(None, "a", "b", max_concurrency=5)) as box,
        trio.open_nursery() as nursery,
    ):
        infers = [broker.infer_nowait("a", CALL) for _ in range(5)]
        await box.answer(await box.next("wake"))
        for _ in infers:
            await box.answer(await box.next("infer"), b"x")
        assert all(infer.is_over and infer.error is None for infer in infers)
        assert len(box.events("wake")) == 1
        nursery.cancel_scope.cancel()
