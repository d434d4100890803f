"""Public rows: relayed by the broker itself, through the same slots, deadlines and outcomes as every other."""

from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.broker.helpers import CALL, STREAM, codes, observe, start_call, start_calls, statuses, view
from wakecall import BrokerConfig, InferRequest, LLMSpec, MemoryStore, Status, open_broker
from wakecall.errors import (
    DeadlineExceeded,
    InvalidRequest,
    LLMIsPublic,
    LLMIsVirtual,
    LLMNameTaken,
    ModelOffline,
    PublisherError,
    SessionNotFound,
    ShuttingDown,
    TaskNotFound,
)
from wakecall.hosting import HOST, PSEUDONYM
from wakecall.keys import is_owner
from wakecall.models import InferSettled, SlotReleased, is_id
from wakecall.testing import FakePublisher, FakeUpstream, open_test_broker

ROW = {"type": "openai", "model": "gpt-x", "url": "https://api.example/v1"}


@pytest.fixture
def upstream():
    return FakeUpstream()


async def put(broker, name="gpt", **said):
    return await broker.put_public_llm(name, **{**ROW, **said})


async def test_a_call_goes_to_the_upstream_and_its_answer_comes_back_as_it_is(autojump_clock, nursery, upstream):
    async with open_test_broker(upstream=upstream) as broker:
        made = await put(broker, key_env="WAKECALL_UPSTREAM_X")
        assert (made.routable, made.llm.session_id) == (True, None)
        call = start_call(nursery, broker, "gpt", CALL)
        asked = await upstream.next()
        assert asked.request == replace(CALL, via=(PSEUDONYM,))
        assert (asked.llm.url, asked.llm.model, asked.llm.key_env) == (ROW["url"], "gpt-x", "WAKECALL_UPSTREAM_X")
        assert [(t.kind, t.llm, t.session_id, t.state) for t in broker.task_views()] == [("infer", "gpt", None, "sent")]
        asked.start(201, "text/plain")
        for piece in (b"one, ", b"two"):
            asked.send(piece)
            await wait_all_tasks_blocked()
        assert broker.task_views()[0].state == "answering"
        asked.end()
        await call.over.wait()
        assert (call.reply.status, call.reply.headers, call.body) == (201, {"content-type": "text/plain"}, b"one, two")
        counted = broker.statistics()
        assert (counted.accepted, counted.completed, counted.sessions, counted.channels) == (1, 1, 0, 0)
        assert counted.public_llms == 1


async def test_an_answer_without_a_body_is_one_too(autojump_clock, nursery, upstream):
    async with open_test_broker(upstream=upstream) as broker:
        await put(broker)
        call = start_call(nursery, broker, "gpt")
        (await upstream.next()).answer(b"", 404)
        await call.over.wait()
        assert (call.reply.status, call.body) == (404, b"")


async def test_rows_that_the_store_held_can_be_called_at_once(autojump_clock, nursery, upstream):
    """Also before anything else had its turn: they wait for the host's channel instead of being offline."""
    store = MemoryStore()
    async with open_test_broker(store=store, upstream=upstream) as broker:
        await put(broker, max_concurrency=3, queue_s=5, first_byte_s=6, idle_s=7, total_s=8)
    async with open_test_broker(store=store, upstream=upstream) as broker:
        infer = broker.infer_nowait("gpt", CALL)
        asked = await upstream.next()
        llm = asked.llm
        assert (llm.max_concurrency, llm.queue_s, llm.first_byte_s, llm.idle_s, llm.total_s) == (3, 5, 6, 7, 8)
        asked.answer(b"{}")
        assert await (await infer.wait_head()).read() == b"{}"
    assert store._sessions == {}, "the host's session is nobody's to keep"


async def test_without_an_upstream_it_is_offline(autojump_clock):
    async with open_test_broker() as broker:
        assert (await put(broker)).routable is False
        with pytest.raises(ModelOffline):
            broker.infer_nowait("gpt", CALL)


