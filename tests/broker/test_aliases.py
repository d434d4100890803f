"""Where an alias leads: its targets in order, each tried where those before it cannot."""

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.broker.helpers import CALL, start_call, start_calls, view
from wakecall import BrokerConfig, LLMSpec, Status
from wakecall.errors import ModelNotFound, ModelOffline, QueueFull
from wakecall.testing import FakePublisher, open_test_broker

ONE_SLOT = {"max_concurrency": 1}


async def answered_by(publisher, body=b"x", status=200):
    frame = await publisher.next("infer", within_s=1)
    await publisher.answer(frame, body, status=status)
    return frame.data["llm"]


async def ask(nursery, broker, publisher, name="any"):
    """Who takes one call of this name."""
    call = start_call(nursery, broker, name)
    llm = await answered_by(publisher)
    await call.over.wait()
    assert call.body == b"x"
    return llm


async def test_the_first_that_can_takes_it(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "box", ["a", "b", "c"]) as box,
        trio.open_nursery() as nursery,
    ):
        await broker.put_alias("any", ["b", "c", "a"])
        assert [await ask(nursery, broker, box) for _ in range(3)] == ["b", "b", "b"], "fallbacks share no load"
        await box.register(["a", "c"])
        assert await ask(nursery, broker, box) == "c"
        await box.register(["a"])
        assert await ask(nursery, broker, box) == "a"
        await box.register(["a", "b", "c"])
        assert await ask(nursery, broker, box) == "b"
        await box.register([])
        with pytest.raises(ModelOffline):
            broker.infer_nowait("any", CALL)


@pytest.mark.parametrize("how", ["never there", "deleted", "no channel", "held"])
async def test_a_target_that_cannot_be_had_is_passed_by(autojump_clock, how):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "box", ["a", "b"]) as box,
        trio.open_nursery() as nursery,
    ):
        await broker.put_alias("any", ["a", "b"])
        match how:
            case "never there":
                await broker.put_alias("any", ["nobody", "b"])
            case "deleted":
                await broker.delete_llm("a")
            case "no channel":
                await broker.delete_llm("a")
                await broker.register("other", [LLMSpec("a")])
            case "held":
                await broker.hold("a", "drain")
        assert await ask(nursery, broker, box) == "b"


async def test_an_alias_to_nothing_is_offline_and_one_that_is_gone_is_unknown(autojump_clock):
    async with open_test_broker() as broker:
        await broker.put_alias("any", ["nobody"])
        with pytest.raises(ModelOffline):
            broker.infer_nowait("any", CALL)
        await broker.delete_alias("any")
        with pytest.raises(ModelNotFound):
            broker.infer_nowait("any", CALL)


async def test_a_full_target_is_passed_by_and_a_busy_one_is_waited_for(autojump_clock):
    config = BrokerConfig(max_waiting_per_llm=1)
    async with (
        open_test_broker(config) as broker,
        FakePublisher(broker, "box", [LLMSpec("a", **ONE_SLOT), LLMSpec("b", **ONE_SLOT)]) as box,
        trio.open_nursery() as nursery,
    ):
        await broker.put_alias("any", ["a", "b"])
        await start_calls(nursery, broker, 4, "any")
        assert [(view(broker, name).in_flight, view(broker, name).waiting) for name in "ab"] == [(1, 1), (1, 1)]
        with pytest.raises(QueueFull):
            broker.infer_nowait("any", CALL)
        assert broker.statistics().accepted == 4
        assert [data["llm"] for data in box.events("infer")] == ["a", "b"]
        nursery.cancel_scope.cancel()


