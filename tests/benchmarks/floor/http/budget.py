"""What all request bodies together may hold of the memory."""

from __future__ import annotations

from ..errors import QueueFull

__all__ = ["BodyBudget"]

_SHARE_OF_OTHERS = 8
#: One key may hold one in so many bytes.
_SHARE_OF_ONE_KEY = 2


class BodyBudget:
    """All bodies that are held at once, in bytes, over all requests of a server.

    Args:
        total_bytes: the most that may be held.
    """

    def __init__(self, total_bytes: int = 1 << 30) -> None:
        self.total_bytes = total_bytes
        self.held_bytes = 0
        self._held_by: dict[str, int] = {}

    def take(self, count: int, key_id: str | None = None, *, for_client: bool = False) -> None:
        """Account for `count` bytes more.

        Args:
            count: bytes.
            key_id: on which key's account; it holds half of all at most, so that it takes two to keep others out. None: the
                broker is open, where everybody is one.
            for_client: whether an inference client's. The last eighth is not theirs: publishers must be able to heartbeat,
                and operators to revoke, whatever clients send.

        Raises:
            QueueFull: they would not fit; nothing was taken.
        """
        held = 0 if key_id is None else self._held_by.get(key_id, 0)
        if key_id is not None and held + count > self.total_bytes // _SHARE_OF_ONE_KEY:
            raise QueueFull("The broker holds as many request bodies of this key as it may.")
        room = self.total_bytes - (self.total_bytes // _SHARE_OF_OTHERS if for_client else 0)
        if self.held_bytes + count > room:
            raise QueueFull("The broker holds as many request bodies as it may.")
        self.held_bytes += count
        if key_id is not None:
            self._held_by[key_id] = held + count

    def give_back(self, count: int, key_id: str | None = None) -> None:
        """Undo a `take`."""
        assert 0 <= count <= self.held_bytes, "bytes were given back that nobody took"
        self.held_bytes -= count
        if key_id is not None and count:
            self._held_by[key_id] -= count
            if not self._held_by[key_id]:
                del self._held_by[key_id]
