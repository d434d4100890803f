"""Publishers that take what they get and do nothing with it, or fail it at once: what they cost their callers."""

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.broker.helpers import STREAM, start_call, view
from wakecall import BrokerConfig, LLMSpec
from wakecall.testing import FakePublisher, open_test_broker

BUDGET_S = 30.0
CONFIG = BrokerConfig(first_byte_s=BUDGET_S, cancel_lease_s=1.0)


async def serve(publisher, service_s=0.5):
    """Answer all that comes, and be alive."""

    async def beat():
        while True:
            await trio.sleep(30)
            await publisher.heartbeat()

    async def one(frame):
        await trio.sleep(service_s)
        await publisher.answer(frame, b"data: x\n\n", content_type="text/event-stream")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(beat)
        while True:
            nursery.start_soon(one, await publisher.next("infer", within_s=1e6))


async def beat(publisher):
    while True:
        await trio.sleep(30)
        await publisher.heartbeat()


async def call_every(nursery, broker, seconds, count):
    calls = []
    for _ in range(count):
        calls.append(start_call(nursery, broker, "chat", STREAM))
        await trio.sleep(seconds)
    return calls


def failed(calls):
    return [call for call in calls if call.code is not None]


async def test_one_that_answers_nothing_costs_one_budget_then_is_avoided_then_tried_then_trusted(autojump_clock):
    async with (
        open_test_broker(CONFIG) as broker,
        FakePublisher(broker, "well", [LLMSpec("well", pool="chat", max_concurrency=4)]) as well,
        FakePublisher(broker, "ill", [LLMSpec("ill", pool="chat", max_concurrency=4)]) as ill,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(serve, well)
        nursery.start_soon(beat, ill)
        # Ten a second come, for longer than the budget: all that it has room for are lost with it, and nobody else.
        calls = await call_every(nursery, broker, 0.1, 350)
        await trio.sleep(2 * BUDGET_S)
        lost = failed(calls)
        assert {call.error.phase for call in lost} == {"first_byte"}
        assert 1 <= len(lost) <= 4 + 1, "each of its slots once, and at the most one trial"
        assert all(call.over.is_set() for call in calls)
        # Then it is tried again: one at a time, and each trial is one caller's budget.
        before, began = len(ill.events("infer")), trio.current_time()
        most = 0
        for _ in range(300):
            start_call(nursery, broker, "chat", STREAM)
            await trio.sleep(1)
            most = max(most, view(broker, "ill").in_flight)
        tried = len(ill.events("infer")) - before
        assert most == 1
        assert 1 <= tried <= (trio.current_time() - began) / BUDGET_S
        # It is well again: after a few successes it has as many as the other.
        ill.frames.clear()
        ill._seen.clear()
        nursery.start_soon(serve, ill)
        await call_every(nursery, broker, 1.0, 300)
        assert view(broker, "ill").penalty == 0
        ill_before, well_before = (len(each.events("infer")) for each in (ill, well))
        last = await call_every(nursery, broker, 0.1, 200)
        shares = len(ill.events("infer")) - ill_before, len(well.events("infer")) - well_before
        assert min(shares) > 80, shares
        await trio.sleep(5)
        assert failed(last) == []
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("how", "every_s", "count"), [("failure", 0.02, 2000), ("503", 1.0, 2000)], ids=["busy", "quiet"]
)
async def test_one_that_fails_at_once_gets_under_two_in_a_hundred(autojump_clock, how, every_s, count):
    """And whom it gets as a refusal has an answer all the same."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "well", [LLMSpec(f"well{n}", pool="chat", max_concurrency=4) for n in range(7)]) as well,
        FakePublisher(broker, "ill", [LLMSpec("ill", pool="chat", max_concurrency=4)]) as ill,
        trio.open_nursery() as nursery,
    ):

        async def fail_all():
            while True:
                frame = await ill.next("infer", within_s=1e6)
                if how == "failure":
                    ill.fail(frame, "no")
                else:
                    await ill.answer(frame, b"no", status=503)

        nursery.start_soon(serve, well, 0.3)
        nursery.start_soon(beat, ill)
        nursery.start_soon(fail_all)
        calls = await call_every(nursery, broker, every_s, count)
        await trio.sleep(5)
        got = len(ill.events("infer"))
        assert 1 <= got < count * 0.02
        if how == "503":
            assert {call.body for call in calls} == {b"data: x\n\n"}
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("how", "penalty"),
    [("failure", 1), ("broken off", 1), ("lost", 1), (429, 1), (500, 1), (503, 1), (200, 0), (400, 0), (404, 0)],
)
async def test_what_is_held_against_a_row(autojump_clock, how, penalty):
    """An end of its channel too: else one that every infer ends would be as good as new each time that it is back."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", [LLMSpec("a", pool="chat")]) as one,
        FakePublisher(broker, "two", [LLMSpec("b", pool="chat")]),
        trio.open_nursery() as nursery,
    ):
        call = start_call(nursery, broker, "a")
        frame = await one.next("infer")
        match how:
            case "failure":
                one.fail(frame, "no")
            case "broken off":
                with one.upload(frame):
                    pass
            case "lost":
                one.disconnect()
            case _:
                await one.answer(frame, b"no", status=how)
        await call.over.wait()
        assert view(broker, "a").penalty == penalty


