"""How many tokens an answer says that it took: found in its bytes as they pass.

An engine says so in members named `usage`, and only those that stand where its API puts them count (a tool's parameters may
have that name too): of a plain answer's object; of a stream's events (OpenAI's chat and completions) or of the `response`
or `message` in them (OpenAI's Responses, Anthropic's Messages).

How it works. What an answer is made of is not parsed, for it passes through the loop that everybody shares. Each piece is
searched for `"usage"` with its quotes, which runs at the speed of memory, and which no text inside an answer can hold: its
quotes are escaped there. In a stream that leaves a line or two, which are read as JSON. In a plain answer, whose one line
may be tens of megabytes of embeddings, the text before it is only asked how deep it is nested: strings are cut out of it
and brackets counted. So what is held is an unfinished line, or an unfinished `usage`, both bounded, whatever comes; and
where the pieces are cut makes no difference.

A publisher may send anything. What is no count (negative, huge, a fraction, a text) was not said; nothing here raises.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, NamedTuple

__all__ = ["MOST_TOKENS", "UNSAID", "PlainMeter", "StreamMeter", "Tokens", "UsageMeter", "meter_for"]

#: More than any answer has: what is above was not said. Sums of these fit 64 bits for as long as anybody counts.
MOST_TOKENS: Final = 10**9

_MARK: Final = b'"usage"'
#: A line of a stream that is longer is not looked into. The last event of the Responses API holds the whole answer, and the
#: instructions and tools of the request.
_MOST_LINE_BYTES: Final = 256 * 1024
#: A plain answer's `usage` that is longer is none.
_MOST_OBJECT_BYTES: Final = 16 * 1024

_MEMBERS: Final = (
    "prompt_tokens",
    "completion_tokens",
    "input_tokens",
    "output_tokens",
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
)

_BREAK: Final = re.compile(rb"[\r\n]")
#: OpenAI says `"usage": null` in every event but the last.
_SAID: Final = re.compile(rb'"usage"[ \t]*:[ \t]*\{')

_REST_OF_STRING: Final = re.compile(rb"(?:[^\"\\]++|\\.)*+", re.DOTALL)
#: Splits a text at its strings. The group is empty for one that does not end in it.
_STRING: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+("?)', re.DOTALL)
#: What says nothing of how deep a text is nested.
_FLAT: Final = bytes(byte for byte in range(256) if byte not in b'{}[]"')
_BEFORE_OBJECT: Final = re.compile(rb"[ \t\r\n]*(?::[ \t\r\n]*)?")
_decoder: Final = json.JSONDecoder()


class Tokens(NamedTuple):
    """What an answer says that it took; None: it does not say.

    Args:
        into: tokens of the request, cached ones included.
        out: tokens of the answer.
    """

    into: int | None
    out: int | None


UNSAID: Final = Tokens(None, None)


class _Tally:
    """What has been said so far. Each member counts as it was said last, wherever that was: Anthropic spreads them."""

    __slots__ = ("_said",)

    def __init__(self) -> None:
        self._said: dict[str, int] = {}

    def take(self, usage: object, *, without: str | None = None) -> None:
        if not isinstance(usage, dict):
            return
        for name in _MEMBERS:
            value = usage.get(name)
            # A bool is an int to Python.
            if type(value) is int and 0 <= value <= MOST_TOKENS and name != without:
                self._said[name] = value

    def tokens(self) -> Tokens:
        said = self._said
        into = said.get("prompt_tokens")
        if into is None and (into := said.get("input_tokens")) is not None:
            # Anthropic counts what came from its cache, or went into it, apart; OpenAI within.
            into += said.get("cache_creation_input_tokens", 0) + said.get("cache_read_input_tokens", 0)
        return Tokens(into, said.get("completion_tokens", said.get("output_tokens")))


class StreamMeter:
    """Of a `text/event-stream`: its data lines, one by one."""

    __slots__ = ("_line", "_skips", "_tally")

    def __init__(self) -> None:
        self._tally = _Tally()
        self._line = bytearray()  # one that has begun
        self._skips = False  # it is too long already

    def feed(self, data: bytes) -> None:
        """The next piece of the answer."""
        start = 0
        if self._line or self._skips:
            found = _BREAK.search(data)
            start = len(data) if found is None else found.start()
            self._begin(data[:start])
            if found is None:
                return
            self._look(bytes(self._line))
            self._line.clear()
            self._skips = False
        end = max(data.rfind(b"\n", start), data.rfind(b"\r", start)) + 1
        if data.find(_MARK, start, end) >= 0:
            for line in data[start:end].splitlines():
                self._look(line)
        if end < len(data):
            self._begin(data[max(start, end) :])

    def _begin(self, part: bytes) -> None:
        if self._skips:
            return
        self._line += part
        if len(self._line) > _MOST_LINE_BYTES:
            self._line.clear()
            self._skips = True

    def _look(self, line: bytes) -> None:
        if _MARK not in line or len(line) > _MOST_LINE_BYTES or not line.startswith(b"data:"):
            return
        if _SAID.search(line) is None:
            return
        try:
            # Any bytes are Latin-1, and only names and numbers are asked for.
            event: Any = json.loads(line[5:].decode("latin-1"))
        except (ValueError, RecursionError):
            return
        if not isinstance(event, dict):
            return
        self._tally.take(event.get("usage"))
        response, message = event.get("response"), event.get("message")
        if isinstance(response, dict):
            self._tally.take(response.get("usage"))
        if isinstance(message, dict):
            # It is said as the answer begins: of what goes out, that is no more than a beginning.
            self._tally.take(message.get("usage"), without="output_tokens")

    def tokens(self) -> Tokens:
        """What has been said until now; a last line may lack its end."""
        self._look(bytes(self._line))
        return self._tally.tokens()


class PlainMeter:
    """Of one JSON object: its members named `usage`."""

    __slots__ = ("_depth", "_escaped", "_held", "_in_string", "_object", "_speaks_of_output", "_tally")

    def __init__(self) -> None:
        self._tally = _Tally()
        self._depth = 0
        self._in_string = False
        self._escaped = False  # a string's next byte is
        self._held = b""  # the beginning of what may become `"usage"`
        self._object: bytearray | None = None  # what came behind one
        self._speaks_of_output = False

    def feed(self, data: bytes) -> None:
        """The next piece of the answer."""
        if self._held:
            data, self._held = self._held + data, b""
        start = 0
        while True:
            if self._object is not None:
                start += self._collect(self._object, data, start)
                if self._object is not None:
                    return
            at = data.find(_MARK, start)
            if at < 0:
                break
            self._skip(data[start:at])
            if self._in_string:
                self._skip(b'"')  # its end, or within it
                start = at + 1
                continue
            start = at + len(_MARK)
            if self._depth == 1:
                self._object = bytearray()
        last = data.rfind(b'"', max(start, len(data) - len(_MARK) + 1))
        if last >= 0 and _MARK.startswith(data[last:]):
            self._held = data[last:]
            self._skip(data[start:last])
        else:
            self._skip(data[start:] if start else data)

    def _collect(self, behind: bytearray, data: bytes, start: int) -> int:
        """Take what stands behind a `"usage"`, until that is an object, whole, or turns out to be none.

        Returns how many bytes of `data`, from `start`, are done with.
        """
        known = len(behind)
        behind += data[start : start + _MOST_OBJECT_BYTES - known]
        before = _BEFORE_OBJECT.match(behind)
        assert before is not None
        at = before.end()
        if at < len(behind):
            if behind[at] != ord("{") or b":" not in before[0]:
                self._object = None
                # A break or a colon changes nothing; from the rest on it is looked for again.
                return at - known
            if behind.find(b"}", known) >= 0:
                try:
                    usage, end = _decoder.raw_decode(behind.decode("latin-1"), at)
                except (ValueError, RecursionError):
                    pass
                else:
                    self._tally.take(usage)
                    if "completion_tokens" in usage or "output_tokens" in usage:
                        self._speaks_of_output = True
                    self._object = None
                    return int(end) - known
        taken = len(behind) - known
        if len(behind) >= _MOST_OBJECT_BYTES:
            self._object = None
            self._skip(bytes(behind))
        return taken

    def _skip(self, data: bytes) -> None:
        """Follow how deep it is nested, and whether it is within a string."""
        if not data:
            return
        if not self._in_string and b'"' not in data:
            self._nest(data)
            return
        if not self._in_string and b'\\"' not in data and b"\\\\" not in data:
            # Mostly no bracket stands within a string: then its two quotes are beside each other when all else is gone.
            brackets = data.translate(None, _FLAT).replace(b'""', b"")
            if b'"' not in brackets:
                self._nest(brackets)
                return
        if self._in_string:
            rest = _REST_OF_STRING.match(data, 1 if self._escaped else 0)
            assert rest is not None
            end = rest.end()
            if end == len(data):
                self._escaped = False
                return
            self._escaped = data[end] == ord("\\")  # then it is the last
            if self._escaped:
                return
            self._in_string = False
            data = data[end + 1 :]
        parts = _STRING.split(data)
        if len(parts) > 1 and not parts[-2]:
            self._in_string = True
            self._escaped = parts[-1] == b"\\"
        self._nest(b"".join(parts[::2]))

    def _nest(self, outside: bytes) -> None:
        self._depth += outside.count(b"{") + outside.count(b"[") - outside.count(b"}") - outside.count(b"]")

    def tokens(self) -> Tokens:
        """What has been said until now."""
        into, out = self._tally.tokens()
        # Of embeddings nothing is said to have gone out, for nothing has.
        return Tokens(into, out if into is None or self._speaks_of_output else 0)


UsageMeter = StreamMeter | PlainMeter


def meter_for(status: int, content_type: str | None) -> UsageMeter | None:
    """A meter for an answer with this head; None: there is nothing to be found in it.

    Args:
        status: the engine's. One that is not 2xx took nothing.
        content_type: its media type, parameters and all.
    """
    if not 200 <= status <= 299:
        return None
    if content_type == "application/json":
        return PlainMeter()  # as nearly all of them say it
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if media_type == "text/event-stream":
        return StreamMeter()
    if media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json")):
        return PlainMeter()
    return None
