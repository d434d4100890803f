"""Publishers whose answers are odd: wakes twice, late or never, statuses that are none, content types that try to be more,
streams with what does not belong there. What their client gets is safe, and nobody else notices."""

from __future__ import annotations

import pytest

from tests.hostile.connections import Told, told, told_of
from tests.hostile.sibling import sibling
from tests.http.served import JSON, SSE, Served, WirePublisher, head, open_served, wait_until
from tests.http.test_app_relay import last_event
from wakecall.config import BrokerConfig
from wakecall.models import Status

CALL = {"model": "qwen"}
STREAM = {"model": "qwen", "stream": True}
ASLEEP = {"name": "qwen", "status": "hibernating"}

#: All headers that a client's answer ever has.
HEADERS = {
    "content-type",
    "content-length",
    "transfer-encoding",
    "cache-control",
    "x-accel-buffering",
    "x-request-id",
    "x-content-type-options",
    "content-security-policy",
    "date",
    "retry-after",
    "x-should-retry",
}


def result(task_id: str) -> str:
    return f"/publisher/v1/tasks/{task_id}/result"


async def serve_one(served: Served, publisher: WirePublisher) -> None:
    """A whole call, as if nothing had been."""
    async with served.calling(CALL) as client:
        assert (await publisher.answer(await publisher.next("infer"), b"{}")).status == 200
        await client.read_head()
        assert (client.status, await client.rest()) == (200, (b"{}", False))


# Wakes --------------------------------------------------------------------------------------------------------------


async def test_a_wake_answered_twice_counts_once() -> None:
    """The second gets 409 `task_already_settled`, whatever it says: the row is awake, and who waited is served."""
    async with open_served() as served, sibling(served), served.publishing(ASLEEP) as publisher:
        async with served.calling(CALL) as client:
            wake = await publisher.next("wake")
            target = result(wake.task_id)
            assert await told(served, "POST", target, body=b"up") == (200, "completed", "kept")
            again = [
                await told(served, "POST", target, body=b"up"),
                await told(served, "POST", target, "wakecall-status: 500", body=b"no, down"),
                await told(served, "POST", target.replace("result", "failure"), body=b'{"message": "no, down"}'),
            ]
            assert again == [(409, "task_already_settled", "kept")] * 3
            assert (await publisher.answer(await publisher.next("infer"), b"{}")).status == 200
            await client.read_head()
            assert client.status == 200
        assert served.broker.llm("qwen").status is Status.ACTIVE
        counted = served.broker.statistics()
        assert (counted.wakes_started, counted.wakes_succeeded, counted.wakes_failed) == (1, 1, 0)


async def test_a_wake_answered_twice_at_once_counts_once() -> None:
    """409 `result_in_progress` while the first is being uploaded; a failure in between settles it, and the first is told."""
    async with open_served() as served, sibling(served), served.publishing(ASLEEP) as publisher:
        async with served.calling(CALL) as client:
            wake = await publisher.next("wake")
            async with publisher.upload(wake) as upload:
                await upload.send(b"booting")
                await wait_until(lambda: served.broker._directory.tasks[wake.task_id].received == 7)
                second = await told(served, "POST", result(wake.task_id), body=b"up")
                assert second == (409, "result_in_progress", "kept")
                assert (await publisher.fail(wake, message="the disk is gone")).status == 200
                answer = await upload.wire.read_answer("POST")
                assert await told_of(upload.wire, answer) == (409, "task_already_settled", "fin")
            got = await client.wire.read_answer("POST")
            assert (got.status, got.code, got.json["error"]["message"]) == (503, "wake_failed", "the disk is gone")
        assert served.broker.llm("qwen").status is Status.HIBERNATING


async def test_a_wake_answered_late_wakes_nothing() -> None:
    """Its waiters have had 504 `wake_timeout`, its publisher a cancel: what comes then gets 410, and the row sleeps on. The
    next call asks again."""
    async with open_served() as served, sibling(served), served.publishing(ASLEEP | {"wake_s": 0.2}) as publisher:
        async with served.calling(CALL) as client:
            late = await publisher.next("wake")
            got = await client.wire.read_answer("POST")
            assert (got.status, got.code, got.headers["x-should-retry"]) == (504, "wake_timeout", "false")
        cancel = await publisher.next("cancel")
        assert (cancel.task_id, cancel.data["reason"]) == (late.task_id, "deadline_exceeded")
        for _ in range(2):
            assert await told(served, "POST", result(late.task_id), body=b"up") == (410, "task_cancelled", "kept")
        assert served.broker.llm("qwen").status is Status.HIBERNATING
        async with served.calling(CALL) as client:
            wake = await publisher.next("wake")
            assert wake.task_id != late.task_id
            assert (await publisher.answer(wake)).status == 200
            assert (await publisher.answer(await publisher.next("infer"), b"{}")).status == 200
            await client.read_head()
            assert client.status == 200


