"""Control channels: epochs, superseding, what a channel's end takes with it, and how much it may hold."""

import gc
import warnings

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.broker.helpers import CALL, STREAM, codes, start_call, start_calls, statuses, view
from wakecall import BrokerConfig, InferRequest, LLMSpec, Status
from wakecall.errors import ModelOffline, PublisherLostWhileWaking, SessionNotFound, ShuttingDown
from wakecall.testing import FakePublisher, open_test_broker

ACTIVE, HIBERNATING, INACTIVE = Status.ACTIVE, Status.HIBERNATING, Status.INACTIVE


async def test_hello_comes_first_and_ids_are_epoch_and_sequence(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ["qwen"]) as publisher,
        trio.open_nursery() as nursery,
    ):
        await start_calls(nursery, broker, 2)
        hello = publisher.frames[0]
        assert hello.data == {
            "session_id": "laptop",
            "epoch": 1,
            "heartbeat_interval_s": 30,
            "keepalive_s": 15,
            "features": ["results"],
        }
        assert [(f.event, f.id) for f in publisher.frames] == [("hello", "1-1"), ("infer", "1-2"), ("infer", "1-3")]
        await publisher.connect()
        assert [(f.event, f.id) for f in publisher.frames[3:]] == [("bye", "1-4"), ("hello", "2-1")]


async def test_a_channel_needs_a_session_of_ones_own(autojump_clock):
    async with open_test_broker() as broker:
        await broker.register("theirs", [], owner="them")
        for session_id in ("nobody", "theirs"):
            with pytest.raises(SessionNotFound):
                async with broker.open_channel(session_id):
                    pass
        await broker.drain(0)
        with pytest.raises(ShuttingDown):
            async with broker.open_channel("theirs", owner="them"):
                pass


async def test_what_waits_goes_out_after_hello(autojump_clock):
    """Rows that were registered and called for before their channel: nothing precedes `hello`."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ["qwen"]) as publisher,
        trio.open_nursery() as nursery,
    ):
        async with broker.open_channel("laptop") as channel:
            call = start_call(nursery, broker)  # between the channels
            await call_is_waiting(broker)
            frames = [await anext(channel), await anext(channel)]
            assert [frame.event for frame in frames] == ["hello", "infer"]
            await publisher.answer(frames[1], b"ok")
            await call.over.wait()
            assert call.body == b"ok"


async def call_is_waiting(broker):
    while broker.statistics().accepted == 0:
        await trio.lowlevel.checkpoint()


async def test_a_disconnect_fails_everything_at_once(autojump_clock):
    """In the very step: no task runs in between. In flight, queued and waking; every row is lost."""
    async with (
        open_test_broker() as broker,
        FakePublisher(
            broker, "laptop", [LLMSpec("qwen", max_concurrency=2), LLMSpec("phi", status=HIBERNATING)]
        ) as publisher,
        trio.open_nursery() as nursery,
    ):
        calls = await start_calls(nursery, broker, 3)
        waking = await start_calls(nursery, broker, 2, "phi")
        publisher.disconnect()
        counted = broker.statistics()
        assert (counted.failed, counted.waiting, counted.in_flight, counted.wakes_in_flight) == (5, 0, 0, 0)
        assert broker.task_views() == []
        assert statuses(broker) == {"qwen": INACTIVE, "phi": INACTIVE}
        for call in [*calls, *waking]:
            await call.over.wait()
        assert [(c.code, c.error.should_retry, c.error.retry_after_s) for c in [*calls, *waking]] == [
            ("publisher_disconnected", False, None),
            ("publisher_disconnected", False, None),
            ("model_offline", None, 2),
            ("publisher_disconnected", None, 2),
            ("publisher_disconnected", None, 2),
        ]


async def test_a_stream_that_has_begun_ends_in_its_error_after_what_came(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ["qwen"]) as publisher,
    ):
        async with broker_infer_begun(broker, publisher) as reply:
            publisher.disconnect()
            assert reply.settled
            assert await reply.receive() == b"begun"
            for _ in range(2):
                with pytest.raises(Exception, match="lost while it worked"):
                    await reply.receive()
            with pytest.raises(Exception, match="lost while it worked"):
                await reply.wait_done()


class broker_infer_begun:
    """An infer whose first bytes have come, over an upload that goes on."""

    def __init__(self, broker, publisher):
        self._infer = broker.infer_nowait("qwen", STREAM)
        self._publisher = publisher

    async def __aenter__(self):
        frame = await self._publisher.next("infer")
        self.upload = self._publisher.upload(frame)
        await self.upload.send(b"begun")
        return await self._infer.wait_head()

    async def __aexit__(self, *_):
        self._infer.cancel()
        self.upload.abort()


async def test_leaving_the_block_is_the_disconnect(autojump_clock):
    async with open_test_broker() as broker:
        await broker.register("laptop", [LLMSpec("qwen")])
        async with broker.open_channel("laptop") as channel:
            assert (await anext(channel)).event == "hello"
            assert view(broker).routable
        assert statuses(broker) == {"qwen": INACTIVE}
        assert await channel.receive() == []


async def test_breaking_off_a_loop_over_frames_leaves_nothing_to_the_collector(autojump_clock):
    """An async generator left in the middle would make Trio warn in the embedder's program."""
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            async with broker.open_channel("laptop") as channel:
                async for frame in channel:
                    assert frame.event == "hello"
                    break
            await publisher.connect()
            async with broker_infer_begun(broker, publisher) as reply:
                async for piece in reply:
                    assert piece == b"begun"
                    break
                with reply.subscribe() as reader:
                    async for _ in _first(reader):
                        break
            gc.collect()
            await wait_all_tasks_blocked()
        assert caught == []


