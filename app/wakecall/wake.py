"""A wake: one for a row at a time, shared by all who wait for it, and outliving them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from .deadlines import Deadline

if TYPE_CHECKING:
    from .row import Row
    from .session import Channel
    from .upload import Upload

__all__ = ["Wake"]


class Wake:
    """One wake under way. Only `waking.Waker` ends it.

    `hibernate` are rows that its publisher is to put to sleep first. `text` is the beginning of the result's body: a failed
    wake's message, if nothing better comes. `frame_taken`: its publisher may have it.
    """

    __slots__ = (
        "channel",
        "deadline",
        "frame_taken",
        "hibernate",
        "is_over",
        "pieces",
        "received",
        "row",
        "started_at",
        "task_id",
        "text",
        "upload",
    )

    def __init__(self, task_id: str, row: Row, channel: Channel, now: float, hibernate: tuple[str, ...] = ()) -> None:
        self.task_id: Final = task_id
        self.row: Final = row
        self.channel: Final = channel
        self.started_at: Final = now
        self.hibernate: Final = hibernate
        self.deadline: Deadline | None = None
        self.is_over = False
        self.frame_taken = False
        self.upload: Upload | None = None
        self.received = 0
        self.pieces = False
        self.text = bytearray()
