"""The shared upload, over the bare wire."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from tests.http.served import JSON, Reading, Served, Upload, WirePublisher, head, open_served, wait_until
from tests.http.wire import Wire
from wakecall.config import BrokerConfig
from wakecall.records import encode_record

CALL = {"model": "qwen"}
TARGET = "/publisher/v1/sessions/laptop/results"
NOBODYS = encode_record("nobody", 200, None, b"x")


def record(frame_id: str, answer: bytes, status: int = 200) -> bytes:
    return encode_record(frame_id, status, "application/json", answer)


@asynccontextmanager
async def sharing(served: Served, publisher: WirePublisher, *headers: str, begun: bool = True) -> AsyncIterator[Upload]:
    """The shared upload, of which the broker has said that it reads it. Left early, it breaks off."""
    async with served.server.connect() as wire:
        await wire.send(head("POST", TARGET, "transfer-encoding: chunked", *headers))
        if begun:
            assert (await publisher.next("results")).data == {"taken": 0}
        yield Upload(wire)


async def test_many_answers_go_in_one_piece(served: Served) -> None:
    async with served.publishing() as publisher, sharing(served, publisher) as shared, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(served.calling(CALL)) for _ in range(70)]
        frames = [await publisher.next("infer") for _ in clients]
        await shared.send(b"".join(record(frame.task_id, b'"%d"' % n) for n, frame in enumerate(frames)))
        assert (await publisher.next("results")).data == {"taken": 70}
        answers = [await client.wire.read_answer("POST") for client in clients]
        assert {answer.status for answer in answers} == {200}
        assert {answer.headers["content-type"] for answer in answers} == {"application/json"}
        assert sorted(answer.body for answer in answers) == sorted(b'"%d"' % n for n in range(70))
        ended = await shared.finish()
        assert (ended.status, ended.json) == (200, {"outcome": "ended", "taken": 70})
        served.description.check("POST", TARGET, ended)


async def test_a_record_may_come_in_pieces(served: Served) -> None:
    async with served.publishing() as publisher, sharing(served, publisher) as shared, served.calling(CALL) as client:
        frame = await publisher.next("infer")
        for byte in record(frame.task_id, b'{"a":1}', 418):
            await shared.send(bytes([byte]))
        answer = await client.wire.read_answer("POST")
        assert (answer.status, answer.body) == (418, b'{"a":1}')
        assert (await publisher.next("results")).data == {"taken": 1}, "after a second"


async def test_a_stream_of_its_own_goes_on_beside_it(served: Served) -> None:
    async with served.publishing() as publisher, sharing(served, publisher) as shared:
        async with served.calling({"model": "qwen", "stream": True}) as client:
            frame = await publisher.next("infer")
            async with publisher.upload(frame, "content-type: text/event-stream") as upload:
                await upload.send(b"data: 1\n\n")
                await client.read_head()
                async with served.calling(CALL) as other:
                    await shared.send(record((await publisher.next("infer")).task_id, b"{}"))
                    assert (await other.wire.read_answer("POST")).body == b"{}"
                await shared.send(record(frame.task_id, b"{}"))
                await upload.send(b"data: 2\n\n")
                assert (await upload.finish()).status == 200
                assert (await client.rest()) == (b"data: 1\n\ndata: 2\n\n", False)


@pytest.mark.parametrize(
    "bad",
    [
        b"\xff" * 6,
        struct.pack(">IH", 2, 0),
        struct.pack(">IH", 3 + 70_000, 1),
        encode_record("t", 200, None, b"").replace(b'"t"', b'"/"'),
        encode_record("t", 999, None, b""),
    ],
)
async def test_what_is_no_record_is_400_and_what_came_before_it_counts(served: Served, bad: bytes) -> None:
    async with served.publishing() as publisher, served.calling(CALL) as client:
        frame = await publisher.next("infer")
        async with sharing(served, publisher) as shared:
            await shared.send(record(frame.task_id, b"{}") + bad + NOBODYS)
            refused = await shared.wire.read_answer("POST")
            assert (refused.status, refused.code, refused.headers["connection"]) == (400, "invalid_request", "close")
            served.description.check("POST", TARGET, refused)
        assert (await client.wire.read_answer("POST")).body == b"{}"
        async with sharing(served, publisher) as shared:  # the channel lives, and may have another
            assert (await shared.finish()).status == 200


async def test_a_cut_in_the_middle_of_a_record_leaves_its_task_to_another_way(served: Served) -> None:
    async with served.publishing() as publisher, served.calling(CALL) as client:
        frame = await publisher.next("infer")
        async with sharing(served, publisher) as shared:
            await shared.send(record(frame.task_id, b'{"a":1}')[:-1])
            shared.wire.reset()
        assert (await publisher.answer(frame, b'{"a":2}')).status == 200
        assert (await client.wire.read_answer("POST")).body == b'{"a":2}'


async def test_an_end_in_the_middle_of_a_record_is_400(served: Served) -> None:
    async with served.publishing() as publisher, sharing(served, publisher) as shared:
        await shared.send(NOBODYS[:9])
        assert (await shared.finish()).code == "invalid_request"


async def test_a_channel_has_one_at_a_time(served: Served) -> None:
    async with served.publishing() as publisher:
        async with sharing(served, publisher) as shared:
            second = await served.ask("POST", TARGET)
            assert (second.status, second.code) == (409, "result_in_progress")
            await shared.send(NOBODYS)
            assert (await publisher.next("results")).data == {"taken": 1}, "the first goes on"
            shared.wire.reset()
            channel = served.broker._directory.sessions["laptop"].channel
            assert channel is not None
            await wait_until(lambda: channel.results is None)
        async with sharing(served, publisher) as again:
            assert (await again.finish()).json["taken"] == 0


async def test_without_a_session_or_its_channel_it_is_404(served: Served) -> None:
    assert (await served.ask("POST", TARGET)).code == "session_not_found"
    await served.register("laptop", {"name": "qwen"})
    answer = await served.ask("POST", TARGET)
    assert (answer.status, answer.code) == (404, "session_not_found")


async def test_an_encoded_one_is_415(served: Served) -> None:
    async with served.publishing():
        assert (await served.ask("POST", TARGET, "content-encoding: gzip", body=b"x")).status == 415


async def test_it_ends_with_its_channel(served: Served) -> None:
    """While its publisher sends nothing, too; and neither the old one nor its end are the new one's."""
    async with served.publishing() as publisher, sharing(served, publisher) as shared:
        async with served.channel("laptop") as newer:
            ended = await shared.wire.read_answer("POST")
            assert (ended.status, ended.json) == (200, {"outcome": "ended", "taken": 0})
            async with sharing(served, newer) as fresh, served.calling(CALL) as client:
                await fresh.send(record((await newer.next("infer")).task_id, b"{}"))
                assert (await client.wire.read_answer("POST")).status == 200


