"""HTTP/1.1 and nothing else: Hypercorn's h11 protocol, with what it lets through refused and what it forgets added.

One request at a time per connection. The reader task parses (`handle`), the app's task answers (`stream_send`); they
meet in an `Inbox`. A pipelined request waits in h11's buffer until the one before is answered; the reader reads on
meanwhile, for it is also what notices the peer's end.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import unquote

import h11
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Body, EndBody, Request, Response, StreamClosed
from hypercorn.protocol.events import Event as StreamEvent
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.trio.task_group import TaskGroup, _handle

from ..errors import InvalidRequest, MethodNotAllowed, RequestTooLarge, WakecallError
from .cors import Cors
from .refusal import Headers, error_body, error_headers, pick_request_id

__all__ = ["PATHS_FOR_PROBES", "AppTasks", "Http11", "Inbox", "objection_to"]

#: Where HTTP/1.0 is good enough: old load balancers probe with it.
PATHS_FOR_PROBES = frozenset({b"/healthz", b"/readyz", b"/metrics"})

#: How many chunks of a body are joined before the loop has its turn again.
_MOST_JOINED = 1000

#: What is remembered of a head that is not understood, and what it asked for.
_MAX_HEAD_SHOWN = 4096
_TARGET = re.compile(rb"[A-Z-]{1,32} (/[!-~]*?)[ ?#]")

_METHOD = re.compile(rb"[A-Z][A-Z-]*")
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)
# RFC 9112, 3.2 with RFC 3986's reg-name (its labels as long as RFC 1035's, for what finds a route by them refuses others),
# IPv4 and bracketed IPv6; no userinfo.
_LABEL = rb"[A-Za-z0-9_~%!$&'()*+,;=-]{1,63}"
_HOST = re.compile(rb"(?:(?:%b(?:\.%b)*\.?)?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?" % (_LABEL, _LABEL))


def objection_to(request: h11.Request, max_header_bytes: int, max_headers: int) -> WakecallError | None:
    """Why this request is not served, or None.

    1. Another version than HTTP/1.1 (and HTTP/1.0 for probes): 505, RFC 9110 section 15.6.6.
    2. A method that is none, or CONNECT: 405.
    3. More headers than allowed: 431, RFC 6585 section 5. h11 counts only while a head is incomplete.
    4. A body with a Content-Length and a Transfer-Encoding: 400. Whoever forwards such a request may have found another
       end of it (RFC 9112, 6.1), so the connection is closed too.
    5. An upgrade to HTTP/2 or WebSocket: 400. A server may ignore an upgrade (RFC 9110, 7.8), but one that waits for a
       101 deserves an answer (RFC 6455, 4.2.2: any HTTP error). Not 426, which would ask the peer to upgrade.
    6. A target that is neither a path nor an http URL (nor `OPTIONS *`): 400.
    7. A Host that is none: 400, RFC 9112 section 3.2.
    """
    path = request.target.partition(b"?")[0]
    if request.http_version == b"1.0":
        if path not in PATHS_FOR_PROBES:
            return InvalidRequest(
                "HTTP/1.0 is not served here: a cut answer could not be told from a whole one. Behind nginx, set "
                "`proxy_http_version 1.1`.",
                status=505,
            )
    elif not request.http_version.startswith(b"1."):
        return InvalidRequest("Only HTTP/1.1 is served here, not HTTP/2: send HTTP/1.1.", status=505)
    if request.method == b"CONNECT":
        return MethodNotAllowed("This is not a proxy: CONNECT is not served here.")
    if not _METHOD.fullmatch(request.method):
        return MethodNotAllowed("This is not a method.")
    headers = request.headers
    if len(headers) > max_headers:
        return RequestTooLarge(f"The request has more than {max_headers} headers.", status=431)
    if len(request.target) + sum(len(name) + len(value) + 4 for name, value in headers) > max_header_bytes:
        return RequestTooLarge(f"The request's head is larger than {max_header_bytes} bytes.", status=431)
    if {b"content-length", b"transfer-encoding"} <= {name for name, _ in headers}:
        return InvalidRequest("A request has a Content-Length or a Transfer-Encoding, not both.")
    for name, value in headers:
        if name == b"upgrade":
            wanted = {token.strip().partition(b"/")[0] for token in value.lower().split(b",")}
            if b"websocket" in wanted:
                return InvalidRequest("WebSockets are not served here: use plain HTTP/1.1 and event streams.")
            if b"h2c" in wanted or b"h2" in wanted:
                return InvalidRequest("HTTP/2 is not served here: send HTTP/1.1 without an Upgrade header.")
        elif name == b"host" and not _HOST.fullmatch(value):
            return InvalidRequest("The Host header is not valid.")
    if not request.target.startswith(b"/") and not (request.method == b"OPTIONS" and request.target == b"*"):
        absolute = _ABSOLUTE.fullmatch(request.target)
        if absolute is None or not absolute[1] or not _HOST.fullmatch(absolute[1]):
            return InvalidRequest("The request's target is neither a path nor an http URL.")
    return None


def _origin_form(request: h11.Request) -> tuple[bytes, Headers]:
    """Target and headers as if the target had been a path: an http URL's authority takes the place of Host.

    RFC 9112 section 3.2.2 has it so, and whoever checks Host must not be told another one than the target's.
    """
    headers: Headers = list(request.headers)
    if request.target.startswith(b"/") or (absolute := _ABSOLUTE.fullmatch(request.target)) is None:
        return request.target, headers
    headers = [(b"host", absolute[1]), *(pair for pair in headers if pair[0] != b"host")]
    path = absolute[2].partition(b"#")[0]
    return path if path.startswith(b"/") else b"/" + path, headers


def _path_of(target: bytes) -> str:
    """The path as the app will see it: what is decided by it here must not be another by another spelling."""
    return unquote(target.partition(b"?")[0].decode("ascii"))


class Inbox:
    """What the connection has for its app: one piece of the body at most, so that an app that stands still is felt.

    Hypercorn's own queue blocks whoever puts the end into a full one, the app's last `send` included. Here only a piece
    of the body ever waits, and the end frees it.

    Args:
        before_first: awaited when the app asks for the first time.
    """

    __slots__ = ("_before_first", "_full", "_messages", "_news", "_on_end", "_over", "_room")

    def __init__(self, before_first: Callable[[], Awaitable[None]]) -> None:
        self._messages: list[Any] = []
        self._before_first: Callable[[], Awaitable[None]] | None = before_first
        self._over = self._full = False
        self._on_end: Callable[[], None] | None = None
        self._news: trio.Event | None = None
        self._room: trio.Event | None = None

    async def put(self, message: Any) -> None:
        """Hand over one ASGI message; a body's piece waits until the one before was taken. After the end: dropped."""
        if message["type"] == "http.disconnect":
            self._over = True
            self._set_room()
            if self._on_end is not None:
                self._on_end()
        elif message["body"]:
            while self._full and not self._over:
                self._room = trio.Event()
                await self._room.wait()
            if self._over:
                return
            self._full = True
        elif self._over:
            return
        self._messages.append(message)
        if self._news is not None:
            self._news.set()

    def on_end(self, callback: Callable[[], None]) -> None:
        """Have `callback` called, from the task that reads, once the end is here: at once if it is. It must not block."""
        self._on_end = callback
        if self._over:
            callback()

    async def receive(self) -> Any:
        """ASGI's `receive`: the next message; `http.disconnect` again and again after the end."""
        if self._before_first is not None:
            before_first, self._before_first = self._before_first, None
            await before_first()
        while not self._messages:
            if self._over:
                return {"type": "http.disconnect"}
            self._news = trio.Event()
            await self._news.wait()
        message = self._messages.pop(0)
        if message.get("body"):
            self._full = False
            self._set_room()
        return message

    def _set_room(self) -> None:
        if self._room is not None:
            self._room.set()


