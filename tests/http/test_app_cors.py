"""Web pages as callers: what their browsers ask and are told, on a real socket; and nothing at all without `cors`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.http.served import JSON, SSE, Served, head, open_served
from tests.http.wire import Answer

PAGE = "https://chat.example.com"
EVIL = "https://evil.example"
FROM_PAGE = f"origin: {PAGE}"
ASKS = ("access-control-request-method: POST", "access-control-request-headers: authorization,content-type")
EXPOSED = {
    "x-request-id",
    "retry-after",
    "x-should-retry",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-tokens",
}
CHAT = "/v1/chat/completions"


@asynccontextmanager
async def open_for(*origins: str, loopback_only: bool = True) -> AsyncIterator[Served]:
    async with open_served(cors=origins, loopback_only=loopback_only) as served:
        yield served


def cors_of(answer: Answer) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


def check_readable(answer: Any, page: str = PAGE) -> None:
    """Its browser lets the page read it, and our headers on it; no cache confuses it with another page's."""
    assert answer.headers["access-control-allow-origin"] == page
    assert answer.headers["vary"] == "Origin"
    exposed = {name.strip() for name in answer.headers["access-control-expose-headers"].split(",")}
    assert exposed >= EXPOSED
    assert "access-control-allow-credentials" not in answer.headers
    assert answer.headers["x-request-id"]


async def test_a_browser_that_asks_first_is_told_what_the_page_may() -> None:
    """204, at any path under /v1, there or not, without a key, without a body."""
    async with open_for(PAGE) as served:
        for path in (CHAT, "/v1/models", "/v1/nowhere", "/v1"):
            answer = await served.ask("OPTIONS", path, FROM_PAGE, *ASKS)
            assert (answer.status, answer.body) == (204, b"")
            check_readable(answer)
            assert answer.headers["access-control-allow-methods"] == "GET, HEAD, POST"
            assert answer.headers["access-control-allow-headers"] == "authorization,content-type"
            assert int(answer.headers["access-control-max-age"]) > 0


async def test_a_page_reads_answers_errors_and_streams() -> None:
    """Those of the app, and those of the guard and the barrier below it."""
    async with open_for(PAGE, "http://localhost:3000") as served, served.publishing() as publisher:
        check_readable(await served.ask("GET", "/v1/models", FROM_PAGE))
        check_readable(await served.ask("GET", "/v1/models", "origin: http://localhost:3000"), "http://localhost:3000")
        unknown = await served.call({"model": "nobody"}, CHAT, JSON, FROM_PAGE)
        assert unknown.code == "model_not_found"
        check_readable(unknown)
        wrong_method = await served.ask("DELETE", CHAT, FROM_PAGE)
        assert wrong_method.status == 405
        check_readable(wrong_method)
        async with served.server.connect() as wire:
            await wire.send(head("POST", CHAT, FROM_PAGE, f"content-length: {1 << 30}"))
            too_large = await wire.read_answer("POST")
        assert too_large.status == 413
        check_readable(too_large)

        async with served.calling({"model": "qwen", "stream": True}, CHAT, JSON, FROM_PAGE) as reading:
            frame = await publisher.next("infer")
            async with publisher.upload(frame, SSE) as upload:
                await upload.send(b"data: 1\n\n")
                check_readable(await reading.read_head())
                await upload.finish()
            assert await reading.rest() == (b"data: 1\n\n", False)

        async def fail(*_: Any, **__: Any) -> Any:
            raise RuntimeError

        served.app.dispatch_request = fail
        crashed = await served.ask("GET", "/v1/models", FROM_PAGE)
        assert crashed.code == "internal_error"
        check_readable(crashed)


async def test_a_page_reads_what_is_refused_before_the_app_sees_it() -> None:
    """As far as the request can be understood: what is said of one is not said of the next on its connection."""
    async with open_for(PAGE) as served:
        async with served.server.connect() as wire:
            await wire.send(head("GET", "/v1/models", FROM_PAGE))
            check_readable(await wire.read_answer())
            await wire.send(b"GET /v1/models HTTP/1.1\r\n\r\n")
            refused = await wire.read_answer()
            assert (refused.status, cors_of(refused)) == (400, {})
        refused = await served.ask("GET", "/v1/models", "upgrade: websocket", FROM_PAGE)
        assert refused.status == 400
        check_readable(refused)
        assert cors_of(await served.ask("GET", "/admin/v1/llms", "upgrade: websocket", FROM_PAGE)) == {}


@pytest.mark.parametrize("path", ["/%76%31/models", "/v1%2fmodels", "{origin}/v1/models", "{origin}/%76%31/models"])
async def test_what_is_for_pages_is_so_in_every_spelling(path: str) -> None:
    """Of what is refused before the app sees it, too: both look at the path as it is routed."""
    async with open_for(PAGE) as served:
        path = path.format(origin=f"http://127.0.0.1:{served.server.port}")
        check_readable(await served.ask("GET", path, FROM_PAGE))
        refused = await served.ask("GET", path, "upgrade: websocket", FROM_PAGE)
        assert refused.status == 400
        check_readable(refused)


