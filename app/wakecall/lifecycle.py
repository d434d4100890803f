"""The lifecycle of a row, as one table.

A row is in one of six states: not there, active, hibernating, or inactive and remembering what it was (or nothing, once
it was withdrawn). Ten events move it. `TRANSITIONS` lists all sixty pairs; `RAISES` marks those that only a bug of ours
can ask for. The table decides status alone: who may send which event, and what else a step does (waiters, timestamps),
is the broker's.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple

from .models import LLM, Status

__all__ = ["ABSENT", "RAISES", "TRANSITIONS", "IllegalTransition", "RowEvent", "RowState", "state_of", "step"]


class RowState(NamedTuple):
    """`status` None: there is no such row. `remembers` is an inactive row's alone."""

    status: Status | None
    remembers: Status | None = None


class RowEvent(Enum):
    REGISTER_ACTIVE = "register as active"
    REGISTER_HIBERNATING = "register as hibernating"
    REPORT_ACTIVE = "a heartbeat says active"
    REPORT_HIBERNATING = "a heartbeat says hibernating"
    REVIVE = "its channel opened, or a heartbeat named no status"
    WOKEN = "its wake succeeded"
    WAKE_FAILED = "its wake failed"
    LOST = "its channel ended, or it is stale"
    WITHDRAWN = "left out of a register, goodbye, evicted"
    EXPIRED = "inactive for the retention time"


class IllegalTransition(AssertionError):
    """A bug of ours: an event that cannot happen to a row in this state."""


ABSENT: Final = RowState(None)
ACTIVE: Final = RowState(Status.ACTIVE)
HIBERNATING: Final = RowState(Status.HIBERNATING)
WAS_ACTIVE: Final = RowState(Status.INACTIVE, Status.ACTIVE)
WAS_HIBERNATING: Final = RowState(Status.INACTIVE, Status.HIBERNATING)
FORGOTTEN: Final = RowState(Status.INACTIVE)
RAISES: Final = None

_E = RowEvent

TRANSITIONS: Final[dict[RowState, dict[RowEvent, RowState | None]]] = {
    ABSENT: {
        _E.REGISTER_ACTIVE: ACTIVE,
        _E.REGISTER_HIBERNATING: HIBERNATING,
        _E.REPORT_ACTIVE: RAISES,
        _E.REPORT_HIBERNATING: RAISES,
        _E.REVIVE: RAISES,
        _E.WOKEN: RAISES,
        _E.WAKE_FAILED: RAISES,
        _E.LOST: RAISES,
        _E.WITHDRAWN: RAISES,
        _E.EXPIRED: RAISES,
    },
    ACTIVE: {
        _E.REGISTER_ACTIVE: ACTIVE,
        _E.REGISTER_HIBERNATING: HIBERNATING,
        _E.REPORT_ACTIVE: ACTIVE,
        _E.REPORT_HIBERNATING: HIBERNATING,
        _E.REVIVE: ACTIVE,
        _E.WOKEN: ACTIVE,
        _E.WAKE_FAILED: ACTIVE,
        _E.LOST: WAS_ACTIVE,
        _E.WITHDRAWN: FORGOTTEN,
        _E.EXPIRED: RAISES,
    },
    HIBERNATING: {
        _E.REGISTER_ACTIVE: ACTIVE,
        _E.REGISTER_HIBERNATING: HIBERNATING,
        _E.REPORT_ACTIVE: ACTIVE,
        _E.REPORT_HIBERNATING: HIBERNATING,
        _E.REVIVE: HIBERNATING,
        _E.WOKEN: ACTIVE,
        _E.WAKE_FAILED: HIBERNATING,
        _E.LOST: WAS_HIBERNATING,
        _E.WITHDRAWN: FORGOTTEN,
        _E.EXPIRED: RAISES,
    },
    WAS_ACTIVE: {
        _E.REGISTER_ACTIVE: ACTIVE,
        _E.REGISTER_HIBERNATING: HIBERNATING,
        _E.REPORT_ACTIVE: ACTIVE,
        _E.REPORT_HIBERNATING: HIBERNATING,
        _E.REVIVE: ACTIVE,
        _E.WOKEN: WAS_ACTIVE,
        _E.WAKE_FAILED: WAS_ACTIVE,
        _E.LOST: WAS_ACTIVE,
        _E.WITHDRAWN: FORGOTTEN,
        _E.EXPIRED: ABSENT,
    },
    WAS_HIBERNATING: {
        _E.REGISTER_ACTIVE: ACTIVE,
        _E.REGISTER_HIBERNATING: HIBERNATING,
        _E.REPORT_ACTIVE: ACTIVE,
        _E.REPORT_HIBERNATING: HIBERNATING,
        _E.REVIVE: HIBERNATING,
        _E.WOKEN: WAS_HIBERNATING,
        _E.WAKE_FAILED: WAS_HIBERNATING,
        _E.LOST: WAS_HIBERNATING,
        _E.WITHDRAWN: FORGOTTEN,
        _E.EXPIRED: ABSENT,
    },
    FORGOTTEN: {
        _E.REGISTER_ACTIVE: ACTIVE,
        _E.REGISTER_HIBERNATING: HIBERNATING,
        _E.REPORT_ACTIVE: FORGOTTEN,
        _E.REPORT_HIBERNATING: FORGOTTEN,
        _E.REVIVE: FORGOTTEN,
        _E.WOKEN: FORGOTTEN,
        _E.WAKE_FAILED: FORGOTTEN,
        _E.LOST: FORGOTTEN,
        _E.WITHDRAWN: FORGOTTEN,
        _E.EXPIRED: ABSENT,
    },
}


def state_of(llm: LLM | None) -> RowState:
    """The state that a record is in."""
    return ABSENT if llm is None else RowState(llm.status, llm.remembers)


def step(state: RowState, event: RowEvent) -> RowState:
    """The state after `event`.

    Raises:
        IllegalTransition: the table has no such step.
    """
    after = TRANSITIONS[state][event]
    if after is RAISES:
        raise IllegalTransition(f"{event.value!r} cannot happen to a row that is {state}")
    return after
