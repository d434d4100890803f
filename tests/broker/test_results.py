"""What publishers send of tasks: results, pieces, failures, and what they get when a task takes nothing more."""

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.broker.helpers import CALL, STREAM, start_call
from wakecall import BrokerConfig
from wakecall.errors import (
    InvalidRequest,
    OffsetGap,
    PublisherError,
    ResultInProgress,
    TaskAlreadySettled,
    TaskCancelled,
)
from wakecall.testing import FakePublisher, open_test_broker


class Stage:
    """A broker, its publisher, and one infer whose frame has come."""

    def __init__(self, config=None, request=CALL):
        self._config, self._request = config, request

    async def __aenter__(self):
        self._broker = open_test_broker(self._config)
        self.broker = await self._broker.__aenter__()
        self.publisher = FakePublisher(self.broker, "laptop", ["qwen"])
        await self.publisher.__aenter__()
        self.infer = self.broker.infer_nowait("qwen", self._request)
        self.frame = await self.publisher.next("infer")
        self.task_id = self.frame.data["task_id"]
        return self

    async def __aexit__(self, *error):
        self.infer.cancel()
        await self.publisher.__aexit__(None, None, None)
        await self._broker.__aexit__(*error)

    async def push(self, data, offset, **more):
        await self.broker.push_chunk(self.task_id, data, offset=offset, **more)


async def test_a_result_is_the_engines_answer(autojump_clock):
    async with Stage() as stage:
        await stage.publisher.answer(stage.frame, b"I'm ", b"", b"a teapot", status=418, content_type="text/plain")
        reply = await stage.infer.wait_head()
        assert (reply.status, reply.headers) == (418, {"content-type": "text/plain"})
        assert await reply.read() == b"I'm a teapot"
        await reply.wait_done()
        counted = stage.broker.statistics()
        assert (counted.completed, counted.in_flight) == (1, 0), "an engine's own error is an answer"


async def test_an_empty_result_is_an_answer(autojump_clock):
    async with Stage() as stage:
        await stage.publisher.answer(stage.frame, status=204, content_type=None)
        reply = await stage.infer.wait_head()
        assert (reply.status, reply.headers, await reply.read()) == (204, {}, b"")


async def test_an_answer_is_known_at_its_first_byte(autojump_clock):
    async with Stage(request=STREAM) as stage:
        with stage.publisher.upload(stage.frame, content_type="text/event-stream") as upload:
            with trio.move_on_after(5) as waited:
                await stage.infer.wait_head()
            assert waited.cancelled_caught, "a head alone is no answer"
            await upload.send(b"data: 1\n\n")
            reply = await stage.infer.wait_head()
            assert await reply.receive() == b"data: 1\n\n"
            assert not reply.settled
            await upload.send(b"data: 2\n\n")
            assert await reply.receive() == b"data: 2\n\n"
            await upload.finish()
        assert reply.settled


@pytest.mark.parametrize("status", [100, 199, 600, 0])
async def test_an_answers_status_is_200_to_599(autojump_clock, status):
    async with Stage() as stage:
        with pytest.raises(InvalidRequest):
            stage.publisher.upload(stage.frame, status=status)
        await stage.publisher.answer(stage.frame, b"ok")  # nothing was begun


@pytest.mark.parametrize("status", [200, 399, 600])
async def test_a_failures_status_is_400_to_599(autojump_clock, status):
    async with Stage() as stage:
        with pytest.raises(InvalidRequest):
            stage.publisher.fail(stage.frame, "x", status)
        assert not stage.infer.is_over


async def test_a_failure_before_the_head_is_the_callers_answer(autojump_clock):
    async with Stage() as stage:
        stage.publisher.fail(stage.frame, "CUDA out of memory", 507)
        with pytest.raises(PublisherError) as caught:
            await stage.infer.wait_head()
        error = caught.value
        assert (error.code, error.status, error.message, error.should_retry) == (
            "publisher_error",
            507,
            "CUDA out of memory",
            False,
        )
        assert stage.publisher.events("cancel") == []


async def test_a_failure_without_a_status_is_502(autojump_clock):
    async with Stage() as stage:
        stage.publisher.fail(stage.frame, "")
        with pytest.raises(PublisherError) as caught:
            await stage.infer.wait_head()
        assert (caught.value.status, caught.value.message) == (502, "The model's publisher failed.")


