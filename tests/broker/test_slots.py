"""Slots of infers that are over: taken until the engine has stopped, as far as that can be known."""

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.broker.helpers import CALL, STREAM, observe, start_call, start_calls, view
from wakecall import BrokerConfig, LLMSpec, Status
from wakecall.errors import TaskAlreadySettled, TaskCancelled, TaskNotFound
from wakecall.models import SlotReleased
from wakecall.testing import FakePublisher, open_test_broker

ONE_SLOT = [LLMSpec("qwen", max_concurrency=1)]
DRAINS = [LLMSpec("qwen", max_concurrency=1, cancel="drain")]


def released(events):
    return [(event.how, event.seconds) for event in events if isinstance(event, SlotReleased)]


async def leave_one(nursery, broker, publisher):
    """One call that was sent and left, and one that waits for its slot."""
    first, second = await start_calls(nursery, broker, 2)
    frame = await publisher.next("infer")
    first.leave()
    await first.over.wait()
    assert (view(broker).in_flight, view(broker).stopping, view(broker).waiting) == (0, 1, 1)
    return frame.data["task_id"], second


async def is_sent(publisher, number=2):
    await wait_all_tasks_blocked()
    return len(publisher.events("infer")) == number


async def test_a_confirmation_frees_it_and_the_next_goes_exactly_then(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ONE_SLOT) as publisher,
        trio.open_nursery() as nursery,
    ):
        events = observe(broker)
        task_id, _ = await leave_one(nursery, broker, publisher)
        await trio.sleep(3)
        assert not await is_sent(publisher)
        broker.confirm_cancelled(task_id)
        assert (view(broker).in_flight, view(broker).stopping) == (1, 0)
        assert await is_sent(publisher)
        assert released(events) == [("confirmed", 3)]
        broker.confirm_cancelled(task_id)  # idempotent
        await trio.sleep(200)
        await publisher.heartbeat()
        broker.confirm_cancelled(task_id)
        assert released(events) == [("confirmed", 3)]
        assert publisher.events("cancel") == [{"task_id": task_id, "reason": "client_disconnected"}]
        nursery.cancel_scope.cancel()


async def test_without_a_word_it_is_free_after_the_lease(autojump_clock):
    async with (
        open_test_broker(BrokerConfig(cancel_lease_s=7)) as broker,
        FakePublisher(broker, "laptop", ONE_SLOT) as publisher,
        trio.open_nursery() as nursery,
    ):
        events = observe(broker)
        task_id, _ = await leave_one(nursery, broker, publisher)
        began = trio.current_time()
        await publisher.next("infer")
        assert trio.current_time() - began == pytest.approx(7)
        assert released(events) == [("expired", pytest.approx(7))]
        broker.confirm_cancelled(task_id)  # late, and nothing
        assert view(broker).in_flight == 1
        nursery.cancel_scope.cancel()


async def test_a_heartbeat_that_does_not_list_it_frees_it_once_the_publisher_knows(autojump_clock):
    """Before its answer was 410 it may just not have heard."""
    async with (
        open_test_broker(BrokerConfig(cancel_lease_s=1000)) as broker,
        FakePublisher(broker, "laptop", ONE_SLOT) as publisher,
        trio.open_nursery() as nursery,
    ):
        events = observe(broker)
        task_id, _ = await leave_one(nursery, broker, publisher)
        await publisher.heartbeat()
        assert not await is_sent(publisher)
        with pytest.raises(TaskCancelled):
            await broker.complete(task_id, b"late")
        assert not await is_sent(publisher), "the answer says that it had not heard: its engine may be at work"
        assert (await publisher.heartbeat(tasks=[task_id])).drop == (task_id,)
        assert not await is_sent(publisher)
        await trio.sleep(5)
        await publisher.heartbeat()
        assert await is_sent(publisher)
        assert released(events) == [("reported", 5)]
        nursery.cancel_scope.cancel()


async def test_another_sessions_heartbeat_frees_nothing(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ONE_SLOT) as publisher,
        FakePublisher(broker, "other", ["phi"]) as other,
        trio.open_nursery() as nursery,
    ):
        task_id, _ = await leave_one(nursery, broker, publisher)
        with pytest.raises(TaskCancelled):
            await broker.complete(task_id, b"late")
        await other.heartbeat()
        assert not await is_sent(publisher)
        nursery.cancel_scope.cancel()


