"""The ASGI guard: what a request may do to the app, and what the app may do with its request.

Quart buffers a body without limit, takes the end of its own answer for the peer's end, and hands out HTML where it
fails. So the guard stands between server and Quart and owns three things:

* **The body.** Quart is told at once that there is none. Its reader task, which goes on asking for messages, is the
  pump: pieces wait (`incoming`), two at most, until the handler takes one; only then is another asked for. So a
  handler that stands still closes the kernel's window, and nothing is spawned for it.
* **The end.** `http.disconnect` before the answer's last message means that the peer is gone: callbacks run at that
  moment, whatever the handler is stuck in, then Quart hears it and cancels the handler. After the last message it is
  only Hypercorn tidying up; it is withheld, or Quart would cancel the very `send` that goes back to idle.
* **The head.** Each answer gets its request id and, under `/v1`, the headers that keep it from being a page.

`scope["wakecall.exchange"]` is the handler's side of it. An app under the guard keeps a task in `receive`, as Quart does;
otherwise no body ever arrives. Or it `attend`s to its exchange: then the handler itself takes what it wants from the
server, which says on its own when the peer is gone, and nothing is spawned for a request at all.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Protocol

import trio

from ..errors import InternalError
from ..faults import leaves_of, stacks_of
from .budget import BodyBudget
from .cors import Cors
from .incoming import BodyStream, ClientGone, GuardSettings, Incoming
from .refusal import error_body, error_headers, marks_of, pick_request_id

__all__ = ["BodyBudget", "BodyStream", "ClientGone", "Exchange", "Guard", "GuardSettings", "current_exchange_of"]

logger = logging.getLogger("wakecall.server")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]

EXCHANGE_KEY = "wakecall.exchange"
_MARKS = frozenset({b"x-request-id", b"x-content-type-options", b"content-security-policy"})


class _Connection(Protocol):
    """What the guard asks of `barrier.Connection`."""

    @property
    def request_id(self) -> bytes: ...
    def vouch(self) -> None: ...
    def cut(self) -> None: ...
    def abort(self) -> None: ...
    def on_progress(self, callback: Callable[[], None] | None) -> None: ...
    async def send_continue(self) -> None: ...


class Guard:
    """Pure ASGI middleware: `app.asgi_app = Guard(app.asgi_app)`.

    Args:
        app: the ASGI app to guard.
        settings: bounds for one request.
        budget: shared by every request; one of its own, of 1 GiB, when left out.
        cors: what browsers are told; None: nothing.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: GuardSettings | None = None,
        budget: BodyBudget | None = None,
        cors: Cors | None = None,
    ) -> None:
        self.app = app
        self.settings = settings or GuardSettings()
        self.budget = budget or BodyBudget()
        self.cors = cors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send, self)
        scope[EXCHANGE_KEY] = exchange
        try:
            await self.app(scope, exchange._receive_for_app, exchange._send_from_app)
        except* Exception as group:
            await exchange._fail(group)
        finally:
            exchange._end()


def current_exchange_of(scope: Scope) -> Exchange:
    """The exchange of a request that came through a `Guard`; in a Quart handler, `scope` is `request.scope`."""
    exchange = scope[EXCHANGE_KEY]
    assert isinstance(exchange, Exchange)
    return exchange


