"""A peer leaves while the app is stuck in a write to it, or the server stops: nothing in the broker waits for a socket."""

from __future__ import annotations

import json
from typing import Any

import pytest
import trio
import trio.testing

from tests.http.served import SSE, Served, head, open_served, wait_until
from tests.http.wire import open_server, send_until_stuck
from wakecall.broker import open_broker
from wakecall.config import BrokerConfig
from wakecall.http import create_app
from wakecall.http.answers import Answer
from wakecall.http.metrics import Metrics
from wakecall.http.relay import EventsBody, pass_on
from wakecall.models import InferSettled, LLMSpec, Statistics, Status

STREAM = {"model": "qwen", "stream": True}
EVENT = b"data: %b\n\n" % (b"x" * 65528)


async def test_a_client_that_leaves_behind_a_stuck_write_cancels_its_infer(served: Served) -> None:
    """It reads nothing, then only says that it will send no more: its slot is free at once."""
    body = json.dumps(STREAM).encode()
    async with served.publishing() as publisher, served.server.connect(receive_buffer=4096) as client:
        await client.send(head("POST", "/v1/completions", f"content-length: {len(body)}") + body)
        frame = await publisher.next("infer")
        async with publisher.upload(frame, SSE) as upload:
            await send_until_stuck(lambda: upload.send(EVENT))
            await client.half_close()
            assert (await publisher.next("cancel")).task_id == frame.task_id
            assert served.broker.statistics().in_flight == 0


async def test_a_peer_that_leaves_in_the_step_in_which_its_answer_is_made_is_no_error_of_ours(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    """By ASGI alone, for no socket is so exact: the handler has what it waits for, the peer is gone before it goes on."""
    waits, may_go_on = trio.Event(), trio.Event()
    asked: list[str] = []

    async def view() -> Answer:
        waits.set()
        await may_go_on.wait()
        asked.append("answered")
        return Answer(b"")

    served.app.add_url_rule("/waits", "waits", view)

    async def receive() -> dict[str, Any]:
        await waits.wait()
        may_go_on.set()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        asked.append(message["type"])

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/waits",
        "raw_path": b"/waits",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"127.0.0.1")],
        "extensions": {},
    }
    await served.app(scope, receive, send)
    assert asked == ["answered"]
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_publisher_that_leaves_behind_a_stuck_write_loses_its_rows(served: Served) -> None:
    """It takes no frames, then leaves: whoever waits for it knows at once."""
    await served.register("laptop", {"name": "qwen"})
    async with trio.open_nursery() as nursery, served.server.connect(receive_buffer=4096) as channel:
        await channel.send(head("GET", "/publisher/v1/sessions/laptop/frames"))
        await wait_until(lambda: served.broker.statistics().channels == 1)
        codes: list[str] = []

        async def call() -> None:
            codes.append((await served.call({"model": "qwen", "pad": "x" * 60_000})).code)

        for _ in range(120):
            nursery.start_soon(call)
        await wait_until(lambda: served.broker.statistics().accepted == 120)
        await channel.half_close()
        await wait_until(lambda: len(codes) == 120)
        assert set(codes) <= {"publisher_disconnected", "model_offline"}
        assert served.broker.llm("qwen").status is Status.INACTIVE


@pytest.mark.parametrize("wants_stream", [False, True])
async def test_a_server_that_stops_leaves_nothing_in_flight(wants_stream: bool) -> None:
    """Though the broker, an embedder's, goes on."""
    async with open_broker() as broker:
        await broker.register("laptop", [LLMSpec("qwen")])
        async with broker.open_channel("laptop") as channel:
            await channel.receive()
            async with open_server(create_app(broker)) as server, server.connect() as client:
                body = json.dumps(STREAM | {"stream": wants_stream}).encode()
                await client.send(head("POST", "/v1/completions", f"content-length: {len(body)}") + body)
                (infer,) = await channel.receive()
                if wants_stream:
                    await broker.push_chunk(
                        infer.data["task_id"], b"data: 1\n\n", offset=0, content_type="text/event-stream"
                    )
                    await client.read_some()
                assert broker.statistics().in_flight == 1
            assert broker.statistics().in_flight == 0
            assert broker.statistics().cancelled == 1


class Asgi:
    """The app called directly, by a server whose writes get stuck: they can be `shielded`, as Hypercorn's are, or not."""

    def __init__(self, target: str, body: bytes, *, shielded: bool) -> None:
        self.shielded = shielded
        self.sending = trio.Event()
        self.unstick = trio.Event()
        self.leave = trio.Event()
        self._requests = [{"type": "http.request", "body": body, "more_body": False}]
        self.scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST" if body else "GET",
            "scheme": "http",
            "path": target,
            "raw_path": target.encode(),
            "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"content-length", b"%d" % len(body))],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }

    async def receive(self) -> Any:
        if self._requests:
            return self._requests.pop()
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def send(self, _: Any) -> None:
        self.sending.set()
        # Longer than a test may take; but a test that fails is to end.
        with trio.move_on_after(20, shield=self.shielded):
            await self.unstick.wait()