async def test_its_slots_are_counted_and_who_comes_first_goes_first(autojump_clock, nursery, upstream):
    async with open_test_broker(BrokerConfig(max_waiting_per_llm=2), upstream=upstream) as broker:
        await put(broker, max_concurrency=2)
        calls = await start_calls(nursery, broker, 5, "gpt")
        assert [call.code for call in calls] == [None, None, None, None, "queue_full"]
        assert (view(broker, "gpt").in_flight, view(broker, "gpt").waiting, len(upstream.calls)) == (2, 2, 2)
        (await upstream.next()).answer(b"1")
        await calls[0].over.wait()
        await wait_all_tasks_blocked()
        assert (view(broker, "gpt").in_flight, len(upstream.calls)) == (2, 3)
        for _ in range(3):
            (await upstream.next()).answer(b"2")
        for call in calls:
            await call.over.wait()
        assert [call.body for call in calls] == [b"1", b"2", b"2", b"2", None]


async def test_who_waits_for_it_is_served_though_it_becomes_anothers(autojump_clock, nursery, upstream):
    """Their line is the row's own, and goes with it: with another one they would be in none, and their deadline would find
    no row (which was the end of the broker)."""
    async with open_test_broker(upstream=upstream) as broker:
        await put(broker, max_concurrency=1, queue_s=5)
        calls = await start_calls(nursery, broker, 3, "gpt")
        await broker.hand_over_llm("gpt", "anna")
        assert (view(broker, "gpt").in_flight, view(broker, "gpt").waiting) == (1, 2)
        first = await upstream.next()
        first.answer(b"1")
        await upstream.next()
        for call in (calls[0], calls[2]):
            await call.over.wait()
        assert (calls[0].body, calls[2].code) == (b"1", "deadline_exceeded")


async def test_more_slots_are_used_as_soon_as_there_are_more(autojump_clock, nursery, upstream):
    async with open_test_broker(upstream=upstream) as broker:
        await put(broker, max_concurrency=1)
        calls = await start_calls(nursery, broker, 3, "gpt")
        assert len(upstream.calls) == 1
        await put(broker)
        await wait_all_tasks_blocked()
        assert (len(upstream.calls), view(broker, "gpt").llm.max_concurrency) == (3, None)
        for asked in upstream.calls:
            asked.answer(b"{}")
        for call in calls:
            await call.over.wait()


async def test_a_caller_that_leaves_stops_the_upstream(autojump_clock, nursery, upstream):
    async with open_test_broker(upstream=upstream) as broker:
        await put(broker)
        before, during = await start_calls(nursery, broker, 2, "gpt")
        first, second = await upstream.next(), await upstream.next()
        second.start()
        second.send(b"x")
        await wait_all_tasks_blocked()
        before.leave()
        during.leave()
        for asked in (first, second):
            await asked.wait_left()
        assert (broker.statistics().cancelled, view(broker, "gpt").in_flight) == (2, 0)


@pytest.mark.parametrize(
    ("request_", "begin", "phase", "at"),
    [
        (STREAM, False, "first_byte", 30.0),
        (CALL, False, "total", 200.0),
        (STREAM, True, "idle", 20.0),
    ],
)
async def test_a_silent_upstream_is_ended_by_the_infers_own_deadlines(
    autojump_clock, nursery, upstream, request_, begin, phase, at
):
    config = BrokerConfig(first_byte_s=30, idle_s=20, total_s=200)
    async with open_test_broker(config, upstream=upstream) as broker:
        await put(broker)
        started = trio.current_time()
        call = start_call(nursery, broker, "gpt", request_)
        asked = await upstream.next()
        if begin:
            asked.start(content_type="text/event-stream")
            asked.send(b"data: 1\n\n")
        await call.over.wait()
        assert isinstance(call.error, DeadlineExceeded)
        assert (call.error.phase, call.over_at - started) == (phase, at)
        await asked.wait_left()


