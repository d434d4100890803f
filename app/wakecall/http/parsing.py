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
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, Final, NoReturn, TypeVar

import msgspec

from ..errors import InvalidJson, InvalidRequest, TooMany

__all__ = ["MAX_DEPTH", "check_bounds", "decode", "json_error"]

T = TypeVar("T")

MAX_DEPTH: Final = 64

#: More members and elements than any request to publishers' or operators' paths can have within the protocol's bounds.
_MAX_MEMBERS: Final = 100_000

#: Bytes that one call into C looks at. It holds the interpreter for so long, and a large body is looked at in a thread.
_PIECE: Final = 1 << 18

#: Digits become `0` and `E` becomes `e`, so that plain searches find what might be a number out of bounds.
_FOLDED: Final = bytes.maketrans(b"0123456789E", b"0000000000e")
_LONG_RUN: Final = b"0" * 19


def _greater_than(bound: int) -> str:
    """A pattern of the integers, written without leading zeros, that are greater than `bound`."""
    digits = str(bound)
    rest = len(digits) - 1
    as_long = (f"{digits[:at]}[{int(d) + 1}-9][0-9]{{{rest - at}}}" for at, d in enumerate(digits) if d < "9")
    return f"(?=[0-9]{{{rest + 1}}})(?:[1-9][0-9]{{{rest + 1},}}+|{'|'.join(as_long)})"


# A number of JSON's, with a comma before it: a search for a plain byte is what makes these quick.
#: Exactly the integers beyond 64 bits.
_LARGE_INTEGER: Final = re.compile(
    rf",(?:{_greater_than(2**64 - 1)}|-{_greater_than(2**63)})(?![0-9.eE])".encode(),
)
#: Numbers that may be beyond a float, 1.8e308: many digits before the point, or fewer and an exponent that is large enough.
_LARGE_FLOAT: Final = re.compile(
    (
        r",(-?(?:[0-9]{19,}+(?:\.[0-9]++(?:[eE][+-]?[0-9]++)?|[eE][+-]?[0-9]++)"
        rf"|[0-9]{{1,4}}(?:\.[0-9]++)?[eE]\+?0*+{_greater_than(304)}(?![0-9])"
        rf"|[0-9]{{5,18}}(?:\.[0-9]++)?[eE]\+?0*+{_greater_than(290)}(?![0-9])))"
    ).encode()
)
_INFINITY: Final = float("inf")
#: Up to here each integer is a float of its own.
_EXACT: Final = 2.0**53

#: An opening bracket is one level down, a closing one is one up: a signed byte each.
_STEPS: Final = bytes.maketrans(b"{[}]", b"\x01\x01\xff\xff")
_NOT_BRACKETS: Final = bytes(byte for byte in range(256) if byte not in b'{}[]"')
_SEPARATED: Final = bytes.maketrans(b"{}[]:", b",,,,,")
_NOT_NUMBERS: Final = bytes(byte for byte in range(256) if byte not in b'0123456789+-.eE,{}[]:"')

_AT: Final = re.compile(r"^(.*) - at `\$\.?(.*)`$", re.DOTALL)
_HALF_A_PAIR: Final = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}[^\\]")
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
        raise json_error(error, body) from None
    check_bounds(body)
    plain = json.loads(body, object_pairs_hook=_no_key_twice, parse_float=_number)
    try:
        return msgspec.convert(plain, type)
    except msgspec.ValidationError as error:
        raise json_error(error) from None


def json_error(error: Exception, body: bytes = b"") -> InvalidJson | InvalidRequest:
    """What msgspec found wrong with `body`, in our terms. Never quotes it: only member names, types and offsets."""
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
    return InvalidJson(f"The body is not well-formed JSON: {_reason(str(error), body)}.")


def _reason(text: str, body: bytes) -> str:
    if text.startswith("JSON is malformed: "):
        return text.removeprefix("JSON is malformed: ")
    if _HALF_A_PAIR.search(body, max(0, len(body) - 16)):
        return "half a surrogate pair stands alone"  # msgspec looks for its other half beyond the end
    return "it ends too early" if "truncated" in text else text


def _number(text: str) -> float | int:
    """JSON has one kind of number, and JSON Schema takes `2.0` for an integer; so do some languages that write it."""
    value = float(text)
    return int(value) if value.is_integer() and abs(value) <= _EXACT else value


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
    for start in range(0, len(text), _PIECE):
        folded = text[start : start + _PIECE + len(_LONG_RUN)].translate(_FOLDED)
        if _LONG_RUN in folded or b"0e000" in folded or b"0e+000" in folded:
            return True
    return False


def _pieces_of(body: bytes) -> Iterator[bytes]:
    """`body` in pieces, none of which ends between a backslash and what it escapes."""
    start = 0
    while start < len(body):
        piece = body[start : start + _PIECE]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:
            piece = body[start : start + _PIECE + 1]
        start += len(piece)
        yield piece


def _outside_strings(body: bytes, renamed: bytes, dropped: bytes) -> Iterator[bytes]:
    """What of well-formed JSON stands outside its strings, piece by piece.

    Args:
        body: the JSON.
        renamed: a translation table for what is kept.
        dropped: bytes of no interest, anywhere; a quote is not among them.
    """
    within = 0
    for piece in _pieces_of(body):
        if b"\\" in piece:
            # Pairs go from the left, as a parser takes them; then every backslash left before a quote escapes that quote.
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        # Two quotes with nothing of interest between them go: whatever is behind them stays within, or without, a string.
        between_quotes = piece.translate(renamed, dropped).replace(b'""', b"").split(b'"')
        yield b"".join(between_quotes[within::2])
        within = (within + len(between_quotes) - 1) % 2


def _check_depth(body: bytes) -> None:
    level = 0
    for piece in _outside_strings(body, _STEPS, _NOT_BRACKETS):
        steps = memoryview(piece).cast("b")
        if level + max(accumulate(steps), default=0) > MAX_DEPTH:
            raise InvalidJson(f"The body is nested more than {MAX_DEPTH} levels deep.")
        level += sum(steps)


def _check_numbers(body: bytes) -> None:
    unfinished: list[bytes] = []  # of a number that may go on in the next piece
    for piece in _outside_strings(body, _SEPARATED, _NOT_NUMBERS):
        end = piece.rfind(b",") + 1
        if end:
            _check_whole_numbers(b"".join([b",", *unfinished, piece[:end]]))
            unfinished.clear()
        unfinished.append(piece[end:])
    _check_whole_numbers(b"".join([b",", *unfinished]))


def _check_whole_numbers(numbers: bytes) -> None:
    # No number is an object of Python's unless it is large, and then but for a moment: a body may hold millions.
    if _LARGE_INTEGER.search(numbers):
        _refuse_number("An integer is beyond 64 bits")
    if _INFINITY in map(abs, map(float, _LARGE_FLOAT.findall(numbers))):
        _refuse_number("A number is beyond every float")


def _refuse_number(message: str) -> NoReturn:
    raise InvalidJson(f"{message}.")
