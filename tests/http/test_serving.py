"""Where a broker listens: without keys on this machine's loopback, and nowhere else unless it is told to."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
import trio

from tests.http.wire import Answer, Wire, request_bytes
from wakecall import Broker, open_broker
from wakecall.http.capacity import Capacity
from wakecall.serving import KeysRequired, ServeConfig, serve


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "", "example.org"])
async def test_without_keys_a_host_that_others_can_reach_is_refused(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is bound."""
    monkeypatch.setattr("wakecall.serving.bind", None)
    async with open_broker() as broker:
        with pytest.raises(KeysRequired, match="there are no API keys"), trio.fail_after(5):
            await serve(broker, ServeConfig(host=host, port=0))


async def test_with_keys_it_listens_anywhere() -> None:
    """And answers to any `Host`, for whoever has a key."""
    async with open_broker() as broker:
        key = (await broker.create_key("admin")).secret
        for presented, status in ((None, 401), (key, 200)):
            answer = await ask_once(broker, ServeConfig(host="0.0.0.0", port=0), presented)
            assert answer.status == status


async def test_an_open_one_listens_anywhere_if_it_is_told_to_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """`open` overrides the refusal, and a warning comes with each start."""
    async with open_broker() as broker:
        for _ in range(2):
            caplog.clear()
            config = ServeConfig(host="0.0.0.0", port=0, open=True)
            assert (await ask_once(broker, config, None)).status == 200
            (record,) = [each for each in caplog.records if each.levelname == "WARNING"]
            assert "whoever reaches 0.0.0.0 may use, replace and delete every model" in record.getMessage()


async def test_open_does_not_open_a_broker_that_has_keys(caplog: pytest.LogCaptureFixture) -> None:
    async with open_broker() as broker:
        await broker.create_key("admin")
        config = ServeConfig(host="0.0.0.0", port=0, open=True)
        assert (await ask_once(broker, config, None)).status == 401
    assert "every call needs one" in caplog.text


async def ask_once(broker: Broker, config: ServeConfig, key: str | None) -> Answer:
    """Serve, ask for the models' list by a foreign name, and stop serving."""
    with trio.fail_after(10):
        async with trio.open_nursery() as serving:
            (url,) = await serving.start(serve, broker, config)
            wire = Wire(await trio.open_tcp_stream("127.0.0.1", int(url.rpartition(":")[2])))
            headers = () if key is None else (f"authorization: Bearer {key}",)
            await wire.send(request_bytes("GET", "/admin/v1/llms", *headers, host="llm.example.org"))
            answer = await wire.read_answer()
            await wire.stream.aclose()
            serving.cancel_scope.cancel()
    return answer


async def test_a_loopback_name_that_leads_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver may answer what it likes for names below `localhost`; nothing stays open."""
    opened: list[socket.socket] = []
    real_socket = socket.socket

    def resolve(*_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("0.0.0.0", 0))]

    def opening(*arguments: Any, **options: Any) -> socket.socket:
        opened.append(real_socket(*arguments, **options))
        return opened[-1]

    async with open_broker() as broker:
        monkeypatch.setattr("wakecall.http.sockets.socket.getaddrinfo", resolve)
        monkeypatch.setattr("wakecall.http.sockets.socket.socket", opening)
        with pytest.raises(KeysRequired, match=r"odd\.localhost \(0\.0\.0\.0\)"), trio.fail_after(5):
            await serve(broker, ServeConfig(host="odd.localhost", port=0))
        monkeypatch.undo()
    assert [each.fileno() for each in opened] == [-1]


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[int]:
    """A broker that listens on the port, for the block."""
    with trio.fail_after(10):
        async with open_broker() as broker, trio.open_nursery() as nursery:
            (url,) = await nursery.start(serve, broker, ServeConfig(port=0, **settings))
            yield int(url.rpartition(":")[2])
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("setting", "sent", "status"),
    [
        ("keep_alive_s", b"", None),
        ("head_s", b"GET / HTTP/1.1\r\n", 408),
        ("body_s", b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{", 408),
    ],
)
async def test_what_a_peer_takes_too_long_for_ends(setting: str, sent: bytes, status: int | None) -> None:
    """Each of the times is the one that was set: the defaults are a minute and more."""
    async with serving(**{setting: 0.2}) as port:
        wire = Wire(await trio.open_tcp_stream("127.0.0.1", port))
        await wire.send(sent)
        if status is None:
            assert await wire.read_to_end() == b""
        else:
            assert (await wire.read_answer("POST")).status == status
        await wire.stream.aclose()


async def ask(wire: Wire) -> Answer:
    await wire.send(request_bytes("GET", "/healthz", host="localhost"))
    return await wire.read_answer()


@pytest.mark.parametrize(("bound", "descriptors", "fit"), [(2, None, 2), (2, 4, 2), (4, 2, 2), (None, 2, 2)])
async def test_there_are_as_many_connections_as_were_set_and_never_more_than_descriptors(
    bound: int | None, descriptors: int | None, fit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes beyond them has the place of the one that has been idle for the longest."""
    monkeypatch.setattr("wakecall.serving.measure_capacity", lambda: Capacity(descriptors, 4))
    async with serving(max_connections=bound) as port, AsyncExitStack() as stack:
        wires = []
        for _ in range(fit + 1):
            wire = Wire(await stack.enter_async_context(await trio.open_tcp_stream("127.0.0.1", port)))
            assert (await ask(wire)).status == 200
            wires.append(wire)
        assert await wires[0].read_to_end() == b""
        for wire in wires[1:]:
            assert (await ask(wire)).status == 200


@pytest.mark.parametrize(
    "wrong",
    [
        {"keep_alive_s": 0},
        {"head_s": -1.0},
        {"body_s": float("inf")},
        {"body_s": float("nan")},
        {"max_connections": 0},
        {"max_connections": 1.5},
        {"max_connections": True},
    ],
)
def test_what_is_no_time_and_no_bound_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ServeConfig(**wrong)