@pytest.mark.parametrize(
    ("said", "request_", "begin", "phase", "after_s"),
    [
        ({"first_byte_s": 5}, STREAM, False, "first_byte", 5),
        ({"total_s": 7}, CALL, False, "total", 7),
        ({"idle_s": 3}, STREAM, True, "idle", 3),
        ({"queue_s": 4, "max_concurrency": 1}, CALL, False, "queue", 4),
    ],
)
async def test_its_own_budgets_rule_where_it_has_some(
    autojump_clock, nursery, upstream, said, request_, begin, phase, after_s
):
    async with open_test_broker(upstream=upstream) as broker:
        await put(broker, **said)
        call = start_call(nursery, broker, "gpt", request_)
        asked = await upstream.next()
        started = trio.current_time()
        if phase == "queue":
            call = start_call(nursery, broker, "gpt")
        if begin:
            asked.start(content_type="text/event-stream")
            asked.send(b"data: 1\n\n")
        await call.over.wait()
        assert (call.code, call.error.phase, call.over_at - started) == ("deadline_exceeded", phase, after_s)


async def test_a_slot_is_free_once_the_upstream_has_been_left(autojump_clock, nursery):
    """Not when its caller leaves: until the connection is closed the upstream works for him."""
    closed = trio.Event()

    class Slow(FakeUpstream):
        @asynccontextmanager
        async def open_answer(self, llm, request):
            async with super().open_answer(llm, request) as call:
                try:
                    yield call
                finally:
                    with trio.CancelScope(shield=True):
                        await closed.wait()

    upstream = Slow()
    async with open_test_broker(upstream=upstream) as broker:
        events = observe(broker)
        await put(broker, max_concurrency=1)
        first, second = await start_calls(nursery, broker, 2, "gpt")
        asked = await upstream.next()
        asked.start()
        asked.send(b"x")
        await first.headed.wait()
        first.leave()
        await trio.sleep(1)
        assert (view(broker, "gpt").in_flight, view(broker, "gpt").stopping, len(upstream.calls)) == (0, 1, 1)
        closed.set()
        (await upstream.next()).answer(b"{}")
        await second.over.wait()
        assert second.body == b"{}"
        assert [event.how for event in events if isinstance(event, SlotReleased)] == ["confirmed"]
        assert view(broker, "gpt").stopping == 0


@pytest.mark.parametrize("status", [429, 503])
async def test_one_that_refuses_hands_on_to_the_fallback_of_an_alias(autojump_clock, nursery, upstream, status):
    """And what it said of coming again is not said of the other."""
    async with open_test_broker(upstream=upstream) as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
        await put(broker)
        for name, targets in (("public-first", ("gpt", "qwen")), ("public-last", ("qwen", "gpt"))):
            await broker.put_alias(name, targets)
        call = start_call(nursery, broker, "public-first")
        (await upstream.next()).answer(b"busy", status, retry_after_s=77)
        await publisher.answer(await publisher.next("infer"), b"too", status=status)
        await call.over.wait()
        assert (call.reply.status, call.reply.headers, call.body) == (
            status,
            {"content-type": "application/json"},
            b"too",
        )
        call = start_call(nursery, broker, "public-last")
        await publisher.answer(await publisher.next("infer"), b"busy", status=status)
        (await upstream.next()).answer(b"here", retry_after_s=5)
        await call.over.wait()
        assert (call.reply.status, call.body) == (200, b"here")
        assert (broker.statistics().accepted, broker.statistics().completed) == (2, 2)


async def test_a_refusal_that_nobody_else_takes_over_is_the_answer(autojump_clock, nursery, upstream):
    async with open_test_broker(upstream=upstream) as broker:
        await put(broker)
        await broker.put_alias("either", ["gpt", "gone"])
        for name in ("gpt", "either"):
            call = start_call(nursery, broker, name)
            (await upstream.next()).answer(b"busy", 429, retry_after_s=77)
            await call.over.wait()
            assert (call.reply.status, call.reply.headers["retry-after"], call.body) == (429, "77", b"busy")


