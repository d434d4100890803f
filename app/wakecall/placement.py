"""Which way an infer goes. Pure: from what a row is at this instant to one decision."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .models import Kind, Status

__all__ = ["Placement", "RowLoad", "place"]


class Placement(Enum):
    DISPATCH = "send it now"
    QUEUE = "wait for a free slot"
    WAKE = "wake the row, and wait"
    JOIN = "wait for the wake that is under way"
    OFFLINE = "refuse: nobody is there"
    FULL = "refuse: too many wait"


@dataclass(frozen=True, slots=True)
class RowLoad:
    """A row at one instant.

    Args:
        status, kind: as its record says.
        connected: its session has a current channel.
        succeeding: its session's channel has ended and a newer one is about to be current.
        room: its channel takes further infers (what it has not taken yet is below half the bound).
        in_flight: infers that hold a slot.
        max_concurrency: how many may; None: any number.
        waiting: infers waiting for the row, for a slot or a wake.
        waking: a wake is under way.
        max_waiting: how many more may wait here, over all bounds, counted with those who do.
    """

    status: Status
    kind: Kind
    connected: bool
    succeeding: bool
    room: bool
    in_flight: int
    max_concurrency: int | None
    waiting: int
    waking: bool
    max_waiting: int

    @property
    def has_slot(self) -> bool:
        return self.room and (self.max_concurrency is None or self.in_flight < self.max_concurrency)


def place(row: RowLoad) -> Placement:
    """Decide for one infer that has just come.

    1. A public row, an inactive one, or one without a channel now or in a moment: OFFLINE. It is never woken.
    2. An active row with a channel, a free slot, and nobody before us: DISPATCH.
    3. As many wait as may: FULL.
    4. A hibernating row whose wake is under way: JOIN it.
    5. A hibernating row with a channel: WAKE it.
    6. Else wait for a slot, or for the newer channel: QUEUE.
    """
    # 1
    if row.kind is Kind.PUBLIC or row.status is Status.INACTIVE or not (row.connected or row.succeeding):
        return Placement.OFFLINE
    # 2
    if row.status is Status.ACTIVE and row.connected and row.has_slot and row.waiting == 0:
        return Placement.DISPATCH
    # 3
    if row.waiting >= row.max_waiting:
        return Placement.FULL
    if row.status is Status.HIBERNATING:
        # 4
        if row.waking:
            return Placement.JOIN
        # 5
        if row.connected:
            return Placement.WAKE
    # 6
    return Placement.QUEUE