class AppTasks(TaskGroup):
    """The nursery of one connection. Starts the app with an `Inbox`, and with the connection itself in the scope.

    Args:
        connection: `scope["extensions"]["wakecall.connection"]` of every request, by which the guard ends it.
    """

    def __init__(self, connection: Any) -> None:
        super().__init__()
        self._connection = connection

    async def spawn_app(self, app: Any, config: Config, scope: Any, send: Any) -> Any:
        inbox = Inbox(self._connection.send_continue)
        scope["extensions"]["wakecall.connection"] = self._connection
        scope["extensions"]["wakecall.on_end"] = inbox.on_end
        assert self._nursery is not None
        self._nursery.start_soon(
            _handle, app, config, scope, inbox.receive, send, trio.to_thread.run_sync, trio.from_thread.run
        )
        return inbox.put


class Http11(H11Protocol):
    """One connection's HTTP/1.1.

    Args:
        max_header_bytes, max_headers: of a request's head.
        is_closing: whether the server is on its way out, so that no connection is kept alive.
        objection_to: what there is against serving a path just now.
        cors: what browsers are told with a refusal.
        others: what `H11Protocol` takes.
    """

    connection: h11.Connection

    def __init__(
        self,
        *others: Any,
        max_header_bytes: int,
        max_headers: int,
        is_closing: Callable[[], bool],
        objection_to: Callable[[str], WakecallError | None],
        cors: Cors | None = None,
    ) -> None:
        super().__init__(*others)
        # Hypercorn's own way to hold a pipelined request back: unused, and half a kilobyte of an idle connection.
        del self.can_read
        self._max_header_bytes = max_header_bytes
        self._max_headers = max_headers
        self._is_closing = is_closing
        self._objection_to = objection_to
        self._cors = cors
        self._marks: Headers = []
        self._corked = b""
        self._is_mute = False
        self._method = b""
        self._path = ""
        self._head = b""
        self.request_id = b""
        self.paused = False

    @property
    def is_uploading(self) -> bool:
        """Whether more of the peer's request is to come, or came and could not be understood."""
        return self.connection.their_state in {h11.SEND_BODY, h11.ERROR}

    async def send_continue(self) -> None:
        """Answer `Expect: 100-continue`, if the peer waits for it: now that somebody asks for the body."""
        if self.connection.they_are_waiting_for_100_continue:
            await self._send_h11_event(h11.InformationalResponse(status_code=100, headers=[]))

    async def refuse(self, error: WakecallError) -> None:
        """Answer `error` as far as an answer can still be sent, and close."""
        if self.connection.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            body = error_body(error, self._path)
            headers = [
                *error_headers(error, body, self._path, self.request_id or pick_request_id(())),
                *self._marks,
                (b"connection", b"close"),
                *self.config.response_headers("h11"),
            ]
            if error.status == 405:
                headers.append((b"allow", b"GET, HEAD, POST, PUT, DELETE, OPTIONS"))
            head = self._encode(h11.Response(status_code=error.status, headers=headers))
            if head:
                shown = b"" if self._method == b"HEAD" else self._encode(h11.Data(data=body))
                await self.send(RawData(head + shown + self._encode(h11.EndOfMessage())))
        await self.send(Closed())

    async def stream_send(self, event: StreamEvent) -> None:
        """Write what the app's stream says.

        A head with a Content-Length waits for the first of the body: one write, one packet. Any other head leaves at
        once, for its body may take its time.
        """
        if isinstance(event, Response) and self.connection.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            # Hypercorn's own 500: the app was cancelled while its head was being written. That head is out, so nothing more
            # may be: the end of a second answer would pass for the end of the first.
            self._is_mute = True
        elif self._is_mute and not isinstance(event, StreamClosed):
            return
        elif isinstance(event, Response):
            headers = [*event.headers, *self.config.response_headers("h11")]
            if (
                self.is_uploading
                or self._is_closing()
                or self.keep_alive_requests >= self.config.keep_alive_max_requests
            ):
                headers.append((b"connection", b"close"))
            head = self._encode(h11.Response(headers=headers, status_code=event.status_code))
            if any(name.lower() == b"content-length" for name, _ in event.headers):
                self._corked = head
            elif head:
                await self.send(RawData(head))
        elif isinstance(event, Body):
            await self._write(self._encode(h11.Data(data=event.data)))
        elif isinstance(event, EndBody):
            await self._write(self._encode(h11.EndOfMessage()))
        elif isinstance(event, StreamClosed):
            await self._maybe_recycle()

    async def _write(self, data: bytes) -> None:
        data, self._corked = self._corked + data, b""
        if data:
            await self.send(RawData(data))

    def _encode(self, event: Any) -> bytes:
        """The bytes of one event of ours; none if the peer broke the protocol, after which nothing can be said."""
        try:
            return self.connection.send(event) or b""
        except h11.LocalProtocolError:
            if self.connection.their_state is not h11.ERROR:
                raise
            return b""

    async def handle(self, event: Event) -> None:
        """Take what arrived."""
        if isinstance(event, RawData) and self.connection.their_state is h11.IDLE:
            if not self._head and event.data[:1] in (b"\r", b"\n"):
                # RFC 9112, 2.2: an empty line before a request is ignored.
                event = RawData(event.data.lstrip(b"\r\n"))
                if not event.data:
                    return
            if len(self._head) < _MAX_HEAD_SHOWN:
                self._head += event.data[:_MAX_HEAD_SHOWN]
        await super().handle(event)

    async def handle_buffered(self) -> None:
        """Go on with what arrived while the request before it was being answered."""
        await self._handle_events()

    async def _handle_events(self) -> None:
        self.paused = False
        # Chunks that arrived together go on together: six bytes make one, and one by one each would cost the app a turn. No
        # more than was read at a time ever gathers here.
        body, joined = bytearray(), 0
        while True:
            objection = None
            try:
                event = self.connection.next_event()
            except h11.RemoteProtocolError as error:
                objection = error
            else:
                if isinstance(event, h11.Data):
                    body += event.data
                    joined += 1
                    if joined < _MOST_JOINED:
                        continue
            if body and self.stream is not None:
                await self.stream.handle(Body(stream_id=STREAM_ID, data=bytes(body)))
                body.clear()
                joined = 0
            if objection is not None:
                if not self._path and (target := _TARGET.match(self._head)):
                    self._path = _path_of(target[1])
                await self.refuse(_as_error(objection))
                return
            if isinstance(event, h11.Request):
                await self.send(Updated(idle=False))
                await self._open(event)
            elif event is h11.PAUSED:
                self.paused = True
                return
            elif event is h11.NEED_DATA or isinstance(event, h11.ConnectionClosed) or self.stream is None:
                return
            elif isinstance(event, h11.EndOfMessage):
                await self.stream.handle(EndBody(stream_id=STREAM_ID))

    async def _open(self, request: h11.Request) -> None:
        self._head = b""
        self.request_id = pick_request_id(request.headers)
        self._method = request.method
        target, headers = _origin_form(request)
        self._path = _path_of(target)
        if self._cors is not None:
            self._marks = self._cors.marks(self._path, request.headers)
        objection = objection_to(request, self._max_header_bytes, self._max_headers)
        if objection is not None:
            await self.refuse(objection)
            return
        objection = self._objection_to(self._path)
        if objection is not None:
            await self.refuse(objection)
            return
        self.stream = HTTPStream(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.ssl,
            self.client,
            self.server,
            self.stream_send,
            STREAM_ID,
        )
        self.keep_alive_requests += 1
        await self.stream.handle(
            Request(
                stream_id=STREAM_ID,
                headers=headers,
                http_version=request.http_version.decode("ascii"),
                method=request.method.decode("ascii"),
                raw_path=target,
                state=self.connection_state,
            )
        )

    async def _maybe_recycle(self) -> None:
        # Whatever the app left unfinished stays so: a head that was never written, a body without its end.
        self._corked = b""
        await self._close_stream()
        both_done = self.connection.our_state is h11.DONE and self.connection.their_state is h11.DONE
        if both_done and not self._is_closing():
            self._start_next_cycle()
            self.request_id, self._method, self._path, self._marks = b"", b"", "", []
            await self.send(Updated(idle=True))
        else:
            await self.send(Closed())

    def _start_next_cycle(self) -> None:
        ahead, at_end = self.connection.trailing_data
        if ahead[:1] not in (b"\r", b"\n"):
            self.connection.start_next_cycle()
            # A head that has begun: the empty line that ends it may come alone, and is not one before a request.
            self._head = ahead[:_MAX_HEAD_SHOWN]
            return
        # h11 has no way to take bytes back: an empty line between two requests is left behind with the connection's state.
        self.connection = h11.Connection(h11.SERVER, max_incomplete_event_size=self.config.h11_max_incomplete_size)
        self._head = ahead.lstrip(b"\r\n")
        if self._head:
            self.connection.receive_data(self._head)
        if at_end:
            self.connection.receive_data(b"")
        self._head = self._head[:_MAX_HEAD_SHOWN]


def _as_error(error: h11.RemoteProtocolError) -> WakecallError:
    """What to say about bytes that are not HTTP/1.1; never the bytes themselves."""
    if error.error_status_hint == 431:
        return RequestTooLarge("The request's head, or a line of its body's framing, is too long.", status=431)
    if error.error_status_hint == 501:
        return InvalidRequest("This Transfer-Encoding is not served here: use `chunked`.", status=501)
    return InvalidRequest("This is not a valid HTTP/1.1 request.")
