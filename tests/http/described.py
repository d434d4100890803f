"""What `/openapi.json` says of an answer, as a check: every answer that a test of the app gets goes through it."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jsonschema_rs

from tests.http.wire import Answer
from wakecall.http.openapi import document_of

__all__ = ["Description", "description_of"]


@dataclass
class Operation:
    method: str
    path: str
    described: dict[str, Any]
    seen: set[int] = field(default_factory=set)

    @property
    def name(self) -> str:
        return str(self.described["operationId"])


class Description:
    """A document, and which of its answers have been seen."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.operations = [
            Operation(method.upper(), path, described)
            for path, item in document["paths"].items()
            for method, described in item.items()
        ]
        self._patterns = [(_pattern_of(each.path), each) for each in self.operations]

    def operation(self, method: str, target: str) -> Operation | None:
        """Whose answer it is; None: nobody's, for the path is none or the method is not described."""
        path = target.partition("?")[0]
        wanted = "GET" if method == "HEAD" else method
        return next((each for it, each in self._patterns if each.method == wanted and it.fullmatch(path)), None)

    def resolve(self, described: dict[str, Any]) -> dict[str, Any]:
        """What a reference leads to, or the thing itself."""
        while "$ref" in described:
            at: Any = self.document
            for step in described["$ref"].removeprefix("#/").split("/"):
                at = at[step]
            described = at
        return described

    def response(self, operation: Operation, status: int) -> dict[str, Any]:
        responses = operation.described["responses"]
        found = responses.get(str(status)) or responses.get(f"{status // 100}XX")
        assert found is not None, f"{operation.name}: {status} is not described"
        return self.resolve(found)

    def check(self, method: str, target: str, answer: Answer) -> None:
        """Fail if this answer is not as described."""
        operation = self.operation(method, target)
        if operation is None:
            return
        response = self.response(operation, answer.status)
        operation.seen.add(answer.status)
        for name, header in response["headers"].items():
            self._check_header(operation, name, self.resolve(header), answer)
        for name in ("retry-after", "x-should-retry"):
            if name in answer.headers and "XX" not in "".join(operation.described["responses"]):
                assert name in map(str.lower, response["headers"]), f"{operation.name}: {name} is not described"
        if method == "HEAD" or answer.is_cut:
            return
        content = response.get("content", {})
        kind = answer.headers.get("content-type")
        if kind is None:
            assert not answer.body, f"{operation.name}: a body without a type"
            return
        media = self._media(content, kind.partition(";")[0].strip().lower())
        assert media is not None, f"{operation.name}: {answer.status} with {kind} is not described"
        if "json" in kind and "schema" in media:
            validator(json.dumps({**media["schema"], "components": self._closed}, sort_keys=True)).validate(answer.json)

    @functools.cached_property
    def _closed(self) -> dict[str, Any]:
        """The components, in which no object has members that are not described."""
        schemas = {
            name: {"additionalProperties": False, **schema} if schema.get("type") == "object" else schema
            for name, schema in self.document["components"]["schemas"].items()
            if name != "NotReady"  # an error stands beside its members
        }
        return {"schemas": {**schemas, "NotReady": self.document["components"]["schemas"]["NotReady"]}}

    def _check_header(self, operation: Operation, name: str, header: dict[str, Any], answer: Answer) -> None:
        value = answer.headers.get(name.lower())
        if value is None:
            assert not header.get("required"), f"{operation.name}: {name} is missing"
        else:
            validator(json.dumps(header["schema"])).validate(value)

    def _media(self, content: dict[str, Any], kind: str) -> dict[str, Any] | None:
        main = kind.partition("/")[0]
        for each in (kind, f"{main}/*", "*/*"):
            if each in content:
                found: dict[str, Any] = content[each]
                return found
        return None

    def unseen(self) -> Iterator[str]:
        """Operations of which no answer that is a success was seen."""
        return (each.name for each in self.operations if not any(200 <= status < 300 for status in each.seen))


def _pattern_of(path: str) -> re.Pattern[str]:
    """A `{name}` may hold slashes."""
    pieces = re.split(r"(\{\w+\})", path)
    return re.compile("".join({"{name}": ".+"}.get(it, "[^/]+") if it[:1] == "{" else re.escape(it) for it in pieces))


@functools.cache
def validator(schema: str) -> Any:
    return jsonschema_rs.Draft202012Validator(json.loads(schema))


def description_of(app: Any) -> Description:
    """A fresh description of what this app answers."""
    return Description(json.loads(document_of(app.extensions["wakecall.routes"].all)))
