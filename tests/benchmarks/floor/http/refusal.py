"""Answers that are given below the app, in the same shape as its own: request ids, error bodies, headers of `/v1`.

The barrier and the guard speak to peers whom no route ever sees (junk, HTTP/1.0, WebSockets, a crash of ours). They
answer as `docs/reference/errors.md` says all the same, so that a client needs one parser.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable

import msgspec

from ..errors import WakecallError
from .errors import error_document, retry_headers

__all__ = ["Headers", "error_body", "error_headers", "marks_of", "pick_request_id"]

Headers = list[tuple[bytes, bytes]]

_WELL_FORMED_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


def pick_request_id(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The caller's `x-request-id` if it is well-formed, else a fresh one.

    Args:
        headers: a request's, names in lower case.
    """
    for name, value in headers:
        if name == b"x-request-id":
            if _WELL_FORMED_ID.fullmatch(value):
                return bytes(value)
            break
    return b"req_" + secrets.token_hex(16).encode("ascii")


def marks_of(path: str, request_id: bytes) -> Headers:
    """The headers that every answer at `path` carries, whoever made it; an empty one is not known, and may be any.

    What stands under `/v1` was written by a publisher: no browser may take it for a page of the broker's.
    """
    marks = [(b"x-request-id", request_id)]
    if path in ("", "/v1") or path.startswith("/v1/"):
        marks.append((b"x-content-type-options", b"nosniff"))
        marks.append((b"content-security-policy", b"sandbox"))
    return marks


def error_body(error: WakecallError, path: str) -> bytes:
    """The JSON body of an error at `path`."""
    return msgspec.json.encode(error_document(error, path))


def error_headers(error: WakecallError, body: bytes, path: str, request_id: bytes) -> Headers:
    """The headers that go with `error_body`."""
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        *marks_of(path, request_id),
    ]
    headers += [(name.lower().encode(), value.encode()) for name, value in retry_headers(error).items()]
    return headers
