"""A wake: one for a row at a time, shared by all who wait for it, and outliving them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from .deadlines import Deadline

if TYPE_CHECKING:
    from .directory import Row
    from .session import Channel
    from .upload import Upload

__all__ = ["Wake"]


class Wake:
    """One wake under way. Only `dispatch.Dispatcher` ends it.

    `text` is the beginning of the result's body: a failed wake's message, if nothing better comes.
    """

    __slots__ = (
        "channel",
        "deadline",
        "is_over",
        "pieces",
        "received",
        "row",
        "started_at",
        "task_id",
        "text",
        "upload",
    )

    def __init__(self, task_id: str, row: Row, channel: Channel, now: float) -> None:
        self.task_id: Final = task_id
        self.row: Final = row
        self.channel: Final = channel
        self.started_at: Final = now
        self.deadline: Deadline | None = None
        self.is_over = False
        self.upload: Upload | None = None
        self.received = 0
        self.pieces = False
        self.text = bytearray()
