"""What hostile callers write, and every place of the API that a JSON value can stand in.

`FIELDS` times `MALFORMED_VALUES` is always 400 `invalid_json`; `FIELDS` times `TEXTS` is what the field says. So a new field
needs one line here to be tried with everything, and a new nastiness one to be tried everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from tests.http.served import HOST, JSON, Served, head
from tests.http.wire import Answer, Wire

DEEP = 100_000

#: Values, as they stand in a body, that are no JSON or beyond the protocol's bounds.
MALFORMED_VALUES: dict[str, bytes] = {
    "arrays 100,000 deep": b"[" * DEEP + b"]" * DEEP,
    "objects 100,000 deep": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "arrays 100,000 deep without an end": b"[" * DEEP,
    "65 deep where 64 are allowed": b"[" * 65 + b"]" * 65,
    "an integer of 5,000 digits": b"9" * 5_000,
    "a negative integer of 5,000 digits": b"-" + b"9" * 5_000,
    "a float of 5,000 digits": b"9" * 5_000 + b".5",
    "an exponent of 5,000 digits": b"1e" + b"9" * 5_000,
    "2 ** 64": b"18446744073709551616",
    "-2 ** 63 - 1": b"-9223372036854775809",
    "NaN": b"NaN",
    "Infinity": b"Infinity",
    "-Infinity": b"-Infinity",
    "1e999": b"1e999",
    "-1e999": b"-1e999",
    "a leading zero": b"01",
    "hexadecimal": b"0x10",
    "a byte that is never UTF-8": b'"\xff"',
    "an overlong slash": b'"\xc0\xaf"',
    "an overlong NUL": b'"\xc0\x80"',
    "UTF-8 that is cut": b'"\xe2\x82"',
    "a surrogate in UTF-8": b'"\xed\xa0\x80"',
    "beyond Unicode": b'"\xf4\x90\x80\x80"',
    "Latin-1": b'"caf\xe9"',
    "UTF-16 inside": '"qwen"'.encode("utf-16-le"),
    "a lone high surrogate": b'"\\ud800"',
    "a lone low surrogate": b'"\\udc00"',
    "a pair the wrong way round": b'"\\udc00\\ud800"',
    "two high surrogates": b'"\\ud83d\\ud83d"',
    "a bare NUL": b'"a\x00b"',
    "a bare CR": b'"a\rb"',
    "a bare LF": b'"a\nb"',
    "a bare ESC": b'"\x1b[31m"',
    "an escape that is none": b'"\\x41"',
    "half an escape": b'"\\u00"',
    "single quotes": b"'a'",
    "a comment": b'/* a */ "a"',
    "a key twice": b'{"a": {"b": 1, "b": 1}}',
    "a key twice, once escaped": b'{"ab": 1, "a\\u0062": 1}',
}

#: Well-formed for whoever relays a value without looking into it.
RELAYED_ALL_THE_SAME = frozenset({"a key twice", "a key twice, once escaped"})

#: Well-formed, and no text.
OTHER_TYPES = (
    b"null", b"true", b"0", b"-0.0", b"-1", b"1.5", b"18446744073709551615", b"-9223372036854775808", b"5e-324",
    b"1.7976931348623157e308", b"[]", b"{}", b"[[]]", b'{"": null}',
)  # fmt: skip

#: Whole bodies, made of a good one.
MALFORMED_BODIES: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda good: b"",
    "white space": lambda good: b" \r\n\t",
    "UTF-16 with its mark": lambda good: good.decode().encode("utf-16"),
    "UTF-16, little end first": lambda good: good.decode().encode("utf-16-le"),
    "UTF-16, big end first": lambda good: good.decode().encode("utf-16-be"),
    "UTF-32": lambda good: good.decode().encode("utf-32"),
    "UTF-8 with a mark": lambda good: b"\xef\xbb\xbf" + good,
    "cut": lambda good: good[:-1],
    "twice": lambda good: good + good,
    "behind a NUL": lambda good: b"\x00" + good,
    "before a NUL": lambda good: good + b"\x00",
    "lines of JSON": lambda good: good + b"\n" + good,
    "100,000 opening brackets": lambda good: b"[" * DEEP,
    "within 100,000 brackets": lambda good: b"[" * DEEP + good + b"]" * DEEP,
    "a compressed one": lambda good: b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + good,
}

#: Texts that mean something to somebody else than a JSON parser. None is a valid name or id.
TEXTS: dict[str, str] = {
    "nothing": "",
    "a space": " ",
    "NUL": "a\x00b",
    "only NUL": "\x00",
    "CR": "a\rb",
    "LF": "a\nb",
    "a name and LF": "qwen\n",
    "a header": "a\r\nset-cookie: session=evil\r\n\r\n<html>",
    "an event": 'a\n\nevent: infer\ndata: {"task_id": "evil"}\n\n',
    "U+0085": "a\x85b",
    "U+2028": "a\u2028b",
    "U+2029": "a\u2029b",
    "ESC": "\x1b[31mred\x1b]0;title\x07",
    "DEL": "a\x7fb",
    "right to left": "qwen\u202etxt.exe",
    "an isolate without an end": "\u2067qwen",
    "a zero-width space": "qw\u200ben",
    "a byte order mark": "\ufeffqwen",
    "Cyrillic in Latin": "qw\u0435n",
    "fullwidth": "\uff51\uff57\uff45\uff4e",
    "a combining mark": "qwe\u0301n",
    "a mathematical letter": "\U0001d42a\U0001d430en",
    "a long s": "\u017ftream",
    "no character": "a\uffff\ufdd0b",
    "beyond the first plane": "\U0001f9a5" * 3,
    "many marks on one letter": "Z" + "\u0300" * 500,
    "SQL": "'; DROP TABLE llms; --",
    "SQL in double quotes": '" OR ""="',
    "SQL comments": "qwen'/**/UNION/**/SELECT/**/sql/**/FROM/**/sqlite_master--",
    "a LIKE": "%_%",
    "Jinja": "{{ config.__class__.__init__.__globals__ }}{% raw %}",
    "JavaScript's": "${7*7}`${process.env}`",
    "a format": "{0.__class__.__mro__}{task_id}",
    "printf": "%s%s%n%99999999d",
    "ERB": "<%= `id` %>",
    "a shell": "$(id); `id` | rm -rf / &",
    "a page": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "log4j": "${jndi:ldap://127.0.0.1/a}",
    "a path": "../../../etc/passwd",
    "an escaped path": "%2e%2e%2f%00",
    "backslashes": "..\\..\\\\",
    "4,097 bytes": "x" * 4_097,
    "4,098 bytes in 2,049 letters": "\u00e9" * 2_049,
    "300,000 bytes": "y" * 300_000,
}

Expected = tuple[int, str | None, str | None]

OK: Expected = (200, None, None)
Judge = Callable[[str, str], Expected]


def is_too_long(text: str) -> bool:
    """Whether it is more than a publisher or operator may say in one text (512 bytes)."""
    return len(text.encode()) > 512


@dataclass(frozen=True)
class Field:
    """One place for a value.

    Args:
        route: of which.
        where: the parameter that a refusal names; in brackets where it is a key.
        method, target: the route's.
        body: a request's, with `@` for the value.
        judge: what a text gets there: status, code and `param`.
        is_key: the value is a key, and only a text can be one.
        shown: where what was taken can be seen, and how to find it there.
    """

    route: str
    where: str
    method: str
    target: str
    body: bytes
    judge: Judge
    is_key: bool = False
    shown: tuple[str, Callable[[Any], str]] | None = None

    def fill(self, value: bytes) -> bytes:
        return self.body.replace(b"@", value)

    def expected(self, text: str) -> Expected:
        return self.judge(text, self.where)


def _taken(text: str, where: str) -> Expected:
    return OK


def _invalid(text: str, where: str) -> Expected:
    return 400, "invalid_request", where


def _bounded(text: str, where: str) -> Expected:
    return _invalid(text, where) if is_too_long(text) else OK


def _required(text: str, where: str) -> Expected:
    return _bounded(text, where) if text else _invalid(text, where)


def _nobodys(text: str, where: str) -> Expected:
    return 404, "task_not_found", None


def _unknown_model(text: str, where: str) -> Expected:
    return 404, "model_not_found", where


def _offline(text: str, where: str) -> Expected:
    return 503, "model_offline", None


def _forbidden(text: str, where: str) -> Expected:
    """The first key of an open broker is an operator's; `test_a_keys_texts` has what comes after it."""
    return 403, "forbidden", None


