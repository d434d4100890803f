"""Infers that go to another row, and those that never do: nothing is generated twice."""

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.broker.helpers import CALL, STREAM, observe, start_call, start_calls, view
from wakecall import BrokerConfig, LLMSpec, Status
from wakecall.errors import PublisherError, QueueFull, TaskAlreadySettled
from wakecall.models import Alias, InferSettled
from wakecall.testing import FakePublisher, open_test_broker

SMALL, BIG = b'{"error": "busy"}', b"x" * (64 * 1024 + 1)


def pool_of(name, **more):
    return [LLMSpec(name, pool="chat", **more)]


async def first_of(*publishers, event="infer"):
    """The one of these that has got a frame, the frame, and the others."""
    await wait_all_tasks_blocked()
    for publisher in publishers:
        if len(publisher.events(event)) > publisher._seen.get(f"{event}#", 0):
            publisher._seen[f"{event}#"] = len(publisher.events(event))
            rest = [other for other in publishers if other is not publisher]
            return publisher, await publisher.next(event), *rest
    raise AssertionError("nobody has got one")


async def refuse(publisher, frame, how, status, body=SMALL):
    task_id = frame.data["task_id"]
    match how:
        case "result":
            await publisher.answer(frame, body[:10], body[10:], status=status)
        case "chunks":
            # Status and type count with the first byte: what comes later need not repeat them.
            await publisher.broker.push_chunk(task_id, body[:10], offset=0, status=status, content_type="text/plain")
            await publisher.broker.push_chunk(task_id, body[10:], offset=len(body[:10]))
            await publisher.broker.complete(task_id, offset=len(body))
        case "failure":
            publisher.fail(frame, "busy", status)


@pytest.mark.parametrize("request_", [CALL, STREAM], ids=["plain", "stream"])
@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("how", "body"),
    [("result", SMALL), ("result", b""), ("result", BIG[:-1]), ("chunks", SMALL), ("failure", b"")],
    ids=["small", "empty", "64 KiB", "chunks", "failure"],
)
async def test_what_a_publisher_refuses_another_gets_under_a_new_id(autojump_clock, how, body, status, request_):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", pool_of("a")) as one,
        FakePublisher(broker, "two", pool_of("b")) as two,
        trio.open_nursery() as nursery,
    ):
        events = observe(broker)
        call = start_call(nursery, broker, "chat", request_)
        refuser, frame, other = await first_of(one, two)
        await refuse(refuser, frame, how, status, body)
        moved = await other.next("infer")
        assert moved.data["task_id"] != frame.data["task_id"]
        assert moved.data["body"] == frame.data["body"]
        with pytest.raises(TaskAlreadySettled):
            await refuser.answer(frame, b"late")
        await other.answer(moved, b"yes")
        await call.over.wait()
        assert (call.body, call.reply.status) == (b"yes", 200)
        assert refuser.events("cancel") == []
        (settled,) = [event for event in events if isinstance(event, InferSettled)]
        assert (settled.attempts, settled.llm) == (2, other.llms[0].name)
        assert view(broker, refuser.llms[0].name).penalty == 1
        assert view(broker, other.llms[0].name).penalty == 0


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(("how", "body"), [("result", SMALL), ("result", b""), ("chunks", SMALL), ("failure", b"")])
async def test_where_all_refuse_the_last_ones_answer_goes_out_untouched(autojump_clock, how, body, status):
    """Each is asked once."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", pool_of("a")) as one,
        FakePublisher(broker, "two", pool_of("b")) as two,
        trio.open_nursery() as nursery,
    ):
        call = start_call(nursery, broker, "chat")
        first, frame, second = await first_of(one, two)
        await refuse(first, frame, how, status, b"another body")
        await refuse(second, await second.next("infer"), how, status, body)
        await call.over.wait()
        if how == "failure":
            assert (call.code, call.error.status, call.error.message) == ("publisher_error", status, "busy")
        else:
            assert (call.reply.status, call.body) == (status, body)
            assert call.reply.headers["content-type"] == ("text/plain" if how == "chunks" else "application/json")
        assert len(one.events("infer")) == len(two.events("infer")) == 1
        assert [view(broker, name).penalty for name in "ab"] == [1, 1], "each has failed once"


async def test_a_lone_rows_refusal_goes_out_as_it_comes(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", ["qwen"]) as one,
        trio.open_nursery() as nursery,
    ):
        call = start_call(nursery, broker)
        with one.upload(await one.next("infer"), status=429) as upload:
            await upload.send(b"wait")
            await call.headed.wait()
            await upload.finish()
        await call.over.wait()
        assert (call.reply.status, call.body) == (429, b"wait")


async def test_more_than_a_refusal_is_an_answer(autojump_clock):
    """Beyond 64 KiB it goes out, and then never moves, however it ends."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", pool_of("a")) as one,
        FakePublisher(broker, "two", pool_of("b")) as two,
        trio.open_nursery() as nursery,
    ):
        calls = [start_call(nursery, broker, "chat") for _ in range(2)]
        await wait_all_tasks_blocked()
        await one.answer(await one.next("infer"), BIG[:1000], BIG[1000:], b"more", status=503)
        frame = await two.next("infer")
        with two.upload(frame, status=503) as upload:
            await upload.send(BIG)
            two.fail(frame, "broken", 503)
        for call in calls:
            await call.over.wait()
        assert {call.reply.status for call in calls} == {503}
        assert sorted((call.body, call.code) for call in calls if call.body) == [(BIG + b"more", None)]
        assert {call.code for call in calls} == {None, "publisher_error"}
        assert len(one.events("infer")) == len(two.events("infer")) == 1