async def test_a_failure_ends_an_upload_that_is_under_way(autojump_clock):
    """At any time before the end: the upload is told, and what it still sends is refused."""
    async with Stage(BrokerConfig(reply_buffer_bytes=2)) as stage, trio.open_nursery() as nursery:
        over = []
        with stage.publisher.upload(stage.frame) as upload:
            upload.on_over(lambda: over.append("over"))
            await upload.send(b"123")

            async def held_back():
                with pytest.raises(TaskAlreadySettled):
                    await upload.send(b"456")
                over.append("refused")

            nursery.start_soon(held_back)
            await wait_all_tasks_blocked()
            stage.publisher.fail(stage.frame, "engine died")
            assert over == ["over"]
            await wait_all_tasks_blocked()
            assert over == ["over", "refused"]
            with pytest.raises(TaskAlreadySettled):
                await upload.finish()
        reply = await stage.infer.wait_head()
        assert await reply.receive() == b"123"
        with pytest.raises(PublisherError, match="engine died"):
            await reply.receive()


async def test_an_upload_that_breaks_off_before_the_head_is_a_clean_502(autojump_clock):
    async with Stage() as stage:
        with stage.publisher.upload(stage.frame):
            pass
        with pytest.raises(PublisherError) as caught:
            await stage.infer.wait_head()
        assert caught.value.status == 502
        with pytest.raises(TaskAlreadySettled):
            stage.publisher.upload(stage.frame)


async def test_an_upload_that_breaks_off_after_the_head_fails_what_is_read(autojump_clock):
    async with Stage() as stage:
        with stage.publisher.upload(stage.frame) as upload:
            await upload.send(b"half")
        reply = await stage.infer.wait_head()
        assert await reply.receive() == b"half"
        with pytest.raises(PublisherError, match="broke off"):
            await reply.receive()


async def test_an_upload_whose_sender_is_cancelled_has_broken_off(autojump_clock):
    async with Stage(BrokerConfig(reply_buffer_bytes=2)) as stage:
        with trio.move_on_after(5), stage.publisher.upload(stage.frame) as upload:
            await upload.send(b"123")
            await upload.send(b"held back for ever")
        assert stage.infer.error.code == "publisher_error"


async def test_one_upload_at_a_time(autojump_clock):
    async with Stage() as stage:
        with stage.publisher.upload(stage.frame) as upload:
            for offset in (None, 0):
                with pytest.raises(ResultInProgress) as caught:
                    stage.broker.open_upload(stage.task_id, offset=offset)
                assert caught.value.status == 409
            with pytest.raises(ResultInProgress):
                await stage.push(b"x", 0)
            await upload.send(b"ok")
            await upload.finish()
        assert await (await stage.infer.wait_head()).read() == b"ok"


async def test_a_second_result_is_refused_and_changes_nothing(autojump_clock):
    async with Stage() as stage:
        await stage.publisher.answer(stage.frame, b"first")
        with pytest.raises(TaskAlreadySettled) as caught:
            await stage.publisher.answer(stage.frame, b"second")
        assert caught.value.status == 409
        with pytest.raises(TaskAlreadySettled):
            stage.publisher.fail(stage.frame, "third")
        assert await (await stage.infer.wait_head()).read() == b"first"
        assert stage.broker.statistics().completed == 1


async def test_a_result_after_the_client_left_is_410(autojump_clock):
    async with Stage() as stage:
        with stage.publisher.upload(stage.frame) as upload:
            over = []
            upload.on_over(lambda: over.append(True))
            stage.infer.cancel()
            assert over == [True]
            for act in (upload.send(b"x"), upload.finish()):
                with pytest.raises(TaskCancelled) as caught:
                    await act
                assert caught.value.status == 410
            upload.on_over(lambda: over.append("at once"))
            assert over == [True, "at once"]
        counted = stage.broker.statistics()
        assert (counted.cancelled, counted.failed) == (1, 0)


async def test_the_body_is_there_until_the_end(autojump_clock):
    async with Stage() as stage:
        assert stage.broker.task_request(stage.task_id).body == CALL.body
        await stage.publisher.answer(stage.frame, b"x")
        with pytest.raises(TaskAlreadySettled):
            stage.broker.task_request(stage.task_id)


# Pieces


async def test_an_answer_in_pieces(autojump_clock):
    async with Stage() as stage:
        await stage.push(b"abc", 0, status=201, content_type="text/plain")
        await stage.push(b"def", 3, status=500, content_type="ignored/here")
        await stage.broker.complete(stage.task_id, b"ghi", offset=6)
        reply = await stage.infer.wait_head()
        assert (reply.status, reply.headers) == (201, {"content-type": "text/plain"})
        assert await reply.read() == b"abcdefghi"


