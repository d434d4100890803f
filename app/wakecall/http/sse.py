"""Server-sent events (WHATWG HTML, 9.2): the frames of a channel, and where one event ends and the next begins."""

from __future__ import annotations

from typing import Final

import trio

from ..frames import KEEPALIVE, Frame, encode
from ..session import Channel
from .answers import StreamBody

__all__ = ["EventTail", "FramesBody"]

_LINE_ENDS: Final = b"\r\n"
_WRITE_BYTES: Final = 128 * 1024


class FramesBody(StreamBody):
    """A channel's frames as they come, many in one write, but not all of a burst. It ends in one of three ways:

    1. After `bye` the channel gives out nothing more: a clean end.
    2. The peer leaves: the guard has told the channel by then, and this is cancelled.
    3. The server stops: likewise cancelled, and `aclose` is the disconnect.

    Args:
        channel: which; disconnected at the end.
        keepalive_s: seconds without a frame after which a comment goes out.
    """

    def __init__(self, channel: Channel, keepalive_s: float) -> None:
        self._channel = channel
        self._keepalive_s = keepalive_s
        # The last first. No deque: an empty one holds more than all else here, and is empty for hours.
        self._taken: list[Frame] = []

    async def __anext__(self) -> bytes:
        if not self._taken:
            with trio.move_on_after(self._keepalive_s) as patience:
                self._taken = (await self._channel.receive())[::-1]
            if patience.cancelled_caught:
                return KEEPALIVE
            if not self._taken:
                raise StopAsyncIteration
        # What is taken shares its bodies with their infers; what is encoded is a copy, for as long as the write takes.
        written = bytearray()
        while self._taken and len(written) < _WRITE_BYTES:
            written += encode(self._taken.pop())
        return bytes(written)

    async def aclose(self) -> None:
        self._channel.disconnect()


class EventTail:
    """Holds back the unfinished event at the end of a stream, so that one of ours may follow what went out.

    An event ends with an empty line, and a line with LF, CRLF or CR. Up to `limit` bytes of an unfinished event are held;
    if it grows beyond, it goes out as it comes, and until it ends there is no boundary to speak at.

    Args:
        limit: bytes.
    """

    __slots__ = ("_held", "_limit", "_out", "at_boundary")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = bytearray()
        # How many bytes at the beginning of what is held are out already: the line end that the next piece may complete.
        self._out = 0
        self.at_boundary = True

    def feed(self, data: bytes) -> bytes:
        """Take the next piece; returns what may go out now, perhaps nothing."""
        held = self._held
        if not held and data.endswith(b"\n\n"):
            return data  # nearly every piece of nearly every engine
        start = max(0, len(held) - 2)
        held += data
        end = _last_boundary(held, start)
        ready = b""
        if end:
            ready = bytes(held[self._out : end])
            del held[:end]
            self._out = 0
            self.at_boundary = True
        if len(held) > self._limit:
            ready += held[self._out :]
            del held[:-2]
            self._out = len(held)
            self.at_boundary = False
        elif not self.at_boundary:
            # Its beginning is out: holding back the rest would help nobody.
            ready += held[self._out :]
            del held[:-2]
            self._out = len(held)
        return ready

    def rest(self) -> bytes:
        """What is held of a stream that has come to a good end."""
        return bytes(self._held[self._out :])


def _last_boundary(text: bytearray, start: int) -> int:
    """The end of the last empty line that ends at or after `start`, with what line ends follow it; 0: there is none."""
    position = text.rfind(b"\n\n", start)
    if text.find(b"\r", start) >= 0:
        # CRLF CRLF and the mixed ones hold LF CR; two CRs are two lines.
        position = max(position, text.rfind(b"\n\r", start), text.rfind(b"\r\r", start))
    if position < 0:
        return 0
    end = position + 2
    while end < len(text) and text[end] in _LINE_ENDS:
        end += 1
    return end