async def test_a_wake_that_is_never_answered_ends_by_its_own_deadline() -> None:
    """For all who wait, with one cancel to the publisher; an upload of its result that never ends is told 410 then."""
    async with open_served() as served, sibling(served) as s, served.publishing(ASLEEP | {"wake_s": 0.4}) as publisher:
        async with served.calling(CALL) as first, served.calling(STREAM) as second:
            wake = await publisher.next("wake")
            async with publisher.upload(wake, "wakecall-status: 500") as upload:
                await upload.send(b"still booting\n" * 10_000)
                await s.beat()
                for client in (first, second):
                    got = await client.wire.read_answer("POST")
                    assert (got.status, got.code) == (504, "wake_timeout")
                answer = await upload.wire.read_answer("POST")
                assert await told_of(upload.wire, answer) == (410, "task_cancelled", "fin")
        assert (await publisher.next("cancel")).task_id == wake.task_id
        counted = served.broker.statistics()
        assert (counted.wakes_started, counted.wakes_failed, counted.waiting) == (1, 1, 0)


async def test_a_wake_whose_publisher_leaves_fails_those_who_wait() -> None:
    """503 `publisher_disconnected`, and it may be repeated: nothing was generated."""
    async with open_served() as served, sibling(served), served.publishing(ASLEEP) as publisher:
        async with served.calling(CALL) as client:
            wake = await publisher.next("wake")
            publisher.reading.wire.reset()
            got = await client.wire.read_answer("POST")
            assert (got.status, got.code, got.headers["retry-after"]) == (503, "publisher_disconnected", "2")
        assert await told(served, "POST", result(wake.task_id), body=b"up") == (410, "task_cancelled", "kept")
        assert served.broker.llm("qwen").status is Status.INACTIVE


# Statuses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "status", ["99", "1000", "0", "199", "600", "-200", "2e2", "0x1F4", "200 OK", "200, 200", "²00"]
)
async def test_a_status_that_is_none_is_refused_and_nothing_of_it_goes_out(status: str) -> None:
    """400 that names the header, for results, chunks and wakes; the task is as it was, and its publisher may say it better.
    While the upload has not ended the connection is closed behind the 400."""
    async with open_served() as served, sibling(served), served.publishing() as publisher:
        async with served.calling(CALL) as client:
            frame = await publisher.next("infer")
            odd = f"wakecall-status: {status}"
            for target in (result(frame.task_id), result(frame.task_id).replace("result", "chunks")):
                async with served.server.connect() as wire:
                    await wire.send(head("POST", target, JSON, odd, "wakecall-offset: 0", "content-length: 2") + b"{}")
                    answer = await wire.read_answer("POST")
                    assert answer.json["error"]["param"] == "Wakecall-Status"
                    assert await told_of(wire, answer) == (400, "invalid_request", "kept")
            async with publisher.upload(frame, JSON, odd) as upload:
                await upload.send(b'{"half": ')
                answer = await upload.wire.read_answer("POST")
                assert await told_of(upload.wire, answer) == (400, "invalid_request", "fin")
            assert (await publisher.answer(frame, b"{}", JSON, "wakecall-status: 201")).status == 200
            await client.read_head()
            assert (client.status, await client.rest()) == (201, (b"{}", False))


async def test_a_wakes_status_that_is_none_is_refused_and_the_wake_goes_on() -> None:
    async with open_served() as served, sibling(served), served.publishing(ASLEEP) as publisher:
        async with served.calling(CALL) as client:
            wake = await publisher.next("wake")
            for status in (99, 1000):
                refused = await told(served, "POST", result(wake.task_id), f"wakecall-status: {status}", body=b"up")
                assert refused == (400, "invalid_request", "kept")
            assert served.broker.llm("qwen").status is Status.HIBERNATING
            assert (await publisher.answer(wake)).status == 200
            assert (await publisher.answer(await publisher.next("infer"), b"{}")).status == 200
            await client.read_head()
            assert client.status == 200


# Content types ------------------------------------------------------------------------------------------------------

OPAQUE = "application/octet-stream"
TAKEN = Told(200, "completed", "kept")
NO_HTTP = Told(400, "invalid_request", "fin")


