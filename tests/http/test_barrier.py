"""No peer ends the server, holds it, or starves it: each test is one way of trying, over a real socket."""

from __future__ import annotations

import logging
from typing import Any

import h2.config
import h2.connection
import h2.errors
import pytest
import trio
import trio.testing

from tests.http.wire import http_app, open_server, request_bytes, send_until_stuck
from wakecall.http.barrier import BarrierSettings, _Waits
from wakecall.http.protocol import Http11

MIB = 1 << 20


@http_app
async def hello(scope: Any, receive: Any, send: Any) -> None:
    """Reads the whole request, then answers with what was asked for."""
    while (await receive()).get("more_body"):
        pass
    await answer(send, f"{scope['method']} {scope['path']}".encode())


async def answer(send: Any, body: bytes, status: int = 200) -> None:
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def start_stream(send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


class Pouring:
    """An app that sends without end, to a peer that may call, and tells how it ended."""

    def __init__(self) -> None:
        self.sent_bytes = 0
        self.disconnected = trio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope["extensions"]["wakecall.connection"].vouch()
        await start_stream(send)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pour, send)
            while (await receive())["type"] != "http.disconnect":
                pass
            self.disconnected.set()
            nursery.cancel_scope.cancel()

    async def _pour(self, send: Any) -> None:
        while True:
            await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})
            self.sent_bytes += 65536


def h2_bytes(*headers: tuple[str | bytes, str | bytes], data: bytes = b"") -> bytes:
    """An HTTP/2 connection by prior knowledge with one request, checked by nobody."""
    config = h2.config.H2Configuration(validate_outbound_headers=False, normalize_outbound_headers=False)
    http = h2.connection.H2Connection(config)
    http.initiate_connection()
    http.send_headers(1, list(headers), end_stream=not data)
    if data:
        http.send_data(1, data)
    return http.data_to_send()


async def leap(mock_clock: trio.testing.MockClock, seconds: float) -> None:
    """Let time pass once everything that is under way has come to rest; then again, let what follows happen."""
    await trio.testing.wait_all_tasks_blocked(0.01)
    mock_clock.jump(seconds)
    await trio.testing.wait_all_tasks_blocked(0.01)


H2_GET = ((":method", "GET"), (":scheme", "http"), (":authority", "x"), (":path", "/"))

KILLERS = {
    "http2-data-after-an-early-answer": h2_bytes(*H2_GET, data=b"x" * 1000),
    "http2-path-not-ascii": h2_bytes(*H2_GET[:3], (b":path", b"/\xc3\xa9")),
    "http2-method-not-ascii": h2_bytes((b":method", b"G\xc3\x89T"), *H2_GET[1:]),
    "http2-connect-without-a-path": h2_bytes((":method", "CONNECT"), (":authority", "x")),
    "connect-without-a-path": b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n",
    "broken-http2-settings": request_bytes(
        "GET", "/", "connection: upgrade, http2-settings", "upgrade: h2c", "http2-settings: !!!"
    ),
    "bytes-behind-a-websocket-upgrade": request_bytes(
        "GET",
        "/",
        "connection: upgrade",
        "upgrade: websocket",
        "sec-websocket-version: 13",
        "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
    )
    + b"\xff" * 64,
}


@pytest.mark.parametrize("killer", KILLERS.values(), ids=KILLERS.keys())
async def test_the_server_outlives_each_killer(killer: bytes) -> None:
    """What ends stock Hypercorn's process is answered with an error, and the next request is served."""
    async with open_server(hello) as server:
        async with server.connect() as wire:
            await wire.send(killer)
            refusal = await wire.read_answer()
            assert refusal.status in {400, 405, 505}
            assert refusal.code in {"invalid_request", "method_not_allowed"}
            assert refusal.headers["connection"] == "close"
            assert await wire.read_to_end() == b""
        assert (await server.ask("GET", "/next")).body == b"GET /next"