async def test_whoever_names_it_gets_it_however_often_it_has_failed(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "well", [LLMSpec("well", pool="chat")]),
        FakePublisher(broker, "ill", [LLMSpec("ill", pool="chat")]) as ill,
        trio.open_nursery() as nursery,
    ):
        for _ in range(10):
            start_call(nursery, broker, "ill")
            ill.fail(await ill.next("infer", within_s=1), "no")
        assert view(broker, "ill").penalty == 8
        nursery.cancel_scope.cancel()


async def test_alone_it_gets_all_that_come(autojump_clock):
    """An answer that may fail is better than none."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "ill", [LLMSpec(name, pool="chat", max_concurrency=2) for name in "ab"]) as ill,
        trio.open_nursery() as nursery,
    ):
        for _ in range(6):
            start_call(nursery, broker, "chat")
            ill.fail(await ill.next("infer", within_s=1), "no")
        for _ in range(4):
            start_call(nursery, broker, "chat")
        await wait_all_tasks_blocked()
        assert [view(broker, name).in_flight for name in "ab"] == [2, 2]
        nursery.cancel_scope.cancel()


async def test_when_the_last_that_was_well_fails_those_who_wait_are_tried_with_the_others(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "two", [LLMSpec(name, pool="chat", max_concurrency=1) for name in "ab"]) as two,
        trio.open_nursery() as nursery,
    ):
        for _ in range(6):
            start_call(nursery, broker, "a")
            two.fail(await two.next("infer"), "no")
        start_call(nursery, broker, "chat")
        frame = await two.next("infer")
        assert frame.data["llm"] == "b"
        for _ in range(2):
            start_call(nursery, broker, "chat")
        await wait_all_tasks_blocked()
        assert view(broker, "a").in_flight == 0
        two.fail(frame, "no")
        assert [view(broker, name).in_flight for name in "ab"] == [1, 1]
        nursery.cancel_scope.cancel()


async def test_a_client_who_leaves_or_errs_is_held_against_nobody(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "two", [LLMSpec(name, pool="chat") for name in "ab"]) as two,
        trio.open_nursery() as nursery,
    ):
        for _ in range(4):
            call = start_call(nursery, broker, "chat")
            await two.next("infer")
            call.leave()
            start_call(nursery, broker, "chat")
            await two.answer(await two.next("infer"), b"no", status=400)
        assert [view(broker, name).penalty for name in "ab"] == [0, 0]
        nursery.cancel_scope.cancel()