FRAMES = "/publisher/v1/sessions/laptop/frames"


async def test_a_channel_ends_with_its_peer_whatever_its_writes_do() -> None:
    async with open_broker() as broker:
        await broker.register("laptop", [LLMSpec("qwen")])
        asgi = Asgi(FRAMES, b"", shielded=True)
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(create_app(broker), asgi.scope, asgi.receive, asgi.send)
                await asgi.sending.wait()
                await wait_until(lambda: broker.statistics().channels == 1)
                asgi.leave.set()
                await wait_until(lambda: broker.statistics().channels == 0)
                assert not asgi.unstick.is_set()
                asgi.unstick.set()


async def test_an_infer_ends_with_its_client_whatever_its_writes_do() -> None:
    async with open_broker() as broker:
        await broker.register("laptop", [LLMSpec("qwen")])
        asgi = Asgi("/v1/completions", json.dumps(STREAM).encode(), shielded=True)
        with trio.fail_after(10):
            async with broker.open_channel("laptop") as channel, trio.open_nursery() as nursery:
                await channel.receive()
                nursery.start_soon(create_app(broker), asgi.scope, asgi.receive, asgi.send)
                (infer,) = await channel.receive()
                await broker.push_chunk(infer.data["task_id"], b"x", offset=0, content_type="text/event-stream")
                await asgi.sending.wait()
                asgi.leave.set()
                (cancel,) = await channel.receive()
                assert cancel.event == "cancel"
                assert not asgi.unstick.is_set()
                asgi.unstick.set()


@pytest.mark.parametrize("head_is_sent", [False, True])
async def test_an_infer_ends_with_its_server(head_is_sent: bool) -> None:
    """The handler is cancelled and nobody says that the peer left; also before Quart has entered the body."""
    async with open_broker() as broker:
        await broker.register("laptop", [LLMSpec("qwen")])
        asgi = Asgi("/v1/completions", json.dumps(STREAM).encode(), shielded=False)
        with trio.fail_after(10):
            async with broker.open_channel("laptop") as channel, trio.open_nursery() as nursery:
                await channel.receive()
                nursery.start_soon(create_app(broker), asgi.scope, asgi.receive, asgi.send)
                (infer,) = await channel.receive()
                if head_is_sent:
                    await broker.push_chunk(infer.data["task_id"], b"x", offset=0, content_type="text/event-stream")
                    await asgi.sending.wait()
                else:
                    await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        assert (broker.statistics().in_flight, broker.statistics().cancelled) == (0, 1)


async def test_a_channel_whose_head_never_went_out_ends_with_its_server() -> None:
    async with open_broker() as broker:
        await broker.register("laptop", [LLMSpec("qwen")])
        asgi = Asgi(FRAMES, b"", shielded=False)
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(create_app(broker), asgi.scope, asgi.receive, asgi.send)
                await asgi.sending.wait()
                nursery.cancel_scope.cancel()
        assert broker.statistics().channels == 0


# Bodies on the virtual clock ----------------------------------------------------------------------------------------


class NoAnswer:
    """An infer whose answer does not come."""

    cancelled = False

    async def wait_head(self) -> Any:
        await trio.sleep_forever()

    def cancel(self) -> None:
        self.cancelled = True


