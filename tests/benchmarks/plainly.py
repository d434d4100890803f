"""What takes part beside the load and costs nothing worth measuring: a call of the API, and a publisher's channel."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any

from .servers import Server

__all__ = ["Channel", "call", "register"]


def call(
    server: Server, method: str, path: str, body: bytes | None = None, key: str | None = None
) -> tuple[int, bytes]:
    """One call on a connection of its own: its status and its answer.

    Args:
        server: whom.
        method, path, body: what.
        key: None: the publisher's.
    """
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    headers = {"Authorization": f"Bearer {key or server.publisher}", "Content-Type": "application/json"}
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def register(server: Server, session: str, **row: Any) -> None:
    """A session with one row of its name."""
    body = json.dumps({"llms": [{"name": session, **row}]}).encode()
    status, answer = call(server, "PUT", f"/publisher/v1/sessions/{session}", body)
    if status != 200:
        raise RuntimeError(f"register was answered {status}: {answer[:200]!r}")


class Channel:
    """A session's channel, on a socket of its own; open once `hello` has been read."""

    def __init__(self, server: Server, session: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        self._tail = b""
        self._socket.sendall(
            f"GET /publisher/v1/sessions/{session}/frames HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Authorization: Bearer {server.publisher}\r\n\r\n".encode()
        )
        self.read_events("hello", 1)

    def read_events(self, event: str, count: int) -> None:
        """Read on until so many of one event have come, and forget what they say."""
        for _ in range(count):
            self.read_event(event)

    def read_event(self, event: str) -> dict[str, Any]:
        """The data of the next event of this name."""
        begin = f"event: {event}\ndata: ".encode()
        while (at := self._tail.find(begin)) < 0 or (end := self._tail.find(b"\n\n", at)) < 0:
            data = self._socket.recv(1 << 20)
            if not data:
                raise RuntimeError("the channel ended")
            self._tail += data
        found, self._tail = self._tail[at + len(begin) : end], self._tail[end:]
        answer = json.loads(found)
        assert isinstance(answer, dict)
        return answer

    def close(self) -> None:
        """The publisher dies: its end goes out now."""
        self._socket.close()