async def test_one_that_would_be_too_slow_is_full(autojump_clock):
    """By the estimate, with the queue's budget of the row."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "box", [LLMSpec("a", queue_s=30, **ONE_SLOT), "b"]) as box,
        trio.open_nursery() as nursery,
    ):
        await broker.put_alias("any", ["a", "b"])
        call = start_call(nursery, broker, "any")
        frame = await box.next("infer")
        await trio.sleep(20)
        await box.answer(frame, b"slow")
        await call.over.wait()
        await start_calls(nursery, broker, 3, "any")
        assert [data["llm"] for data in box.events("infer")] == ["a", "a", "b"]
        assert view(broker, "a").waiting == 1
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("status", [429, 503])
async def test_a_refused_infer_goes_to_the_fallback_and_the_last_refusal_goes_out(autojump_clock, status):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "box", ["a", "b"]) as box,
        trio.open_nursery() as nursery,
    ):
        await broker.put_alias("any", ["a", "b"])
        call = start_call(nursery, broker, "any")
        assert await answered_by(box, b"no", status) == "a"
        assert await answered_by(box, b"yes") == "b"
        await call.over.wait()
        assert call.body == b"yes"
        again = start_call(nursery, broker, "any")
        assert await answered_by(box, b"no", status) == "a"
        assert await answered_by(box, b"no, too", status) == "b"
        await again.over.wait()
        assert (again.reply.status, again.body) == (status, b"no, too")


@pytest.mark.parametrize("status", [400, 500, 502])
async def test_no_other_answer_makes_it_go_on(autojump_clock, status):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "box", ["a", "b"]) as box,
        trio.open_nursery() as nursery,
    ):
        await broker.put_alias("any", ["a", "b"])
        call = start_call(nursery, broker, "any")
        assert await answered_by(box, b"no", status) == "a"
        await call.over.wait()
        assert (call.reply.status, len(box.events("infer"))) == (status, 1)


@pytest.mark.parametrize("how", ["withdrawn", "drained", "wake fails", "wake times out"])
async def test_who_waits_goes_on_when_the_first_cannot_be_had_any_more(autojump_clock, how):
    asleep = how.startswith("wake")
    first = LLMSpec("a", status=Status.HIBERNATING if asleep else Status.ACTIVE, pool="chat", wake_s=40, **ONE_SLOT)
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", [first]) as one,
        FakePublisher(broker, "two", ["b"]) as two,
        trio.open_nursery() as nursery,
    ):
        await broker.put_alias("any", ["chat", "b"])
        if not asleep:
            start_call(nursery, broker, "a")
            await one.next("infer")
        call = start_call(nursery, broker, "any")
        await wait_all_tasks_blocked()
        assert not two.events("infer")
        match how:
            case "withdrawn":
                await one.register([])
            case "drained":
                await broker.hold("chat", "drain")
            case "wake fails":
                one.fail(await one.next("wake"), "no")
            case "wake times out":
                await one.next("wake")
                await trio.sleep(40)
        assert await answered_by(two) == "b"
        await call.over.wait()
        assert call.body == b"x"
        nursery.cancel_scope.cancel()


async def test_what_was_sent_goes_nowhere_else_when_its_publisher_dies(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", ["a"]) as one,
        FakePublisher(broker, "two", ["b"]) as two,
        trio.open_nursery() as nursery,
    ):
        await broker.put_alias("any", ["a", "b"])
        call = start_call(nursery, broker, "any")
        await one.next("infer")
        one.disconnect()
        await call.over.wait()
        assert (call.code, two.events("infer")) == ("publisher_disconnected", [])


async def test_an_operators_name_comes_before_a_publishers(autojump_clock):
    """Over a row's name; and the row itself is still what that name means as a target."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "box", [LLMSpec("gpt", **ONE_SLOT), "b"]) as box,
        trio.open_nursery() as nursery,
    ):
        await broker.put_alias("gpt", ["b"])
        assert await ask(nursery, broker, box, "gpt") == "b"
        await broker.put_alias("gpt", ["gpt", "b"])
        assert await ask(nursery, broker, box, "gpt") == "gpt"
        await broker.delete_alias("gpt")
        assert await ask(nursery, broker, box, "gpt") == "gpt"


async def test_an_alias_leads_to_a_pool_and_then_to_a_row_of_it_that_has_not_refused(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "box", [LLMSpec("a", pool="chat"), LLMSpec("b", pool="chat"), "c"]) as box,
        trio.open_nursery() as nursery,
    ):
        await broker.put_alias("any", ["a", "chat", "c"])
        call = start_call(nursery, broker, "any")
        asked = [await answered_by(box, b"no", 503) for _ in range(2)]
        asked.append(await answered_by(box, b"yes"))
        await call.over.wait()
        assert (asked, call.body) == (["a", "b", "c"], b"yes")


async def test_what_waits_under_an_alias_keeps_to_what_it_meant_when_it_came(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "box", [LLMSpec("a", **ONE_SLOT), "b"]) as box,
        trio.open_nursery() as nursery,
    ):
        await broker.put_alias("any", ["a"])
        first, second = await start_calls(nursery, broker, 2, "any")
        await broker.put_alias("any", ["b"])
        assert [await answered_by(box), await answered_by(box)] == ["a", "a"]
        await second.over.wait()
        assert first.over.is_set()
        assert await ask(nursery, broker, box) == "b"
