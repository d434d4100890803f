"""What stands beside the API, and what holds on every path: the shape of errors, methods, foreign hosts and origins."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import trio

from tests.http.served import JSON, Served, open_served, wait_until
from tests.http.wire import open_server
from wakecall.broker import Broker, open_broker
from wakecall.http import create_app

CALL = {"model": "qwen"}
PATHS = [
    "/",
    "/healthz",
    "/readyz",
    "/metrics",
    "/v1/models",
    "/v1/models/qwen",
    "/admin/v1/llms",
    "/admin/v1/sessions",
    "/admin/v1/tasks",
    "/nowhere",
]


async def test_it_lives_and_says_what_it_is(served: Served) -> None:
    health = await served.ask("GET", "/healthz")
    assert (health.status, health.json) == (200, {"status": "ok"})
    ready = await served.ask("GET", "/readyz")
    assert (ready.status, ready.json) == (200, {"status": "ready"})
    index = await served.ask("GET", "/")
    assert index.headers["content-type"] == "text/plain; charset=utf-8"
    assert b"Wakecall" in index.body


async def test_a_broker_that_stops_is_not_ready_but_lives(served: Served) -> None:
    await served.broker.drain(0)
    ready = await served.ask("GET", "/readyz")
    assert (ready.status, ready.code, ready.json["reasons"]) == (503, "shutting_down", ["shutting_down"])
    assert (await served.ask("GET", "/healthz")).status == 200


def samples(text: bytes) -> dict[str, float]:
    """Every sample of Prometheus' text format."""
    lines = [line for line in text.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


async def test_metrics_follow_what_happens(served: Served) -> None:
    async with served.publishing({"name": "qwen", "status": "hibernating"}) as publisher:
        async with served.calling(CALL) as client:
            wake = await publisher.next("wake")
            before = samples((await served.ask("GET", "/metrics")).body)
            assert before["wakecall_infers_waiting"] == 1
            assert before["wakecall_wakes_in_flight"] == 1
            await publisher.answer(wake, b"")
            frame = await publisher.next("infer")
            during = samples((await served.ask("GET", "/metrics")).body)
            assert during["wakecall_infers_in_flight"] == 1
            assert during["wakecall_channels"] == during["wakecall_sessions"] == 1
            assert during['wakecall_llms{status="active"}'] == 1
            await publisher.answer(frame, b"{}")
            await client.read_head()
        async with served.calling(CALL) as client:
            await publisher.fail(await publisher.next("infer"), message="x", code="a code of its own", status=418)
            await client.read_head()
        async with served.calling(CALL):
            await publisher.next("infer")
        await wait_until(lambda: served.broker.statistics().cancelled == 1)
    answer = await served.ask("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    after = samples(answer.body)
    assert after["wakecall_infers_accepted_total"] == 3
    for outcome in ("completed", "failed", "cancelled"):
        assert after[f'wakecall_infers_ended_total{{outcome="{outcome}"}}'] == 1
        assert after[f'wakecall_infer_seconds_count{{outcome="{outcome}"}}'] == 1
    assert after['wakecall_infer_outcomes_total{code="publisher_error",outcome="failed"}'] == 1
    assert after["wakecall_infer_first_byte_seconds_count"] == 1
    assert after['wakecall_wake_seconds_count{outcome="succeeded"}'] == 1
    assert after['wakecall_wakes_total{state="started"}'] == 1


async def test_metrics_tell_what_the_process_holds(served: Served) -> None:
    """Its descriptors and Trio's tasks: more with a channel, and again as before when it has gone."""

    async def ask() -> tuple[float, float]:
        now = samples((await served.ask("GET", "/metrics")).body)
        return now["process_open_fds"], now["wakecall_trio_tasks"]

    assert (await ask())[0] <= samples((await served.ask("GET", "/metrics")).body)["process_max_fds"]
    alone = await ask()
    async with served.publishing({"name": "qwen"}):
        descriptors, tasks = await ask()
        assert descriptors > alone[0]
        assert tasks > alone[1]
    with trio.fail_after(10):
        # Less, if the connection of the question before had not gone yet when it was asked.
        while any(now > before for now, before in zip(await ask(), alone, strict=True)):
            await trio.sleep(0.01)


async def test_no_label_has_a_value_that_a_peer_chose(served: Served) -> None:
    name = "a-name-of-somebodys"
    async with served.publishing({"name": name, "type": "its-type"}, session_id="its-session") as publisher:
        async with served.calling({"model": name}) as client:
            await publisher.fail(await publisher.next("infer"), message="its-message", code="its-code", status=599)
            await client.read_head()
    values = re.findall(r'="([^"]*)"', (await served.ask("GET", "/metrics")).body.decode())
    assert values
    for word in (name, "its-", "599"):
        assert not [value for value in values if word in value]


# Every path ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "/nowhere",
        "/v1/nowhere",
        "/publisher/v1/nowhere",
        "/admin/v1/nowhere",
        "/v1/models/",
        "/%00",
        "/a%FFb",
        "/v1/messages/x",
        "//v1/models",
    ],
)
async def test_an_unknown_path_is_404_in_the_same_shape(served: Served, target: str) -> None:
    answer = await served.ask("GET", target)
    assert (answer.status, answer.code) == (404, "not_found")
    assert answer.headers["content-type"] == "application/json"
    assert ("type" in answer.json) == (target == "/v1/messages/x")


