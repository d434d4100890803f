"""`broker.publish`: a publisher in the broker's own process, alive while its block is."""

import gc
import warnings

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.broker.helpers import CALL, STREAM, start_call, start_calls, statuses, view
from wakecall import BrokerConfig, InferReply, LLMSpec, MemoryStore, Status
from wakecall.errors import (
    InvalidRequest,
    LLMIsPublic,
    LLMNameTaken,
    ModelOffline,
    PublisherError,
    ShuttingDown,
    WakeFailed,
)
from wakecall.testing import FakePublisher, open_test_broker


async def ask(broker, name="echo", request=CALL):
    async with broker.infer(name, request) as reply:
        return reply.status, reply.headers.get("content-type"), await reply.read()


async def test_bytes(autojump_clock):
    async def handler(request):
        return b"echo " + request.body

    async with open_test_broker() as broker, broker.publish("echo", handler):
        assert await ask(broker) == (200, "application/json", b"echo " + CALL.body)


async def test_a_generator_streams(autojump_clock):
    """Each piece as it comes; an answer to a stream is an event stream unless it says otherwise."""
    gate = trio.Event()

    async def handler(request):
        yield b"data: 1\n\n"
        await gate.wait()
        yield b"data: 2\n\n"

    async with open_test_broker() as broker, broker.publish("echo", handler):
        async with broker.infer("echo", STREAM) as reply:
            assert reply.headers == {"content-type": "text/event-stream"}
            assert await reply.receive() == b"data: 1\n\n"
            gate.set()
            assert await reply.receive() == b"data: 2\n\n"
            assert await reply.receive() == b""
        assert (await ask(broker))[1:] == ("application/json", b"data: 1\n\ndata: 2\n\n")


async def test_a_handler_may_return_an_iterator(autojump_clock):
    async def pieces():
        for i in range(3):
            yield str(i).encode()

    async def handler(request):
        return pieces()

    async with open_test_broker() as broker, broker.publish("echo", handler):
        assert (await ask(broker))[2] == b"012"


async def test_an_infer_reply_says_status_and_type(autojump_clock):
    async def pieces():
        yield b"x"

    async def handler(request):
        return InferReply(pieces() if request.stream else b"no", status=429, content_type="text/plain")

    async with open_test_broker() as broker, broker.publish("echo", handler):
        assert await ask(broker) == (429, "text/plain", b"no")
        assert await ask(broker, request=STREAM) == (429, "text/plain", b"x")


async def test_a_handler_that_raises_fails_its_one_infer(autojump_clock, caplog):
    """The caller learns the kind of exception; neither he nor the log its text, which may hold the prompt."""

    async def handler(request):
        if request is CALL:
            raise ValueError(request.body.decode())
        return b"fine"

    async with open_test_broker() as broker, broker.publish("echo", handler):
        with pytest.raises(PublisherError) as caught:
            await ask(broker)
        assert caught.value.status == 502
        assert "ValueError" in caught.value.message
        assert "ValueError" in caplog.text
        assert CALL.body.decode() not in caught.value.message + caplog.text
        assert (await ask(broker, request=STREAM))[2] == b"fine"


async def test_a_generator_that_raises_in_the_middle_says_so(autojump_clock):
    async def handler(request):
        yield b"half"
        raise ValueError("SECRET")

    async with open_test_broker() as broker, broker.publish("echo", handler):
        async with broker.infer("echo", STREAM) as reply:
            assert await reply.receive() == b"half"
            with pytest.raises(PublisherError, match="ValueError"):
                await reply.receive()


@pytest.mark.parametrize("answer", ["text", None, InferReply(b"x", status=42)], ids=["str", "None", "status"])
async def test_an_answer_that_is_none_fails_the_infer(autojump_clock, answer):
    async def handler(request):
        return answer

    async with open_test_broker() as broker, broker.publish("echo", handler):
        with pytest.raises(PublisherError):
            await ask(broker)


