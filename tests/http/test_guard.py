"""The guard under QuartTrio, over real sockets: bodies with backpressure and bounds, ends told apart, heads marked."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from quart import Response, request
from quart_trio import QuartTrio

from tests.http.wire import Server, Wire, http_app, open_server, request_bytes
from wakecall.errors import QueueFull, WakecallError
from wakecall.http.barrier import BarrierSettings
from wakecall.http.guard import BodyBudget, ClientGone, Exchange, Guard, GuardSettings, current_exchange_of
from wakecall.http.refusal import error_body

KIB, MIB = 1 << 10, 1 << 20


def exchange() -> Exchange:
    """The exchange of the request that is being handled."""
    return current_exchange_of(request.scope)


class App:
    """A small Quart app under a guard, and what its handlers saw."""

    def __init__(self) -> None:
        self.budget = BodyBudget(8 * MIB)
        self.settings = GuardSettings(body_stall_s=60, drain_bytes=MIB)
        self.quart = QuartTrio("guarded")
        self.quart.config["RESPONSE_TIMEOUT"] = None
        self.quart.register_error_handler(WakecallError, self._explain)
        self.guard = Guard(self.quart.asgi_app, self.settings, self.budget)
        self.quart.asgi_app = self.guard  # type: ignore[method-assign]
        self.events: list[str] = []
        self.started, self.release, self.ended = trio.Event(), trio.Event(), trio.Event()

    async def _explain(self, error: WakecallError) -> Response:
        return Response(error_body(error, ""), error.status, content_type="application/json")

    def post(self, path: str) -> Any:
        return self.quart.route(path, methods=["GET", "POST"])

    @contextlib.asynccontextmanager
    async def serve(self, settings: BarrierSettings | None = None, **options: Any) -> AsyncIterator[Server]:
        async with open_server(self.quart, settings, **options) as server:
            yield server
        assert self.budget.held_bytes == 0, "a body outlived its request"


@pytest.fixture
def app() -> App:
    made = App()

    @made.post("/echo")
    async def echo() -> Response:
        return Response(await exchange().read_body(4 * MIB))

    @made.post("/digest")
    async def digest() -> Response:
        made.started.set()
        sha, count = hashlib.sha256(), 0
        try:
            async for piece in exchange().stream_body():
                sha.update(piece)
                count += len(piece)
                if count > 300 * KIB:
                    await made.release.wait()
        except ClientGone:
            made.events.append("gone")
            raise
        return Response(f"{count} {sha.hexdigest()}")

    @made.post("/wait")
    async def wait() -> Response:
        exchange().on_disconnect(lambda: made.events.append("disconnected"))
        made.started.set()
        try:
            await made.release.wait()
        except trio.Cancelled:
            made.events.append("cancelled")
            raise
        return Response("waited")

    @made.post("/ignore")
    async def ignore() -> Response:
        return Response("ignored")

    return made


def chunked(*pieces: bytes, end: bool = True) -> bytes:
    """Chunked encoding of `pieces`."""
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return body + b"0\r\n\r\n" if end else body


CHUNKED = "transfer-encoding: chunked"


# Whole bodies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 4 * MIB])
async def test_a_whole_body_arrives_byte_for_byte(app: App, size: int) -> None:
    """Whatever its framing and however it is cut into packets; the connection serves on."""
    body = (bytes(range(256)) * (size // 256 + 1))[:size]
    async with app.serve() as server, server.connect() as wire:
        assert (await wire.ask("POST", "/echo", body=body)).body == body
        await wire.send(request_bytes("POST", "/echo", CHUNKED))
        for start in range(0, size, 50_000):
            await wire.send(chunked(body[start : start + 50_000], end=False))
        await wire.send(chunked())
        answered = await wire.read_answer()
        assert (answered.status, answered.body) == (200, body)
        assert "connection" not in answered.headers


async def test_a_declared_body_that_is_too_large_is_refused_before_it_arrives(app: App) -> None:
    """413 at once, though not a byte of it came; and the answer reaches a peer that goes on sending."""
    async with app.serve() as server, server.connect() as wire:
        await wire.send(request_bytes("POST", "/echo", f"content-length: {4 * MIB + 1}"))
        refused = await wire.read_answer()
        assert (refused.status, refused.headers["connection"]) == (413, "close")
        assert refused.json["error"]["code"] == "request_too_large"


async def test_a_chunked_body_is_refused_as_soon_as_it_is_too_large(app: App) -> None:
    """It has no end by then."""
    async with app.serve() as server, server.connect() as wire:
        await wire.send(request_bytes("POST", "/echo", CHUNKED) + chunked(bytes(4 * MIB), b"x", end=False))
        assert (await wire.read_answer()).status == 413


async def test_bodies_in_all_are_bounded(app: App) -> None:
    """A body counts from its first byte to its request's end; one that does not fit is 429 and counts no more."""
    held = trio.Event()
    released: list[int] = []

    @app.post("/hold")
    async def hold() -> Response:
        await exchange().read_body(8 * MIB)
        held.set()
        await app.release.wait()
        before = app.budget.held_bytes
        exchange().release_body()
        exchange().release_body()
        released.append(before - app.budget.held_bytes)
        return Response("held")

    @app.post("/try")
    async def refuse() -> Response:
        with pytest.raises(QueueFull):
            await exchange().read_body(8 * MIB)
        return Response(str(app.budget.held_bytes))

    async with app.serve() as server, server.connect() as wire:
        await wire.send(request_bytes("POST", "/hold", body=bytes(6 * MIB)))
        await held.wait()
        refused = await server.ask("POST", "/echo", body=bytes(3 * MIB))
        assert (refused.status, refused.json["error"]["code"]) == (429, "queue_full")
        assert (await server.ask("POST", "/try", body=bytes(3 * MIB))).body == b"%d" % (6 * MIB)
        assert (await server.ask("POST", "/echo", body=bytes(MIB))).status == 200
        app.release.set()
        assert (await wire.read_answer()).body == b"held"
        assert released == [6 * MIB]


