"""A request without Quart's objects: as much of it as handlers read."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

__all__ = ["RawHeaders", "RawRequest"]


class RawHeaders:
    """A request's headers, looked up where they are: a handler reads five of them, once each."""

    __slots__ = ("_pairs",)

    def __init__(self, pairs: list[tuple[bytes, bytes]]) -> None:
        self._pairs = pairs

    def _values(self, name: str) -> Iterator[str]:
        wanted = name.lower().encode("ascii")
        return (value.decode("latin-1") for key, value in self._pairs if key == wanted)

    def get(self, name: str) -> str | None:
        """The first of this name."""
        return next(self._values(name), None)

    def getlist(self, name: str) -> list[str]:
        """All of this name."""
        return list(self._values(name))


class RawRequest:
    """What handlers read of a request, as Quart's has it."""

    __slots__ = ("headers", "path", "scope")

    def __init__(self, scope: MutableMapping[str, Any]) -> None:
        self.scope = scope
        self.path: str = scope["path"]
        self.headers = RawHeaders(scope["headers"])
