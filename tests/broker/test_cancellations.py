"""Cancellation alone: somebody leaves, in every place where he may stand. Each docstring says what survives."""

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.broker.helpers import CALL, STREAM, start_call, start_calls, statuses, view
from wakecall import BrokerConfig, LLMSpec, Status
from wakecall.errors import TaskCancelled
from wakecall.testing import FakePublisher, open_test_broker

ASLEEP = [LLMSpec("qwen", status=Status.HIBERNATING)]
ONE_SLOT = [LLMSpec("qwen", max_concurrency=1)]


async def test_leaving_the_line(autojump_clock):
    """The others keep their places; the publisher hears nothing, for it had heard nothing."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ONE_SLOT) as publisher,
        trio.open_nursery() as nursery,
    ):
        calls = await start_calls(nursery, broker, 4)
        calls[2].leave()
        await calls[2].over.wait()
        assert (view(broker).in_flight, view(broker).waiting) == (1, 2)
        for body in (b"0", b"1", b"3"):
            await publisher.answer(await publisher.next("infer"), body)
        for call in calls:
            await call.over.wait()
        assert [call.body for call in calls] == [b"0", b"1", None, b"3"]
        assert publisher.events("cancel") == []
        assert len(publisher.events("infer")) == 3


async def test_leaving_a_wake_that_others_wait_for(autojump_clock):
    """The wake, and those who stay."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ASLEEP) as publisher,
        trio.open_nursery() as nursery,
    ):
        gone, stays = await start_calls(nursery, broker, 2)
        gone.leave()
        await gone.over.wait()
        assert (view(broker).waiting, view(broker).waking) == (1, True)
        await publisher.answer(await publisher.next("wake"))
        await publisher.answer(await publisher.next("infer"), b"x")
        await stays.over.wait()
        assert stays.body == b"x"
        assert publisher.events("cancel") == []


async def test_the_last_waiter_leaving_a_wake(autojump_clock):
    """The wake: the machine is booting already. Its result counts, and whoever comes meanwhile joins it."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ASLEEP) as publisher,
        trio.open_nursery() as nursery,
    ):
        for call in await start_calls(nursery, broker, 2):
            call.leave()
            await call.over.wait()
        assert (view(broker).waiting, view(broker).waking) == (0, True)
        assert publisher.events("cancel") == []
        joined = start_call(nursery, broker)
        await wait_all_tasks_blocked()
        joined.leave()
        await joined.over.wait()
        await publisher.answer(await publisher.next("wake"))
        assert statuses(broker) == {"qwen": Status.ACTIVE}
        assert len(publisher.events("wake")) == 1
        call = start_call(nursery, broker)
        await publisher.answer(await publisher.next("infer"), b"awake")
        await call.over.wait()
        assert call.body == b"awake"


@pytest.mark.parametrize("after", ["frame", "head", "bytes"])
async def test_leaving_an_infer_that_was_sent(autojump_clock, after):
    """Siblings, the channel, the row; the slot is the next one's at once. The publisher gets one cancel."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", max_concurrency=2)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        gone, sibling, queued = await start_calls(nursery, broker, 3)
        frames = [await publisher.next("infer") for _ in range(2)]
        upload = None if after == "frame" else publisher.upload(frames[0])
        if after == "bytes":
            await upload.send(b"some")
            await gone.headed.wait()
        gone.leave()
        gone.leave()
        await gone.over.wait()
        assert (await publisher.next("cancel")).data == {
            "task_id": frames[0].data["task_id"],
            "reason": "client_disconnected",
        }
        following = await publisher.next("infer")
        if upload is not None:
            with pytest.raises(TaskCancelled):
                await upload.send(b"more")
            upload.abort()
        await publisher.answer(frames[1], b"sibling")
        await publisher.answer(following, b"next")
        await sibling.over.wait()
        await queued.over.wait()
        assert (sibling.body, queued.body) == (b"sibling", b"next")
        assert len(publisher.events("cancel")) == 1
        counted = broker.statistics()
        assert (counted.cancelled, counted.completed, counted.failed) == (1, 2, 0)


async def test_leaving_after_the_end(autojump_clock):
    """Everything: an answer that is whole stays completed, and no cancel is sent."""
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
        infer = broker.infer_nowait("qwen", CALL)
        await publisher.answer(await publisher.next("infer"), b"whole")
        infer.cancel()
        reply = await infer.wait_head()
        assert await reply.read() == b"whole"
        await wait_all_tasks_blocked()
        assert publisher.events("cancel") == []
        assert broker.statistics().completed == 1


async def test_a_block_that_raises_cancels_its_infer_and_raises_as_it_is(autojump_clock):
    """The publisher and its row."""
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:

        async def answer():
            upload = publisher.upload(await publisher.next("infer"))
            await upload.send(b"x")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            with pytest.raises(ZeroDivisionError):
                async with broker.infer("qwen", STREAM):
                    raise ZeroDivisionError
        assert (await publisher.next("cancel")).data["reason"] == "client_disconnected"
        assert view(broker).routable


