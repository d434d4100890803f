"""A server in a thread, and what it says to bytes that may be anything."""

from __future__ import annotations

import functools
import logging
import queue
import re
import socket
import threading

import msgspec
import trio

from tests.http.wire import open_server
from wakecall.broker import open_broker
from wakecall.config import BrokerConfig
from wakecall.http import create_app

__all__ = ["probe"]

_PATIENCE_S = 20.0
#: As RFC 9112 has them: a status line, and header lines without anything that could be taken for another one.
_HEAD = re.compile(rb"HTTP/1\.1 ([1-5][0-9]{2}) [\t -~]*\r\n((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+: [\t -~]*\r\n)+)\r\n")
_INTERIM = re.compile(rb"(?:HTTP/1\.1 100 [\t -~]*\r\n\r\n)+")


class _Log(logging.Handler):
    """Errors of ours, as they happen."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


class _Server:
    """One for the process; its thread is a daemon, and ends with it."""

    def __init__(self) -> None:
        self.log = _Log()
        logging.getLogger("wakecall").addHandler(self.log)
        ports: queue.SimpleQueue[int] = queue.SimpleQueue()
        threading.Thread(target=trio.run, args=(self._serve, ports), name="fuzzed server", daemon=True).start()
        self.port = ports.get(timeout=_PATIENCE_S)

    async def _serve(self, ports: queue.SimpleQueue[int]) -> None:
        async with open_broker(config=BrokerConfig(keepalive_s=0.01)) as broker:
            async with open_server(create_app(broker), patience_s=float("inf")) as server:
                ports.put(server.port)
                await trio.sleep_forever()


@functools.cache
def _server() -> _Server:
    return _Server()


def probe(data: bytes) -> None:
    """Send it all, then FIN; read to the server's end. Fails unless what came back is HTTP, and nothing broke."""
    server = _server()
    with socket.create_connection(("127.0.0.1", server.port), _PATIENCE_S) as sock:
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it has closed already
        answer = b""
        try:
            while piece := sock.recv(65536):
                answer += piece
        except ConnectionResetError:
            pass
    said, server.log.said = server.log.said, []
    assert said == [], said
    if answer:
        _check(answer, data)


def _check(answer: bytes, data: bytes) -> None:
    """The first answer's head is well-formed, and an error is in our shape."""
    if interim := _INTERIM.match(answer):
        answer = answer[interim.end() :]
        if not answer:
            return
    head = _HEAD.match(answer)
    assert head is not None, answer[:200]
    status, body = int(head[1]), answer[head.end() :]
    lines = [line.split(b": ", 1) for line in head[2].split(b"\r\n")[:-1]]
    headers = {name.lower(): value for name, value in lines}
    assert len(headers) == len(lines), "a header twice"
    assert re.fullmatch(rb"[A-Za-z0-9._:-]{1,128}", headers[b"x-request-id"])
    assert status != 500, answer[:300]
    if status >= 400 and b"HEAD" not in data:
        body = body[: int(headers[b"content-length"])]
        assert len(body) == int(headers[b"content-length"])
        assert headers[b"content-type"] == b"application/json"
        error = msgspec.json.decode(body)["error"]
        assert set(error) >= {"message", "type", "param", "code"}
