"""Infers: slots, the line before them, every phase's deadline, readers that hold back."""

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.broker.helpers import CALL, STREAM, start_call, start_calls, statuses, view
from wakecall import BrokerConfig, InferRequest, LLMSpec, Status
from wakecall.errors import ModelNotFound, ModelOffline, PublisherError, QueueFull, TaskCancelled, TooMany
from wakecall.testing import FakePublisher, open_test_broker

ACTIVE, HIBERNATING, INACTIVE = Status.ACTIVE, Status.HIBERNATING, Status.INACTIVE
ONE_SLOT = [LLMSpec("qwen", max_concurrency=1)]


async def beat(publisher, every=30):
    """Heartbeats, so that a test may take longer than 90 s."""
    while True:
        await trio.sleep(every)
        await publisher.heartbeat()


# Where an infer goes


async def test_an_unknown_name_is_404_and_counts_for_nothing(autojump_clock):
    async with open_test_broker() as broker:
        with pytest.raises(ModelNotFound) as caught:
            broker.infer_nowait("nobody", CALL)
        assert (caught.value.status, caught.value.param) == (404, "model")
        assert broker.statistics().accepted == 0


@pytest.mark.parametrize("status", [ACTIVE, HIBERNATING])
async def test_a_row_without_a_channel_is_offline_and_never_woken(autojump_clock, status):
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["other"]) as publisher:
        await broker.register("desktop", [LLMSpec("qwen", status=status)])
        with pytest.raises(ModelOffline) as caught:
            async with broker.infer("qwen", CALL):
                pass
        assert (caught.value.status, caught.value.retry_after_s, caught.value.should_retry) == (503, 2, None)
        counted = broker.statistics()
        assert (counted.accepted, counted.failed, counted.wakes_started) == (1, 1, 0)
        assert [frame.event for frame in publisher.frames] == ["hello"]


async def test_an_inactive_row_is_offline_and_never_woken(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", status=HIBERNATING)]) as publisher,
    ):
        await publisher.register([])
        with pytest.raises(ModelOffline):
            broker.infer_nowait("qwen", CALL)
        assert publisher.events("wake") == []


async def test_the_frame_says_what_the_protocol_lists(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", model="qwen2.5:7b")]) as publisher,
        trio.open_nursery() as nursery,
    ):
        body = '{"model":"qwen","messages":[{"content":"ä\\u2028"}]}'.encode()
        request = InferRequest("/v1/chat/completions", body, "application/json", "*/*", True, request_id="r1")
        start_call(nursery, broker, request=request)
        data = (await publisher.next("infer")).data
        task_id = data.pop("task_id")
        assert len(task_id) >= 22
        assert data == {
            "llm": "qwen",
            "model": "qwen2.5:7b",
            "method": "POST",
            "path": "/v1/chat/completions",
            "headers": {"content-type": "application/json", "accept": "*/*"},
            "stream": True,
            "deadline_s": 3600,
            "body": body.decode(),
        }
        assert broker.task_request(task_id) is request
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("body", "inline"),
    [(b"x" * 65536, True), (b"x" * 65537, False), (b"\xff\xfe", False), (b"", True)],
    ids=["64 KiB", "64 KiB + 1", "not UTF-8", "empty"],
)
async def test_a_short_text_rides_along_and_anything_else_is_fetched(autojump_clock, body, inline):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ["qwen"]) as publisher,
        trio.open_nursery() as nursery,
    ):
        start_call(nursery, broker, request=InferRequest("/v1/audio/transcriptions", body, "multipart/form-data"))
        data = (await publisher.next("infer")).data
        assert ("body" in data) is inline
        assert broker.task_request(data["task_id"]).body == body
        nursery.cancel_scope.cancel()


# Slots and the line


