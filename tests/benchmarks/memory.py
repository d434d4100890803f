"""What is held: for an answer of 200 MiB on its way, and for channels that say nothing."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import ExitStack, closing

from .plainly import Channel, call, register
from .report import Bar, Figure
from .servers import Server, server, server_core
from .sizes import EVENT, chat, post

__all__ = ["GROUP", "measure"]

GROUP = "memory"

_STREAM_MIB = 200
_CHANNELS = 2000
#: Those that are open before the first look: what is made once is made by then.
_FIRST_CHANNELS = 20


def measure(seconds: float) -> list[Figure]:
    """One round. It takes what it takes, however many `seconds` others have."""
    core = server_core()
    with server("wakecall", core) as ours:
        grown = stream_growth_kib(ours, _STREAM_MIB) / 1024
    with server("wakecall-wide", core) as ours:
        each = channel_kib(ours, _CHANNELS)
    return [
        Figure(
            f"a stream of {_STREAM_MIB} MiB, what a second one adds to the peak", "MiB", grown, None, grown, Bar("≤", 4)
        ),
        Figure(f"{_CHANNELS:,} idle channels, each", "KiB", each, None, each, Bar("≤", 40)),
    ]


def stream_growth_kib(ours: Server, mib: int) -> int:
    """By how much the peak is higher after a second stream than after the first."""
    register(ours, "bench")
    with closing(Channel(ours, "bench")) as channel:
        _stream(ours, channel, mib)
        first = ours.memory_kib("VmHWM")
        _stream(ours, channel, mib)
        return ours.memory_kib("VmHWM") - first


def _stream(ours: Server, channel: Channel, mib: int) -> None:
    piece = EVENT * (65536 // len(EVENT))
    pieces = mib * 2**20 // len(piece)

    def publish() -> None:
        task = channel.read_event("infer")["task_id"]
        with socket.create_connection(("127.0.0.1", ours.port), timeout=60) as sock:
            sock.sendall(
                f"POST /publisher/v1/tasks/{task}/result HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                f"Authorization: Bearer {ours.publisher}\r\nContent-Type: text/event-stream\r\n"
                f"Content-Length: {pieces * len(piece)}\r\n\r\n".encode()
            )
            for _ in range(pieces):
                sock.sendall(piece)
            sock.recv(65536)

    publisher = threading.Thread(target=publish, daemon=True)
    publisher.start()
    read = 0
    with socket.create_connection(("127.0.0.1", ours.port), timeout=60) as sock:
        sock.sendall(post("/v1/chat/completions", chat(stream=True), ours.client))
        tail = b""
        while not tail.endswith(b"\r\n0\r\n\r\n"):
            data = sock.recv(1 << 20)
            if not data:
                raise RuntimeError("the stream was cut")
            read += len(data)
            tail = (tail + data)[-16:]
    publisher.join(60)
    if read < pieces * len(piece):
        raise RuntimeError(f"only {read} bytes of the stream came")


def channel_kib(ours: Server, channels: int) -> float:
    """What a session with one row and an open channel that says nothing holds."""
    with ExitStack() as stack:

        def open_more(names: list[str]) -> None:
            for name in names:
                register(ours, name)
                stack.enter_context(closing(Channel(ours, name)))

        open_more([f"first-{number}" for number in range(_FIRST_CHANNELS)])
        without = ours.memory_kib()
        open_more([f"idle-{number}" for number in range(channels)])
        status, body = call(ours, "GET", "/admin/v1/sessions?limit=1", key=ours.admin)
        if status != 200 or not json.loads(body):
            raise RuntimeError(f"the broker does not show its sessions: {status}")
        return (ours.memory_kib() - without) / channels
