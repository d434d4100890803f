"""The description of the routes in OpenAPI 3.1 (https://spec.openapis.org/oas/v3.1.1), made from their declarations.

Nothing is described here that a route does not declare, but for what holds on every path: what a key is, what the layers
below the routes refuse, which headers an answer carries. Methods that HTTP has everywhere (HEAD with a GET, OPTIONS) are no
operations of the API's and are left out, as is what no operation answers: 404 and 405 elsewhere, 505.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from typing import Any, Final, Literal

import msgspec

from ..errors import (
    Forbidden,
    InternalError,
    InvalidApiKey,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    Phase,
    RequestTimeout,
    RequestTooLarge,
    WakecallError,
)
from ..keys import ROLES, roles_held_by
from .room import TooManyConnections
from .routes import HELD_BODY, IN_PATHS, Content, Declared, Media, Route

__all__ = ["document_of"]

_REF: Final = "#/components/schemas/{name}"
_JSON: Final = "application/json"

_DESCRIPTION: Final = """Virtual LLMs behind one OpenAI-compatible address. Clients call `/v1`, publishers \
`/publisher/v1`, operators `/admin/v1`.

A key comes as `Authorization: Bearer KEY` or as `x-api-key: KEY`; what is required of it is its role. A broker that \
listens on loopback and has no keys is open: it asks for none.

HTTP/1.1 only. Unknown members and headers are ignored. HEAD is answered wherever GET is, but for the frames. The bounds \
of free texts and lists are settings; beyond them is a 400."""

#: What stands below the routes refuses: bytes that are no HTTP, a foreign Host, a slow or large head, one connection more.
_EVERYWHERE: Final[tuple[Declared, ...]] = (
    InvalidRequest,
    Forbidden,
    RequestTimeout,
    RequestTooLarge(status=431),
    InternalError,
    TooManyConnections,
)

_SCHEMES: Final = ("bearer", "api_key")


class ErrorInfo(msgspec.Struct):
    """What went wrong. `code` is stable and for programs, `message` is for people."""

    message: str
    type: str
    param: str | None
    code: str
    phase: Phase | msgspec.UnsetType = msgspec.UNSET


class Error(msgspec.Struct):
    """The body of every error. On `/v1/messages` with `type` beside it, as Anthropic's API has it."""

    error: ErrorInfo
    type: Literal["error"] | msgspec.UnsetType = msgspec.UNSET


def document_of(routes: Iterable[Route]) -> bytes:
    """The document, as JSON."""
    return msgspec.json.encode(_Document(list(routes)).build())