async def test_comments_come_at_the_tenth_second_and_every_ten_from_then(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """The head goes out with the first of them; and Quart must not cut it after a while of its own, calling it complete."""
    infer: Any = NoAnswer()
    exchange: Any = None
    start = trio.current_time()
    answer = await pass_on(infer, exchange, "/v1/chat/completions", BrokerConfig(), wants_stream=True)
    body = answer.response
    assert isinstance(body, EventsBody)
    for expected in (10, 20, 30):
        assert await anext(body) == b": waiting\n\n"
        assert trio.current_time() - start == pytest.approx(expected)
    await body.aclose()
    assert infer.cancelled
    assert answer.timeout is None


class Scripted:
    """An answer that comes as a script says: what, and after how many seconds."""

    def __init__(self, status: int, content_type: str, *script: tuple[float, bytes]) -> None:
        self.status, self.headers = status, {"content-type": content_type}
        self.cancelled = False
        self._script = list(script)

    async def wait_head(self) -> Any:
        return self

    async def receive(self) -> bytes:
        if not self._script:
            return b""
        seconds, data = self._script[0]
        due = trio.current_time() + seconds
        try:
            await trio.sleep(seconds)
        finally:
            self._script[0] = (max(0.0, due - trio.current_time()), data)
        del self._script[0]
        return data

    def note_progress(self) -> None:
        """Nothing is written here."""

    def cancel(self) -> None:
        self.cancelled = True


class WatchedExchange:
    was_cut = False

    def on_progress(self, _: Any) -> None:
        """There is no socket."""

    def cut(self) -> None:
        self.was_cut = True


@pytest.mark.parametrize(
    ("status", "comments_at", "code", "message"),
    [
        (500, [10, 20], "upstream_500", "boom"),
        (200, [10], "publisher_error", "The engine's answer is not the stream that was asked for."),
    ],
)
async def test_comments_come_while_an_answer_is_held_too(
    autojump_clock: trio.testing.MockClock, status: int, comments_at: list[int], code: str, message: str
) -> None:
    """An answer of JSON that takes its time: whoever asked for a stream hears from the tenth second on that he waits."""
    infer: Any = Scripted(status, "application/json", (6, b'{"error": '), (6, b'{"message": '), (13, b'"boom"}}'))
    exchange: Any = WatchedExchange()
    answer = await pass_on(infer, exchange, "/v1/chat/completions", BrokerConfig(), wants_stream=True)
    assert (answer.status_code, answer.content_type) == (200, "text/event-stream")
    body = answer.response
    assert isinstance(body, EventsBody)
    for expected in comments_at:
        assert await anext(body) == b": waiting\n\n"
        assert trio.current_time() == pytest.approx(expected)
    name, data = (await anext(body)).split(b"\n", 1)
    assert name == b"event: error"
    error = json.loads(data.removeprefix(b"data: "))["error"]
    assert (error["code"], error["message"]) == (code, message)
    assert infer.cancelled
    with pytest.raises(StopAsyncIteration):
        await anext(body)
    assert exchange.was_cut


async def test_comments_come_as_long_as_nothing_else_has_gone_out(autojump_clock: trio.testing.MockClock) -> None:
    """The head of a stream is out, and half an event is held back; once there was an event, its pauses are its own."""
    infer: Any = Scripted(200, "text/event-stream", (3, b"data: par"), (30, b"tial\n\n"), (50, b"data: 2\n\n"))
    exchange: Any = WatchedExchange()
    answer = await pass_on(infer, exchange, "/v1/chat/completions", BrokerConfig(), wants_stream=True)
    assert trio.current_time() == 0
    body = answer.response
    assert isinstance(body, EventsBody)
    heard = [(await anext(body), trio.current_time()) for _ in range(5)]
    wait = b": waiting\n\n"
    assert heard == [(wait, 10), (wait, 20), (wait, 30), (b"data: partial\n\n", 33), (b"data: 2\n\n", 83)]
    with pytest.raises(StopAsyncIteration):
        await anext(body)
    assert not exchange.was_cut


@pytest.mark.parametrize(
    ("status", "code"), [(204, "publisher_error"), (205, "publisher_error"), (304, "upstream_304")]
)
async def test_once_it_waits_an_answer_without_a_body_is_an_error_event_too(
    autojump_clock: trio.testing.MockClock, status: int, code: str
) -> None:
    """Whatever its type says: a clean end would be silently nothing."""
    infer: Any = Scripted(status, "text/event-stream", (15, b""))
    exchange: Any = WatchedExchange()
    answer = await pass_on(infer, exchange, "/v1/chat/completions", BrokerConfig(), wants_stream=True)
    body = answer.response
    assert isinstance(body, EventsBody)
    assert await anext(body) == b": waiting\n\n"
    event = await anext(body)
    assert json.loads(event.partition(b"data: ")[2])["error"]["code"] == code
    with pytest.raises(StopAsyncIteration):
        await anext(body)
    assert exchange.was_cut


@pytest.mark.parametrize(("wants_stream", "status"), [(True, 200), (True, 500), (False, 200), (False, 500)])
async def test_an_answer_that_is_whole_in_time_is_passed_on_as_it_is(
    autojump_clock: trio.testing.MockClock, wants_stream: bool, status: int
) -> None:
    """Before the tenth second; a plain caller hears nothing until there is an answer, however long that takes."""
    infer: Any = Scripted(status, "application/json", (6, b"{"), (3 if wants_stream else 3000, b"}"))
    exchange: Any = WatchedExchange()
    answer = await pass_on(infer, exchange, "/v1/chat/completions", BrokerConfig(), wants_stream=wants_stream)
    assert (answer.status_code, answer.content_type) == (status, "application/json")
    assert await answer.get_data() == b"{}"


async def test_a_code_that_is_not_ours_is_counted_as_other() -> None:
    """A label's values are few, whatever publishers call their failures."""

    class Quiet:
        def add_observer(self, observer: Any) -> None:
            self.observe = observer

        def statistics(self) -> Statistics:
            return Statistics(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, {}, 0)

    broker: Any = Quiet()
    metrics = Metrics(broker)
    for code in ("publisher_error", "their-own"):
        broker.observe(InferSettled("t", None, "qwen", "failed", code, "idle", 1.0, None, None))
    text = metrics.render().decode()
    assert 'wakecall_infer_outcomes_total{code="publisher_error",outcome="failed"} 1.0' in text
    assert 'wakecall_infer_outcomes_total{code="other",outcome="failed"} 1.0' in text
    assert "their-own" not in text


async def test_invariant_one_is_checked_by_the_fixture_itself() -> None:
    """A broker whose counters disagree fails the test that used it."""

    with pytest.raises(ExceptionGroup) as caught:
        async with open_served() as served:
            served.broker._directory.counters.accepted += 1
    assert caught.group_contains(AssertionError)
