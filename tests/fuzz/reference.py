"""The same questions answered slowly, by other people's parsers or by the plain text of a standard."""

from __future__ import annotations

import email.message
import email.parser
import email.policy
import ipaddress
import json
import math
import re
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.http import parse_options_header
from werkzeug.sansio.multipart import Data, Epilogue, Field, File, MultipartDecoder, NeedData

__all__ = ["NotJson", "Pairs", "event_stream", "form_by_email", "form_by_werkzeug", "is_loopback_host", "strict_json"]


class NotJson(Exception):
    """Not well-formed, or beyond a bound of ours."""


class Pairs(NamedTuple):
    """An object, its keys as they stand, repeated ones too."""

    items: list[tuple[str, Any]]


def strict_json(body: bytes) -> Any:
    """RFC 8259 within our bounds: the stdlib's parser, and a walk over what it built."""
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=lambda pairs: Pairs(list(pairs)),
            parse_constant=_refuse,
            parse_int=_integer,
            parse_float=_float,
        )
    except (ValueError, RecursionError) as error:
        raise NotJson from error
    _walk(value, 0)
    return value


def _refuse(_: str) -> None:
    raise NotJson


def _integer(text: str) -> int:
    if len(text) > 21 or not -(2**63) <= int(text) < 2**64:
        raise NotJson
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise NotJson
    return value


def _walk(value: Any, level: int) -> None:
    if isinstance(value, str):
        if any("\ud800" <= each <= "\udfff" for each in value):
            raise NotJson
    elif isinstance(value, Pairs | list):
        if level == 64:
            raise NotJson
        for key, each in value.items if isinstance(value, Pairs) else [("", each) for each in value]:
            _walk(key, level + 1)
            _walk(each, level + 1)


# Forms: each returns the values of the fields asked for, in the order in which they stand -----------------------------


def form_by_werkzeug(body: bytes, boundary: bytes) -> dict[str, list[bytes]] | None:
    """As Flask or Quart would read it; None: it would not."""
    decoder = MultipartDecoder(boundary, max_parts=1000)
    found: dict[str, list[bytes]] = {}
    try:
        decoder.receive_data(body)
        decoder.receive_data(None)
        at: list[bytes] = []
        while not isinstance(event := decoder.next_event(), Epilogue | NeedData):
            if isinstance(event, Field | File):
                # Without a name that it can read, a part is nobody's.
                at = found.setdefault(event.name or "", [])
                at.append(b"")
            elif isinstance(event, Data):
                at[-1] += event.data
    except (ValueError, RequestEntityTooLarge, AssertionError, KeyError, IndexError, UnicodeError, LookupError):
        return None
    return found


def form_by_email(body: bytes, content_type: str) -> dict[str, list[bytes]] | None:
    """As a reader of mail would (RFC 2046); None: it would not."""
    head = b"Content-Type: " + content_type.encode("latin-1", "replace") + b"\r\n\r\n"
    message = email.parser.BytesParser(policy=email.policy.compat32).parsebytes(head + body)
    if not message.is_multipart():
        return None
    found: dict[str, list[bytes]] = {}
    for part in message.get_payload():
        assert isinstance(part, email.message.Message)
        disposition = part.get("content-disposition")
        name = parse_options_header(str(disposition))[1].get("name") if disposition is not None else None
        if name is not None:
            payload = part.get_payload(decode=True)  # of its transfer encoding, if it names one
            found.setdefault(name, []).append(payload if isinstance(payload, bytes) else b"")
    return found


# Event streams -------------------------------------------------------------------------------------------------------


def event_stream(data: bytes) -> list[tuple[str, str, str]]:
    """WHATWG HTML 9.2.6, line by line: event, data, id."""
    lines = re.split(rb"\r\n|\n|\r", data.removeprefix(b"\xef\xbb\xbf"))[:-1]
    found, event, texts, last_id = [], "", [], ""
    for line in lines:
        if not line:
            if texts:
                found.append((event or "message", "\n".join(texts), last_id))
            event, texts = "", []
            continue
        field, _, value = line.partition(b":")
        if value.startswith(b" "):
            value = value[1:]
        text = value.decode("utf-8", "replace")
        if field == b"data":
            texts.append(text)
        elif field == b"event":
            event = text
        elif field == b"id" and b"\0" not in value:
            last_id = text
    return found


# Hosts ---------------------------------------------------------------------------------------------------------------


def is_loopback_host(authority: str) -> bool:
    """Whether whoever follows `http://AUTHORITY/` ends up on this machine, as urllib reads it."""
    try:
        parts = urlsplit(f"http://{re.sub(':[0-9]{1,5}$', '', authority, flags=re.ASCII)}/")
        host = (parts.hostname or "").partition("%")[0]
        if parts.path != "/" or parts.query or parts.fragment or parts.username is not None or parts.port is not None:
            return False
    except ValueError:
        return False
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return bool((getattr(address, "ipv4_mapped", None) or address).is_loopback)