async def test_first_come_first_served_and_never_more_than_the_slots(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", max_concurrency=3)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        calls = await start_calls(nursery, broker, 10)
        assert (view(broker).in_flight, view(broker).waiting) == (3, 7)
        for turn in range(10):
            frame = await publisher.next("infer")
            assert view(broker).in_flight == min(3, 10 - turn)
            await publisher.answer(frame, str(turn).encode())
        for turn, call in enumerate(calls):
            await call.over.wait()
            assert call.body == str(turn).encode()
        assert view(broker).in_flight == 0


async def test_nobody_overtakes_the_line_even_when_a_slot_is_free(autojump_clock):
    """While the channel has no room the slots are free, and those who come later stand behind those who wait."""
    config = BrokerConfig(max_untaken_frame_bytes=20 * 1024, max_inline_body_bytes=1024)
    async with open_test_broker(config) as broker:
        await broker.register("laptop", [LLMSpec("qwen")])
        async with broker.open_channel("laptop") as channel:
            infers = [broker.infer_nowait("qwen", CALL) for _ in range(50)]
            got = []
            while len(got) < 50:
                got += [f.data["task_id"] for f in await channel.receive() if f.event == "infer"]
            assert got == [infer.task_id for infer in infers]


@pytest.mark.parametrize("how", ["completed", "failed", "cancelled", "broken off", "deadline", "stall"])
async def test_a_slot_is_freed_once_however_an_infer_ends(autojump_clock, how):
    config = BrokerConfig(idle_s=20, peer_stall_s=10, reply_buffer_bytes=4)
    async with (
        open_test_broker(config) as broker,
        FakePublisher(broker, "laptop", ONE_SLOT) as publisher,
        trio.open_nursery() as nursery,
    ):
        first = start_call(nursery, broker, reads=how != "stall")
        await wait_all_tasks_blocked()
        second = start_call(nursery, broker)
        frame = await publisher.next("infer")
        match how:
            case "completed":
                await publisher.answer(frame, b"1")
            case "failed":
                publisher.fail(frame, "no")
            case "cancelled":
                first.leave()
            case "broken off":
                with publisher.upload(frame):
                    pass
            case "deadline" | "stall":
                upload = publisher.upload(frame)
                await upload.send(b"12345")
        following = await publisher.next("infer")
        assert (view(broker).in_flight, view(broker).waiting) == (1, 0)
        if how == "stall":
            first.leave()
        else:
            await first.over.wait()
        first.leave()
        assert view(broker).in_flight == 1
        await publisher.answer(following, b"2")
        await second.over.wait()
        assert second.body == b"2"
        assert view(broker).in_flight == 0


async def test_raising_the_slots_sends_what_waits_and_lowering_them_sends_nothing(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ONE_SLOT) as publisher,
        trio.open_nursery() as nursery,
    ):
        await start_calls(nursery, broker, 5)
        await publisher.register([LLMSpec("qwen", max_concurrency=3)])
        assert (view(broker).in_flight, view(broker).waiting) == (3, 2)
        await publisher.register(ONE_SLOT)
        for left in (2, 1):
            await publisher.answer(await publisher.next("infer"), b"x")
            assert (view(broker).in_flight, view(broker).waiting) == (left, 2)
        await publisher.answer(await publisher.next("infer"), b"x")
        assert (view(broker).in_flight, view(broker).waiting) == (1, 1)
        nursery.cancel_scope.cancel()


async def test_the_line_is_bounded_and_says_when_to_come_back(autojump_clock):
    config = BrokerConfig(max_waiting_per_llm=3)
    async with (
        open_test_broker(config) as broker,
        FakePublisher(broker, "laptop", [*ONE_SLOT, "phi"]) as publisher,
        trio.open_nursery() as nursery,
    ):
        await start_calls(nursery, broker, 4)
        with pytest.raises(QueueFull) as caught:
            broker.infer_nowait("qwen", CALL)
        assert caught.value.status == 429
        assert 1 <= caught.value.retry_after_s <= 60
        assert (broker.statistics().accepted, view(broker).waiting) == (4, 3)
        start_call(nursery, broker, "phi")  # other rows have lines of their own
        await publisher.next("infer")
        await publisher.answer(publisher.frames[1], b"x")
        assert view(broker).waiting == 2
        infer = broker.infer_nowait("qwen", CALL)  # room again
        infer.cancel()
        nursery.cancel_scope.cancel()