@pytest.mark.parametrize("status", [200, 400, 408, 500, 502, 504])
async def test_no_other_status_moves(autojump_clock, status):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", pool_of("a")) as one,
        FakePublisher(broker, "two", pool_of("b")) as two,
        trio.open_nursery() as nursery,
    ):
        call = start_call(nursery, broker, "chat")
        publisher, frame, other = await first_of(one, two)
        await publisher.answer(frame, b"no", status=status)
        await call.over.wait()
        assert (call.reply.status, call.body) == (status, b"no")
        again = start_call(nursery, broker, "chat")
        if status < 500:
            await other.next("infer")
        await wait_all_tasks_blocked()
        publisher, frame, _ = await first_of(one, two) if status >= 500 else (other, other.frames[-1], None)
        if status >= 400:
            publisher.fail(frame, "no", status)
            await again.over.wait()
            assert again.error.status == status
        assert sum(len(each.events("infer")) for each in (one, two)) == 2
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("how", ["failure", "broken off"])
async def test_never_after_the_first_byte(autojump_clock, how):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", pool_of("a")) as one,
        FakePublisher(broker, "two", pool_of("b")) as two,
        trio.open_nursery() as nursery,
    ):
        call = start_call(nursery, broker, "chat", STREAM)
        publisher, frame, other = await first_of(one, two)
        with publisher.upload(frame) as upload:
            await upload.send(b"data: 1\n\n")
            if how == "failure":
                publisher.fail(frame, "full", 503)
        await call.over.wait()
        assert isinstance(call.error, PublisherError)
        assert other.events("infer") == []


async def test_a_failure_in_the_middle_of_a_refusal_moves_it_and_ends_the_upload(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", pool_of("a")) as one,
        FakePublisher(broker, "two", pool_of("b")) as two,
        trio.open_nursery() as nursery,
    ):
        call = start_call(nursery, broker, "chat")
        publisher, frame, other = await first_of(one, two)
        told = trio.Event()
        with publisher.upload(frame, status=503) as upload:
            upload.on_over(told.set)
            await upload.send(b"some")
            publisher.fail(frame, "full", 503)
            assert told.is_set()
            with pytest.raises(TaskAlreadySettled):
                await upload.send(b"more")
        await other.answer(await other.next("infer"), b"yes")
        await call.over.wait()
        assert call.body == b"yes"


