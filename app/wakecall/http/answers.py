"""Answers, as light as Quart lets them be, and what a streamed one has to be able to do."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import msgspec
from quart.wrappers.response import ResponseBody
from quart_trio.wrappers import TrioResponse

from ..errors import WakecallError
from .errors import error_document, retry_headers

__all__ = [
    "PIECE_BYTES",
    "Answer",
    "BytesBody",
    "StreamBody",
    "bytes_answer",
    "error_answer",
    "json_answer",
    "no_content",
    "stream_answer",
]

_JSON = "application/json"

#: What is written at a time of a body that is there already. On its way to a socket a piece is copied more than once.
PIECE_BYTES: Final = 64 * 1024


class Answer(TrioResponse):
    """Quart's response without its guess that everything is HTML."""

    default_mimetype = None  # type: ignore[assignment]


class StreamBody(ResponseBody):
    """A body that comes piece by piece, and holds something until it ends: `aclose` lets go of that.

    Whoever sends it calls `aclose` in any case, also if a peer that left at the wrong moment meant that not one piece was
    asked for. On Quart's way it is entered besides, behind the head.
    """

    async def __aenter__(self) -> AsyncIterator[bytes]:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    @abstractmethod
    async def __anext__(self) -> bytes:
        """The next piece, never empty."""

    @abstractmethod
    async def aclose(self) -> None:
        """Let go. Idempotent; must not block."""


class BytesBody(StreamBody):
    """A body that is there already, in pieces: for a peer that reads nothing a piece is copied, and not the whole."""

    def __init__(self, data: bytes) -> None:
        self._left = memoryview(data)

    async def __anext__(self) -> bytes:
        piece, self._left = self._left[:PIECE_BYTES], self._left[PIECE_BYTES:]
        if not piece:
            raise StopAsyncIteration
        return bytes(piece)

    async def aclose(self) -> None:
        self._left = memoryview(b"")


def bytes_answer(
    data: bytes, status: int = 200, headers: Mapping[str, str] | None = None, *, content_type: str
) -> Answer:
    """`data`, whole and with its length."""
    if len(data) <= PIECE_BYTES:
        return Answer(data, status, _plain(headers), content_type=content_type)
    answer = Answer(BytesBody(data), status, _plain(headers), content_type=content_type)
    answer.headers["Content-Length"] = str(len(data))
    answer.timeout = None
    return answer


def json_answer(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    """`value` as JSON."""
    return Answer(msgspec.json.encode(value), status, _plain(headers), content_type=_JSON)


def no_content(headers: Mapping[str, str] | None = None) -> Answer:
    """204: it is done, and there is nothing to say."""
    answer = Answer(b"", 204, _plain(headers))
    del answer.headers["Content-Length"]
    return answer


def error_answer(error: WakecallError, path: str, headers: Mapping[str, str] | None = None) -> Answer:
    """The answer to a request at `path` that ended in `error`."""
    said = {**(headers or {}), **retry_headers(error)}
    if error.status == 401:
        said["WWW-Authenticate"] = "Bearer"  # RFC 9110, 15.5.2: a 401 says how
    return json_answer(error_document(error, path), error.status, said)


def stream_answer(
    body: StreamBody, content_type: str, status: int = 200, headers: Mapping[str, str] | None = None
) -> Answer:
    """An answer that is forwarded as it comes: no cache keeps it, no proxy collects it, and Quart does not cut it."""
    answer = Answer(body, status, _plain(headers), content_type=content_type)
    answer.headers["Cache-Control"] = "no-store"
    answer.headers["X-Accel-Buffering"] = "no"
    answer.timeout = None
    return answer


def _plain(headers: Mapping[str, str] | None) -> dict[str, Any]:
    return dict(headers) if headers else {}