def _agent(member: str) -> tuple[str, Callable[[Any], str]]:
    def find(sessions: Any) -> str:
        return next(str(each["agent"][member]) for each in sessions["data"] if each["session_id"] == "laptop")

    return "/admin/v1/sessions", find


def _llm(name: str, member: str) -> tuple[str, Callable[[Any], str]]:
    return f"/admin/v1/llms/{name}", lambda row: str(row[member])


def _fields() -> list[Field]:
    fields: list[Field] = []

    def register(where: str, body: bytes, judge: Judge, **more: Any) -> None:
        fields.append(Field("register", where, "PUT", "/publisher/v1/sessions/laptop", body, judge, **more))

    def llm(member: str, judge: Judge, **more: Any) -> None:
        body = b'{"llms": [{"name": "row", "%b": @}]}' % member.encode()
        register(f"llms[0].{member}", body, judge, **more)

    def heartbeat(where: str, body: bytes, judge: Judge, **more: Any) -> None:
        fields.append(Field("heartbeat", where, "POST", "/publisher/v1/sessions/laptop/heartbeat", body, judge, **more))

    def failure(where: str, body: bytes, judge: Judge, **more: Any) -> None:
        fields.append(Field("failure", where, "POST", "/publisher/v1/tasks/nobodys/failure", body, judge, **more))

    def admin(where: str, members: bytes, judge: Judge, **more: Any) -> None:
        good = {b"type": b'"t"', b"model": b'"m"', b"url": b'"http://127.0.0.1"'}
        kept = [b'"%b": %b' % pair for pair in good.items() if pair[0] != where.encode()]
        body = b"{%b}" % b", ".join([*kept, members])
        fields.append(Field("admin", where, "PUT", "/admin/v1/llms/upstream", body, judge, **more))

    def client(where: str, body: bytes, judge: Judge, **more: Any) -> None:
        fields.append(Field("client", where, "POST", "/v1/chat/completions", body, judge, **more))

    def keys(where: str, members: bytes, judge: Judge, **more: Any) -> None:
        role = b"" if where == "role" else b'"role": "client", '
        fields.append(Field("keys", where, "POST", "/admin/v1/keys", b"{%b%b}" % (role, members), judge, **more))

    def pause(where: str, body: bytes, judge: Judge, **more: Any) -> None:
        fields.append(Field("pause", where, "POST", "/publisher/v1/sessions/laptop/pause", body, judge, **more))

    def hold(where: str, members: bytes, judge: Judge, **more: Any) -> None:
        body = b"{%b}" % b", ".join([*([] if where == "llm" else [b'"llm": "offline"']), members])
        fields.append(Field("hold", where, "POST", "/admin/v1/resume", body, judge, **more))

    def alias(where: str, members: bytes, judge: Judge, **more: Any) -> None:
        body = b"{%b}" % b", ".join([*([] if where == "target" else [b'"target": "offline"']), members])
        fields.append(Field("alias", where, "PUT", "/admin/v1/aliases/alias", body, judge, **more))

    def owner(where: str, members: bytes, judge: Judge, **more: Any) -> None:
        targets = "/admin/v1/llms/offline", "/admin/v1/sessions/elsewhere"
        fields.extend(Field("owner", where, "PATCH", target, b"{%b}" % members, judge, **more) for target in targets)

    register("llms[0].name", b'{"llms": [{"name": @}]}', _invalid)
    llm("type", _bounded, shown=_llm("row", "type"))
    llm("model", _bounded)
    llm("pool", _invalid)
    llm("group", _invalid)
    llm("status", _invalid)
    llm("cancel", _invalid)
    llm("max_concurrency", _invalid)
    for budget in ("wake_s", "queue_s", "first_byte_s", "idle_s", "total_s"):
        llm(budget, _invalid)
    llm("unknown", _taken)
    register("llms[0]", b'{"llms": [@]}', _invalid)
    register("llms", b'{"llms": @}', _invalid)
    register("agent", b'{"llms": [], "agent": @}', _invalid)
    register("agent.name", b'{"llms": [], "agent": {"name": @}}', _bounded, shown=_agent("name"))
    register("agent.version", b'{"llms": [], "agent": {"version": @}}', _bounded, shown=_agent("version"))
    register("agent.unknown", b'{"llms": [], "agent": {"unknown": [[@]]}}', _taken)
    register("unknown", b'{"llms": [], "unknown": @}', _taken)
    register("(key)", b'{"llms": [{"name": "row", @: 1}], "agent": {@: 1}, @: 1}', _taken, is_key=True)
    heartbeat("llms", b'{"llms": @}', _invalid)
    heartbeat("llms.row", b'{"llms": {"row": @}}', _invalid)
    heartbeat("llms (key)", b'{"llms": {@: "active"}}', _taken, is_key=True)
    heartbeat("tasks", b'{"tasks": @}', _invalid)
    heartbeat("tasks[0]", b'{"tasks": [@]}', _invalid)
    heartbeat("unknown", b'{"unknown": @}', _taken)
    heartbeat("(key)", b"{@: 1}", _taken, is_key=True)
    failure("message", b'{"message": @}', _nobodys)
    failure("code", b'{"message": "m", "code": @}', _nobodys)
    failure("status", b'{"message": "m", "status": @}', _invalid)
    failure("unknown", b'{"message": "m", "unknown": @}', _nobodys)
    failure("(key)", b'{"message": "m", @: 1}', _nobodys, is_key=True)
    admin("type", b'"type": @', _bounded, shown=_llm("upstream", "type"))
    admin("model", b'"model": @', _required, shown=_llm("upstream", "model"))
    admin("url", b'"url": @', _invalid)
    admin("key_env", b'"key_env": @', _invalid)
    admin("unknown", b'"unknown": @', _taken)
    admin("(key)", b"@: 1", _taken, is_key=True)
    keys("role", b'"role": @', _invalid)
    keys("name", b'"name": @', _forbidden)
    keys("owner", b'"owner": @', _forbidden)
    keys("llms", b'"llms": @', _invalid)
    keys("llms[0]", b'"llms": [@]', _forbidden)
    keys("rpm", b'"rpm": @', _invalid)
    keys("max_in_flight", b'"max_in_flight": @', _invalid)
    keys("expires_in_s", b'"expires_in_s": @', _invalid)
    keys("unknown", b'"unknown": @', _forbidden)
    keys("(key)", b"@: 1", _forbidden, is_key=True)
    owner("owner", b'"owner": @', _invalid)
    owner("unknown", b'"owner": "local", "unknown": @', _taken)
    owner("(key)", b'"owner": "local", @: 1', _taken, is_key=True)
    pause("llms", b'{"llms": @}', _invalid)
    pause("llms[0]", b'{"llms": [@]}', _invalid)
    pause("unknown", b'{"unknown": @}', _taken)
    pause("(key)", b"{@: 1}", _taken, is_key=True)
    hold("llm", b'"llm": @', _unknown_model)
    hold("unknown", b'"unknown": @', _taken)
    hold("(key)", b"@: 1", _taken, is_key=True)
    alias("target", b'"target": @', _invalid)
    alias("fallbacks", b'"fallbacks": @', _invalid)
    alias("fallbacks[0]", b'"fallbacks": [@]', _invalid)
    alias("unknown", b'"unknown": @', _taken)
    alias("(key)", b"@: 1", _taken, is_key=True)
    client("model", b'{"model": @}', _unknown_model)
    client("stream", b'{"model": "offline", "stream": @}', _invalid)
    client("hints", b'{"model": "offline", "prompt_cache_key": @, "user": @, "messages": @, "input": @}', _offline)
    client("metadata.user_id", b'{"model": "offline", "metadata": {"user_id": @}, "prompt": [@, @]}', _offline)
    client("unknown", b'{"model": "offline", "messages": [{"content": @}]}', _offline)
    client("(key)", b'{"model": "offline", "x": {@: 1}}', _offline, is_key=True)
    return fields