@pytest.mark.parametrize(
    ("method", "target", "allowed"),
    [
        ("GET", "/v1/chat/completions", {"POST", "OPTIONS"}),
        ("GET", "/v1/messages", {"POST", "OPTIONS"}),
        ("POST", "/v1/models", {"GET", "HEAD", "OPTIONS"}),
        ("POST", "/publisher/v1/sessions/x", {"PUT", "DELETE", "OPTIONS"}),
        ("POST", "/admin/v1/llms/a/b", {"GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"}),
        ("DELETE", "/healthz", {"GET", "HEAD", "OPTIONS"}),
    ],
)
async def test_a_wrong_method_is_405_and_says_which_are_right(
    served: Served, method: str, target: str, allowed: set[str]
) -> None:
    answer = await served.ask(method, target)
    assert (answer.status, answer.code) == (405, "method_not_allowed")
    assert set(answer.headers["allow"].split(", ")) == allowed
    options = await served.ask("OPTIONS", target)
    assert (options.status, options.body) == (200, b"")
    assert set(options.headers["allow"].split(", ")) == allowed
    bare = await served.ask("HEAD", target)
    assert bare.body == b""
    assert bare.headers["content-type"].startswith("application/json")


@pytest.mark.parametrize("target", PATHS)
async def test_a_foreign_host_or_origin_is_403_on_every_path(served: Served, target: str) -> None:
    for host, headers in (
        ("evil.example", ()),
        ("evil.example:8080", ()),
        ("127.0.0.1", ("origin: https://evil.example",)),
        ("localhost", ("origin: null",)),
        ("localhost", ("origin: http://localhost", "origin: https://evil.example")),
        ("", ()),
    ):
        answer = await served.ask("GET", target, *headers, host=host)
        assert (answer.status, answer.code) == (403, "forbidden")
    ours = await served.ask("GET", target, "origin: http://localhost:3000", host="localhost:8080")
    assert ours.status != 403


@pytest.mark.parametrize("target", ["/healthz", "/readyz", "/metrics"])
async def test_a_probe_without_a_host_is_answered(served: Served, target: str) -> None:
    """HTTP/1.0 needs none, and whoever rebinds a name has a browser send it."""
    for head, status in ((b"", 200), (b"host: evil.example\r\n", 403)):
        async with served.server.connect() as wire:
            await wire.send(b"GET %b HTTP/1.0\r\n%b\r\n" % (target.encode(), head))
            assert (await wire.read_answer()).status == status


