"""The shared upload: many whole answers on one stream of bytes, each settling its task as an upload of its own would."""

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.broker.helpers import CALL, STREAM, observe, start_call, start_calls, statuses, view
from tests.broker.test_store import FakeStore
from wakecall import BrokerConfig, LLMSpec, Status
from wakecall.errors import InvalidRequest, ResultInProgress, SessionNotFound, StoreUnavailable
from wakecall.models import InferSettled, SlotReleased
from wakecall.records import MAX_ANSWER_BYTES, encode_record
from wakecall.testing import FakePublisher, check_invariants, open_test_broker

NOBODYS = encode_record("nobody", 200, None, b"x")
USAGE = b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":5}}'


class Stage:
    """A broker, a publisher with one row in a pool and its shared upload, and a nursery for callers."""

    def __init__(self, *llms, config=None, store=None):
        self._llms = llms or (LLMSpec("qwen"),)
        self._config, self._store = config, store

    async def __aenter__(self):
        self._broker = open_test_broker(self._config, self._store)
        self.broker = await self._broker.__aenter__()
        self.publisher = FakePublisher(self.broker, "laptop", self._llms)
        await self.publisher.__aenter__()
        self._callers = trio.open_nursery()
        self.nursery = await self._callers.__aenter__()
        self.results = self.publisher.results()
        return self

    async def __aexit__(self, *error):
        self.nursery.cancel_scope.cancel()
        await self._callers.__aexit__(None, None, None)
        self.results.close()
        await self.publisher.__aexit__(None, None, None)
        await self._broker.__aexit__(*error)

    async def call(self, request=CALL, name="qwen"):
        call = start_call(self.nursery, self.broker, name, request)
        return call, await self.publisher.next("infer")

    async def told(self):
        await wait_all_tasks_blocked()
        return [data["taken"] for data in self.publisher.events("results")]


# What a record does -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "status", "content_type"),
    [
        (USAGE, 200, "application/json"),
        (b'{"error":{}}', 500, "application/json"),
        (b"I'm a teapot", 418, "text/plain"),
        (b"", 204, None),
        (b"later", 503, "text/plain"),
        (b"", 429, None),
        (bytes(MAX_ANSWER_BYTES), 200, "audio/wav"),
        (b"data: 1\n\n", 200, "text/event-stream"),
    ],
)
async def test_a_record_does_what_a_result_does(autojump_clock, answer, status, content_type):
    """Status, headers, bytes, counters, usage and what is told of it: all the same."""

    async def seen(by_record):
        async with Stage() as stage:
            events = observe(stage.broker)
            call, frame = await stage.call()
            await trio.sleep(2)
            if by_record:
                stage.results.feed(stage.publisher.record(frame, answer, status=status, content_type=content_type))
            else:
                await stage.publisher.answer(frame, answer, status=status, content_type=content_type)
            await call.over.wait()
            [told] = [event for event in events if isinstance(event, InferSettled)]
            facts = {name: getattr(told, name) for name in told.__slots__ if name not in ("task_id", "request_id")}
            return call.reply.status, call.reply.headers, call.body, facts, check_invariants(stage.broker)

    by_record, by_result = await seen(True), await seen(False)
    assert by_record == by_result
    assert by_record[2] == answer


@pytest.mark.parametrize("answer", [b"busy", b""])
@pytest.mark.parametrize("status", [429, 503])
async def test_a_refusal_moves_on(autojump_clock, status, answer):
    async with Stage(LLMSpec("a", pool="all"), LLMSpec("b", pool="all")) as stage:
        call, frame = await stage.call(name="all")
        stage.results.feed(stage.publisher.record(frame, answer, status=status))
        second = await stage.publisher.next("infer")
        assert {frame.data["llm"], second.data["llm"]} == {"a", "b"}
        stage.results.feed(stage.publisher.record(frame, b"too late") + stage.publisher.record(second, b"ok"))
        await call.over.wait()
        assert (call.reply.status, call.body) == (200, b"ok")


async def test_many_records_come_in_one_piece_and_one_comes_in_many(autojump_clock):
    async with Stage() as stage:
        calls = await start_calls(stage.nursery, stage.broker, 5)
        frames = [await stage.publisher.next("infer") for _ in calls]
        stage.results.feed(b"".join(stage.publisher.record(frame, b"%d" % n) for n, frame in enumerate(frames[:4])))
        for byte in stage.publisher.record(frames[4], b"4"):
            assert not calls[4].over.is_set()
            stage.results.feed(bytes([byte]))
        for call in calls:
            await call.over.wait()
        assert [call.body for call in calls] == [b"0", b"1", b"2", b"3", b"4"]
        assert stage.results.taken == 5


