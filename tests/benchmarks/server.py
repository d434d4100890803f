"""The servers that are measured, each in a process of its own: `python -m tests.benchmarks.server floor|wakecall|keyed`.

Each prints its port; `keyed`, which is `wakecall` with keys and limits, also a client's and a publisher's key.

The floor is a bare ASGI app behind the same barrier: it reads the request, then answers as many bytes as we do.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import trio

from wakecall import BrokerConfig, ServeConfig, open_broker, open_sqlite_store, serve
from wakecall.http.server import hypercorn_config, serve_app
from wakecall.http.sockets import bind

ANSWER = b'{"choices":[{"message":{"role":"assistant","content":"' + b"x" * 300 + b'"}}]}'
EVENT = b'data: {"choices":[{"delta":{"content":"' + b"y" * 136 + b'"}}]}\n\n'
EVENTS = 200


async def floor(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    while (await receive()).get("more_body"):
        pass
    if scope["path"] == "/stream":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for _ in range(EVENTS):
            await send({"type": "http.response.body", "body": EVENT, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        return
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(ANSWER)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": ANSWER})


async def serve_floor() -> None:
    listening = bind("127.0.0.1", 0)
    print(listening[0].getsockname()[1], flush=True)
    await serve_app(floor, hypercorn_config(), listening)


async def serve_wakecall(*, keyed: bool = False) -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with (
            open_sqlite_store(Path(folder) / "bench.db") as store,
            open_broker(store, BrokerConfig()) as broker,
            trio.open_nursery() as nursery,
        ):
            urls = await nursery.start(serve, broker, ServeConfig(port=0))
            secrets = []
            if keyed:
                client = await broker.create_key("client", llms=["bench*"], rpm=1_000_000, max_in_flight=1000)
                secrets = [client.secret, (await broker.create_key("publisher")).secret]
            print(urls[0].rsplit(":", 1)[1], *secrets, flush=True)


if __name__ == "__main__":
    trio.run(
        {"floor": serve_floor, "wakecall": serve_wakecall, "keyed": partial(serve_wakecall, keyed=True)}[sys.argv[1]]
    )