async def test_bytes_that_were_taken_are_skipped(autojump_clock):
    """A sender that got no answer sends again: whole, in part, or more than it had sent."""
    async with Stage() as stage:
        await stage.push(b"abc", 0)
        await stage.push(b"abc", 0)
        await stage.push(b"bcde", 1)
        await stage.push(b"", 5)
        await stage.broker.complete(stage.task_id, b"ef", offset=4)
        assert await (await stage.infer.wait_head()).read() == b"abcdef"


async def test_a_gap_is_refused_and_may_be_filled(autojump_clock):
    async with Stage() as stage:
        await stage.push(b"abc", 0)
        for offset in (4, 1000):
            with pytest.raises(OffsetGap) as caught:
                await stage.push(b"xyz", offset)
            assert (caught.value.status, caught.value.code) == (409, "offset_gap")
        with pytest.raises(OffsetGap):
            await stage.broker.complete(stage.task_id, offset=4)
        await stage.push(b"def", 3)
        await stage.broker.complete(stage.task_id, offset=6)
        assert await (await stage.infer.wait_head()).read() == b"abcdef"


async def test_an_offset_is_required_on_pieces_and_on_the_result_that_ends_them(autojump_clock):
    async with Stage() as stage:
        with pytest.raises(InvalidRequest) as caught:
            stage.broker.open_upload(stage.task_id, final=False)
        assert caught.value.param == "Wakecall-Offset"
        with pytest.raises(InvalidRequest):
            await stage.push(b"abc", -1)
        await stage.push(b"abc", 0)
        with pytest.raises(InvalidRequest):
            await stage.broker.complete(stage.task_id, b"def")
        await stage.broker.complete(stage.task_id, b"def", offset=3)
        assert await (await stage.infer.wait_head()).read() == b"abcdef"


async def test_a_piece_that_breaks_off_counts_as_far_as_it_came(autojump_clock):
    async with Stage() as stage:
        with stage.broker.open_upload(stage.task_id, offset=0, final=False) as upload:
            await upload.send(b"ab")
        assert not stage.infer.is_over
        await stage.push(b"abcd", 0)
        await stage.broker.complete(stage.task_id, offset=4)
        assert await (await stage.infer.wait_head()).read() == b"abcd"


async def test_pieces_are_held_back_like_any_upload(autojump_clock):
    async with Stage(BrokerConfig(reply_buffer_bytes=3)) as stage, trio.open_nursery() as nursery:
        await stage.push(b"abc", 0)
        nursery.start_soon(stage.push, b"def", 3)
        await wait_all_tasks_blocked()
        with pytest.raises(ResultInProgress):
            await stage.push(b"def", 3)
        reply = await stage.infer.wait_head()
        assert await reply.receive() == b"abc"
        assert await reply.receive() == b"def"
        await stage.broker.complete(stage.task_id, offset=6)
        assert await reply.receive() == b""


async def test_other_owners_cannot_feed_a_task(autojump_clock):
    async with Stage() as stage:
        for act in (
            stage.broker.push_chunk(stage.task_id, b"x", offset=0, owner="them"),
            stage.broker.complete(stage.task_id, b"x", owner="them"),
        ):
            with pytest.raises(Exception, match="no such task"):
                await act
        assert not stage.infer.is_over


async def test_task_ids_are_never_used_twice(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
        ids = set()
        for _ in range(200):
            infer = broker.infer_nowait("qwen", CALL)
            ids.add(infer.task_id)
            await publisher.next("infer")
            infer.cancel()
        assert len(ids) == 200
        async with trio.open_nursery() as nursery:
            start_call(nursery, broker)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert {f["task_id"] for f in publisher.events("infer")} > ids


async def test_an_answer_that_ends_before_what_has_arrived_of_it_fails(autojump_clock):
    """Its pieces and its end contradict each other: neither is passed on as the whole."""
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
        infer = broker.infer_nowait("qwen", CALL)
        task_id = (await publisher.next("infer")).data["task_id"]
        await broker.push_chunk(task_id, b"0123456789", offset=0)
        with pytest.raises(InvalidRequest):
            await broker.complete(task_id, b"0123", offset=0)
        reply = await infer.wait_head()
        with pytest.raises(PublisherError):
            await reply.wait_done()
