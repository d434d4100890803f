"""A long list as JSON, made piece by piece while it is sent: so the loop has its turn in between, and no blob is held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

import msgspec
import trio

from .answers import Answer, StreamBody, json_answer

__all__ = ["ITEMS_AT_A_TIME", "list_answer"]

T = TypeVar("T")

#: To look at so many takes a few milliseconds, though a key has many patterns to be held against each.
ITEMS_AT_A_TIME: Final = 200


def list_answer(
    items: Sequence[T], show: Callable[[T], object | None], hold: Callable[[], Callable[[], None]]
) -> Answer:
    """An answer of the form `{"data": [...], "object": "list"}`. A short one has its length, a long one comes in chunks.

    Args:
        items: they do not change.
        show: what is said of one; None: it is left out. Called while the answer is sent.
        hold: called if the list is long; what it returns is called once, when that has been sent or its peer is gone.
    """
    if len(items) <= ITEMS_AT_A_TIME:
        return json_answer({"data": [shown for item in items if (shown := show(item)) is not None], "object": "list"})
    answer = Answer(_ListBody(items, show, hold()), 200, content_type="application/json")
    answer.timeout = None
    return answer


class _ListBody(StreamBody, Generic[T]):
    def __init__(self, items: Sequence[T], show: Callable[[T], object | None], release: Callable[[], None]) -> None:
        self._items = items
        self._show = show
        self._release = release
        self._next = 0
        self._is_empty = True

    async def __anext__(self) -> bytes:
        await trio.lowlevel.checkpoint()
        if self._next > len(self._items):
            raise StopAsyncIteration
        start, self._next = self._next, self._next + ITEMS_AT_A_TIME
        piece = [] if start else [b'{"data":[']
        for item in self._items[start : self._next]:
            if (shown := self._show(item)) is not None:
                if not self._is_empty:
                    piece.append(b",")
                piece.append(msgspec.json.encode(shown))
                self._is_empty = False
        if self._next >= len(self._items):
            self._next = len(self._items) + 1
            piece.append(b'],"object":"list"}')
        return b"".join(piece) or b" "

    async def aclose(self) -> None:
        self._items = ()
        self._release()