async def test_a_client_that_does_not_read_holds_back_nobody(autojump_clock):
    async with Stage(config=BrokerConfig(reply_buffer_bytes=2)) as stage:
        stuck = start_call(stage.nursery, stage.broker, reads=False)
        frame = await stage.publisher.next("infer")
        stage.results.feed(stage.publisher.record(frame, b"x" * 1000))
        call, other = await stage.call()
        stage.results.feed(stage.publisher.record(other, b"ok"))
        await call.over.wait()
        assert call.body == b"ok"
        assert stage.broker.statistics().completed == 2
        stuck.read_on()
        await stuck.over.wait()
        assert stuck.body == b"x" * 1000


async def test_a_slot_that_a_record_frees_is_the_next_ones_at_once(autojump_clock):
    async with Stage(LLMSpec("qwen", max_concurrency=1)) as stage:
        first, second = await start_calls(stage.nursery, stage.broker, 2)
        frame = await stage.publisher.next("infer")
        stage.results.feed(stage.publisher.record(frame, b"1"))
        assert view(stage.broker).in_flight == 1
        stage.results.feed(stage.publisher.record(await stage.publisher.next("infer"), b"2"))
        await first.over.wait()
        await second.over.wait()
        assert (first.body, second.body) == (b"1", b"2")


# What is dropped ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ended_by", ["result", "record", "failure"])
async def test_a_record_for_a_task_that_is_over_is_nothing_and_counts_as_taken(autojump_clock, ended_by):
    async with Stage() as stage:
        call, frame = await stage.call()
        if ended_by == "result":
            await stage.publisher.answer(frame, b"first")
        elif ended_by == "record":
            stage.results.feed(stage.publisher.record(frame, b"first"))
        else:
            stage.publisher.fail(frame, "first")
        before = stage.results.taken
        stage.results.feed(stage.publisher.record(frame, b"second") + NOBODYS)
        await call.over.wait()
        assert stage.results.taken == before + 2
        assert call.body == (None if ended_by == "failure" else b"first")
        counted = check_invariants(stage.broker)
        assert counted.completed + counted.failed == 1


async def test_a_record_for_another_owners_task_is_nothing(autojump_clock):
    async with Stage() as stage, FakePublisher(stage.broker, "theirs", ["phi"], owner="them") as other:
        call = start_call(stage.nursery, stage.broker, "phi")
        frame = await other.next("infer")
        stage.results.feed(stage.publisher.record(frame, b"mine"))
        await wait_all_tasks_blocked()
        assert not call.over.is_set()
        assert stage.results.taken == 1
        call.leave()
        await call.over.wait()
        assert view(stage.broker, "phi").stopping == 1
        stage.results.feed(stage.publisher.record(frame, b"mine"))
        assert view(stage.broker, "phi").stopping == 1, "nor does it confirm anything"


async def test_another_session_of_the_owner_is_answered_for(autojump_clock):
    async with Stage() as stage, FakePublisher(stage.broker, "other", ["phi"]) as other:
        call = start_call(stage.nursery, stage.broker, "phi")
        stage.results.feed(stage.publisher.record(await other.next("infer"), b"ok"))
        await call.over.wait()
        assert call.body == b"ok"


async def test_a_task_with_an_upload_of_its_own_has_that_alone(autojump_clock):
    async with Stage() as stage:
        call, frame = await stage.call()
        with stage.publisher.upload(frame) as upload:
            stage.results.feed(stage.publisher.record(frame, b"record"))
            await upload.send(b"result")
            stage.results.feed(stage.publisher.record(frame, b"record"))
            await upload.finish()
        await call.over.wait()
        assert call.body == b"result"


async def test_a_task_that_has_begun_in_pieces_goes_on_in_pieces(autojump_clock):
    async with Stage() as stage:
        call, frame = await stage.call(STREAM)
        await stage.broker.push_chunk(frame.data["task_id"], b"pie", offset=0)
        stage.results.feed(stage.publisher.record(frame, b"record"))
        await stage.broker.complete(frame.data["task_id"], b"ces", offset=3)
        await call.over.wait()
        assert call.body == b"pieces"


async def test_a_record_for_a_cancelled_task_confirms_that_its_engine_is_done(autojump_clock):
    """It has answered: it works on it no more, and the next may have its slot."""
    async with Stage(LLMSpec("qwen", max_concurrency=1, cancel="drain")) as stage:
        events = observe(stage.broker)
        call, frame = await stage.call()
        second = start_call(stage.nursery, stage.broker)
        await trio.sleep(1)
        call.leave()
        await call.over.wait()
        await trio.sleep(3)
        assert (view(stage.broker).stopping, view(stage.broker).waiting) == (1, 1)
        stage.results.feed(stage.publisher.record(frame, b"for nobody"))
        assert (view(stage.broker).stopping, view(stage.broker).in_flight) == (0, 1)
        assert [(e.how, e.seconds) for e in events if isinstance(e, SlotReleased)] == [("confirmed", 3)]
        stage.results.feed(stage.publisher.record(await stage.publisher.next("infer"), b"ok"))
        await second.over.wait()
        assert second.body == b"ok"


