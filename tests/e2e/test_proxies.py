"""Behind Debian's nginx and Caddy, as their pages have it: the real agent and bare clients, over TLS, with keys.

The broker and the agent are of this process, the proxy is one of its own. What passes: chat, frames, uploads, bodies, the
end of each peer. What must not: a byte held back, a path that is not for the world.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.certificates import Authority
from tests.e2e.proxies import Proxy, nginx_with_keys, nginx_without_keys, run_caddy, run_nginx
from tests.e2e.scripted_engine import ScriptedEngine, open_scripted_engine
from tests.http.served import Reading, wait_until
from tests.http.wire import Answer, TlsWire, request_bytes
from wakecall import Broker, ServeConfig, Status, open_broker, serve
from wakecall.publisher import PublishedModel, PublisherConfig, run_publisher

MIB = 1 << 20
CHAT = "/v1/chat/completions"
HOST = "llm.example.com"


@dataclass
class Stage:
    """A broker behind a proxy, an engine, and who may call.

    Attributes:
        headers: what a client presents.
        broker_url: for publishers.
        broker_key: for publishers.
    """

    broker: Broker
    proxy: Proxy
    engine: ScriptedEngine
    directory: Path
    headers: tuple[str, ...] = ()
    broker_url: str = ""
    broker_key: str | None = None

    async def ask(self, method: str, target: str, *headers: str, body: bytes = b"") -> Answer:
        """One request to the proxy, as whoever the headers say."""
        async with self.proxy.connect() as wire:
            await wire.send(request_bytes(method, target, *headers, body=body, host=HOST))
            return await wire.read_answer(method)

    @asynccontextmanager
    async def calling(self, **members: Any) -> AsyncIterator[Reading]:
        """A client's chat completion; left early, the client leaves."""
        body = json.dumps({"model": "m", "messages": [], **members}).encode()
        async with self.proxy.connect() as wire:
            await wire.send(request_bytes("POST", CHAT, *self.headers, JSON, body=body, host=HOST))
            yield Reading(wire, "POST")

    @asynccontextmanager
    async def publishing(self, **settings: Any) -> AsyncIterator[trio.CancelScope]:
        """The real agent, its channel open. Its scope drops everything at once."""
        config = PublisherConfig(
            broker_url=self.broker_url or self.proxy.url,
            broker_key=self.broker_key,
            engine_url=self.engine.base_url,
            models=(PublishedModel("m"),),
            state_dir=self.directory,
            **{"health_interval_s": 0.01, **settings},
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(run_publisher, config))
            yield nursery.cancel_scope
            nursery.cancel_scope.cancel()


JSON = "content-type: application/json"


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Authority:
    authority = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", authority.file)
    return authority


@asynccontextmanager
async def open_stage(
    run: Callable[[str, Path, Authority], AbstractAsyncContextManager[Proxy]], directory: Path, authority: Authority
) -> AsyncIterator[Stage]:
    """Behind one of the two, with a key for a client and one for a publisher."""
    with trio.fail_after(40):
        async with open_scripted_engine() as engine, open_broker() as broker, trio.open_nursery() as nursery:
            client, publisher = await broker.create_key("client"), await broker.create_key("publisher")
            (url,) = await nursery.start(partial(serve, broker, ServeConfig(port=0)))
            async with run(url, directory, authority) as proxy:
                key = f"authorization: Bearer {client.secret}"
                yield Stage(broker, proxy, engine, directory, (key,), broker_key=publisher.secret)
            nursery.cancel_scope.cancel()


@pytest.fixture
async def stage(tmp_path: Path, authority: Authority) -> AsyncIterator[Stage]:
    """Behind nginx."""
    async with open_stage(partial(run_nginx, nginx_with_keys()), tmp_path, authority) as stage:
        yield stage