async def test_a_handler_is_cancelled_when_its_caller_leaves(autojump_clock):
    """And its generator is closed there and then, not by the collector."""
    ended = []

    async def plain(request):
        try:
            await trio.sleep_forever()
        finally:
            ended.append("plain")

    async def stream(request):
        try:
            yield b"x"
            await trio.sleep_forever()
        finally:
            ended.append("stream")

    async def greedy(request):
        try:
            while True:
                yield b"x" * 100
        finally:
            ended.append("greedy")

    config = BrokerConfig(reply_buffer_bytes=1000)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with (
            open_test_broker(config) as broker,
            broker.publish("plain", plain),
            broker.publish("stream", stream),
            broker.publish("greedy", greedy),
            trio.open_nursery() as nursery,
        ):
            for name in ("plain", "stream", "greedy"):
                call = start_call(nursery, broker, name, STREAM, reads=False)
                await wait_all_tasks_blocked()
                assert view(broker, name).in_flight == 1
                call.leave()
                await wait_all_tasks_blocked()
                assert ended[-1] == name
                assert view(broker, name).in_flight == 0
        gc.collect()
    assert caught == []


async def test_max_concurrency_bounds_its_handlers(autojump_clock):
    running, most = 0, 0

    async def handler(request):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await trio.sleep(1)
        running -= 1
        return b"x"

    async with (
        open_test_broker() as broker,
        broker.publish("echo", handler, max_concurrency=3),
        trio.open_nursery() as nursery,
    ):
        calls = await start_calls(nursery, broker, 10, "echo")
        for call in calls:
            await call.over.wait()
        assert most == 3


async def test_on_wake_is_awaited_before_the_first_infer(autojump_clock):
    order = []

    async def on_wake():
        await trio.sleep(20)
        order.append("wake")

    async def handler(request):
        order.append("infer")
        return b"x"

    async with (
        open_test_broker() as broker,
        broker.publish("echo", handler, hibernating=True, on_wake=on_wake),
        trio.open_nursery() as nursery,
    ):
        assert statuses(broker) == {"echo": Status.HIBERNATING}
        await start_calls(nursery, broker, 3, "echo")
        await trio.sleep(21)
        assert order == ["wake", "infer", "infer", "infer"]
        assert statuses(broker) == {"echo": Status.ACTIVE}


async def test_a_wake_handler_that_raises_fails_the_wake_with_its_text(autojump_clock):
    wakes = 0

    async def on_wake():
        nonlocal wakes
        wakes += 1
        if wakes == 1:
            raise OSError("no such machine")

    async def handler(request):
        return b"x"

    async with open_test_broker() as broker, broker.publish("echo", handler, hibernating=True, on_wake=on_wake):
        with pytest.raises(WakeFailed, match="no such machine"):
            await ask(broker)
        assert statuses(broker) == {"echo": Status.HIBERNATING}
        assert (await ask(broker))[2] == b"x"


async def test_a_name_that_is_taken(autojump_clock):
    async def handler(request):
        return b"mine"

    async with open_test_broker() as broker:
        await broker.put_public_llm("gpt", type="openai", model="gpt", url="http://127.0.0.1:1/v1")
        async with broker.publish("echo", handler):
            for name, error in (("echo", LLMNameTaken), ("gpt", LLMIsPublic), ("no name", InvalidRequest)):
                with pytest.raises(error):
                    async with broker.publish(name, handler):
                        pass
            assert len(broker.session_views()) == 1
            assert (await ask(broker))[2] == b"mine"
        async with broker.publish("echo", handler):
            assert (await ask(broker))[2] == b"mine"


async def test_leaving_the_block_fails_what_is_under_way_and_withdraws_the_row(autojump_clock):
    async def handler(request):
        await trio.sleep_forever()

    async with open_test_broker() as broker, trio.open_nursery() as nursery:
        async with broker.publish("echo", handler, max_concurrency=1):
            calls = await start_calls(nursery, broker, 2, "echo")
        for call in calls:
            await call.over.wait()
        assert [call.code for call in calls] == ["publisher_disconnected", "model_offline"]
        assert statuses(broker) == {"echo": Status.INACTIVE}
        assert broker.session_views() == []
        with pytest.raises(ModelOffline):
            broker.infer_nowait("echo", CALL)


@pytest.mark.parametrize("error", [ZeroDivisionError, ModelOffline])
async def test_the_blocks_exception_comes_out_unwrapped(autojump_clock, error):
    async def handler(request):
        return b"x"

    async def block(broker):
        async with broker.publish("echo", handler):
            raise error

    async with open_test_broker() as broker:
        with pytest.raises(error):
            await block(broker)
        assert broker.session_views() == []