def test_a_budget_never_takes_in_part() -> None:
    """Refused is refused: what is held stays as it was."""
    budget = BodyBudget(10)
    budget.take(7)
    with pytest.raises(QueueFull):
        budget.take(4)
    assert budget.held_bytes == 7
    budget.take(3)
    budget.give_back(10)
    assert budget.held_bytes == 0


def test_the_last_eighth_of_the_budget_is_not_for_clients() -> None:
    """Publishers heartbeat and operators revoke, whatever clients hold."""
    budget = BodyBudget(80)
    budget.take(70, for_client=True)
    with pytest.raises(QueueFull):
        budget.take(1, for_client=True)
    budget.take(10)
    with pytest.raises(QueueFull):
        budget.take(1)


def test_one_key_holds_half_of_the_budget() -> None:
    """What another holds, or nobody's, is not his; what he gives back he has again."""
    budget = BodyBudget(80)
    budget.take(40, "one")
    for count in (1, 80):
        with pytest.raises(QueueFull):
            budget.take(count, "one")
    budget.take(30, "two")
    budget.give_back(10, "one")
    budget.take(10, "one")
    for key, count in (("one", 40), ("two", 30)):
        budget.give_back(count, key)
    assert (budget.held_bytes, budget._held_by) == (0, {})
    budget.take(80)


async def test_a_body_that_stalls_is_given_up(app: App, mock_clock: trio.testing.MockClock) -> None:
    """After `body_stall_s` without a byte; each byte starts the time anew."""
    mock_clock.rate = 1
    async with app.serve(patience_s=1000) as server, server.connect() as wire:
        await wire.send(request_bytes("POST", "/echo", "content-length: 10"))
        for _ in range(3):
            await wire.send(b"x")
            await trio.testing.wait_all_tasks_blocked(0.01)
            mock_clock.jump(55)
        await trio.testing.wait_all_tasks_blocked(0.01)
        mock_clock.jump(6)
        timeout = await wire.read_answer()
        assert (timeout.status, timeout.json["error"]["code"]) == (408, "request_timeout")


