"""Uploads whose framing is not true: they say more or less than they send, stop in the middle, or are no HTTP."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from tests.hostile.connections import Told, told, told_of
from tests.hostile.sibling import sibling
from tests.hostile.test_uploads import AUDIO, CALL, EVENT, STREAM, arrival_of, result, serve_one
from tests.http.served import JSON, SSE, head, open_served, wait_until
from tests.http.test_app_relay import last_event
from wakecall.config import BrokerConfig

NO_HTTP = Told(400, "invalid_request", "fin")


@pytest.mark.parametrize(
    ("call", "content_type"), [pytest.param(STREAM, SSE, id="events"), pytest.param(CALL, JSON, id="held")]
)
async def test_what_goes_beyond_its_content_length_is_not_of_the_answer(call: Any, content_type: str) -> None:
    """The upload ends where it said, with 200. What follows is the publisher's next request: 400 and the end if it is none,
    its answer if it is one; none of it reaches a client."""
    async with open_served() as served, sibling(served), served.publishing() as publisher:
        for surplus, status, code in (
            (b"data: beyond\n\n", 400, "invalid_request"),
            (head("POST", "/publisher/v1/tasks/nobody/failure", "content-length: 0"), 400, "invalid_json"),
            (head("GET", "/publisher/v1/tasks/nobody/body"), 404, "task_not_found"),
        ):
            async with served.calling(call) as client:
                frame = await publisher.next("infer")
                async with served.server.connect() as wire:
                    top = head("POST", result(frame), content_type, f"content-length: {len(EVENT)}")
                    await wire.send(top + EVENT + surplus)
                    answer = await wire.read_answer("POST")
                    assert (answer.status, answer.json) == (200, {"outcome": "completed"})
                    await wire.send(b"\r\n\r\n" if b"beyond" in surplus else b"")
                    second = await wire.read_answer()
                    assert (second.status, second.code) == (status, code)
                await client.read_head()
                assert (client.status, await client.rest()) == (200, (EVENT, False))


@pytest.mark.parametrize("end", ["fin", "rst"])
@pytest.mark.parametrize(
    ("framing", "begins"),
    [
        pytest.param("content-length: 1000", b"", id="content-length"),
        pytest.param("transfer-encoding: chunked", b"3E8\r\n", id="half-a-chunk"),
        pytest.param("transfer-encoding: chunked", b"1A\r\n", id="no-last-chunk"),
    ],
)
async def test_an_upload_that_stops_short_of_what_it_said_has_failed(framing: str, begins: bytes, end: str) -> None:
    """Whoever says no more than that he will not send the rest gets 400 and the end. The client: events up to the last whole
    one, the error event and the cut; of an answer that was held, a clean 502; of any other, the cut."""
    async with open_served() as served, sibling(served) as s, served.publishing() as publisher:
        for call, content_type in ((STREAM, SSE), (CALL, JSON), (CALL, AUDIO)):
            async with served.calling(call) as client:
                frame = await publisher.next("infer")
                async with served.server.connect() as wire:
                    await wire.send(head("POST", result(frame), content_type, framing) + begins + EVENT + b"data: half")
                    if content_type == JSON:
                        # A reset throws away what its receiver has not read yet.
                        infer = served.broker._directory.tasks[frame.task_id]
                        await arrival_of(infer, len(EVENT))
                    else:
                        await client.read_head()
                        assert client.status == 200
                        await client.until(EVENT)
                    if end == "rst":
                        wire.reset()
                    else:
                        await wire.half_close()
                        assert await told_of(wire, await wire.read_answer("POST")) == NO_HTTP
                if content_type == JSON:
                    got = await client.wire.read_answer("POST")
                    assert (got.status, got.code, got.is_cut) == (502, "publisher_error", False)
                else:
                    text, cut = await client.rest()
                    assert cut
                if content_type == SSE:
                    assert text.startswith(b"event: error\n")
                    assert last_event(text)["error"]["code"] == "publisher_error"
            # It was the publisher who ended it, and there is no second try.
            late = await told(served, "POST", result(frame), JSON, body=b"{}")
            assert late == (409, "task_already_settled", "kept")
        await s.beat()
        await serve_one(served, publisher)


async def test_an_upload_that_declares_more_than_it_sends_and_stays_is_ended_by_the_idle_deadline() -> None:
    """The client of a held answer has a clean 504, that of a stream an event and the cut; the publisher a cancel and 410."""
    async with open_served(BrokerConfig(idle_s=0.6)) as served, sibling(served), served.publishing() as publisher:
        for call, content_type in ((STREAM, SSE), (CALL, JSON)):
            async with served.calling(call) as client:
                frame = await publisher.next("infer")
                async with served.server.connect() as wire:
                    await wire.send(head("POST", result(frame), content_type, "content-length: 1000") + EVENT)
                    got = await client.wire.read_answer("POST")
                    if content_type == JSON:
                        assert (got.status, got.json["error"]["phase"], got.is_cut) == (504, "idle", False)
                    else:
                        assert (got.status, last_event(got.body)["error"]["phase"], got.is_cut) == (200, "idle", True)
                    assert (await publisher.next("cancel")).data["reason"] == "deadline_exceeded"
                    answer = await wire.read_answer("POST")
                    assert await told_of(wire, answer) == (410, "task_cancelled", "fin")


@pytest.mark.parametrize(
    ("framing", "said"),
    [
        (["content-length: 2", "content-length: 3"], NO_HTTP),
        (["content-length: 2, 3"], NO_HTTP),
        (["content-length: -2"], NO_HTTP),
        (["content-length: +2"], NO_HTTP),
        (["content-length: 0x2"], NO_HTTP),
        (["content-length: 2 2"], NO_HTTP),
        (["content-length: "], NO_HTTP),
        (["content-length: " + "9" * 5000], NO_HTTP),
        (["content-length: 2", "transfer-encoding: chunked"], NO_HTTP),
        (["transfer-encoding: gzip, chunked"], Told(501, "invalid_request", "fin")),
        (["transfer-encoding: identity"], Told(501, "invalid_request", "fin")),
        (["transfer-encoding: chunked, chunked"], Told(501, "invalid_request", "fin")),
    ],
)
async def test_a_framing_that_is_none_never_reaches_the_task(framing: list[str], said: Told) -> None:
    """It is refused and the connection ends; the task is as it was, and its next answer is its answer."""
    async with open_served() as served, sibling(served), served.publishing() as publisher:
        async with served.calling(CALL) as client:
            frame = await publisher.next("infer")
            async with served.server.connect() as wire:
                await wire.send(head("POST", result(frame), JSON, *framing) + b"{}")
                assert await told_of(wire, await wire.read_answer("POST")) == said
            assert (await publisher.answer(frame, b'{"good": 1}')).status == 200
            await client.read_head()
            assert (client.status, await client.rest()) == (200, (b'{"good": 1}', False))


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(b"zz\r\n", id="no-number"),
        pytest.param(b"-1\r\n", id="negative"),
        pytest.param(b"0x10\r\n", id="prefix"),
        pytest.param(b"10 10\r\n", id="two"),
        pytest.param(b"f" * 40 + b"\r\n", id="endless-number"),
        pytest.param(b"10\r\n" + b"x" * 16 + b"XX", id="no-line-end"),
        pytest.param(b"10;" + b"x" * 200_000, id="endless-extension"),
        pytest.param(b"0\r\n" + b"x: y\r\n" * 40_000, id="endless-trailer"),
        pytest.param(b"0\r\nno trailer\r\n\r\n", id="no-trailer"),
    ],
)
async def test_a_chunk_that_is_none_breaks_its_upload_off(broken: bytes) -> None:
    """400, or 431 for what is endless, and the connection's end; the client has what came before, the error and the cut."""
    async with open_served() as served, sibling(served), served.publishing() as publisher:
        async with served.calling(STREAM) as client:
            frame = await publisher.next("infer")
            async with served.server.connect() as wire, trio.open_nursery() as nursery:
                await wire.send(head("POST", result(frame), SSE, "transfer-encoding: chunked"))
                await wire.send(b"10\r\n%b\r\n" % EVENT)
                await client.read_head()
                assert await client.until(EVENT) == EVENT
                nursery.start_soon(wire.send, b"10\r\n%b\r\n" % EVENT + broken)
                answer = await wire.read_answer("POST")
                assert (answer.status, answer.headers["connection"]) in {(400, "close"), (431, "close")}
            text, cut = await client.rest()
            # What came in the same breath before it was still an answer.
            assert (cut, text.startswith(EVENT + b"event: error\n")) == (True, True)
            assert last_event(text)["error"]["code"] == "publisher_error"
        await serve_one(served, publisher)


