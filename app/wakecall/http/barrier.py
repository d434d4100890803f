"""The barrier between peers and the process: Hypercorn's TCP server, so that no peer can end it, hold it or starve it.

Stock Hypercorn on Trio lets the exception of one connection out into the server's nursery, writes to a peer that reads
nothing for ever, closes early answers with a reset, and keeps idle connections by a task per request. `Connection`
takes the place of its `TCPServer` (a private name, hence the exact pin):

* whatever goes wrong in a connection ends that connection, in one line of the log;
* one scope, `_patience`, holds every deadline of a connection, by what it waits for: idle, a head, the end's drain.
  While a request is being served there is none: those deadlines are the app's;
* writes are shielded, as the app's cancellation must not tear a chunk in two, but end with the peer's progress;
* an end while the peer still sends is a half-close and a short drain: a reset would overtake our answer.

The set of live connections is the `Barrier`, one per server, at `config.wakecall`.
"""

from __future__ import annotations

import enum
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

import hypercorn.trio.run
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.typing import ConnectionState
from hypercorn.utils import parse_socket_addr

from ..errors import RequestTimeout, Unavailable, WakecallError
from ..faults import place_of
from .cors import Cors
from .protocol import AppTasks, Http11
from .refusal import error_body, error_headers, pick_request_id
from .tls import Certificates
from .transport import PeerStream

__all__ = ["Barrier", "BarrierSettings", "Connection", "barrier_of", "install_barrier"]

logger = logging.getLogger("wakecall.server")

_MAX_RECEIVE_BYTES = 64 * 1024
_MAX_PIPELINED_BYTES = 64 * 1024
# One in so many connections is for publishers, operators and probes alone.
_SHARE_OF_OTHERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BarrierSettings:
    """What one connection may do.

    Args:
        peer_stall_s: seconds in which a peer that is written to must take a byte.
        keep_alive_s: seconds that a connection may be idle between requests.
        head_s: seconds from a head's first byte to its last; over TLS also for the handshake.
        close_drain_s: seconds, and
        close_drain_bytes: bytes, that are read and dropped after an answer that came before its request's end.
        max_header_bytes: a request's head, in all.
        max_headers: header lines of a request.
        max_connections: connections at a time; None for no bound but the descriptors'. Beyond it, who has been idle for
            the longest makes room; if nobody is idle, the newcomer is told that there is none.
        max_turned_away: how many may be told so at one time; the rest of a flood is reset.
        grace_s: seconds that requests may go on once the server is told to stop.
    """

    peer_stall_s: float = 60.0
    keep_alive_s: float = 75.0
    head_s: float = 60.0
    close_drain_s: float = 1.0
    close_drain_bytes: int = 1 << 20
    max_header_bytes: int = 64 * 1024
    max_headers: int = 100
    max_connections: int | None = None
    max_turned_away: int = 64
    grace_s: float = 2.0


class Barrier:
    """What the connections of one server share: their settings, the set of them, and whether they are to end.

    Args:
        settings: the defaults when left out.
        certificates: to speak TLS with; None: cleartext.
        cors: what browsers are told with a refusal; None: nothing.
    """

    def __init__(
        self,
        settings: BarrierSettings | None = None,
        certificates: Certificates | None = None,
        cors: Cors | None = None,
    ) -> None:
        self.settings = settings or BarrierSettings()
        self.certificates = certificates
        self.cors = cors
        self.connections: set[Connection] = set()
        # Those without a request under way, the longest so first: they have their last answer, or ask nothing.
        self.leaving: OrderedDict[Connection, None] = OrderedDict()
        self.idle: OrderedDict[Connection, None] = OrderedDict()
        self.turned_away = 0
        self.closing = False

    def make_room(self) -> bool:
        """Whether one more connection may come. If there are too many, one that asks nothing ends, the longest so first."""
        bound = self.settings.max_connections
        if bound is None or len(self.connections) < bound:
            return True
        for dispensable in (self.leaving, self.idle):
            if dispensable:
                connection, _ = dispensable.popitem(last=False)
                connection.make_way()
                return True
        return False

    def objection_to(self, path: str) -> WakecallError | None:
        """Why a request for this path is not served now, or None.

        The last eighth of the connections is not for clients: they wait for answers, and publishers, who bring those on
        connections of their own, must not find that the waiting have taken all the room.
        """
        bound = self.settings.max_connections
        if bound is None or not path.startswith("/v1/"):
            return None
        busy = len(self.connections) - len(self.idle) - len(self.leaving)
        return TooManyConnections() if busy > bound - bound // _SHARE_OF_OTHERS else None

    def start_closing(self) -> None:
        """End idle connections now, and every other one with the answer that it is busy with."""
        self.closing = True
        for connection in list(self.connections):
            connection.end_if_idle()

    def abort_all(self) -> None:
        """Reset every live connection at once: stuck writes and reads end."""
        for connection in list(self.connections):
            connection.abort()


class TooManyConnections(Unavailable):
    """The server has as many connections as it may have."""

    code = "too_many_connections"
    default_message = "This server has as many connections as it takes."
    default_retry_after_s = 1.0


def install_barrier() -> None:
    """Make Hypercorn's Trio worker use `Connection`. Doing it twice does nothing more."""
    setattr(hypercorn.trio.run, "TCPServer", Connection)  # noqa: B010 - not an exported name, and that is the point


def barrier_of(config: Config) -> Barrier:
    """The barrier of the server that runs with this config; one with the defaults if it has none yet."""
    barrier = getattr(config, "wakecall", None)
    if barrier is None:
        barrier = Barrier()
        config.wakecall = barrier  # type: ignore[attr-defined]
    assert isinstance(barrier, Barrier)
    return barrier


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
        self._barrier = barrier_of(config)
        self._settings = self._barrier.settings
        self._patience = trio.CancelScope(deadline=trio.current_time() + self._settings.keep_alive_s)
        self._waits = _Waits.FOR_A_REQUEST
        self._pause: trio.CancelScope | None = None
        self._is_greeted = False
        self._makes_way = False
        self._dropped_bytes = 0

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
            with trio.CancelScope(shield=True):
                async with self.send_lock:
                    await self.stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            if not self._is_over:
                await self._http.handle(Closed())
        # An app that does nothing but send can be cancelled only here; after the write, lest one is left out.
        await trio.lowlevel.checkpoint_if_cancelled()

    # The connection's own task -----------------------------------------------------------------------------------

    async def _run(self) -> None:
        raw: Any = self.stream
        self._peer = PeerStream(raw.socket, self._settings.peer_stall_s)
        self.stream = self._peer  # type: ignore[assignment]
        certificates = self._barrier.certificates
        is_tls = certificates is not None
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
