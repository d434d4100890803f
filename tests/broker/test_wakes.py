"""Waking: one frame for all who wait, and what its end means to them."""

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.broker.helpers import codes, start_call, start_calls, statuses, view
from wakecall import LLMSpec, Status
from wakecall.errors import TaskAlreadySettled, TaskCancelled
from wakecall.testing import FakePublisher, open_test_broker

ACTIVE, HIBERNATING, INACTIVE = Status.ACTIVE, Status.HIBERNATING, Status.INACTIVE
ASLEEP = [LLMSpec("qwen", status=HIBERNATING, wake_s=40)]


async def all_over(calls):
    for call in calls:
        await call.over.wait()


async def test_50_at_once_make_one_wake_and_get_50_answers(autojump_clock):
    """Invariant 6. Their own frames go out only after the wake's result, which moves the heartbeat."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ASLEEP) as publisher,
        trio.open_nursery() as nursery,
    ):
        calls = [start_call(nursery, broker) for _ in range(50)]
        wake = await publisher.next("wake")
        assert {k: v for k, v in wake.data.items() if k != "task_id"} == {
            "llm": "qwen",
            "model": "qwen",
            "deadline_s": 40,
        }
        await trio.sleep(10)
        assert [frame.event for frame in publisher.frames] == ["hello", "wake"]
        assert (view(broker).waiting, view(broker).waking) == (50, True)
        assert broker.statistics().wakes_in_flight == 1
        await publisher.answer(wake, b"awake", status=201)
        assert statuses(broker) == {"qwen": ACTIVE}
        assert broker.llm("qwen").last_heartbeat_at == broker.now()
        for _ in calls:
            await publisher.answer(await publisher.next("infer"), b"yes")
        await all_over(calls)
        assert {call.body for call in calls} == {b"yes"}
        counted = broker.statistics()
        assert (counted.wakes_started, counted.wakes_succeeded, counted.completed) == (1, 1, 50)
        assert [frame.event for frame in publisher.frames].count("wake") == 1


async def test_what_waited_for_a_wake_then_queues_for_its_slots(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", status=HIBERNATING, max_concurrency=2)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        calls = await start_calls(nursery, broker, 5)
        await trio.sleep(50)
        await publisher.heartbeat()
        began = trio.current_time()
        await publisher.answer(await publisher.next("wake"))
        assert (view(broker).in_flight, view(broker).waiting) == (2, 3)
        await all_over(calls[2:])
        # Each phase starts its own clock.
        assert {call.over_at for call in calls[2:]} == {began + 60}
        assert {call.error.phase for call in calls[2:]} == {"queue"}
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("how", ["failure", "result", "long result"])
async def test_a_wake_that_fails_tells_all_who_wait_and_leaves_the_row_asleep(autojump_clock, how):
    """The publisher's own message, whichever way it said it; the next call tries again and may succeed."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ASLEEP) as publisher,
        trio.open_nursery() as nursery,
    ):
        calls = [start_call(nursery, broker) for _ in range(50)]
        wake = await publisher.next("wake")
        before = broker.llm("qwen")
        await trio.sleep(5)
        match how:
            case "failure":
                publisher.fail(wake, "no such file: ollama", 500)
            case "result":
                await publisher.answer(wake, b"no such ", b"file: ollama\n", status=500)
            case "long result":
                await publisher.answer(wake, b"no such file: ollama" + b" " * 1004, b"beyond 1 KiB", status=404)
        await all_over(calls)
        assert codes(calls) == {"wake_failed"}
        assert {(c.error.message, c.error.status, c.error.should_retry) for c in calls} == {
            ("no such file: ollama", 503, False)
        }
        assert broker.llm("qwen") == before
        assert publisher.events("cancel") == []
        with pytest.raises(TaskAlreadySettled):
            publisher.fail(wake, "again")
        again = start_call(nursery, broker)
        await publisher.answer(await publisher.next("wake"))
        await publisher.answer(await publisher.next("infer"), b"up")
        await again.over.wait()
        assert again.body == b"up"
        counted = broker.statistics()
        assert (counted.wakes_started, counted.wakes_failed, counted.wakes_succeeded) == (2, 1, 1)


async def test_a_wake_whose_upload_breaks_off_has_failed(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ASLEEP) as publisher,
        trio.open_nursery() as nursery,
    ):
        call = start_call(nursery, broker)
        with publisher.upload(await publisher.next("wake")) as upload:
            await upload.send(b"starting")
        await call.over.wait()
        assert call.code == "wake_failed"
        assert statuses(broker) == {"qwen": HIBERNATING}


