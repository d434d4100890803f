"""What is fuzzed. A target takes bytes and raises AssertionError, or whatever escapes, where one of our edges is wrong.

Each has seeds, from which a fuzzer starts, and tokens, which it puts in.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import msgspec

from tests.fuzz.http import probe
from tests.fuzz.reference import (
    NotJson,
    Pairs,
    event_stream,
    form_by_email,
    form_by_werkzeug,
    is_loopback_host,
    strict_json,
)
from wakecall.errors import Forbidden, InvalidJson, InvalidRequest, RequestError, TooMany
from wakecall.http.auth import refuse_foreign
from wakecall.http.client import PRIORITY, TIMEOUT
from wakecall.http.naming import Held, NewAlias
from wakecall.http.parsing import decode
from wakecall.http.publisher import Failure, Heartbeat, Register, Which
from wakecall.http.refusal import pick_request_id
from wakecall.http.relay import PASSED_TYPES, passage_of, safe_content_type
from wakecall.http.sniff import sniff
from wakecall.http.sse import EventTail
from wakecall.publisher.sse import EventStreamParser, EventTooLarge

__all__ = ["TARGETS", "Target"]


@dataclass(frozen=True)
class Target:
    check: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    tokens: tuple[bytes, ...]


TARGETS: dict[str, Target] = {}


def target(*seeds: bytes, tokens: bytes = b"") -> Callable[[Callable[[bytes], None]], Callable[[bytes], None]]:
    def add(check: Callable[[bytes], None]) -> Callable[[bytes], None]:
        TARGETS[check.__name__] = Target(check, seeds, tuple(tokens.split(b" ")) if tokens else ())
        return check

    return add


# JSON ----------------------------------------------------------------------------------------------------------------

_JSON_TOKENS = (
    b'{ } [ ] " : , \\ \\" \\\\ \\ud800 '
    b"\\udc00 \\u0000 \\u00e9 \xc3\xa9 \xed\xa0\x80 \xff \xef\xbb\xbf NaN Infinity -Infinity "
    b"null true false 0 -0 1. .5 "
    b"1e308 1e309 1e999 1E+400 18446744073709551615 18446744073709551616 -9223372036854775808 "
    b'-9223372036854775809 00000000000000000000 [[[[[[[[[[[[[[[[ ]]]]]]]]]]]]]]]] {"a":{"a":{"a":{"a": }}}} \n \t '
    b'"model" "Model" "stream" "STREAM" "\\u006dodel" "\xc5\xbftream" "a"'
)


class _Anything(msgspec.Struct):
    value: Any = None


def _plain(value: Any) -> Any:
    """The reference's value as `decode` builds it. Raises NotJson: a key twice."""
    if isinstance(value, Pairs):
        found = {key: _plain(each) for key, each in value.items}
        if len(found) != len(value.items):
            raise NotJson
        return found
    return [_plain(each) for each in value] if isinstance(value, list) else value


@target(
    b'{"value": {"a": [1, 2.5, -3e2, true, null, "\\u00e9\\ud83d\\ude00"], "b": {}}}',
    b' {"value" : 18446744073709551615 , "x": [[[[]]]] }\n',
    b'{"value": ' + b"[" * 63 + b"]" * 63 + b"}",
    b'{"value": ' + b"[" * 64 + b"]" * 64 + b"}",
    b'{"value": [-9223372036854775809, 1e309]}',
    b"[1]",
    tokens=_JSON_TOKENS,
)
def json_body(data: bytes) -> None:
    """`decode`: takes exactly what the slow reader takes, and finds the same in it."""
    try:
        wanted = _plain(strict_json(data))
    except NotJson:
        wanted = NotJson
    try:
        found = decode(data, _Anything)
    except TooMany:
        assert data.count(b",") > 100_000
    except InvalidJson:
        assert wanted is NotJson, "well-formed JSON was refused"
    except InvalidRequest:
        assert not isinstance(wanted, dict), "an object was taken for none"
    else:
        assert isinstance(wanted, dict), "what is no object, or no JSON, was taken"
        assert found.value == wanted.get("value")