async def test_one_that_drains_holds_its_slot_until_its_engine_is_done(autojump_clock):
    config = BrokerConfig(cancel_lease_s=5, total_s=100, queue_s=200, heartbeat_timeout_s=1000)
    async with (
        open_test_broker(config) as broker,
        FakePublisher(broker, "laptop", DRAINS) as publisher,
        trio.open_nursery() as nursery,
    ):
        events = observe(broker)
        await trio.sleep(1)
        began = trio.current_time()
        task_id, _ = await leave_one(nursery, broker, publisher)
        await trio.sleep(50)
        assert not await is_sent(publisher), "no lease: nobody stops it"
        broker.confirm_cancelled(task_id)
        assert await is_sent(publisher)
        first, second = publisher.events("infer")
        assert first["task_id"] == task_id
        with pytest.raises(TaskCancelled):
            await broker.complete(task_id, b"done")
        await trio.sleep(49)
        assert view(broker).in_flight == 1
        await trio.sleep(2)  # the second has run out of its time: it drains, and as long as it may take at the most
        assert (view(broker).in_flight, view(broker).stopping) == (0, 1)
        await trio.sleep(5)
        assert view(broker).stopping == 0
        assert released(events) == [("confirmed", 50), ("expired", pytest.approx(5))]
        assert second["task_id"] != task_id
        assert trio.current_time() - began < 110
        nursery.cancel_scope.cancel()


async def test_one_that_drains_for_longer_than_outcomes_are_remembered_is_still_told(autojump_clock):
    """Else its slot would stay taken for the whole time of an infer that is long over."""
    async with (
        open_test_broker(BrokerConfig(settled_memory_s=10, heartbeat_timeout_s=1000)) as broker,
        FakePublisher(broker, "laptop", DRAINS) as publisher,
        trio.open_nursery() as nursery,
    ):
        events = observe(broker)
        task_id, _ = await leave_one(nursery, broker, publisher)
        await trio.sleep(20)
        with pytest.raises(TaskNotFound):
            await broker.complete(task_id, b"theirs", owner="stranger")
        await publisher.heartbeat()
        assert view(broker).stopping == 1
        with pytest.raises(TaskCancelled):
            await broker.complete(task_id, b"done")
        await publisher.heartbeat()
        assert await is_sent(publisher)
        assert released(events) == [("reported", 20)]
        nursery.cancel_scope.cancel()


async def test_one_that_drains_holds_it_no_longer_than_its_total(autojump_clock):
    async with (
        open_test_broker(BrokerConfig(total_s=100, queue_s=200, heartbeat_timeout_s=1000)) as broker,
        FakePublisher(broker, "laptop", DRAINS) as publisher,
        trio.open_nursery() as nursery,
    ):
        began = trio.current_time()
        first = start_call(nursery, broker)
        await publisher.next("infer")
        await trio.sleep(30)
        first.leave()
        start_call(nursery, broker)
        await publisher.next("infer")
        assert trio.current_time() - began == pytest.approx(100)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("how", ["channel", "superseded", "goodbye", "evicted", "deleted", "handed over"])
async def test_with_its_publisher_gone_nobody_works_in_it(autojump_clock, how):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ONE_SLOT) as publisher,
        trio.open_nursery() as nursery,
    ):
        events = observe(broker)
        task_id, waits = await leave_one(nursery, broker, publisher)
        await trio.sleep(1)
        match how:
            case "channel":
                publisher.disconnect()
            case "superseded":
                await publisher.connect()
            case "goodbye":
                await publisher.goodbye()
            case "evicted":
                await broker.evict("laptop")
            case "deleted":
                await broker.delete_llm("qwen")
            case "handed over":
                await broker.hand_over_llm("qwen", "ben")
        assert released(events) == [("lost", 1)]
        assert broker._directory.held_slots == {}
        await wait_all_tasks_blocked()
        if how == "superseded":
            assert await is_sent(publisher)
            await publisher.answer(await publisher.next("infer"), b"x")
            await waits.over.wait()
            assert waits.body == b"x"
        else:
            assert waits.code == "model_offline"
        if how not in ("goodbye", "evicted"):
            broker.confirm_cancelled(task_id)  # still remembered, and nothing
        else:
            with pytest.raises(TaskNotFound):
                broker.confirm_cancelled(task_id)
        assert len(released(events)) == 1


async def test_a_withdrawn_row_keeps_it_and_has_it_when_it_is_back(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ONE_SLOT) as publisher,
        trio.open_nursery() as nursery,
    ):
        task_id, waits = await leave_one(nursery, broker, publisher)
        await publisher.register([])
        await waits.over.wait()
        await publisher.register(ONE_SLOT)
        again = start_call(nursery, broker)
        assert not await is_sent(publisher)
        broker.confirm_cancelled(task_id)
        assert await is_sent(publisher)
        again.leave()
        nursery.cancel_scope.cancel()