def _first(reader):
    reader._reader._put(b"x", 0.0)
    return reader


# Superseding


async def test_a_newer_channel_supersedes_while_infers_are_in_flight(autojump_clock):
    """The old one's infers fail, rows keep their status, what queued moves over, and the old end touches nothing."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", max_concurrency=2)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        old = publisher.channel
        calls = await start_calls(nursery, broker, 3)
        frames = [await publisher.next("infer") for _ in range(2)]
        await publisher.connect()
        assert (await publisher.next("bye")).data == {"reason": "superseded"}
        moved = await publisher.next("infer")
        assert moved.id.startswith("2-")
        await calls[0].over.wait()
        await calls[1].over.wait()
        assert codes(calls[:2]) == {"publisher_disconnected"}
        assert {call.error.should_retry for call in calls[:2]} == {False}
        assert statuses(broker) == {"qwen": ACTIVE}
        # The old one's late end, and its late answers.
        old.disconnect()
        for frame in frames:
            with pytest.raises(Exception, match="cancelled"):
                await publisher.answer(frame, b"late")
        assert view(broker).in_flight == 1
        assert view(broker).routable
        await publisher.answer(moved, b"from epoch 2")
        await calls[2].over.wait()
        assert calls[2].body == b"from epoch 2"
        assert publisher.events("cancel") == []


async def test_rows_keep_their_status_between_two_channels(autojump_clock):
    """In the instant between them an infer waits rather than being refused."""
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]):
        async with broker.open_channel("laptop"):
            assert statuses(broker) == {"qwen": ACTIVE}
            assert not view(broker).routable
            infer = broker.infer_nowait("qwen", CALL)
            assert view(broker).waiting == 1
            await wait_all_tasks_blocked()
            assert view(broker).routable
            assert (view(broker).waiting, view(broker).in_flight) == (0, 1)
            infer.cancel()


async def test_superseding_fails_those_who_wait_for_a_wake(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", status=HIBERNATING)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        calls = await start_calls(nursery, broker, 3)
        wake = await publisher.next("wake")
        await publisher.connect()
        for call in calls:
            await call.over.wait()
            assert (call.code, call.error.should_retry, call.error.retry_after_s) == ("publisher_disconnected", None, 2)
        assert statuses(broker) == {"qwen": HIBERNATING}
        with pytest.raises(Exception, match="cancelled"):
            await publisher.answer(wake)
        assert statuses(broker) == {"qwen": HIBERNATING}
        again = start_call(nursery, broker)
        await publisher.answer(await publisher.next("wake"))
        await publisher.answer(await publisher.next("infer"), b"up")
        await again.over.wait()
        assert again.body == b"up"


async def test_of_several_that_wait_the_latest_wins(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
        async with (
            broker.open_channel("laptop") as second,
            broker.open_channel("laptop") as third,
            broker.open_channel("laptop") as fourth,
        ):
            for channel in (second, third):
                assert [f.data for f in await channel.receive()] == [{"reason": "superseded"}]
                assert await channel.receive() == []
            hello = await anext(fourth)
            assert (hello.event, hello.data["epoch"]) == ("hello", 4)
            assert statuses(broker) == {"qwen": ACTIVE}
        assert statuses(broker) == {"qwen": INACTIVE}
        assert len(publisher.events("bye")) == 1


async def test_a_newer_one_is_current_only_when_the_older_one_has_been_joined(autojump_clock):
    """Nothing of an old epoch can act once the new one is current. Repeated: Trio runs what is ready in random order."""
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
        joined = []
        older = publisher.channel
        broker.add_observer(lambda e: joined.append(older.joined.is_set()) if e.event == "open" else None)
        for _ in range(20):
            older = await publisher.connect()
        assert joined == [True] * 20


async def test_a_successor_that_vanishes_fails_those_who_came_to_have_the_row_woken(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", status=HIBERNATING)]),
    ):
        async with broker.open_channel("laptop"):
            infer = broker.infer_nowait("qwen", CALL)
        with pytest.raises(PublisherLostWhileWaking) as caught:
            await infer.wait_head()
        assert (caught.value.code, caught.value.retry_after_s) == ("publisher_disconnected", 2)
        assert statuses(broker) == {"qwen": INACTIVE}


async def test_a_successor_that_vanishes_before_it_is_current_takes_the_rows_with_it(autojump_clock):
    """Nobody is left to serve them: lost, and those who queued meanwhile with them."""
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]):
        async with broker.open_channel("laptop"):
            infer = broker.infer_nowait("qwen", CALL)
        assert statuses(broker) == {"qwen": INACTIVE}
        with pytest.raises(Exception, match="not connected"):
            await infer.wait_head()


async def test_a_successor_may_vanish_in_the_instant_in_which_it_would_be_current(autojump_clock, caplog):
    """Its wait is over and its task has not run yet: it must not become current, nor fall over that."""
    for _ in range(20):  # Trio runs what is ready in random order
        async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
            first = publisher.channel
            async with broker.open_channel("laptop") as channel:
                await first.joined.wait()
                channel.disconnect()
                assert statuses(broker) == {"qwen": INACTIVE}
            await wait_all_tasks_blocked()
            assert statuses(broker) == {"qwen": INACTIVE}
            assert not broker.session_views()[0].connected
    assert caplog.records == []


async def test_an_old_channel_whose_transport_is_stuck_holds_nothing_up(autojump_clock):
    """A half-open peer: nobody takes its frames, nobody leaves its block; the newer one is current all the same."""
    async with open_test_broker() as broker:
        await broker.register("laptop", [LLMSpec("qwen")])
        async with broker.open_channel("laptop") as stuck:
            await wait_all_tasks_blocked()
            old = broker.infer_nowait("qwen", CALL)
            assert [frame.event for frame in await stuck.receive()] == ["hello", "infer"]
            async with broker.open_channel("laptop") as channel:
                assert (await anext(channel)).event == "hello"
                assert old.is_over
                new = broker.infer_nowait("qwen", CALL)
                stuck.disconnect()
                assert not new.is_over
                assert view(broker).in_flight == 1
                new.cancel()
            assert statuses(broker) == {"qwen": INACTIVE}


# Bounds


async def test_a_burst_goes_out_as_fast_as_the_publisher_takes_it(autojump_clock):
    """10,000 who waited for one wake: held back by the channel's room, never past its bound, in their order."""
    config = BrokerConfig(max_waiting_per_llm=10_000)
    request = InferRequest("/v1/chat/completions", b"x" * 4096)
    async with open_test_broker(config) as broker:
        await broker.register("laptop", [LLMSpec("qwen", status=HIBERNATING)])
        async with broker.open_channel("laptop") as channel:
            await anext(channel)
            infers = [broker.infer_nowait("qwen", request) for _ in range(10_000)]
            (wake,) = await channel.receive()
            await broker.complete(wake.data["task_id"])
            got = []
            while len(got) < 10_000:
                assert broker.statistics().waiting + broker.statistics().in_flight == 10_000
                frames = await channel.receive()
                assert sum(frame.weight for frame in frames) <= config.max_untaken_frame_bytes
                got += [frame.data["task_id"] for frame in frames if frame.event == "infer"]
            assert channel.ended is None
            assert got == [infer.task_id for infer in infers]
            channel.disconnect()
            assert all(infer.is_over for infer in infers)


