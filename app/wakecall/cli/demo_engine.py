"""The engine of `wakecall demo`: an OpenAI-compatible server that needs no model, no GPU and no download.

It is no language model and says so in every answer. Everything around the words is what a real engine does: plain and
streamed answers, usage, a pace, an error in its API's own shape, and it stops when its client leaves.

`python -m wakecall.cli.demo_engine --port 8081` runs it by hand; with `--background` it is a wake command.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
import h11
import trio

from .demo_replies import Reply, error, plain, reply_to

MAX_BODY = 32 * 1024 * 1024
KEEP_ALIVE_S = 60.0
RECEIVE_SIZE = 64 * 1024


@dataclass
class Statistics:
    """What `GET /health` tells beside `status`: answers under way, sent to the end, and given up by their client."""

    generating: int = 0
    completed: int = 0
    abandoned: int = 0


@dataclass
class DemoEngine:
    """What its connections share.

    Attributes:
        delay_s: seconds per word.
    """

    delay_s: float = 0.05
    statistics: Statistics = field(default_factory=Statistics)

    async def serve_connection(self, transport: trio.SocketStream) -> None:
        """Serve one client until it, or the connection, is done. Nothing that it does reaches the other clients."""
        async with transport:
            try:
                connection = Connection(transport, self)
                while await connection.serve_request():
                    pass
            except* (trio.BrokenResourceError, h11.ProtocolError):
                # The peer left in the middle of something, or does not speak HTTP: nobody is there to be told.
                pass


class Connection:
    """One client's connection: h11 (RFC 9112) over a Trio stream."""

    def __init__(self, transport: trio.SocketStream, engine: DemoEngine) -> None:
        self.transport = transport
        self.engine = engine
        self.http = h11.Connection(h11.SERVER)

    async def serve_request(self) -> bool:
        """Read one request and answer it. Returns whether another may follow."""
        with trio.move_on_after(KEEP_ALIVE_S) as waiting:
            request = await self.next_event()
        if waiting.cancelled_caught or not isinstance(request, h11.Request):
            return False
        body = bytearray()
        while isinstance(event := await self.next_event(), h11.Data):
            body += event.data
            if len(body) > MAX_BODY:
                await self.send(error(413, f"A body has at most {MAX_BODY} bytes."))
                return False
        path = request.target.decode("ascii", "replace").partition("?")[0]
        if path == "/health":
            reply = plain({"status": "ok", **vars(self.engine.statistics)})
        else:
            reply = reply_to(request.method.decode("ascii"), path, bytes(body))
        await self.answer(reply)
        if self.http.our_state is not h11.DONE or self.http.their_state is not h11.DONE:
            return False
        self.http.start_next_cycle()
        return True

    async def next_event(self) -> Any:
        while (event := self.http.next_event()) is h11.NEED_DATA:
            if self.http.they_are_waiting_for_100_continue:
                go_on = h11.InformationalResponse(status_code=100, headers=[])
                await self.transport.send_all(self.http.send(go_on) or b"")
            self.http.receive_data(await self.transport.receive_some(RECEIVE_SIZE))
        return event

    async def answer(self, reply: Reply) -> None:
        """Send a reply, and stop in the middle of it when the client leaves."""
        statistics = self.engine.statistics
        statistics.generating += 1
        sent = False
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.watch, nursery.cancel_scope)
                await self.send(reply)
                sent = True
                nursery.cancel_scope.cancel()
        finally:
            statistics.generating -= 1
            if sent:
                statistics.completed += 1
            else:
                statistics.abandoned += 1

    async def watch(self, answering: trio.CancelScope) -> None:
        """Cancel the answer when the client closes. Bytes of its next request are kept for their turn."""
        data = await self.transport.receive_some(RECEIVE_SIZE)
        self.http.receive_data(data)
        if not data:
            answering.cancel()

    async def send(self, reply: Reply) -> None:
        """Send a reply at the engine's pace: the head with the first part, each part after the words it took."""
        headers = [(b"content-type", reply.content_type), (b"server", b"wakecall-demo"), *reply.headers]
        if len(reply.body) == 1:
            headers.append((b"content-length", str(len(reply.body[0][1])).encode()))
        head: h11.Response | None = h11.Response(status_code=reply.status, headers=headers)
        for words, data in reply.body:
            if words:
                await trio.sleep(words * self.engine.delay_s)
            out = self.http.send(head) or b"" if head is not None else b""
            head = None
            await self.transport.send_all(out + (self.http.send(h11.Data(data=data)) or b""))
        await self.transport.send_all(self.http.send(h11.EndOfMessage()) or b"")


async def serve_demo_engine(
    port: int = 0,
    *,
    delay_s: float = 0.05,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the demo engine on 127.0.0.1 until cancelled.

    Args:
        port: 0 takes a free one.
        delay_s: seconds per word of an answer.
        task_status: told the bound port once it listens.

    Raises:
        OSError: the port is taken.
    """
    engine = DemoEngine(delay_s)
    listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_listeners, engine.serve_connection, listeners)
        await nursery.start(serve)
        task_status.started(listeners[0].socket.getsockname()[1])


def start_in_background(port: int, delay_s: float, pid_file: Path | None, lifetime_s: float) -> None:
    """Start the engine in a session of its own and return at once: whoever waits for it asks `/health`."""
    command = [sys.executable, "-m", "wakecall.cli.demo_engine", "--port", str(port), "--delay-s", str(delay_s)]
    command += ["--lifetime-s", str(lifetime_s)]
    # Whoever ends this command in the middle shall find in the file what it has started. Not SIG_IGN: a child inherits
    # that, but no handler.
    signal.signal(signal.SIGTERM, lambda *_: None)
    nothing = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)  # noqa: S603
    if pid_file is not None:
        pid_file.write_text(f"{process.pid}\n")
    # Not ours to wait for.
    process.returncode = 0


def announce(port: int, pid_file: Path | None) -> None:
    if pid_file is not None:
        pid_file.write_text(f"{os.getpid()}\n")
    print(f"http://127.0.0.1:{port}", flush=True)


@click.command()
@click.option("--port", default=8081, show_default=True, help="On 127.0.0.1; 0 takes a free one.")
@click.option("--delay-s", default=0.05, show_default=True, help="Seconds per word.")
@click.option("--lifetime-s", default=float("inf"), help="Seconds after which it ends by itself.")
@click.option("--pid-file", type=click.Path(path_type=Path), help="Where its process id goes.")
@click.option("--background", is_flag=True, help="Start it in the background and return.")
def main(port: int, delay_s: float, lifetime_s: float, pid_file: Path | None, background: bool) -> None:
    """A small OpenAI-compatible engine for trying things out. It is no language model."""
    if background:
        start_in_background(port, delay_s, pid_file, lifetime_s)
        return

    async def run() -> None:
        with trio.move_on_after(lifetime_s):
            async with trio.open_nursery() as nursery:
                bound: int = await nursery.start(partial(serve_demo_engine, port, delay_s=delay_s))
                announce(bound, pid_file)

    trio.run(run)


if __name__ == "__main__":
    main()
