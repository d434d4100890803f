"""From an error to what its caller gets: the body, the retry headers, the event of a stream that is under way.

What an error says stands in `wakecall.errors`, as data; here is the one place that writes it down, in the shape of OpenAI's
API (`{"error": {"message", "type", "param", "code"}}`), on `/v1/messages` in Anthropic's too (`"type": "error"` beside).
"""

from __future__ import annotations

import math
from typing import Any, Final

import msgspec
from werkzeug.exceptions import HTTPException

from ..errors import (
    Forbidden,
    InternalError,
    InvalidApiKey,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    RateLimitExceeded,
    RequestTimeout,
    RequestTooLarge,
    UnsupportedEncoding,
    WakecallError,
)
from ..limits import RateState

__all__ = [
    "describe",
    "engine_retry_headers",
    "error_document",
    "error_event",
    "from_http_exception",
    "rate_headers",
    "retry_headers",
    "type_of_status",
]

_MESSAGES: Final = "/v1/messages"
_RESPONSES: Final = "/v1/responses"

#: What Quart and Werkzeug raise by themselves, in our terms.
_BY_STATUS: Final[dict[int, type[WakecallError]]] = {
    401: InvalidApiKey,
    403: Forbidden,
    404: NotFound,
    405: MethodNotAllowed,
    408: RequestTimeout,
    413: RequestTooLarge,
    415: UnsupportedEncoding,
    429: RateLimitExceeded,
}


def describe(error: WakecallError) -> dict[str, Any]:
    """The inner object of every error: `message`, `type`, `param`, `code`, and `phase` for a deadline."""
    inner: dict[str, Any] = {
        "message": error.message,
        "type": error.type,
        "param": error.param,
        "code": error.code,
    }
    if error.phase is not None:
        inner["phase"] = error.phase
    return inner


def error_document(error: WakecallError, path: str) -> dict[str, Any]:
    """The body of an error at `path`."""
    inner = describe(error)
    if path == _MESSAGES or path.startswith(_MESSAGES + "/"):
        return {"type": "error", "error": inner}
    return {"error": inner}


def retry_headers(error: WakecallError) -> dict[str, str]:
    """The two headers that SDKs go by when they decide whether and when to try again."""
    headers = {}
    if error.should_retry is not None:
        headers["x-should-retry"] = "true" if error.should_retry else "false"
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    return headers


def rate_headers(rate: RateState) -> list[tuple[bytes, bytes]]:
    """How a key's rate stands, as OpenAI's API says it (its reference, "Rate limits in headers")."""
    return [
        (b"x-ratelimit-limit-requests", b"%d" % rate.limit),
        (b"x-ratelimit-remaining-requests", b"%d" % rate.remaining),
        (b"x-ratelimit-reset-requests", _duration(rate.reset_s).encode("ascii")),
    ]


def _duration(seconds: float) -> str:
    """`6m0s`, `1.5s`, `20ms`: as Go writes durations, and so OpenAI."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes}m{rest / 1000:g}s" if minutes else f"{rest / 1000:g}s"


def error_event(inner: dict[str, Any], path: str, sequence_number: int) -> bytes:
    """An error in a stream of server-sent events whose head has gone out.

    Args:
        inner: from `describe`.
        path: the client's; on `/v1/responses` the event has the shape of the Responses API's own `error` event too.
        sequence_number: that event's place in such a stream.
    """
    data: dict[str, Any] = {"type": "error", "error": inner}
    if path == _RESPONSES:
        data |= {
            "code": inner["code"],
            "message": inner["message"],
            "param": inner["param"],
            "sequence_number": sequence_number,
        }
    return b"event: error\ndata: " + msgspec.json.encode(data) + b"\n\n"


def engine_retry_headers(status: int, retry_after: str | None = None) -> dict[str, str]:
    """What goes out beside an engine's own error.

    408, 409 and 5xx may have generated: nobody is to try again by himself. 429 and 503 say that it did not begin.

    Args:
        status: the engine's.
        retry_after: seconds, as it said; None: it said nothing, or it is a publisher's, whose `Retry-After` does not cross
            the wire.
    """
    if status in (429, 503):
        return {"Retry-After": retry_after or "1"}
    if status in (408, 409) or 500 <= status <= 599:
        return {"x-should-retry": "false"}
    return {}


def type_of_status(status: int) -> str:
    """The `type` of an error of which no more is known than its HTTP status."""
    if status in _BY_STATUS:
        return _BY_STATUS[status].type
    return InvalidRequest.type if 400 <= status < 500 else InternalError.type


def from_http_exception(error: HTTPException) -> WakecallError:
    """What Quart or Werkzeug raised, in our terms. Their texts are HTML, and may quote the request: they are dropped."""
    status = error.code or 500
    if status in _BY_STATUS:
        return _BY_STATUS[status]()
    if 400 <= status < 500:
        return InvalidRequest(status=status)
    return InternalError()