async def test_a_body_that_trickles_is_given_up(app: App, mock_clock: trio.testing.MockClock) -> None:
    """A byte now and then does not hold a connection for ever: the whole of it has `body_s`."""
    mock_clock.rate = 1
    async with app.serve(patience_s=2000) as server, server.connect() as wire:
        await wire.send(request_bytes("POST", "/echo", "content-length: 1000"))
        for _ in range(16):
            await wire.send(b"x")
            await trio.testing.wait_all_tasks_blocked(0.01)
            mock_clock.jump(55)
        await trio.testing.wait_all_tasks_blocked(0.01)
        mock_clock.jump(21)
        timeout = await wire.read_answer()
        assert (timeout.status, timeout.json["error"]["code"]) == (408, "request_timeout")


@pytest.mark.parametrize("path", ["/echo", "/digest"])
@pytest.mark.parametrize("end", ["fin", "rst"])
@pytest.mark.parametrize("framing", ["content-length: 100000", CHUNKED])
async def test_a_body_that_breaks_off_is_never_taken_for_whole(app: App, path: str, end: str, framing: str) -> None:
    """The handler hears `ClientGone`, and no half of a body counts on."""
    seen: list[type[BaseException]] = []
    original = Exchange._next_piece

    async def next_piece(self: Exchange, *arguments: Any) -> Any:
        try:
            return await original(self, *arguments)
        except Exception as error:
            seen.append(type(error))
            app.ended.set()
            raise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exchange, "_next_piece", next_piece)
        async with app.serve() as server, server.connect() as wire:
            await wire.send(request_bytes("POST", path, framing) + chunked(b"half of it", end=False))
            await trio.testing.wait_all_tasks_blocked(0.01)
            if end == "fin":
                await wire.half_close()
            else:
                wire.reset()
            await app.ended.wait()
    assert seen == [ClientGone]


# Bodies in pieces -----------------------------------------------------------------------------------------------------


async def test_a_handler_that_stands_still_holds_its_peer_back(app: App) -> None:
    """Of 300 MiB about 1 is taken; then all of it goes through, whole.

    The bound is for the kernels' buffers, which differ by machine; ours hold three pieces.
    """
    total, piece = 300 * MIB, bytes(range(256)) * 256
    sha = hashlib.sha256()
    sent = 0

    async def pour(wire: Wire) -> None:
        nonlocal sent
        await wire.send(request_bytes("POST", "/digest", f"content-length: {total}"))
        while sent < total:
            await wire.send(piece)
            sha.update(piece)
            sent += len(piece)

    async with app.serve(patience_s=60) as server, server.connect(send_buffer=65536) as wire:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pour, wire)
            await app.started.wait()
            await trio.testing.wait_all_tasks_blocked(0.1)
            assert 300 * KIB < sent < 8 * MIB
            app.release.set()
        assert (await wire.read_answer()).body.decode() == f"{total} {sha.hexdigest()}"


async def test_a_wait_for_a_piece_can_be_given_up_and_taken_up_again(app: App) -> None:
    """Nothing is lost and nothing hangs."""
    arrived: list[bytes] = []

    @app.post("/patient")
    async def patient() -> Response:
        body = exchange().stream_body()
        while True:
            with trio.CancelScope() as impatience:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self_cancel, impatience)
                    try:
                        arrived.append(await anext(body))
                    except StopAsyncIteration:
                        return Response(b"".join(arrived))
                    nursery.cancel_scope.cancel()
            if impatience.cancelled_caught:
                app.events.append("given up")
                app.ended.set()

    async def self_cancel(scope: trio.CancelScope) -> None:
        await trio.testing.wait_all_tasks_blocked(0.005)
        scope.cancel()

    async with app.serve() as server, server.connect() as wire:
        await wire.send(request_bytes("POST", "/patient", CHUNKED))
        for n in range(3):
            app.ended = trio.Event()
            await app.ended.wait()
            await wire.send(chunked(b"piece %d " % n, end=False))
        await wire.send(chunked())
        assert (await wire.read_answer()).body == b"piece 0 piece 1 piece 2 "
    assert app.events