class _Document:
    def __init__(self, routes: list[Route]) -> None:
        self._routes = routes
        types = {Error: None, str: None}
        for route in routes:
            for content in (route.body, *route.answers.values()):
                held = content.types.values() if isinstance(content, Media) else (content,)
                types |= dict.fromkeys(each for each in held if each is not None)
        schemas, self._components = msgspec.json.schema_components(types, ref_template=_REF)
        self._schemas: dict[Any, dict[str, Any]] = dict(zip(types, schemas, strict=True))
        self._responses: dict[str, Any] = {}

    def build(self) -> dict[str, Any]:
        paths: dict[str, dict[str, Any]] = {}
        for route in self._routes:
            paths.setdefault(route.path, {})[route.method.lower()] = self._operation(route)
        return {
            "openapi": "3.1.0",
            "info": {"title": "Wakecall", "version": _version(), "description": _DESCRIPTION},
            "tags": [{"name": name} for name in ("client", "publisher", "admin", "monitor", "public")],
            "paths": paths,
            "components": {
                "schemas": self._components,
                "responses": dict(sorted(self._responses.items())),
                "headers": _HEADERS,
                "securitySchemes": {
                    "bearer": {"type": "http", "scheme": "bearer"},
                    "api_key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                },
            },
        }

    def _operation(self, route: Route) -> dict[str, Any]:
        operation: dict[str, Any] = {
            "operationId": route.name,
            "summary": route.summary,
            "tags": [route.role or "public"],
            # For schemes other than OAuth's the list names roles (OpenAPI 3.1, Security Requirement Object).
            "security": [{scheme: [role]} for role in ROLES if route.role in roles_held_by(role) for scheme in _SCHEMES]
            if route.role
            else [],
        }
        if route.in_path or route.headers or route.query:
            operation["parameters"] = self._parameters(route)
        if route.body is not None:
            operation["requestBody"] = {
                # An engine's answer may be empty; a Struct is not.
                "required": not (isinstance(route.body, Media) and None in route.body.types.values()),
                **self._content(route.body),
            }
        operation["responses"] = self._answers(route)
        return operation

    def _parameters(self, route: Route) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for name in route.in_path:
            meta = IN_PATHS[name]
            schema = {"type": "string", **(meta.extra_json_schema or {})}
            found.append(
                {"name": name, "in": "path", "required": True, "description": meta.description, "schema": schema}
            )
        found += [
            {
                "name": header.name,
                "in": "header",
                "required": header.is_required,
                "description": header.description,
                "schema": {"type": "string", "pattern": f"^{header.pattern}$"},
            }
            for header in route.headers
        ]
        found += [
            {"name": each.name, "in": "query", "description": each.description, "schema": dict(each.schema)}
            for each in route.query
        ]
        return found

    def _content(self, content: Content) -> dict[str, Any]:
        """A body's description and types, as they stand in a request and in a response."""
        if isinstance(content, Media):
            types = {
                name: {"schema": self._schemas[of]} if of is not None else {} for name, of in content.types.items()
            }
            return {"description": content.description, "content": types}
        assert content is not None
        schema = self._schemas[content]
        described = self._components.get(schema.get("$ref", "").rpartition("/")[2], {})
        return {"description": described.get("description", ""), "content": {_JSON: {"schema": schema}}}

    def _answers(self, route: Route) -> dict[str, Any]:
        by_status: dict[str, list[WakecallError]] = {}
        for error in _errors_of(route):
            by_status.setdefault(str(error.status), []).append(error)
        found: dict[str, Any] = {}
        for status, content in route.answers.items():
            if status not in by_status:
                described = {"description": "Done."} if content is None else self._content(content)
                found[status] = {**described, "headers": _refer(_ALWAYS)}
        for status, errors in by_status.items():
            beside = route.answers.get(status, route.answers.get(f"{status[0]}XX"))
            response = self._error_response(errors)
            if beside is not None:
                response = self._either(response, beside)
            found[status] = self._shared(".".join([status, *sorted({error.code for error in errors})]), response)
        return dict(sorted(found.items()))

    def _shared(self, name: str, response: dict[str, Any]) -> dict[str, Any]:
        """A reference to a response that many operations have."""
        while self._responses.setdefault(name, response) != response:
            name += ".or"  # the same errors, beside something else
        return {"$ref": f"#/components/responses/{name}"}

    def _error_response(self, errors: list[WakecallError]) -> dict[str, Any]:
        codes = sorted({error.code for error in errors})
        headers = set(_ALWAYS)
        if any(error.retry_after_s is not None for error in errors):
            headers.add("Retry-After")
        if any(error.should_retry is not None for error in errors):
            headers.add("x-should-retry")
        named = {"properties": {"error": {"properties": {"code": {"enum": codes}}}}}
        return {
            "description": " ".join(dict.fromkeys(error.message for error in errors)),
            "headers": _refer(headers),
            "content": {_JSON: {"schema": {"allOf": [self._schemas[Error], named]}}},
        }

    def _either(self, response: dict[str, Any], content: Content) -> dict[str, Any]:
        """One status for two things: an error of ours, or an answer that has it as well."""
        other = self._content(content)
        schemas = [response["content"][_JSON]["schema"], other["content"][_JSON].get("schema", {})]
        return {
            "description": f"{response['description']} Or: {other['description']}",
            "headers": response["headers"],
            "content": {**other["content"], _JSON: {"schema": {"anyOf": schemas}}},
        }


def _version() -> str:
    try:
        return importlib.metadata.version("wakecall")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


#: Which headers an answer may carry.
_HEADERS: Final[dict[str, Any]] = {
    "x-request-id": {
        "description": "The caller's own if it is well-formed, else a new one.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,128}$"},
    },
    "Retry-After": {
        "description": "In so many seconds trying again is worth it.",
        "schema": {"type": "string", "pattern": "^[0-9]+$"},
    },
    "x-should-retry": {
        "description": "`false`: it may have been generated, so nobody is to repeat it.",
        "schema": {"type": "string", "enum": ["true", "false"]},
    },
}
_ALWAYS: Final = frozenset({"x-request-id"})


def _refer(names: Iterable[str]) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in sorted(names)}


def _errors_of(route: Route) -> list[WakecallError]:
    """All that a route's operation can end with: what it declares, and what is everybody's or every such route's."""
    declared: list[Declared] = [*_EVERYWHERE, *route.errors]
    if route.in_path:
        # A value of another form may make another path of it, or one that is there with other methods.
        declared += [NotFound, MethodNotAllowed]
    if isinstance(route.body, type):
        declared += HELD_BODY
    if route.role is not None:
        declared += [InvalidApiKey, InternalError(status=503)]  # the second: keys cannot be checked, so nobody passes
    return [each if isinstance(each, WakecallError) else each() for each in dict.fromkeys(declared)]