@target(
    b'{"llms": [{"name": "qwen", "status": "active", "max_concurrency": 2, "wake_s": 4.5}], "agent": {"name": "a"}}',
    b'{"llms": {"qwen": "active"}, "tasks": ["abc"]}',
    b'{"message": "no", "code": "x", "status": 503}',
    b'{"llms": ["qwen"], "llm": "qwen", "target": "qwen", "fallbacks": ["a", "b"]}',
    tokens=_JSON_TOKENS
    + b' "llms" "name" "status" "max_concurrency" "wake_s" 86400 100001 "tasks" "message" 599.0 2.0'
    + b' "pool" "group" "total_s" 86400.5 "llm" "target" "fallbacks"',
)
def publisher_body(data: bytes) -> None:
    """The bodies of publishers and operators: a Struct or a 400 that can be written down, and names a member."""
    for type in (Register, Heartbeat, Failure, Which, Held, NewAlias):
        try:
            found = decode(data, type)
        except RequestError as error:
            assert error.status == 400
            msgspec.json.encode({"message": error.message, "param": error.param})
        else:
            assert isinstance(found, type)


def _asked_for(value: Any) -> tuple[str, Any]:
    """What the slow reader finds: a code of an error, or `model` and `stream`."""
    if not isinstance(value, Pairs):
        return "invalid_request", None
    if len(value.items) > 10_000:
        return "too_many", None
    found: dict[str, Any] = {}
    for key, each in value.items:
        folded = key.casefold()
        if folded in ("model", "stream"):
            if folded in found or folded != key:
                return "ambiguous_model", None
            found[key] = each
    if found.get("model") is None:
        return "model_required", None
    if not isinstance(found["model"], str) or not isinstance(found.get("stream"), bool | None):
        return "invalid_request", None
    return "", (found["model"], bool(found.get("stream")))


@target(
    b'{"model": "qwen", "stream": true, "messages": [{"role": "user", "content": "Good morning!"}]}',
    b'{"model": "qwen", "n": 1e3, "x": 12345678901234567890, "deep": [[[{"model": 1}]]]}',
    '{"é": 1, "ſtream": false, "model": "a"}'.encode(),
    b'{"MODEL": "a", "model": "b"}',
    tokens=_JSON_TOKENS,
)
def client_json(data: bytes) -> None:
    """`sniff` of JSON: the verdict, model and stream of the slow reader."""
    try:
        code, wanted = _asked_for(strict_json(data))
    except NotJson:
        code, wanted = "not json", None
    try:
        found = sniff(data, "application/json")
    except RequestError as error:
        if code == "not json":
            # Which of two faults is told first does not matter.
            assert error.code in ("invalid_json", "invalid_request"), error.code
        else:
            assert error.code == code, (error.code, code)
    else:
        assert (code, wanted) == ("", (found.model, found.stream))
        assert found.affinity is None or len(found.affinity) == 8
        assert sniff(data, "application/json", b"another").affinity != found.affinity or found.affinity is None


# Forms ---------------------------------------------------------------------------------------------------------------

_FORM_TOKENS = (
    b"--B --B-- \r\n \n \r \r\n\r\n \n\n : ; = "
    b'" \\ \r\n--B\r\n \n--B\n \r--B\r \r\n--B-- Content-Disposition: form-data name= name="model" '
    b'name=model name*=utf-8\'\'model name*0=mo name*0="mo" name*1=del filename="x" '
    b"filename*= filename= stream MODEL model "
    b'name="mod\\el" \xc3\xa9 \xff \0 content-disposition : \t Content-Transfer-Encoding: base64 true'
)
_MODEL_PART = b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n'
_FILE_PART = (
    b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
    b"\x00\xff--b\r\n"
)
_STREAM_PART = b"--B\r\ncontent-disposition: form-data; name=stream\r\n\r\ntrue\r\n"


@target(
    _MODEL_PART + b"--B--\r\n",
    _FILE_PART + _MODEL_PART + _STREAM_PART + b"--B--\r\n",
    b"preamble\r\n" + _MODEL_PART + b"--B--epilogue",
    tokens=_FORM_TOKENS,
)
def client_form(data: bytes) -> None:
    """`sniff` of a form: what it takes, two other readers take too, and find the same model and stream in it."""
    content_type = "multipart/form-data; boundary=B"
    try:
        found = sniff(data, content_type)
    except RequestError as error:
        assert error.status == 400
        return
    for read in (form_by_werkzeug(data, b"B"), form_by_email(data, content_type)):
        if read is not None:
            named = {name: values for name, values in read.items() if name.casefold() in ("model", "stream")}
            assert named.get("model") == [found.model.encode()], (found, named)
            assert len(named.get("stream", [])) <= 1
            assert named.keys() <= {"model", "stream"}