async def test_a_body_is_read_once(app: App) -> None:
    """A second reader is a bug of ours: it must not wait for pieces that the first took."""

    @app.post("/twice")
    async def twice() -> Response:
        await exchange().read_body(10)
        with pytest.raises(RuntimeError):
            exchange().stream_body()
        with pytest.raises(RuntimeError):
            await exchange().read_body(10)
        return Response("once")

    async with app.serve() as server:
        assert (await server.ask("POST", "/twice", body=b"x")).body == b"once"


async def test_quart_never_sees_a_body(app: App) -> None:
    """Its own buffer has no bound, so nothing goes in."""

    @app.post("/quart")
    async def quart() -> Response:
        return Response(await request.get_data(cache=False) + b"|" + await exchange().read_body(10))

    async with app.serve() as server:
        assert (await server.ask("POST", "/quart", body=b"body")).body == b"|body"


async def test_a_body_that_nobody_reads_costs_little_and_blocks_nothing(app: App) -> None:
    """A small one leaves the connection usable; a large one is dropped with it; the answer always arrives."""
    async with app.serve() as server, server.connect() as wire:
        for _ in range(3):
            assert (await wire.ask("POST", "/ignore", body=b"small")).body == b"ignored"
        await wire.send(request_bytes("POST", "/ignore", "content-length: 10000000") + bytes(100_000))
        answered = await wire.read_answer()
        assert (answered.body, answered.headers["connection"]) == (b"ignored", "close")
        await wire.read_to_end()


async def test_an_unwanted_body_is_dropped_only_up_to_a_bound_while_the_answer_streams(app: App) -> None:
    """Then it is held back, until the answer's end closes the connection."""

    @app.post("/stream")
    async def stream() -> Response:
        async def body() -> AsyncIterator[bytes]:
            yield b"begun"
            await app.release.wait()
            yield b"done"

        return Response(body())

    sent = 0

    async def pour(wire: Wire) -> None:
        nonlocal sent
        with contextlib.suppress(trio.BrokenResourceError):
            while True:
                await wire.send(bytes(65536))
                sent += 65536

    async with app.serve() as server, server.connect(send_buffer=65536) as wire:
        async with trio.open_nursery() as nursery:
            await wire.send(request_bytes("POST", "/stream", "content-length: 1000000000"))
            nursery.start_soon(pour, wire)
            await trio.testing.wait_all_tasks_blocked(0.1)
            assert MIB < sent < 9 * MIB
            app.release.set()
            answered = await wire.read_answer()
            assert (answered.body, answered.is_cut) == (b"begundone", False)


async def test_a_peer_that_waits_to_be_asked_for_its_body_is_asked_by_its_reader(app: App) -> None:
    """`Expect: 100-continue`: never before a handler reads, so that an early answer spares the upload."""
    head = ["expect: 100-continue", "content-length: 4"]

    @app.post("/spare")
    async def spare() -> Response:
        await trio.testing.wait_all_tasks_blocked(0.01)
        return Response("spared")

    async with app.serve() as server:
        async with server.connect() as wire:
            await wire.send(request_bytes("POST", "/echo", *head))
            assert (await wire.read_some()).startswith(b"HTTP/1.1 100 ")
            await wire.send(b"body")
            assert (await wire.read_answer()).body == b"body"
        spared = await server.ask("POST", "/spare", *head)
        assert (spared.body, spared.interim, spared.headers["connection"]) == (b"spared", [], "close")


# Ends -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["fin", "rst"])
async def test_a_client_that_leaves_is_told_once_and_cancels_the_handler(app: App, end: str) -> None:
    """The callback first, at the moment itself; then Quart's cancellation."""
    async with app.serve() as server:
        async with server.connect() as wire:
            await wire.send(request_bytes("POST", "/wait", body=b"unread"))
            await app.started.wait()
            if end == "fin":
                await wire.half_close()
            else:
                wire.reset()
            while server.barrier.connections:
                await trio.testing.wait_all_tasks_blocked()
    assert app.events == ["disconnected", "cancelled"]