async def test_a_foreign_origin_reaches_no_publisher(served: Served) -> None:
    async with served.publishing():
        answer = await served.call(
            CALL, "/v1/chat/completions", "content-type: text/plain", "origin: https://evil.example"
        )
        assert (answer.status, answer.code) == (403, "forbidden")
        assert served.broker.statistics().accepted == 0


@pytest.mark.parametrize(
    ("origins", "status"),
    [
        ((), 200),
        (("origin: https://b.example:8080",), 200),
        (("origin: http://B.example:8080",), 200),
        (("origin: http://localhost:3000",), 200),
        (("origin: https://a.example",), 403),
        (("origin: https://b.example",), 403),
        (("origin: null",), 403),
        (("origin: https://b.example:8080", "origin: https://a.example"), 403),
    ],
)
async def test_behind_a_server_of_ones_own_every_host_is_fine_but_no_page_from_elsewhere(
    origins: tuple[str, ...], status: int
) -> None:
    """A page that somebody in the same network has open could call with his browser: without keys that is enough."""
    async with open_served(loopback_only=False) as served:
        assert (await served.ask("GET", "/healthz", *origins, host="b.example:8080")).status == status
        assert (await served.ask("POST", "/admin/v1/sweep", *origins, host="b.example:8080")).status == status


@pytest.mark.parametrize("host", ["", "a b", "[", "a:b:c", "%", "x" * 300, "xn--\xff"])
async def test_a_host_that_is_none_is_an_error_of_ours_not_a_page(host: str) -> None:
    async with open_served(loopback_only=False) as served:
        answer = await served.ask("GET", "/v1/models", host=host)
        assert answer.status < 500
        assert answer.headers["content-type"] == "application/json"
        assert b"<" not in answer.body


async def test_a_bug_of_ours_is_500_and_tells_nothing(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither to the peer nor, of what the peer sent, to the log."""

    def broken(self: Broker, name: str, request: Any, **_: Any) -> Any:
        raise RuntimeError(request.body)

    monkeypatch.setattr(Broker, "infer_nowait", broken)
    caplog.set_level(logging.DEBUG)
    answer = await served.call({"model": "qwen", "prompt": "secret"}, "/v1/messages")
    assert (answer.status, answer.code) == (500, "internal_error")
    assert answer.json["type"] == "error"
    assert b"secret" not in answer.body
    assert "RuntimeError" in caplog.text
    assert not re.search("secret|prompt", caplog.text)


async def test_nothing_of_quart_shows(served: Served) -> None:
    """No cookies, no pages, no name of a server."""
    for target in PATHS:
        answer = await served.ask("GET", target, "cookie: session=x")
        assert not {"set-cookie", "server", "vary"} & set(answer.headers)
        assert "html" not in answer.headers["content-type"]
    answer = await served.ask("POST", "/v1/chat/completions", JSON, body=b"{")
    assert b"<" not in answer.body


async def test_an_embedders_own_routes_and_hooks_work() -> None:
    """The app is a Quart app: what is added to it before it is served counts, and errors keep their shape."""
    async with open_broker() as broker:
        app = create_app(broker)

        @app.get("/own")
        async def own() -> str:
            return "mine"

        async with open_server(app) as server:
            served = Served(server, broker, app)
            assert (await served.ask("GET", "/own")).body == b"mine"

        @app.after_request
        async def mark(response: Any) -> Any:
            response.headers["x-own"] = "yes"
            return response

        async with open_server(app) as server:
            served = Served(server, broker, app)
            for target, status in (("/own", 200), ("/nowhere", 404), ("/v1/models/x", 404)):
                answer = await served.ask("GET", target)
                assert (answer.status, answer.headers["x-own"]) == (status, "yes")
            assert answer.code == "model_not_found"
