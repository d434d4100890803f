"""Pools: several rows that answer to one name, and the one line before them."""

from collections import Counter

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.broker.helpers import CALL, codes, start_call, start_calls, view
from wakecall import BrokerConfig, InferRequest, LLMSpec, Status
from wakecall.dispatch import Dispatcher
from wakecall.errors import InvalidRequest, LLMNameTaken, ModelNotFound, ModelOffline, QueueFull, TooMany
from wakecall.models import Alias, PoolView
from wakecall.placing import Placer
from wakecall.testing import FakePublisher, open_test_broker

ACTIVE, HIBERNATING = Status.ACTIVE, Status.HIBERNATING
BATCH = InferRequest("/v1/chat/completions", b"{}", priority="batch")


def pool_of(*names, pool="chat", **more):
    return [LLMSpec(name, pool=pool, **{"max_concurrency": 1, **more}) for name in names]


async def answer(publisher, body=b"x"):
    frame = await publisher.next("infer")
    await publisher.answer(frame, body)
    return frame.data["llm"]


def waiting(broker):
    return [pool.waiting for pool in broker.pool_views()]


# Names --------------------------------------------------------------------------------------------------------------


async def test_a_pool_is_asked_by_its_name_and_its_rows_by_theirs(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", pool_of("a", "b")) as publisher,
        trio.open_nursery() as nursery,
    ):
        assert broker.pool_views() == [PoolView("chat", "local", ("a", "b"), 0)]
        calls = [start_call(nursery, broker, "b")]
        assert await answer(publisher) == "b"
        calls += [start_call(nursery, broker, "chat") for _ in range(2)]
        assert {await answer(publisher), await answer(publisher)} == {"a", "b"}
        for call in calls:
            await call.over.wait()
        assert codes(calls) == {None}
        with pytest.raises(ModelNotFound):
            broker.infer_nowait("chats", CALL)


@pytest.mark.parametrize(
    ("there", "then", "param"),
    [
        (["qwen"], [LLMSpec("a"), LLMSpec("b", pool="qwen")], "llms[1].pool"),
        (pool_of("a"), [LLMSpec("chat")], "llms[0].name"),
        ([], [LLMSpec("a"), LLMSpec("b", pool="a")], "llms[1].pool"),
        ([], [LLMSpec("a", pool="a")], "llms[0].pool"),
    ],
    ids=["a row's name", "a pool's name", "within one register", "its own"],
)
async def test_rows_and_pools_have_their_names_from_one_stock(autojump_clock, there, then, param):
    async with open_test_broker() as broker, FakePublisher(broker, "one", there):
        with pytest.raises(LLMNameTaken) as caught:
            await broker.register("two", then)
        assert (caught.value.status, caught.value.param) == (409, param)
        assert len(broker.session_views()) == 1, "all or nothing"


async def test_a_pool_is_one_owners(autojump_clock):
    """Else anybody could join, and be sent what its callers say."""
    async with open_test_broker() as broker, FakePublisher(broker, "one", pool_of("a"), owner="anna"):
        with pytest.raises(LLMNameTaken) as caught:
            await broker.register("two", [LLMSpec("x"), *pool_of("b")], owner="ben")
        assert caught.value.param == "llms[1].pool"
        await broker.register("three", pool_of("b"), owner="anna")
        assert broker.pool_views() == [PoolView("chat", "anna", ("a", "b"), 0)]


@pytest.mark.parametrize("field", ["pool", "group"])
async def test_a_name_that_is_none_is_none_of_a_pool_either(autojump_clock, field):
    async with open_test_broker() as broker:
        with pytest.raises(InvalidRequest) as caught:
            await broker.register("one", [LLMSpec("a", **{field: "no name"})])
        assert caught.value.param == f"llms[0].{field}"


async def test_the_rows_of_a_pool_are_bounded(autojump_clock):
    async with open_test_broker(BrokerConfig(max_llms_per_pool=3)) as broker:
        await broker.register("one", pool_of("a", "b"))
        with pytest.raises(TooMany) as caught:
            await broker.register("two", [LLMSpec("x"), *pool_of("c", "d")])
        assert caught.value.param == "llms[2].pool"
        await broker.register("two", pool_of("c"))
        await broker.register("one", pool_of("a", "b"))  # as before: nothing is counted twice
        with pytest.raises(TooMany):
            await broker.register("three", pool_of("d"))
        await broker.register("one", pool_of("a", "b", pool=None))
        await broker.register("three", pool_of("d", "e"))


