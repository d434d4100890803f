"""A request's body on its way to its handler: what has arrived and nobody took, and when more is asked for.

Two ways lead here. Under Quart a reader task asks the server for messages all the time: it is the pump (`_arrive`,
`_wait_until_wanted`), and what it brings waits here, two pieces at most. A handler that is attended to has no such task: it
asks the server itself, whenever it wants the next piece and none is there (`_wait_arrival`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from math import inf
from typing import Any

import trio

from ..errors import RequestTimeout, RequestTooLarge
from .budget import BodyBudget

__all__ = ["BodyStream", "ClientGone", "GuardSettings", "Incoming"]


class ClientGone(Exception):
    """The peer broke off: its body will never be whole. Nobody's fault, and nobody is there to be answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardSettings:
    """
    Args:
        body_stall_s: seconds that `Exchange.read_body` waits for the next byte of a body, and
        body_s: seconds for all of it: a byte now and then would hold its connection for ever.
        drain_bytes: bytes of an unwanted body that are read and dropped while the answer is made.
    """

    body_stall_s: float = 60.0
    body_s: float = 900.0
    drain_bytes: int = 1 << 20


class Incoming:
    """The body of one request; `guard.Exchange` is the whole of it.

    All that changes: the pieces that nobody took yet, whether the body is complete, claimed, being read or unwanted, and
    what of it is held on whose account. How far the answer is, and whether the peer is gone, the exchange says here.

    Args:
        scope: the request's.
        receive: the server's.
        settings: bounds.
        budget: what bodies are held on.
    """

    # Thousands of requests wait for hours: a dict for so many attributes would be a kilobyte, and so would a deque be.
    __slots__ = (
        "_arrival",
        "_body_taken",
        "_budget",
        "_complete",
        "_declared_bytes",
        "_dropped_bytes",
        "_dropping",
        "_expects_continue",
        "_finished",
        "_gone",
        "_held_bytes",
        "_is_attended",
        "_key_id",
        "_path",
        "_pieces",
        "_reading",
        "_receive",
        "_room",
        "_settings",
        "_started",
    )

    def __init__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[Any]],
        settings: GuardSettings,
        budget: BodyBudget,
    ) -> None:
        self._receive = receive
        self._settings = settings
        self._budget = budget
        self._path: str = scope["path"]
        self._declared_bytes, self._expects_continue = _framing_of(scope["headers"])
        self._pieces: list[bytes] = []
        self._complete = False
        self._dropping = False
        self._dropped_bytes = 0
        self._body_taken = self._reading = False
        self._arrival: trio.Event | None = None
        self._room: trio.Event | None = None
        self._held_bytes = 0
        self._key_id: str | None = None
        self._is_attended = False
        self._gone = self._started = self._finished = False

    # The handler's side --------------------------------------------------------------------------------------------

    @property
    def declared_bytes(self) -> int | None:
        """The request's Content-Length; None for a chunked body, 0 for no body."""
        return self._declared_bytes

    async def read_body(self, max_bytes: int) -> bytes:
        """The whole body. It counts against the budget until `release_body` or the end of the exchange.

        Args:
            max_bytes: the largest body that is taken.

        Raises:
            RequestTooLarge: more was declared, or arrived.
            QueueFull: the budget of all requests is used up, or his key's share of it.
            RequestTimeout: not a byte arrived for `body_stall_s`, or not all of it in `body_s`.
            ClientGone: the peer left before the body was complete.
        """
        self._claim_body()
        if self._declared_bytes is not None and self._declared_bytes > max_bytes:
            raise RequestTooLarge(f"The body is larger than {max_bytes} bytes.")
        self._reading = True
        # One array, for a list of tiny pieces would weigh many times what is in them.
        body = bytearray()
        due = trio.current_time() + self._settings.body_s
        try:
            while (piece := await self._next_piece(self._settings.body_stall_s, due)) is not None:
                if self._held_bytes + len(piece) > max_bytes:
                    raise RequestTooLarge(f"The body is larger than {max_bytes} bytes.")
                self._budget.take(len(piece), self._key_id, for_client=self._path.startswith("/v1/"))
                self._held_bytes += len(piece)
                body += piece
        except Exception:
            self.release_body()
            raise
        finally:
            self._reading = False
        return bytes(body)

    def release_body(self) -> None:
        """Give back what `read_body` took from the budget: nobody holds the body any more."""
        self._budget.give_back(self._held_bytes, self._key_id)
        self._held_bytes = 0

    def stream_body(self) -> BodyStream:
        """The body's pieces (of at most 64 KiB) as they arrive; the peer is held back until each was taken.

        No deadline holds here: wrap `anext` in a scope of your own. One that is cancelled loses nothing.
        """
        self._claim_body()
        self._reading = True
        return BodyStream(self)

    # How it comes ------------------------------------------------------------------------------------------------------

    def _claim_body(self) -> None:
        if self._body_taken:
            raise RuntimeError("the body of a request can be read once")
        self._body_taken = True
        self._wake_pump()

    async def _next_piece(self, stall_s: float = inf, due: float = inf) -> bytes | None:
        """The next piece, None at a complete body's end. Cancelled, it has taken nothing.

        Raises:
            RequestTimeout: nothing arrived for `stall_s` seconds, or until `due` (`trio.current_time()`).
            ClientGone: the peer left before the end, or what it sent was dropped: the answer came first.
        """
        while not self._pieces:
            if self._complete and not self._dropped_bytes:
                return None
            if self._gone or self._dropping:
                raise ClientGone
            if stall_s == inf:
                await self._wait_arrival()
                continue
            with trio.CancelScope(deadline=min(trio.current_time() + stall_s, due)) as scope:
                await self._wait_arrival()
            if scope.cancelled_caught:
                raise RequestTimeout("The request's body did not arrive in time.")
        piece = self._pieces.pop(0)
        self._wake_pump()
        return piece

    async def _wait_arrival(self) -> None:
        """Block until there is something new. Cancelled, it has taken nothing."""
        if not self._is_attended:
            self._arrival = trio.Event()
            await self._arrival.wait()
            return
        message = await self._receive()
        if message["type"] == "http.request":
            self._arrive(message.get("body", b""), more=message.get("more_body", False))
        else:
            raise ClientGone

    async def _wait_until_wanted(self) -> None:
        """Block while the next piece must not be asked for: that is what holds the peer back."""
        while True:
            if self._dropping:
                held_back = self._dropped_bytes > self._settings.drain_bytes and not self._finished
            elif self._expects_continue and not self._body_taken and not self._started:
                held_back = True
            else:
                # One more than the handler has in hand: behind a small body's only piece stand its end and the peer's.
                held_back = len(self._pieces) > 1
            if not held_back:
                return
            self._room = trio.Event()
            await self._room.wait()

    def _arrive(self, body: bytes, *, more: bool) -> None:
        if self._dropping:
            self._dropped_bytes += len(body)
        elif body:
            self._pieces.append(body)
        self._complete = self._complete or not more
        self._wake_handler()

    def _drop_body(self) -> None:
        self._dropping = True
        self._dropped_bytes += sum(map(len, self._pieces))
        self._pieces.clear()
        self._wake_pump()
        self._wake_handler()

    def _wake_handler(self) -> None:
        if self._arrival is not None:
            self._arrival.set()

    def _wake_pump(self) -> None:
        if self._room is not None:
            self._room.set()


class BodyStream:
    """An async iterator over a body's pieces. Ends only at a complete body.

    Raises, from `anext`:
        ClientGone: the peer left before the end.
    """

    def __init__(self, incoming: Incoming) -> None:
        self._intake = incoming

    def __aiter__(self) -> BodyStream:
        return self

    async def __anext__(self) -> bytes:
        piece = await self._intake._next_piece()
        if piece is None:
            self._intake._reading = False
            raise StopAsyncIteration
        return piece


def _framing_of(headers: Any) -> tuple[int | None, bool]:
    """The declared length (None: chunked), and whether the peer waits to be asked for its body. h11 checked both."""
    declared: int | None = 0
    expects = False
    for name, value in headers:
        if name == b"transfer-encoding":
            declared = None
        elif name == b"content-length" and declared is not None:
            declared = int(value.partition(b",")[0])
        elif name == b"expect" and value.strip().lower() == b"100-continue":
            expects = True
    return declared, expects and declared != 0
