"""Heads that were written to break somebody: targets, names in paths, header values, header blocks without an end.

Each is answered in the usual shape; the connection then is usable or cleanly closed, no error is logged, and a sibling's
stream goes on.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from urllib.parse import quote_from_bytes

import pytest

from tests.hostile.inputs import TEXTS, Line
from tests.hostile.sibling import sibling
from tests.http.served import HOST, JSON, Served, head, open_served
from tests.http.wire import Answer

CALL = b'{"model": "offline"}'
MIB = 1 << 20


@pytest.fixture
async def served(caplog: pytest.LogCaptureFixture) -> AsyncIterator[Served]:
    """A broker with a sibling, and a row `offline` without a channel; no error is logged."""
    caplog.set_level(logging.DEBUG)
    async with open_served() as served, sibling(served):
        assert (await served.register("elsewhere", {"name": "offline"})).status == 200
        yield served
    for record in caplog.records:
        if record.name.startswith("wakecall"):
            assert record.levelno < logging.WARNING, record
            assert record.getMessage().isprintable(), record


def said(answer: Answer) -> tuple[int, str]:
    return answer.status, answer.code if answer.status >= 400 else ""


# Targets ------------------------------------------------------------------------------------------------------------

FINE = (200, "")
NOWHERE = (404, "not_found")
NO_MODEL = (404, "model_not_found")
NO_REQUEST = (400, "invalid_request")

TARGETS: dict[str, tuple[int, str]] = {
    "/%00": NOWHERE,
    "/" + "%00" * 10_000: NOWHERE,
    "/%": NOWHERE,
    "/%zz": NOWHERE,
    "/..": NOWHERE,
    "/../../etc/passwd": NOWHERE,
    "/%2e%2e/%2e%2e/etc/passwd": NOWHERE,
    "/..%2f..%2fetc%2fpasswd": NOWHERE,
    "/..%5c..%5cetc": NOWHERE,
    "/v1/../admin/v1/llms": NOWHERE,
    "/v1/%2e%2e/admin/v1/llms": NOWHERE,
    "/v1/./models": NOWHERE,
    "/v1//models": NOWHERE,
    "//v1/models": NOWHERE,
    "///": NOWHERE,
    "//evil.example/v1/models": NOWHERE,
    "/v1\\models": NOWHERE,
    "/v1/models;/../../admin": NOWHERE,
    "/v1/models//": NOWHERE,
    "/v1/models/%0d%0aset-cookie:%20a": NOWHERE,
    "/v1/models/": NOWHERE,
    "/v1/models/..": NO_MODEL,
    "/v1/models/%2e%2e": NO_MODEL,
    "/v1/models/%00": NO_MODEL,
    "/v1/models/offline%00": NO_MODEL,
    "/v1/models/offline%2f": NO_MODEL,
    "/v1/models/offline/": NO_MODEL,
    "/v1/models/offline;x=1": NO_MODEL,
    "/v1/models/OFFLINE": NO_MODEL,
    "/v1/models/%c0%af": NO_MODEL,
    "/v1/models/%ff": NO_MODEL,
    "/v1/models/%ed%a0%80": NO_MODEL,
    "/v1/models/%u0041": NO_MODEL,
    "/v1/models/%": NO_MODEL,
    "/v1/models/" + "a/" * 20_000: NO_MODEL,
    "/v1/models/%6fffline": FINE,
    "/v1/models?%00=%ff&&=&a[]=1&a[]=2": FINE,
    "/v1/models?" + "a=b&" * 15_000: FINE,
    "/" + "a" * 60_000: NOWHERE,
    "/" + "a" * 70_000: (431, "request_too_large"),
    "/" + "a" * MIB: (431, "request_too_large"),
    f"http://{HOST}/v1/models": FINE,
    f"HTTP://{HOST}/v1/models": FINE,
    "http://[::1]/v1/models": FINE,
    f"http://{HOST}/%00": NOWHERE,
    f"https://{HOST}//v1/models": NOWHERE,
    "http://evil.example/v1/models": (403, "forbidden"),
    "http://127.0.0.1.evil.example/v1/models": (403, "forbidden"),
    f"http://user@{HOST}/v1/models": NO_REQUEST,
    f"http://{HOST}\\@evil.example/": NO_REQUEST,
    "http://[::1/v1/models": NO_REQUEST,
    "http:///v1/models": NO_REQUEST,
    "http:/v1/models": NO_REQUEST,
    "http://": NO_REQUEST,
    "file:///etc/passwd": NO_REQUEST,
    "javascript:alert(1)": NO_REQUEST,
    "*": NO_REQUEST,
    "?": NO_REQUEST,
    "#": NO_REQUEST,
    "": NO_REQUEST,
    "v1/models": NO_REQUEST,
    "127.0.0.1:80": NO_REQUEST,
    "/v1/mod els": NO_REQUEST,
    "/v1/models\x00": NO_REQUEST,
    "/v1/models\r": NO_REQUEST,
    "/v1/models\t": NO_REQUEST,
    "/v1/\xe9": NO_REQUEST,
    "/\x7f": NO_REQUEST,
    "/\x1b[31m": NO_REQUEST,
}


async def test_a_target_is_what_it_says_and_leads_nowhere_else(served: Served) -> None:
    """Nothing is normalised, redirected or looked up: a path is one of ours, or 404; what is no path is 400 and the end."""
    async with Line(served) as line:
        for target, expected in TARGETS.items():
            answer = await line.ask("GET", target)
            assert said(answer) == expected, target[:80]
            assert "location" not in answer.headers
            assert (answer.headers.get("connection") == "close") == (expected[0] in (400, 431)), target[:80]


async def test_a_slash_that_is_escaped_is_one(served: Served) -> None:
    """So a proxy that lets paths through by their prefix has to read them as RFC 3986 does; ours are one and the same."""
    async with Line(served) as line:
        assert (await line.ask("GET", "/v1%2fmodels")).json["data"]
        assert (await line.ask("GET", "/%61dmin/v1/llms")).json["data"]
        body = b'{"type": "t", "model": "m", "url": "http://127.0.0.1"}'
        assert (await line.ask("PUT", "/admin/v1/llms/org%2Fmodel", body=body)).json["name"] == "org/model"
        assert (await line.ask("GET", "/admin/v1/llms/org/model")).status == 200


#: Every route with a name or an id in its path, the body that it takes, and what a name that cannot be is there.
NAMED: tuple[tuple[str, str, bytes | None, tuple[int, str]], ...] = (
    ("GET", "/v1/models/@", None, NO_MODEL),
    ("GET", "/admin/v1/llms/@", None, NO_MODEL),
    ("DELETE", "/admin/v1/llms/@", None, NO_MODEL),
    ("PUT", "/admin/v1/llms/@", b'{"type": "t", "model": "m", "url": "http://127.0.0.1"}', NO_REQUEST),
    ("PATCH", "/admin/v1/llms/@", b'{"owner": "a"}', NO_MODEL),
    ("DELETE", "/admin/v1/sessions/@", None, (404, "session_not_found")),
    ("PATCH", "/admin/v1/sessions/@", b'{"owner": "a"}', (404, "session_not_found")),
    ("DELETE", "/admin/v1/keys/@", None, NOWHERE),
    ("PUT", "/publisher/v1/sessions/@", b'{"llms": []}', NO_REQUEST),
    ("DELETE", "/publisher/v1/sessions/@", None, (404, "session_not_found")),
    ("POST", "/publisher/v1/sessions/@/heartbeat", b"{}", (404, "session_not_found")),
    ("GET", "/publisher/v1/sessions/@/frames", None, (404, "session_not_found")),
    ("GET", "/publisher/v1/tasks/@/body", None, (404, "task_not_found")),
    ("POST", "/publisher/v1/tasks/@/result", b"{}", (404, "task_not_found")),
    ("POST", "/publisher/v1/tasks/@/chunks", b"{}", (404, "task_not_found")),
    ("POST", "/publisher/v1/tasks/@/failure", b'{"message": "m"}', (404, "task_not_found")),
)


async def test_a_name_in_a_path_that_cannot_be_one_is_nobodys(served: Served) -> None:
    """Nothing comes to be under it. Where it makes another path of it, that path is not ours."""
    names, sessions = {llm.name for llm in served.broker.llms()}, len(served.broker.session_views())
    async with Line(served) as line:
        for method, target, body, expected in NAMED:
            for what, text in TEXTS.items():
                name = quote_from_bytes(text.encode())
                answer = await line.ask(method, target.replace("@", name), "wakecall-offset: 0", body=body)
                if len(name) > 60_000:
                    assert said(answer) == (431, "request_too_large")
                elif not text or "/" in text or "\n" in text:
                    assert said(answer) in (expected, NOWHERE, (405, "method_not_allowed")), (target, what)
                else:
                    assert said(answer) == expected, (target, what)
    assert {llm.name for llm in served.broker.llms()} == names
    assert len(served.broker.session_views()) == sessions


# Header values ------------------------------------------------------------------------------------------------------

OFFLINE = (503, "model_offline")

#: Headers that mean nothing to a client's call, whatever they say.
NEUTRAL = (
    "x-request-id", "authorization", "x-api-key", "cookie", "user-agent", "referer", "accept-encoding", "range",
    "if-none-match", "forwarded", "x-forwarded-for", "x-forwarded-host", "x-http-method-override", "te", "via",
    "wakecall-status", "wakecall-offset", "last-event-id", "x-should-retry",
)  # fmt: skip


def judged(name: str, text: str) -> tuple[int, str]:
    """What a client's call is answered with a header `name` of `text`."""
    value = text.strip(" ")
    if len(text) > 60_000:
        return 431, "request_too_large"
    if set(value) & set("\x00\r\n"):
        return NO_REQUEST
    if name == "origin":
        return 403, "forbidden"
    if name in ("content-type", "accept"):
        is_fine = value.isascii() and value.isprintable() and len(value) <= 1024
        return OFFLINE if is_fine else NO_REQUEST
    if name == "content-encoding":
        return OFFLINE if not value else (415, "unsupported_encoding")
    if name == "content-length":
        return NO_REQUEST
    return OFFLINE


