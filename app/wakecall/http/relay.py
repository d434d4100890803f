"""An infer's answer on its way to its client: held until it is whole, or forwarded as it comes.

Which of the two is a question of its type (`Passage`). A held answer can still turn into a clean error. Of a forwarded one
the head is out, so a failure can only be told inside: in a stream of events as one event at a boundary, and then, as in any
other body, by an end that is missing. `exchange.cut` makes it so: an end that looked clean would be taken for success.

A client that asked for a stream and hears nothing for `waiting_s` gets its head then (`EventsBody`, waiting), and
from there on whatever would have been an answer of another kind is told by such an event.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import ceil, inf
from typing import Any, Final, Literal

import msgspec
import trio

from ..config import BrokerConfig
from ..errors import PublisherError, WakecallError
from ..task import Infer, Reply
from .answers import Answer, StreamBody, bytes_answer, stream_answer
from .errors import describe, engine_retry_headers, error_event, type_of_status
from .guard import Exchange
from .sse import EventTail

__all__ = ["PASSED_TYPES", "EventsBody", "PlaceOf", "RawBody", "pass_on", "passage_of", "safe_content_type"]

Passage = Literal["held", "events", "raw"]

#: Where an infer waits (1: next), and the seconds until it is sent, if they can be told; None: it does not wait.
PlaceOf = Callable[[Infer], tuple[int, float | None] | None]

EVENTS: Final = "text/event-stream"
_OPAQUE: Final = "application/octet-stream"
_NDJSON: Final = frozenset(
    {"application/x-ndjson", "application/ndjson", "application/jsonl", "application/x-jsonlines"}
)
_MEDIA: Final = frozenset({"audio", "image", "video"})
#: The types, and ranges of them, that `safe_content_type` makes.
PASSED_TYPES: Final = (
    "application/json",
    EVENTS,
    "text/plain",
    "application/*",  # NDJSON under its names, `…+json`, and what anything else is passed on as
    *(f"{each}/*" for each in sorted(_MEDIA)),
)
_TYPE: Final = re.compile(r"([a-z0-9!#$&^_.+-]{1,64})/([a-z0-9!#$&^_.+-]{1,64})")
_PARAMETERS: Final = re.compile(r'(?:;[ \t]*[A-Za-z0-9_-]+=(?:[A-Za-z0-9_.:+/-]+|"[A-Za-z0-9_.:+/ -]*"))*')

_PING: Final = b'event: ping\ndata: {"type": "ping"}\n\n'
_SEQUENCE_NUMBER: Final = re.compile(rb'"sequence_number"\s*:\s*(\d{1,15})')
_BODILESS: Final = frozenset({204, 205, 304})
_MAX_MESSAGE_CHARS: Final = 1024


def safe_content_type(content_type: str | None) -> str:
    """A publisher's content type, as it may stand in an answer of ours.

    What is neither JSON, event stream, NDJSON, plain text, audio, image nor video is `application/octet-stream`, so that
    no browser makes a page or a script of it; parameters that are not plain ASCII are left out.
    """
    media_type, semicolon, rest = (content_type or "").partition(";")
    media_type = media_type.strip().lower()
    found = _TYPE.fullmatch(media_type)
    if found is None:
        return _OPAQUE
    if not (
        _is_json(media_type) or media_type in _NDJSON or media_type in (EVENTS, "text/plain") or found[1] in _MEDIA
    ):
        return _OPAQUE
    parameters = (semicolon + rest).rstrip()
    return media_type + parameters if _PARAMETERS.fullmatch(parameters) else media_type


def passage_of(content_type: str | None) -> Passage:
    """How an answer of this type travels."""
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if media_type == EVENTS:
        return "events"
    if media_type not in _NDJSON and (_is_json(media_type) or media_type.startswith("text/")):
        return "held"
    return "raw"


def _is_json(media_type: str) -> bool:
    return media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json"))


async def pass_on(
    infer: Infer,
    exchange: Exchange,
    path: str,
    config: BrokerConfig,
    *,
    wants_stream: bool,
    place_of: PlaceOf | None = None,
) -> Answer:
    """The answer to a client, as soon as there is something to be said.

    Args:
        infer: the client's. Whoever gets an answer with a `StreamBody` is rid of it; else it is still the caller's.
        exchange: the client's.
        path: the client's.
        config: times and bounds.
        wants_stream: whether he hears from `waiting_s` on that he is waited for.
        place_of: where in its line an infer is, for what he hears then; None: he does not hear that.

    Raises:
        WakecallError: the infer ended badly before anything went out: a clean error can be given.
    """
    reply = None
    held = _Held(config.max_plain_bytes)
    due = trio.current_time() + (config.waiting_s if wants_stream else inf)
    with trio.CancelScope(deadline=due):
        reply = await infer.wait_head()
        return await _pass_on(infer, reply, held, exchange, path, config, due)
    body = EventsBody(infer, reply, exchange, path, config, comment_at=due, waited_with=held, place_of=place_of)
    return stream_answer(body, EVENTS)


async def _pass_on(
    infer: Infer, reply: Reply, held: _Held, exchange: Exchange, path: str, config: BrokerConfig, due: float
) -> Answer:
    content_type = reply.headers.get("content-type")
    passage = passage_of(content_type)
    headers = engine_retry_headers(reply.status, reply.headers.get("retry-after"))
    if reply.status in _BODILESS:
        # These have no body, whatever was uploaded; its end is still what counts.
        while await reply.receive():
            pass
        answer = Answer(b"", reply.status, headers)
        if reply.status != 205:
            answer.headers.pop("Content-Length", None)
        return answer
    safe_type = safe_content_type(content_type)
    if passage == "events":
        body = EventsBody(infer, reply, exchange, path, config, comment_at=due)
        return stream_answer(body, safe_type, reply.status, headers)
    if passage == "held" and await held.fill(reply):
        return bytes_answer(bytes(held.data), reply.status, headers, content_type=safe_type)
    return stream_answer(RawBody(infer, reply, exchange, bytes(held.data)), safe_type, reply.status, headers)


class _Held:
    """What has been taken of an answer and not been sent. In one array: of tiny pieces a list would weigh many times more.

    Args:
        limit: bytes; no more than one piece beyond them is held.
    """

    __slots__ = ("_limit", "data")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.data = bytearray()

    async def fill(self, reply: Reply) -> bool:
        """Take the answer up to the limit; returns whether that is all of it. Cancelled, it has lost nothing."""
        while len(self.data) <= self._limit:
            piece = await reply.receive()
            if not piece:
                return True
            self.data += piece
        return False


class RawBody(StreamBody):
    """Bytes as they come; a failure is a cut.

    Args:
        infer: whose answer; it is cancelled when the client leaves early.
        reply: its answer.
        exchange: the client's.
        held: what has been taken of the reply already.
    """

    def __init__(self, infer: Infer, reply: Reply, exchange: Exchange, held: bytes) -> None:
        self._infer = infer
        self._reply = reply
        self._exchange = exchange
        self._held = held
        exchange.on_progress(reply.note_progress)

    async def __anext__(self) -> bytes:
        held, self._held = self._held, b""
        if held:
            return held
        try:
            data = await self._reply.receive()
        except WakecallError:
            self._exchange.cut()
            data = b""
        if not data:
            raise StopAsyncIteration
        return data

    async def aclose(self) -> None:
        self._infer.cancel()


class EventsBody(StreamBody):
    """A stream of events. It is `waiting` for its reply, then `forwarding` it, and `over` at one of three ends:

    1. The reply's own: clean.
    2. A failure at an event's boundary: one `error` event, then the cut.
    3. A failure elsewhere: the cut.

    Args:
        infer: whose answer; it is cancelled when the client leaves early.
        reply: its answer; None: not there yet.
        exchange: the client's.
        path: the client's: APIs differ in what a comment and an error look like.
        config: times and bounds.
        comment_at: when the client, having heard nothing until then, hears that he is waited for (`trio.current_time()`);
            infinite: never.
        waited_with: what has been taken of the reply, if this begins because the client has waited; None: it has not.
        place_of: where in its line an infer is.
    """

    def __init__(
        self,
        infer: Infer,
        reply: Reply | None,
        exchange: Exchange,
        path: str,
        config: BrokerConfig,
        *,
        comment_at: float = inf,
        waited_with: _Held | None = None,
        place_of: PlaceOf | None = None,
    ) -> None:
        self._infer = infer
        self._reply = reply
        self._exchange = exchange
        self._path = path
        self._config = config
        self._tail = EventTail(config.max_event_tail_bytes)
        self._place_of = place_of
        self._comment_at = comment_at
        self._waits_with = waited_with
        self._is_over = False
        self._numbered = path == "/v1/responses"
        self._last_number = -1
        if reply is not None:
            exchange.on_progress(reply.note_progress)

    async def __anext__(self) -> bytes:
        if self._is_over:
            # 2: the event is written; now the end goes missing.
            self._exchange.cut()
            raise StopAsyncIteration
        try:
            if self._comment_at == inf:
                return await self._next()
            if trio.current_time() < self._comment_at:
                with trio.CancelScope(deadline=self._comment_at):
                    return await self._next()
            self._comment_at = trio.current_time() + self._config.waiting_s
            return _PING if self._path == "/v1/messages" else self._waiting()
        except WakecallError as error:
            return self._end_with(describe(error))

    async def aclose(self) -> None:
        self._infer.cancel()

    def _waiting(self) -> bytes:
        """A comment, which no reader of event streams takes for more; people see in it how long it will be."""
        place = None if self._place_of is None else self._place_of(self._infer)
        if place is None:
            return b": waiting\n\n"
        position, estimate_s = place
        about = "" if estimate_s is None else f", about {max(ceil(estimate_s), 1)} s"
        return f": waiting; position {position}{about}\n\n".encode()

    async def _next(self) -> bytes:
        """What goes out next. Cancelled, it has lost nothing."""
        if self._waits_with is not None:
            failure = await self._wait_and_judge(self._waits_with)
            self._waits_with = None
            if failure is not None:
                return self._end_with(failure)
        assert self._reply is not None
        ready = await self._forward(self._reply)
        self._comment_at = inf  # he has heard something
        return ready

    async def _wait_and_judge(self, held: _Held) -> dict[str, Any] | None:
        """What is wrong with an answer that comes too late to have a head of its own; None: it is a stream, and good.

        Cancelled, it has lost nothing.
        """
        if self._reply is None:
            self._reply = await self._infer.wait_head()
            self._exchange.on_progress(self._reply.note_progress)
        reply = self._reply
        if not 200 <= reply.status <= 299:
            await held.fill(reply)
            return {
                "message": _message_in(bytes(held.data)) or f"The engine answered with status {reply.status}.",
                "type": type_of_status(reply.status),
                "param": None,
                "code": f"upstream_{reply.status}",
            }
        if reply.status in _BODILESS or passage_of(reply.headers.get("content-type")) != "events":
            return describe(PublisherError("The engine's answer is not the stream that was asked for."))
        return None

    async def _forward(self, reply: Reply) -> bytes:
        while data := await reply.receive():
            if ready := self._tail.feed(data):
                self._note_number(ready)
                return ready
        # 1
        rest, self._tail = self._tail.rest(), EventTail(0)
        if not rest:
            raise StopAsyncIteration
        return rest

    def _end_with(self, failure: dict[str, Any]) -> bytes:
        self._infer.cancel()
        if not self._tail.at_boundary:
            # 3
            self._exchange.cut()
            raise StopAsyncIteration
        self._is_over = True
        return error_event(failure, self._path, self._last_number + 1)

    def _note_number(self, ready: bytes) -> None:
        """Remember how far a stream of the Responses API has come: its clients expect numbers that grow."""
        if self._numbered and (at := ready.rfind(b'"sequence_number"')) >= 0:
            found = _SEQUENCE_NUMBER.match(ready, at)
            if found is not None:
                self._last_number = int(found[1])


def _message_in(text: bytes) -> str:
    """What an engine's error says to people: OpenAI's shape, the common others, or the text itself."""
    try:
        document = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return text[: 4 * _MAX_MESSAGE_CHARS].decode(errors="replace").strip()[:_MAX_MESSAGE_CHARS]
    for _ in range(2):
        if not isinstance(document, dict):
            break
        document = next((document[key] for key in ("error", "message", "detail") if key in document), "")
    if not isinstance(document, str):
        document = msgspec.json.encode(document).decode(errors="replace")
    return document[:_MAX_MESSAGE_CHARS]
