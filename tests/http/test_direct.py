"""The short way past Quart's dispatch: taken by hot requests, left as soon as somebody put something of his own there."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import trio
import trio.testing
from quart import Response, signals

from tests.http.served import JSON, SSE, Served, as_bytes, head, open_served, wait_until
from tests.http.wire import Answer
from wakecall.errors import WakecallError
from wakecall.http.raw import RawHeaders

CHAT = "/v1/chat/completions"
FRAMES = "/publisher/v1/sessions/laptop/frames"
CALL = {"model": "qwen", "messages": [{"role": "user", "content": "hello"}]}


async def wire_ask(served: Served, method: str, target: str, *headers: str, body: bytes = b"") -> Answer:
    """Of an app that an embedder has changed, whose answers no description knows."""
    async with served.server.connect() as wire:
        await wire.send(head(method, target, *headers, f"content-length: {len(body)}") + body)
        return await wire.read_answer(method)


def undated(answer: Answer) -> dict[str, str]:
    """Its headers, but for when it was made."""
    return {name: value for name, value in answer.headers.items() if name != "date"}


class Dispatches:
    """Counts what Quart dispatches."""

    def __init__(self, served: Served) -> None:
        self.paths: list[str] = []
        dispatch = served.app.full_dispatch_request

        async def counted(context: Any = None) -> Any:
            self.paths.append(context.request.path)
            return await dispatch(context)

        served.app.full_dispatch_request = counted


async def answered(served: Served, target: str = CHAT) -> int:
    """A call that a publisher answers, heartbeat and all; its status."""
    statuses: list[int] = []
    async with served.publishing() as publisher, trio.open_nursery() as nursery:

        async def call() -> None:
            statuses.append((await served.call(CALL, target)).status)

        nursery.start_soon(call)
        frame = await publisher.next("infer")
        assert (await publisher.answer(frame, {"choices": []})).status == 200
        beat = await served.ask("POST", "/publisher/v1/sessions/laptop/heartbeat", JSON, body=b"{}")
        assert beat.status == 200
    return statuses[0]


async def test_calls_results_heartbeats_and_channels_go_past_quart_and_nothing_else_does(served: Served) -> None:
    seen = Dispatches(served)
    assert await answered(served) == 200
    assert seen.paths == ["/publisher/v1/sessions/laptop"]
    seen.paths.clear()
    for target in (f"{CHAT}/", "/v1/chat%2Fcompletions/x", "/publisher/v1/tasks/a b/result"):
        assert (await served.ask("POST", target.replace(" ", "%20"), JSON, body=b"{}")).status == 404
    assert (await served.ask("GET", CHAT)).status == 405
    for method in ("HEAD", "POST"):  # a HEAD would open a channel and end the one before
        assert (await served.ask(method, FRAMES)).status == 405
    assert len(seen.paths) == 6


@pytest.mark.parametrize("kind", ["before_request", "after_request", "teardown_request", "url_value_preprocessor"])
async def test_a_hook_of_an_embedder_sees_every_request(served: Served, kind: str) -> None:
    seen: list[object] = []

    async def hook(*given: Any) -> Any:
        seen.append(kind)
        return given[0] if kind == "after_request" else None

    def preprocess(endpoint: str | None, _: Any) -> None:
        seen.append(endpoint)

    getattr(served.app, kind)(preprocess if kind == "url_value_preprocessor" else hook)
    assert await answered(served) == 200
    # Register, channel, call, result, heartbeat.
    assert len(seen) == 5


@pytest.mark.parametrize(
    "kind", ["error handler", "error handler of a status", "teardown_appcontext", "request_started"]
)
async def test_what_an_embedder_hears_of_errors_and_requests_he_hears_of_hot_ones_too(
    served: Served, kind: str
) -> None:
    heard: list[str] = []

    async def on_error(error: Exception) -> Response:
        heard.append(type(error).__name__)
        return Response(b"mine", 418)

    async def on_signal(*_: Any, **__: Any) -> None:
        heard.append(kind)

    with contextlib.ExitStack() as stack:
        if kind == "error handler":
            served.app.register_error_handler(WakecallError, on_error)
        elif kind == "error handler of a status":
            served.app.register_error_handler(404, on_error)
        elif kind == "teardown_appcontext":
            served.app.teardown_appcontext(on_signal)
        else:
            stack.enter_context(signals.request_started.connected_to(on_signal, served.app))
        answer = await wire_ask(served, "POST", CHAT, JSON, body=as_bytes({"model": "nobody"}))
        nowhere = await wire_ask(served, "GET", "/nowhere")
    if kind == "error handler":
        assert (answer.status, answer.body, heard) == (418, b"mine", ["ModelNotFound"])
        assert nowhere.status == 404
    elif kind == "error handler of a status":
        assert (answer.status, nowhere.status, heard) == (404, 418, ["NotFound"])
    else:
        assert (answer.status, nowhere.status, heard) == (404, 404, [kind, kind])


async def test_a_view_of_an_embedder_stands_in_for_ours(served: Served) -> None:
    async def view() -> Response:
        return Response(b"mine", 202, content_type="text/plain")

    served.app.view_functions["relay_chat_completions"] = view
    async with served.server.connect() as wire:
        await wire.send(head("POST", CHAT, JSON, "content-length: 2") + b"{}")
        answer = await wire.read_answer("POST")
    assert (answer.status, answer.body) == (202, b"mine")


async def test_both_ways_make_the_same_answers(served: Served) -> None:
    """Down to the headers, but for what is each answer's own."""

    async def answers() -> list[Any]:
        found = []
        for target in (FRAMES, "/publisher/v1/sessions/none/frames"):
            for headers in (), ("origin: https://evil.example",):
                answer = await served.ask("GET", target, *headers, "x-request-id: mine")
                found.append((answer.status, undated(answer), json.loads(answer.body)))
        for target, headers, body in (
            (CHAT, (JSON,), as_bytes({"model": "nobody"})),
            (CHAT, (JSON,), b"{"),
            (CHAT, (JSON, "content-encoding: gzip"), as_bytes(CALL)),
            (CHAT, ("origin: https://evil.example",), as_bytes(CALL)),
            ("/publisher/v1/tasks/none/result", (JSON,), b"x" * 300_000),
            ("/publisher/v1/tasks/none/chunks", (JSON,), b""),
            ("/publisher/v1/sessions/none/heartbeat", (JSON,), b"{}"),
            ("/publisher/v1/sessions/none/heartbeat", (JSON,), b'{"llms": 1}'),
        ):
            answer = await served.ask("POST", target, *headers, "x-request-id: mine", body=body)
            found.append((answer.status, undated(answer), json.loads(answer.body)))
        return found

    short = await answers()
    served.app.before_request(lambda: None)
    assert short == await answers()
    assert [status for status, *_ in short] == [404, 403, 404, 403, 404, 400, 415, 403, 404, 400, 404, 400]


