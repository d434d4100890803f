"""What every route begins with: who calls, and what his body says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import trio
from quart import Request

from ..broker import Broker
from ..errors import InvalidRequest, UnsupportedEncoding
from ..keyring import Caller
from ..models import Role
from .auth import authenticate
from .guard import Exchange, current_exchange_of
from .parsing import decode
from .raw import RawRequest
from .turns import Turns

__all__ = ["Call", "begin", "look_into", "one_header", "read_json", "refuse_encoded", "turns_of_the_loop"]

T = TypeVar("T")

#: Looking into so many bytes takes the loop's time for less than a few milliseconds, whatever they are.
_INLINE_BYTES: Final = 256 * 1024

#: One at a time: more would only take the interpreter from the loop, and from each other.
_turns: Final = trio.lowlevel.RunVar[Turns]("wakecall: turns of large bodies")


@dataclass(frozen=True, slots=True)
class Call:
    """One request to a route.

    Args:
        request: Quart's, or what a hot route has of it.
        exchange: its body and its end.
        caller: whose it is.
    """

    request: Request | RawRequest
    exchange: Exchange
    caller: Caller

    @property
    def owner(self) -> str:
        """Whose sessions, names and tasks it may speak of."""
        return self.caller.owner


def begin(broker: Broker, role: Role, request: Request | RawRequest) -> Call:
    """A request, its caller known and allowed here. Every route begins with it.

    Raises:
        InvalidApiKey, Forbidden, InternalError: he is not.
    """
    scope: Any = request.scope
    exchange, caller = current_exchange_of(scope), authenticate(broker, request, role)
    exchange.vouch(caller.key_id)
    return Call(request, exchange, caller)


def one_header(call: Call, name: str) -> str | None:
    """A header that stands at most once. Raises InvalidRequest: it does not."""
    values = call.request.headers.getlist(name)
    if len(values) > 1:
        raise InvalidRequest("This header stands at most once.", param=name)
    return values[0] if values else None


def refuse_encoded(call: Call) -> None:
    """Bodies are taken as they are. Raises UnsupportedEncoding."""
    encoding = call.request.headers.get("content-encoding")
    if encoding is not None and encoding.strip().lower() not in ("", "identity"):
        raise UnsupportedEncoding


def turns_of_the_loop() -> Turns:
    """Those in which large bodies are looked into."""
    try:
        return _turns.get()
    except LookupError:
        turns = Turns()
        _turns.set(turns)
        return turns


async def look_into(call: Call, body: bytes, look: Callable[[bytes], T]) -> T:
    """`look(body)`; of a large body in a thread, for it may be seconds' work, and every stream goes through this loop.

    One at a time has the thread, the keys by turns: who sends many large bodies delays no other key by more than one.

    Args:
        call: whose body it is.
        body: whole.
        look: reads it, and touches nothing else.

    Raises:
        Exception: what `look` raises.
    """
    if len(body) <= _INLINE_BYTES:
        return look(body)
    async with turns_of_the_loop().turn(call.caller.key_id):
        return await trio.to_thread.run_sync(look, body)


async def read_json(call: Call, type: type[T], max_bytes: int) -> T:
    """The body of a publisher's or an operator's request. Raises as `Exchange.read_body` and `parsing.decode`."""
    refuse_encoded(call)
    body = await call.exchange.read_body(max_bytes)
    try:
        return await look_into(call, body, lambda body: decode(body, type))
    finally:
        call.exchange.release_body()
