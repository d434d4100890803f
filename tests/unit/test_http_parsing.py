"""The gate for JSON: what is not well-formed, or beyond the protocol's bounds, is told from what merely looks like it."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wakecall.errors import InvalidJson, InvalidRequest, TooMany
from wakecall.http.parsing import decode
from wakecall.http.sniff import sniff


class Inner(msgspec.Struct):
    name: str
    size: int | None = None


class Outer(msgspec.Struct):
    items: list[Inner]
    note: Any = None
    kind: Literal["a"] = "a"


def nested(levels: int, inner: bytes = b"1") -> bytes:
    """An object whose `note` makes it `levels` deep in all."""
    return b'{"items": [], "model": "x", "note": ' + b"[" * (levels - 1) + inner + b"]" * (levels - 1) + b"}"


def note(value: bytes) -> bytes:
    return b'{"items": [], "model": "x", "note": ' + value + b"}"


MALFORMED = {
    "empty": b"",
    "cut": b'{"items": [',
    "trailing comma": note(b"[1,]"),
    "two documents": b'{"items": [], "model": "x"} {}',
    "not UTF-8": note(b'"\xff"'),
    "not UTF-8, in a key": note(b'{"\xff": 1}'),
    "UTF-8 cut at the end": note(b'"\xe6\xbc"'),
    "an encoded surrogate": note(b'"\xed\xa0\x80"'),
    "overlong": note(b'"\xc0\xaf"'),
    "a byte order mark": b"\xef\xbb\xbf" + note(b"1"),
    "UTF-16": note(b"1").decode().encode("utf-16"),
    "NaN": note(b"NaN"),
    "Infinity": note(b"-Infinity"),
    "1e999": note(b"1e999"),
    "1e+400": note(b"[0, -1.5e+400]"),
    "a float of 400 digits": note(b"1" * 400 + b".0"),
    "a lone surrogate": note(b'"\\ud800"'),
    "a lone low surrogate": note(b'"\\udc00"'),
    "a surrogate before something else": note(b'"\\ud800\\u0041"'),
    "a control character": note(b'"\x01"'),
    "a bad escape": note(b'"\\x41"'),
    "a number with a leading zero": note(b"01"),
    "nesting of 65": nested(65),
    "nesting of 100,000": nested(100_000),
    "2^64": note(b"18446744073709551616"),
    "-2^63 - 1": note(b"-9223372036854775809"),
    "an integer of 5,000 digits": note(b"9" * 5000),
    "behind a backslash": note(b'["\\\\", 18446744073709551616, "\\""]'),
}

WELL_FORMED = {
    "nesting of 64": nested(64),
    "many brackets side by side": note(b"[" + b"[[]]," * 500 + b"1]"),
    "brackets in a string": note(b'"' + b"[{" * 500 + b'"'),
    "brackets behind an escaped quote": note(b'"\\"' + b"[" * 100 + b'"'),
    "brackets behind an escaped backslash": note(b'["\\\\", "' + b"[" * 100 + b'"]'),
    "a long number in a string": note(b'"' + b"9" * 400 + b' 1e999"'),
    "2^64 - 1": note(b"18446744073709551615"),
    "-2^63": note(b"-9223372036854775808"),
    "an odd float": note(b"[1.00000000000000000000000001, 1.5E+300, 0.1e-999, 1e00000308]"),
    "a surrogate pair": note(b'"\\ud83d\\ude00"'),
    "an escaped backslash before ud800": note(b'"\\\\ud800"'),
    "text": note('"漢字 é"'.encode()),
    "U+2028": note('"\u2028"'.encode()),
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
def test_what_is_not_well_formed_is_invalid_json(body: bytes) -> None:
    """To publishers' and operators' paths, and to clients', whose bodies are skipped rather than read."""
    with pytest.raises(InvalidJson):
        decode(body, Outer)
    with pytest.raises(InvalidJson):
        sniff(body, "application/json")


@pytest.mark.parametrize("body", WELL_FORMED.values(), ids=WELL_FORMED)
def test_what_merely_looks_odd_is_taken(body: bytes) -> None:
    assert decode(body, Outer).items == []
    assert sniff(body, "application/json")[:2] == ("x", False)


def test_numbers_beyond_bounds_are_found_behind_a_mebibyte_of_strings() -> None:
    """The search goes piece by piece: a string that spans two pieces stays a string."""
    for size in (1 << 20) - 50, (1 << 20) - 1, 1 << 20, (1 << 20) + 7:
        strings = b'["' + b"9" * size + b'", "1e999"'
        assert decode(note(strings + b", 1]"), Outer).items == []
        with pytest.raises(InvalidJson):
            decode(note(strings + b", 1e999]"), Outer)