async def test_a_channel_that_takes_nothing_for_the_stall_time_ends_as_stale(autojump_clock):
    config = BrokerConfig(peer_stall_s=60)
    async with open_test_broker(config) as broker:
        await broker.register("laptop", [LLMSpec("qwen")])
        async with broker.open_channel("laptop") as channel:
            await channel.receive()
            await trio.sleep(50)
            await broker.heartbeat("laptop")
            infer = broker.infer_nowait("qwen", CALL)
            await trio.sleep(59.9)
            assert channel.ended is None
            await trio.sleep(0.2)
            assert channel.ended == "stale"
            assert infer.is_over
            assert statuses(broker) == {"qwen": INACTIVE}


async def test_a_channel_that_takes_now_and_then_is_not_stalled(autojump_clock):
    async with open_test_broker() as broker:
        await broker.register("laptop", [LLMSpec("qwen")])
        async with broker.open_channel("laptop") as channel:
            await channel.receive()
            for _ in range(20):
                infer = broker.infer_nowait("qwen", CALL)
                await trio.sleep(50)
                assert [frame.event for frame in await channel.receive()] == ["infer"]
                await broker.heartbeat("laptop")
                infer.cancel()
                await trio.sleep(20)
                assert [frame.event for frame in await channel.receive()] == ["cancel"]
                await broker.heartbeat("laptop")
            assert channel.ended is None