FIELDS = _fields()

#: Them by their route.
ROUTES = {
    route: [field for field in FIELDS if field.route == route] for route in dict.fromkeys(x.route for x in FIELDS)
}

#: A request that each route takes.
GOOD: dict[tuple[str, str], bytes] = {
    ("PUT", "/publisher/v1/sessions/laptop"): b'{"llms": [{"name": "row", "type": "\xc3\xa9"}]}',
    ("POST", "/publisher/v1/sessions/laptop/heartbeat"): b'{"llms": {"row": "active"}, "tasks": []}',
    ("POST", "/publisher/v1/tasks/nobodys/failure"): b'{"message": "\xc3\xa9"}',
    ("PUT", "/admin/v1/llms/upstream"): b'{"type": "t", "model": "m", "url": "http://127.0.0.1"}',
    ("POST", "/admin/v1/keys"): b'{"role": "client", "name": "\xc3\xa9"}',
    ("PATCH", "/admin/v1/llms/offline"): b'{"owner": "local", "unknown": "\xc3\xa9"}',
    ("PATCH", "/admin/v1/sessions/elsewhere"): b'{"owner": "local", "unknown": "\xc3\xa9"}',
    ("POST", "/publisher/v1/sessions/laptop/pause"): b'{"llms": ["row"], "unknown": "\xc3\xa9"}',
    ("POST", "/admin/v1/resume"): b'{"llm": "row", "unknown": "\xc3\xa9"}',
    ("PUT", "/admin/v1/aliases/alias"): b'{"target": "row", "unknown": "\xc3\xa9"}',
    ("POST", "/v1/chat/completions"): b'{"model": "offline", "messages": ["\xc3\xa9"]}',
}