async def test_an_error_of_ours_ends_one_connection(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is one line of the log that quotes no peer, and other connections go on."""
    real = Http11.handle

    async def handle(self: Http11, event: Any) -> None:
        if b"/broken" in getattr(event, "data", b""):
            raise RuntimeError(str(event))
        await real(self, event)

    monkeypatch.setattr(Http11, "handle", handle)
    async with open_server(hello) as server, server.connect() as bystander:
        assert (await bystander.ask("GET", "/before")).status == 200
        async with server.connect() as wire:
            await wire.send(request_bytes("GET", "/broken-secret"))
            assert await wire.read_to_end() == b""
        assert (await bystander.ask("GET", "/after")).status == 200
        assert (await server.ask("GET", "/")).status == 200
    (record,) = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert "RuntimeError at " in record.getMessage()
    assert "secret" not in caplog.text


MALFORMED = {
    "http/1.0": (b"GET /v1/models HTTP/1.0\r\n\r\n", 505, "invalid_request", "proxy_http_version 1.1"),
    "http/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "invalid_request", "HTTP/1.1"),
    "h2c": (
        request_bytes("POST", "/", "upgrade: h2c", "connection: upgrade", body=b"x"),
        400,
        "invalid_request",
        "HTTP/2",
    ),
    "websocket": (
        request_bytes("GET", "/", "upgrade: WebSocket", "connection: upgrade"),
        400,
        "invalid_request",
        "WebSocket",
    ),
    "connect": (request_bytes("CONNECT", "a:1"), 405, "method_not_allowed", "CONNECT"),
    "method": (request_bytes("get", "/"), 405, "method_not_allowed", "method"),
    "no-path": (request_bytes("GET", "?"), 400, "invalid_request", "target"),
    "ftp": (request_bytes("GET", "ftp://x/"), 400, "invalid_request", "target"),
    "url-without-host": (request_bytes("GET", "http:///a"), 400, "invalid_request", "target"),
    "no-host": (b"GET / HTTP/1.1\r\n\r\n", 400, "invalid_request", "HTTP/1.1"),
    "two-hosts": (request_bytes("GET", "/", "host: y"), 400, "invalid_request", "HTTP/1.1"),
    "bad-host": (request_bytes("GET", "/", host="a b"), 400, "invalid_request", "Host"),
    "host-with-path": (request_bytes("GET", "/", host="a/b"), 400, "invalid_request", "Host"),
    "tls-hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "invalid_request", "HTTP/1.1"),
    "no-line": (b"GET\r\n\r\n", 400, "invalid_request", "HTTP/1.1"),
    "non-ascii-target": (b"GET /\xc3\xa9 HTTP/1.1\r\nhost: x\r\n\r\n", 400, "invalid_request", "HTTP/1.1"),
    "gzip-framing": (request_bytes("POST", "/", "transfer-encoding: gzip"), 501, "invalid_request", "chunked"),
    "two-framings": (
        request_bytes("POST", "/", "content-length: 5", "transfer-encoding: chunked")
        + b"0\r\n\r\n"
        + request_bytes("GET", "/2"),
        400,
        "invalid_request",
        "not both",
    ),
    "many-headers": (
        request_bytes("GET", "/", *(f"x-{n}: 1" for n in range(100))),
        431,
        "request_too_large",
        "100 headers",
    ),
    "large-head": (request_bytes("GET", "/", "x: " + "a" * 65_536), 431, "request_too_large", "65536 bytes"),
    "endless-head": (b"GET / HTTP/1.1\r\nx: " + b"a" * 200_000, 431, "request_too_large", "too long"),
    "broken-chunk": (
        request_bytes("POST", "/", "transfer-encoding: chunked") + b"zz\r\n",
        400,
        "invalid_request",
        "HTTP/1.1",
    ),
}


@pytest.mark.parametrize(("sent", "status", "code", "words"), MALFORMED.values(), ids=MALFORMED.keys())
async def test_what_is_not_served_is_refused_in_words(sent: bytes, status: int, code: str, words: str) -> None:
    """A JSON error with a request id, then the end of the connection; the next one is served."""
    async with open_server(hello) as server:
        async with server.connect() as wire:
            await wire.send(sent)
            refusal = await wire.read_answer()
            assert (refusal.status, refusal.code) == (status, code)
            assert words in refusal.json["error"]["message"]
            assert refusal.headers["connection"] == "close"
            assert ("allow" in refusal.headers) == (status == 405)
            assert await wire.read_to_end() == b""
        assert (await server.ask("GET", "/next")).status == 200


async def test_a_refusal_carries_the_callers_request_id_and_the_marks_of_its_path() -> None:
    """Below the app the same headers and shapes hold as in it."""
    async with open_server(hello) as server:
        refusal = await server.ask("GET", "/v1/messages", "upgrade: websocket", "x-request-id: mine.1")
        assert refusal.headers["x-request-id"] == "mine.1"
        assert refusal.headers["content-security-policy"] == "sandbox"
        assert refusal.headers["x-content-type-options"] == "nosniff"
        assert refusal.json["type"] == "error"
        refusal = await server.ask("HEAD", "/", "upgrade: websocket")
        assert (refusal.status, refusal.body) == (400, b"")


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 7\r\n\r\n",
        b"POST /v1/messages?beta=1 HTTP/1.1\r\nhost: x\r\nbad name: 1\r\n\r\n",
        b"POST /v1/messages HTTP/1.1\r\n\r\n",
        b"POST /v1/messages HTTP/1.1\r\nhost: x\r\nhost: x\r\n\r\n",
        b"POST /v1/messages HTTP/3.14\r\nhost: x\r\n\r\n",
        b"POST /v1/messages HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip\r\n\r\n",
    ],
)
async def test_a_refusal_of_what_no_parser_takes_has_the_shape_of_its_path(sent: bytes) -> None:
    """As far as its first line says where it goes; also on a connection that has served another request."""
    async with open_server(hello) as server:
        for before in (b"", request_bytes("GET", "/other")):
            async with server.connect() as wire:
                if before:
                    await wire.send(before)
                    assert (await wire.read_answer()).status == 200
                await wire.send(sent[:10])
                await trio.testing.wait_all_tasks_blocked(0.01)
                await wire.send(sent[10:])
                refusal = await wire.read_answer()
                assert refusal.json["type"] == "error"
                assert refusal.headers["content-security-policy"] == "sandbox"


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\r\n\r\n", b"GET\r\n\r\n"])
async def test_what_names_no_path_is_answered_with_every_mark(sent: bytes) -> None:
    async with open_server(hello) as server, server.connect() as wire:
        await wire.send(sent)
        refusal = await wire.read_answer()
        assert (refusal.headers["content-security-policy"], refusal.headers["x-content-type-options"]) == (
            "sandbox",
            "nosniff",
        )


@pytest.mark.parametrize("path", ["/healthz", "/readyz?x", "/metrics"])
async def test_probes_may_speak_http_1_0(path: str) -> None:
    """Old load balancers do."""
    async with open_server(hello) as server, server.connect() as wire:
        await wire.send(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        assert (await wire.read_answer()).body == f"GET {path.partition('?')[0]}".encode()
        assert await wire.read_to_end() == b""


@pytest.mark.parametrize(
    ("target", "path", "host"),
    [
        ("http://public.example:80/a?b", "/a", b"public.example:80"),
        ("HTTP://public.example", "/", b"public.example"),
        ("http://public.example?b", "/", b"public.example"),
        ("http://[::1]:8080/%00%ff", "/\x00\ufffd", b"[::1]:8080"),
        ("//a//b", "//a//b", b"x"),
        ("/a%2fb%zz", "/a/b%zz", b"x"),
    ],
)
async def test_an_absolute_target_is_a_path_on_the_host_that_it_names(target: str, path: str, host: bytes) -> None:
    """Its authority takes the place of Host (RFC 9112, 3.2.2): whoever checks Host is told no other."""
    seen = {}

    @http_app
    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.update(scope)
        await answer(send, b"")

    async with open_server(app) as server:
        assert (await server.ask("GET", target)).status == 200
    assert seen["path"] == path
    assert [value for name, value in seen["headers"] if name == b"host"] == [host]


async def test_one_connection_serves_many_requests_pipelined_or_not() -> None:
    """Answers come in order; a request that arrived early waits."""
    async with open_server(hello) as server, server.connect() as wire:
        for n in range(3):
            assert (await wire.ask("POST", f"/{n}", body=b"x" * 100_000)).body == f"POST /{n}".encode()
        await wire.send(b"".join(request_bytes("POST", f"/{n}", body=b"x") for n in range(20)))
        for n in range(20):
            assert (await wire.read_answer()).body == f"POST /{n}".encode()


@pytest.mark.parametrize("between", [b"\r\n", b"\n", b"\r\n\r\n"])
async def test_an_empty_line_before_a_request_is_ignored(between: bytes) -> None:
    """RFC 9112, 2.2: clients of old send one behind a body. In one packet with what it stands between, or alone."""
    async with open_server(hello) as server, server.connect() as wire:
        await wire.send(
            between + request_bytes("POST", "/0", body=b"x") + between + request_bytes("GET", "/1") + between
        )
        for n, method in enumerate(("POST", "GET")):
            assert (await wire.read_answer()).body == f"{method} /{n}".encode()
        await wire.send(between)
        await trio.testing.wait_all_tasks_blocked(0.01)
        (connection,) = server.barrier.connections
        assert connection._waits is _Waits.FOR_A_REQUEST  # no head has begun that would have to end in time
        await wire.send(between + request_bytes("GET", "/2"))
        assert (await wire.read_answer()).body == b"GET /2"
        await wire.half_close()
        assert await wire.read_to_end() == b""


async def test_a_head_without_a_length_leaves_before_its_body() -> None:
    """An event stream is open for its client before the first event."""
    release = trio.Event()

    @http_app
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await start_stream(send)
        await release.wait()
        await send({"type": "http.response.body", "body": b"late"})

    async with open_server(app) as server, server.connect() as wire:
        await wire.send(request_bytes("GET", "/"))
        head = await wire.read_some()
        assert head.startswith(b"HTTP/1.1 200 ")
        assert head.endswith(b"\r\n\r\n")
        release.set()
        rest = await wire.read_some()
        while not rest.endswith(b"\r\n0\r\n\r\n"):  # in one piece or in two
            rest += await wire.read_some()
        assert rest == b"4\r\nlate\r\n0\r\n\r\n"


async def test_a_bodys_hundred_continue_waits_for_somebody_who_reads() -> None:
    """An early answer spares the peer its upload; asking for the body asks the peer."""

    @http_app
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/read":
            while (await receive())["more_body"]:
                pass
        await answer(send, b"ok")

    head = ["expect: 100-continue", "content-length: 3"]
    async with open_server(app) as server:
        refused = await server.ask("POST", "/no", *head)
        assert (refused.interim, refused.headers["connection"]) == ([], "close")
        async with server.connect() as wire:
            await wire.send(request_bytes("POST", "/read", *head))
            assert await wire.read_some() == b"HTTP/1.1 100 \r\n\r\n"
            await wire.send(b"abc")
            assert (await wire.read_answer()).body == b"ok"


# Peers that hold ------------------------------------------------------------------------------------------------------


async def test_a_peer_that_reads_nothing_is_cut(mock_clock: trio.testing.MockClock) -> None:
    """Not before `peer_stall_s`; then its socket is gone and the app has its `http.disconnect`."""
    mock_clock.rate = 1
    app = Pouring()
    async with open_server(http_app(app), BarrierSettings(peer_stall_s=60), patience_s=200) as server:
        async with server.connect(receive_buffer=4096) as wire:
            await wire.send(request_bytes("GET", "/"))
            await trio.testing.wait_all_tasks_blocked(0.02)
            for _ in range(7):
                mock_clock.jump(8)
                await trio.testing.wait_all_tasks_blocked(0.02)
            assert not app.disconnected.is_set()
            assert len(server.barrier.connections) == 1
            for _ in range(6):
                mock_clock.jump(8)
                await trio.testing.wait_all_tasks_blocked(0.02)
            assert app.disconnected.is_set()
            assert not server.barrier.connections


async def test_a_slow_peer_that_moves_is_never_cut(mock_clock: trio.testing.MockClock) -> None:
    """It reads too little for the kernel to ask us for more; what it acknowledges still counts."""
    mock_clock.rate = 1
    app = Pouring()
    async with open_server(http_app(app), BarrierSettings(peer_stall_s=60), patience_s=2000) as server:
        async with server.connect(receive_buffer=65536) as wire:
            await wire.send(request_bytes("GET", "/"))
            await trio.testing.wait_all_tasks_blocked(0.02)
            sent_at_first = app.sent_bytes
            for _ in range(20):
                assert await wire.stream.receive_some(60_000)
                for _ in range(5):
                    mock_clock.jump(8)
                    await trio.testing.wait_all_tasks_blocked(0.005)
            assert not app.disconnected.is_set()
            assert app.sent_bytes - sent_at_first < 20 * 60_000, "the peer was not slow enough to prove anything"


async def test_shutdown_frees_a_stuck_write() -> None:
    """A peer that reads nothing does not hold the server past its grace."""
    app = Pouring()
    async with open_server(http_app(app), BarrierSettings(grace_s=0.1)) as server:
        async with server.connect(receive_buffer=4096) as wire:
            await wire.send(request_bytes("GET", "/"))
            await trio.testing.wait_all_tasks_blocked(0.02)
            server.stop()
            with trio.fail_after(2):
                await server.wait_stopped()
            assert not server.barrier.connections


async def test_cancelling_the_server_ends_it_at_once() -> None:
    """Stuck writes, waiting apps and idle connections included: no grace, no socket left."""
    app = Pouring()
    with trio.fail_after(2):
        async with open_server(http_app(app), BarrierSettings(grace_s=600)) as server:
            async with server.connect(receive_buffer=4096) as wire, server.connect():
                await wire.send(request_bytes("GET", "/"))
                await trio.testing.wait_all_tasks_blocked(0.02)
                assert len(server.barrier.connections) == 2
        assert not server.barrier.connections


async def test_a_peers_end_frees_a_stuck_write() -> None:
    """The app behind it learns it without any deadline."""
    app = Pouring()
    async with open_server(http_app(app)) as server, server.connect(receive_buffer=4096) as wire:
        await wire.send(request_bytes("GET", "/"))
        await trio.testing.wait_all_tasks_blocked(0.02)
        await wire.half_close()
        await app.disconnected.wait()


@pytest.mark.parametrize("behind", [b"", b"\r\n", request_bytes("GET", "/2")], ids=["nothing", "crlf", "pipelined"])
@pytest.mark.parametrize("end", ["fin", "rst"])
async def test_a_peer_that_leaves_is_noticed(behind: bytes, end: str) -> None:
    """At once, also behind bytes that came after its request."""
    started, disconnected = trio.Event(), trio.Event()

    @http_app
    async def app(scope: Any, receive: Any, send: Any) -> None:
        started.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        disconnected.set()

    async with open_server(app) as server, server.connect() as wire:
        await wire.send(request_bytes("GET", "/") + behind)
        await started.wait()
        if end == "fin":
            await wire.half_close()
        else:
            wire.reset()
        await disconnected.wait()


async def test_what_a_peer_may_send_ahead_is_bounded() -> None:
    """Pipelined bytes are read only to see the peer's end, and only so many."""
    started = trio.Event()

    @http_app
    async def app(scope: Any, receive: Any, send: Any) -> None:
        started.set()
        await trio.sleep_forever()

    async with open_server(app) as server, server.connect(send_buffer=4096) as wire:
        await wire.send(request_bytes("GET", "/"))
        await started.wait()
        sent = 0

        async def send() -> None:
            nonlocal sent
            await wire.send(request_bytes("POST", "/2", body=b"x" * 65536))
            sent += 65536
            assert sent < 16 * MIB

        await send_until_stuck(send)
        (connection,) = server.barrier.connections
        assert len(connection._http.connection.trailing_data[0]) < 300_000


# Early answers, cuts --------------------------------------------------------------------------------------------------


@http_app
async def early(scope: Any, receive: Any, send: Any) -> None:
    """Answers without reading."""
    await answer(send, b"no", status=413)


@pytest.mark.parametrize("framing", ["content-length: 200000", "transfer-encoding: chunked"])
async def test_an_early_answer_reaches_a_peer_that_is_still_sending(framing: str) -> None:
    """It says `Connection: close`, and no reset overtakes it: the upload is read on for a while."""
    piece = b"1000\r\n" + b"x" * 0x1000 + b"\r\n" if "chunked" in framing else b"x" * 4096
    async with open_server(early) as server:
        for _ in range(10):
            async with server.connect() as wire:
                await wire.send(request_bytes("POST", "/", framing) + piece)
                await trio.testing.wait_all_tasks_blocked()
                for _ in range(30):
                    await wire.send(piece)
                refusal = await wire.read_answer()
                assert (refusal.status, refusal.body, refusal.is_cut) == (413, b"no", False)
                assert refusal.headers["connection"] == "close"
                assert await wire.read_to_end() == b""


async def test_an_upload_behind_an_early_answer_is_dropped_only_up_to_a_bound() -> None:
    """1 MiB of it; then the connection is closed whatever the peer does."""
    async with open_server(early, BarrierSettings(close_drain_s=600)) as server:
        async with server.connect() as wire:
            await wire.send(request_bytes("POST", "/", "content-length: 1000000000"))
            sent = 0
            with pytest.raises(trio.BrokenResourceError):  # noqa: PT012 - which send fails is the peer's luck
                while sent < 200 * MIB:
                    await wire.send(bytes(65536))
                    sent += 65536
            assert sent >= MIB - 65536
        assert (await server.ask("GET", "/")).status == 413


async def test_a_peer_that_never_closes_is_drained_only_for_a_while(mock_clock: trio.testing.MockClock) -> None:
    """A second; then the connection is closed."""
    mock_clock.rate = 1
    async with open_server(early, BarrierSettings(close_drain_s=50), patience_s=200) as server:
        async with server.connect() as wire:
            await wire.send(request_bytes("POST", "/", "content-length: 1000"))
            assert (await wire.read_answer()).status == 413
            assert await wire.read_some() == b"", "half-closed at once"
            await trio.testing.wait_all_tasks_blocked()
            assert len(server.barrier.connections) == 1
            mock_clock.jump(51)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not server.barrier.connections


@pytest.mark.parametrize("how", ["cut", "abort", "return", "raise"])
async def test_an_unfinished_answer_never_looks_whole(how: str) -> None:
    """Whether cut on purpose or by an error; a cut alone promises that all that was sent arrives."""

    @http_app
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await start_stream(send)
        await send({"type": "http.response.body", "body": b"x" * 500_000, "more_body": True})
        connection = scope["extensions"]["wakecall.connection"]
        if how == "cut":
            connection.cut()
            await trio.sleep_forever()
        elif how == "abort":
            connection.abort()
            await trio.sleep_forever()
        elif how == "raise":
            raise RuntimeError("half way")

    async with open_server(app, BarrierSettings(grace_s=0.1)) as server, server.connect() as wire:
        await wire.send(request_bytes("GET", "/"))
        broken = await wire.read_answer()
        assert broken.is_cut
        if how != "abort":
            assert len(broken.body) == 500_000


async def test_a_cut_over_a_declared_length_is_short() -> None:
    """Fewer bytes than were announced."""

    @http_app
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})
        await send({"type": "http.response.body", "body": b"12345", "more_body": True})

    async with open_server(app) as server:
        broken = await server.ask("GET", "/")
        assert (broken.body, broken.is_cut) == (b"12345", True)