async def test_frames_that_cannot_wait_and_overflow_end_the_channel_as_stale(autojump_clock):
    """Wakes and cancels are not held back; a publisher that takes none of them is cut before it fills the memory."""
    config = BrokerConfig(max_untaken_frame_bytes=64 * 1024, max_inline_body_bytes=1024)
    async with open_test_broker(config) as broker:
        await broker.register("laptop", [LLMSpec("qwen")])
        async with broker.open_channel("laptop") as channel:
            infers = []
            for _ in range(12):
                await channel.receive()
                infers += [broker.infer_nowait("qwen", CALL) for _ in range(30)]
            assert channel.ended is None
            for infer in infers:
                infer.cancel()
            assert channel.ended == "stale"
            assert statuses(broker) == {"qwen": INACTIVE}
            frames = await channel.receive()
            assert frames[-1].data == {"reason": "stale"}
            assert sum(frame.weight for frame in frames) <= config.max_untaken_frame_bytes + 2048


async def test_one_task_receives(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", []) as publisher:
        await wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await publisher.channel.receive()


@pytest.mark.parametrize("slow", [True, False])
async def test_a_publisher_that_takes_its_frames_slowly_is_not_stale(autojump_clock, slow):
    """What its transport has taken may take long to write; while it notes progress, the channel lives."""
    async with open_test_broker(BrokerConfig(peer_stall_s=10)) as broker:
        await broker.register("laptop", [LLMSpec("qwen")])
        async with broker.open_channel("laptop") as channel:
            await channel.receive()
            broker.infer_nowait("qwen", CALL)
            await channel.receive()
            broker.infer_nowait("qwen", CALL)
            for _ in range(8):
                await trio.sleep(4)
                if slow:
                    channel.note_progress()
            assert channel.ended == (None if slow else "stale")


@pytest.mark.parametrize("end", ["goodbye", "evict", "withdrawn and gone"])
async def test_what_never_left_for_a_withdrawn_row_is_offline_at_once(autojump_clock, end):
    """Its publisher left on purpose before its transport took the frame: nobody is to wait for the queue's time."""
    async with open_test_broker() as broker:
        await broker.register("laptop", [LLMSpec("qwen")])
        async with broker.open_channel("laptop") as channel:
            await channel.receive()
            infer = broker.infer_nowait("qwen", CALL)
            match end:
                case "goodbye":
                    await broker.goodbye("laptop")
                case "evict":
                    await broker.evict("laptop")
                case _:
                    await broker.register("laptop", [])
                    channel.disconnect()
            assert view(broker).waiting == 0
            with pytest.raises(ModelOffline):
                await infer.wait_head()


async def test_what_never_left_goes_to_another_of_its_pool_at_once(autojump_clock):
    async with open_test_broker() as broker:
        await broker.register("laptop", [LLMSpec("laptop-qwen", pool="qwen", max_concurrency=1)])
        await broker.register("gpu-box", [LLMSpec("gpu-qwen", pool="qwen", max_concurrency=1)])
        async with broker.open_channel("laptop") as first, broker.open_channel("gpu-box") as second:
            channels = {"laptop-qwen": first, "gpu-qwen": second}
            for channel in channels.values():
                await channel.receive()
            infer = broker.infer_nowait("qwen", CALL)
            (busy,) = [name for name in channels if view(broker, name).in_flight]
            (other,) = channels.keys() - {busy}
            channels[busy].disconnect()
            assert view(broker, other).in_flight == 1
            (frame,) = await channels[other].receive()
            assert frame.data["task_id"] == infer.task_id
            await broker.complete(infer.task_id, b"{}")
            assert await (await infer.wait_head()).read() == b"{}"
            infer.cancel()