async def test_what_it_used_is_counted_and_a_hold_keeps_it_from_new_calls(autojump_clock, nursery, upstream):
    """Both as of any row, and neither is undone by a change of it."""
    async with open_test_broker(upstream=upstream) as broker:
        await put(broker, max_concurrency=1)
        first, waiting = await start_calls(nursery, broker, 2, "gpt")
        asked = await upstream.next()
        await broker.hold("gpt", "pause")
        with pytest.raises(ModelOffline):
            broker.infer_nowait("gpt", CALL)
        await put(broker, max_concurrency=2)
        await wait_all_tasks_blocked()
        assert (view(broker, "gpt").llm.hold, view(broker, "gpt").waiting, len(upstream.calls)) == ("pause", 1, 1)
        asked.answer(b'{"usage":{"prompt_tokens":3,"completion_tokens":5}}')
        await first.over.wait()
        await broker.resume("gpt")
        (await upstream.next()).answer(b"{}")
        await waiting.over.wait()
        used = (await broker.usage("llm", 0))["gpt"]
        assert (used.tokens_in, used.tokens_out) == (3, 5)


async def test_a_slow_client_holds_back_its_own_upstream_and_nobody_else(autojump_clock, nursery, upstream):
    config = BrokerConfig(reply_buffer_bytes=100, peer_stall_s=1000, idle_s=1000)
    async with open_test_broker(config, upstream=upstream) as broker:
        await put(broker)
        slow = start_call(nursery, broker, "gpt", reads=False)
        held = await upstream.next()
        held.start()
        for _ in range(20):
            held.send(b"x" * 60)
        held.end()
        await wait_all_tasks_blocked()
        assert held.taken == 3, "two fill the buffer, and the third waits for room"
        quick = start_call(nursery, broker, "gpt")
        (await upstream.next()).answer(b"quick")
        await quick.over.wait()
        assert quick.body == b"quick"
        slow.read_on()
        await slow.over.wait()
        assert slow.body == b"x" * 1200


async def test_an_upstream_that_fails_says_why_and_is_not_asked_again(autojump_clock, nursery, upstream):
    async with open_test_broker(upstream=upstream) as broker:
        await put(broker)
        before, during, named = await start_calls(nursery, broker, 3, "gpt")
        (await upstream.next()).fail()
        second = await upstream.next()
        second.start()
        second.send(b"half")
        second.fail()
        (await upstream.next()).fail(PublisherError("full", status=503))
        for call in (before, during, named):
            await call.over.wait()
        assert [(c.error.code, c.error.status, c.error.message) for c in (before, during, named)] == [
            ("publisher_error", 502, "The upstream is gone."),
            ("publisher_error", 502, "The upstream is gone."),
            ("publisher_error", 503, "full"),
        ]
        assert during.reply is not None
        assert (broker.statistics().failed, len(upstream.calls)) == (3, 3)


@pytest.mark.parametrize("status", [101, 199, 600, 999])
async def test_a_status_that_is_none_cannot_be_passed_on(autojump_clock, nursery, upstream, caplog, status):
    async with open_test_broker(upstream=upstream) as broker:
        await put(broker)
        call = start_call(nursery, broker, "gpt")
        (await upstream.next()).answer(b"?", status)
        await call.over.wait()
        assert (call.code, call.error.status) == ("publisher_error", 502)
        assert str(status) in call.error.message
        assert caplog.records == [], "it is the upstream's doing, and no fault of ours"


async def test_a_fault_of_ours_costs_its_one_call(autojump_clock, nursery, upstream, caplog):
    async with open_test_broker(upstream=upstream) as broker:
        await put(broker)
        broken, sound = await start_calls(nursery, broker, 2, "gpt")
        (await upstream.next()).fail(KeyError("the prompt"))
        (await upstream.next()).answer(b"{}")
        for call in (broken, sound):
            await call.over.wait()
        assert (broken.code, sound.body) == ("publisher_error", b"{}")
        assert "KeyError" in caplog.text
        assert "the prompt" not in caplog.text


async def test_what_is_under_way_goes_on_as_it_began_when_the_row_changes(autojump_clock, nursery, upstream):
    async with open_test_broker(upstream=upstream) as broker:
        await put(broker)
        first = start_call(nursery, broker, "gpt")
        old = await upstream.next()
        changed = await put(broker, url="https://other.example", model="gpt-y", key_env="WAKECALL_UPSTREAM_Y")
        assert changed.llm.created_at == old.llm.created_at
        second = start_call(nursery, broker, "gpt")
        new = await upstream.next()
        assert (old.llm.url, old.llm.model, old.llm.key_env) == (ROW["url"], "gpt-x", None)
        assert (new.llm.url, new.llm.model, new.llm.key_env) == (
            "https://other.example",
            "gpt-y",
            "WAKECALL_UPSTREAM_Y",
        )
        for asked, body in ((old, b"old"), (new, b"new")):
            asked.answer(body)
        for call in (first, second):
            await call.over.wait()
        assert (first.body, second.body) == (b"old", b"new")