class Exchange(Incoming):
    """One request and its answer, as the handler sees them. Made by `Guard`; over when the app returns.

    All that changes: what `Incoming` has of the body, whether the peer is gone, how far the answer is.
    """

    __slots__ = (
        "_added_headers",
        "_callbacks",
        "_connection",
        "_handling",
        "_marks",
        "_request_id",
        "_send",
        "_tell_end",
        "_told_app",
        "_was_cut",
        "_watches_progress",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send, guard: Guard) -> None:
        super().__init__(scope, receive, guard.settings, guard.budget)
        self._send = send
        extensions = scope.get("extensions") or {}
        self._connection: _Connection | None = extensions.get("wakecall.connection")
        self._tell_end: Callable[[Callable[[], None]], None] | None = extensions.get("wakecall.on_end")
        self._handling: trio.CancelScope | None = None
        headers = scope["headers"]
        self._request_id = self._connection.request_id if self._connection else pick_request_id(headers)
        self._marks = guard.cors.marks(self._path, headers) if guard.cors is not None else []

        self._added_headers: list[tuple[bytes, bytes]] = []
        self._told_app = False
        self._callbacks: list[Callable[[], None]] = []
        self._watches_progress = False
        self._was_cut = False

    # The handler's side --------------------------------------------------------------------------------------------

    @property
    def request_id(self) -> str:
        """The caller's `x-request-id` if well-formed, else a fresh one. Every answer carries it."""
        return self._request_id.decode("ascii")

    @property
    def client_is_gone(self) -> bool:
        """Whether the peer left before the answer was finished."""
        return self._gone

    @property
    def has_started(self) -> bool:
        """Whether the answer's head went out."""
        return self._started

    @property
    def is_over(self) -> bool:
        """Whether nothing more of the answer goes out: its last message did, or it was cut."""
        return self._finished

    def vouch(self, key_id: str | None = None) -> None:
        """The peer may call here: from now on his connection is not one of the strangers' (`room`).

        Args:
            key_id: on which key's account his body is held; None: he needs none.
        """
        self._key_id = key_id
        if self._connection is not None:
            self._connection.vouch()

    def add_headers(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Have these in the answer, whoever makes it. Names in lower case; after the head has gone out they are not."""
        self._added_headers += headers

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        """Have `callback` called once if the peer leaves before the answer's last message, at that moment.

        It runs in the task that reads from the server, not in the handler's: it must not block. If the peer is gone
        already it runs now. After the last message it never does.
        """
        if self._gone:
            callback()
        elif not self._finished:
            self._callbacks.append(callback)

    def on_progress(self, callback: Callable[[], None]) -> None:
        """Have `callback` called whenever the peer takes bytes of this answer that waited for it.

        A peer that is slow but reads is told so from one that takes nothing. It runs in the task that writes: it must not
        block. After the answer's last message it is not called any more.
        """
        if self._connection is not None and not self._finished:
            self._watches_progress = True
            self._connection.on_progress(callback)

    def cut(self) -> None:
        """End the answer here: the client gets what was sent, then sees that its end is missing.

        The connection is half-closed behind the bytes that are already written; what the app still sends is dropped.
        Callbacks do not run: it was not the client that left. A handler that goes on is cancelled a little later.
        """
        if not self._finished:
            self._was_cut = True
            self._finish()
            if self._connection is not None:
                self._connection.cut()

    def abort(self) -> None:
        """End the connection at once with a reset, dropping what is unsent: for a peer not worth waiting for."""
        self._was_cut = True
        self._finish()
        if self._connection is not None:
            self._connection.abort()

    # The app's side ------------------------------------------------------------------------------------------------

    def attend(self, scope: trio.CancelScope) -> bool:
        """Do without a task in `receive`. False: this server does not say on its own when a peer leaves.

        Args:
            scope: the handler's; cancelled when the peer leaves before the answer's last message, or the answer was cut.
        """
        if self._tell_end is None:
            return False
        self._is_attended, self._handling = True, scope
        self._tell_end(self._leave)
        return True

    async def answer(self, send: Callable[[], Awaitable[None]]) -> None:
        """Have `send` make the answer, in an exchange that is attended to. What nobody took of the body is dropped
        meanwhile: a peer that has to send all of it before it reads must not be waited for."""
        if self._complete or self._declared_bytes == 0 or self._reading:
            await send()
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._drop_the_rest)
            await send()
            nursery.cancel_scope.cancel()

    def _leave(self) -> None:
        if self._finished and not self._was_cut:
            return
        if not self._was_cut:
            self._lose_client()
        if self._handling is not None:
            self._handling.cancel()

    async def _drop_the_rest(self) -> None:
        self._drop_body()
        self._told_app = True
        while (await self._receive_for_app())["type"] != "http.disconnect":
            pass

    # What is called for the app

    async def _receive_for_app(self) -> Message:
        if not self._told_app:
            self._told_app = True
            return {"type": "http.request", "body": b"", "more_body": False}
        while True:
            await self._wait_until_wanted()
            message = await self._receive()
            if message["type"] == "http.request":
                self._arrive(message.get("body", b""), more=message.get("more_body", False))
            elif self._finished and not self._was_cut:
                await trio.sleep_forever()
            else:
                if not self._was_cut:
                    self._lose_client()
                return {"type": "http.disconnect"}

    async def _send_from_app(self, message: Message) -> None:
        if self._finished or self._gone:
            await trio.lowlevel.checkpoint()
            return
        if message["type"] == "http.response.start":
            self._started = True
            if not self._complete and not self._reading:
                self._drop_body()
            headers = [pair for pair in message.get("headers", ()) if pair[0].lower() not in _MARKS]
            headers += marks_of(self._path, self._request_id) + self._marks + self._added_headers
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            if message.get("body"):
                # In two steps, so that a peer that leaves while this is written still counts as one that left.
                await self._send({**message, "more_body": True})
                if self.is_over:
                    return
            self._finish()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    # The guard's ---------------------------------------------------------------------------------------------------

    async def _fail(self, group: ExceptionGroup[Exception]) -> None:
        """An exception came out of the app: 500 if that can still be said, else the cut."""
        if self._gone and all(isinstance(leaf, ClientGone) for leaf in leaves_of(group)):
            return
        logger.error("request %s failed: %s", self.request_id, stacks_of(group))
        if self._gone or self._finished:
            return
        if self._started:
            self.cut()
            return
        error = InternalError("Internal error.")
        body = error_body(error, self._path)
        headers = error_headers(error, body, self._path, self._request_id)
        await self._send_from_app({"type": "http.response.start", "status": error.status, "headers": headers})
        await self._send_from_app({"type": "http.response.body", "body": body, "more_body": False})

    def _end(self) -> None:
        self._callbacks.clear()
        self._ignore_progress()
        self._pieces.clear()
        self.release_body()

    def _finish(self) -> None:
        self._finished = True
        self._callbacks.clear()
        self._ignore_progress()
        self._drop_body()

    def _ignore_progress(self) -> None:
        # Once only: behind the last message the connection may be the next request's.
        if self._watches_progress and self._connection is not None:
            self._watches_progress = False
            self._connection.on_progress(None)

    def _lose_client(self) -> None:
        self._gone = True
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback()
            except Exception as error:
                logger.error("request %s: on_disconnect failed: %s", self.request_id, stacks_of(error))
        self._wake_handler()