async def test_a_shutdown_does_not_wait_for_it() -> None:
    async with open_served() as served, served.publishing() as publisher, sharing(served, publisher) as shared:
        await served.broker.drain(0)
        assert (await shared.wire.read_answer("POST")).status == 200


async def test_a_publisher_that_is_another_owners_finds_nothing(served: Served) -> None:
    """Neither the session nor, on an upload of his own, the tasks."""
    broker = served.broker
    mine, theirs = [await broker.create_key("publisher", owner=owner) for owner in ("me", "them")]
    asks = await broker.create_key("client")
    keys = [f"x-api-key: {key.secret}" for key in (mine, theirs)]
    body = b'{"llms":[{"name":"qwen"}]}'
    assert (await served.ask("PUT", "/publisher/v1/sessions/laptop", keys[0], JSON, body=body)).status == 200
    refused = await served.ask("POST", TARGET, keys[1])
    assert (refused.status, refused.code) == (404, "session_not_found")
    async with served.server.connect() as wire, served.server.connect() as other:
        for session, key, line in (("laptop", keys[0], wire), ("box", keys[1], other)):
            llms = body if session == "laptop" else b'{"llms":[]}'
            await served.ask("PUT", f"/publisher/v1/sessions/{session}", key, JSON, body=llms)
            await line.send(head("GET", f"/publisher/v1/sessions/{session}/frames", key))
        publisher = WirePublisher(served, "laptop", await Reading(wire, "GET").read_head())
        spy = WirePublisher(served, "box", await Reading(other, "GET").read_head())
        await publisher.next("hello")
        await spy.next("hello")
        async with served.calling(CALL, "/v1/chat/completions", JSON, f"x-api-key: {asks.secret}") as client:
            frame = await publisher.next("infer")
            async with served.server.connect() as theirs_wire:
                target = "/publisher/v1/sessions/box/results"
                await theirs_wire.send(head("POST", target, "transfer-encoding: chunked", keys[1]))
                assert (await spy.next("results")).data == {"taken": 0}
                shared = Upload(theirs_wire)
                await shared.send(record(frame.task_id, b'"stolen"'))
                assert (await shared.finish()).json["taken"] == 1
            answered = await served.ask(
                "POST", f"/publisher/v1/tasks/{frame.task_id}/result", keys[0], JSON, body=b'"mine"'
            )
            assert answered.status == 200
            assert (await client.wire.read_answer("POST")).body == b'"mine"'


async def mute(served: Served, wire: Wire) -> WirePublisher:
    """A publisher that holds its channel on this connection, and reads of it what it is told to."""
    await served.register("laptop", {"name": "qwen"})
    await wire.send(head("GET", "/publisher/v1/sessions/laptop/frames"))
    publisher = WirePublisher(served, "laptop", await Reading(wire, "GET").read_head())
    await publisher.next("hello")
    return publisher


async def test_who_reads_no_acknowledgements_loses_his_channel_and_with_it_the_upload() -> None:
    config = BrokerConfig(max_untaken_frame_bytes=20_000, max_inline_body_bytes=1024)
    async with (
        open_served(config) as served,
        served.server.connect(receive_buffer=1024) as wire,
        sharing(served, await mute(served, wire)) as shared,
    ):
        channel = served.broker._directory.sessions["laptop"].channel
        assert channel is not None
        piece = NOBODYS * 1024

        async def flood() -> None:
            while channel.ended is None:
                await shared.send(piece)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            await wait_until(lambda: channel.ended is not None)
            nursery.cancel_scope.cancel()
        assert channel.ended == "stale"
        assert channel.results is None