async def test_a_plain_call_passes(stage: Stage) -> None:
    """Byte for byte; a key may come either way."""
    async with stage.publishing():
        for headers in (stage.headers, (stage.headers[0].replace("authorization: Bearer", "x-api-key:"),)):
            body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "ü"}]}).encode()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(answer_one, stage, 200, b'{"id": "x",  "answer": "\xc3\xbc"}')
                answer = await stage.ask("POST", CHAT, *headers, JSON, body=body)
            assert (answer.status, answer.body) == (200, b'{"id": "x",  "answer": "\xc3\xbc"}')
            assert answer.headers["x-request-id"].startswith("req_")


async def answer_one(stage: Stage, status: int, body: bytes) -> None:
    exchange = await stage.engine.next()
    await exchange.respond(status, body)


async def test_without_its_key_a_caller_gets_the_brokers_own_answer(stage: Stage) -> None:
    """401 and 403 as they are, whatever Host the proxy was called by; the key of the other role opens nothing."""
    publisher = f"authorization: Bearer {stage.broker_key}"
    for headers, status, code in (
        ((), 401, "invalid_api_key"),
        (("authorization: Bearer nonsense",), 401, "invalid_api_key"),
        ((publisher,), 403, "forbidden"),
    ):
        answer = await stage.ask("GET", "/v1/models", *headers)
        assert (answer.status, answer.code) == (status, code)
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["content-security-policy"] == "sandbox"
    answer = await stage.ask("PUT", "/publisher/v1/sessions/x", *stage.headers, JSON, body=b'{"llms":[]}')
    assert (answer.status, answer.code) == (403, "forbidden")
    assert (await stage.ask("GET", "/v1/models", *stage.headers)).json["data"] == []


async def test_an_early_answer_overtakes_an_upload(stage: Stage) -> None:
    """A key that opens nothing, and a task that is over: said before the body is read, and heard by who still sends it."""
    for headers, path, status in (
        ((), CHAT, 401),
        ((f"authorization: Bearer {stage.broker_key}",), "/publisher/v1/tasks/gone/result", 404),
    ):
        for framing in ("content-length: 20971520", "transfer-encoding: chunked"):
            async with stage.proxy.connect() as wire, trio.open_nursery() as nursery:
                await wire.send(request_bytes("POST", path, *headers, framing, host=HOST))
                piece = b"10000\r\n" + bytes(65536) + b"\r\n" if "chunked" in framing else bytes(65536)

                async def upload(wire: TlsWire = wire, piece: bytes = piece) -> None:
                    with suppress(trio.BrokenResourceError):
                        for _ in range(320):
                            await wire.send(piece)

                nursery.start_soon(upload)
                answer = await wire.read_answer("POST")
                assert (answer.status, answer.is_cut) == (status, False)
                assert answer.json["error"]["code"] in ("invalid_api_key", "task_not_found")
                nursery.cancel_scope.cancel()


async def test_a_stream_passes_event_by_event(stage: Stage) -> None:
    """From the engine through the agent's upload to the client: the second event is made once the first was read."""
    async with stage.publishing(), stage.calling(stream=True) as reading:
        exchange = await stage.engine.next()
        await exchange.start(200, {"content-type": "text/event-stream"})
        for n in range(5):
            await exchange.send(b"data: %d\n\n" % n)
            if n == 0:
                await reading.read_head()
                assert (reading.status, reading.headers["content-type"]) == (200, "text/event-stream")
            assert await reading.until(b"\n\n") == b"data: %d\n\n" % n
        await exchange.finish()
        assert await reading.rest() == (b"", False)


async def test_a_large_plain_answer_is_not_collected_either(stage: Stage) -> None:
    """Beyond what the broker itself holds, it arrives while its end is still to come."""
    async with stage.publishing(), stage.calling() as reading:
        exchange = await stage.engine.next()
        await exchange.start(200, {"content-type": "application/json"})
        await exchange.send(b"[" + b" " * 2 * MIB)
        await reading.read_head()
        got = len(await reading.piece())
        while got < 2 * MIB + 1:
            got += len(await reading.piece())
        await exchange.send(b"]")
        await exchange.finish()
        assert await reading.rest() == (b"]", False)


