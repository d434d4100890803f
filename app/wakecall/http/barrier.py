"""The barrier between peers and the process: Hypercorn's TCP server, so that no peer can end it, hold it or starve it.

Stock Hypercorn on Trio lets the exception of one connection out into the server's nursery, writes to a peer that reads
nothing for ever, closes early answers with a reset, and keeps idle connections by a task per request. `Connection`
takes the place of its `TCPServer` (a private name, hence the exact pin):

* whatever goes wrong in a connection ends that connection, in one line of the log;
* one scope, `_patience`, holds every deadline of a connection, by what it waits for: idle, a head, the end's drain.
  While a request is being served there is none: those deadlines are the app's;
* writes are shielded, as the app's cancellation must not tear a chunk in two, but end with the peer's progress;
* an end while the peer still sends is a half-close and a short drain: a reset would overtake our answer.

The set of live connections is the `Barrier` (`room`), one per server, at `config.wakecall`.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable
from math import inf
from typing import Any

import hypercorn.trio.run
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.typing import ConnectionState
from hypercorn.utils import parse_socket_addr

from ..errors import RequestTimeout
from ..faults import place_of
from .protocol import AppTasks, Http11
from .refusal import error_body, error_headers, pick_request_id
from .room import Barrier, BarrierSettings, TooManyConnections, barrier_of
from .tls import Certificates
from .transport import PeerStream

__all__ = ["Barrier", "BarrierSettings", "Connection", "barrier_of", "install_barrier"]

logger = logging.getLogger("wakecall.server")

_MAX_RECEIVE_BYTES = 64 * 1024
_MAX_PIPELINED_BYTES = 64 * 1024
_WRITES_PER_TURN = 16


def install_barrier() -> None:
    """Make Hypercorn's Trio worker use `Connection`. Doing it twice does nothing more."""
    setattr(hypercorn.trio.run, "TCPServer", Connection)  # noqa: B010 - not an exported name, and that is the point


class _Waits(enum.Enum):
    FOR_A_REQUEST = enum.auto()
    FOR_A_HEAD = enum.auto()
    FOR_THE_APP = enum.auto()
    FOR_THE_PEERS_END = enum.auto()