async def test_the_end_is_told_whatever_the_handler_is_stuck_in(app: App) -> None:
    """A shielded wait, a write: the callback depends on neither."""

    @app.post("/shielded")
    async def shielded() -> Response:
        exchange().on_disconnect(app.ended.set)
        app.started.set()
        with trio.CancelScope(shield=True):
            await app.release.wait()
        gone = exchange()
        assert gone.client_is_gone
        gone.on_disconnect(lambda: app.events.append("told at once"))
        return Response("late")

    @app.post("/pour")
    async def pour() -> Response:
        exchange().on_disconnect(lambda: app.events.append("told while writing"))

        async def body() -> AsyncIterator[bytes]:
            app.started.set()
            while True:
                yield bytes(65536)

        return Response(body())

    async with app.serve() as server:
        async with server.connect() as wire:
            await wire.send(request_bytes("POST", "/shielded"))
            await app.started.wait()
            await wire.half_close()
            await app.ended.wait()
            assert await wire.read_to_end() == b"", "the socket is closed though the handler is stuck"
        app.release.set()
        app.started = trio.Event()
        async with server.connect(receive_buffer=4096) as wire:
            await wire.send(request_bytes("POST", "/pour"))
            await app.started.wait()
            await trio.testing.wait_all_tasks_blocked(0.05)
        while server.barrier.connections:
            await trio.testing.wait_all_tasks_blocked()
    assert app.events == ["told at once", "told while writing"]


async def test_the_end_is_told_to_who_attends_whatever_he_is_stuck_in() -> None:
    """By the connection's own task: nobody asks for messages."""
    started, ended, release = trio.Event(), trio.Event(), trio.Event()
    told: list[str] = []

    async def handler(scope: Any, receive: Any, send: Any) -> None:
        exchange, handling = current_exchange_of(scope), trio.CancelScope()
        assert exchange.attend(handling)
        exchange.on_disconnect(ended.set)
        started.set()
        with handling, trio.CancelScope(shield=True):
            await release.wait()
            assert exchange.client_is_gone
            exchange.on_disconnect(lambda: told.append("told at once"))
        assert handling.cancel_called

    async with open_server(http_app(Guard(handler))) as server, server.connect() as wire:
        await wire.send(request_bytes("GET", "/"))
        try:
            await started.wait()
            await wire.half_close()
            await ended.wait()
            assert await wire.read_to_end() == b"", "the socket is closed though the handler is stuck"
        finally:
            release.set()
        while server.barrier.connections:
            await trio.testing.wait_all_tasks_blocked()
    assert told == ["told at once"]


async def test_no_end_is_told_after_the_last_message(app: App, mock_clock: trio.testing.MockClock) -> None:
    """Hypercorn's own `http.disconnect` is withheld: the connection goes back to idle, serves on, and times out."""
    mock_clock.rate = 1
    app.release.set()
    async with app.serve(BarrierSettings(keep_alive_s=75), patience_s=1000) as server, server.connect() as wire:
        for _ in range(3):
            assert (await wire.ask("GET", "/wait")).body == b"waited"
        await trio.testing.wait_all_tasks_blocked(0.01)
        mock_clock.jump(76)
        assert await wire.read_to_end() == b""
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not server.barrier.connections
    assert app.events == []


async def test_the_servers_own_tidying_up_is_withheld_from_the_app() -> None:
    """`http.disconnect` behind the answer's last message would make Quart cancel that very `send`."""
    told: list[str] = []
    waiting: list[int] = []
    inbox: list[dict[str, Any]] = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> dict[str, Any]:
        return inbox.pop(0) if inbox else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        await trio.lowlevel.checkpoint()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        current_exchange_of(scope).on_disconnect(lambda: told.append("disconnected"))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"all", "more_body": False})
        assert (await receive())["type"] == "http.request"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            waiting.append(len(nursery.child_tasks))
            nursery.cancel_scope.cancel()

    await Guard(app)({"type": "http", "path": "/", "headers": []}, receive, send)
    assert waiting == [1]
    assert told == []


