"""A TCP stream whose writes end when the peer takes nothing, and that can be ended at once from anywhere."""

from __future__ import annotations

import array
import contextlib
import math
import os
import socket
import struct
from collections.abc import Callable
from types import ModuleType

import trio

fcntl: ModuleType | None
termios: ModuleType | None
try:
    import fcntl
    import termios
except ImportError:  # not a POSIX system: every silence of the socket counts as the peer's
    fcntl = termios = None

__all__ = ["PeerStream"]

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_LOOKS_PER_STALL = 8

#: Sockets can be read and written as files.
_HAS_PLAIN_DESCRIPTORS = os.name == "posix"


class PeerStream(trio.abc.HalfCloseableStream):
    """A socket's stream with a deadline *of progress* on its writes.

    That the kernel takes our bytes says little: with a large send buffer it asks for more only when a third of it is
    free, which a slow peer may need minutes for. So a write that waits looks at the send queue (SIOCOUTQ, Linux) every
    eighth of the time: as long as the peer acknowledges anything, it is slow but alive.

    Args:
        sock: a connected TCP socket.
        stall_s: seconds without any progress after which the peer is cut; noticed within 1.25 times of it.

    Attributes:
        patience_s: seconds for the whole of one write, however well it goes. A peer who is seen to take something when they
            are over has until the next look: it may be our loop that was late, not he.
        on_progress: called whenever the peer is seen to take something of a write that has to wait for it. What handed
            the bytes over and keeps a clock of its own learns by it that the peer is slow, not stuck. Must not block.
    """

    def __init__(self, sock: trio.socket.SocketType, stall_s: float) -> None:
        self.socket = sock
        self.patience_s = math.inf
        self.on_progress: Callable[[], None] | None = None
        self._stall_s = stall_s

    def send_now(self, data: bytes | bytearray | memoryview) -> int:
        """Hand over what the kernel takes without waiting.

        Returns:
            Bytes that it took, from the first on.

        Raises:
            trio.BrokenResourceError: the peer is gone.
            trio.ClosedResourceError: our side was closed, or shut for writing.
        """
        if self.socket.did_shutdown_SHUT_WR:
            raise trio.ClosedResourceError("this side is shut for writing")
        if not _HAS_PLAIN_DESCRIPTORS:
            return 0
        try:
            return os.write(self.socket.fileno(), data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise trio.BrokenResourceError(f"cannot write: {error}") from error

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`.

        Raises:
            trio.BrokenResourceError: the peer is gone, or was cut: he took nothing for `stall_s`, or not all in
                `patience_s`.
            trio.ClosedResourceError: our side was closed, or shut for writing.
        """
        if self.socket.did_shutdown_SHUT_WR:
            raise trio.ClosedResourceError("this side is shut for writing")
        sent = 0
        taken: int | None = None
        start = trio.current_time()
        gives_up_at, ends_at = start + self._stall_s, start + self.patience_s
        look_s = min(self._stall_s, self.patience_s) / _LOOKS_PER_STALL
        is_late = False
        try:
            while sent < len(data):
                look_at = trio.current_time() + look_s
                if not is_late:
                    look_at = min(look_at, ends_at)
                with trio.CancelScope(deadline=look_at) as scope, memoryview(data)[sent:] as rest:
                    sent += await self.socket.send(rest)
                    gives_up_at = trio.current_time() + self._stall_s
                if not scope.cancelled_caught:
                    if sent < len(data):
                        self._note_progress()
                    continue
                taken_before, taken = taken, sent - self._unacknowledged()
                is_moving = taken_before is None or taken > taken_before
                now = trio.current_time()
                if now >= ends_at:
                    if is_late or not is_moving:
                        self.abort()
                        raise trio.BrokenResourceError("the peer did not take all in time")
                    is_late = True
                if is_moving:
                    if taken_before is not None:
                        self._note_progress()
                    gives_up_at = now + self._stall_s
                elif now >= gives_up_at:
                    self.abort()
                    raise trio.BrokenResourceError("the peer took no byte for too long")
        except OSError as error:
            raise trio.BrokenResourceError(f"cannot write: {error}") from error

    async def wait_send_all_might_not_block(self) -> None:
        """Block until the kernel takes bytes again. Raises as `send_all`, but has no deadline."""
        try:
            await self.socket.wait_writable()
        except OSError as error:
            raise trio.BrokenResourceError(f"cannot write: {error}") from error

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Up to `max_bytes` bytes (64 KiB when left out), empty at the peer's end.

        Raises:
            trio.BrokenResourceError: the connection is broken.
            trio.ClosedResourceError: our side was closed.
        """
        size = max_bytes or 64 * 1024
        try:
            # What a peer says is seldom there before it is waited for: Trio's own recv looks, waits, looks again.
            while _HAS_PLAIN_DESCRIPTORS and self.socket.fileno() >= 0:
                await trio.lowlevel.wait_readable(self.socket)
                with contextlib.suppress(BlockingIOError):
                    return os.read(self.socket.fileno(), size)
            return await self.socket.recv(size)
        except OSError as error:
            raise trio.BrokenResourceError(f"cannot read: {error}") from error

    async def send_eof(self) -> None:
        """`half_close`, as Trio's streams have it."""
        self.half_close()
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """Close both ways, behind what was written."""
        self.socket.close()
        await trio.lowlevel.checkpoint()

    def half_close(self) -> None:
        """Say that nothing more will come, behind what was written. Reading goes on. Never blocks, never raises."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(trio.socket.SHUT_WR)

    def abort(self) -> None:
        """End the connection with a reset, dropping what is unsent; whoever waits on it wakes. Never raises."""
        with contextlib.suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.socket.close()

    def _note_progress(self) -> None:
        if self.on_progress is not None:
            self.on_progress()

    def _unacknowledged(self) -> int:
        """Bytes of ours that the peer's kernel has not acknowledged."""
        if fcntl is None or termios is None:
            return 0
        count = array.array("i", [0])
        fcntl.ioctl(self.socket.fileno(), termios.TIOCOUTQ, count)
        return count[0]
