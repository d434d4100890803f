"""The QuartTrio app over an open broker: routes, the guard around them, and every error in one shape."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable
from quart import Quart, request
from quart.sessions import NullSession, SessionInterface
from quart.wrappers import Request, Response
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as WerkzeugResponse

from ..broker import Broker
from ..errors import NotFound, WakecallError
from .admin import add_admin_routes
from .answers import Answer, StreamBody, error_answer, no_content
from .auth import refuse_foreign, refuse_other_origins
from .client import add_client_routes
from .cors import Cors
from .direct import Direct, has_hooks
from .errors import from_http_exception
from .guard import BodyBudget, Guard, GuardSettings, current_exchange_of
from .naming import add_naming_routes
from .ops import add_ops_routes
from .publisher import add_publisher_routes
from .raw import RawRequest
from .results import add_results_route
from .routes import Routes
from .usage import add_usage_routes

__all__ = ["create_app"]


def create_app(
    broker: Broker, *, loopback_only: bool = True, cors: Iterable[str] | Cors = (), body_s: float = 900.0
) -> QuartTrio:
    """An app over a broker that is open, and stays so while the app is served. One app for one broker.

    Serve it with `wakecall.http.server.serve_app`: the guard leans on what that puts beneath it.

    What you add around its requests is honoured: with a hook, an error handler, a teardown function or a listener to one
    of Quart's signals every request takes Quart's own way, which costs about half as much again; a view of your own in a
    route's place takes that route alone.

    Args:
        broker: from `open_broker`; its config bounds the bodies.
        loopback_only: while the broker has no keys, refuse a `Host` or an `Origin` that is not this machine's loopback
            (403). False only behind a server of your own that decides who may call: without keys every caller may do
            everything. Then any `Host` is fine, and an `Origin` that is the same.
        cors: origins whose pages may call what is under `/v1`, such as `https://chat.example.com`; `*` for all of them,
            but not past that refusal: then each has to be named.
        body_s: seconds for all of a request's body, a publisher's upload of an answer excepted.

    Raises:
        InvalidOrigin: one of them is none.
    """
    app = _App(__name__, static_folder=None, template_folder=None)
    app.broker = broker
    app.loopback_only = loopback_only
    app.cors = cors if isinstance(cors, Cors) else Cors.of(cors)
    app.debug = False  # Quart would take it from the environment, and show every traceback to the peer
    app.config.update(
        MAX_CONTENT_LENGTH=None,  # bodies are the guard's
        BODY_TIMEOUT=None,
        RESPONSE_TIMEOUT=None,  # it would cut a stream and call it complete
        PROPAGATE_EXCEPTIONS=False,
    )
    app.url_map.merge_slashes = False  # it redirects, with a page of HTML
    app.register_error_handler(WakecallError, _answer_error)
    app.register_error_handler(HTTPException, _answer_http_exception)
    config = broker.config
    direct = Direct(app, app.admit, app.is_hooked)
    routes = Routes(app, broker, direct)
    add_client_routes(routes, broker)
    add_publisher_routes(routes, broker)
    add_results_route(routes, broker)
    add_admin_routes(routes, broker)
    add_naming_routes(routes, broker)
    add_usage_routes(routes, broker)
    add_ops_routes(routes, broker)
    app.extensions["wakecall.routes"] = routes
    guard = Guard(
        direct,
        GuardSettings(body_stall_s=config.peer_stall_s, body_s=body_s),
        BodyBudget(config.max_held_bytes),
        app.cors,
    )
    app.asgi_app = guard  # type: ignore[method-assign, assignment]
    return app


class _NoSessions(SessionInterface):
    """No cookies, in or out."""

    _none = NullSession()

    async def open_session(self, app: Quart, request: Any) -> NullSession:
        return self._none

    async def save_session(self, app: Quart, session: Any, response: Any) -> None:
        """There is nothing to save."""


class _Connection(TrioASGIHTTPConnection):
    async def __call__(self, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        # As quart-trio's, with one task less: the handler runs in the task that is there already.
        request = self._create_request_from_scope(send)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.handle_messages, nursery, request, receive)
            await self.handle_request(nursery, request, send)

    async def _send_response(self, send: ASGISendCallable, response: Response | WerkzeugResponse) -> None:
        exchange = current_exchange_of(self.scope)  # type: ignore[arg-type]
        try:
            # Nobody is there to be answered; one lineage of Quart would raise that as an error.
            if not exchange.client_is_gone and not exchange.is_over:
                await super()._send_response(send, response)
        finally:
            if isinstance(response.response, StreamBody):
                # Also where a peer that left while the head was written meant that the body was never entered.
                await response.response.aclose()


class _App(QuartTrio):
    asgi_http_class = _Connection
    response_class = Answer
    session_interface = _NoSessions()  # type: ignore[assignment]
    broker: Broker
    loopback_only = True
    cors: Cors | None = None

    def admit(self, request: Request | RawRequest) -> None:
        """What stands before every request, known or not. Raises Forbidden."""
        if not self.broker.is_open:
            return
        scope: Any = request.scope
        origins = request.headers.getlist("origin")
        if self.cors is not None and self.cors.names(scope["path"], origins):
            origins = []
        host = request.headers.get("host")
        if not host and scope["http_version"] == "1.0":
            host = None  # old probes send none, and Quart makes that an empty one
        (refuse_foreign if self.loopback_only else refuse_other_origins)(host, origins)
        current_exchange_of(scope).vouch()  # whoever calls may do everything

    def is_hooked(self) -> bool:
        """Whether an embedder has put anything of his own around all requests."""
        return has_hooks(self, _OWN_ERROR_HANDLERS)

    async def handle_request(self, request: Request) -> Response | WerkzeugResponse:
        path = request.scope["path"]
        try:
            self.admit(request)
            if self.cors is not None:
                # Before anything asks for a key: a browser sends none along with this question.
                allowed = self.cors.preflight(request.method, path, request.scope["headers"])
                if allowed is not None:
                    return no_content(allowed)
            if path.startswith("//"):
                # Werkzeug looks past the second slash; whoever else reads the path does not.
                raise NotFound
            return await super().handle_request(request)
        except WakecallError as error:
            return error_answer(error, request.path)
        except HTTPException as error:  # what Quart makes of a Host that is none, before it routes
            return _http_error_answer(error, request.path)

    async def full_dispatch_request(self, context: Any = None) -> Response | WerkzeugResponse:
        """Route and answer. Quart's own way, with its hooks and signals, is taken only where there are any."""
        if self.is_hooked():
            return await super().full_dispatch_request(context)
        request: Request = context.request
        try:
            result = await self.dispatch_request(context)
        except WakecallError as error:
            return error_answer(error, request.path)
        except HTTPException as error:
            return _http_error_answer(error, request.path)
        return result if isinstance(result, Answer) else await self.make_response(result)

    async def handle_exception(self, *context_and_error: Any) -> Any:
        # The guard answers 500 and logs where it happened, without the message: that may quote the request. (What stands
        # before the error depends on Quart's lineage.)
        raise context_and_error[-1]


async def _answer_error(error: WakecallError) -> Answer:
    return error_answer(error, request.path)


async def _answer_http_exception(error: HTTPException) -> Answer:
    return _http_error_answer(error, request.path)


_OWN_ERROR_HANDLERS = (_answer_error, _answer_http_exception)


def _http_error_answer(error: HTTPException, path: str) -> Answer:
    allow = next((value for name, value in error.get_headers() if name == "Allow"), None)
    headers = {"Allow": ", ".join(sorted(allow.split(", ")))} if allow else None
    return error_answer(from_http_exception(error), path, headers)
