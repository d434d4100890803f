"""What goes over the wire, on every server alike: requests, answers, events."""

from __future__ import annotations

import json

__all__ = ["ANSWER", "EVENT", "EVENTS", "HEARTBEAT_ANSWER", "chat", "paced_event", "post"]

ANSWER = b'{"choices":[{"message":{"role":"assistant","content":"' + b"x" * 340 + b'"}}]}'
EVENT = b'data: {"choices":[{"delta":{"content":"' + b"y" * 134 + b'"}}]}\n\n'
EVENTS = 200
HEARTBEAT_ANSWER = b'{"llms":{"beat-10":"active"},"drop":[]}'
assert len(EVENT) == 180

_STAMPED = b'data: {"choices":[{"delta":{"content":"T%018dT%018dT' + b"y" * 95 + b'"}}]}\n\n'


def paced_event(due_ns: int, at_ns: int) -> bytes:
    """An event whose text tells when it was due and when it was written, on CLOCK_MONOTONIC. As long as `EVENT`."""
    return _STAMPED % (due_ns, at_ns)


assert len(paced_event(0, 0)) == len(EVENT)


def post(path: str, body: bytes, key: str | None = None) -> bytes:
    """A POST with its length declared, from the holder of a key."""
    who = b"" if key is None else b"Authorization: Bearer %b\r\n" % key.encode()
    head = b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\n%bContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % (path.encode(), who, len(body)) + body


def chat(*, stream: bool = False, size: int = 400, model: str = "bench") -> bytes:
    """A chat completion's body of so many bytes."""
    body = {"model": model, "messages": [{"role": "user", "content": ""}], **({"stream": True} if stream else {})}
    body["messages"][0]["content"] = "z" * (size - len(json.dumps(body)))  # type: ignore[index]
    return json.dumps(body).encode()