async def test_idle_connections_do_not_hold_up_shutdown(app: App) -> None:
    """Used ones, under Quart: well under a second."""
    async with app.serve(BarrierSettings(grace_s=600)) as server, server.connect() as wire:
        assert (await wire.ask("POST", "/echo", body=b"x")).status == 200
        server.stop()
        with trio.fail_after(0.9):
            await server.wait_stopped()


async def test_a_cut_delivers_what_was_sent_and_no_end(app: App) -> None:
    """Half a megabyte of stream, its error event, and then the end is missing; nobody is told that the peer left."""

    @app.post("/cut")
    async def cut() -> Response:
        exchange().on_disconnect(lambda: app.events.append("disconnected"))

        async def body() -> AsyncIterator[bytes]:
            yield bytes(500_000)
            yield b"event: error\n\n"
            exchange_.cut()
            exchange_.cut()
            yield b"never sent"

        exchange_ = exchange()
        return Response(body(), content_type="text/event-stream")

    async with app.serve() as server:
        cut_short = await server.ask("GET", "/cut")
        assert cut_short.is_cut
        assert len(cut_short.body) == 500_014
        assert cut_short.body.endswith(b"event: error\n\n")
    assert app.events == []


async def test_a_cut_does_not_wait_for_its_handler(app: App) -> None:
    """The client sees it while the handler is still busy; then the handler is cancelled, whom no callback concerns."""

    @app.post("/cut")
    async def cut() -> Response:
        exchange().on_disconnect(lambda: app.events.append("disconnected"))
        exchange().cut()
        try:
            await app.release.wait()
        except trio.Cancelled:
            app.events.append("cancelled")
            app.ended.set()
            raise
        return Response("never")

    async with app.serve(BarrierSettings(close_drain_s=0.1)) as server, server.connect() as wire:
        await wire.send(request_bytes("GET", "/cut"))
        assert await wire.read_to_end() == b""
        await app.ended.wait()
    assert app.events == ["cancelled"]


async def test_an_abort_ends_the_connection_at_once(app: App) -> None:
    """Even one whose peer reads nothing; its handler is cancelled, and no callback says that the peer left."""

    @app.post("/abort")
    async def abort() -> Response:
        aborted = exchange()

        async def body() -> AsyncIterator[bytes]:
            app.started.set()
            try:
                while True:
                    yield bytes(65536)
            finally:
                app.ended.set()

        async def later() -> None:
            await app.started.wait()
            await trio.testing.wait_all_tasks_blocked(0.05)
            aborted.abort()

        app.quart.add_background_task(later)
        return Response(body())

    async with app.serve() as server, server.connect(receive_buffer=4096) as wire:
        await wire.send(request_bytes("GET", "/abort"))
        await app.ended.wait()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not server.barrier.connections


# Heads and failures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["abc", "A.b_c:d-9", "x" * 128])
async def test_a_well_formed_request_id_comes_back(app: App, given: str) -> None:
    """On every answer, Quart's own included."""
    async with app.serve() as server:
        for path in ("/echo", "/no-such-path"):
            assert (await server.ask("POST", path, f"X-Request-Id: {given}")).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a\xe9", '"a"'])
async def test_another_request_id_is_replaced_by_a_fresh_one(app: App, given: str) -> None:
    """Different each time, known to the handler."""

    @app.post("/id")
    async def tell() -> Response:
        return Response(exchange().request_id)

    async with app.serve() as server:
        answers = [await server.ask("GET", "/id", f"x-request-id: {given}") for _ in range(2)]
        ids = {answered.headers["x-request-id"] for answered in answers}
        assert len(ids) == 2
        assert ids == {answered.body.decode() for answered in answers}


async def test_answers_under_v1_are_no_pages(app: App) -> None:
    """Whatever the handler says; elsewhere nothing is added."""

    @app.post("/v1/models")
    async def models() -> Response:
        return Response("<script>", headers={"Content-Security-Policy": "none", "X-Request-Id": "forged"})

    async with app.serve() as server:
        for path in ("/v1/models", "/v1", "/v1/no-such", "/v1/%6dodels"):
            answered = await server.ask("GET", path)
            assert answered.headers["content-security-policy"] == "sandbox"
            assert answered.headers["x-content-type-options"] == "nosniff"
            assert answered.headers["x-request-id"] != "forged"
        assert "content-security-policy" not in (await server.ask("GET", "/v10")).headers
        async with server.connect() as wire:
            await wire.send(request_bytes("GET", "/v1/models", "connection: close"))
            whole = (await wire.read_to_end()).lower()
            assert whole.count(b"content-security-policy:") == whole.count(b"x-request-id:") == 1


