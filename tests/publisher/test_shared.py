"""The shared upload: where the broker takes one, short answers go on it, and none is lost with it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.publisher.peers import Channel, Publisher, Stage, begin_stream
from tests.publisher.scripted import Exchange
from wakecall.publisher import InferFinished, StopReason
from wakecall.publisher.shared import SharedUpload
from wakecall.publisher.wire import BrokerLost, BrokerRefused
from wakecall.records import MAX_ANSWER_BYTES, Head, RecordParser

JSON = "application/json"


def records_of(data: bytes) -> list[tuple[Head, bytes]]:
    found: list[tuple[Head, bytes]] = []
    RecordParser(lambda head, answer: found.append((head, answer))).feed(data)
    return found


async def answered(exchange: Exchange, body: bytes = b'{"a":1}', status: int = 200, content_type: str = JSON) -> None:
    await exchange.respond(status, body, content_type)


async def in_chunks(exchange: Exchange, *pieces: bytes, content_type: str = JSON) -> None:
    await exchange.start(200, {"content-type": content_type})
    for piece in pieces:
        await exchange.send(piece)
    await exchange.finish()


async def share(stage: Stage, **settings: object) -> tuple[Publisher, Channel, Exchange]:
    """An agent whose shared upload the broker has begun to read."""
    stage.broker.features = ["later", "results"]
    publisher, channel = await stage.publish(**settings)
    upload = await stage.broker.wait("results")
    await channel.send("results", taken=0)
    return publisher, channel, upload


async def plain(channel: Channel, task_id: str, **data: object) -> None:
    await channel.infer(task_id, stream=False, **data)


async def wait_records(upload: Exchange, count: int) -> list[tuple[Head, bytes]]:
    with trio.fail_after(5):
        while len(found := records_of(bytes(upload.body))) < count:
            await upload._grown.wait()
    return found


# Which answers go on it ---------------------------------------------------------------------------------------------


async def test_short_answers_go_on_the_shared_upload(stage: Stage) -> None:
    stage.engine.on_infer = partial(answered, status=418)
    publisher, channel, upload = await share(stage)
    await plain(channel, "t1")
    await plain(channel, "t2")
    found = await wait_records(upload, 2)
    assert sorted(found, key=lambda each: each[0].task_id) == [
        (Head("t1", 418, JSON), b'{"a":1}'),
        (Head("t2", 418, JSON), b'{"a":1}'),
    ]
    assert (upload.headers["content-type"], upload.headers["transfer-encoding"]) == (
        "application/octet-stream",
        "chunked",
    )
    done = await publisher.wait(InferFinished, 2)
    assert (done.outcome, done.status, done.uploaded) == ("completed", 418, 7)
    assert not stage.broker.all("result")
    assert len(stage.broker.all("results")) == 1


@pytest.mark.parametrize("upload", ["stream", "chunks"])
async def test_a_broker_that_does_not_offer_one_gets_none(stage: Stage, upload: str) -> None:
    stage.engine.on_infer = answered
    stage.broker.features = ["results"] if upload == "chunks" else ["else"]
    _, channel = await stage.publish(upload=upload)
    await plain(channel, "t1")
    await stage.broker.wait_whole("result", "t1")
    assert not stage.broker.all("results")


async def test_until_the_broker_says_that_it_reads_nothing_goes_on_it(stage: Stage) -> None:
    stage.engine.on_infer = answered
    stage.broker.features = ["results"]
    _, channel = await stage.publish()
    upload = await stage.broker.wait("results")
    await plain(channel, "t1")
    await stage.broker.wait_whole("result", "t1")
    assert not upload.body


Answers = Callable[[Exchange], Awaitable[None]]


@pytest.mark.parametrize(
    ("answers", "stream", "body"),
    [
        (partial(in_chunks, content_type=JSON), True, b""),
        (partial(answered, body=b"", status=204), False, b""),
        (partial(answered, body=b"{}", status=500), True, b"{}"),
        (partial(answered, body=b"x" * MAX_ANSWER_BYTES), False, b"x" * MAX_ANSWER_BYTES),
        (lambda exchange: in_chunks(exchange, b'{"a"', b":1}"), False, b'{"a":1}'),
        (lambda exchange: in_chunks(exchange, b"a", b"b", content_type="text/plain"), False, b"ab"),
        (partial(answered, body=b"RIFF", content_type="audio/wav"), False, b"RIFF"),
    ],
    ids=["empty", "bodiless", "error", "longest", "chunked", "text", "audio"],
)
async def test_what_is_whole_and_short_goes_on_it(stage: Stage, answers: Answers, stream: bool, body: bytes) -> None:
    stage.engine.on_infer = answers
    _, channel, upload = await share(stage)
    await channel.infer("t1", stream=stream)
    [(head, answer)] = await wait_records(upload, 1)
    assert (head.task_id, answer) == ("t1", body)


@pytest.mark.parametrize(
    ("answers", "stream"),
    [
        (partial(answered, body=b"x" * (MAX_ANSWER_BYTES + 1)), False),
        (lambda exchange: in_chunks(exchange, *[b"x" * 1000] * 66), False),
        (lambda exchange: in_chunks(exchange, b"data: 1\n\n", content_type="text/event-stream"), True),
        (lambda exchange: in_chunks(exchange, b"data: 1\n\n", content_type="text/event-stream"), False),
        (lambda exchange: in_chunks(exchange, b"ID3", content_type="audio/mpeg"), False),
        (lambda exchange: in_chunks(exchange, b"{}\n", content_type="application/x-ndjson"), False),
    ],
    ids=["long", "long chunked", "stream", "unasked stream", "audio", "ndjson"],
)
async def test_what_is_long_or_streamed_has_an_upload_of_its_own(stage: Stage, answers: Answers, stream: bool) -> None:
    stage.engine.on_infer = answers
    _, channel, upload = await share(stage)
    await channel.infer("t1", stream=stream)
    await stage.broker.wait_whole("result", "t1")
    assert not upload.body


async def test_an_engine_that_takes_its_time_within_a_plain_answer_is_streamed(stage: Stage) -> None:
    """The broker counts its pauses from the first byte."""
    _, channel, upload = await share(stage)
    await plain(channel, "t1")
    request = await stage.engine.next()
    await request.start(200, {"content-type": JSON})
    await request.send(b'{"a"')
    result = await stage.broker.wait("result", "t1")
    await result.wait_body(b'{"a"')
    await request.send(b":1}")
    await request.finish()
    await stage.broker.wait_whole("result", "t1")
    assert bytes(result.body) == b'{"a":1}'
    assert not upload.body


async def test_an_engine_that_breaks_off_while_its_answer_is_held_has_failed(stage: Stage) -> None:
    async def breaks(exchange: Exchange) -> None:
        await exchange.start(200, {"content-type": JSON})
        await exchange.send(b'{"a"')
        exchange.reset()

    stage.engine.on_infer = breaks
    publisher, channel, upload = await share(stage)
    await plain(channel, "t1")
    assert "broke off" in (await stage.broker.wait_whole("failure", "t1")).json["message"]
    assert (await publisher.wait(InferFinished)).outcome == "failed"
    assert not upload.body
    assert not stage.broker.all("result")


async def test_one_that_is_cancelled_while_its_answer_is_held_is_not_sent(stage: Stage) -> None:
    publisher, channel, upload = await share(stage)
    await plain(channel, "t1")
    request = await stage.engine.next()
    await request.start(200, {"content-type": JSON})
    await request.send(b'{"a"')
    await channel.send("cancel", task_id="t1", reason="client_disconnected")
    with trio.fail_after(5):
        await request.broken.wait()
    await stage.broker.wait_whole("cancelled", "t1")
    assert (await publisher.wait(InferFinished)).outcome == "cancelled"
    assert not upload.body


async def test_a_stream_goes_on_beside_it(stage: Stage) -> None:
    _, channel, upload = await share(stage)
    stream, result = await begin_stream(stage, channel, "t1")
    await plain(channel, "t2")
    await answered(await stage.engine.next())
    await wait_records(upload, 1)
    await stream.finish()
    await stage.broker.wait_whole("result", "t1")
    assert bytes(result.body) == b"data: 1\n\n"


# When it breaks -----------------------------------------------------------------------------------------------------


async def cut(exchange: Exchange, after: int, gone: trio.Event) -> None:
    while len(records_of(bytes(exchange.body))) < after:
        await exchange.read_some()
    await gone.wait()
    exchange.reset()


async def test_a_broken_one_has_what_is_not_acknowledged_posted_again(stage: Stage) -> None:
    """Each once; that its task is over by now is no failure. Then there is another."""
    gone = trio.Event()
    stage.broker.on["results"] = partial(cut, after=3, gone=gone)
    stage.engine.on_infer = answered
    _, channel, upload = await share(stage)
    for task_id in ("t1", "t2", "t3"):
        await plain(channel, task_id)
        await wait_records(upload, int(task_id[1]))
    await channel.send("results", taken=1)
    await channel.send("cancel", task_id="mark", reason="shutdown")
    await stage.broker.wait_whole("cancelled", "mark")  # the agent has read what came before it

    async def over(exchange: Exchange) -> None:
        await exchange.read()
        await exchange.refuse(409, "task_already_settled")

    stage.broker.on["result"] = over
    stage.broker.on.pop("results")
    gone.set()
    # It learns of a reset when it next writes.
    await plain(channel, "t4")
    for task_id in ("t2", "t3", "t4"):
        posted = await stage.broker.wait_whole("result", task_id)
        assert bytes(posted.body) == b'{"a":1}'
        assert (posted.headers["wakecall-status"], posted.headers["content-type"]) == ("200", JSON)
    again = await stage.broker.wait("results", count=2)
    await channel.send("results", taken=3)  # late, of the first one
    await channel.send("results", taken=0)
    await plain(channel, "t5")
    assert [head.task_id for head, _ in await wait_records(again, 1)] == ["t5"]
    assert not stage.broker.all("result", "t1")
    assert len(stage.broker.all("result")) == 3
    assert not stage.broker.all("failure")


async def test_a_channel_takes_its_upload_with_it(stage: Stage) -> None:
    """What was sent on it dies with it, and is not posted."""
    stage.engine.on_infer = answered
    _, channel, upload = await share(stage)
    await plain(channel, "t1")
    await wait_records(upload, 1)
    channel.cut()
    with trio.fail_after(5):
        await upload.broken.wait()
    newer = await stage.broker.next_channel()
    fresh = await stage.broker.wait("results", count=2)
    await newer.send("results", taken=0)
    await plain(newer, "t2")
    assert [head.task_id for head, _ in await wait_records(fresh, 1)] == ["t2"]
    assert not stage.broker.all("result")


async def test_a_stop_waits_until_all_is_acknowledged(stage: Stage) -> None:
    """A goodbye fails whatever the broker has not taken by then."""
    stage.engine.on_infer = answered
    publisher, channel, upload = await share(stage)
    await plain(channel, "t1")
    await wait_records(upload, 1)
    await publisher.wait(InferFinished)
    publisher.stop.set()
    await stage.broker.wait_whole("register", count=2)
    await channel.send("cancel", task_id="mark", reason="shutdown")
    await stage.broker.wait_whole("cancelled", "mark")
    await wait_all_tasks_blocked(0.02)
    assert not stage.broker.all("goodbye")
    await channel.send("results", taken=1)
    await stage.broker.wait_whole("goodbye")
    assert await publisher.wait_ended() is StopReason.STOPPED


# Its bounds and times, on a virtual clock ---------------------------------------------------------------------------


class Uploads:
    """The broker's client, of which the test decides how each upload ends."""

    def __init__(self) -> None:
        self.sent = b""
        self.uploads = 0
        self.posted: list[str] = []
        self.failed: list[str] = []
        self.end: Exception | None = None
        self.refusal: Exception | None = None
        self.ended = trio.Event()

    async def send_results(self, records: object) -> None:
        self.uploads += 1
        self.sent = b""
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                async for data in records:  # type: ignore[attr-defined]
                    self.sent += data

            nursery.start_soon(read)
            await self.ended.wait()
            nursery.cancel_scope.cancel()
        self.ended = trio.Event()
        if self.end is not None:
            raise self.end

    async def send_result(self, task_id: str, content: bytes, **said: object) -> None:
        self.posted.append(task_id)
        if self.refusal is not None:
            raise self.refusal

    async def send_failure(self, task_id: str, message: str) -> None:
        self.failed.append(task_id)

    @property
    def ids(self) -> list[str]:
        return [head.task_id for head, _ in records_of(self.sent)]