async def test_a_refusal_that_pauses_is_ended_by_the_idle_budget_and_does_not_move(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", pool_of("a", idle_s=5.0)) as one,
        FakePublisher(broker, "two", pool_of("b", idle_s=5.0)) as two,
        trio.open_nursery() as nursery,
    ):
        began = trio.current_time()
        call = start_call(nursery, broker, "chat")
        publisher, frame, other = await first_of(one, two)
        upload = publisher.upload(frame, status=503)
        await upload.send(b"some")
        await call.over.wait()
        assert (call.error.phase, call.over_at - began) == ("idle", pytest.approx(5))
        assert other.events("infer") == []


async def test_a_refused_one_waits_for_the_others_alone(autojump_clock):
    """The refuser's slot is free, and it is not sent there again; whoever comes new may be."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", pool_of("a", max_concurrency=1)) as one,
        FakePublisher(broker, "two", pool_of("b", max_concurrency=1)) as two,
        trio.open_nursery() as nursery,
    ):
        calls = await start_calls(nursery, broker, 2, "chat")
        await one.answer(await one.next("infer"), SMALL, status=429)
        await wait_all_tasks_blocked()
        assert broker.pool_views()[0].waiting == 1
        assert (view(broker, "a").in_flight, view(broker, "b").in_flight) == (0, 1)
        await trio.sleep(30)
        assert len(one.events("infer")) == 1
        calls.append(start_call(nursery, broker, "a"))
        await one.answer(await one.next("infer"), b"third")
        for body in (b"first", b"second"):
            await two.answer(await two.next("infer"), body)
        for call in calls:
            await call.over.wait()
        assert sorted(call.body for call in calls) == [b"first", b"second", b"third"]


async def test_a_full_pool_takes_no_refused_one_and_it_goes_out(autojump_clock):
    config = BrokerConfig(max_waiting_per_llm=1)
    async with (
        open_test_broker(config) as broker,
        FakePublisher(broker, "one", pool_of("a", max_concurrency=1)) as one,
        FakePublisher(broker, "two", pool_of("b", max_concurrency=1)) as two,
        trio.open_nursery() as nursery,
    ):
        calls = await start_calls(nursery, broker, 3, "chat")
        with pytest.raises(QueueFull):
            broker.infer_nowait("chat", CALL)
        await one.answer(await one.next("infer"), SMALL, status=429)
        await wait_all_tasks_blocked()
        assert [call.body for call in calls if call.over.is_set()] == [SMALL]
        assert len(two.events("infer")) == 1
        nursery.cancel_scope.cancel()


async def test_one_deadline_rules_over_all_attempts(autojump_clock):
    async with (
        open_test_broker(BrokerConfig(total_s=50)) as broker,
        FakePublisher(broker, "one", pool_of("a")) as one,
        FakePublisher(broker, "two", pool_of("b")) as two,
        trio.open_nursery() as nursery,
    ):
        began = trio.current_time()
        call = start_call(nursery, broker, "chat")
        publisher, frame, other = await first_of(one, two)
        assert frame.data["deadline_s"] == 50
        await trio.sleep(30)
        await publisher.answer(frame, status=503)
        assert (await other.next("infer")).data["deadline_s"] == 20
        await call.over.wait()
        assert (call.error.phase, call.over_at - began) == ("total", 50)


async def test_after_a_pool_of_refusers_each_member_of_the_next_is_asked(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "first", [LLMSpec(name, pool="chat") for name in "abc"]) as first,
        FakePublisher(broker, "second", [LLMSpec(name, pool="spare") for name in "de"]) as second,
        trio.open_nursery() as nursery,
    ):
        broker._directory.put_alias("any", Alias("any", ("chat", "spare"), 0.0))
        call = start_call(nursery, broker, "any")
        for _ in range(3):
            await first.answer(await first.next("infer"), SMALL, status=503)
        await second.answer(await second.next("infer"), SMALL, status=503)
        await second.answer(await second.next("infer"), b"yes")
        await call.over.wait()
        assert call.body == b"yes"
        asked = [data["llm"] for data in first.events("infer") + second.events("infer")]
        assert sorted(asked) == list("abcde")


# Channels that die --------------------------------------------------------------------------------------------------


async def test_what_a_dead_channel_had_not_taken_goes_elsewhere_and_what_it_had_does_not(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "two", pool_of("b", max_concurrency=1)) as two,
        trio.open_nursery() as nursery,
    ):
        await broker.register("one", pool_of("a", max_concurrency=10))
        async with broker.open_channel("one") as channel:
            await channel.receive()
            busy = start_call(nursery, broker, "b")
            frame = await two.next("infer")
            taken = await start_calls(nursery, broker, 2, "chat")
            assert [each.event for each in await channel.receive()] == ["infer", "infer"]
            untaken = await start_calls(nursery, broker, 3, "chat")
            assert view(broker, "a").in_flight == 5
        await wait_all_tasks_blocked()
        assert {call.code for call in taken} == {"publisher_disconnected"}
        assert broker.pool_views()[0].waiting == 3
        await two.answer(frame, b"busy")
        for body in (b"0", b"1", b"2"):
            await two.answer(await two.next("infer"), body)
        for call in (busy, *untaken):
            await call.over.wait()
        assert [call.body for call in untaken] == [b"0", b"1", b"2"], "in the order in which they came"


async def test_a_row_that_its_next_channel_still_has_gets_what_the_last_had_not_taken(autojump_clock):
    async with open_test_broker() as broker, trio.open_nursery() as nursery:
        await broker.register("one", [LLMSpec("qwen")])
        async with broker.open_channel("one") as channel:
            await channel.receive()
            infer = broker.infer_nowait("qwen", CALL)
            async with FakePublisher(broker, "one", ["qwen"]) as publisher:
                frame = await publisher.next("infer")
                assert frame.data["task_id"] == infer.task_id
                assert [each.event for each in await channel.receive()] == ["bye"]
                await publisher.answer(frame, b"x")
                assert await (await infer.wait_head()).read() == b"x"
        nursery.cancel_scope.cancel()


async def test_an_untaken_one_whose_row_alone_could_serve_it_is_offline(autojump_clock):
    """Nothing can have been generated, so it may be tried again."""
    async with open_test_broker() as broker, trio.open_nursery() as nursery:
        await broker.register("one", [LLMSpec("qwen")])
        async with broker.open_channel("one") as channel:
            await channel.receive()
            call = start_call(nursery, broker)
            await wait_all_tasks_blocked()
        await call.over.wait()
        assert (call.code, call.error.retry_after_s) == ("model_offline", 2)


async def test_nothing_moves_at_a_shutdown(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "two", pool_of("b", max_concurrency=1)) as two,
        trio.open_nursery() as nursery,
    ):
        await broker.register("one", pool_of("a"))
        async with broker.open_channel("one") as channel:
            await channel.receive()
            busy = start_call(nursery, broker, "b")
            await two.next("infer")
            call = start_call(nursery, broker, "chat")
            await wait_all_tasks_blocked()
            assert view(broker, "a").in_flight == 1
            await broker.drain(1)
            assert "infer" not in [frame.event for frame in await channel.receive()]
        assert {busy.code, call.code} == {"shutting_down"}
        assert len(two.events("infer")) == 1


async def test_a_status_of_a_row_is_what_it_was_after_its_refusal(autojump_clock):
    """A refusal says nothing of the row's lifecycle."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", pool_of("a")) as one,
        FakePublisher(broker, "two", pool_of("b")) as two,
        trio.open_nursery() as nursery,
    ):
        start_call(nursery, broker, "chat")
        publisher, frame, _ = await first_of(one, two)
        await publisher.answer(frame, status=503)
        assert {llm.status for llm in broker.llms()} == {Status.ACTIVE}
        nursery.cancel_scope.cancel()