async def test_a_name_is_free_when_the_pools_last_row_has_left_it(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "one", pool_of("a")) as publisher:
        await publisher.register(["a"])
        assert broker.pool_views() == []
        with pytest.raises(ModelNotFound):
            broker.infer_nowait("chat", CALL)
        await broker.register("two", [LLMSpec("chat")], owner="ben")


# Late binding -------------------------------------------------------------------------------------------------------


async def test_whichever_row_is_free_first_takes_whoever_is_first(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", pool_of("a")) as one,
        FakePublisher(broker, "two", pool_of("b")) as two,
        trio.open_nursery() as nursery,
    ):
        calls = await start_calls(nursery, broker, 6, "chat")
        assert waiting(broker) == [4]
        await one.next("infer")
        for body in (b"1", b"2", b"3", b"4", b"5"):
            await answer(two, body)  # the other stands still, and nobody is bound to it
        for call in calls[2:]:
            await call.over.wait()
        assert [call.body for call in calls[2:]] == [b"2", b"3", b"4", b"5"]
        assert len(one.events("infer")) == 1
        nursery.cancel_scope.cancel()


async def test_those_who_name_a_row_and_those_who_do_not_share_its_line(autojump_clock):
    """First come first served among them; and who waits for another row delays nobody."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", pool_of("a")) as one,
        FakePublisher(broker, "two", pool_of("b")) as two,
        trio.open_nursery() as nursery,
    ):
        await start_calls(nursery, broker, 2, "chat")
        order = []
        for name in ("a", "chat", "b", "chat", "a"):
            order += await start_calls(nursery, broker, 1, name)
        assert (waiting(broker), view(broker, "a").waiting, view(broker, "b").waiting) == ([2], 2, 1)
        for body in (b"-", b"0", b"1", b"3", b"4"):
            await answer(one, body)
        for body in (b"-", b"2"):
            await answer(two, body)
        for call in order:
            await call.over.wait()
        assert [call.body for call in order] == [b"0", b"1", b"2", b"3", b"4"]


async def test_one_who_comes_while_others_wait_for_another_row_takes_the_free_one(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", pool_of("a", "b")) as publisher,
        trio.open_nursery() as nursery,
    ):
        await start_calls(nursery, broker, 2, "a")
        call = start_call(nursery, broker, "chat")
        await publisher.next("infer")
        frame = await publisher.next("infer")
        assert frame.data["llm"] == "b"
        await publisher.answer(frame, b"x")
        await call.over.wait()
        nursery.cancel_scope.cancel()


async def test_the_line_of_a_pool_is_bounded_as_a_rows_is(autojump_clock):
    async with (
        open_test_broker(BrokerConfig(max_waiting_per_llm=2)) as broker,
        FakePublisher(broker, "one", pool_of("a", "b")),
        trio.open_nursery() as nursery,
    ):
        await start_calls(nursery, broker, 4, "chat")
        with pytest.raises(QueueFull):
            broker.infer_nowait("chat", CALL)
        await start_calls(nursery, broker, 2, "a")  # by its own name there is room of its own
        with pytest.raises(QueueFull):
            broker.infer_nowait("a", CALL)
        nursery.cancel_scope.cancel()


# Fairness -----------------------------------------------------------------------------------------------------------


async def callers(broker, count):
    keys = [await broker.create_key("client") for _ in range(count)]
    return [broker.authenticate(made.secret) for made in keys]


def ask(broker, caller, request=CALL, name="chat"):
    return broker.infer_nowait(name, request, claim=broker.claim(caller))


async def test_keys_take_turns_and_within_one_it_is_first_come_first_served(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "one", pool_of("a")) as publisher:
        many, few = await callers(broker, 2)
        infers = {ask(broker, many): "first"}
        infers |= {ask(broker, many): f"many{number}" for number in range(6)}
        infers |= {ask(broker, few): f"few{number}" for number in range(2)}
        assert (many.waiting, few.waiting) == (6, 2)
        order = []
        for _ in range(9):
            frame = await publisher.next("infer")
            order.append(next(name for infer, name in infers.items() if infer.task_id == frame.data["task_id"]))
            await publisher.answer(frame, b"x")
        assert order[0] == "first"
        assert sorted(order[1:5]) == ["few0", "few1", "many0", "many1"]
        assert [name for name in order if "few" in name] == ["few0", "few1"]
        assert order[5:] == ["many2", "many3", "many4", "many5"]
        assert (many.waiting, few.waiting, many.in_flight, few.in_flight) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("bounds", "waiting"),
    [
        ({"max_waiting_per_llm": 12}, [6, 3, 2]),
        ({"max_waiting": 12}, [6, 3, 2]),
        ({"max_waiting_per_llm": 12, "max_waiting_per_key": 2}, [2, 2, 2]),
    ],
)
async def test_no_key_takes_all_places_in_a_line(autojump_clock, bounds, waiting):
    """Each has as many as are still free, so whoever comes with nothing waiting is let in: to be fair in the line is worth
    nothing to somebody who is kept out of it."""
    async with open_test_broker(BrokerConfig(**bounds)) as broker, FakePublisher(broker, "one", pool_of("a")):
        *greedy, modest = await callers(broker, len(waiting) + 1)
        ask(broker, modest)  # has the slot
        for caller, most in zip(greedy, waiting, strict=True):
            for _ in range(most):
                ask(broker, caller)
            with pytest.raises(QueueFull):
                ask(broker, caller)
        ask(broker, modest)
        assert [caller.waiting for caller in (*greedy, modest)] == [*waiting, 1]


async def test_a_key_that_moves_is_not_counted_twice(autojump_clock):
    """What waits for a row that goes has its place among all who wait, and goes on to the fallback with it."""
    async with (
        open_test_broker(BrokerConfig(max_waiting=4)) as broker,
        FakePublisher(broker, "one", pool_of("a")) as one,
        FakePublisher(broker, "two", [LLMSpec("b", max_concurrency=1)]),
    ):
        await broker.put_alias("best", ["chat", "b"])
        (caller,) = await callers(broker, 1)
        ask(broker, caller, name="b")
        infers = [ask(broker, caller, name="best") for _ in range(3)]
        assert caller.waiting == 2
        await one.register([])
        assert [infer.is_over for infer in infers[1:]] == [False, False]
        assert (caller.waiting, view(broker, "b").waiting) == (2, 2)


async def test_batch_waits_for_whoever_is_in_a_hurry_and_does_not_starve(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "one", pool_of("a")) as publisher:
        running = broker.infer_nowait("chat", CALL)
        batch = [broker.infer_nowait("chat", BATCH) for _ in range(3)]
        quick = [broker.infer_nowait("chat", CALL) for _ in range(20)]
        kinds = {running.task_id: "first"} | {infer.task_id: "batch" for infer in batch}
        order = []
        for _ in range(24):
            frame = await publisher.next("infer")
            order.append(kinds.get(frame.data["task_id"], "quick"))
            await publisher.answer(frame, b"x")
        assert all(infer.is_over for infer in (*batch, *quick))
        assert order[1:11] == ["quick"] * 9 + ["batch"]
        assert order[-1] == "batch"
        assert Counter(order) == {"first": 1, "batch": 3, "quick": 20}


# Rows come and go ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["a new row", "a row without a pool", "from another pool"])
async def test_a_row_that_joins_takes_those_who_wait(autojump_clock, how):
    before = {"a new row": [], "a row without a pool": ["b"], "from another pool": pool_of("b", pool="other")}[how]
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", pool_of("a")) as one,
        FakePublisher(broker, "two", before) as two,
        trio.open_nursery() as nursery,
    ):
        await start_calls(nursery, broker, 3, "chat")
        await one.next("infer")
        await two.register(pool_of("b"))
        assert (await two.next("infer")).data["llm"] == "b"
        assert waiting(broker) == [1]
        nursery.cancel_scope.cancel()


async def test_a_row_that_leaves_takes_along_who_waits_for_it_by_name(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", pool_of("a", "b")) as publisher,
        trio.open_nursery() as nursery,
    ):
        await start_calls(nursery, broker, 2, "chat")
        named = await start_calls(nursery, broker, 2, "b")
        await start_calls(nursery, broker, 1, "chat")
        await publisher.register([*pool_of("a"), LLMSpec("b", max_concurrency=1)])
        assert broker.pool_views() == [PoolView("chat", "local", ("a",), 1)]
        assert view(broker, "b").waiting == 2
        frames = [await publisher.next("infer") for _ in range(2)]
        (frame,) = [frame for frame in frames if frame.data["llm"] == "b"]
        for body in (b"-", b"0", b"1"):
            await publisher.answer(frame, body)
            if body != b"1":
                frame = await publisher.next("infer")
                assert frame.data["llm"] == "b"
        for call in named:
            await call.over.wait()
        assert [call.body for call in named] == [b"0", b"1"]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("how", ["leaves", "withdrawn", "goodbye", "lost", "deleted", "handed over", "session handed"])
async def test_who_waits_for_a_pool_whose_last_row_is_gone_goes_on_or_fails(autojump_clock, how, fallback):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", pool_of("a")) as publisher,
        FakePublisher(broker, "two", ["spare"]) as spare,
        trio.open_nursery() as nursery,
    ):
        broker._directory.put_alias("any", Alias("any", ("chat", "spare"), 0.0))
        await start_calls(nursery, broker, 1, "chat")
        await publisher.next("infer")
        calls = await start_calls(nursery, broker, 2, "any" if fallback else "chat")
        match how:
            case "leaves":
                await publisher.register(["a"])
            case "withdrawn":
                await publisher.register([])
            case "goodbye":
                await publisher.goodbye()
            case "lost":
                publisher.disconnect()
            case "deleted":
                await broker.delete_llm("a")
            case "handed over":
                await broker.hand_over_llm("a", "ben")
            case "session handed":
                await broker.hand_over_session("one", "ben")
        if fallback:
            for _ in calls:
                await answer(spare, b"spare")
        for call in calls:
            await call.over.wait()
        if fallback:
            assert {call.body for call in calls} == {b"spare"}
        else:
            assert codes(calls) == {"model_offline"}
        if how in ("deleted", "handed over", "session handed", "leaves"):
            assert broker.pool_views() == []
        else:
            with pytest.raises(ModelOffline):
                broker.infer_nowait("chat", CALL)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("how", ["leaves", "withdrawn", "lost", "deleted", "handed over"])
@pytest.mark.parametrize("first", ["busy", "waking"])
async def test_when_the_row_that_was_waited_for_is_gone_another_is_woken(autojump_clock, how, first):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", pool_of("a", status=ACTIVE if first == "busy" else HIBERNATING)) as one,
        trio.open_nursery() as nursery,
    ):
        calls = await start_calls(nursery, broker, 2, "chat")
        async with FakePublisher(broker, "two", pool_of("b", status=HIBERNATING, max_concurrency=2)) as two:
            assert two.events("wake") == []
            match how:
                case "leaves":
                    await one.register([LLMSpec("a", max_concurrency=1)])
                case "withdrawn":
                    await one.register([])
                case "lost":
                    one.disconnect()
                case "deleted":
                    await broker.delete_llm("a")
                case "handed over":
                    await broker.hand_over_llm("a", "ben")
            with trio.fail_after(1):
                await two.answer(await two.next("wake"))
                for _ in calls if first == "waking" else calls[1:]:
                    await answer(two, b"b")
                for call in calls if first == "waking" else calls[1:]:
                    await call.over.wait()
            assert calls[1].body == b"b"
            assert len(two.events("wake")) == 1
            assert len(one.events("wake")) == (first == "waking")
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("fails_after_s", [10, None])
async def test_the_wake_of_the_next_one_that_sleeps_has_a_time_of_its_own(autojump_clock, fails_after_s):
    """Also after one that ran out of time, though whoever waits for it began to in the same instant."""
    async with (
        open_test_broker(BrokerConfig(wake_s=30)) as broker,
        FakePublisher(broker, "one", pool_of("a", status=HIBERNATING)) as one,
        FakePublisher(broker, "two", pool_of("b", status=HIBERNATING)) as two,
        trio.open_nursery() as nursery,
    ):
        began = trio.current_time()
        call = start_call(nursery, broker, "chat")
        wake = await one.next("wake")
        if fails_after_s is not None:
            await trio.sleep(fails_after_s)
            await one.answer(wake, b"no", status=500)
        await two.next("wake", within_s=35)
        second = trio.current_time()
        assert second == began + (fails_after_s or 30)
        await call.over.wait()
        assert (call.code, call.over_at) == ("wake_timeout", second + 30)


async def test_who_waits_for_a_slot_has_his_deadline_though_a_wake_ends_in_the_same_instant(autojump_clock):
    """Repeated, for that is a race."""
    for _ in range(8):
        async with (
            open_test_broker(BrokerConfig(queue_s=30)) as broker,
            FakePublisher(broker, "one", pool_of("a")) as one,
            FakePublisher(broker, "two", pool_of("b", status=HIBERNATING, wake_s=30)) as two,
            trio.open_nursery() as nursery,
        ):
            start_call(nursery, broker, "a")
            await one.next("infer")
            began = trio.current_time()
            sleeper, waits = start_call(nursery, broker, "b"), start_call(nursery, broker, "chat")
            await two.next("wake")
            with trio.fail_after(40):
                await waits.over.wait()
            await sleeper.over.wait()
            assert (waits.code, waits.error.phase, waits.over_at - began) == ("deadline_exceeded", "queue", 30)
            nursery.cancel_scope.cancel()


async def test_a_wake_that_fails_at_once_is_not_tried_again_at_once_for_those_who_wait_for_a_slot(autojump_clock):
    async with (
        open_test_broker(BrokerConfig(queue_s=60)) as broker,
        FakePublisher(broker, "one", pool_of("a")) as one,
        FakePublisher(broker, "two", pool_of("b", status=HIBERNATING, wake_s=4)) as two,
        trio.open_nursery() as nursery,
    ):
        start_call(nursery, broker, "chat")
        frame = await one.next("infer")
        await trio.sleep(20)
        await one.answer(frame)  # so long it takes: to wake the other is quicker
        start_call(nursery, broker, "chat")
        await one.next("infer")
        waits = start_call(nursery, broker, "chat")
        await two.answer(await two.next("wake"), b"no", status=500)
        await trio.sleep(0.5)
        assert len(two.events("wake")) == 1
        assert not waits.over.is_set()
        nursery.cancel_scope.cancel()


async def test_what_many_wait_for_is_looked_at_once_and_not_for_each_of_them(autojump_clock, monkeypatch):
    """In numbers, not in seconds: one publisher's loss stood the loop still for as long as its rows times who waits."""
    looks = Counter()
    for look in (Placer.candidates, Placer.load_of):

        def counted(self, *args, look=look):
            looks[look.__name__] += 1
            return look(self, *args)

        monkeypatch.setattr(Placer, look.__name__, counted)
    names = [f"row-{number}" for number in range(30)]
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "many", pool_of(*names)) as many,
        FakePublisher(broker, "one", pool_of("a")),
        trio.open_nursery() as nursery,
    ):
        await start_calls(nursery, broker, 31 + 100, "chat")
        looks.clear()
        assert len(broker.task_views()) == 31 + 100
        assert looks == {"candidates": 1, "load_of": 31}
        looks.clear()
        many.disconnect()
        assert waiting(broker) == [100]
        assert looks["candidates"] < 5 * len(names), "rows times who waits: 3,000"
        nursery.cancel_scope.cancel()