# Idle, slow and many ----------------------------------------------------------------------------------------------------


async def test_an_idle_connection_ends_after_its_time(mock_clock: trio.testing.MockClock) -> None:
    """Before its first request, and after each; a request under way is never timed out by it."""
    mock_clock.rate = 1
    release = trio.Event()

    @http_app
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/wait":
            await release.wait()
        await answer(send, b"ok")

    async with open_server(app, BarrierSettings(keep_alive_s=75), patience_s=2000) as server:
        async with server.connect() as fresh, server.connect() as used, server.connect() as busy:
            assert (await used.ask("GET", "/")).status == 200
            await busy.send(request_bytes("GET", "/wait"))
            await leap(mock_clock, 70)
            assert (await used.ask("GET", "/")).status == 200
            await leap(mock_clock, 10)
            assert await fresh.read_to_end() == b""
            assert (await used.ask("GET", "/")).status == 200
            await leap(mock_clock, 76)
            assert await used.read_to_end() == b""
            release.set()
            assert (await busy.read_answer()).status == 200
            await leap(mock_clock, 76)
            assert await busy.read_to_end() == b""
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert not server.barrier.connections


async def test_shutdown_does_not_wait_for_idle_connections() -> None:
    """Nor for a half-sent head. What is under way is answered, with `Connection: close`."""
    started, release = trio.Event(), trio.Event()

    @http_app
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/wait":
            started.set()
            await release.wait()
        await answer(send, b"ok")

    async with open_server(app, BarrierSettings(grace_s=600, close_drain_s=600)) as server:
        async with server.connect() as fresh, server.connect() as used, server.connect() as half:
            async with server.connect() as busy:
                assert (await used.ask("GET", "/")).status == 200
                await half.send(b"GET / HT")
                await busy.send(request_bytes("GET", "/wait"))
                await started.wait()
                server.stop()
                for idle in (fresh, used, half):
                    assert await idle.read_to_end() == b""
                release.set()
                last = await busy.read_answer()
                assert (last.body, last.headers["connection"]) == (b"ok", "close")
                with trio.fail_after(1):
                    await server.wait_stopped()


