"""Server-sent events, parsed as they arrive (WHATWG HTML, 9.2.6 "Interpreting an event stream").

Bytes go in as the socket hands them out, whole events come out. Lines end in CR, LF or CRLF, and any of them may be
split between two reads, so a CR at the end of a read ends its line at once and an LF that follows it is dropped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_EVENT_BYTES = 1024 * 1024
_END_OF_LINE = re.compile(rb"[\r\n]")
_BOM = b"\xef\xbb\xbf"


class EventTooLarge(Exception):
    """A line, or the data of one event, is larger than the parser's bound."""


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One dispatched event; `event` is `message` when the stream names none."""

    event: str
    data: str
    id: str


class EventStreamParser:
    """An incremental parser; its whole state is the unfinished line and the unfinished event.

    Args:
        max_bytes: the bound on one line, and on the data of one event.
    """

    def __init__(self, max_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_bytes = max_bytes
        self._line = bytearray()
        self._at_start = True
        self._after_cr = False
        self._event = ""
        self._data: list[str] = []
        self._data_bytes = 0
        self._last_id = ""

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Take the next bytes of the stream and return the events that they complete.

        Raises:
            EventTooLarge: the bound is passed; the parser is of no use afterwards.
        """
        events: list[ServerSentEvent] = []
        position = 0
        if self._after_cr and chunk:
            self._after_cr = False
            if chunk[0] == 0x0A:
                position = 1
        while end := _END_OF_LINE.search(chunk, position):
            self._line += chunk[position : end.start()]
            position = end.end()
            if end[0] == b"\r":
                if position == len(chunk):
                    self._after_cr = True
                elif chunk[position] == 0x0A:
                    position += 1
            self._check(len(self._line))
            event = self._take_line()
            if event is not None:
                events.append(event)
        self._line += chunk[position:]
        self._check(len(self._line))
        return events

    def _check(self, size: int) -> None:
        if size > self._max_bytes:
            raise EventTooLarge(f"more than {self._max_bytes} bytes in one event")

    def _take_line(self) -> ServerSentEvent | None:
        raw = bytes(self._line)
        self._line.clear()
        if self._at_start:
            self._at_start = False
            raw = raw.removeprefix(_BOM)
        if not raw:
            return self._dispatch()
        field, _, value = raw.partition(b":")
        value = value.removeprefix(b" ")
        text = value.decode("utf-8", "replace")
        match field:
            case b"data":
                self._data_bytes += len(value) + 1
                self._check(self._data_bytes)
                self._data.append(text)
            case b"event":
                self._event = text
            case b"id" if b"\0" not in value:
                self._last_id = text
            case _:
                # A comment (no field name), `retry` (the agent keeps to a backoff of its own) and unknown fields.
                pass
        return None

    def _dispatch(self) -> ServerSentEvent | None:
        data, event = self._data, self._event
        self._data, self._event, self._data_bytes = [], "", 0
        if not data:
            return None
        return ServerSentEvent(event=event or "message", data="\n".join(data), id=self._last_id)