class Connection(TCPServer):
    """One accepted connection. Made and awaited by Hypercorn's worker; ended by itself, its peer, or its `Barrier`."""

    _http: Http11
    _peer: PeerStream

    def __init__(self, app: Any, config: Config, context: Any, state: Any, stream: Any) -> None:
        super().__init__(app, config, context, state, stream)
        del self.idle_task  # `_patience` stands for it
        self._barrier = barrier_of(config)
        self._settings = self._barrier.settings
        self._patience = trio.CancelScope(deadline=trio.current_time() + self._settings.keep_alive_s)
        self._waits = _Waits.FOR_A_REQUEST
        self._pause: trio.CancelScope | None = None
        self._is_plain = False
        self._is_greeted = False
        self._is_known = False
        self._makes_way = False
        self._dropped_bytes = 0
        self._writes_until_a_turn = _WRITES_PER_TURN

    async def run(self) -> None:
        """Serve the connection to its end. Nothing that goes wrong in it leaves this method, cancellation excepted."""
        try:
            await self._run()
        except* Exception as group:
            logger.error("a connection was ended by an error of ours: %s", place_of(group))

    # What the app and the server do to it. None of these blocks. ---------------------------------------------------

    @property
    def request_id(self) -> bytes:
        """The id of the request that is being served."""
        return self._http.request_id

    def cut(self) -> None:
        """End the connection behind what was written: the peer gets all of that, then sees that more is missing."""
        self._linger()

    def abort(self) -> None:
        """Reset the connection. Whoever reads or writes wakes, and the app gets its `http.disconnect`."""
        self._peer.abort()

    def on_progress(self, callback: Callable[[], None] | None) -> None:
        """Have `callback` called whenever the peer takes something of a write that waits for it; None: nothing any more."""
        self._peer.on_progress = callback

    def vouch(self) -> None:
        """The peer has shown that he may call: he is no stranger, and his connection is not taken from him for others."""
        self._is_known = True
        self._peer.patience_s = inf

    def end_if_idle(self) -> None:
        """End the connection if no request is under way."""
        if self._waits in {_Waits.FOR_A_REQUEST, _Waits.FOR_A_HEAD}:
            self._patience.cancel()

    def make_way(self) -> None:
        """End the connection, which has no request under way, in favour of a new one."""
        if self._is_greeted and self._barrier.turned_away < self._settings.max_turned_away:
            self._makes_way = True
            self._barrier.turned_away += 1
            self._patience.cancel()
        else:
            # Words take a moment, and a descriptor for so long: of a flood only so many are told.
            self._peer.abort()

    async def send_continue(self) -> None:
        """Ask a peer that sent `Expect: 100-continue` for its body."""
        await self._http.send_continue()

    # What Hypercorn's protocol and stream call --------------------------------------------------------------------

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, RawData):
            await self._write(event.data)
        elif isinstance(event, Closed):
            if self._barrier.closing and not self._http.is_uploading:
                await self._close()
            else:
                self._linger()
            await self._http.handle(Closed())
        elif isinstance(event, Updated):
            if not event.idle:
                self._wait(_Waits.FOR_THE_APP, inf)
            elif self._waits is _Waits.FOR_THE_APP:
                self._wait(_Waits.FOR_A_REQUEST, self._settings.keep_alive_s)
                self._end_pause()

    @property
    def _is_over(self) -> bool:
        return self._waits is _Waits.FOR_THE_PEERS_END

    async def _write(self, data: bytes) -> None:
        if self._is_over:
            await trio.lowlevel.checkpoint()
            return
        try:
            sent = 0
            if self._is_plain and not self.send_lock.locked():
                # Nearly always all of it: neither lock nor scopes nor a turn of the loop are worth their time then.
                sent = self._peer.send_now(data)
            if sent < len(data):
                await self._write_rest(memoryview(data)[sent:])
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            if not self._is_over:
                await self._http.handle(Closed())
        self._writes_until_a_turn -= 1
        if not self._writes_until_a_turn:
            # An app that does nothing but send has taken the others' turns for long enough.
            self._writes_until_a_turn = _WRITES_PER_TURN
            await trio.lowlevel.checkpoint()
        # An app that does nothing but send can be cancelled only here; after the write, lest one is left out.
        await trio.lowlevel.checkpoint_if_cancelled()

    async def _write_rest(self, data: memoryview) -> None:
        if not self._is_known:
            self._barrier.unread[self] = None
        try:
            with trio.CancelScope(shield=True):
                async with self.send_lock:  # had at once where some went out before: nothing comes in between
                    await self.stream.send_all(data)
        finally:
            self._barrier.unread.pop(self, None)

    # The connection's own task -----------------------------------------------------------------------------------

    async def _run(self) -> None:
        raw: Any = self.stream
        self._peer = PeerStream(raw.socket, self._settings.peer_stall_s)
        self._peer.patience_s = self._settings.stranger_s
        self.stream = self._peer  # type: ignore[assignment]
        certificates = self._barrier.certificates
        is_tls = certificates is not None
        self._is_plain = not is_tls
        if not self._barrier.make_room():
            await self._turn_away(is_tls)
            return
        self._barrier.connections.add(self)
        self._barrier.idle[self] = None
        try:
            sock = self._peer.socket
            client = parse_socket_addr(sock.family, sock.getpeername())
            server = parse_socket_addr(sock.family, sock.getsockname())
            if certificates is not None and not await self._shake_hands(certificates):
                return
            async with AppTasks(self) as tasks:
                self._http = Http11(
                    self.app,
                    self.config,
                    self.context,
                    tasks,
                    ConnectionState(self.state),
                    is_tls,
                    client,
                    server,
                    self.protocol_send,
                    max_header_bytes=self._settings.max_header_bytes,
                    max_headers=self._settings.max_headers,
                    cors=self._barrier.cors,
                    is_closing=lambda: self._barrier.closing,
                    objection_to=self._barrier.objection_to,
                )
                await self._read()
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the peer went before it could be told from nobody, or speaks no TLS
        finally:
            self._barrier.connections.discard(self)
            self._barrier.idle.pop(self, None)
            self._barrier.leaving.pop(self, None)
            self._barrier.unread.pop(self, None)
            if self._makes_way:
                self._barrier.turned_away -= 1
            self._peer.socket.close()

    async def _shake_hands(self, certificates: Certificates) -> bool:
        """Put TLS between the peer and us. False: it was given up, for time or because the server ends."""
        tls = trio.SSLStream(self._peer, certificates.context, server_side=True)
        self._patience.deadline = trio.current_time() + self._settings.head_s
        if self._barrier.closing:
            self._patience.cancel()
        with self._patience as patience:
            await tls.do_handshake()
        self._patience = trio.CancelScope(deadline=trio.current_time() + self._settings.keep_alive_s)
        self.stream = tls  # type: ignore[assignment]
        return not patience.cancelled_caught

    async def _read(self) -> None:
        self._is_greeted = True
        if self._barrier.closing:
            self._patience.cancel()
        with self._patience:
            await self._read_to_the_end()
        if self._makes_way:
            await self._tell_why()
        elif self._patience.cancelled_caught and self._waits is _Waits.FOR_A_HEAD and not self._barrier.closing:
            await self._http.refuse(RequestTimeout("The request's head did not arrive in time."))
        # From here on nothing is read. The app learns it, and a write of its that is stuck ends now.
        await self._http.handle(Closed())
        await self._close()

    async def _read_to_the_end(self) -> None:
        ahead = 0
        while True:
            try:
                if self._http.paused and not self._is_over:
                    data = await self._read_ahead(ahead)
                else:
                    data = bytes(await self.stream.receive_some(_MAX_RECEIVE_BYTES))
            except (trio.ClosedResourceError, trio.BrokenResourceError):
                return
            if self._makes_way and not self._is_over:
                # It came in the same instant. To begin with it now would be to cut it.
                if data:
                    self._wait(_Waits.FOR_A_HEAD, inf)
                return
            if self._is_over:
                self._dropped_bytes += len(data or b"")
                if data == b"" or self._dropped_bytes >= self._settings.close_drain_bytes:
                    return
            elif data is None:
                await self._http.handle_buffered()
            else:
                if self._waits is _Waits.FOR_A_REQUEST and data.strip(b"\r\n"):
                    self._wait(_Waits.FOR_A_HEAD, self._settings.head_s)
                await self._http.handle(RawData(data))
                if data == b"":
                    return
                ahead = ahead + len(data) if self._http.paused else 0

    async def _tell_why(self) -> None:
        """Answer a peer whose connection ends for a newcomer's, if there is anything to answer."""
        is_asking = self._waits is _Waits.FOR_A_HEAD
        if self._waits is _Waits.FOR_A_REQUEST and self._peer.socket.is_readable():
            try:
                with trio.move_on_after(self._settings.close_drain_s):  # over TLS, half a record may be all there is
                    is_asking = bool(await self.stream.receive_some(_MAX_RECEIVE_BYTES))
            except (trio.ClosedResourceError, trio.BrokenResourceError):
                return
        if is_asking:
            await self._http.refuse(TooManyConnections())

    async def _read_ahead(self, ahead: int) -> bytes | None:
        """Read while a pipelined request waits, to see the peer's end; None as soon as that request's turn has come."""
        with trio.CancelScope() as self._pause:
            if ahead > _MAX_PIPELINED_BYTES:
                await trio.sleep_forever()
            return bytes(await self.stream.receive_some(_MAX_RECEIVE_BYTES))
        return None

    async def _turn_away(self, is_tls: bool) -> None:
        """Say in a few words that there is no room, if that can be said cheaply."""
        if is_tls or self._barrier.turned_away >= self._settings.max_turned_away:
            self._peer.abort()
            return
        self._barrier.turned_away += 1
        try:
            error = TooManyConnections()
            body = error_body(error, "")
            lines = [b"HTTP/1.1 503 Service Unavailable", b"connection: close"]
            lines += [name + b": " + value for name, value in error_headers(error, body, "", pick_request_id(()))]
            with trio.move_on_after(self._settings.close_drain_s):
                await self._peer.send_all(b"\r\n".join(lines) + b"\r\n\r\n" + body)
                self._peer.half_close()
                for _ in range(self._settings.close_drain_bytes // _MAX_RECEIVE_BYTES):
                    if not await self._peer.receive_some(_MAX_RECEIVE_BYTES):
                        break
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self._barrier.turned_away -= 1
            self._peer.socket.close()

    # Its state -------------------------------------------------------------------------------------------------------

    def _wait(self, what: _Waits, seconds: float) -> None:
        self._waits = what
        self._patience.deadline = trio.current_time() + seconds
        # A head that has begun does not make a connection younger: it may trickle in for ever.
        if what is _Waits.FOR_A_REQUEST:
            self._barrier.idle[self] = None
        elif what is not _Waits.FOR_A_HEAD:
            self._barrier.idle.pop(self, None)
            if what is not _Waits.FOR_THE_APP:
                self._barrier.unread.pop(self, None)
                self._barrier.leaving[self] = None

    def _linger(self) -> None:
        """Half-close, then drain: the reader drops what comes, for a while, so that no reset overtakes our answer."""
        if not self._is_over:
            self._wait(_Waits.FOR_THE_PEERS_END, self._settings.close_drain_s)
            self._peer.half_close()
            self._end_pause()

    def _end_pause(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None

    async def _close(self) -> None:
        """Close behind what was written. Over TLS says so first (close_notify), if the peer takes it at once."""
        # A write that is stuck would have to end first, and it is this close that ends it.
        if isinstance(self.stream, trio.SSLStream) and not self.send_lock.locked():
            with trio.move_on_after(self._settings.close_drain_s):
                await self.stream.aclose()
        self._peer.socket.close()