EVENT = b'data: {"n": 1}\n\n'


@pytest.mark.parametrize(
    ("is_stream", "headers", "pieces", "is_whole"),
    [
        (False, (JSON,), [b'{"n": 1}'], True),
        (False, (JSON,), [b'"' + b"x" * 200_000 + b'"'], True),
        (False, (JSON,), [b'{"n"'], False),
        (False, (JSON, "wakecall-status: 429"), [b'{"error": "slow down"}'], True),
        (False, ("wakecall-status: 204",), [], True),
        (False, ("content-type: audio/mpeg",), [b"ID3", b"x" * 100_000], True),
        (False, ("content-type: audio/mpeg",), [b"ID3"], False),
        (False, ("content-type: application/x-ndjson",), [b"{}\n", b"{}\n"], True),
        (True, (SSE,), [EVENT, EVENT, b"data: [DONE]\n\n"], True),
        (True, (SSE,), [EVENT], False),
        (True, (JSON, "wakecall-status: 400"), [b'{"error": "no"}'], True),
    ],
    ids=[
        "plain",
        "large",
        "broken",
        "error",
        "no content",
        "raw",
        "raw, cut",
        "ndjson",
        "events",
        "events, cut",
        "refused",
    ],
)
async def test_both_ways_pass_the_same_answers_on(
    is_stream: bool, headers: tuple[str, ...], pieces: list[bytes], is_whole: bool
) -> None:
    """Head, body and end, to the client and to his publisher."""
    found = []
    for is_hooked in (False, True):
        async with open_served() as served, served.publishing() as publisher:
            if is_hooked:
                served.app.before_request(lambda: None)
            body = {**CALL, "stream": is_stream}
            async with served.calling(body, CHAT, JSON, "x-request-id: mine") as reading:
                frame = await publisher.next("infer")
                told = None
                async with publisher.upload(frame, *headers, "x-request-id: mine") as upload:
                    for piece in pieces:
                        await upload.send(piece)
                    if is_whole:
                        answer = await upload.finish()
                        told = answer.status, dict(answer.headers), answer.body
                    elif is_stream or "audio" in headers[0]:
                        await reading.read_head()
                        assert await reading.piece() == pieces[0]
                if not reading.status:
                    await reading.read_head()
                rest = await reading.rest()
                found.append((reading.status, reading.headers, rest, told))
    for _, client_headers, _, told in found:
        client_headers.pop("date", None)
        if told is not None:
            told[1].pop("date", None)
    assert found[0] == found[1]
    assert found[0][1]["x-request-id"] == "mine"