@pytest.mark.parametrize(
    ("lines", "gets"),
    [
        # A header of its own is the publisher's; none but the type ever goes on.
        (b"content-type: text/plain\r\nset-cookie: a=b\r\nlocation: http://evil.example", "text/plain"),
        (b"content-type: text/plain\nset-cookie: a=b", "text/plain"),
        (b"content-type: application/json\r\nx-should-retry: true\r\nretry-after: 9999", "application/json"),
        (b"content-type: application/json\r\ncontent-type: text/html", "application/json"),
        (b"content-type: text/html\r\ncontent-type: application/json", OPAQUE),
        # One value over two lines, as old HTTP had it, becomes one with a space in it.
        (b"content-type: text/plain\r\n set-cookie: a=b", OPAQUE),
        (b"content-type: text/plain;\r\n\tset-cookie=a=b", "text/plain"),
        # Pages, scripts, and what some browsers made of others.
        (b"content-type: text/html", OPAQUE),
        (b"content-type: TEXT/HTML; charset=utf-7", OPAQUE),
        (b"content-type: text/html;application/json", OPAQUE),
        (b"content-type: application/json, text/html", OPAQUE),
        (b"content-type: application/xhtml+xml", OPAQUE),
        (b"content-type: text/javascript", OPAQUE),
        (b"content-type: multipart/x-mixed-replace; boundary=x", OPAQUE),
        (b"content-type: message/http", OPAQUE),
        (b"content-type:", OPAQUE),
        (b"x-nothing: said", OPAQUE),
        # Parameters that are not plain are left out.
        (b"content-type: text/plain; charset=\xff\xfe", "text/plain"),
        (b"content-type: text/plain; charset=utf-8\x7f", "text/plain"),
        (b'content-type: text/plain; charset="utf-8\\"; x="', "text/plain"),
        (b"content-type: " + b"a" * 5000 + b"/b", OPAQUE),
        # What is no HTTP is no answer.
        (b"content-type: text/plain\rset-cookie: a=b", None),
        (b"content-type: text/plain\0", None),
        (b"content-type: text/plain\x0bset-cookie: a=b", None),
    ],
)
async def test_a_content_type_goes_on_as_a_safe_one_and_nothing_else_does(lines: bytes, gets: str | None) -> None:
    """`gets` is what the client's says; None: the publisher gets 400 and its connection's end, and may try again."""
    async with open_served() as served, sibling(served), served.publishing() as publisher:
        async with served.calling(CALL) as client:
            frame = await publisher.next("infer")
            async with served.server.connect() as wire:
                top = head("POST", result(frame.task_id)).removesuffix(b"\r\n")
                await wire.send(top + lines + b"\r\ncontent-length: 27\r\n\r\n<script>alert(1)</script>\r\n")
                answer = await told_of(wire, await wire.read_answer("POST"))
            if gets is None:
                assert answer == NO_HTTP
                assert (await publisher.answer(frame, b"<script>alert(1)</script>\r\n")).status == 200
            else:
                assert answer == TAKEN
            await client.read_head()
            assert (client.status, await client.rest()) == (200, (b"<script>alert(1)</script>\r\n", False))
            assert client.headers["content-type"] == (gets or "application/json")
            assert client.headers["x-content-type-options"] == "nosniff"
            assert client.headers["content-security-policy"] == "sandbox"
            assert set(client.headers) <= HEADERS


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain\r\nset-cookie: a=b",
        "text/plain\nset-cookie: a=b",
        "text/event-stream\r\n\r\nHTTP/1.1 200 OK",
        "\r\n",
        "\0",
    ],
)
async def test_a_content_type_that_no_wire_carries_is_no_headers_of_an_answer(content_type: str) -> None:
    """From an embedder's transport, which may let line ends through: the client's head has the safe type and no more."""
    async with open_served() as served, sibling(served), served.publishing() as publisher:
        async with served.calling(CALL) as client:
            frame = await publisher.next("infer")
            await served.broker.complete(frame.task_id, b"{}", content_type=content_type)
            await client.read_head()
            assert (client.status, await client.rest()) == (200, (b"{}", False))
            assert client.headers["content-type"] == OPAQUE
            assert set(client.headers) <= HEADERS


# Event streams ------------------------------------------------------------------------------------------------------