# Wakes --------------------------------------------------------------------------------------------------------------

ASLEEP = LLMSpec("phi", status=Status.HIBERNATING)


async def test_a_record_wakes_and_is_acknowledged_once_that_is_committed(autojump_clock):
    """Those behind it do not wait for the disk; their acknowledgement does."""
    store = FakeStore()
    async with Stage("qwen", ASLEEP, store=store) as stage:
        sleeper = start_call(stage.nursery, stage.broker, "phi")
        wake = await stage.publisher.next("wake")
        call, frame = await stage.call()
        store.gate = trio.Event()
        stage.results.feed(NOBODYS + stage.publisher.record(wake, b"") + stage.publisher.record(frame, b"ok"))
        await call.over.wait()
        assert call.body == b"ok"
        stage.results.feed(stage.publisher.record(await stage.publisher.next("infer"), b"awake"))
        await sleeper.over.wait()
        assert sleeper.body == b"awake"
        assert store.held()["phi"] is Status.HIBERNATING
        await trio.sleep(5)
        assert await stage.told() == [0, 1], "what came before the wake, and no more"
        store.gate.set()
        await trio.sleep(1)
        assert await stage.told() == [0, 1, 4]
        assert store.held()["phi"] is Status.ACTIVE


async def test_a_wake_is_not_acknowledged_by_a_commit_that_fails(autojump_clock):
    store = FakeStore()
    async with Stage(ASLEEP, store=store) as stage:
        start_call(stage.nursery, stage.broker, "phi")
        store.failing = True
        stage.results.feed(stage.publisher.record(await stage.publisher.next("wake"), b""))
        await trio.sleep(60)
        assert statuses(stage.broker)["phi"] is Status.ACTIVE
        assert await stage.told() == [0]
        store.failing = False
        await trio.sleep(10)
        assert await stage.told() == [0, 1]


async def test_an_upload_with_a_wake_ends_once_that_is_committed(autojump_clock):
    store = FakeStore()
    async with Stage(ASLEEP, store=store) as stage:
        start_call(stage.nursery, stage.broker, "phi")
        store.failing = True
        stage.results.feed(stage.publisher.record(await stage.publisher.next("wake"), b""))
        with pytest.raises(StoreUnavailable):
            await stage.results.finish()
        assert stage.results.is_over
        assert await stage.told() == [0]


async def test_a_record_that_is_no_2xx_fails_the_wake_with_its_text(autojump_clock):
    async with Stage(ASLEEP) as stage:
        sleeper = start_call(stage.nursery, stage.broker, "phi")
        frame = await stage.publisher.next("wake")
        stage.results.feed(stage.publisher.record(frame, b"no VRAM", status=500))
        await sleeper.over.wait()
        assert (sleeper.code, sleeper.error.message) == ("wake_failed", "no VRAM")
        await trio.sleep(1)
        assert await stage.told() == [0, 1]


# Acknowledgements ---------------------------------------------------------------------------------------------------


async def test_the_first_says_that_the_broker_reads(autojump_clock):
    async with Stage() as stage:
        assert await stage.told() == [0]


async def test_sixty_four_are_acknowledged_at_once_and_fewer_after_a_second(autojump_clock):
    async with Stage() as stage:
        for _ in range(63):
            stage.results.feed(NOBODYS)
        await trio.sleep(0.99)
        assert await stage.told() == [0]
        await trio.sleep(0.02)
        assert await stage.told() == [0, 63]
        stage.results.feed(NOBODYS * 63)
        assert await stage.told() == [0, 63]
        stage.results.feed(NOBODYS)
        assert await stage.told() == [0, 63, 127]
        await trio.sleep(50)
        assert await stage.told() == [0, 63, 127], "nothing is left to be acknowledged"
        stage.results.feed(NOBODYS)
        await trio.sleep(0.99)
        assert await stage.told() == [0, 63, 127], "a second after the first, however long ago the last one was"
        await trio.sleep(0.02)
        assert await stage.told() == [0, 63, 127, 128]


async def test_a_trickle_is_acknowledged_every_second(autojump_clock):
    async with Stage() as stage:
        for _ in range(8):
            stage.results.feed(NOBODYS)
            await trio.sleep(0.4)
        assert await stage.told() == [0, 3, 6]


async def test_a_thousand_in_one_piece_are_one_acknowledgement(autojump_clock):
    async with Stage() as stage:
        stage.results.feed(NOBODYS * 1000)
        assert await stage.told() == [0, 1000]