@pytest.mark.parametrize("host", ["a..b", ".a", "a.", "-a", "a_b", "[::1]", "x" * 63, "x" * 64, "%41", ""])
async def test_a_host_is_judged_alike_on_both_ways(host: str) -> None:
    """Of a broker with keys, which takes any name for its own."""
    found = []
    for is_hooked in (False, True):
        async with open_served() as served:
            if is_hooked:
                served.app.before_request(lambda: None)
            assert (await served.ask("POST", "/admin/v1/keys", JSON, body=b'{"role": "admin"}')).status == 201
            answer = await served.ask("POST", CHAT, JSON, body=as_bytes({"model": "nobody"}), host=host)
            found.append((answer.status, answer.code))
    assert found[0] == found[1]
    assert found[0][0] == (400 if host in ("a..b", ".a", "x" * 64) else 401)


async def test_a_client_who_leaves_is_noticed_at_once(served: Served) -> None:
    async with served.publishing() as publisher:
        async with served.calling(CALL):
            frame = await publisher.next("infer")
        cancel = await publisher.next("cancel")
        assert cancel.data == {"task_id": frame.task_id, "reason": "client_disconnected"}


async def test_a_publisher_who_leaves_in_the_middle_of_an_upload_has_broken_it_off(served: Served) -> None:
    async with served.publishing() as publisher, served.calling(CALL) as reading:
        frame = await publisher.next("infer")
        async with publisher.upload(frame, JSON) as upload:
            await upload.send(b'{"choices"')
            await wait_until(lambda: served.broker.statistics().in_flight == 1)
        await reading.read_head()
        assert reading.status == 502


async def test_a_peer_who_sends_all_of_it_before_he_reads_gets_his_answer(served: Served) -> None:
    """More than the kernel holds, refused before a byte of it was wanted: what comes is dropped while the answer is made."""
    async with served.server.connect() as wire:
        size = 900_000
        await wire.send(head("POST", CHAT, JSON, "content-encoding: gzip", f"content-length: {size}"))
        await wire.send(b"x" * size)
        answer = await wire.read_answer("POST")
    assert answer.status == 415


async def test_both_ways_open_the_same_channel_and_notice_its_end_at_once(served: Served) -> None:
    async def opened(*headers: str, body: bytes = b"") -> list[bytes]:
        text = b""
        async with served.server.connect() as wire:
            await wire.send(head("GET", FRAMES, *headers, "x-request-id: mine") + body)
            while b"event: hello" not in text:
                text += await wire.read_some()
            assert served.broker.statistics().channels == 1
        await wait_until(lambda: served.broker.statistics().channels == 0)
        lines = text.partition(b"\r\n\r\n")[0].split(b"\r\n")
        return sorted(line for line in lines if not line.startswith(b"date:"))

    await served.register("laptop", {"name": "qwen"})
    short = await opened()
    # What it brings is dropped, also what is still to come.
    assert await opened("content-length: 2000000", body=b"x" * 1000) == sorted([*short, b"connection: close"])
    served.app.before_request(lambda: None)
    assert await opened() == short


async def test_an_idle_channel_keeps_three_tasks(served: Served) -> None:
    """Its connection, its handler and its session's own: thousands of them say nothing for hours."""
    await served.register("laptop", {"name": "qwen"})
    await trio.testing.wait_all_tasks_blocked(0.01)
    before = trio.lowlevel.current_statistics().tasks_living
    async with served.server.connect() as wire:
        await wire.send(head("GET", FRAMES))
        while b"event: hello" not in await wire.read_some():
            pass
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert trio.lowlevel.current_statistics().tasks_living - before == 3


def test_headers_are_found_in_any_spelling_and_in_order() -> None:
    headers = RawHeaders([(b"accept", b"a"), (b"x-api-key", b"\xe9"), (b"accept", b"b")])
    assert headers.get("Accept") == "a"
    assert headers.getlist("ACCEPT") == ["a", "b"]
    assert headers.get("X-API-Key") == "é"
    assert headers.get("origin") is None
    assert headers.getlist("origin") == []