@pytest.mark.parametrize("number", [b"1e999", b"-1.5E+309", b"18446744073709551616", b"9" * 400 + b".0"])
@pytest.mark.parametrize("filler", [b" ", b'"",', b'"\\"",', b'"\\\\",', b'"1e999[[",'])
def test_a_number_is_found_wherever_a_piece_ends(number: bytes, filler: bytes) -> None:
    """In the middle of it, of an escape, of a string."""
    for shift, beyond in itertools.product(range(12), (-6, 40)):
        start = note(b"[" + b" " * shift)[:-1]
        fill = filler * (((1 << 18) + beyond - len(start)) // len(filler))
        assert sniff(start + fill + b"1]}", "application/json").model == "x"
        with pytest.raises(InvalidJson):
            sniff(start + fill + number + b"]}", "application/json")


@given(
    st.sampled_from(["", "-"]),
    st.one_of(
        st.integers(0, 99), st.integers(1, 10**25), st.integers(2**64 - 3, 2**64 + 3), st.integers(2**63 - 3, 2**63 + 3)
    ),
    st.sampled_from(["", ".0", ".7976931348623157", ".7976931348623159", "." + "9" * 30]),
    st.one_of(st.none(), st.integers(280, 312), st.integers(-400, 400)),
    st.sampled_from(["e", "E", "e+", "e00"]),
)
def test_a_number_is_within_bounds_or_it_is_not(
    sign: str, whole: int, fraction: str, exponent: int | None, letter: str
) -> None:
    """The plain definition again, around the edges."""
    number = f"{sign}{whole}{fraction}"
    if exponent is not None:
        number += f"{letter}{exponent}" if exponent >= 0 else f"e{exponent}"
    is_integer = not fraction and exponent is None
    good = -(2**63) <= int(number) < 2**64 if is_integer else abs(float(number)) != float("inf")
    body = note(f"[1,{number},2]".encode())
    if good:
        assert sniff(body, "application/json").model == "x"
    else:
        with pytest.raises(InvalidJson):
            sniff(body, "application/json")


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('\\"[]{}0123456789e')),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=30,
)


def in_bounds(value: Any, level: int) -> bool:
    """The plain definition that the fast search has to agree with."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return level < 64 and all(in_bounds(each, level + 1) for each in inner)
    return not isinstance(value, int) or -(2**63) <= value < 2**64


@given(JSON_VALUES, st.booleans(), st.integers(0, 66))
def test_the_fast_search_agrees_with_the_plain_definition(value: Any, ascii_only: bool, wrapped: int) -> None:
    for _ in range(wrapped):
        value = [value]
    body = json.dumps({"items": [], "model": "x", "note": value}, ensure_ascii=ascii_only).encode(
        "utf-8", "surrogatepass"
    )
    if in_bounds(value, 1):
        assert sniff(body, "application/json").model == "x"
    else:
        with pytest.raises(InvalidJson):
            sniff(body, "application/json")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"[]", None),
        (b'"text"', None),
        (b"{}", "items"),
        (b'{"items": {}}', "items"),
        (b'{"items": [{"name": "a"}, {"name": 1}]}', "items[1].name"),
        (b'{"items": [{"size": 1}]}', "items[0].name"),
        (b'{"items": [{"name": "a", "size": "1"}]}', "items[0].size"),
        (b'{"items": [{"name": "a", "size": true}]}', "items[0].size"),
        (b'{"items": [{"name": "a", "size": 1.5}]}', "items[0].size"),
    ],
)
def test_a_member_of_the_wrong_type_is_named(body: bytes, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(body, Outer)
    assert caught.value.param == param


@pytest.mark.parametrize(("size", "found"), [(b"2.0", 2), (b"2e0", 2), (b"-0.0", 0), (b"20e-1", 2), (b"1e15", 10**15)])
def test_an_integer_may_be_written_as_javascript_or_lua_might(size: bytes, found: int) -> None:
    """RFC 8259 has one kind of number, and JSON Schema's `integer` takes them."""
    decoded = decode(b'{"items": [{"name": "a", "size": ' + size + b"}]}", Outer).items[0].size
    assert (decoded, type(decoded)) == (found, int)


@pytest.mark.parametrize("number", [b"1e300", b"-1.5", b"9007199254740994.0"])
def test_a_number_that_is_not_surely_an_integer_stays_one_with_a_point(number: bytes) -> None:
    found = decode(b'{"items": [], "note": ' + number + b"}", Outer).note
    assert (found, type(found)) == (float(number), float)


@pytest.mark.parametrize("body", [b'{"items": [], "items": []}', b'{"items": [], "note": {"a": 1, "\\u0061": 2}}'])
def test_a_key_that_stands_twice_is_refused(body: bytes) -> None:
    """Two parsers would take different ones of them."""
    with pytest.raises(InvalidJson):
        decode(body, Outer)


def test_more_members_than_any_valid_request_has_are_not_built() -> None:
    with pytest.raises(TooMany):
        decode(b'{"items": [], "note": [' + b"1," * 200_000 + b"1]}", Outer)


@pytest.mark.parametrize(
    "value", [b'"\\ud800"', b'"\\uDBff"', b'"\\ud800 and more"', b'"\\ud800\\u0041"', b'"\\udc00"']
)
def test_a_lone_surrogate_is_not_called_an_early_end(value: bytes) -> None:
    with pytest.raises(InvalidJson) as caught:
        sniff(b'{"x":' + value + b"}", "application/json")
    assert "ends too early" not in caught.value.message


@pytest.mark.parametrize("body", [b'{"x":"\\ud8', b'{"x":"\\ud800', b'{"x":"\\ud83d\\ude', b'{"x"', b'{"x":"'])
def test_an_early_end_is_called_one(body: bytes) -> None:
    with pytest.raises(InvalidJson, match="ends too early"):
        sniff(body, "application/json")


def test_messages_never_quote_a_body() -> None:
    """They may be logged by whoever gets them."""
    for body in (
        b'{"items": [], "kind": "secret"}',
        note(b'"secret" x'),
        note(b'"\\ud800secret"'),
        b'{"items": [{"name": ["secret"]}]}',
        b'"secret"',
    ):
        with pytest.raises((InvalidJson, InvalidRequest)) as caught:
            decode(body, Outer)
        assert not re.search("secret", caught.value.message)