@pytest.mark.parametrize("names", [NEUTRAL, ("content-type", "accept", "content-encoding", "origin", "content-length")])
async def test_a_header_value_is_ignored_or_refused_as_its_header_says(served: Served, names: tuple[str, ...]) -> None:
    """A request id that is not well-formed is not repeated: the answer has one of ours."""
    async with Line(served) as line:
        for name in names:
            for what, text in TEXTS.items():
                if "\r\n" in text or text.endswith("\n"):
                    continue  # that is two headers, and the end of them (RFC 9112, 2.2: a bare LF may end a line)
                lines = [] if name == "content-length" else [f"content-length: {len(CALL)}"]
                raw = head("POST", "/v1/chat/completions", *lines, f"{name}: @")
                answer = await line.send(raw.replace(b"@", text.encode()) + CALL, "POST")
                assert said(answer) == judged(name, text), (name, what)
                assert answer.headers["x-request-id"].startswith("req_"), (name, what)


@pytest.mark.parametrize(
    ("framing", "expected"),
    [
        ("content-length: 9999999999999999999999999", NO_REQUEST),
        ("content-length: " + "9" * 5_000, NO_REQUEST),
        ("content-length: 99999999999999999999", (413, "request_too_large")),
        ("content-length: -1", NO_REQUEST),
        ("content-length: +20", NO_REQUEST),
        ("content-length: 0x14", NO_REQUEST),
        ("content-length: 2 0", NO_REQUEST),
        ("content-length: 20, 21", NO_REQUEST),
        ("content-length: \xb2\xb0", NO_REQUEST),
        ("content-length: 20\r\ncontent-length: 21", NO_REQUEST),
        ("content-length : 20", NO_REQUEST),
        (" content-length: 20", NO_REQUEST),
        ("content-length: 20\r\ncontent-length: 20", OFFLINE),
        ("transfer-encoding: chunked, identity", (501, "invalid_request")),
        ("transfer-encoding: \x0bchunked", NO_REQUEST),
        ("transfer-encoding: chunked\r\ntransfer-encoding: chunked", (501, "invalid_request")),
        ("transfer-encoding: {{7*7}}", (501, "invalid_request")),
        ("transfer-encoding: chunked\r\ncontent-length: 20", NO_REQUEST),
    ],
)
async def test_a_framing_that_two_readers_could_take_differently_is_the_end(
    served: Served, framing: str, expected: tuple[int, str]
) -> None:
    """Nothing behind it is taken for a request."""
    behind = head("GET", "/v1/models")
    async with served.server.connect() as wire:
        await wire.send(head("POST", "/v1/chat/completions", framing) + CALL + behind)
        answer = await wire.read_answer("POST")
        assert said(answer) == expected
        if expected != OFFLINE:
            assert answer.headers["connection"] == "close"
            assert await wire.read_to_end() == b""