async def test_a_row_that_is_deleted_takes_its_calls_with_it(autojump_clock, nursery, upstream):
    async with open_test_broker(upstream=upstream) as broker:
        await put(broker, max_concurrency=1)
        await put(broker, "other")
        calls = await start_calls(nursery, broker, 2, "gpt")
        other = start_call(nursery, broker, "other")
        asked, untouched = await upstream.next(), await upstream.next()
        await broker.delete_llm("gpt")
        await asked.wait_left()
        for call in calls:
            await call.over.wait()
        assert codes(calls) == {"publisher_disconnected", "model_offline"}
        untouched.answer(b"{}")
        await other.over.wait()
        assert other.body == b"{}"
        assert (await put(broker)).routable, "the name is free again"


async def test_nobody_can_speak_for_a_public_row(autojump_clock, nursery, upstream):
    """Not by its name, nor by the hidden session's id, nor by a task's, whoever he says that he is."""
    async with open_test_broker(upstream=upstream) as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
        await put(broker)
        call = start_call(nursery, broker, "gpt")
        asked = await upstream.next()
        (task,) = broker.task_views()
        assert not is_id(HOST)
        assert not is_owner(HOST)
        with pytest.raises(LLMIsPublic):
            await publisher.register(["qwen", "gpt"])
        with pytest.raises(InvalidRequest):
            await broker.register(HOST, [LLMSpec("mine")], owner="anna")
        for speak in (
            lambda: broker.heartbeat(HOST, {"gpt": Status.HIBERNATING}),
            lambda: broker.goodbye(HOST),
            lambda: broker.evict(HOST),
            lambda: broker.hand_over_session(HOST, "anna"),
        ):
            with pytest.raises(SessionNotFound):
                await speak()
        with pytest.raises(SessionNotFound):
            broker.open_channel_nowait(HOST)
        for owner in ("local", "anna"):
            with pytest.raises(TaskNotFound):
                broker.open_upload(task.task_id, owner=owner)
            with pytest.raises(TaskNotFound):
                broker.fail(task.task_id, "no", owner=owner)
            with pytest.raises(TaskNotFound):
                broker.task_request(task.task_id, owner=owner)
        assert (await publisher.heartbeat({"gpt": Status.HIBERNATING}, [task.task_id])).drop == (task.task_id,)
        assert statuses(broker) == {"gpt": Status.ACTIVE, "qwen": Status.ACTIVE}
        assert [session.record.session_id for session in broker.session_views()] == ["laptop"]
        asked.answer(b"{}")
        await call.over.wait()
        assert call.body == b"{}"
        with pytest.raises(LLMIsVirtual):
            await put(broker, "qwen")
        await publisher.register([LLMSpec("qwen", pool="both")])
        with pytest.raises(LLMNameTaken):
            await put(broker, "both")


@pytest.mark.parametrize(
    ("said", "param"),
    [
        ({"max_concurrency": 0}, "llm.max_concurrency"),
        ({"max_concurrency": 100_001}, "llm.max_concurrency"),
        ({"queue_s": 0}, "llm.queue_s"),
        ({"first_byte_s": -1}, "llm.first_byte_s"),
        ({"idle_s": float("inf")}, "llm.idle_s"),
        ({"total_s": float("nan")}, "llm.total_s"),
        ({"key_env": "HOME"}, "key_env"),
        ({"key_env": "WAKECALL_KEY"}, "key_env"),
    ],
)
async def test_what_cannot_be_is_refused_and_changes_nothing(autojump_clock, upstream, said, param):
    async with open_test_broker(upstream=upstream) as broker:
        await put(broker)
        before = broker.llm("gpt")
        with pytest.raises(InvalidRequest) as caught:
            await put(broker, **{"model": "gpt-y", **said})
        assert (caught.value.param, broker.llm("gpt")) == (param, before)