async def test_a_head_that_trickles_in_is_given_up(mock_clock: trio.testing.MockClock) -> None:
    """Its time runs from its first byte, and no further byte prolongs it: 408, and the end."""
    mock_clock.rate = 1
    async with open_server(hello, BarrierSettings(head_s=60), patience_s=2000) as server:
        async with server.connect() as wire:
            assert (await wire.ask("GET", "/")).status == 200
            await wire.send(b"GET / HTTP/1.1\r\n")
            for _ in range(7):
                await trio.testing.wait_all_tasks_blocked(0.01)
                mock_clock.jump(9)
                if server.barrier.connections:
                    await wire.send(b"x: y\r\n")
            timeout = await wire.read_answer()
            assert (timeout.status, timeout.code) == (408, "request_timeout")
            assert await wire.read_to_end() == b""


async def test_an_app_that_is_cancelled_while_its_head_is_written_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    """The head is out and the server does not know it: it must send no second one, nor the end of one."""

    @http_app
    async def app(scope: Any, receive: Any, send: Any) -> None:
        with trio.CancelScope() as scope_of_head:
            scope_of_head.cancel()
            await start_stream(send)

    async with open_server(app) as server:
        answer = await server.ask("GET", "/")
        assert (answer.status, answer.body, answer.is_cut) == (200, b"", True)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
