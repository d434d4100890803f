"""The QuartTrio app over an open broker: routes, the guard around them, and every error in one shape."""

from __future__ import annotations

from typing import Any

from hypercorn.typing import ASGISendCallable
from quart import Quart, request
from quart.sessions import NullSession, SessionInterface
from quart.wrappers import Request, Response
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as WerkzeugResponse

from ..broker import Broker
from ..errors import MethodNotAllowed, NotFound, WakecallError
from .admin import add_admin_routes
from .answers import Answer, StreamBody, error_answer
from .auth import refuse_foreign
from .client import add_client_routes
from .errors import from_http_exception
from .guard import BodyBudget, Guard, GuardSettings
from .ops import add_ops_routes
from .publisher import add_publisher_routes

__all__ = ["create_app"]


def create_app(broker: Broker, *, loopback_only: bool = True) -> QuartTrio:
    """An app over a broker that is open, and stays so while the app is served. One app for one broker.

    Serve it with `wakecall.http.server.serve_app`: the guard leans on what that puts beneath it.

    Args:
        broker: from `open_broker`; its config bounds the bodies.
        loopback_only: refuse a `Host` or an `Origin` that is not this machine's loopback (403). False only behind a
            server of your own that decides who may call: without keys every caller may do everything.
    """
    app = _App(__name__, static_folder=None, template_folder=None)
    app.loopback_only = loopback_only
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
    add_client_routes(app, broker)
    add_publisher_routes(app, broker)
    add_admin_routes(app, broker)
    add_ops_routes(app, broker)
    config = broker.config
    guard = Guard(
        app.asgi_app,
        GuardSettings(body_stall_s=config.peer_stall_s),
        BodyBudget(config.max_held_bytes),
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
    async def _send_response(self, send: ASGISendCallable, response: Response | WerkzeugResponse) -> None:
        try:
            await super()._send_response(send, response)
        finally:
            if isinstance(response.response, StreamBody):
                # Also where a peer that left while the head was written meant that the body was never entered.
                await response.response.aclose()


class _App(QuartTrio):
    asgi_http_class = _Connection
    response_class = Answer
    session_interface = _NoSessions()  # type: ignore[assignment]
    loopback_only = True

    async def handle_request(self, request: Request) -> Response | WerkzeugResponse:
        try:
            if self.loopback_only:
                refuse_foreign(request.headers.get("host"), request.headers.get("origin"))
            if request.scope["path"].startswith("//"):
                # Werkzeug looks past the second slash; whoever else reads the path does not.
                raise NotFound
            return await super().handle_request(request)
        except WakecallError as error:
            return error_answer(error, request.path)
        except HTTPException as error:  # what Quart makes of a Host that is none, before it routes
            return error_answer(from_http_exception(error), request.path)

    async def handle_exception(self, *context_and_error: Any) -> Any:
        # The guard answers 500 and logs where it happened, without the message: that may quote the request. (What stands
        # before the error depends on Quart's lineage.)
        raise context_and_error[-1]


async def _answer_error(error: WakecallError) -> Answer:
    headers = {}
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = "GET, OPTIONS"
    return error_answer(error, request.path, headers)


async def _answer_http_exception(error: HTTPException) -> Answer:
    allow = next((value for name, value in error.get_headers() if name == "Allow"), None)
    return error_answer(from_http_exception(error), request.path, {"Allow": allow} if allow else None)