async def test_a_bodys_content_type_reaches_its_publisher_as_it_came(served: Served) -> None:
    """In the frame and beside a body that is fetched, whatever it says: it is an engine's to judge."""
    async with served.publishing({"name": "qwen"}, session_id="box") as publisher:
        for text in TEXTS.values():
            raw = text.encode().strip(b" ")
            if not raw or judged("content-type", text) != OFFLINE:
                continue
            body = b'{"model": "qwen"}' + b" " * 70_000
            async with served.server.connect() as client:
                request = head("POST", "/v1/chat/completions", "content-type: @", f"content-length: {len(body)}")
                await client.send(request.replace(b"@", raw) + body)
                frame = await publisher.next("infer")
                fetched = await served.ask("GET", f"/publisher/v1/tasks/{frame.task_id}/body")
                assert (fetched.status, fetched.body) == (200, body), text
                assert frame.data["headers"]["content-type"].encode("latin-1") == raw
                assert fetched.headers["content-type"].encode("latin-1") == raw
                await publisher.answer(frame, b"{}")
                assert (await client.read_answer("POST")).status == 200


# Blocks -------------------------------------------------------------------------------------------------------------

CHUNKED = head("POST", "/v1/chat/completions", JSON, "transfer-encoding: chunked")
CHUNK = b"%x\r\n%b\r\n" % (len(CALL), CALL)
TOO_LARGE = (431, "request_too_large")

