"""What logs and metrics are told: one event for each outcome, in the deciding step."""

import trio

from tests.broker.helpers import CALL, STREAM, observe, start_calls
from wakecall import BrokerConfig, LLMSpec, Status
from wakecall.errors import ModelNotFound, QueueFull, WakecallError
from wakecall.models import ChannelEvent, InferSettled, SessionEvent, WakeSettled
from wakecall.testing import FakePublisher, check_invariants, open_test_broker

ROWS = [LLMSpec("qwen", max_concurrency=1), LLMSpec("phi", status=Status.HIBERNATING)]


async def test_every_infer_that_was_accepted_has_one_event(autojump_clock):
    """Whatever end it has; those that were never accepted have none."""
    config = BrokerConfig(max_waiting_per_llm=2)
    async with open_test_broker(config) as broker, FakePublisher(broker, "laptop", ROWS) as publisher:
        events = observe(broker)
        infers = [broker.infer_nowait("qwen", CALL) for _ in range(3)]
        for name, error in (("qwen", QueueFull), ("nobody", ModelNotFound)):
            try:
                broker.infer_nowait(name, CALL)
            except error:
                continue
            raise AssertionError
        await trio.sleep(2)
        await publisher.answer(await publisher.next("infer"), b"x", status=201)
        publisher.fail(await publisher.next("infer"), "no")
        (await publisher.next("infer"))
        infers[2].cancel()
        for infer in infers:
            infer.cancel()
        waking = [broker.infer_nowait("phi", STREAM) for _ in range(2)]
        waking[0].cancel()
        publisher.disconnect()
        try:
            broker.infer_nowait("phi", CALL)
        except WakecallError:
            pass
        settled = [event for event in events if isinstance(event, InferSettled)]
        assert [(e.outcome, e.code, e.phase, e.seconds, e.first_byte_s, e.engine_status) for e in settled] == [
            ("completed", "completed", "idle", 2, 2, 201),
            ("failed", "publisher_error", "first_byte", 2, None, None),
            ("cancelled", "client_disconnected", "first_byte", 2, None, None),
            ("cancelled", "client_disconnected", "wake", 0, None, None),
            ("failed", "publisher_disconnected", "wake", 0, None, None),
            ("failed", "model_offline", "offline", 0, None, None),
        ]
        assert len(settled) == broker.statistics().accepted
        assert len({event.task_id for event in settled}) == len(settled)


async def test_every_wake_has_one_event(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ROWS) as publisher,
        trio.open_nursery() as nursery,
    ):
        events = observe(broker)
        for outcome in ("failed", "timed_out", "succeeded", "lost"):
            calls = await start_calls(nursery, broker, 2, "phi")
            wake = await publisher.next("wake")
            await trio.sleep(3)
            match outcome:
                case "failed":
                    publisher.fail(wake, "no")
                case "timed_out":
                    await trio.sleep(60)
                    await publisher.heartbeat()
                    await trio.sleep(60)
                    await publisher.heartbeat()
                case "succeeded":
                    await publisher.answer(wake)
                    for _ in calls:
                        await publisher.answer(await publisher.next("infer"), b"x")
                    await publisher.heartbeat({"phi": Status.HIBERNATING})
                case "lost":
                    publisher.disconnect()
            for call in calls:
                await call.over.wait()
        wakes = [event for event in events if isinstance(event, WakeSettled)]
        assert [(e.llm, e.outcome, e.seconds, e.waiters) for e in wakes] == [
            ("phi", "failed", 3, 2),
            ("phi", "timed_out", 120, 2),
            ("phi", "succeeded", 3, 2),
            ("phi", "lost", 3, 2),
        ]


async def test_sessions_and_channels_come_and_go(autojump_clock):
    async with open_test_broker() as broker:
        events = observe(broker)
        async with FakePublisher(broker, "laptop", ["qwen"]) as publisher:
            infer = broker.infer_nowait("qwen", CALL)
            await publisher.next("infer")
            await publisher.connect()
            assert infer.is_over
            await publisher.goodbye()
        async with FakePublisher(broker, "desktop", []):
            pass
        await broker.evict("desktop")
        await broker.register("idle", [])
        await trio.sleep(5 * 3600)
        said = [e for e in events if isinstance(e, SessionEvent | ChannelEvent)]
        assert said == [
            SessionEvent("registered", "laptop", 1),
            ChannelEvent("open", "laptop", 1),
            ChannelEvent("ended", "laptop", 1, "superseded", 1),
            ChannelEvent("open", "laptop", 2),
            ChannelEvent("ended", "laptop", 2, "goodbye", 0),
            SessionEvent("goodbye", "laptop", 1),
            SessionEvent("registered", "desktop", 0),
            ChannelEvent("open", "desktop", 1),
            ChannelEvent("ended", "desktop", 1, "disconnected", 0),
            SessionEvent("evicted", "desktop", 0),
            SessionEvent("registered", "idle", 0),
            SessionEvent("expired", "idle", 0),
        ]


async def test_an_observer_that_raises_is_logged_and_harms_nobody(autojump_clock, caplog):
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:

        def faulty(event):
            raise ZeroDivisionError

        broker.add_observer(faulty)
        events = observe(broker)
        infer = broker.infer_nowait("qwen", CALL)
        await publisher.answer(await publisher.next("infer"), b"x")
        assert await (await infer.wait_head()).read() == b"x"
        assert len(events) == 1
        assert "an observer failed" in caplog.text


async def test_an_observer_sees_the_invariant_hold(autojump_clock):
    """An outcome is told after the task has left its place: whoever counts in there counts right."""
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ROWS) as publisher:
        seen = []
        broker.add_observer(lambda event: seen.append(check_invariants(broker)))
        infers = [broker.infer_nowait(name, CALL) for name in ("qwen", "qwen", "qwen", "phi", "phi")]
        await publisher.answer(await publisher.next("infer"), b"x")
        publisher.fail(await publisher.next("wake"), "no")
        infers[1].cancel()
        publisher.disconnect()
        assert len(seen) == 5 + 1 + 1  # the infers, the wake, the channel
