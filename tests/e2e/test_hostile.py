"""Peers that would end, own or confuse the broker, against the real `wakecall serve`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from tests.e2e.clients import start_crowd
from tests.e2e.stack import BrokerProcess, open_broker_process, within
from tests.e2e.wire_publisher import WireChannel, WirePublisher, open_wire_publisher
from tests.http.test_barrier import KILLERS
from tests.http.wire import request_bytes


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[BrokerProcess]:
    async with open_broker_process(tmp_path / "w.db") as broker:
        yield broker


async def check_answers(broker: BrokerProcess, publisher: WirePublisher, channel: WireChannel) -> None:
    """A whole call, through the channel that was open all the time."""
    async with trio.open_nursery() as nursery:
        crowd = start_crowd(nursery, broker, "m", 1)
        assert (await publisher.result(await channel.next("infer"), b'{"ok": true}')).status == 200
    assert crowd.codes == {(200, "")}


@within(40)
async def test_the_process_outlives_every_killer(broker: BrokerProcess) -> None:
    """Each ends stock Hypercorn. Here it is refused, and a call made at once after it is answered."""
    async with open_wire_publisher(broker, "m") as (publisher, channel):
        for name, killer in KILLERS.items():
            for authority in (b"x", f"127.0.0.1:{broker.port}".encode()):
                async with broker.connect() as wire:
                    await wire.send(killer.replace(b"host: x\r\n", b"host: " + authority + b"\r\n"))
                    refusal = await wire.read_answer()
                    assert refusal.status in {400, 403, 405, 505}, name
                    assert refusal.code
                    assert await wire.read_to_end() == b""
            await check_answers(broker, publisher, channel)
    assert broker.process.returncode is None


@within(40)
async def test_http_1_0_http_2_and_websockets_are_refused_in_words(broker: BrokerProcess) -> None:
    """The message says what is spoken here, and names the proxy's setting where it is a proxy that asks so."""
    host = f"127.0.0.1:{broker.port}"
    old = f"POST /v1/chat/completions HTTP/1.0\r\nhost: {host}\r\ncontent-length: 0\r\n\r\n".encode()
    h2c = request_bytes(
        "GET",
        "/v1/models",
        "connection: upgrade, http2-settings",
        "upgrade: h2c",
        "http2-settings: AAMAAABk",
        host=host,
    )
    websocket = request_bytes(
        "GET", "/v1/models", "connection: upgrade", "upgrade: websocket", "sec-websocket-version: 13",
        "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==", host=host,
    )  # fmt: skip
    for sent, status, words in (
        (old, 505, "proxy_http_version 1.1"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "HTTP/1.1"),
        (h2c, 400, "HTTP/2"),
        (websocket, 400, "WebSocket"),
    ):
        async with broker.connect() as wire:
            await wire.send(sent)
            refusal = await wire.read_answer()
            assert (refusal.status, refusal.code) == (status, "invalid_request"), sent
            assert words in refusal.json["error"]["message"]
            assert await wire.read_to_end() == b""
    async with broker.connect() as wire:
        await wire.send(f"GET /healthz HTTP/1.0\r\nhost: {host}\r\n\r\n".encode())
        assert (await wire.read_answer()).status == 200


@within(40)
async def test_a_foreign_host_or_origin_is_403(broker: BrokerProcess) -> None:
    """A page in somebody's browser cannot use an open broker, by DNS rebinding or by a cross-origin request."""
    targets = ("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/admin/v1/llms"), ("GET", "/metrics")
    own = f"127.0.0.1:{broker.port}"
    for method, target in (*targets, ("PUT", "/publisher/v1/sessions/evil")):
        for host, origin in (
            ("evil.example", None),
            (f"evil.example:{broker.port}", None),
            (f"127.0.0.1.evil.example:{broker.port}", None),
            (own, "http://evil.example"),
            (own, "null"),
        ):
            headers = [] if origin is None else [f"origin: {origin}"]
            async with broker.connect() as wire:
                await wire.send(request_bytes(method, target, *headers, body=b"{}" * (method != "GET"), host=host))
                refusal = await wire.read_answer(method)
                assert (refusal.status, refusal.code) == (403, "forbidden"), (target, host, origin)
    for host, origin in ((own, f"http://localhost:{broker.port}"), (f"localhost:{broker.port}", f"http://{own}")):
        async with broker.connect() as wire:
            await wire.send(request_bytes("GET", "/v1/models", f"origin: {origin}", host=host))
            assert (await wire.read_answer()).status == 200
