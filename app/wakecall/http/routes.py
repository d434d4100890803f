"""What a route is. It is declared once, where it is added: its caller's role, what it takes, answers and refuses.

From that declaration its handler is called (`Routes.add`: the caller known and allowed, the body read and decoded as the
Struct that was declared), and `/openapi.json` is made (`openapi.py`). So neither can say what the other does not.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from quart import Quart, Request, request

from ..broker import Broker
from ..errors import (
    InvalidJson,
    InvalidRequest,
    QueueFull,
    RequestTimeout,
    RequestTooLarge,
    TooMany,
    UnsupportedEncoding,
    WakecallError,
)
from ..models import Role
from .answers import Answer
from .auth import check_again
from .calls import Call, begin, one_header, read_json
from .direct import Direct, Serve
from .raw import RawRequest
from .shown import Id, Name

__all__ = ["HELD_BODY", "Content", "Declared", "Header", "Media", "Query", "Route", "Routes"]

Method = Literal["GET", "PUT", "POST", "PATCH", "DELETE"]

#: A class, or an instance of one whose status is not the class's own.
Declared = type[WakecallError] | WakecallError

#: What reading a body whole, and as JSON, can end with.
HELD_BODY: Final[tuple[Declared, ...]] = (
    InvalidJson,
    InvalidRequest,
    TooMany,
    UnsupportedEncoding,
    RequestTooLarge,
    RequestTimeout,
    QueueFull,
)

_PLACEHOLDER: Final = re.compile(r"<(?:path:)?(\w+)>")


#: What may stand in a path, by its name there.
IN_PATHS: Final = {"name": Name, "session_id": Id, "task_id": Id, "key_id": Id}


@dataclass(frozen=True, slots=True)
class Media:
    """A body that is no Struct's JSON; its handler reads or writes it itself.

    Args:
        description: what it is.
        types: its content types, or ranges of them, each with its schema: a type that msgspec knows; None: any bytes.
    """

    description: str
    types: Mapping[str, Any]


#: A type whose JSON it is; None: no body.
Content = type | Media | None


@dataclass(frozen=True, slots=True)
class Header:
    """A request's header, read as it is described.

    Args:
        name: its name.
        pattern: of its whole value.
        refusal: what is said to a value of another form.
        description: for the document.
        is_required: whether it has to be there.
    """

    name: str
    pattern: str
    refusal: str
    description: str
    is_required: bool = False

    def read(self, call: Call) -> str | None:
        """Its value; None: it is not there, and need not be. Raises InvalidRequest."""
        value = one_header(call, self.name)
        if self.is_required if value is None else not re.fullmatch(self.pattern, value):
            raise InvalidRequest(self.refusal, param=self.name)
        return value


@dataclass(frozen=True, slots=True)
class Query:
    """A parameter of a request's query. It may be left out; parameters that no route declares are ignored.

    Args:
        name: its name.
        schema: of its value, in JSON Schema; the handler sees to it.
        description: for the document.
    """

    name: str
    schema: Mapping[str, Any]
    description: str

    def read(self, call: Call) -> str | None:
        """Its value; None: it is not there. Raises InvalidRequest: it stands more than once."""
        assert isinstance(call.request, Request)  # no hot route reads its query
        values = call.request.args.getlist(self.name)
        if len(values) > 1:
            raise InvalidRequest("This parameter stands at most once.", param=self.name)
        return values[0] if values else None


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path, as `Routes.add` was told."""

    method: Method
    rule: str
    name: str
    summary: str
    role: Role | None
    body: Content
    headers: tuple[Header, ...]
    query: tuple[Query, ...]
    answers: Mapping[str, Content]
    errors: tuple[Declared, ...]

    @property
    def path(self) -> str:
        """As OpenAPI writes it."""
        return _PLACEHOLDER.sub(r"{\1}", self.rule)

    @property
    def in_path(self) -> list[str]:
        """The names of what varies in the path."""
        return _PLACEHOLDER.findall(self.rule)


@dataclass(slots=True)
class Routes:
    """Where routes are added, and all that were.

    Args:
        app: gets them.
        broker: knows the callers; its config bounds the bodies that are read as Structs.
        direct: takes those that are hot.
    """

    app: Quart
    broker: Broker
    direct: Direct
    all: list[Route] = field(default_factory=list)

    def add(
        self,
        method: Method,
        rule: str,
        *,
        role: Role | None,
        answer: Content | Mapping[str, Content],
        body: Content = None,
        headers: tuple[Header, ...] = (),
        query: tuple[Query, ...] = (),
        errors: tuple[Declared, ...] = (),
        name: str = "",
        has_head: bool = True,
        is_hot: bool = False,
    ) -> Callable[[Callable[..., Awaitable[Answer]]], Callable[..., Awaitable[Answer]]]:
        """Put the decorated handler there. It is called with a `Call` unless everyone may, then with what is in the path.

        Args:
            method: HTTP's.
            rule: the path, with what varies in it as Quart has it.
            role: whose it is; None: everyone's, key or not.
            answer: what it answers with 200, or 204 for None; or by status or range of them (`4XX`).
            body: what it takes. A Struct's JSON is read, and comes as the keyword `said`.
            headers: what it reads of them beyond the body's.
            query: what it reads of the query.
            errors: what it can end with beyond what any route of its kind can.
            name: of the operation; the handler's own when left out.
            has_head: whether a HEAD is answered as a GET without its body.
            is_hot: comes thousands of times a second, or stays open by the thousand: not by Quart's dispatch (`direct`).
        """
        if not isinstance(answer, Mapping):
            answer = {"204" if answer is None else "200": answer}

        def decorate(handler: Callable[..., Awaitable[Answer]]) -> Callable[..., Awaitable[Answer]]:
            named = name or handler.__name__
            summary = (handler.__doc__ or "").strip()
            self.all.append(Route(method, rule, named, summary, role, body, headers, query, answer, errors))
            serve = None if role is None else self._serve(handler, role, body)
            view = handler if serve is None else _view(serve)
            self.app.add_url_rule(rule, named, view, methods=[method])
            if is_hot:
                assert serve is not None
                assert not query
                assert "<path:" not in rule
                # Quart answers a HEAD by the view of a GET; here nobody would leave its body out.
                assert method != "GET" or not has_head
                self.direct.add(method, rule, named, view, serve)
            if not has_head:
                for each in self.app.url_map.iter_rules(named):
                    assert each.methods is not None
                    each.methods.discard("HEAD")
            return handler

        return decorate

    def _serve(self, handler: Callable[..., Awaitable[Answer]], role: Role, body: Content) -> Serve:
        async def serve(request: Request | RawRequest, *in_path: str, **by_name: str) -> Answer:
            call = begin(self.broker, role, request)
            if isinstance(body, type):
                said: Any = await read_json(call, body, self.broker.config.max_body_bytes)
                check_again(self.broker, call.caller)
                return await handler(call, *in_path, **by_name, said=said)
            return await handler(call, *in_path, **by_name)

        return serve


def _view(serve: Serve) -> Callable[..., Awaitable[Answer]]:
    """Quart's way to a handler."""

    async def view(**in_path: str) -> Answer:
        # The proxy would cost at each access.
        return await serve(request._get_current_object(), **in_path)  # type: ignore[attr-defined]

    return view
