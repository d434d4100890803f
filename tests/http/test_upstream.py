"""Public rows over real sockets: what an upstream is told, what comes back of it, and all that it may do wrong."""

from __future__ import annotations

import contextlib
import gc
import gzip
import json
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.certificates import Authority
from tests.e2e.scripted_engine import EVENT, Exchange, ScriptedEngine, open_scripted_engine
from tests.http.served import JSON, Served, as_bytes, open_served, wait_until
from tests.http.wire import Answer, send_until_stuck
from tests.publisher.peers import closed_port
from tests.sentinel import leaks_of, new_sentinel
from wakecall import upstream as upstream_module
from wakecall.config import BrokerConfig
from wakecall.errors import PublisherError
from wakecall.hosting import PSEUDONYM
from wakecall.models import LLM, InferRequest, Kind, Status
from wakecall.store.sqlite import open_sqlite_store
from wakecall.upstream import open_httpx_upstream, retry_after_of

VARIABLE = "WAKECALL_UPSTREAM_TEST"
CALL = {"model": "gpt", "messages": []}
STREAM = {**CALL, "stream": True}
UNREACHABLE = "The upstream cannot be reached."


class Stage:
    """An app with public rows, and the engine behind them."""

    def __init__(self, served: Served, engine: ScriptedEngine, nursery: trio.Nursery) -> None:
        self.served = served
        self.engine = engine
        self._nursery = nursery

    async def put(self, name: str = "gpt", **said: Any) -> Answer:
        """A public row: by default as the engine's model `m`."""
        row = {"type": "openai", "model": "m", "url": self.engine.base_url, **said}
        answer = await self.served.ask("PUT", f"/admin/v1/llms/{name}", JSON, body=as_bytes(row))
        assert answer.status == 200, answer
        return answer

    async def call(self, body: Any, path: str = "/v1/chat/completions", *headers: str) -> tuple[Exchange, list[Answer]]:
        """A call under way: what the engine got of it, and where its answer will be."""
        answers: list[Answer] = []

        async def call() -> None:
            answers.append(await self.served.call(body, path, *headers))

        self._nursery.start_soon(call)
        return await self.engine.next(), answers

    async def answer_of(self, answers: list[Answer]) -> Answer:
        await wait_until(lambda: bool(answers))
        return answers[0]


@asynccontextmanager
async def open_stage(config: BrokerConfig | None = None, **serving: Any) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(open_scripted_engine())
        asks = await stack.enter_async_context(open_httpx_upstream())
        served = await stack.enter_async_context(open_served(config, upstream=asks, **serving))
        nursery = await stack.enter_async_context(trio.open_nursery())
        yield Stage(served, engine, nursery)
        nursery.cancel_scope.cancel()


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with open_stage() as each:
        yield each


# What it is told --------------------------------------------------------------------------------------------------------


