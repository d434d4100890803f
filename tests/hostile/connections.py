"""What a peer is told, and what becomes of its connection."""

from __future__ import annotations

from typing import NamedTuple

import trio

from tests.http.served import HOST, Served, head
from tests.http.wire import Answer, Wire

__all__ = ["Told", "end_of", "told", "told_of"]


class Told(NamedTuple):
    """`said` is the error's code, or the `outcome` of an answer that is none. `connection`: `kept`, `fin` or `rst`."""

    status: int
    said: str
    connection: str


async def end_of(wire: Wire) -> str:
    """How the server ends this connection, once all that it still says has been read: `fin` or `rst`."""
    try:
        while await wire.stream.receive_some(65536):
            pass
    except trio.BrokenResourceError:
        return "rst"
    return "fin"


async def told_of(wire: Wire, answer: Answer) -> Told:
    """What this answer says, and whether the connection serves another request; it must be as the answer said."""
    assert not answer.is_cut, answer
    said = answer.code if answer.status >= 400 else answer.json.get("outcome", "") if answer.body else ""
    if answer.headers.get("connection") == "close":
        return Told(answer.status, said, await end_of(wire))
    await wire.send(head("GET", "/healthz"))
    assert (await wire.read_answer()).status == 200
    return Told(answer.status, said, "kept")


async def told(served: Served, method: str, target: str, *headers: str, body: bytes = b"", host: str = HOST) -> Told:
    """One request on a connection of its own."""
    async with served.server.connect() as wire:
        length = (f"content-length: {len(body)}",) if body or method in ("POST", "PUT") else ()
        await wire.send(head(method, target, *headers, *length, host=host) + body)
        return await told_of(wire, await wire.read_answer(method))
