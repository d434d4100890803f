"""What observers (logs, metrics, an embedder's own) are told: one record for each thing that has happened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from .models import Role

__all__ = [
    "ChannelEvent",
    "Event",
    "InferSettled",
    "KeyEvent",
    "SessionEvent",
    "SlotReleased",
    "WakeSettled",
]


@dataclass(frozen=True, slots=True)
class SessionEvent:
    """`event`: registered, goodbye, evicted, expired."""

    event: Literal["registered", "goodbye", "evicted", "expired"]
    session_id: str
    llms: int


@dataclass(frozen=True, slots=True)
class ChannelEvent:
    """A channel opened or ended; `reason` says why it ended (`disconnected` or one of `bye`'s)."""

    event: Literal["open", "ended"]
    session_id: str
    epoch: int
    reason: str | None = None
    failed: int = 0


@dataclass(frozen=True, slots=True)
class KeyEvent:
    """`event`: created, revoked, expired. Expired is told of a publisher's key alone: its sessions end with it."""

    event: Literal["created", "revoked", "expired"]
    key_id: str
    role: Role
    owner: str


class InferSettled(NamedTuple):  # to make a frozen dataclass took twice as long, and there is one for every infer
    """An infer's one outcome. `code` is `completed`, or that of the error; `seconds` since it was accepted.

    `first_byte_s` is None where no byte of an answer came; `engine_status` where no head did; `key_id` where none was
    needed. `llm` is the row that had it last, or else what was asked for; `attempts` how many publishers it was sent to.
    `service_s` is how long it was at the last of them; None: it was sent to none. `tokens_in` and `tokens_out` are what its
    answer says of itself; None: it does not say.
    """

    task_id: str
    request_id: str | None
    llm: str
    outcome: Literal["completed", "failed", "cancelled"]
    code: str
    phase: str
    seconds: float
    first_byte_s: float | None
    engine_status: int | None
    key_id: str | None = None
    attempts: int = 0
    service_s: float | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None


@dataclass(frozen=True, slots=True)
class WakeSettled:
    """A wake's one outcome; `waiters` is how many were waiting for it then."""

    task_id: str
    llm: str
    outcome: Literal["succeeded", "failed", "timed_out", "lost"]
    seconds: float
    waiters: int


@dataclass(frozen=True, slots=True)
class SlotReleased:
    """The slot of an infer that ended without its publisher is free.

    `how`: the publisher `confirmed` that its engine has stopped, its heartbeat showed it (`reported`), it is gone (`lost`),
    or none of these came in time (`expired`). `seconds` since the infer's end: how long its engine worked for nobody, as far
    as that is known.
    """

    task_id: str
    llm: str
    how: Literal["confirmed", "reported", "lost", "expired"]
    seconds: float


Event = SessionEvent | ChannelEvent | KeyEvent | InferSettled | WakeSettled | SlotReleased