@pytest.mark.parametrize("loopback_only", [True, False])
async def test_a_page_that_is_not_admitted_is_told_nothing(loopback_only: bool) -> None:
    """So its browser keeps the answer from it. What it answers is no other's either: `Vary` is there."""
    async with open_for(PAGE, loopback_only=loopback_only) as served:
        for origin in (EVIL, "null", "http://chat.example.com"):
            for answer in (
                await served.ask("OPTIONS", CHAT, f"origin: {origin}", *ASKS),
                await served.ask("GET", "/v1/models", f"origin: {origin}"),
            ):
                assert cors_of(answer) == {}
                assert answer.headers["vary"] == "Origin"
                assert (answer.status, answer.code) == (403, "forbidden")
        without = await served.ask("GET", "/v1/models")
        assert (without.status, cors_of(without), without.headers["vary"]) == (200, {}, "Origin")


async def test_only_what_is_for_clients_is_for_pages() -> None:
    """Publishers' and operators' paths stay shut on an open broker, for a page that is named as well."""
    async with open_for(PAGE, "*") as served:
        for path in ("/admin/v1/llms", "/publisher/v1/sessions/x", "/metrics", "/", "/healthz", "//v1/models"):
            for answer in (
                await served.ask("OPTIONS", path, FROM_PAGE, *ASKS),
                await served.ask("GET", path, FROM_PAGE),
            ):
                assert (answer.status, answer.code) == (403, "forbidden")
                assert cors_of(answer) == {}
                assert "vary" not in answer.headers


async def test_on_an_open_broker_a_star_lets_nobody_in() -> None:
    """Only who is named gets past the refusal of foreign origins, wherever it listens; with keys all do."""
    for loopback_only in (True, False):
        async with open_for("*", PAGE, loopback_only=loopback_only) as served:
            for answer in (
                await served.ask("OPTIONS", CHAT, f"origin: {EVIL}", *ASKS),
                await served.ask("GET", "/v1/models", f"origin: {EVIL}"),
            ):
                assert (answer.status, answer.code) == (403, "forbidden")
            assert (await served.ask("GET", "/v1/models", FROM_PAGE)).status == 200
    async with open_for("*") as served:
        key = (await served.broker.create_key("client")).secret
        assert (await served.ask("OPTIONS", CHAT, f"origin: {EVIL}", *ASKS)).status == 204
        answer = await served.ask("GET", "/v1/models", f"origin: {EVIL}", f"authorization: Bearer {key}")
        assert answer.status == 200
        check_readable(answer, EVIL)


async def test_with_keys_a_page_needs_one_and_reads_that_it_has_none() -> None:
    """The preflight carries no key and needs none; a star is enough then, and how much is left of a rate is readable."""
    async with open_for("*") as served:
        made = await served.broker.create_key("client", rpm=60)
        assert (await served.ask("OPTIONS", CHAT, f"origin: {EVIL}", *ASKS, host="broker.example")).status == 204
        without = await served.ask("POST", CHAT, JSON, f"origin: {EVIL}", host="broker.example")
        assert (without.status, without.code) == (401, "invalid_api_key")
        check_readable(without, EVIL)
        key = f"authorization: Bearer {made.secret}"
        unknown = await served.ask(
            "POST", CHAT, JSON, f"origin: {EVIL}", key, body=b'{"model":"m"}', host="broker.example"
        )
        assert unknown.code == "model_not_found"
        check_readable(unknown, EVIL)
        told = {name for name in unknown.headers if name.startswith("x-ratelimit-")}
        assert told
        assert told <= {name.strip() for name in unknown.headers["access-control-expose-headers"].split(",")}


async def test_a_named_page_on_a_foreign_host_is_refused_all_the_same() -> None:
    """DNS rebinding: the page's origin is what it says, but the browser thinks that it speaks to somebody else."""
    async with open_for(PAGE) as served:
        for method, asks in (("OPTIONS", ASKS), ("GET", ())):
            answer = await served.ask(method, "/v1/models", FROM_PAGE, *asks, host="evil.example")
            assert (answer.status, answer.code) == (403, "forbidden")


@pytest.mark.parametrize("asks", [(), (FROM_PAGE,), ASKS])
async def test_an_options_that_asks_for_no_page_is_an_ordinary_one(asks: tuple[str, ...]) -> None:
    async with open_for(PAGE, loopback_only=False) as served:
        answer = await served.ask("OPTIONS", CHAT, *asks)
        assert answer.status == 200
        assert set(answer.headers["allow"].split(", ")) == {"OPTIONS", "POST"}
        assert "access-control-allow-methods" not in answer.headers


async def test_without_cors_nothing_is_said_of_it(served: Served) -> None:
    """And a foreign origin is refused, whatever it asks."""
    for origin in (PAGE, "http://localhost:3000"):
        for method, path in (("OPTIONS", CHAT), ("GET", "/v1/models"), ("POST", CHAT)):
            answer = await served.ask(method, path, f"origin: {origin}", *ASKS)
            assert cors_of(answer) == {}
            assert "vary" not in answer.headers
            assert (answer.status == 403) == (origin == PAGE)