class Clocked:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.broker = Uploads()
        self.refused: list[str] = []
        self.shared = SharedUpload(self.broker, 15.0, lambda: self.refused.append("key"))  # type: ignore[arg-type]
        nursery.start_soon(self.shared.run)

    async def open(self) -> Clocked:
        await wait_all_tasks_blocked()
        self.shared.acknowledge(0)
        return self

    def give(self, task_id: str, answer: bytes = b"x") -> bool:
        return self.shared.give(task_id, 200, None, answer)


async def test_one_that_the_broker_does_not_read_is_given_up_after_five_seconds(autojump_clock: MockClock) -> None:
    """A proxy keeps it until its end. There is no other on this channel, nor does a late word open it."""
    async with trio.open_nursery() as nursery:
        one = Clocked(nursery)
        await trio.sleep(4.9)
        assert not one.give("t0")
        assert nursery.child_tasks
        await trio.sleep(0.2)
        assert not nursery.child_tasks
        one.shared.acknowledge(0)
        assert not one.give("t1")
    assert one.broker.uploads == 1


async def test_without_an_acknowledgement_for_ten_seconds_all_is_posted(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        one = await Clocked(nursery).open()
        assert one.give("t1")
        await trio.sleep(6)
        assert one.give("t2")
        one.shared.acknowledge(1)
        await trio.sleep(9.9)
        assert one.broker.posted == []
        await trio.sleep(0.2)
        assert one.broker.posted == ["t2"]
        with trio.fail_after(1):
            await one.shared.wait_settled()
        assert not one.give("t3")
        await trio.sleep(1)
        assert one.broker.uploads == 2, "what swallowed it may be over, as when a connection has died in silence"
        one.shared.acknowledge(0)
        assert one.give("t3")
        nursery.cancel_scope.cancel()


async def test_one_that_is_never_acknowledged_is_tried_ever_more_seldom(autojump_clock: MockClock) -> None:
    """What lets the first of it through and keeps the rest costs an answer ten seconds each time."""
    async with trio.open_nursery() as nursery:
        one = await Clocked(nursery).open()
        start, starts = trio.current_time(), []
        for number in range(16):
            assert one.give(f"t{number}")
            uploads = one.broker.uploads
            while one.broker.uploads == uploads:
                await trio.sleep(0.5)
            starts.append(trio.current_time() - start)
            await wait_all_tasks_blocked()
            one.shared.acknowledge(0)
        assert one.broker.posted == [f"t{number}" for number in range(16)]
        assert starts[-1] - starts[-2] > 30, starts
        nursery.cancel_scope.cancel()


async def test_what_is_acknowledged_in_time_is_posted_by_nobody(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        one = await Clocked(nursery).open()
        for number in range(100):
            assert one.give(f"t{number}")
            await trio.sleep(1)
            one.shared.acknowledge(number + 1)
        assert one.broker.ids == [f"t{number}" for number in range(100)]
        assert one.broker.posted == []
        nursery.cancel_scope.cancel()


async def test_an_idle_one_says_so_and_one_that_died_meanwhile_is_noticed(autojump_clock: MockClock) -> None:
    """Before an answer depends on it."""
    async with trio.open_nursery() as nursery:
        one = await Clocked(nursery).open()
        await trio.sleep(15.1)
        assert one.broker.ids == ["-"]
        one.shared.acknowledge(1)
        await trio.sleep(16.6)
        assert one.broker.ids == ["-", "-"]
        await trio.sleep(10.1)
        assert not one.give("t1")
        await trio.sleep(1)
        assert (one.broker.uploads, one.broker.posted) == (2, []), "nothing was in it"
        one.shared.acknowledge(0)
        assert one.give("t1")
        nursery.cancel_scope.cancel()


async def test_an_acknowledgement_that_is_late_has_the_connection_tried(autojump_clock: MockClock) -> None:
    """A cut shows only where something is written: the answer shall not wait for it until the patience is at its end."""
    async with trio.open_nursery() as nursery:
        one = await Clocked(nursery).open()
        assert one.give("t1")
        await trio.sleep(1.4)
        assert one.broker.ids == ["t1"]
        await trio.sleep(0.2)
        assert one.broker.ids == ["t1", "-"]
        one.shared.acknowledge(2)
        await trio.sleep(14)
        assert one.broker.ids == ["t1", "-"]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("size", [1, MAX_ANSWER_BYTES])
async def test_what_is_unacknowledged_is_bounded(autojump_clock: MockClock, size: int) -> None:
    """256 answers, or 4 MiB; acknowledgements make room again."""
    most = 256 if size == 1 else 64
    async with trio.open_nursery() as nursery:
        one = await Clocked(nursery).open()
        assert [one.give(f"t{number}", bytes(size)) for number in range(most + 1)] == [True] * most + [False]
        one.shared.acknowledge(1)
        assert [one.give(f"u{number}", bytes(size)) for number in range(2)] == [True, False]
        one.shared.acknowledge(10_000)  # more than there are
        assert one.give("t", bytes(size))
        nursery.cancel_scope.cancel()


async def test_what_can_be_no_record_is_not_taken(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        one = await Clocked(nursery).open()
        assert not one.give("t1", bytes(MAX_ANSWER_BYTES + 1))
        assert not one.shared.give("t1", 200, "x" * 5000, b"")
        assert one.give("t1")
        await wait_all_tasks_blocked()
        assert one.broker.ids == ["t1"]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("refusal", "fails"),
    [
        (None, False),
        (BrokerRefused(404, "task_not_found", "x"), False),
        (BrokerRefused(409, "task_already_settled", "x"), False),
        (BrokerRefused(410, "task_cancelled", "x"), False),
        (BrokerRefused(503, "", "x"), True),
        (BrokerLost("gone"), True),
    ],
)
async def test_what_cannot_be_posted_either_has_failed(
    autojump_clock: MockClock, refusal: Exception | None, fails: bool
) -> None:
    async with trio.open_nursery() as nursery:
        one = await Clocked(nursery).open()
        ids = [f"t{number}" for number in range(40)]
        assert all(one.give(task_id) for task_id in ids)
        one.broker.end, one.broker.refusal = BrokerLost("reset"), refusal
        one.broker.ended.set()
        await one.shared.wait_settled()
        assert sorted(one.broker.posted) == sorted(ids)
        assert sorted(one.broker.failed) == (sorted(ids) if fails else [])
        nursery.cancel_scope.cancel()


async def test_a_key_that_is_refused_meanwhile_is_the_agents_to_know(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        one = await Clocked(nursery).open()
        assert one.give("t1")
        one.broker.end, one.broker.refusal = BrokerLost("reset"), BrokerRefused(401, "invalid_api_key", "x")
        one.broker.ended.set()
        await one.shared.wait_settled()
        assert one.refused == ["key"]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("end", "again"),
    [
        (BrokerLost("reset"), True),
        (BrokerRefused(409, "result_in_progress", "x"), True),
        (BrokerRefused(400, "invalid_request", "x"), False),
        (BrokerRefused(404, "session_not_found", "x"), False),
        (BrokerRefused(413, "", "x"), False),
        (None, False),
    ],
)
async def test_after_which_end_there_is_another(autojump_clock: MockClock, end: Exception | None, again: bool) -> None:
    async with trio.open_nursery() as nursery:
        one = await Clocked(nursery).open()
        one.broker.end = end
        one.broker.ended.set()
        await trio.sleep(1)
        assert one.broker.uploads == (2 if again else 1)
        assert bool(nursery.child_tasks) is again
        if again:
            assert not one.give("t1"), "not before the broker reads that, too"
            one.shared.acknowledge(7)  # of the one before
            assert not one.give("t1")
            one.shared.acknowledge(0)
            assert one.give("t1")
        nursery.cancel_scope.cancel()


async def test_one_that_broke_before_the_broker_read_it_is_not_tried_again(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        one = Clocked(nursery)
        await wait_all_tasks_blocked()
        one.broker.end = BrokerLost("reset")
        one.broker.ended.set()
    assert one.broker.uploads == 1


async def test_cancelled_it_leaves_nothing_on_its_way(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        one = await Clocked(nursery).open()
        assert one.give("t1")
        nursery.cancel_scope.cancel()
    assert not one.give("t2")
    assert one.broker.posted == []
    with trio.fail_after(1):
        await one.shared.wait_settled()