async def test_a_shutdown_waits_for_it_and_then_ends_it(autojump_clock, nursery, upstream):
    async with open_test_broker(BrokerConfig(grace_s=10), upstream=upstream) as broker:
        await put(broker, max_concurrency=2)
        quick, slow, waiting = await start_calls(nursery, broker, 3, "gpt")
        first, second = await upstream.next(), await upstream.next()
        started = trio.current_time()
        nursery.start_soon(broker.drain)
        await wait_all_tasks_blocked()
        with pytest.raises(ShuttingDown):
            broker.infer_nowait("gpt", CALL)
        first.answer(b"{}")
        await quick.over.wait()
        third = await upstream.next()
        for call in (slow, waiting):
            await call.over.wait()
            assert (call.code, call.over_at - started) == ("shutting_down", 10)
        for asked in (second, third):
            await asked.wait_left()
        assert quick.body == b"{}"


async def test_a_broker_that_closes_in_the_middle_leaves_no_upstream_at_work(autojump_clock, nursery, upstream):
    async with open_broker(upstream=upstream) as broker:
        await put(broker)
        call = start_call(nursery, broker, "gpt")
        asked = await upstream.next()
        asked.start()
        asked.send(b"x")
        await call.headed.wait()
    assert asked.left.is_set()
    await call.over.wait()
    assert call.code == "shutting_down"


async def test_a_channel_that_ends_is_followed_by_the_next_in_the_same_step(autojump_clock, nursery, upstream):
    """Only a fault of ours can end it: what was on it fails, who waits goes on waiting, and nothing is lost or stored."""
    store = MemoryStore()
    async with open_test_broker(store=store, upstream=upstream) as broker:
        await put(broker, max_concurrency=1)
        events = observe(broker)
        sent, waiting = await start_calls(nursery, broker, 2, "gpt")
        asked = await upstream.next()
        channel = broker._directory.rows["gpt"].session.channel
        channel.disconnect()
        channel.disconnect()
        await sent.over.wait()
        assert sent.code == "publisher_disconnected"
        assert statuses(broker) == {"gpt": Status.ACTIVE}
        await asked.wait_left()
        (await upstream.next()).answer(b"{}")
        await waiting.over.wait()
        assert waiting.body == b"{}"
        assert (channel.epoch, channel.joined.is_set()) == (1, True)
        assert {type(event) for event in events} == {InferSettled}
    assert store._sessions == {}


async def test_a_fault_in_taking_frames_ends_no_broker(autojump_clock, nursery, upstream, caplog, monkeypatch):
    async with open_test_broker(upstream=upstream) as broker:
        await put(broker)
        secret = "the prompt"
        with monkeypatch.context() as broken:
            broken.setattr(broker._host, "_take", lambda *_: {}[secret])
            call = start_call(nursery, broker, "gpt")
            await call.over.wait()
        assert call.code == "publisher_disconnected"
        assert "KeyError" in caplog.text
        assert "the prompt" not in caplog.text
        again = start_call(nursery, broker, "gpt")
        (await upstream.next()).answer(b"{}")
        await again.over.wait()
        assert again.body == b"{}"


async def test_a_burst_that_leaves_in_one_instant_overflows_nothing(autojump_clock, nursery, upstream):
    """As many as wait, all sent at once when the channel has room, and all cancelled at once."""
    config = BrokerConfig(max_waiting_per_llm=2000, max_untaken_frame_bytes=256 * 1024)
    body = b'{"model":"gpt","x":"' + b"x" * 20_000 + b'"}'
    async with open_test_broker(config, upstream=upstream) as broker:
        await put(broker)
        calls = [start_call(nursery, broker, "gpt", InferRequest("/v1/completions", body)) for _ in range(500)]
        for _ in calls:
            await upstream.next()
        assert view(broker, "gpt").in_flight == 500
        for call in calls:
            call.leave()
        for asked in upstream.calls:
            await asked.wait_left()
        assert (broker._directory.rows["gpt"].session.channel.epoch, broker.statistics().cancelled) == (1, 500)