async def test_a_failure_before_the_head_is_a_500_that_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Nor does the log: where it happened, not what was said."""

    secret = "the prompt was: " + "-".join(["se", "cr", "et"])

    @http_app
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        async with trio.open_nursery():
            raise ValueError(secret)

    async with open_server(http_app(Guard(broken))) as server, server.connect() as wire:
        failed = await wire.ask("POST", "/v1/messages", "x-request-id: mine", body=b"secret")
        assert (failed.status, failed.code, failed.headers["x-request-id"]) == (500, "internal_error", "mine")
        assert failed.json["type"] == "error"
        assert (await wire.ask("GET", "/")).status == 500, "the connection serves on"
    records = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(records) == 2
    assert "request mine failed: ValueError" in records[0]
    assert "test_guard.py" in records[0]
    assert secret not in caplog.text


async def test_a_failure_after_the_head_is_a_cut(app: App) -> None:
    """It could not be told from success otherwise."""

    @app.post("/half")
    async def half() -> Response:
        async def body() -> AsyncIterator[bytes]:
            yield b"half"
            raise ValueError("half way")

        return Response(body())

    async with app.serve() as server:
        broken = await server.ask("GET", "/half")
        assert (broken.status, broken.body, broken.is_cut) == (200, b"half", True)
        assert (await server.ask("POST", "/echo", body=b"x")).status == 200


@pytest.mark.parametrize(
    "target",
    [
        "/%00",
        "/%ff%fe",
        "/a%zz",
        "//",
        "//a",
        "/..",
        "/a?%ff=%00",
        "/[",
        "http://x/echo%00",
        "http://x",
        "/%F0%9F%92%A9",
    ],
)
async def test_no_target_is_a_500(app: App, target: str) -> None:
    """Odd bytes are a path that does not exist."""
    async with app.serve() as server:
        assert (await server.ask("GET", target)).status in {308, 400, 404}
        async with server.connect() as wire:
            assert (await wire.ask("OPTIONS", "*")).status in {200, 404, 405}
            await wire.send(
                request_bytes("GET", "/echo", "cookie: \xff=;;=\x80", "content-type: \xff/;=", host="[::1]:99999")
            )
            assert (await wire.read_answer()).status == 200


async def test_an_exchange_knows_what_was_declared(app: App) -> None:
    """A length, none, or that nobody knows."""

    @app.post("/declared")
    async def declared() -> Response:
        return Response(msgspec.json.encode(exchange().declared_bytes))

    async with app.serve() as server:
        assert (await server.ask("GET", "/declared")).json == 0
        assert (await server.ask("POST", "/declared", body=b"abc")).json == 3
        async with server.connect() as wire:
            await wire.send(request_bytes("POST", "/declared", CHUNKED) + chunked(b"abc"))
            assert (await wire.read_answer()).json is None


# Progress ---------------------------------------------------------------------------------------------------------------


async def test_progress_is_told_to_the_exchange_whose_bytes_wait_and_to_none_after_it(app: App) -> None:
    """The connection serves on, and the next request's writes are not the last one's."""
    calls: list[str] = []

    @app.post("/large")
    async def large() -> Response:
        query = request.query_string.decode()
        exchange().on_progress(lambda: calls.append(query))
        return Response(bytes(16 * MIB))

    async with app.serve() as server, server.connect(receive_buffer=16384) as wire:
        assert len((await wire.ask("POST", "/large?1")).body) == 16 * MIB
        assert set(calls) == {"1"}
        (connection,) = server.barrier.connections
        assert connection._peer.on_progress is None
        calls.clear()
        assert len((await wire.ask("POST", "/large?2")).body) == 16 * MIB
        assert set(calls) == {"2"}
