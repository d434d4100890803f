"""A crowd in a process of its own, for descriptors are few: callers who all wait, or peers who say nothing at all.

    python -m tests.hostile.crowd PORT COUNT [MODEL]

With a MODEL each of the COUNT sends one plain chat completion and reads its answer. Without one each only connects. What
happens is told on stdout, one JSON document a line: `connected` (all are, and have sent what they send), then `answers`
when no more of them came for a moment: how many got which status, error code or body, `x-should-retry` and `Retry-After`. It
ends once every connection has ended, or leaves at once with all of them when its stdin ends.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
from collections import Counter
from typing import Any

#: Each answer by itself would be too much to read for whoever else is busy.
_QUIET_S = 0.05


def tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def request_for(model: str, port: int) -> bytes:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Wake up."}]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nconnection: close\r\n"
    return f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def describe(answer: bytes) -> str:
    """What the crowd has to say of one answer; a cut one is called so."""
    head, end, body = answer.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    if not end or len(body) != int(headers.get("content-length", -1)):
        return "cut"
    said = json.loads(body)
    what = said["error"]["code"] if "error" in said else body.decode()
    return " ".join(
        [
            lines[0].split()[1],
            what,
            headers.get("x-should-retry", "-"),
            "retry-after" * ("retry-after" in headers) or "-",
        ]
    )


def main() -> None:
    port, count, model = int(sys.argv[1]), int(sys.argv[2]), (sys.argv[3:] or [""])[0]
    request = request_for(model, port) if model else b""
    readiness = select.epoll()
    peers: dict[int, tuple[socket.socket, bytearray]] = {}
    for _ in range(count):
        # One after the other, so that no queue of the kernel's overflows and drops one for a second.
        peer = socket.create_connection(("127.0.0.1", port))
        peer.sendall(request)
        peer.setblocking(False)
        peers[peer.fileno()] = peer, bytearray()
        readiness.register(peer, select.EPOLLIN)
    tell(connected=count)
    readiness.register(0, select.EPOLLIN)
    answers: Counter[str] = Counter()
    told = 0
    while peers:
        events = readiness.poll(_QUIET_S, maxevents=1000)
        for descriptor, _ in events:
            if descriptor == 0:
                if not os.read(0, 1):
                    return
                continue
            peer, got = peers[descriptor]
            try:
                data = peer.recv(65536)
            except ConnectionError:
                data = b""
            got += data
            if not data:
                readiness.unregister(descriptor)
                peer.close()
                del peers[descriptor]
                answers[describe(bytes(got)) if got else "nothing"] += 1
        if answers.total() > told and (not events or not peers):
            tell(answers=answers)
            told = answers.total()


if __name__ == "__main__":
    main()
