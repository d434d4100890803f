"""A bounded stream of bytes with one writer and many readers: an answer on its way from an upload to its clients.

The writer never waits to put (a piece has arrived and has to go somewhere) but waits for room before the next: as long as
any reader has `limit` bytes or more before it, the upload is held back. What a reader has not taken is joined when it
takes it, so that a slow one makes few large writes rather than many small ones. What came before an error is delivered
before the error.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

__all__ = ["ByteReader", "ByteStream"]


class ByteReader:
    """One reader's end. Made by `ByteStream.open_reader`."""

    __slots__ = ("_first", "_rest", "_size", "_stream", "_wakeup", "taken_at")

    def __init__(self, stream: ByteStream, now: float) -> None:
        self._stream: ByteStream | None = stream
        # The first piece is kept as it is, for mostly there is but one; the others are joined as they come, for a list of
        # tiny ones would weigh many times what is in them.
        self._first = b""
        self._rest = bytearray()
        self._size = 0
        self._wakeup: trio.Event | None = None
        self.taken_at = now  # when it last took something, or was last found with nothing to take

    @property
    def buffered(self) -> int:
        """Bytes that it has not taken yet."""
        return self._size

    async def receive(self) -> bytes:
        """All that has come since the last call, joined; `b""` at the good end.

        Raises:
            WakecallError: the stream ended badly (after the last byte that came has been given out).
            trio.ClosedResourceError: this reader was closed.
            trio.BusyResourceError: another task is receiving.
        """
        while not self._size:
            stream = self._stream
            if stream is None:
                raise trio.ClosedResourceError
            if stream.ended:
                if stream.error is not None:
                    raise stream.error.with_traceback(None)  # one error, many readers
                return b""
            if self._wakeup is not None:
                raise trio.BusyResourceError("another task is receiving from this reader")
            self._wakeup = trio.Event()
            try:
                await self._wakeup.wait()
            finally:
                self._wakeup = None
        data = self._first + self._rest if self._rest else self._first
        self._clear()
        self.taken_at = trio.current_time()
        if self._stream is not None:
            self._stream._reader_took()
        return data

    def note_progress(self) -> None:
        """What was taken from here is still on its way, and its peer has just taken some of it: it is slow, not stalled."""
        self.taken_at = trio.current_time()

    def close(self) -> None:
        """Take nothing more, and hold nobody back. Idempotent."""
        stream, self._stream = self._stream, None
        self._clear()
        if stream is not None:
            stream._readers.discard(self)
            stream._reader_took()
        self._notify()

    def _put(self, data: bytes, now: float) -> None:
        if self._size:
            self._rest += data
        else:
            self._first = data
            self.taken_at = now
        self._size += len(data)
        self._notify()

    def _clear(self) -> None:
        self._first = b""
        if self._rest:
            self._rest = bytearray()
        self._size = 0

    def _notify(self) -> None:
        if self._wakeup is not None:
            self._wakeup.set()


class ByteStream:
    """The writer's end.

    Args:
        limit: bytes before a reader from which the writer waits.
        on_room: called when readers have made room again after `has_room` was False.
    """

    __slots__ = ("_full", "_limit", "_on_room", "_readers", "_room", "ended", "error")

    def __init__(self, limit: int, on_room: Callable[[], None]) -> None:
        self._limit = limit
        self._on_room: Callable[[], None] | None = on_room
        self._readers: set[ByteReader] = set()
        self._room: trio.Event | None = None
        self._full = False
        self.ended = False
        self.error: Exception | None = None

    @property
    def has_room(self) -> bool:
        return not self._full or self.ended

    @property
    def readers(self) -> int:
        return len(self._readers)

    def open_reader(self, beside: ByteReader | None = None, *, now: float | None = None) -> ByteReader:
        """A reader of every piece from now on, and of those that `beside`, another one, has not taken yet.

        Args:
            beside: the other one.
            now: `trio.current_time()`, where that is known.
        """
        reader = ByteReader(self, trio.current_time() if now is None else now)
        if beside is not None and beside._size:
            reader._put(beside._first + beside._rest, reader.taken_at)
        self._readers.add(reader)
        return reader

    def put_nowait(self, data: bytes, now: float) -> None:
        """Give a piece to every reader. Await `wait_room` before the next one, or what is held has no bound."""
        assert not self.ended, "a piece after the end"
        for reader in self._readers:
            reader._put(data, now)
            if reader._size >= self._limit:
                self._full = True

    async def wait_room(self) -> None:
        """Return when every reader has room, or the stream has ended."""
        while self._full and not self.ended:
            if self._room is None:
                self._room = trio.Event()
            await self._room.wait()

    def stalled_since(self) -> float:
        """The earliest instant since which a reader has had bytes before it and taken none; `inf`: no reader has."""
        return min((r.taken_at for r in self._readers if r._size), default=float("inf"))

    def end(self, error: Exception | None = None) -> None:
        """No piece comes any more: a good end, or `error`. Idempotent; the first counts."""
        if self.ended:
            return
        self.ended = True
        self.error = error
        self._on_room = None  # whoever waited for it need not wait for the collector
        self._free_writer()
        for reader in self._readers:
            reader._notify()

    def _reader_took(self) -> None:
        if self._full and not any(r._size >= self._limit for r in self._readers):
            self._full = False
            self._free_writer()
            if self._on_room is not None:
                self._on_room()

    def _free_writer(self) -> None:
        room, self._room = self._room, None
        if room is not None:
            room.set()