async def test_a_loss_looks_at_what_is_left_once_and_not_for_each_row_and_each_infer_that_it_fails(
    autojump_clock, monkeypatch
):
    """In numbers too: each slot that it freed had all rows looked at, and each row all who wait."""
    looks = Counter()
    for owner, look in ((Placer, Placer.load_of), (Dispatcher, Dispatcher.strand), (Dispatcher, Dispatcher.pump)):

        def counted(self, *args, look=look, **more):
            looks[look.__name__] += 1
            return look(self, *args, **more)

        monkeypatch.setattr(owner, look.__name__, counted)
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "many", pool_of(*(f"row-{number}" for number in range(30)), max_concurrency=2)) as many,
        FakePublisher(broker, "one", pool_of("a")),
        trio.open_nursery() as nursery,
    ):
        await start_calls(nursery, broker, 61 + 20, "chat")
        looks.clear()
        many.disconnect()
        assert broker.statistics().failed == 60
        assert waiting(broker) == [20]
        assert looks["strand"] == 1
        assert looks["pump"] <= 2 * 31
        assert looks["load_of"] <= 4 * 31
        nursery.cancel_scope.cancel()


async def test_handed_over_a_row_is_in_no_pool(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", pool_of("a", "b")) as publisher,
        trio.open_nursery() as nursery,
    ):
        await broker.hand_over_llm("a", "ben")
        assert broker.pool_views() == [PoolView("chat", "local", ("b",), 0)]
        assert broker.llm("a").pool is None
        start_call(nursery, broker, "chat")
        assert await answer(publisher) == "b"
        await broker.hand_over_session("one", "ben")
        assert broker.pool_views() == []
        assert broker.llm("b").pool is None


async def test_a_pools_row_that_comes_back_is_in_its_pool_again(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "one", pool_of("a")) as publisher,
        trio.open_nursery() as nursery,
    ):
        publisher.disconnect()
        await wait_all_tasks_blocked()
        with pytest.raises(ModelOffline):
            broker.infer_nowait("chat", CALL)
        await publisher.connect()
        call = start_call(nursery, broker, "chat")
        await answer(publisher, b"back")
        await call.over.wait()
        assert call.body == b"back"