def written(text: str) -> bytes:
    """A text as JSON, in ASCII."""
    return json.dumps(text).encode()


class Line:
    """A connection that is used for as long as the broker leaves it open; every answer is checked for its form."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._stack = AsyncExitStack()
        self._wire: Wire | None = None
        self.connections = 0

    async def __aenter__(self) -> Line:
        return self

    async def __aexit__(self, *exception: Any) -> None:
        await self._stack.aclose()

    async def ask(self, method: str, target: str, *headers: str, body: bytes | None = None) -> Answer:
        """One request and its whole answer, a connection cleanly closed after it included.

        Raises:
            AssertionError: no answer, a cut one, a 5xx of the broker's own fault, or an error in another shape than ours.
        """
        length = () if body is None else (JSON, f"content-length: {len(body)}")
        return await self.send(head(method, target, *headers, *length, host=HOST) + (body or b""), method)

    async def send(self, request: bytes, method: str = "GET") -> Answer:
        """As `ask`, with the request's own bytes."""
        if self._wire is None:
            self._wire = await self._stack.enter_async_context(self._served.server.connect())
            self.connections += 1
        await self._wire.send(request)
        answer = await self._wire.read_answer(method)
        assert answer.status, "the connection ended without an answer"
        assert not answer.is_cut, answer
        assert answer.headers["x-request-id"]
        if answer.status >= 400 and method != "HEAD":
            assert answer.headers["content-type"] == "application/json", answer
            assert answer.code not in ("internal_error", "store_unavailable"), answer
        assert answer.status not in (500, 502), answer
        if answer.headers.get("connection") == "close":
            assert await self._wire.read_to_end() == b""
            await self._stack.aclose()
            self._wire = None
        return answer
