"""The short way: the few requests that come, or stay, by the thousand reach their handler without Quart's dispatch.

Of a relayed infer that dispatch (request object, contexts, URL map, a nursery with a reader task, response object and back)
was a third of all that it cost, and a sixth of what an idle channel held; none of it is used by these handlers. `Direct`
stands between guard and Quart. It takes a request whose method and path are, to the letter, those of a route declared as
`hot`, and leaves everything else to Quart. Where somebody has put a view of his own in a hot route's place, Quart serves
that route; where somebody has put anything around all requests (`has_hooks`), Quart serves everything. Both ways go through
the same door (`admit`) and the same handler (`routes.Serve`), and make the same answer.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection
from typing import Any, Final, NamedTuple

import trio
from quart import Quart, signals

from ..errors import WakecallError
from .answers import Answer, StreamBody, error_answer
from .guard import ASGIApp, Exchange, Receive, Scope, Send, current_exchange_of
from .raw import RawRequest

__all__ = ["Direct", "Serve", "has_hooks"]

#: What may stand between two slashes of a hot path; anything else is Quart's to judge.
_SEGMENT: Final = "([A-Za-z0-9_-]{1,128})"
_PLACEHOLDER: Final = re.compile(r"<\w+>")


#: A hot route's handler: the request, then what is in its path.
Serve = Callable[..., Awaitable[Answer]]


#: What Quart says of each request to whoever listens.
_SIGNALS: Final = (
    signals.request_started,
    signals.request_finished,
    signals.request_tearing_down,
    signals.got_request_exception,
    signals.appcontext_pushed,
    signals.appcontext_popped,
    signals.appcontext_tearing_down,
)


def has_hooks(app: Quart, own: Collection[Any] = ()) -> bool:
    """Whether somebody has put anything around an app's requests: a hook, an error handler, a teardown
    function, a listener to a signal.

    Args:
        app: Quart's.
        own: error handlers that do not count.
    """
    # Quart's own look-ups leave empty lists behind.
    for by_blueprint in (
        app.before_request_funcs,
        app.after_request_funcs,
        app.teardown_request_funcs,
        app.url_value_preprocessors,
    ):
        if by_blueprint and any(by_blueprint.values()):
            return True
    for signal in _SIGNALS:
        if signal.receivers:
            return True
    for by_code in app.error_handler_spec.values():
        for handlers in by_code.values():
            for handler in handlers.values():
                if handler not in own:
                    return True
    return bool(app.teardown_appcontext_funcs)


class _Hot(NamedTuple):
    endpoint: str
    view: Any
    serve: Serve

    def is_still_there(self, app: Quart) -> bool:
        return app.view_functions.get(self.endpoint) is self.view


class Direct:
    """Pure ASGI: `Direct(app, admit, is_hooked)` in front of a Quart app's own.

    Args:
        app: Quart's; its views are looked at for each request.
        admit: what stands before every request (`app._App.admit`). Raises WakecallError.
        is_hooked: whether everything is to go through Quart.
    """

    def __init__(self, app: Quart, admit: Callable[[Any], None], is_hooked: Callable[[], bool]) -> None:
        self._app = app
        self._is_hooked = is_hooked
        self._quart: ASGIApp = app.asgi_app
        self._admit = admit
        self._plain: dict[tuple[str, str], _Hot] = {}
        self._patterns: dict[str, list[tuple[re.Pattern[str], _Hot]]] = {}

    def add(self, method: str, rule: str, endpoint: str, view: Any, serve: Serve) -> None:
        """Take requests with `method` to `rule`, as long as the app's view there is `view`."""
        hot = _Hot(endpoint, view, serve)
        if "<" not in rule:
            self._plain[method, rule] = hot
        else:
            literals = (re.escape(part) for part in _PLACEHOLDER.split(rule))
            self._patterns.setdefault(method, []).append((re.compile(_SEGMENT.join(literals)), hot))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self._find(scope) if scope["type"] == "http" else None
        if found is not None:
            exchange, handling = current_exchange_of(scope), trio.CancelScope()
            if exchange.attend(handling):
                with handling:
                    await self._serve(scope, exchange, send, *found)
                return
        await self._quart(scope, receive, send)

    def _find(self, scope: Scope) -> tuple[Serve, tuple[str, ...]] | None:
        method = scope["method"]
        found = self._plain.get((method, scope["path"]))
        in_path: tuple[str, ...] = ()
        if found is None:
            for pattern, hot in self._patterns.get(method, ()):
                if match := pattern.fullmatch(scope["path"]):
                    found, in_path = hot, match.groups()
                    break
        if found is None or scope.get("root_path") or self._is_hooked() or not found.is_still_there(self._app):
            return None
        return found.serve, in_path

    async def _serve(
        self, scope: Scope, exchange: Exchange, send: Send, serve: Serve, in_path: tuple[str, ...]
    ) -> None:
        request = RawRequest(scope)
        try:
            self._admit(request)
            answer = await serve(request, *in_path)
        except WakecallError as error:
            answer = error_answer(error, request.path)
        body: Any = answer.response
        try:
            # Nobody is there to be answered.
            if not exchange.client_is_gone and not exchange.is_over:
                await exchange.answer(lambda: _send(answer, send))
        finally:
            if isinstance(body, StreamBody):
                await body.aclose()


async def _send(answer: Answer, send: Send) -> None:
    headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in answer.headers]
    await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
    body: Any = answer.response
    if isinstance(body, StreamBody):
        async for piece in body:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
    else:
        await send({"type": "http.response.body", "body": body.data, "more_body": False})
