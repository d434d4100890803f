"""What all request bodies together may hold of the memory."""

from __future__ import annotations

from ..errors import QueueFull

__all__ = ["BodyBudget"]

_SHARE_OF_OTHERS = 8


class BodyBudget:
    """All bodies that are held at once, in bytes, over all requests of a server.

    Args:
        total_bytes: the most that may be held.
    """

    def __init__(self, total_bytes: int = 1 << 30) -> None:
        self.total_bytes = total_bytes
        self.held_bytes = 0

    def take(self, count: int, *, for_client: bool = False) -> None:
        """Account for `count` bytes more.

        Args:
            count: bytes.
            for_client: whether an inference client's. The last eighth is not theirs: publishers must be able to heartbeat,
                and operators to revoke, whatever clients send.

        Raises:
            QueueFull: they would not fit; nothing was taken.
        """
        room = self.total_bytes - (self.total_bytes // _SHARE_OF_OTHERS if for_client else 0)
        if self.held_bytes + count > room:
            raise QueueFull("The broker holds as many request bodies as it may.")
        self.held_bytes += count

    def give_back(self, count: int) -> None:
        """Undo a `take`."""
        assert 0 <= count <= self.held_bytes, "bytes were given back that nobody took"
        self.held_bytes -= count