BLOCKS: dict[str, tuple[bytes, tuple[int, str]]] = {
    "one header of a mebibyte": (head("GET", "/v1/models", "x: " + "a" * MIB), TOO_LARGE),
    "one header name of a mebibyte": (head("GET", "/v1/models", "a" * MIB + ": x"), TOO_LARGE),
    "a mebibyte of headers": (head("GET", "/v1/models", *(f"x-{n:05}: {'a' * 52}" for n in range(16_384))), TOO_LARGE),
    "a mebibyte without an end": (head("GET", "/v1/models")[:-2] + b"x: " + b"a" * MIB, TOO_LARGE),
    "a mebibyte of folded lines": (head("GET", "/v1/models", "x: a" + "\r\n a" * (MIB // 4)), TOO_LARGE),
    "a mebibyte that is no line": (b"\x00" * MIB, NO_REQUEST),
    "10,000 headers": (head("GET", "/v1/models", *(f"x-{n}: 1" for n in range(10_000))), TOO_LARGE),
    "10,000 headers in 40 KB": (head("GET", "/v1/models", *["a:"] * 10_000), TOO_LARGE),
    "10,000 headers of one name": (head("GET", "/v1/models", *["x-request-id: a"] * 10_000), TOO_LARGE),
    "101 headers": (head("GET", "/v1/models", *["a:"] * 100), TOO_LARGE),
    "100 headers": (head("GET", "/v1/models", *["a:"] * 99), FINE),
    "10,000 trailers": (CHUNKED + CHUNK + b"0\r\n" + b"a:\r\n" * 10_000 + b"\r\n", OFFLINE),
    "a mebibyte of trailers": (CHUNKED + CHUNK + b"0\r\n" + b"a: bcdef\r\n" * (MIB // 10) + b"\r\n", TOO_LARGE),
    "a chunk's extension of a mebibyte": (CHUNKED + b"5;a=" + b"b" * MIB + b"\r\nabcde\r\n0\r\n\r\n", TOO_LARGE),
    "a chunk's size of a mebibyte": (CHUNKED + b"0" * MIB + b"5\r\nabcde\r\n0\r\n\r\n", TOO_LARGE),
    "a chunk of 2 ** 80 bytes": (CHUNKED + b"1" + b"0" * 20 + b"\r\n" + CALL, NO_REQUEST),
    "a chunk of -1 bytes": (CHUNKED + b"-1\r\n" + CALL, NO_REQUEST),
}


@pytest.mark.parametrize(("request_", "expected"), BLOCKS.values(), ids=BLOCKS)
async def test_a_block_of_headers_has_a_bound(served: Served, request_: bytes, expected: tuple[int, str]) -> None:
    """Beyond it: the refusal, then the end, to a peer that sends all of it before it reads."""
    async with Line(served) as line:
        answer = await line.send(request_, request_.partition(b" ")[0].decode() if request_[:1].isalpha() else "GET")
        assert said(answer) == expected
        assert (answer.headers.get("connection") == "close") == (expected not in (FINE, OFFLINE))
        assert (await line.ask("GET", "/v1/models")).status == 200