@pytest.mark.parametrize("upload", ["stream", "chunks"])
async def test_large_bodies_pass_whole_both_ways(upload: str, stage: Stage) -> None:
    """A client's that the agent has to fetch, and an engine's that nobody bounds."""
    sent = json.dumps({"model": "m", "pad": os.urandom(4 * MIB).hex()}).encode()
    received = os.urandom(12 * MIB)
    async with stage.publishing(upload=upload), trio.open_nursery() as nursery:

        async def serve_one() -> None:
            exchange = await stage.engine.next()
            assert hashlib.sha256(exchange.body).digest() == hashlib.sha256(sent).digest()
            await exchange.respond(200, received, "audio/mpeg")

        nursery.start_soon(serve_one)
        answer = await stage.ask("POST", "/v1/audio/speech", *stage.headers, JSON, body=sent)
        assert (answer.status, answer.is_cut) == (200, False)
        assert hashlib.sha256(answer.body).digest() == hashlib.sha256(received).digest()


@pytest.mark.parametrize("after", ["nothing", "an event"])
async def test_a_client_that_leaves_is_noticed_by_the_engine(after: str, stage: Stage) -> None:
    """Through proxy, broker, channel and agent: the engine's connection is closed, and the slot is free."""
    cancelled = stage.broker.statistics().cancelled
    async with stage.publishing():
        (epoch,) = [each.record.epoch for each in stage.broker.session_views()]
        async with stage.calling(stream=after == "an event") as reading:
            exchange = await stage.engine.next()
            if after == "an event":
                await exchange.start(200, {"content-type": "text/event-stream"})
                await exchange.send(b"data: 1\n\n")
                await (await reading.read_head()).until(b"\n\n")
            assert stage.broker.statistics().in_flight == 1
        await exchange.broken.wait()
        await wait_until(lambda: stage.broker.statistics().in_flight == 0)
        assert stage.broker.statistics().cancelled == cancelled + 1
        # The channel it was told by is still the same.
        assert [each.record.epoch for each in stage.broker.session_views()] == [epoch]


async def test_a_sleeping_engine_is_woken(stage: Stage) -> None:
    """One wake frame, its result, then the infer."""
    stage.engine.healthy = False
    async with stage.publishing(hibernating=True, wake_command="true"):
        assert stage.broker.llm("m").status is Status.HIBERNATING
        async with trio.open_nursery() as nursery:

            async def wake() -> None:
                await stage.engine.asked.wait()
                stage.engine.healthy = True
                await answer_one(stage, 200, b"{}")

            nursery.start_soon(wake)
            async with stage.calling() as reading:
                await reading.read_head()
                assert (reading.status, await reading.rest()) == (200, (b"{}", False))
        assert stage.broker.llm("m").status is Status.ACTIVE


async def test_a_publisher_that_dies_is_noticed_and_the_cut_is_seen_as_one(stage: Stage) -> None:
    """In the middle of a stream: the error event, then an end that is none; its rows are lost at once."""
    async with stage.publishing() as agent, stage.calling(stream=True) as reading:
        exchange = await stage.engine.next()
        await exchange.start(200, {"content-type": "text/event-stream"})
        await exchange.send(b"data: 1\n\n")
        await (await reading.read_head()).until(b"\n\n")
        agent.cancel()
        with trio.CancelScope(shield=True), trio.fail_after(10):
            rest, cut = await reading.rest()
        assert cut
        assert b"event: error" in rest
        assert stage.broker.llm("m").status is Status.INACTIVE


async def test_a_publisher_says_goodbye(stage: Stage) -> None:
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        config = PublisherConfig(
            broker_url=stage.proxy.url,
            broker_key=stage.broker_key,
            engine_url=stage.engine.base_url,
            models=(PublishedModel("m"),),
            state_dir=stage.directory,
        )
        await nursery.start(partial(run_publisher, config, stop=stop))
        assert len(stage.broker.session_views()) == 1
        stop.set()
    assert stage.broker.session_views() == []