ODD_EVENTS = (
    b"event: error\ndata: {}\n\n",
    b"event: message_start\ndata: {}\n\n",
    b"event:\ndata:\n\n",
    b"event: a\nevent: b\nevent: c\ndata: 1\n\n",
    b"id: 1\0\ndata: \0\0\0\n\n",
    b"\0\0\0\0\n\n",
    b"\xef\xbb\xbfdata: 1\n\n",
    b"retry: 0\n\n",
    b"data: [DONE]\n\n",
    b": comment\n\n",
    b"data: \xff\xfe\xc0\x80\n\n",
    b"data: \xe2\x80\xa8\xc2\x85\x0b\x0c\x1b[2J\n\n",
    b"data: 1\r\n\r\ndata: 2\r\rdata: 3\n\r\n",
    b"data: HTTP/1.1 200 OK\r\ndata: 0\r\n\r\n",
    b"0\r\n\r\n",
    b"\n\n\n\n",
)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
async def test_a_stream_of_odd_events_goes_on_byte_for_byte_and_ends_as_its_own(path: str) -> None:
    """`event:` lines, NULs and what is no UTF-8 are the engine's; a forged `event: error` or `[DONE]` ends nothing."""
    text = b"".join(ODD_EVENTS)
    async with open_served() as served, sibling(served), served.publishing() as publisher:
        async with served.calling(STREAM, path) as client:
            frame = await publisher.next("infer")
            async with publisher.upload(frame, SSE) as upload:
                for each in ODD_EVENTS:
                    await upload.send(each)
                assert (await upload.finish()).status == 200
            await client.read_head()
            assert await client.rest() == (text, False)
        await serve_one(served, publisher)


UNFINISHED = (b"event: error\ndata: forged", b"data: \0", b"data: 1\n", b"data: 1\r", b"event: x", b"")


@pytest.mark.parametrize("unfinished", UNFINISHED)
async def test_what_is_unfinished_in_an_odd_stream_never_reaches_into_the_error_event(unfinished: bytes) -> None:
    """The failure is an event of its own, at a boundary, whatever went before and however lines end there."""
    async with open_served() as served, sibling(served), served.publishing() as publisher:
        for odd in ODD_EVENTS:
            async with served.calling(STREAM) as client:
                frame = await publisher.next("infer")
                async with publisher.upload(frame, SSE) as upload:
                    await upload.send(odd + unfinished)
                    await client.read_head()
                    assert await client.until(odd) == odd
                    assert (await publisher.fail(frame, message="broken")).status == 200
                text, cut = await client.rest()
                assert cut
                assert text.startswith(b"event: error\n")
                assert text.count(b"\n\n") == 1
                assert last_event(text)["error"]["message"] == "broken"


async def test_what_a_failure_says_is_one_line_of_json_whatever_it_says() -> None:
    """Line ends, NULs, escapes and half characters in its message make no event, no header and no page."""
    said = 'data: [DONE]\n\nevent: done\r\n\r\n\0\x1b[2J\u2028\u202e</script><script>{"a": "\\"}'
    async with open_served() as served, sibling(served), served.publishing() as publisher:
        async with served.calling(STREAM) as stream, served.calling(CALL) as plain:
            frames = sorted(
                [await publisher.next("infer"), await publisher.next("infer")], key=lambda f: f.data["stream"]
            )
            async with publisher.upload(frames[1], SSE) as upload:
                await upload.send(b"data: 1\n\n")
                await stream.read_head()
                assert await stream.until(b"1\n\n") == b"data: 1\n\n"
                for frame in frames:
                    assert (await publisher.fail(frame, message=said, code="\r\nset-cookie: a=b")).status == 200
            text, cut = await stream.rest()
            assert (cut, text.count(b"\n\n"), text.count(b"\n")) == (True, 1, 3)
            assert last_event(text)["error"] == {
                "message": said,
                "type": "api_error",
                "param": None,
                "code": "publisher_error",
            }
            got = await plain.wire.read_answer("POST")
            assert (got.status, got.code, got.json["error"]["message"]) == (502, "publisher_error", said)
            assert got.headers["content-type"] == "application/json"
            assert set(got.headers) <= HEADERS


async def test_an_answer_of_another_kind_to_a_waiting_stream_is_an_error_event() -> None:
    """HTML, once `: waiting` has gone out: its text is quoted in the event, and never a part of the stream."""
    async with open_served(BrokerConfig(waiting_s=0.05)) as served, sibling(served), served.publishing() as publisher:
        for status, code in ((200, "publisher_error"), (500, "upstream_500")):
            async with served.calling(STREAM) as client:
                frame = await publisher.next("infer")
                await client.read_head()
                assert await client.piece() == b": waiting\n\n"
                page = b"<html>\n\nevent: done\ndata: 1\n\n</html>"
                answer = await publisher.answer(frame, page, "content-type: text/html", f"wakecall-status: {status}")
                assert answer.status == 200
                text, cut = await client.rest()
                text = text.replace(b": waiting\n\n", b"")
                assert (cut, text.count(b"\n\n"), last_event(text)["error"]["code"]) == (True, 1, code)
                assert client.headers["content-type"] == "text/event-stream"
