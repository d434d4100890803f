"""Signs of life and their absence: heartbeats, lost rows, goodbye, eviction, what is remembered and for how long."""

import pytest
import trio

from tests.broker.helpers import CALL, start_call, start_calls, statuses, view
from wakecall import BrokerConfig, LLMSpec, Status
from wakecall.errors import (
    InvalidRequest,
    ModelOffline,
    SessionNotFound,
    TaskAlreadySettled,
    TaskCancelled,
    TaskNotFound,
    TooMany,
)
from wakecall.testing import FakePublisher, open_test_broker

ACTIVE, HIBERNATING, INACTIVE = Status.ACTIVE, Status.HIBERNATING, Status.INACTIVE
BOTH = ["qwen", LLMSpec("phi", status=HIBERNATING)]


async def test_lost_rows_come_back_as_what_they_were_with_a_channel(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", BOTH) as publisher:
        publisher.disconnect()
        assert statuses(broker) == {"qwen": INACTIVE, "phi": INACTIVE}
        assert view(broker).llm.inactive_since == broker.now()
        await trio.sleep(60)
        await publisher.connect()
        assert statuses(broker) == {"qwen": ACTIVE, "phi": HIBERNATING}
        assert view(broker).llm.inactive_since is None
        assert view(broker).llm.last_heartbeat_at == broker.now()


async def test_lost_rows_come_back_as_what_they_were_with_a_heartbeat(autojump_clock):
    """A heartbeat revives them, but only a channel makes them routable."""
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", BOTH) as publisher:
        publisher.disconnect()
        reply = await publisher.heartbeat()
        assert reply.llms == {"qwen": ACTIVE, "phi": HIBERNATING}
        assert not view(broker).routable
        with pytest.raises(ModelOffline):
            broker.infer_nowait("qwen", CALL)
        await publisher.connect()
        assert view(broker).routable


async def test_a_heartbeat_may_name_what_a_lost_row_comes_back_as(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", BOTH) as publisher:
        publisher.disconnect()
        reply = await publisher.heartbeat({"qwen": HIBERNATING, "phi": ACTIVE})
        assert reply.llms == {"qwen": HIBERNATING, "phi": ACTIVE}


async def test_a_heartbeat_bumps_every_row_and_reports(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", BOTH) as publisher:
        await trio.sleep(50)
        reply = await publisher.heartbeat({"qwen": HIBERNATING, "unknown": ACTIVE})
        assert reply.llms == {"qwen": HIBERNATING, "phi": HIBERNATING}
        assert {v.llm.last_heartbeat_at for v in broker.llm_views()} == {broker.now()}
        assert broker.session_views()[0].record.last_heartbeat_at == broker.now()


async def test_heartbeats_within_90_seconds_keep_a_row_alive_for_ever(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", BOTH) as publisher:
        for _ in range(300):
            await trio.sleep(89)
            await publisher.heartbeat()
        assert statuses(broker) == {"qwen": ACTIVE, "phi": HIBERNATING}


async def test_a_heartbeat_of_an_unknown_session_or_anothers_is_404(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "theirs", ["qwen"], owner="them"):
        before = broker.llm("qwen")
        await trio.sleep(1)
        for session_id in ("nobody", "theirs"):
            with pytest.raises(SessionNotFound):
                await broker.heartbeat(session_id)
        assert broker.llm("qwen") == before


async def test_a_bad_heartbeat_changes_nothing(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
        before = broker.llm("qwen"), broker.session_views()
        await trio.sleep(1)
        with pytest.raises(InvalidRequest):
            await publisher.heartbeat({"qwen": INACTIVE})
        with pytest.raises(TooMany):
            await publisher.heartbeat({"qwen": HIBERNATING}, ["x"] * 10_001)
        assert (broker.llm("qwen"), broker.session_views()) == before
        await publisher.heartbeat(tasks=["x"] * 10_000)


async def test_drop_names_what_the_broker_does_not_wait_for(autojump_clock):
    """Settled, unknown, and other owners' tasks; those in flight, wakes too, are kept."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", BOTH) as publisher,
        FakePublisher(broker, "theirs", ["other"], owner="them") as theirs,
        trio.open_nursery() as nursery,
    ):
        gone, kept = await start_calls(nursery, broker, 2)
        start_call(nursery, broker, "phi")
        start_call(nursery, broker, "other")
        ids = [(await publisher.next("infer")).data["task_id"] for _ in range(2)]
        wake = (await publisher.next("wake")).data["task_id"]
        foreign = (await theirs.next("infer")).data["task_id"]
        gone.leave()
        await gone.over.wait()
        reply = await publisher.heartbeat(tasks=[*ids, wake, foreign, "never-was"])
        assert reply.drop == (ids[0], foreign, "never-was")
        assert not kept.over.is_set()
        nursery.cancel_scope.cancel()


async def test_goodbye_withdraws_the_rows_fails_what_is_in_flight_and_ends_the_channel(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", max_concurrency=1)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        sent, queued = await start_calls(nursery, broker, 2)
        frame = await publisher.next("infer")
        await publisher.goodbye()
        await sent.over.wait()
        await queued.over.wait()
        assert (sent.code, queued.code) == ("publisher_disconnected", "model_offline")
        assert sent.error.should_retry is False
        assert (await publisher.next("bye")).data == {"reason": "goodbye"}
        assert statuses(broker) == {"qwen": INACTIVE}
        assert broker.llm("qwen").remembers is None
        for again in (publisher.heartbeat, publisher.goodbye):
            with pytest.raises(SessionNotFound):
                await again()
        with pytest.raises(SessionNotFound):
            async with broker.open_channel("laptop"):
                pass
        with pytest.raises(TaskNotFound):
            await publisher.answer(frame, b"too late")


async def test_goodbye_of_another_owners_session_is_404(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "theirs", ["qwen"], owner="them"):
        with pytest.raises(SessionNotFound):
            await broker.goodbye("theirs")
        assert view(broker).routable


async def test_eviction_is_a_goodbye_that_tells_the_publisher_to_stay_away(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "theirs", ["qwen"], owner="them") as publisher:
        await broker.evict("theirs")
        assert (await publisher.next("bye")).data == {"reason": "evicted"}
        assert statuses(broker) == {"qwen": INACTIVE}
        assert broker.session_views() == []
        with pytest.raises(SessionNotFound):
            await broker.evict("theirs")


async def test_a_session_with_neither_row_nor_channel_is_forgotten_after_the_retention(autojump_clock):
    async with open_test_broker() as broker:
        await broker.register("idle", [])
        async with FakePublisher(broker, "connected", []) as publisher:
            for _ in range(4 * 60 + 1):
                await trio.sleep(60)
            assert [s.record.session_id for s in broker.session_views()] == ["connected"]
            with pytest.raises(SessionNotFound):
                await broker.heartbeat("idle")
            publisher.disconnect()
            await trio.sleep(4 * 3600 - 30)
            await publisher.heartbeat()
        await trio.sleep(60)
        assert broker.session_views() == []


async def test_a_sessions_retention_begins_when_its_last_row_goes(autojump_clock):
    async with open_test_broker() as broker:
        async with FakePublisher(broker, "laptop", ["qwen"]):
            pass
        await trio.sleep(4 * 3600 + 20)
        assert broker.llms() == []
        assert len(broker.session_views()) == 1
        await trio.sleep(4 * 3600 - 60)
        assert len(broker.session_views()) == 1
        await trio.sleep(120)
        assert broker.session_views() == []


async def settle_some(broker, publisher, nursery):
    """One ended by its publisher, one by its client; the ids."""
    call = start_call(nursery, broker)
    frame = await publisher.next("infer")
    await publisher.answer(frame, b"x")
    await call.over.wait()
    left = start_call(nursery, broker)
    cancelled = await publisher.next("infer")
    left.leave()
    await left.over.wait()
    return frame.data["task_id"], cancelled.data["task_id"]


def refusal(broker, task_id, owner="local"):
    refusals = []
    for ask in (
        lambda: broker.fail(task_id, "x", owner=owner),
        lambda: broker.open_upload(task_id, owner=owner),
        lambda: broker.task_request(task_id, owner=owner),
    ):
        with pytest.raises((TaskNotFound, TaskAlreadySettled, TaskCancelled)) as caught:
            ask()
        refusals.append((caught.value.status, caught.value.code))
    assert len(set(refusals)) == 1
    return refusals[0]


async def test_an_ended_task_is_remembered_for_5_minutes(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ["qwen"]) as publisher,
        trio.open_nursery() as nursery,
    ):
        settled, cancelled = await settle_some(broker, publisher, nursery)
        assert refusal(broker, settled) == (409, "task_already_settled")
        assert refusal(broker, cancelled) == (410, "task_cancelled")
        assert refusal(broker, "never-was") == (404, "task_not_found")
        for _ in range(4):
            await trio.sleep(74)
            await publisher.heartbeat()
        assert refusal(broker, settled) == (409, "task_already_settled")
        await trio.sleep(5)
        assert refusal(broker, settled) == (404, "task_not_found")
        assert refusal(broker, cancelled) == (404, "task_not_found")


async def test_a_session_remembers_its_last_1000_tasks(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ["qwen"]) as publisher,
        trio.open_nursery() as nursery,
    ):
        settled, cancelled = await settle_some(broker, publisher, nursery)
        for _ in range(998):
            broker.infer_nowait("qwen", CALL).cancel()
        assert refusal(broker, settled) == (409, "task_already_settled")
        broker.infer_nowait("qwen", CALL).cancel()
        assert refusal(broker, settled) == (404, "task_not_found")
        assert refusal(broker, cancelled) == (410, "task_cancelled")
        assert len(broker._directory.settled) == 1000


async def test_a_task_of_another_owner_is_404_alive_or_over(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ["qwen"]) as publisher,
        trio.open_nursery() as nursery,
    ):
        call = start_call(nursery, broker)
        frame = await publisher.next("infer")
        task_id = frame.data["task_id"]
        assert refusal(broker, task_id, owner="them") == (404, "task_not_found")
        await publisher.answer(frame, b"x")
        assert refusal(broker, task_id, owner="them") == (404, "task_not_found")
        await call.over.wait()
        assert call.body == b"x"


async def test_a_deleted_row_fails_its_infers_and_its_publisher_is_told(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", max_concurrency=1), BOTH[1]]) as publisher,
        trio.open_nursery() as nursery,
    ):
        calls = [*await start_calls(nursery, broker, 2), start_call(nursery, broker, "phi")]
        ids = {(await publisher.next(event)).data["task_id"] for event in ("infer", "wake")}
        await broker.delete_llm("qwen")
        await broker.delete_llm("phi")
        for call in calls:
            await call.over.wait()
        # The one that was sent may have generated: its caller is not told to try again.
        assert sorted(call.code for call in calls) == ["model_offline", "model_offline", "publisher_disconnected"]
        assert {(await publisher.next("cancel")).data["task_id"] for _ in ids} == ids
        assert broker.llms() == []
        assert (await publisher.heartbeat()).llms == {}


async def test_a_public_row_is_listed_and_offline(autojump_clock):
    config = BrokerConfig()
    async with open_test_broker(config) as broker:
        made = await broker.put_public_llm("gpt", type="openai", model="gpt", url="http://127.0.0.1:1/v1")
        assert (made.llm.kind, made.routable) == ("public", False)
        with pytest.raises(ModelOffline):
            broker.infer_nowait("gpt", CALL)
        changed = await broker.put_public_llm("gpt", type="vllm", model="gpt", url="http://127.0.0.1:2/v1")
        assert (changed.llm.type, changed.llm.created_at) == ("vllm", made.llm.created_at)
        assert broker.statistics().public_llms == 1
        await broker.delete_llm("gpt")
        assert broker.llms() == []