@target(
    b'multipart/form-data; boundary="B"; charset=utf-8',
    b"multipart/form-data;boundary=B",
    tokens=b"; = \" boundary boundary*=utf-8''C boundary= BOUNDARY=C \\ , \t \xe9 B C",
)
def form_type(data: bytes) -> None:
    """A form's Content-Type: the boundary that we read is the one that others read."""
    content_type = data.decode("latin-1")
    bodies = [_MODEL_PART.replace(b"B", each) + b"--" + each + b"--\r\n" for each in (b"B", b"C", b"BC")]
    for body in bodies:
        try:
            sniff(body, f"multipart/form-data; {content_type}")
        except RequestError as error:
            assert error.status == 400
            continue
        read = form_by_email(body, f"multipart/form-data; {content_type}")
        if read is not None:
            assert read.get("model") == [b"whisper"], read


# Event streams -------------------------------------------------------------------------------------------------------

_EVENT_TOKENS = b"\n \r \r\n \n\n \r\r \n\r data: data event: id: : retry: \0 \xef\xbb\xbf \xc3\xa9 \xff x"


def _pieces(data: bytes) -> list[bytes]:
    """The data in pieces; its first byte says of what sizes."""
    if not data:
        return []
    size, rest = data[0] % 7 + 1, data[1:]
    return [rest[at : at + size] for at in range(0, len(rest), size)]


@target(
    b"\x03: keep\n\nid: 7-1\nevent: hello\ndata: {}\n\n",
    b"\x00\xef\xbb\xbfdata: a\r\rdata: b\r\ndata\r\n\r\n",
    tokens=_EVENT_TOKENS,
)
def event_parser(data: bytes) -> None:
    """The agent's parser: the events of the standard, wherever the stream is cut; bounded."""
    pieces = _pieces(data)
    wanted = event_stream(b"".join(pieces))
    parser = EventStreamParser()
    assert [(each.event, each.data, each.id) for piece in pieces for each in parser.feed(piece)] == wanted
    small = EventStreamParser(max_bytes=8)
    try:
        events = [each for piece in pieces for each in small.feed(piece)]
    except EventTooLarge:
        assert max(map(len, re.split(rb"[\r\n]", b"".join(pieces)))) > 8 or b"data" in data
    else:
        assert [(each.event, each.data, each.id) for each in events] == wanted


def _boundaries(text: bytes) -> set[int]:
    """Where an event of ours may be put: at the start, and behind each empty line."""
    found, line_start = {0}, 0
    for end_of_line in re.finditer(rb"\r\n|\n|\r", text):
        if end_of_line.start() == line_start:
            found.add(end_of_line.end())
        line_start = end_of_line.end()
    return found


@target(b"\x05data: 1\n\ndata: 2\r\n\r\ndata: 3\r\rdata: 4\n\r\n", b"\x00\n\n\r\n\r\r\ndata", tokens=_EVENT_TOKENS)
def event_tail(data: bytes) -> None:
    """What goes out of a stream: all of it, in order, held back within the limit, and a boundary is one."""
    pieces = _pieces(data)
    for limit in (2, 5, 1000):
        tail = EventTail(limit)
        fed = sent = b""
        for piece in pieces:
            fed += piece
            sent += tail.feed(piece)
            assert fed.startswith(sent)
            assert len(fed) - len(sent) <= limit
            if tail.at_boundary:
                assert len(sent) in _boundaries(sent)
        assert sent + tail.rest() == fed


# Headers -------------------------------------------------------------------------------------------------------------


@target(
    b'Application/JSON; charset="utf-8"',
    b"text/event-stream;charset=utf-8",
    b"audio/mpeg",
    b"application/problem+json; x=1; y=2",
    tokens=b'; = " / + \r\n \n \0 \xe9 text/html image/svg+xml application/ text/plain application/x-ndjson video/ ,',
)
def content_type(data: bytes) -> None:
    """A publisher's content type: what goes out is one of ours, and no header of its own."""
    given = data.decode("latin-1")
    safe = safe_content_type(given)
    media_type = safe.partition(";")[0].rstrip()
    assert media_type in PASSED_TYPES or f"{media_type.partition('/')[0]}/*" in PASSED_TYPES
    assert re.fullmatch(r"[ \t!-~]*", safe), safe
    assert "html" not in media_type.partition("/")[2] or media_type.startswith(("audio/", "image/", "video/")), safe
    assert safe_content_type(safe) == safe
    assert passage_of(given) in ("held", "events", "raw")
    if media_type == "text/event-stream":
        assert passage_of(given) == "events"