async def test_the_retry_after_grows_with_what_is_measured(autojump_clock):
    config = BrokerConfig(max_waiting_per_llm=10)
    async with (
        open_test_broker(config) as broker,
        FakePublisher(broker, "laptop", ONE_SLOT) as publisher,
        trio.open_nursery() as nursery,
    ):
        await start_calls(nursery, broker, 11)
        waits = []
        for service_s in (2, 4, 6):
            with pytest.raises(QueueFull) as caught:
                broker.infer_nowait("qwen", CALL)
            waits.append(caught.value.retry_after_s)
            await trio.sleep(service_s)
            await publisher.answer(await publisher.next("infer"), b"x")
            await start_calls(nursery, broker, 1)
        assert waits[0] < waits[1] < waits[2]
        nursery.cancel_scope.cancel()


async def test_all_lines_together_are_bounded(autojump_clock):
    config = BrokerConfig(max_waiting=4)
    async with (
        open_test_broker(config) as broker,
        FakePublisher(broker, "laptop", [*ONE_SLOT, LLMSpec("phi", status=HIBERNATING)]),
        trio.open_nursery() as nursery,
    ):
        await start_calls(nursery, broker, 3)
        await start_calls(nursery, broker, 2, "phi")
        for name in ("qwen", "phi"):
            with pytest.raises(QueueFull):
                broker.infer_nowait(name, CALL)
        nursery.cancel_scope.cancel()


# Deadlines, each by its phase


async def expect_deadline(call, phase, after, began):
    await call.over.wait()
    assert (call.code, call.error.status, call.error.phase) == ("deadline_exceeded", 504, phase)
    assert call.error.should_retry is False
    assert call.over_at - began == pytest.approx(after, abs=1e-6)


async def test_the_queue_has_a_deadline_and_tells_the_publisher_nothing(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ONE_SLOT) as publisher,
        trio.open_nursery() as nursery,
    ):
        began = trio.current_time()
        _, queued = await start_calls(nursery, broker, 2)
        await expect_deadline(queued, "queue", 60, began)
        assert (view(broker).in_flight, view(broker).waiting) == (1, 0)
        assert publisher.events("cancel") == []
        nursery.cancel_scope.cancel()


async def test_a_stream_has_a_deadline_for_its_first_byte(autojump_clock):
    async with (
        open_test_broker(BrokerConfig(total_s=1000)) as broker,
        FakePublisher(broker, "laptop", ["qwen"]) as publisher,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(beat, publisher)
        began = trio.current_time()
        stream = start_call(nursery, broker, request=STREAM)
        frame = await publisher.next("infer")
        upload = publisher.upload(frame)  # a head without a byte does not count
        plain = start_call(nursery, broker)
        await expect_deadline(stream, "first_byte", 300, began)
        with pytest.raises(TaskCancelled):
            await upload.send(b"late")
        cancel = await publisher.next("cancel")
        assert cancel.data == {"task_id": frame.data["task_id"], "reason": "deadline_exceeded"}
        await expect_deadline(plain, "total", 1000, began)
        assert len(publisher.events("cancel")) == 2
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("request_", [CALL, STREAM], ids=["plain", "stream"])
async def test_an_answer_that_pauses_has_a_deadline(autojump_clock, request_):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ["qwen"]) as publisher,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(beat, publisher)
        began = trio.current_time()
        call = start_call(nursery, broker, request=request_)
        upload = publisher.upload(await publisher.next("infer"))
        for _ in range(5):
            await trio.sleep(119)
            await upload.send(b"x")
        await expect_deadline(call, "idle", 5 * 119 + 120, began)
        assert publisher.events("cancel")[0]["reason"] == "deadline_exceeded"
        nursery.cancel_scope.cancel()