@pytest.mark.parametrize("wake_s", [None, 40, 300])
async def test_a_wake_that_runs_out_of_time_is_wake_timeout_for_all(autojump_clock, wake_s):
    """Also for the first, whose own clock for this phase began in the same instant. Repeated, for that was a race."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", status=HIBERNATING, wake_s=wake_s)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        for turn in range(10):
            began = trio.current_time()
            calls = [start_call(nursery, broker)]
            wake = await publisher.next("wake")
            assert wake.data["deadline_s"] == (wake_s or 120)
            while trio.current_time() < began + (wake_s or 120) - 30:
                await trio.sleep(30)
                await publisher.heartbeat({"qwen": HIBERNATING})
                calls.append(start_call(nursery, broker))
            await all_over(calls)
            assert codes(calls) == {"wake_timeout"}
            assert {(c.error.status, c.error.should_retry, c.over_at - began) for c in calls} == {
                (504, False, wake_s or 120)
            }
            assert (await publisher.next("cancel")).data == {
                "task_id": wake.data["task_id"],
                "reason": "deadline_exceeded",
            }
            assert len(publisher.events("cancel")) == turn + 1
            assert statuses(broker) == {"qwen": HIBERNATING}
            with pytest.raises(TaskCancelled):
                await publisher.answer(wake)
            await publisher.heartbeat()


async def test_a_wake_that_began_a_few_instructions_after_who_waits_for_it_is_wake_timeout_too(autojump_clock):
    """Real time goes on within a step; the virtual clock does not."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", status=HIBERNATING)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        call = start_call(nursery, broker)
        frame = await publisher.next("wake")
        channel = publisher.channel
        wake = channel.tasks[frame.data["task_id"]]
        channel.deadlines.arm(wake.deadline, wake.deadline.due + 0.001)
        for _ in range(4):
            await trio.sleep(29)
            await publisher.heartbeat({"qwen": HIBERNATING})
        await call.over.wait()
        assert call.code == "wake_timeout"


async def test_the_publisher_dying_fails_all_50_at_once(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ASLEEP) as publisher,
        trio.open_nursery() as nursery,
    ):
        calls = [start_call(nursery, broker) for _ in range(50)]
        await publisher.next("wake")
        now = trio.current_time()
        publisher.disconnect()
        assert (view(broker).waiting, view(broker).waking) == (0, False)
        await all_over(calls)
        assert {(c.code, c.error.status, c.error.retry_after_s, c.over_at) for c in calls} == {
            ("publisher_disconnected", 503, 2, now)
        }
        assert statuses(broker) == {"qwen": INACTIVE}


@pytest.mark.parametrize("how", ["heartbeat", "register"])
async def test_active_counts_as_the_wakes_success(autojump_clock, how):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ASLEEP) as publisher,
        trio.open_nursery() as nursery,
    ):
        calls = await start_calls(nursery, broker, 3)
        wake = await publisher.next("wake")
        if how == "heartbeat":
            assert (await publisher.heartbeat({"qwen": ACTIVE})).llms == {"qwen": ACTIVE}
        else:
            registered = await publisher.register([LLMSpec("qwen", status=ACTIVE)])
            assert registered.llms[0].status is ACTIVE
        assert broker.statistics().wakes_succeeded == 1
        for _ in calls:
            await publisher.answer(await publisher.next("infer"), b"ok")
        await all_over(calls)
        with pytest.raises(TaskAlreadySettled):
            await publisher.answer(wake)
        assert publisher.events("cancel") == []


@pytest.mark.parametrize("how", ["heartbeat", "register", "nothing named"])
async def test_hibernating_is_ignored_while_a_wake_is_under_way(autojump_clock, how):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ASLEEP) as publisher,
        trio.open_nursery() as nursery,
    ):
        call = start_call(nursery, broker)
        wake = await publisher.next("wake")
        match how:
            case "heartbeat":
                await publisher.heartbeat({"qwen": HIBERNATING})
            case "register":
                await publisher.register(ASLEEP)
            case "nothing named":
                await publisher.heartbeat()
        assert view(broker).waking
        assert not call.over.is_set()
        await publisher.answer(wake)
        await publisher.answer(await publisher.next("infer"), b"ok")
        await call.over.wait()
        assert call.body == b"ok"
        assert len(publisher.events("wake")) == 1


async def test_a_row_that_falls_asleep_with_infers_queued_is_woken_for_them(autojump_clock):
    """What it had been sent goes on; those in line wait for the wake and then take their slots."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", max_concurrency=1)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        calls = await start_calls(nursery, broker, 3)
        frame = await publisher.next("infer")
        await publisher.heartbeat({"qwen": HIBERNATING})
        wake = await publisher.next("wake")
        assert (view(broker).in_flight, view(broker).waiting) == (1, 2)
        await publisher.answer(frame, b"0")
        await wait_all_tasks_blocked()
        assert len(publisher.events("infer")) == 1, "nobody is sent to a sleeping row"
        await publisher.answer(wake)
        for body in (b"1", b"2"):
            await publisher.answer(await publisher.next("infer"), body)
        await all_over(calls)
        assert [call.body for call in calls] == [b"0", b"1", b"2"]


async def test_a_sleeping_row_without_callers_is_let_sleep(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
        await publisher.heartbeat({"qwen": HIBERNATING})
        broker.llms()
        broker.llm_views()
        await publisher.heartbeat()
        await publisher.connect()
        assert publisher.events("wake") == []


async def test_two_rows_wake_apart(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [*ASLEEP, LLMSpec("phi", status=HIBERNATING)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        calls = [start_call(nursery, broker, name) for name in ("qwen", "phi")]
        wakes = [await publisher.next("wake") for _ in calls]
        publisher.fail(next(w for w in wakes if w.data["llm"] == "phi"), "no")
        await calls[1].over.wait()
        assert calls[1].code == "wake_failed"
        assert not calls[0].over.is_set()
        assert view(broker).waking
        nursery.cancel_scope.cancel()
