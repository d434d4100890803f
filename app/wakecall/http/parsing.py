"""The gate for JSON that comes from outside: strict about form, and quick even where a body is 32 MiB.

msgspec checks the grammar (RFC 8259) while it skips what nobody looks at: strings, escapes, surrogate pairs, numbers,
literals, trailing commas. What it lets through when it skips is checked here, on the bytes, in passes that run in C:

* bytes that are not UTF-8;
* nesting beyond 64, integers beyond 64 bits, numbers that no float can hold. These are looked for in what stands
  outside the body's strings, and only when a first look at the whole body cannot rule them out, which for a usual
  request it can.

`decode` is for the bodies of publishers and operators: it also refuses a key that stands twice in one object, at any
depth, and names the member that is of the wrong type.
"""

from __future__ import annotations

import codecs
import json
import re
from itertools import accumulate
from typing import Any, Final, NoReturn, TypeVar

import msgspec

from ..errors import InvalidJson, InvalidRequest, TooMany

__all__ = ["MAX_DEPTH", "check_bounds", "decode", "json_error"]

T = TypeVar("T")

MAX_DEPTH: Final = 64

#: More members and elements than any request to publishers' or operators' paths can have within the protocol's bounds.
_MAX_MEMBERS: Final = 100_000

_PIECE: Final = 1 << 20

#: Digits become `0` and `E` becomes `e`, so that plain searches find what might be a number out of bounds.
_FOLDED: Final = bytes.maketrans(b"0123456789E", b"0000000000e")
_LONG_RUN: Final = b"0" * 19
_NUMBER: Final = re.compile(rb"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")
#: Digits that may be beyond 64 bits; an exponent that may be beyond a float's, with at most 18 digits before it.
_SUSPECT: Final = re.compile(rb"-?[0-9.]*(?:[0-9]{19}|[eE]\+?0*(?:[1-9][0-9]{3}|29|[3-9][0-9]{2}))")

#: An opening bracket is one level down, a closing one is one up: a signed byte each.
_STEPS: Final = bytes.maketrans(b"{[}]", b"\x01\x01\xff\xff")
_NOT_BRACKETS: Final = bytes(byte for byte in range(256) if byte not in b'{}[]"')
_SEPARATED: Final = bytes.maketrans(b"{}[]:", b",,,,,")
_NOT_NUMBERS: Final = bytes(byte for byte in range(256) if byte not in b'0123456789+-.eE,{}[]:"')

_AT: Final = re.compile(r"^(.*) - at `\$\.?(.*)`$", re.DOTALL)
_MISSING: Final = re.compile(r"missing required field `(.*)`$")


def check_bounds(body: bytes) -> None:
    """Check what msgspec does not when it skips a value.

    Args:
        body: JSON whose grammar has been found good.

    Raises:
        InvalidJson: not UTF-8, nesting beyond 64, an integer beyond 64 bits, a number beyond every float.
    """
    if not body.isascii():
        _check_utf8(body)
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH:
        _check_depth(body)
    if _may_hold_odd_numbers(body):
        _check_numbers(body)


def decode(body: bytes, type: type[T]) -> T:
    """A publisher's or operator's body as `type`, a msgspec Struct.

    Raises:
        InvalidJson: not well-formed, or not within the bounds that this module names, or a key twice in one object.
        InvalidRequest: a member is missing or of the wrong type; `param` names it.
        TooMany: more members than any valid request has.
    """
    if body.count(b",") > _MAX_MEMBERS:
        raise TooMany("The body has more members than any valid request.")
    try:
        msgspec.json.decode(body, type=msgspec.Raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise json_error(error) from None
    check_bounds(body)
    plain = json.loads(body, object_pairs_hook=_no_key_twice)
    try:
        return msgspec.convert(plain, type)
    except msgspec.ValidationError as error:
        raise json_error(error) from None


def json_error(error: Exception) -> InvalidJson | InvalidRequest:
    """What msgspec found wrong, in our terms. Never quotes the body: only member names, types and offsets."""
    if isinstance(error, msgspec.ValidationError):
        text = str(error)
        found = _AT.match(text)
        message, param = (found[1], found[2]) if found else (text, "")
        if (missing := _MISSING.search(message)) is not None:
            param = f"{param}.{missing[1]}" if param else missing[1]
        elif message.startswith("Invalid enum value"):
            message = "This is none of the values that are allowed"
        return InvalidRequest(f"{message}.", param=param.replace("[...]", "") or None)
    if isinstance(error, RecursionError):
        return InvalidJson(f"The body is nested more than {MAX_DEPTH} levels deep.")
    if isinstance(error, UnicodeDecodeError):
        return InvalidJson("The body is not UTF-8.")
    return InvalidJson(f"The body is not well-formed JSON: {_reason(str(error))}.")


def _reason(text: str) -> str:
    if text.startswith("JSON is malformed: "):
        return text.removeprefix("JSON is malformed: ")
    return "it ends too early" if "truncated" in text else text


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise InvalidJson("A key stands twice in one object.")
    return found


def _check_utf8(body: bytes) -> None:
    # In pieces: the text itself, up to four times as large, is never whole in memory.
    decoder = codecs.getincrementaldecoder("utf-8")()
    view = memoryview(body)
    try:
        for start in range(0, len(body), _PIECE):
            decoder.decode(view[start : start + _PIECE])
        decoder.decode(b"", True)
    except UnicodeDecodeError:
        raise InvalidJson("The body is not UTF-8.") from None


def _may_hold_odd_numbers(text: bytes) -> bool:
    folded = text.translate(_FOLDED)
    return _LONG_RUN in folded or b"0e000" in folded or b"0e+000" in folded


def _outside_strings(body: bytes, renamed: bytes, dropped: bytes) -> bytes:
    """What of well-formed JSON stands outside its strings.

    Args:
        body: the JSON.
        renamed: a translation table for what is kept.
        dropped: bytes of no interest, anywhere; a quote is not among them.
    """
    if b"\\" in body:
        # Pairs go from the left, as a parser takes them; then every backslash left before a quote escapes that quote.
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    # Two quotes with nothing of interest between them go: whatever is behind them stays within, or without, a string.
    body = body.translate(renamed, dropped).replace(b'""', b"")
    kept = []
    within = 0
    for start in range(0, len(body), _PIECE):
        between_quotes = body[start : start + _PIECE].split(b'"')
        kept += between_quotes[within::2]
        within = (within + len(between_quotes) - 1) % 2
    return b"".join(kept)


def _check_depth(body: bytes) -> None:
    steps = _outside_strings(body, _STEPS, _NOT_BRACKETS)
    if max(accumulate(memoryview(steps).cast("b")), default=0) > MAX_DEPTH:
        raise InvalidJson(f"The body is nested more than {MAX_DEPTH} levels deep.")


def _check_numbers(body: bytes) -> None:
    numbers = _outside_strings(body, _SEPARATED, _NOT_NUMBERS)
    # Only the few that look out of bounds are looked at one by one.
    for suspect in _SUSPECT.finditer(numbers):
        number = _NUMBER.match(numbers, suspect.start())
        assert number is not None, "a number in well-formed JSON starts with a digit or a minus"
        if number[1] is None and number[2] is None:
            if len(number[0]) > 20 or not -(2**63) <= int(number[0]) < 2**64:
                _refuse_number("An integer is beyond 64 bits")
        elif abs(float(number[0])) == float("inf"):
            _refuse_number("A number is beyond every float")


def _refuse_number(message: str) -> NoReturn:
    raise InvalidJson(f"{message}.")
