"""A publisher that fails is avoided, tried again, and trusted again: what `health` decides, in the broker."""

from dataclasses import replace
from itertools import pairwise

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.broker.helpers import CALL, start_call
from wakecall import BrokerConfig, LLMSpec
from wakecall.errors import DeadlineExceeded, WakecallError
from wakecall.testing import FakePublisher, open_test_broker

# Nobody here sends heartbeats.
PATIENT = BrokerConfig(heartbeat_timeout_s=1e6)


def member(name, slots=1):
    return [LLMSpec(name, pool="qwen", max_concurrency=slots)]


async def answer_all(publisher):
    while True:
        await publisher.answer(await publisher.next("infer", within_s=1e6), b"{}")


async def fail_all(publisher):
    while True:
        publisher.fail(await publisher.next("infer", within_s=1e6), "It is broken.")


async def call(broker):
    """Whether it was answered."""
    try:
        async with broker.infer("qwen", CALL) as reply:
            await reply.read()
    except WakecallError:
        return False
    return True


async def test_one_that_always_fails_is_tried_ever_more_rarely_in_a_quiet_pool(autojump_clock):
    """A call every two seconds: each finds it idle, and by its time alone forgiven, or about to be."""
    async with (
        open_test_broker(PATIENT) as broker,
        FakePublisher(broker, "laptop", member("works")) as works,
        FakePublisher(broker, "desktop", member("broken")) as broken,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(answer_all, works)
        nursery.start_soon(fail_all, broken)
        answered = []
        for _ in range(200):
            answered.append(await call(broker))
            await trio.sleep(2)
        failed = [index for index, well in enumerate(answered) if not well]
        assert len(broken.events("infer")) == len(failed)
        assert [after - before - 1 for before, after in pairwise(failed)] == [2, 4, 8, 16, 32, 64, 64]
        nursery.cancel_scope.cancel()


async def test_one_that_failed_once_is_tried_within_ten_seconds_where_somebody_waits(autojump_clock):
    """Though the other one is busy for long, and nothing else comes by which it could be spared."""
    async with (
        open_test_broker(PATIENT) as broker,
        FakePublisher(broker, "laptop", member("busy")) as busy,
        FakePublisher(broker, "desktop", member("hiccup")) as hiccup,
        trio.open_nursery() as nursery,
    ):
        first, second = start_call(nursery, broker), start_call(nursery, broker)
        await wait_all_tasks_blocked()
        hiccup.fail(await hiccup.next("infer"), "Not now.")
        failed_at = trio.current_time()
        third = start_call(nursery, broker)
        frame = await hiccup.next("infer")
        assert 1.0 <= trio.current_time() - failed_at <= 11.0
        await hiccup.answer(frame, b"{}")
        await third.over.wait()
        assert third.body == b"{}"
        await busy.answer(await busy.next("infer"), b"{}")
        await first.over.wait()
        await second.over.wait()
        assert sorted([first.code, second.code], key=str) == [None, "publisher_error"]


async def test_callers_in_a_hurry_have_nobody_avoided(autojump_clock):
    """Whoever grants less than answers take would have any row avoided by all others; where it is much more, silence is
    the row's doing all the same."""
    async with (
        open_test_broker(PATIENT) as broker,
        FakePublisher(broker, "laptop", member("works")) as works,
        FakePublisher(broker, "desktop", member("silent")) as silent,
        trio.open_nursery() as nursery,
    ):

        async def hurry(name, timeout_s):
            with pytest.raises(DeadlineExceeded):
                async with broker.infer(name, replace(CALL, timeout_s=timeout_s)):
                    raise AssertionError("it was answered")
            cancel = await (works if name == "works" else silent).next("cancel")
            broker.confirm_cancelled(cancel.data["task_id"])
            return [round(each.penalty, 1) for each in broker.llm_views()]

        assert await hurry("works", 5.0) == [0.0, 0.0]  # nobody knows yet how long it takes
        await works.next("infer")
        first = start_call(nursery, broker, "works")
        frame = await works.next("infer")
        await trio.sleep(2)
        await works.answer(frame, b"{}")
        await first.over.wait()
        assert await hurry("works", 1.0) == [0.0, 0.0]
        assert await hurry("silent", 19.0) == [0.0, 0.0]
        assert await hurry("silent", 21.0) == [1.0, 0.0]
        nursery.cancel_scope.cancel()


async def test_one_that_is_avoided_is_tried_when_a_superseded_channel_leaves_nobody_in_better_health(autojump_clock):
    """In the step in which the channel ends: the next one's own first chance at those who wait comes later."""
    async with (
        open_test_broker(PATIENT) as broker,
        FakePublisher(broker, "desktop", member("broken")) as broken,
        trio.open_nursery() as nursery,
    ):
        fails = start_call(nursery, broker, "qwen")
        broken.fail(await broken.next("infer"), "It is broken.")
        await fails.over.wait()
        async with FakePublisher(broker, "laptop", member("works")) as works:
            start_call(nursery, broker, "qwen")
            await works.next("infer")
            start_call(nursery, broker, "qwen")
            await wait_all_tasks_blocked()
            assert len(broken.events("infer")) == 1
            async with broker.open_channel("laptop"):
                assert broker.statistics().waiting == 0
                await wait_all_tasks_blocked()
            assert len(broken.events("infer")) == 2
        nursery.cancel_scope.cancel()
