"""An answer on its way to a client: held or forwarded, whole or cut, over real sockets."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.http.served import JSON, SSE, Served, open_served, wait_until
from tests.http.wire import send_until_stuck
from wakecall.config import BrokerConfig

CALL = {"model": "qwen"}
STREAM = {"model": "qwen", "stream": True}
MIB = 1 << 20

#: A client hears `: waiting` soon enough for a test.
SOON = BrokerConfig(waiting_s=0.05)


def last_event(text: bytes) -> dict[str, Any]:
    """The data of the last event, which is an error."""
    event = text.removesuffix(b"\n\n").rpartition(b"\n\n")[2]
    name, data = event.split(b"\n")
    assert name == b"event: error"
    loaded: dict[str, Any] = json.loads(data.removeprefix(b"data: "))
    return loaded


async def test_a_plain_answer_comes_whole_with_its_length(served: Served) -> None:
    async with served.publishing() as publisher, served.calling(CALL) as client:
        frame = await publisher.next("infer")
        assert frame.data["path"] == "/v1/chat/completions"
        assert frame.data["stream"] is False
        assert json.loads(frame.data["body"]) == CALL
        answer = await publisher.answer(frame, b'{"a": 1}')
        assert (answer.status, answer.json) == (200, {"outcome": "completed"})
        await client.read_head()
        assert (client.status, client.headers["content-length"]) == (200, "8")
        assert client.headers["content-type"] == "application/json"
        assert client.headers["x-content-type-options"] == "nosniff"
        assert client.headers["content-security-policy"] == "sandbox"
        assert await client.rest() == (b'{"a": 1}', False)


async def test_a_stream_arrives_piece_by_piece(served: Served) -> None:
    """The client has each event before its publisher sends the next one."""
    async with served.publishing() as publisher, served.calling(STREAM) as client:
        frame = await publisher.next("infer")
        assert frame.data["stream"] is True
        async with publisher.upload(frame, SSE) as upload:
            for number in range(5):
                event = b"data: %d\n\n" % number
                await upload.send(event)
                if number == 0:
                    await client.read_head()
                assert await client.piece() == event
            assert (await upload.finish()).status == 200
        assert await client.rest() == (b"", False)
        assert client.headers["content-type"] == "text/event-stream"
        assert client.headers["cache-control"] == "no-store"
        assert client.headers["x-accel-buffering"] == "no"
        assert "content-length" not in client.headers


async def test_a_stream_that_ends_without_an_empty_line_is_passed_on_whole(served: Served) -> None:
    async with served.publishing() as publisher, served.calling(STREAM) as client:
        await publisher.answer(await publisher.next("infer"), b"data: 1\n\ndata: [DONE]", SSE)
        await client.read_head()
        assert await client.rest() == (b"data: 1\n\ndata: [DONE]", False)


@pytest.mark.parametrize("content_type", ["application/x-ndjson", "audio/mpeg", "application/zip"])
async def test_other_bodies_are_forwarded_as_they_arrive_and_cut_when_they_break(
    served: Served, content_type: str
) -> None:
    async with served.publishing() as publisher, served.calling(CALL) as client:
        frame = await publisher.next("infer")
        async with publisher.upload(frame, f"content-type: {content_type}") as upload:
            await upload.send(b"one")
            await client.read_head()
            assert await client.piece() == b"one"
            await upload.send(b"two")
            assert await client.piece() == b"two"
        assert await client.rest() == (b"", True)
        expected = "application/octet-stream" if content_type == "application/zip" else content_type
        assert client.headers["content-type"] == expected


async def test_a_held_answer_that_breaks_off_is_a_clean_502(served: Served) -> None:
    async with served.publishing() as publisher, served.calling(CALL) as client:
        frame = await publisher.next("infer")
        async with publisher.upload(frame, JSON) as upload:
            await upload.send(b'{"half": ')
        answer = await client.wire.read_answer("POST")
        assert (answer.status, answer.code) == (502, "publisher_error")
        assert answer.headers["x-should-retry"] == "false"


async def test_a_json_answer_beyond_a_mebibyte_is_forwarded_as_it_arrives(served: Served) -> None:
    """And then it can only be cut."""
    async with served.publishing() as publisher, served.calling(CALL) as client:
        frame = await publisher.next("infer")
        async with publisher.upload(frame, JSON) as upload:
            sent = b""
            for _ in range(17):
                sent += b"x" * 65536
                await upload.send(b"x" * 65536)
            await client.read_head()
            got = b""
            while len(got) < len(sent):
                got += await client.piece()
            await upload.send(b"y")
            assert await client.piece() == b"y"
        assert await client.rest() == (b"", True)
        assert "content-length" not in client.headers


async def test_a_failure_before_the_head_has_its_own_status(served: Served) -> None:
    async with served.publishing() as publisher, served.calling(CALL) as client:
        frame = await publisher.next("infer")
        answer = await publisher.fail(frame, message="no memory left", code="oom", status=507)
        assert (answer.status, answer.json) == (200, {"outcome": "failed"})
        got = await client.wire.read_answer("POST")
        assert (got.status, got.code) == (507, "publisher_error")
        assert got.json["error"]["message"] == "no memory left"


async def test_a_failure_after_the_head_is_one_event_at_a_boundary_and_the_cut(served: Served) -> None:
    """What is unfinished never goes out, nor does a clean end."""
    async with served.publishing() as publisher, served.calling(STREAM) as client:
        frame = await publisher.next("infer")
        async with publisher.upload(frame, SSE) as upload:
            await upload.send(b"data: 1\n\ndata: unfini")
            await client.read_head()
            assert await client.piece() == b"data: 1\n\n"
            assert (await publisher.fail(frame, message="out of memory")).status == 200
            text, cut = await client.rest()
            assert cut
            assert b"unfini" not in text
            error = last_event(text)
            assert error == {
                "type": "error",
                "error": {
                    "message": "out of memory",
                    "type": "api_error",
                    "param": None,
                    "code": "publisher_error",
                },
            }
            # The upload is told at once, though it was sending nothing.
            answer = await upload.wire.read_answer("POST")
            assert (answer.status, answer.code) == (409, "task_already_settled")
            assert answer.headers["connection"] == "close"


async def test_a_failure_in_an_event_that_is_out_is_only_the_cut(served: Served) -> None:
    async with served.publishing() as publisher, served.calling(STREAM) as client:
        frame = await publisher.next("infer")
        async with publisher.upload(frame, SSE) as upload:
            large = b"data: " + b"x" * 70_000
            await upload.send(large)
            await client.read_head()
            got = b""
            while len(got) < len(large):
                got += await client.piece()
        assert await client.rest() == (b"", True)


async def test_the_responses_api_gets_its_own_members_in_the_event(served: Served) -> None:
    async with served.publishing() as publisher, served.calling(STREAM, "/v1/responses") as client:
        frame = await publisher.next("infer")
        async with publisher.upload(frame, SSE) as upload:
            await upload.send(b'data: {"type": "response.created", "sequence_number": 41}\n\n')
            await client.read_head()
            await client.piece()
        text, cut = await client.rest()
        assert cut
        error = last_event(text)
        assert error["sequence_number"] == 42
        assert error["code"] == error["error"]["code"] == "publisher_error"
        assert error["message"] == error["error"]["message"]
        assert error["param"] is None


async def test_a_streaming_caller_hears_that_it_is_waited_for() -> None:
    """From `waiting_s` on, again and again; then the stream itself, and its clean end."""
    async with open_served(SOON) as served, served.publishing() as publisher, served.calling(STREAM) as client:
        frame = await publisher.next("infer")
        await client.read_head()
        assert (client.status, client.headers["content-type"]) == (200, "text/event-stream")
        assert client.headers["cache-control"] == "no-store"
        assert await client.piece() == b": waiting\n\n"
        assert await client.piece() == b": waiting\n\n"
        await publisher.answer(frame, b"data: 1\n\n", SSE)
        text, cut = await client.rest()
        assert text.replace(b": waiting\n\n", b"") == b"data: 1\n\n"
        assert not cut


async def test_an_anthropic_caller_hears_pings() -> None:
    async with open_served(SOON) as served, served.publishing() as publisher:
        async with served.calling(STREAM, "/v1/messages") as client:
            frame = await publisher.next("infer")
            await client.read_head()
            assert await client.piece() == b'event: ping\ndata: {"type": "ping"}\n\n'
            await publisher.fail(frame, message="broken")
            text, cut = await client.rest()
            assert cut
            assert last_event(text)["error"]["message"] == "broken"


@pytest.mark.parametrize(
    ("status", "headers", "body", "code", "kind", "message"),
    [
        (
            404,
            [JSON],
            b'{"error": {"message": "no such adapter"}}',
            "upstream_404",
            "not_found_error",
            "no such adapter",
        ),
        (400, [JSON], b'{"detail": "bad"}', "upstream_400", "invalid_request_error", "bad"),
        (500, ["content-type: text/plain"], b"boom\n", "upstream_500", "api_error", "boom"),
        (429, [JSON], b'{"error": "slow down"}', "upstream_429", "rate_limit_error", "slow down"),
        (503, [JSON], b"", "upstream_503", "api_error", "The engine answered with status 503."),
        (500, [JSON], b'{"error": {"message": ["\xc3\xa9", 1]}}', "upstream_500", "api_error", '["é",1]'),
        (
            200,
            [JSON],
            b"{}",
            "publisher_error",
            "api_error",
            "The engine's answer is not the stream that was asked for.",
        ),
    ],
)
async def test_once_it_waits_whatever_is_no_stream_is_an_error_event(
    status: int, headers: list[str], body: bytes, code: str, kind: str, message: str
) -> None:
    async with open_served(SOON) as served, served.publishing() as publisher, served.calling(STREAM) as client:
        frame = await publisher.next("infer")
        await client.read_head()
        assert await client.piece() == b": waiting\n\n"
        await publisher.answer(frame, body, f"Wakecall-Status: {status}", *headers)
        text, cut = await client.rest()
        assert cut
        error = last_event(text)["error"]
        assert (error["code"], error["type"], error["message"]) == (code, kind, message)


async def test_once_it_waits_an_error_of_ours_is_an_event_too() -> None:
    config = BrokerConfig(waiting_s=0.05, first_byte_s=0.2)
    async with open_served(config) as served, served.publishing() as publisher, served.calling(STREAM) as client:
        await publisher.next("infer")
        text, cut = await (await client.read_head()).rest()
        assert cut
        assert text.startswith(b": waiting\n\n")
        error = last_event(text)["error"]
        assert (error["code"], error["phase"]) == ("deadline_exceeded", "first_byte")
        assert (await publisher.next("cancel")).data["reason"] == "deadline_exceeded"


@pytest.mark.parametrize(
    ("status", "extra"),
    [
        (400, {}),
        (404, {}),
        (408, {"x-should-retry": "false"}),
        (409, {"x-should-retry": "false"}),
        (422, {}),
        (429, {"retry-after": "1"}),
        (500, {"x-should-retry": "false"}),
        (503, {"retry-after": "1"}),
        (504, {"x-should-retry": "false"}),
    ],
)
@pytest.mark.parametrize("call", [CALL, STREAM], ids=["plain", "stream"])
async def test_an_engines_own_error_passes_untouched(
    served: Served, call: Any, status: int, extra: dict[str, str]
) -> None:
    body = b'{"error": {"message": "of the engine", "odd": 1.0}}'
    async with served.publishing() as publisher, served.calling(call) as client:
        await publisher.answer(await publisher.next("infer"), body, JSON, f"Wakecall-Status: {status}")
        answer = await client.wire.read_answer("POST")
        assert (answer.status, answer.body) == (status, body)
        found = {name: value for name, value in answer.headers.items() if name in ("retry-after", "x-should-retry")}
        assert found == extra


@pytest.mark.parametrize("status", [204, 205, 304])
async def test_an_answer_that_can_have_no_body_has_none(served: Served, status: int) -> None:
    async with served.publishing() as publisher, served.server.connect() as wire:
        body = json.dumps(CALL).encode()
        for _ in range(2):  # the connection goes on
            await wire.send(
                b"POST /v1/embeddings HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
            )
            await publisher.answer(await publisher.next("infer"), b"dropped", f"Wakecall-Status: {status}", JSON)
            answer = await wire.read_answer("POST")
            assert (answer.status, answer.body, answer.is_cut) == (status, b"", False)
            assert answer.headers.get("content-length") == ("0" if status == 205 else None)


async def test_an_empty_answer_is_an_answer(served: Served) -> None:
    async with served.publishing() as publisher, served.calling(CALL) as client:
        await publisher.answer(await publisher.next("infer"), b"")
        answer = await client.wire.read_answer("POST")
        assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", "0")


# Somebody leaves ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [CALL, STREAM], ids=["plain", "stream"])
@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_a_client_that_leaves_cancels_its_infer(served: Served, call: Any, how: str) -> None:
    """One `cancel` frame; what its publisher still sends is refused, and its slot is free."""
    async with served.publishing({"name": "qwen", "max_concurrency": 1}) as publisher:
        async with served.calling(call) as client:
            frame = await publisher.next("infer")
            if how == "rst":
                client.wire.reset()
        cancel = await publisher.next("cancel")
        assert (cancel.task_id, cancel.data["reason"]) == (frame.task_id, "client_disconnected")
        late = await publisher.answer(frame, b"{}")
        assert (late.status, late.code) == (410, "task_cancelled")
        async with served.calling(call) as client:
            await publisher.answer(await publisher.next("infer"), b"{}")
            await client.read_head()
            assert client.status == 200


async def test_a_client_that_leaves_in_the_middle_of_a_stream_ends_its_upload(served: Served) -> None:
    async with served.publishing() as publisher:
        async with served.calling(STREAM) as client:
            frame = await publisher.next("infer")
            async with publisher.upload(frame, SSE) as upload:
                await upload.send(b"data: 1\n\n")
                await client.read_head()
                await client.piece()
                await client.wire.stream.aclose()
                await publisher.next("cancel")
                answer = await upload.wire.read_answer("POST")
                assert (answer.status, answer.code) == (410, "task_cancelled")
                assert answer.headers["connection"] == "close"


async def test_a_client_that_leaves_the_queue_costs_its_publisher_nothing(served: Served) -> None:
    async with served.publishing({"name": "qwen", "max_concurrency": 1}) as publisher:
        async with served.calling(CALL) as first:
            frame = await publisher.next("infer")
            async with served.calling(CALL):
                await wait_until(lambda: served.broker.statistics().waiting == 1)
            await wait_until(lambda: served.broker.statistics().cancelled == 1)
            await publisher.answer(frame, b"{}")
            await first.read_head()
        async with served.calling(CALL) as third:
            # The next frame is the third's infer: neither the second's, nor a cancel.
            await publisher.answer(await publisher.next("infer"), b"{}")
            await third.read_head()


async def test_a_publisher_that_leaves_fails_a_plain_call(served: Served) -> None:
    async with served.calling(CALL) as early:
        answer = await early.wire.read_answer("POST")
        assert (answer.status, answer.code) == (404, "model_not_found")
    async with served.publishing() as publisher:
        async with served.calling(CALL) as client:
            await publisher.next("infer")
            await publisher.reading.wire.stream.aclose()
            answer = await client.wire.read_answer("POST")
            assert (answer.status, answer.code) == (503, "publisher_disconnected")
            assert answer.headers["x-should-retry"] == "false"
            assert "retry-after" not in answer.headers
    answer = await served.call(CALL)
    assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "model_offline", "2")


async def test_a_publisher_that_leaves_ends_a_stream_with_an_event_and_the_cut(served: Served) -> None:
    async with served.publishing() as publisher, served.calling(STREAM) as client:
        frame = await publisher.next("infer")
        async with publisher.upload(frame, SSE) as upload:
            await upload.send(b"data: 1\n\n")
            await client.read_head()
            await client.piece()
            await publisher.reading.wire.stream.aclose()
            text, cut = await client.rest()
            assert cut
            assert last_event(text)["error"]["code"] == "publisher_disconnected"
            assert (await upload.wire.read_answer("POST")).code == "task_cancelled"


async def test_a_slow_client_holds_back_its_own_upload_alone(served: Served) -> None:
    """It reads nothing: its upload stands still within bounds, and a sibling's answer passes by."""
    async with served.publishing() as publisher, served.server.connect(receive_buffer=4096) as slow:
        body = json.dumps(STREAM).encode()
        await slow.send(
            b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        frame = await publisher.next("infer")
        async with publisher.upload(frame, SSE) as upload:
            sent = 0

            async def send() -> None:
                nonlocal sent
                await upload.send(b"data: %b\n\n" % (b"x" * 65528))
                sent += 65536
                assert sent < 32 * MIB

            await send_until_stuck(send)
            async with served.calling(CALL) as sibling:
                await publisher.answer(await publisher.next("infer"), b"{}")
                await sibling.read_head()
                assert await sibling.rest() == (b"{}", False)


async def test_a_wake_carries_its_failure_to_all_who_wait(served: Served) -> None:
    async with served.publishing({"name": "qwen", "status": "hibernating"}) as publisher:
        async with served.calling(CALL) as first:
            frame = await publisher.next("wake")
            async with served.calling(STREAM) as second:
                await wait_until(lambda: served.broker.statistics().waiting == 2)
                await publisher.fail(frame, message="the disk is gone")
                for client in (first, second):
                    answer = await client.wire.read_answer("POST")
                    assert (answer.status, answer.code) == (503, "wake_failed")
                    assert answer.json["error"]["message"] == "the disk is gone"
                    assert answer.headers["x-should-retry"] == "false"
        async with served.calling(CALL) as third:
            frame = await publisher.next("wake")
            assert (await publisher.answer(frame, b"")).status == 200
            await publisher.answer(await publisher.next("infer"), b"{}")
            await third.read_head()
            assert third.status == 200


async def test_no_free_place_in_the_queue_is_429() -> None:
    config = BrokerConfig(max_waiting_per_llm=1)
    async with open_served(config) as served, served.publishing({"name": "qwen", "max_concurrency": 1}) as publisher:
        async with served.calling(CALL), served.calling(CALL):
            await publisher.next("infer")
            await wait_until(lambda: served.broker.statistics().waiting == 1)
            answer = await served.call(CALL)
            assert (answer.status, answer.code) == (429, "queue_full")
            assert int(answer.headers["retry-after"]) >= 1


async def test_a_deadline_names_its_phase() -> None:
    config = BrokerConfig(queue_s=0.05)
    async with open_served(config) as served, served.publishing({"name": "qwen", "max_concurrency": 1}) as publisher:
        async with served.calling(CALL):
            await publisher.next("infer")
            answer = await served.call(CALL)
            assert (answer.status, answer.code) == (504, "deadline_exceeded")
            assert answer.json["error"]["phase"] == "queue"
            assert answer.headers["x-should-retry"] == "false"


async def test_a_broker_that_stops_takes_nothing_on(served: Served) -> None:
    async with served.publishing():
        await served.broker.drain(0)
        answer = await served.call(CALL)
        assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "shutting_down", "5")