async def test_a_block_that_is_cancelled_while_it_registers_leaves_nothing(autojump_clock):
    async def handler(request):
        return b"x"

    async with open_test_broker() as broker:
        with trio.CancelScope() as scope:
            scope.cancel()
            async with broker.publish("echo", handler):
                raise AssertionError
        assert scope.cancelled_caught
        assert broker.session_views() == []
        async with broker.publish("echo", handler):
            assert (await ask(broker))[2] == b"x"


async def test_it_lives_for_hours(autojump_clock):
    async def handler(request):
        return b"x"

    async with open_test_broker() as broker, broker.publish("echo", handler):
        await trio.sleep(24 * 3600)
        assert (await ask(broker))[2] == b"x"


async def test_a_store_that_hangs_neither_kills_it_nor_keeps_its_block(autojump_clock):
    class Hanging(MemoryStore):
        hangs = False

        async def write(self, batch):
            if self.hangs:
                await trio.sleep_forever()
            await super().write(batch)

    async def handler(request):
        return b"x"

    store = Hanging()
    async with open_test_broker(store=store) as broker:
        async with broker.publish("echo", handler):
            store.hangs = True
            await trio.sleep(600)
            assert (await ask(broker))[2] == b"x"
            began = trio.current_time()
        assert trio.current_time() == began
        assert statuses(broker) == {"echo": Status.INACTIVE}


async def test_a_stopping_broker_publishes_nothing(autojump_clock):
    async def handler(request):
        return b"x"

    async with open_test_broker() as broker:
        async with broker.publish("echo", handler):
            await broker.drain(0)
            assert statuses(broker) == {"echo": Status.INACTIVE}
        with pytest.raises(ShuttingDown):
            async with broker.publish("echo", handler):
                pass


async def test_a_broker_that_stops_while_it_opens_says_so(autojump_clock):
    async def handler(request):
        return b"x"

    async with open_test_broker() as broker, trio.open_nursery() as nursery:
        outcomes = []

        async def publish():
            try:
                async with broker.publish("echo", handler):
                    outcomes.append("published")
            except ShuttingDown:
                outcomes.append("refused")

        nursery.start_soon(publish)
        while not broker.llms():
            await trio.lowlevel.checkpoint()
        await broker.drain(0)
        await wait_all_tasks_blocked()
        assert outcomes in (["published"], ["refused"])


async def test_an_evicted_one_stays_away(autojump_clock):
    async def handler(request):
        return b"x"

    async with open_test_broker() as broker, broker.publish("echo", handler):
        await broker.evict(broker.session_views()[0].record.session_id)
        await trio.sleep(300)
        assert broker.session_views() == []
        with pytest.raises(ModelOffline):
            broker.infer_nowait("echo", CALL)


async def test_one_that_went_stale_comes_back(autojump_clock):
    """Its channel overflowed, say: it opens another."""

    async def handler(request):
        return b"x"

    async with open_test_broker() as broker, broker.publish("echo", handler):
        session = next(iter(broker._directory.sessions.values()))
        broker._registry.end_channel(session.channel, "stale")
        await wait_all_tasks_blocked()
        assert session.channel.epoch == 2
        assert (await ask(broker))[2] == b"x"


async def test_it_stands_beside_publishers_of_the_wire(autojump_clock):
    async def handler(request):
        return b"local"

    async with (
        open_test_broker() as broker,
        broker.publish("echo", handler),
        FakePublisher(broker, "laptop", [LLMSpec("qwen")]) as publisher,
        trio.open_nursery() as nursery,
    ):
        call = start_call(nursery, broker)
        await publisher.answer(await publisher.next("infer"), b"remote")
        await call.over.wait()
        assert (call.body, (await ask(broker))[2]) == (b"remote", b"local")


async def test_a_handler_whose_caller_leaves_gives_its_slot_back_when_it_has_ended(autojump_clock):
    """Not before: it may have to clean up; and not a lease later."""
    ended = []

    async def handler(request):
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(3)
            ended.append(trio.current_time())

    async with open_test_broker() as broker, broker.publish("echo", handler, max_concurrency=1):
        infer = broker.infer_nowait("echo", CALL)
        await wait_all_tasks_blocked()
        left = trio.current_time()
        infer.cancel()
        assert (view(broker, "echo").in_flight, view(broker, "echo").stopping) == (0, 1)
        while view(broker, "echo").stopping:
            await trio.sleep(0.5)
        assert ended == [left + 3]
        assert trio.current_time() - left <= 3.5
