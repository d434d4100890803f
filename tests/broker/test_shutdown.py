"""Draining and closing: no new infers, a grace for what is under way, then everybody is told."""

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.broker.helpers import CALL, start_call, start_calls, statuses, view
from wakecall import BrokerConfig, LLMSpec, Status, open_broker
from wakecall.errors import ShuttingDown, StoreUnavailable
from wakecall.testing import FakePublisher, check_invariants, open_test_broker

ROWS = [LLMSpec("qwen", max_concurrency=1), LLMSpec("phi", status=Status.HIBERNATING)]


async def test_what_ends_in_the_grace_ends_well(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ROWS) as publisher,
        trio.open_nursery() as nursery,
    ):
        calls = await start_calls(nursery, broker, 2)
        began = trio.current_time()
        nursery.start_soon(broker.drain, 10)
        await wait_all_tasks_blocked()
        assert broker.stopping
        with pytest.raises(ShuttingDown) as caught:
            broker.infer_nowait("qwen", CALL)
        assert (caught.value.status, caught.value.retry_after_s) == (503, 5)
        await trio.sleep(4)
        await publisher.heartbeat()  # publishers are served until the end
        for call in calls:
            await publisher.answer(await publisher.next("infer"), b"x")
            await call.over.wait()
            assert call.body == b"x"
        assert (await publisher.next("bye")).data == {"reason": "shutdown"}
        assert trio.current_time() == began + 4, "nothing was left to wait for"
        assert publisher.events("cancel") == []


async def test_what_outlasts_the_grace_is_cancelled_and_everybody_is_told(autojump_clock):
    async with (
        open_test_broker(BrokerConfig(grace_s=2)) as broker,
        FakePublisher(broker, "laptop", ROWS) as publisher,
        trio.open_nursery() as nursery,
    ):
        calls = [*await start_calls(nursery, broker, 2), start_call(nursery, broker, "phi")]
        began = trio.current_time()
        sent = {(await publisher.next(event)).data["task_id"] for event in ("infer", "wake")}
        await broker.drain()
        assert trio.current_time() == began + 2
        for call in calls:
            await call.over.wait()
            assert (call.code, call.error.status, call.error.retry_after_s) == ("shutting_down", 503, 5)
        # One was sent and may have generated: its caller is told not to repeat it. The others may.
        assert sorted(call.error.should_retry is False for call in calls) == [False, False, True]
        await wait_all_tasks_blocked()
        cancels = publisher.events("cancel")
        assert {cancel["task_id"] for cancel in cancels} == sent
        assert {cancel["reason"] for cancel in cancels} == {"shutdown"}
        assert publisher.frames[-1].data == {"reason": "shutdown"}
        assert statuses(broker) == {"qwen": Status.INACTIVE, "phi": Status.INACTIVE}
        # Lost and not withdrawn: after the restart they come back as what they were.
        assert view(broker, "phi").llm.remembers is Status.HIBERNATING


async def test_an_idle_broker_drains_at_once(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ROWS):
        began = trio.current_time()
        await broker.drain(1000)
        assert trio.current_time() == began
        await broker.drain(1000)


async def test_a_second_drain_may_cut_the_first_ones_grace(autojump_clock):
    """A second signal skips it; and two that wait for the same quiet both notice it."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ROWS) as publisher,
        trio.open_nursery() as nursery,
    ):
        start_call(nursery, broker)
        frame = await publisher.next("infer")
        began = trio.current_time()
        async with trio.open_nursery() as drains:
            drains.start_soon(broker.drain, 1000)
            drains.start_soon(broker.drain, 1000)
            await trio.sleep(1)
            await publisher.answer(frame, b"x")
        assert trio.current_time() == began + 1

    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ROWS) as publisher,
        trio.open_nursery() as nursery,
    ):
        start_call(nursery, broker)
        await publisher.next("infer")
        began = trio.current_time()
        async with trio.open_nursery() as drains:
            drains.start_soon(broker.drain, 1000)
            await trio.sleep(1)
            await broker.drain(0)
        assert trio.current_time() == began + 1


async def test_leaving_the_block_ends_everything_without_a_grace(autojump_clock):
    infers, frames = [], []
    began = trio.current_time()
    async with open_broker() as broker:
        await broker.register("laptop", ROWS)
        async with trio.open_nursery() as nursery:

            async def hold(task_status):
                async with broker.open_channel("laptop") as channel:
                    task_status.started()
                    frames.extend([frame.event async for frame in channel])

            await nursery.start(hold)
            await wait_all_tasks_blocked()
            infers += [broker.infer_nowait(name, CALL) for name in ("qwen", "qwen", "phi")]
            await wait_all_tasks_blocked()  # what nobody has taken would not be sent any more
            broker._end_all()
        assert all(infer.is_over for infer in infers)
    check_invariants(broker)
    assert frames == ["hello", "infer", "wake", "cancel", "cancel", "bye"]
    assert trio.current_time() == began


async def test_a_closed_broker_refuses_and_never_hangs(autojump_clock):
    """Whoever still holds it gets an answer: there is no writer any more that could acknowledge."""
    async with open_broker() as broker:
        await broker.register("laptop", ROWS)
    with pytest.raises(ShuttingDown):
        broker.infer_nowait("qwen", CALL)
    with pytest.raises(ShuttingDown):
        await broker.register("laptop", ROWS)
    with trio.fail_after(1):
        with pytest.raises(StoreUnavailable):
            await broker.heartbeat("laptop")
        with pytest.raises(StoreUnavailable):
            await broker.goodbye("laptop")


async def test_the_blocks_exception_comes_out_unwrapped(autojump_clock):
    with pytest.raises(ZeroDivisionError):
        await break_a_block()


async def break_a_block():
    async with open_broker() as broker:
        await broker.register("laptop", ROWS)
        raise ZeroDivisionError