async def test_the_total_spans_all_phases(autojump_clock):
    """Waking, queueing and answering: however busy, an hour after it was accepted it is over."""
    async with (
        open_test_broker(BrokerConfig(total_s=100)) as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", status=HIBERNATING, max_concurrency=1)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(beat, publisher)
        began = trio.current_time()
        first, second = await start_calls(nursery, broker, 2)
        await trio.sleep(40)
        await publisher.answer(await publisher.next("wake"))
        frame = await publisher.next("infer")
        assert frame.data["deadline_s"] == 60
        upload = publisher.upload(frame)
        while not first.over.is_set():
            await trio.sleep(7)
            try:
                await upload.send(b"x")
            except TaskCancelled:
                break
        await expect_deadline(first, "total", 100, began)
        await expect_deadline(second, "total", 100, began)
        nursery.cancel_scope.cancel()


async def test_a_total_that_ends_during_a_wake_is_the_infers_own_and_the_wake_goes_on(autojump_clock):
    async with (
        open_test_broker(BrokerConfig(total_s=50)) as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", status=HIBERNATING)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        began = trio.current_time()
        call = start_call(nursery, broker)
        wake = await publisher.next("wake")
        await expect_deadline(call, "total", 50, began)
        assert publisher.events("cancel") == []
        await publisher.answer(wake)
        assert statuses(broker) == {"qwen": ACTIVE}


# Readers


async def test_a_slow_client_holds_back_its_own_upload_and_nothing_else(autojump_clock):
    """Flat memory: never more than the buffer and the piece in hand; siblings run on."""
    config = BrokerConfig(reply_buffer_bytes=1000)
    async with (
        open_test_broker(config) as broker,
        FakePublisher(broker, "laptop", ["qwen"]) as publisher,
        trio.open_nursery() as nursery,
    ):
        slow = start_call(nursery, broker, request=STREAM, reads=False)
        frame = await publisher.next("infer")
        taken = 0

        async def upload():
            nonlocal taken
            with publisher.upload(frame) as upload:
                for _ in range(100):
                    await upload.send(b"x" * 400)
                    taken += 1
                await upload.finish()

        nursery.start_soon(upload)
        await wait_all_tasks_blocked()
        assert taken == 3
        sibling = start_call(nursery, broker)
        await publisher.answer(await publisher.next("infer"), b"y" * 900, b"z")
        await sibling.over.wait()
        assert len(sibling.body) == 901
        assert taken == 3
        slow.read_on()
        await slow.over.wait()
        assert len(slow.body) == 40_000


async def test_the_task_is_completed_once_its_last_byte_is_in(autojump_clock):
    """Though its client has taken nothing yet: the slot is free for the next, and the client reads on at leisure."""
    config = BrokerConfig(reply_buffer_bytes=1000)
    async with (
        open_test_broker(config) as broker,
        FakePublisher(broker, "laptop", ONE_SLOT) as publisher,
        trio.open_nursery() as nursery,
    ):
        slow = start_call(nursery, broker, reads=False)
        await publisher.answer(await publisher.next("infer"), b"x" * 5000)
        assert broker.statistics().completed == 1
        assert view(broker).in_flight == 0
        await trio.sleep(80)
        slow.read_on()
        await slow.over.wait()
        assert len(slow.body) == 5000


async def test_a_client_that_takes_nothing_for_the_stall_time_is_cancelled(autojump_clock):
    config = BrokerConfig(reply_buffer_bytes=4)
    async with (
        open_test_broker(config) as broker,
        FakePublisher(broker, "laptop", ["qwen"]) as publisher,
        trio.open_nursery() as nursery,
    ):
        call = start_call(nursery, broker, request=STREAM, reads=False)
        frame = await publisher.next("infer")
        upload = publisher.upload(frame)
        await trio.sleep(10)
        await upload.send(b"12345")
        began = trio.current_time()
        with pytest.raises(TaskCancelled):
            await upload.send(b"held back")
        assert trio.current_time() - began == pytest.approx(60)
        cancel = await publisher.next("cancel")
        assert cancel.data == {"task_id": frame.data["task_id"], "reason": "client_disconnected"}
        counted = broker.statistics()
        assert (counted.cancelled, counted.failed) == (1, 0)
        call.leave()
        upload.abort()


async def test_the_idle_clock_stands_while_a_reader_holds_back(autojump_clock):
    """It starts where the reader makes room, and is over in its own time, not at some later look."""
    config = BrokerConfig(reply_buffer_bytes=4, idle_s=10)
    async with (
        open_test_broker(config) as broker,
        FakePublisher(broker, "laptop", ["qwen"]) as publisher,
        trio.open_nursery() as nursery,
    ):
        began = trio.current_time()
        call = start_call(nursery, broker, request=STREAM, reads=False)
        upload = publisher.upload(await publisher.next("infer"))
        await upload.send(b"12345")
        await trio.sleep(40)
        assert not call.over.is_set()
        call.read_on()
        await expect_deadline(call, "idle", 50, began)
        upload.abort()


async def test_two_readers_each_get_every_chunk_and_the_slowest_holds_back(autojump_clock):
    config = BrokerConfig(reply_buffer_bytes=4)
    async with (
        open_test_broker(config) as broker,
        FakePublisher(broker, "laptop", ["qwen"]) as publisher,
        trio.open_nursery() as nursery,
    ):
        infer = broker.infer_nowait("qwen", STREAM)
        frame = await publisher.next("infer")
        sent = []

        async def upload():
            with publisher.upload(frame, content_type="text/event-stream") as upload:
                for piece in (b"first", b"secnd", b"third"):
                    await upload.send(piece)
                    sent.append(piece)
                await upload.finish()

        nursery.start_soon(upload)
        reply = await infer.wait_head()
        assert (reply.status, reply.headers) == (200, {"content-type": "text/event-stream"})
        # It begins where the first reader stands: the head came with a piece, and that is not lost to it.
        with reply.subscribe() as second:
            await wait_all_tasks_blocked()
            assert await reply.receive() == b"first"
            await wait_all_tasks_blocked()
            assert sent == [b"first"], "held back by the other"
            assert await second.receive() == b"first"
            await wait_all_tasks_blocked()
            assert sent == [b"first", b"secnd"]
            assert await second.receive() == b"secnd"
            assert await reply.receive() == b"secnd"
            assert await reply.receive() == b"third"
            assert [piece async for piece in second] == [b"third"]
            assert await reply.receive() == b""
            await reply.wait_done()


async def test_a_reader_that_comes_late_gets_what_is_still_to_come(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
        infer = broker.infer_nowait("qwen", STREAM)
        with publisher.upload(await publisher.next("infer")) as upload:
            await upload.send(b"gone ")
            reply = await infer.wait_head()
            assert await reply.receive() == b"gone "
            await upload.send(b"here ")
            with reply.subscribe() as second:
                await upload.send(b"there")
                await upload.finish()
                assert [piece async for piece in second] == [b"here there"]


async def test_a_further_reader_that_leaves_holds_nobody_back_and_readers_are_bounded(autojump_clock):
    config = BrokerConfig(reply_buffer_bytes=4, max_readers_per_reply=3)
    async with (
        open_test_broker(config) as broker,
        FakePublisher(broker, "laptop", ["qwen"]) as publisher,
    ):
        infer = broker.infer_nowait("qwen", STREAM)
        upload = publisher.upload(await publisher.next("infer"))
        await upload.send(b"1")
        reply = await infer.wait_head()
        first, second = reply.subscribe(), reply.subscribe()
        with pytest.raises(TooMany):
            reply.subscribe()
        first.close()
        second.close()
        for _ in range(3):
            await upload.send(b"12345")
            await reply.receive()
        await upload.finish()
        assert await reply.read() == b""


async def test_breaking_loose_in_the_middle_and_failing_reaches_every_reader(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
        infer = broker.infer_nowait("qwen", STREAM)
        frame = await publisher.next("infer")
        upload = publisher.upload(frame)
        await upload.send(b"begun")
        reply = await infer.wait_head()
        reader = reply.subscribe()
        publisher.fail(frame, "out of memory")
        for each in (reply, reader):
            assert await each.receive() == b"begun"
            with pytest.raises(PublisherError, match="out of memory"):
                await each.receive()
        upload.abort()


@pytest.mark.parametrize("slow", [True, False])
async def test_a_slow_reader_is_not_a_stalled_one(autojump_clock, slow):
    """What was taken may take long to write: as long as the transport notes progress, it is slow; else it has stalled."""
    config = BrokerConfig(peer_stall_s=10, reply_buffer_bytes=4)
    async with open_test_broker(config) as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
        infer = broker.infer_nowait("qwen", STREAM)
        with publisher.upload(await publisher.next("infer")) as upload:
            await upload.send(b"first")
            reply = await infer.wait_head()
            await reply.receive()
            await upload.send(b"second")
            for _ in range(8):
                await trio.sleep(4)
                if slow:
                    reply.note_progress()
            assert infer.is_over is not slow
            if slow:
                await trio.sleep(11)
                assert infer.is_over
        assert len(publisher.events("cancel")) <= 1