async def test_it_gets_the_call_with_its_own_model_and_key_and_nothing_else(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other byte of the body is the client's; of his headers none but what says what the body is."""
    monkeypatch.setenv(VARIABLE, "sk-of-the-upstream")
    await stage.put(key_env=VARIABLE)
    body = b'{"x": [1.0, 1e2], "mod\\u0065l" :"gpt",  "stream":false,"model2":"gpt"}'
    headers = (
        "content-type: application/json; charset=utf-8",
        "accept: application/json",
        "authorization: Bearer of-the-client",
        "x-api-key: of-the-client",
        "cookie: a=b",
        "user-agent: curl",
        "anthropic-version: 2023-01-01",
        "x-request-id: mine",
        "x-forwarded-for: 10.0.0.1",
        "openai-organization: org",
    )
    exchange, answers = await stage.call(body, "/v1/embeddings", *headers)
    assert (exchange.method, exchange.path) == ("POST", "/v1/embeddings")
    assert bytes(exchange.body) == body.replace(b' :"gpt"', b' :"m"')
    assert exchange.headers == {
        "host": f"127.0.0.1:{stage.engine.peer.port}",
        "content-type": "application/json; charset=utf-8",
        "content-length": str(len(exchange.body)),
        "accept": "application/json",
        "accept-encoding": "identity",
        "user-agent": "wakecall",
        "via": f"1.1 {PSEUDONYM}",
        "authorization": "Bearer sk-of-the-upstream",
    }
    await exchange.respond(200, b'{"said": 1.0}')
    answer = await stage.answer_of(answers)
    assert (answer.status, answer.body) == (200, b'{"said": 1.0}')


async def test_one_that_leads_back_here_is_noticed(stage: Stage) -> None:
    """The second time round, and not when its thousandth connection or its gigabyte of bodies is reached."""
    here = f"http://127.0.0.1:{stage.served.server.port}"
    await stage.put(url=here, model="gpt")
    answer = await stage.served.call(CALL)
    assert answer.status == 400
    assert "in a circle" in answer.json["error"]["message"]
    assert stage.served.broker.statistics().accepted == 1


async def test_one_that_leads_on_and_on_is_noticed_too(stage: Stage) -> None:
    """Through other brokers: what they call themselves goes on with the call, and there is an end to it."""
    before = [f"1.1 wakecall-{number:016x}" for number in range(8)]
    await stage.put()
    exchange, answers = await stage.call(CALL, "/v1/embeddings", "via: 1.0 nginx, " + ", ".join(before[:7]))
    assert exchange.headers["via"] == ", ".join([*before[:7], f"1.1 {PSEUDONYM}"])
    await exchange.respond(200, b"{}")
    assert (await stage.answer_of(answers)).status == 200
    refused = await stage.served.call(CALL, "/v1/embeddings", *(f"via: {each}" for each in before))
    assert (refused.status, refused.json["error"]["param"]) == (400, "Via")


async def test_what_it_says_of_its_tokens_is_counted_as_any_rows(stage: Stage) -> None:
    await stage.put()
    exchange, answers = await stage.call(CALL)
    await exchange.respond_json(200, {"usage": {"prompt_tokens": 12, "completion_tokens": 3}})
    assert (await stage.answer_of(answers)).status == 200
    found = (await stage.served.ask("GET", "/admin/v1/usage?by=llm")).json["data"]
    assert [(row["llm"], row["requests"], row["unknown"], row["tokens_in"], row["tokens_out"]) for row in found] == [
        ("gpt", 1, 0, 12, 3)
    ]


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/openai/v1", "/openai"])
async def test_its_address_is_a_base_with_or_without_v1(stage: Stage, suffix: str) -> None:
    await stage.put(url=stage.engine.base_url + suffix)
    exchange, answers = await stage.call(CALL)
    assert exchange.path == ("/openai" if "openai" in suffix else "") + "/v1/chat/completions"
    assert "authorization" not in exchange.headers
    await exchange.respond_json(200, {})
    assert (await stage.answer_of(answers)).status == 200


async def test_a_form_and_a_large_body_arrive_as_they_are_but_for_the_model(stage: Stage) -> None:
    await stage.put(model="another/model")
    part = b"--B\r\ncontent-disposition: form-data; name="
    form = part + b'"model"\r\n\r\ngpt\r\n' + part + b'"file"; filename="f"\r\n\r\n\xff\x00\r\n--B--\r\n'
    for body, kind in ((form, "content-type: multipart/form-data; boundary=B"), (as_large(), JSON)):
        exchange, answers = await stage.call(body, "/v1/audio/transcriptions", kind)
        assert bytes(exchange.body) == body.replace(b'"model":"gpt"', b'"model":"another/model"').replace(
            b"\r\ngpt\r\n", b"\r\nanother/model\r\n"
        )
        await exchange.respond_json(200, {})
        assert (await stage.answer_of(answers)).status == 200


def as_large() -> bytes:
    """Two megabytes, of which the model is in the middle: looked into by a thread, and sent in pieces."""
    return b'{"a":"' + b"x" * 1_000_000 + b'","model":"gpt","b":"' + b"y" * 1_000_000 + b'"}'


@pytest.mark.parametrize(
    ("path", "given", "version", "key"),
    [
        ("/v1/messages", (), "2023-06-01", "x-api-key"),
        ("/v1/messages", ("anthropic-version: 2024-10-22",), "2024-10-22", "x-api-key"),
        ("/v1/messages", ("anthropic-version: newest",), "2023-06-01", "x-api-key"),
        ("/v1/chat/completions", (), "2023-06-01", "authorization"),
    ],
)
async def test_anthropics_api_is_told_its_key_and_version_as_it_wants_them(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, path: str, given: tuple[str, ...], version: str, key: str
) -> None:
    monkeypatch.setenv(VARIABLE, "sk-ant")
    await stage.put(type="Anthropic", key_env=VARIABLE)
    exchange, answers = await stage.call(CALL, path, JSON, *given)
    found = {name: value for name, value in exchange.headers.items() if name in ("authorization", "x-api-key")}
    assert found == {key: "sk-ant" if key == "x-api-key" else "Bearer sk-ant"}
    assert exchange.headers["anthropic-version"] == version
    await exchange.respond_json(200, {})
    assert (await stage.answer_of(answers)).status == 200


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "is not set"), ("", "is not set"), ("sk\nx-evil: 1", "holds no key"), ("schlüssel", "holds no key")],
)
async def test_without_its_key_nothing_is_sent_and_the_operator_hears_which_variable(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: str | None, said: str
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    await stage.put(key_env=VARIABLE)
    answer = await stage.served.call(CALL)
    assert (answer.status, answer.code, answer.headers["x-should-retry"]) == (502, "publisher_error", "false")
    assert VARIABLE.encode() not in answer.body
    assert f"{VARIABLE} for its upstream's key {said}" in caplog.text
    assert not value or value not in caplog.text
    assert stage.engine.peer.connections == 0


async def test_no_other_variable_is_ever_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands in the file: who can write there must not have the broker send him its secrets."""
    monkeypatch.setenv("SECRET", "x")
    async with open_scripted_engine() as engine, open_httpx_upstream() as asks:
        engine.on_infer = lambda exchange: exchange.respond_json(200, {})
        row = LLM("gpt", "local", Status.ACTIVE, 0, 0, kind=Kind.PUBLIC, url=engine.base_url, key_env="SECRET")
        with pytest.raises(PublisherError):
            async with asks.open_answer(row, InferRequest("/v1/completions", b"{}")):
                pass
        assert engine.peer.connections == 0


# What comes back --------------------------------------------------------------------------------------------------------


async def test_a_stream_comes_as_it_is_made(stage: Stage) -> None:
    await stage.put()
    async with stage.served.calling(STREAM) as client:
        exchange = await stage.engine.next()
        await exchange.start(200, {"content-type": "text/event-stream; charset=utf-8"})
        for _ in range(3):
            await exchange.send(EVENT)
            if not client.status:
                await client.read_head()
            assert await client.until(b"\n\n") == EVENT
        await exchange.send(b"data: [DONE]\n\n")
        await exchange.finish()
        assert await client.rest() == (b"data: [DONE]\n\n", False)
        assert (client.status, client.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")


@pytest.mark.parametrize("status", [201, 204, 400, 401, 404, 500])
async def test_its_status_and_its_error_pass_untouched(stage: Stage, status: int) -> None:
    await stage.put()
    exchange, answers = await stage.call(CALL)
    body = b"" if status == 204 else b'{"error": {"message": "of the upstream", "odd": 1.0}}'
    await exchange.start(
        status, {"content-type": "application/json", "set-cookie": "a=b", "x-odd": "1", "retry-after": "9"}
    )
    if body:
        await exchange.send(body)
    await exchange.finish()
    answer = await stage.answer_of(answers)
    assert (answer.status, answer.body) == (status, body)
    assert {"set-cookie", "x-odd", "retry-after"}.isdisjoint(answer.headers)
    assert stage.engine.peer.connections == 1


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(("given", "told"), [(None, "1"), ("17", "17"), ("soon", "1"), ("99999999", "86400")])
async def test_retry_after_reaches_the_client_and_nothing_is_retried_here(
    stage: Stage, status: int, given: str | None, told: str
) -> None:
    await stage.put()
    exchange, answers = await stage.call(CALL)
    headers = {"content-type": "application/json", "content-length": "2"}
    await exchange.start(status, headers | ({} if given is None else {"retry-after": given}))
    await exchange.send(b"{}")
    answer = await stage.answer_of(answers)
    assert (answer.status, answer.body, answer.headers["retry-after"]) == (status, b"{}", told)
    assert "x-should-retry" not in answer.headers
    assert stage.engine.peer.connections == 1


def test_a_retry_after_may_be_a_date() -> None:
    now = datetime.now(UTC)
    assert 58 <= (retry_after_of(format_datetime(now + timedelta(seconds=60), usegmt=True)) or 0) <= 60
    assert retry_after_of(format_datetime(now - timedelta(days=1), usegmt=True)) == 0
    assert retry_after_of("Fri, 99 Foo 2026 00:00:00 GMT") is None
    assert retry_after_of("-1") is None


async def test_an_upstream_is_not_read_faster_than_its_client_reads(
    stage: Stage, recwarn: pytest.WarningsRecorder
) -> None:
    """And when that one leaves, nothing of the answer is left for the collector to find."""
    await stage.put()
    async with stage.served.server.connect(receive_buffer=32 * 1024) as wire:
        body = as_bytes(STREAM)
        await wire.send(
            b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )
        exchange = await stage.engine.next()
        await exchange.start(200, {"content-type": "text/event-stream"})
        sent = 0

        async def send() -> None:
            nonlocal sent
            await exchange.send(b"data: " + b"x" * 65_000 + b"\n\n")
            sent += 1

        await send_until_stuck(send)
        # The kernel's own buffers for the most part; the broker holds a quarter of a MiB.
        assert sent * 65_000 < 24 << 20
        quick, answers = await stage.call(CALL)
        await quick.respond_json(200, {})
        assert (await stage.answer_of(answers)).status == 200
    await exchange.broken.wait()
    gc.collect()
    assert [str(each.message) for each in recwarn] == []


# What it may do wrong ---------------------------------------------------------------------------------------------------


async def check_failed(answer: Answer, message: str, status: int = 502) -> None:
    assert (answer.status, answer.code, answer.json["error"]["message"]) == (status, "publisher_error", message)
    assert answer.headers["x-should-retry"] == "false"


async def test_one_that_is_not_there(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    """The client hears no address; the log names the host."""
    for url in (f"http://127.0.0.1:{closed_port()}", "http://nowhere.invalid"):
        await stage.put(url=url)
        await check_failed(await stage.served.call(CALL), UNREACHABLE)
    assert "127.0.0.1 cannot be reached (connection refused or host not found)" in caplog.text
    assert "nowhere.invalid" in caplog.text


async def test_one_that_accepts_and_never_shakes_hands(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream_module, "_CONNECT_S", 0.2)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        await stage.put(url=f"https://127.0.0.1:{listener.socket.getsockname()[1]}")
        await check_failed(await stage.served.call(CALL), UNREACHABLE)


async def test_one_that_says_nothing_is_ended_by_the_infers_deadline() -> None:
    async with open_stage(BrokerConfig(first_byte_s=0.3)) as stage:
        await stage.put()
        exchange, answers = await stage.call(STREAM)
        await exchange.broken.wait()
        answer = await stage.answer_of(answers)
        assert (answer.status, answer.code, answer.json["error"]["phase"]) == (504, "deadline_exceeded", "first_byte")


async def test_one_that_pauses_in_its_answer_is_too() -> None:
    async with open_stage(BrokerConfig(idle_s=0.3)) as stage:
        await stage.put()
        async with stage.served.calling(STREAM) as client:
            exchange = await stage.engine.next()
            await exchange.start(200, {"content-type": "text/event-stream"})
            await exchange.send(EVENT)
            await exchange.broken.wait()
            text, is_cut = await (await client.read_head()).rest()
            assert is_cut
            assert b'"phase":"idle"' in text


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_one_that_leaves_without_an_answer(stage: Stage, how: str) -> None:
    await stage.put()
    exchange, answers = await stage.call(CALL)
    await end(exchange, how)
    await check_failed(await stage.answer_of(answers), "The upstream gave no answer.")
    assert stage.engine.peer.connections == 1


async def end(exchange: Exchange, how: str) -> None:
    if how == "rst":
        exchange.reset()
    else:
        await exchange.stream.aclose()


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("framing", [{"content-length": "100"}, {"transfer-encoding": "chunked"}])
async def test_one_that_breaks_off_in_a_plain_answer(stage: Stage, how: str, framing: dict[str, str]) -> None:
    await stage.put()
    exchange, answers = await stage.call(CALL)
    await exchange.start(200, {"content-type": "application/json", **framing})
    await exchange.send(b'{"half')
    await end(exchange, how)
    await check_failed(await stage.answer_of(answers), "The upstream broke off in the middle of its answer.")


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_one_that_breaks_off_in_a_stream(stage: Stage, how: str) -> None:
    await stage.put()
    async with stage.served.calling(STREAM) as client:
        exchange = await stage.engine.next()
        await exchange.start(200, {"content-type": "text/event-stream"})
        await exchange.send(EVENT)
        await client.read_head()
        assert await client.until(b"\n\n") == EVENT
        await end(exchange, how)
        text, is_cut = await client.rest()
        assert is_cut
        assert text.startswith(b"event: error\ndata: ")
        error = json.loads(text.partition(b"data: ")[2])["error"]
        assert (error["code"], error["message"]) == (
            "publisher_error",
            "The upstream broke off in the middle of its answer.",
        )


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\n" + b"x: %b\r\n" % (b"y" * 8000) * 100 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 500_000,
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
        b"HTTP/1.1 999 What\r\ncontent-length: 0\r\n\r\n",
    ],
    ids=["many headers", "a long header", "two lengths", "no http", "101", "999"],
)
async def test_one_whose_head_is_none(stage: Stage, head: bytes) -> None:
    await stage.put()
    exchange, answers = await stage.call(CALL)
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await exchange.stream.send_all(head)  # it may have heard enough before all is said
    answer = await stage.answer_of(answers)
    assert (answer.status, answer.code) == (502, "publisher_error")
    await exchange.broken.wait()


async def test_one_that_says_to_go_on_a_thousand_times(stage: Stage) -> None:
    await stage.put()
    exchange, answers = await stage.call(CALL)
    for _ in range(1000):
        await exchange.stream.send_all(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n")
    await exchange.respond_json(200, {})
    assert (await stage.answer_of(answers)).status == 200


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip"])
async def test_one_that_compresses_though_told_not_to(stage: Stage, encoding: str) -> None:
    """An error, and none of the bytes: nobody downstream is told what they are."""
    await stage.put()
    exchange, answers = await stage.call(CALL)
    assert exchange.headers["accept-encoding"] == "identity"
    await exchange.start(200, {"content-type": "application/json", "content-encoding": encoding})
    await exchange.send(gzip.compress(b"{}"))
    await check_failed(await stage.answer_of(answers), "The upstream encodes its answer though it was asked not to.")
    await exchange.broken.wait()


async def test_one_that_answers_before_it_has_the_body(stage: Stage) -> None:
    """Its answer counts, though it never read what it answered."""

    async def refuse(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some(1000)
            await stream.send_all(b"HTTP/1.1 413 Too Large\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}")
            await stream.send_eof()
            async for _ in stream:
                pass

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, refuse, 0, host="127.0.0.1"))
        await stage.put(url=f"http://127.0.0.1:{listener.socket.getsockname()[1]}")
        answer = await stage.served.call(as_large())
        assert (answer.status, answer.body) == (413, b"{}")
        nursery.cancel_scope.cancel()


async def test_one_that_sends_elsewhere_is_not_followed(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    async with open_scripted_engine() as other:
        await stage.put()
        for status in (301, 302, 307, 308):
            exchange, answers = await stage.call(CALL)
            target = f"{other.base_url}/v1/chat/completions"
            await exchange.start(status, {"location": target, "content-type": "text/html", "content-length": "0"})
            answer = await stage.answer_of(answers)
            assert (answer.status, answer.headers.get("location")) == (status, None)
        assert other.peer.connections == 0
    assert "no redirect is followed" in caplog.text


async def test_its_cookies_are_not_kept(stage: Stage) -> None:
    await stage.put()
    for _ in range(2):
        exchange, answers = await stage.call(CALL)
        assert "cookie" not in exchange.headers
        await exchange.start(
            200, {"content-type": "application/json", "set-cookie": "who=first", "content-length": "2"}
        )
        await exchange.send(b"{}")
        assert (await stage.answer_of(answers)).status == 200


async def test_no_proxy_is_taken_from_the_environment(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_scripted_engine() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.base_url)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        await stage.put()
        exchange, answers = await stage.call(CALL)
        await exchange.respond_json(200, {})
        assert (await stage.answer_of(answers)).status == 200
        assert proxy.peer.connections == 0


async def test_its_connection_ends_when_the_client_leaves(stage: Stage) -> None:
    await stage.put()
    async with stage.served.calling(STREAM) as client:
        exchange = await stage.engine.next()
        await exchange.start(200, {"content-type": "text/event-stream"})
        await exchange.send(EVENT)
        await client.read_head()
    await exchange.broken.wait()
    async with stage.served.calling(CALL):
        exchange = await stage.engine.next()
    await exchange.broken.wait()
    assert stage.served.broker.statistics().cancelled == 2


async def test_its_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who gets none is told so in time, and nothing of his was sent."""
    monkeypatch.setattr(upstream_module, "_MAX_CONNECTIONS", 1)
    monkeypatch.setattr(upstream_module, "_CONNECT_S", 0.2)
    async with open_stage() as stage:
        await stage.put()
        exchange, answers = await stage.call(CALL)
        await check_failed(await stage.served.call(CALL), "Too many calls of upstreams are under way.", 503)
        assert stage.engine.peer.connections == 1
        await exchange.respond_json(200, {})
        assert (await stage.answer_of(answers)).status == 200
        exchange, answers = await stage.call(CALL)
        await exchange.respond_json(200, {})
        assert (await stage.answer_of(answers)).status == 200


async def test_each_call_has_a_connection_of_its_own(stage: Stage) -> None:
    """One that was kept may be closed just as it is used, and that call could be neither repeated nor blamed on anybody."""
    await stage.put()
    for count in (1, 2):
        exchange, answers = await stage.call(CALL)
        await exchange.respond_json(200, {})
        assert (await stage.answer_of(answers)).status == 200
        await exchange.broken.wait()
        assert stage.engine.peer.connections == count


# TLS --------------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def tls_upstream(authority: Authority, *names: str) -> AsyncIterator[int]:
    """The port of one that answers `{}` to whatever it hears."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*authority.issue(*names))

    async def answer(stream: trio.SSLStream[trio.SocketStream]) -> None:
        try:
            async with stream:
                heard = b""
                while not heard.endswith(b'"messages":[]}'):
                    if not (data := await stream.receive_some(65536)):
                        return
                    heard += data
                await stream.send_all(
                    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
                )
        except trio.BrokenResourceError:
            pass  # he does not trust us

    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_ssl_over_tcp, answer, 0, context, host="127.0.0.1", https_compatible=True)
        (listener,) = await nursery.start(serve)
        yield listener.transport_listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("trusted", "names", "why"),
    [
        (True, (), None),
        (False, (), "its certificate is not trusted here"),
        (True, ("elsewhere.example",), "its certificate is for another"),
    ],
)
async def test_its_certificate_is_verified(
    stage: Stage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trusted: bool,
    names: tuple[str, ...],
    why: str | None,
) -> None:
    authority = Authority(tmp_path)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", authority.file)
    async with tls_upstream(authority, *names) as port:
        await stage.put(url=f"https://127.0.0.1:{port}/v1")
        answer = await stage.served.call(CALL)
        if why is None:
            assert (answer.status, answer.body) == (200, b"{}")
        else:
            await check_failed(answer, UNREACHABLE)
            assert why in caplog.text


@pytest.mark.parametrize("tls", [False, True], ids=["tcp", "tls"])
async def test_one_that_never_reads_is_left_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tls: bool
) -> None:
    """In the middle of a body that it does not take: closing must not wait for it either, nor must the broker's end."""
    authority = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", authority.file)
    left = trio.Event()

    async def stand_still(stream: trio.abc.Stream) -> None:
        async with stream:
            if isinstance(stream, trio.SSLStream):
                await stream.do_handshake()
            await hanging.wait()
            with contextlib.suppress(trio.BrokenResourceError):
                while await stream.receive_some(65536):
                    pass
            left.set()

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*authority.issue())
    hanging = trio.Event()
    async with open_stage(BrokerConfig(first_byte_s=0.4)) as stage, trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        encrypted = trio.SSLListener(listener, context, https_compatible=True)
        nursery.start_soon(trio.serve_listeners, stand_still, [encrypted if tls else listener])
        await stage.put(url=f"http{'s' * tls}://127.0.0.1:{port}", max_concurrency=1)
        body = as_large()[:-1] + b',"stream":true,"c":"' + b"z" * 12_000_000 + b'"}'
        answer = await stage.served.call(body)
        assert (answer.status, answer.code) == (504, "deadline_exceeded")
        await wait_until(lambda: stage.served.broker.llm_view("gpt").stopping == 0)
        hanging.set()
        await left.wait()
        nursery.cancel_scope.cancel()


