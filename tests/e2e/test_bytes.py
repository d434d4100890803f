"""What a client sends is what the engine gets, and the other way round, byte for byte."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from tests.e2e.scripted_engine import Exchange, ScriptedEngine, open_scripted_engine
from tests.e2e.stack import BrokerProcess, open_broker_process, open_publisher_process, within
from tests.http.wire import Answer, request_bytes

MIB = 1 << 20
#: Well-formed, and changed by every parser that writes it anew.
ODD = (
    '{ "zeta" : 1.0 ,"model":"m",\t"n": 1e2, "tiny": 0.1000000000000000055511151231257827,'
    ' "big": 9007199254740993,"text": "\\u00e9 \\/ é \U0001f600",\n\n "unknown_field": {"b": [ ], "a": { }},'
    ' "messages": [], "minus": -0.0 }\r\n'
).encode()


@pytest.fixture
async def engine() -> AsyncIterator[ScriptedEngine]:
    async with open_scripted_engine() as engine:
        yield engine


@pytest.fixture
async def broker(tmp_path: Path, engine: ScriptedEngine) -> AsyncIterator[BrokerProcess]:
    """A broker with `m`, whose engine knows it by that name, and `renamed`, which its engine knows as another."""
    async with open_broker_process(tmp_path / "w.db") as broker:
        async with (
            open_publisher_process(tmp_path / "one", broker.url, engine.base_url, "--name", "m"),
            open_publisher_process(
                tmp_path / "two", broker.url, engine.base_url, "--name", "renamed", "--model", "/models/other.gguf"
            ),
        ):
            await broker.wait_llm("m", routable=True)
            await broker.wait_llm("renamed", routable=True)
            yield broker


async def post(
    broker: BrokerProcess,
    engine: ScriptedEngine,
    body: bytes,
    *,
    path: str = "/v1/chat/completions",
    content_type: str = "application/json",
    reply: bytes = b"{}",
    reply_type: str = "application/json",
) -> tuple[Exchange, Answer]:
    """Send it, let the engine answer `reply`; what the engine was asked, and what the client got."""
    async with broker.connect() as wire:
        head = request_bytes(
            "POST", path, f"content-type: {content_type}", f"content-length: {len(body)}", host=f"127.0.0.1:{broker.port}"
        )  # fmt: skip
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wire.send, head + body)
            exchange = await engine.next()
            nursery.start_soon(exchange.respond, 200, reply, reply_type)
            answer = await wire.read_answer("POST")
    return exchange, answer


@within(40)
async def test_odd_json_arrives_unchanged(broker: BrokerProcess, engine: ScriptedEngine) -> None:
    """Unknown members, floats that no double writes the same, key order, white space, escapes: untouched."""
    exchange, answer = await post(broker, engine, ODD, reply=ODD)
    assert bytes(exchange.body) == ODD
    assert exchange.path == "/v1/chat/completions"
    assert exchange.headers["content-type"] == "application/json"
    assert exchange.headers["accept-encoding"] == "identity"
    assert answer.body == ODD


@within(40)
async def test_only_the_models_value_is_replaced(broker: BrokerProcess, engine: ScriptedEngine) -> None:
    """Where the engine's id differs: that string, in its place, and no other byte; in a form's field too."""
    body = ODD.replace(b'"model":"m"', b'"model":"renamed"')
    exchange, _ = await post(broker, engine, body)
    assert bytes(exchange.body) == ODD.replace(b'"model":"m"', b'"model":"/models/other.gguf"')

    form = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\x00\xff\r\nmodel\r\n'
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nrenamed\r\n--b--\r\n'
    )
    exchange, _ = await post(
        broker, engine, form, path="/v1/audio/transcriptions", content_type="multipart/form-data; boundary=b"
    )
    assert bytes(exchange.body) == form.replace(b"\r\nrenamed\r\n", b"\r\n/models/other.gguf\r\n")
    assert exchange.headers["content-type"] == "multipart/form-data; boundary=b"


@within(60)
@pytest.mark.parametrize("name", ["m", "renamed"])
async def test_a_body_of_32_mib_goes_through_byte_for_byte(
    broker: BrokerProcess, engine: ScriptedEngine, name: str
) -> None:
    """There and back, renamed or not."""
    head, tail = b'{"model": "%s", "text": "' % name.encode(), b'"}'
    noise = bytes(65 + index * index % 26 for index in range(65536)) * 512
    body = head + noise[: 32 * MIB - len(head) - len(tail)] + tail
    assert len(body) == 32 * MIB
    exchange, answer = await post(broker, engine, body, reply=body)
    expected = body if name == "m" else body.replace(b'"renamed"', b'"/models/other.gguf"', 1)
    assert hashlib.sha256(exchange.body).digest() == hashlib.sha256(expected).digest()
    assert hashlib.sha256(answer.body).digest() == hashlib.sha256(body).digest()
    assert not answer.is_cut


@within(40)
async def test_a_body_of_33_mib_is_413(broker: BrokerProcess) -> None:
    """Declared or chunked, and the broker goes on."""
    target, json = "/v1/chat/completions", "content-type: application/json"
    host = f"127.0.0.1:{broker.port}"
    body = b'{"model": "m", "text": "' + b"x" * (33 * MIB)
    for framing in (f"content-length: {len(body)}", "transfer-encoding: chunked"):
        async with broker.connect() as wire, trio.open_nursery() as nursery:
            await wire.send(request_bytes("POST", target, json, framing, host=host))
            nursery.start_soon(pour, wire.stream, body, "chunked" in framing)
            refusal = await wire.read_answer("POST")
            assert (refusal.status, refusal.code) == (413, "request_too_large")
            nursery.cancel_scope.cancel()
    assert await broker.list("tasks") == []


async def pour(stream: trio.SocketStream, body: bytes, chunked: bool) -> None:
    """Send on, whatever the other side says, until it closes."""
    try:
        for start in range(0, len(body), MIB):
            piece = body[start : start + MIB]
            await stream.send_all(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
