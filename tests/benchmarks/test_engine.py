"""The constant engine that stands behind the peers: a broken one would make them look fast, or slow."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from http.client import HTTPConnection

import pytest

from .peer_servers import open_engine


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with open_engine() as port:
        yield port


@pytest.fixture
def engine(port: int) -> Iterator[HTTPConnection]:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    yield connection
    connection.close()


def ask(engine: HTTPConnection, path: str = "/v1/chat/completions", prompt: str = "z", **more: object) -> bytes:
    body = {"model": "bench", "messages": [{"role": "user", "content": prompt}], **more}
    engine.request("POST", path, json.dumps(body))
    response = engine.getresponse()
    assert response.status == 200
    return response.read()


def contents(events: list[bytes]) -> list[str]:
    return [json.loads(event.removeprefix(b"data: "))["choices"][0]["delta"]["content"] for event in events]


def test_a_plain_answer_has_364_bytes_and_an_engines_members(engine: HTTPConnection) -> None:
    # Twice: its connection is kept.
    for _ in range(2):
        body = ask(engine)
        assert len(body) == 364
        answer = json.loads(body)
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["total_tokens"] == 180


def test_a_stream_has_200_events_of_180_bytes_then_its_end(engine: HTTPConnection) -> None:
    for _ in range(2):
        *events, last, done, rest = ask(engine, stream=True).split(b"\n\n")
        assert {len(event) + 2 for event in events} == {180}
        # No two alike: LiteLLM takes a text that repeats itself for an engine gone mad.
        assert len(set(contents(events))) == 200
        assert json.loads(last.removeprefix(b"data: "))["choices"][0]["finish_reason"] == "stop"
        assert (done, rest) == (b"data: [DONE]", b"")


def test_a_paced_event_tells_when_it_was_due_and_written(engine: HTTPConnection) -> None:
    before = time.monotonic_ns()
    *events, _, _, _ = ask(engine, prompt="pace=1000 events=20", stream=True).split(b"\n\n")
    after = time.monotonic_ns()
    stamps = [re.match("T([0-9]{18})T([0-9]{18})T", text).groups() for text in contents(events)]  # type: ignore[union-attr]
    due, written = ([int(stamp[side]) for stamp in stamps] for side in (0, 1))
    assert due[0] >= before
    assert due == [due[0] + number * 1_000_000 for number in range(20)]
    assert all(at >= promised for promised, at in zip(due, written, strict=True))
    assert written == sorted(written)
    assert written[-1] < after
    assert len(ask(engine)) == 364


def test_a_request_may_come_in_pieces_and_a_second_behind_it(port: int) -> None:
    body = b'{"stream":true}'
    request = b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(len(request)):
            connection.sendall(request[at : at + 1])
        connection.sendall(2 * request)
        received = b""
        while received.count(b"\r\n0\r\n\r\n") < 3:
            data = connection.recv(65536)
            assert data
            received += data
    assert received.count(b"data: [DONE]") == 3


def test_it_is_a_worker_to_fastchat(engine: HTTPConnection) -> None:
    assert json.loads(ask(engine, "/model_details"))["context_length"] > 0
    assert json.loads(ask(engine, "/count_token"))["count"] > 0
    assert json.loads(ask(engine, "/worker_get_conv_template"))["conv"]["roles"]
    assert json.loads(ask(engine, "/worker_generate"))["error_code"] == 0
    *pieces, rest = ask(engine, "/worker_generate_stream").split(b"\0")
    assert rest == b""
    texts = [json.loads(piece)["text"] for piece in pieces]
    # The whole text so far, each time.
    assert [len(text) for text in texts] == [34 * number for number in range(1, 201)]