@pytest.mark.parametrize("end", ["fin", "rst"])
async def test_a_piece_that_dies_halfway_counts_as_far_as_it_came(end: str) -> None:
    """On the way of `chunks` the task lives on: what follows may begin at what has arrived or before it, a gap is 409."""
    async with open_served() as served, sibling(served), served.publishing() as publisher:
        async with served.calling(STREAM) as client:
            frame = await publisher.next("infer")
            target = f"/publisher/v1/tasks/{frame.task_id}/chunks"
            infer = served.broker._directory.tasks[frame.task_id]
            async with served.server.connect() as wire:
                top = head("POST", target, SSE, "wakecall-offset: 0", "transfer-encoding: chunked")
                await wire.send(top + b"3E8\r\n" + EVENT + b"data: ha")
                await client.read_head()
                assert await client.until(EVENT) == EVENT
                if end == "rst":
                    wire.reset()
                else:
                    await wire.half_close()
                    assert await told_of(wire, await wire.read_answer("POST")) == NO_HTTP
                if infer.upload is not None:
                    await wait_until(lambda: infer.upload is None)
            arrived = len(EVENT) + 8
            gap = await told(served, "POST", target, SSE, f"wakecall-offset: {arrived + 1}", body=b"lf\n\n")
            assert gap == (409, "offset_gap", "kept")
            more = await told(served, "POST", target, SSE, f"wakecall-offset: {arrived}", body=b"lf\n\n")
            assert more == (200, "taken", "kept")
            assert await client.until(b"\n\n") == b"data: half\n\n"
            whole = await publisher.answer(frame, EVENT + b"data: half\n\n" + EVENT, SSE, "wakecall-offset: 0")
            assert (whole.status, whole.json) == (200, {"outcome": "completed"})
            assert await client.rest() == (EVENT, False)