async def test_only_the_owner_can_confirm(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ONE_SLOT, owner="anna") as publisher,
        trio.open_nursery() as nursery,
    ):
        task_id, _ = await leave_one(nursery, broker, publisher)
        for owner in ("ben", "local"):
            with pytest.raises(TaskNotFound):
                broker.confirm_cancelled(task_id, owner=owner)
        assert not await is_sent(publisher)
        with pytest.raises(TaskNotFound):
            broker.confirm_cancelled("nothing", owner="anna")
        broker.confirm_cancelled(task_id, owner="anna")
        with pytest.raises(TaskNotFound):
            broker.confirm_cancelled(task_id, owner="ben")
        assert await is_sent(publisher)
        nursery.cancel_scope.cancel()


async def test_after_five_minutes_it_is_unknown(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ["qwen"]) as publisher,
        trio.open_nursery() as nursery,
    ):
        call = start_call(nursery, broker)
        task_id = (await publisher.next("infer")).data["task_id"]
        call.leave()
        for _ in range(5):
            await trio.sleep(59)
            await publisher.heartbeat()
        broker.confirm_cancelled(task_id)
        await trio.sleep(6)
        with pytest.raises(TaskNotFound):
            broker.confirm_cancelled(task_id)


async def test_to_say_so_of_one_that_goes_on_is_a_failure(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ONE_SLOT) as publisher,
        trio.open_nursery() as nursery,
    ):
        call = start_call(nursery, broker)
        frame = await publisher.next("infer")
        broker.confirm_cancelled(frame.data["task_id"])
        await call.over.wait()
        assert call.code == "publisher_error"
        assert (view(broker).in_flight, view(broker).stopping) == (0, 0)
        with pytest.raises(TaskAlreadySettled):
            await publisher.answer(frame)


@pytest.mark.parametrize("how", ["completed", "failed", "broken off", "untaken", "waiting"])
async def test_no_slot_is_held_where_nothing_can_be_at_work(autojump_clock, how):
    async with open_test_broker() as broker, trio.open_nursery() as nursery:
        await broker.register("laptop", ONE_SLOT)
        async with broker.open_channel("laptop") as channel:
            await channel.receive()
            infer = broker.infer_nowait("qwen", STREAM)
            if how == "waiting":
                other = broker.infer_nowait("qwen", CALL)
                other.cancel()
            if how not in ("untaken", "waiting"):
                await channel.receive()
                match how:
                    case "completed":
                        await broker.complete(infer.task_id, b"x")
                    case "failed":
                        broker.fail(infer.task_id, "no")
                    case "broken off":
                        with broker.open_upload(infer.task_id):
                            pass
            assert view(broker).stopping == 0
            infer.cancel()
            assert view(broker).stopping == 0
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("how", ["first byte", "total", "stall"])
async def test_whoever_ends_it_but_the_publisher_the_slot_is_held(autojump_clock, how):
    config = BrokerConfig(first_byte_s=20, total_s=30, peer_stall_s=10, reply_buffer_bytes=4)
    async with (
        open_test_broker(config) as broker,
        FakePublisher(broker, "laptop", ONE_SLOT) as publisher,
        trio.open_nursery() as nursery,
    ):
        events = observe(broker)
        request = STREAM if how == "first byte" else CALL
        call = start_call(nursery, broker, request=request, reads=how != "stall")
        frame = await publisher.next("infer")
        upload = publisher.upload(frame) if how == "stall" else None
        if upload is not None:
            await upload.send(b"12345")
        await publisher.next("cancel")
        assert view(broker).stopping == 1
        await trio.sleep(10.5)
        assert view(broker).stopping == 0
        assert released(events) == [("expired", pytest.approx(10))]
        call.leave()
        await call.over.wait()


async def test_held_slots_of_a_session_are_bounded(autojump_clock):
    config = BrokerConfig(max_settled_per_session=5)
    async with (
        open_test_broker(config) as broker,
        FakePublisher(broker, "laptop", ["qwen"]) as publisher,
        trio.open_nursery() as nursery,
    ):
        calls = await start_calls(nursery, broker, 8)
        for call in calls:
            call.leave()
        await wait_all_tasks_blocked()
        assert (view(broker).stopping, len(broker._directory.held_slots)) == (5, 5)
        await trio.sleep(10.5)
        assert (view(broker).stopping, len(publisher.events("cancel"))) == (0, 8)


async def test_in_a_pool_the_held_slot_is_not_the_others(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", [LLMSpec("a", pool="chat", max_concurrency=1)]) as one,
        FakePublisher(broker, "two", [LLMSpec("b", pool="chat", max_concurrency=1)]) as two,
        trio.open_nursery() as nursery,
    ):
        call = start_call(nursery, broker, "a")
        await one.next("infer")
        call.leave()
        await wait_all_tasks_blocked()
        start_call(nursery, broker, "chat")
        await two.next("infer", within_s=1)
        start_call(nursery, broker, "chat")
        await wait_all_tasks_blocked()
        assert len(one.events("infer")) == 1
        await one.heartbeat({"a": Status.ACTIVE})
        nursery.cancel_scope.cancel()