async def test_an_end_acknowledges_what_is_left(autojump_clock):
    async with Stage() as stage:
        stage.results.feed(NOBODYS * 3)
        await stage.results.finish()
        assert await stage.told() == [0, 3]
        stage.results.feed(NOBODYS)
        assert stage.results.taken == 3, "it is over"


async def test_acknowledgements_that_nobody_takes_have_the_channels_bound(autojump_clock):
    config = BrokerConfig(max_untaken_frame_bytes=150_000, max_inline_body_bytes=1024)
    async with open_test_broker(config) as broker, FakePublisher(broker, "laptop", ["qwen"], connect=False) as mute:
        channel = broker.open_channel_nowait("laptop")
        [hello] = await channel.receive()
        assert hello.data["features"] == ["results"]
        with mute.results() as results:
            for _ in range(1000):
                results.feed(NOBODYS * 64)
            assert channel.ended == "stale"
            assert results.is_over
            assert results.taken < 1000 * 64


# Its life -----------------------------------------------------------------------------------------------------------


async def test_a_channel_has_one_at_a_time(autojump_clock):
    async with Stage() as stage:
        with pytest.raises(ResultInProgress):
            stage.publisher.results()
        call, frame = await stage.call()
        stage.results.feed(stage.publisher.record(frame, b"ok"))
        stage.results.close()
        with stage.publisher.results() as again:
            assert again.taken == 0
        await call.over.wait()
        assert call.body == b"ok", "what was taken stays taken"


async def test_without_a_session_of_the_owner_or_its_channel_there_is_none(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"], connect=False):
        for session_id, owner in (("laptop", "local"), ("laptop", "them"), ("nobody", "local")):
            with pytest.raises(SessionNotFound):
                broker.open_results(session_id, owner=owner)


@pytest.mark.parametrize("how", ["superseded", "disconnect", "goodbye", "evicted", "stale", "drain"])
async def test_it_ends_with_its_channel(autojump_clock, how):
    async with Stage() as stage:
        called = []
        stage.results.on_over(lambda: called.append(stage.results.is_over))
        call, frame = await stage.call()
        if how == "superseded":
            await stage.publisher.connect()
        elif how == "disconnect":
            stage.publisher.disconnect()
        elif how == "goodbye":
            await stage.publisher.goodbye()
        elif how == "evicted":
            await stage.broker.evict("laptop")
        elif how == "stale":
            await trio.sleep(200)
        else:
            await stage.broker.drain(0)
        assert called == [True]
        await call.over.wait()
        stage.results.feed(stage.publisher.record(frame, b"too late"))
        await stage.results.finish()
        assert (stage.results.taken, call.body) == (0, None)
        if how == "superseded":
            with stage.publisher.results() as fresh:
                called_again = []
                stage.results.close()
                fresh.on_over(lambda: called_again.append(1))
                assert not fresh.is_over, "the old one's end is not the new one's"
        late = []
        stage.results.on_over(lambda: late.append(1))
        assert late == [1]


@pytest.mark.parametrize("how", ["revoked", "expired"])
async def test_it_ends_with_its_key_though_another_key_holds_the_channel(autojump_clock, how):
    async with open_test_broker() as broker:
        mine = await broker.create_key("publisher", owner="me")
        spare = await broker.create_key("publisher", owner="me", expires_in_s=60)
        async with FakePublisher(broker, "laptop", ["qwen"], owner="me", key_id=mine.key.key_id) as publisher:
            with broker.open_results("laptop", owner="me", key_id=spare.key.key_id) as results:
                if how == "revoked":
                    await broker.revoke_key(spare.key.key_id)
                else:
                    await trio.sleep(61)
                assert results.is_over
                assert publisher.channel.ended is None


async def test_one_that_needed_no_key_ends_when_keys_are_needed(autojump_clock):
    async with Stage() as stage:
        stage.results.close()
        with stage.broker.open_results("laptop", needs_open=True) as results:
            await stage.broker.create_key("admin")
            assert results.is_over
            assert stage.publisher.channel.ended is None


async def test_what_is_no_record_ends_it_and_what_came_before_counts(autojump_clock):
    async with Stage() as stage:
        call, frame = await stage.call()
        with pytest.raises(InvalidRequest):
            stage.results.feed(stage.publisher.record(frame, b"ok") + b"\xff" * 6 + NOBODYS)
        assert (stage.results.is_over, stage.results.taken) == (True, 1)
        await call.over.wait()
        assert call.body == b"ok"
        stage.publisher.results().close()  # there may be another


async def test_an_end_in_the_middle_of_a_record_is_refused(autojump_clock):
    async with Stage() as stage:
        stage.results.feed(NOBODYS[:-1])
        with pytest.raises(InvalidRequest):
            await stage.results.finish()
        assert stage.results.is_over