async def test_a_list_of_cas_that_cannot_be_read_is_said_and_read_again(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    await stage.put()
    await check_failed(await stage.served.call(CALL), UNREACHABLE)
    assert "SSL_CERT_FILE" in caplog.text
    monkeypatch.delenv("SSL_CERT_FILE")
    exchange, answers = await stage.call(CALL)
    await exchange.respond_json(200, {})
    assert (await stage.answer_of(answers)).status == 200


# Its key ----------------------------------------------------------------------------------------------------------------


async def test_its_key_is_written_down_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Good calls, bad ones, an upstream that is gone, a key that is none: no log, no answer, no metric, no file has it."""
    caplog.set_level(logging.DEBUG)
    key = new_sentinel("key")
    prompt = new_sentinel("prompt")
    monkeypatch.setenv(VARIABLE, key)
    call = {**CALL, "messages": [prompt]}
    said: list[bytes] = []

    def note(answer: Answer) -> None:
        said.append(repr(answer.headers).encode() + answer.body)

    async with open_sqlite_store(tmp_path / "w.db") as store, open_stage(store=store) as stage:
        note(await stage.put(key_env=VARIABLE))
        exchange, answers = await stage.call(call)
        assert exchange.headers["authorization"] == f"Bearer {key}"
        await exchange.respond_json(200, {})
        note(await stage.answer_of(answers))
        for how in ("fin", "rst"):
            exchange, answers = await stage.call(call)
            await end(exchange, how)
            note(await stage.answer_of(answers))
        exchange, answers = await stage.call(call)
        await exchange.start(200, {"content-encoding": "gzip"})
        note(await stage.answer_of(answers))
        await stage.put(key_env=VARIABLE, url=f"http://127.0.0.1:{closed_port()}")
        note(await stage.served.call(call))
        monkeypatch.setenv(VARIABLE, f"{key}\n{key}")
        note(await stage.served.call(call))
        for target in ("/admin/v1/llms", "/admin/v1/llms/gpt", "/admin/v1/tasks", "/v1/models", "/metrics"):
            note(await stage.served.ask("GET", target))
    assert VARIABLE.encode() in b"".join(said)
    places = {
        "the log": "\n".join(f"{record.name} {record.getMessage()}" for record in caplog.records).encode(),
        "an answer": b"\n".join(said),
        **{file.name: file.read_bytes() for file in tmp_path.iterdir()},
    }
    assert b"httpcore2" in places["the log"], "what httpx2 itself says is searched too"
    for where, written in places.items():
        for secret in (key, prompt):
            assert leaks_of(written, secret) == [], where
    assert VARIABLE.encode() in places["w.db"] or any(VARIABLE.encode() in data for data in places.values())