@target(
    b"127.0.0.1:8080",
    b"[::1]:80",
    b"a.localhost",
    b"localhost:8080@evil.example",
    b"[::ffff:127.0.0.1]",
    tokens=(
        b"127.0.0.1 localhost .localhost [ ] :: ::1 % : @ / "
        b"\\ # ? . 0x7f 2130706433 \xe9 %00 \0 evil.example \xc2\xb2 \xd9\xa1"
    ),
)
def host(data: bytes) -> None:
    """A Host or an Origin that is taken leads to this machine."""
    authority = data.decode("latin-1")
    for named, origins in ((authority, []), (None, [f"http://{authority}"])):
        try:
            refuse_foreign(named, origins)
        except Forbidden:
            continue
        assert is_loopback_host(authority), authority


@target(
    b"1",
    b"0.5",
    b"86400.00",
    b"1e3",
    b"nan",
    tokens=b"0 1 9 . - + e E inf nan 86400 86399 86401 00000 \n \xb2 \xb3 _ , x",
)
def timeout_header(data: bytes) -> None:
    """A caller's own time: a plain decimal number, more than 0 and at most a day, and a number to everybody."""
    text = data.decode("latin-1")
    whole, point, fraction = text.partition(".")
    plain = set(text) <= set("0123456789.") and whole.isdecimal() and whole == str(int(whole)) and len(whole) <= 5
    if point:
        plain = plain and fraction.isdecimal() and len(fraction) <= 18
    good = plain and 0 < Decimal(text) <= 86_400
    assert (re.fullmatch(TIMEOUT.pattern, text) is not None) is good, text
    if good:
        assert 0 < float(text) <= 86_400


@target(b"interactive", b"batch", b"Batch", tokens=b", ; = \n interactive batch \0 \xe9")
def priority_header(data: bytes) -> None:
    """One of two words."""
    found = re.fullmatch(PRIORITY.pattern, data.decode("latin-1"))
    assert (found is not None) is (data in (b"interactive", b"batch"))


@target(b"req_1234", b"a" * 128, b"a" * 129, b"\r\nset-cookie: x", tokens=b"\n \r\n \0 \xe9 : . _ -")
def request_id(data: bytes) -> None:
    """The caller's own if it can stand in a log and a header, else ours."""
    chosen = pick_request_id([(b"host", b"x"), (b"x-request-id", data)])
    assert re.fullmatch(rb"[A-Za-z0-9._:-]{1,128}", chosen)
    assert (chosen == data) is (re.fullmatch(rb"[A-Za-z0-9._:-]{1,128}", data) is not None)
    assert chosen == data or chosen.startswith(b"req_")


@target(
    b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 16\r\n\r\n" + b'{"model":"qwen"}',
    b"PUT /publisher/v1/sessions/a HTTP/1.1\r\nhost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nb\r\n"
    b'{"llms":[]}\r\n0\r\n\r\n',
    b"GET http://127.0.0.1/healthz HTTP/1.1\r\nHost: a\r\n\r\nHEAD / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: 127.0.0.1\r\nExpect: 100-continue\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /healthz HTTP/1.0\r\n\r\n",
    tokens=(
        b"\r\n \n \r\n\r\n \0 \xe9 : / // ? # %00 %2e%2e "
        b"%2f HTTP/1.1 HTTP/1.0 HTTP/2.0 GET HEAD POST PUT DELETE CONNECT TRACE "
        b"Host: Content-Length: Content-Length:99999999999999999999 Transfer-Encoding: "
        b"chunked gzip Expect:100-continue "
        b"Upgrade:h2c Upgrade:websocket HTTP2-Settings: Connection:close "
        b"Connection:upgrade x-request-id: Content-Encoding:gzip "
        b"Wakecall-Offset:1 Wakecall-Status:99 Origin:null "
        b"x-wakecall-priority:batch x-wakecall-timeout-s:1 x-wakecall-timeout-s:inf "
        b"/publisher/v1/sessions/a/pause /publisher/v1/tasks/a/cancelled /admin/v1/drain /admin/v1/aliases/a "
        b"/publisher/v1/sessions/a/frames /publisher/v1/tasks/a/result "
        b"/admin/v1/llms/a /metrics /v1/messages 0\r\n\r\n ffffffffffffffff\r\n ; [ ] @"
    ),
)
def http_bytes(data: bytes) -> None:
    """Bytes at a socket: well-formed answers or a close, an error only in our shape, and nothing of ours in the log."""
    probe(data)
