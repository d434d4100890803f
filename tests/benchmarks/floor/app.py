"""The floor's app: bare ASGI that reads its request, then answers as many bytes as we do.

* `/stream`: so many events as fast as they go, one a `send`;
* `/paced?rate=R&events=N`: each at its time, with the times in it, each stream in a phase of its own;
* a heartbeat's path: an answer as short as ours;
* anything else: one answer with its length.

Under the guard it keeps a task in `receive`, as the guard demands; bare it needs none.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs

import trio

from ..sizes import ANSWER, EVENT, EVENTS, HEARTBEAT_ANSWER, paced_event
from .http.guard import ClientGone, Guard, current_exchange_of

__all__ = ["BareApp", "guarded"]

_JSON = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(ANSWER))]
_SHORT = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(HEARTBEAT_ANSWER))]
_EVENTS = [(b"content-type", b"text/event-stream")]

Send = Callable[[dict[str, Any]], Awaitable[None]]


class BareApp:
    """See above. `begun` counts the paced streams, for their phases."""

    def __init__(self) -> None:
        self.begun = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await _live(receive, send)
            return
        while (await receive()).get("more_body"):
            pass
        await self.answer(scope, send)

    async def answer(self, scope: Any, send: Send) -> None:
        if scope["path"] == "/stream":
            await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
            for _ in range(EVENTS):
                await send({"type": "http.response.body", "body": EVENT, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        elif scope["path"] == "/paced":
            await self._answer_paced(scope, send)
        elif scope["path"].endswith("/heartbeat"):
            await send({"type": "http.response.start", "status": 200, "headers": _SHORT})
            await send({"type": "http.response.body", "body": HEARTBEAT_ANSWER})
        else:
            await send({"type": "http.response.start", "status": 200, "headers": _JSON})
            await send({"type": "http.response.body", "body": ANSWER})

    async def _answer_paced(self, scope: Any, send: Send) -> None:
        asked = parse_qs(scope["query_string"].decode())
        interval_ns = 1e9 / float(asked["rate"][0])
        first_ns = time.monotonic_ns() + self.begun * 0.6180339887498949 % 1 * interval_ns
        self.begun += 1
        await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
        for number in range(int(asked["events"][0])):
            due_ns = int(first_ns + number * interval_ns)
            wait_ns = due_ns - time.monotonic_ns()
            if wait_ns > 0:
                await trio.sleep(wait_ns / 1e9)
            event = paced_event(due_ns, time.monotonic_ns())
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def guarded(bare: BareApp) -> Guard:
    """The app behind the guard, which reads the body in an exchange of its own."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await _live(receive, send)
            return

        async def pump() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump)
            try:
                # As for whoever has a key: a stranger has two seconds to take his answer, and ten thousand at once may keep
                # the loop from seeing that he did.
                current_exchange_of(scope).vouch()
                await current_exchange_of(scope).read_body(1 << 20)
                await bare.answer(scope, send)
            except ClientGone:
                pass
            nursery.cancel_scope.cancel()

    return Guard(app)


async def _live(receive: Any, send: Send) -> None:
    while (await receive())["type"] != "lifespan.shutdown":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": "lifespan.shutdown.complete"})