async def test_what_is_not_for_the_world_is_not_there(stage: Stage) -> None:
    """The proxy says so itself, with an operator's key too, and by whatever way the path is written."""
    admin = await stage.broker.create_key("admin")
    for path in (
        "/",
        "/metrics",
        "/healthz",
        "/readyz",
        "/openapi.json",
        "/admin/v1/llms",
        "/ADMIN/v1/llms",
        "/v1/../admin/v1/llms",
        "/v1/%2e%2e/admin/v1/llms",
        "/v1/..%2fadmin/v1/llms",
        "//admin/v1/llms",
        "/v1//../../admin/v1/llms",
        "/admin/v1/llms/../../../v1/models",
        "/publisher/v1/..;/admin/v1/llms",
    ):
        answer = await stage.ask("GET", path, f"authorization: Bearer {admin.secret}")
        assert answer.status in (308, 404, 400), path
        assert b'"data"' not in answer.body, path


async def test_caddy_does_the_same(tmp_path: Path, authority: Authority) -> None:
    """All of that, one after another, for Caddy takes its time to start."""
    async with open_stage(run_caddy, tmp_path, authority) as stage:
        await test_without_its_key_a_caller_gets_the_brokers_own_answer(stage)
        await test_what_is_not_for_the_world_is_not_there(stage)
        await test_a_plain_call_passes(stage)
        await test_an_early_answer_overtakes_an_upload(stage)
        await test_a_stream_passes_event_by_event(stage)
        await test_a_large_plain_answer_is_not_collected_either(stage)
        await test_large_bodies_pass_whole_both_ways("stream", stage)
        for after in ("nothing", "an event"):
            await test_a_client_that_leaves_is_noticed_by_the_engine(after, stage)
        await test_a_publisher_that_dies_is_noticed_and_the_cut_is_seen_as_one(stage)
        await test_a_publisher_says_goodbye(stage)
        await test_a_sleeping_engine_is_woken(stage)


async def test_nginx_checks_who_calls_a_broker_without_keys(tmp_path: Path, authority: Authority) -> None:
    """As the page's end has it: a key for clients, a password for publishers, and neither is passed on."""
    users = "laptop:{PLAIN}wonder\n"
    with trio.fail_after(30):
        async with open_scripted_engine() as engine, open_broker() as broker, trio.open_nursery() as nursery:
            (url,) = await nursery.start(partial(serve, broker, ServeConfig(port=0)))
            async with run_nginx(nginx_without_keys(), url, tmp_path, authority, users) as proxy:
                stage = Stage(broker, proxy, engine, tmp_path, ("authorization: Bearer change-this-key",))
                for path in ("/v1/models", "/publisher/v1/sessions/x"):
                    for headers in ((), ("authorization: Bearer other",)):
                        assert (await stage.ask("GET", path, *headers)).status == 401
                assert (await stage.ask("GET", "/admin/v1/llms", *stage.headers)).status == 404
                page = await stage.ask("GET", "/v1/models", *stage.headers, "origin: https://chat.example.com")
                assert page.status == 200

                stage.broker_url = proxy.url.replace("https://", "https://laptop:wonder@")
                async with stage.publishing(), stage.calling(stream=True) as reading:
                    exchange = await stage.engine.next()
                    await exchange.start(200, {"content-type": "text/event-stream"})
                    await exchange.send(b"data: 1\n\n")
                    assert await (await reading.read_head()).until(b"\n\n") == b"data: 1\n\n"
                    assert isinstance(reading.wire, TlsWire)
                    reading.wire.reset()
                    await exchange.broken.wait()
                    await wait_until(lambda: broker.statistics().in_flight == 0)
            nursery.cancel_scope.cancel()