async def test_a_wait_for_the_head_that_is_cancelled_may_be_repeated(autojump_clock):
    """The infer: only `cancel` ends it (a route that sends `: waiting` gives up its wait every ten seconds)."""
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
        infer = broker.infer_nowait("qwen", STREAM)
        for _ in range(3):
            with trio.move_on_after(10) as scope:
                await infer.wait_head()
            assert scope.cancelled_caught
        assert view(broker).in_flight == 1
        await publisher.answer(await publisher.next("infer"), b"x")
        assert await (await infer.wait_head()).read() == b"x"


async def test_a_read_that_is_cancelled_may_be_repeated(autojump_clock):
    """Every byte."""
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
        infer = broker.infer_nowait("qwen", STREAM)
        with publisher.upload(await publisher.next("infer")) as upload:
            await upload.send(b"1")
            reply = await infer.wait_head()
            assert await reply.receive() == b"1"
            with trio.move_on_after(1) as scope:
                await reply.receive()
            assert scope.cancelled_caught
            await upload.send(b"2")
            await upload.finish()
        assert await reply.read() == b"2"


async def test_a_reader_beside_it_that_is_cancelled(autojump_clock):
    """The infer and its first reader: a `with` block's reader is closed and holds nobody back."""
    async with (
        open_test_broker(BrokerConfig(reply_buffer_bytes=1)) as broker,
        FakePublisher(broker, "laptop", ["qwen"]) as publisher,
    ):
        infer = broker.infer_nowait("qwen", STREAM)
        with publisher.upload(await publisher.next("infer")) as upload:
            await upload.send(b"1")
            reply = await infer.wait_head()
            with trio.move_on_after(1), reply.subscribe() as reader:
                await reader.receive()
            assert await reply.receive() == b"1"
            await upload.send(b"2")
            assert await reply.receive() == b"2"
            await upload.finish()
        await reply.wait_done()


async def test_a_register_whose_commit_is_not_waited_for(autojump_clock):
    """Its decision: memory decides in one step, and the journal carries it."""
    async with open_test_broker() as broker:
        with trio.CancelScope() as scope:
            scope.cancel()
            await broker.register("laptop", [LLMSpec("qwen")])
        assert scope.cancelled_caught
        assert statuses(broker) == {"qwen": Status.ACTIVE}


async def test_a_wakes_sender_that_is_cancelled_at_the_commit(autojump_clock):
    """The wake: it has counted, and those who waited are on their way."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ASLEEP) as publisher,
        trio.open_nursery() as nursery,
    ):
        call = start_call(nursery, broker)
        wake = await publisher.next("wake")
        with trio.CancelScope() as scope:
            scope.cancel()
            await publisher.answer(wake)
        assert statuses(broker) == {"qwen": Status.ACTIVE}
        await publisher.answer(await publisher.next("infer"), b"x")
        await call.over.wait()
        assert call.body == b"x"


async def test_a_publisher_that_is_cancelled(autojump_clock):
    """The broker, other sessions, the session itself; its rows are lost and its infers fail."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "other", ["phi"]) as other,
        trio.open_nursery() as nursery,
    ):
        with trio.CancelScope() as scope:
            async with FakePublisher(broker, "laptop", ["qwen"]) as publisher:
                calls = [start_call(nursery, broker, name) for name in ("qwen", "phi")]
                await publisher.next("infer")
                scope.cancel()
                await trio.sleep_forever()
        await calls[0].over.wait()
        assert calls[0].code == "publisher_disconnected"
        assert statuses(broker) == {"qwen": Status.INACTIVE, "phi": Status.ACTIVE}
        await other.answer(await other.next("infer"), b"x")
        await calls[1].over.wait()
        assert calls[1].body == b"x"


@pytest.mark.parametrize("sent", [True, False])
async def test_a_thousand_that_leave_at_once(autojump_clock, sent):
    """The row and its channel: each gets out, the slots are free, and one cancel goes out for each that was sent."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ["qwen"] if sent else ASLEEP) as publisher,
    ):
        async with trio.open_nursery() as nursery:
            for _ in range(1000):
                start_call(nursery, broker)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        await wait_all_tasks_blocked()
        assert view(broker).in_flight == view(broker).waiting == 0
        assert len(publisher.events("cancel")) == (1000 if sent else 0)
        assert view(broker).routable
        assert broker.statistics().cancelled == 1000


async def test_the_whole_broker_being_cancelled(autojump_clock):
    """Nothing, and nothing is left behind either: everybody gets an end."""
    infers = []
    with trio.CancelScope() as scope:
        async with open_test_broker() as broker:
            await broker.register("laptop", [*ONE_SLOT, LLMSpec("phi", status=Status.HIBERNATING)])
            async with broker.open_channel("laptop") as channel:
                await channel.receive()
                infers = [broker.infer_nowait(name, CALL) for name in ("qwen", "qwen", "phi")]
                scope.cancel()
                await trio.sleep_forever()
    assert scope.cancelled_caught
    assert all(infer.is_over for infer in infers)
