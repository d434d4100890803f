"""What a publisher tells its command line: small facts, never a prompt, a body or a key."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal, TypeAlias

InferOutcome: TypeAlias = Literal["completed", "failed", "cancelled", "refused", "lost", "deadline"]


class StopReason(enum.Enum):
    """Why a publisher that was well came to its end."""

    STOPPED = "stopped"
    SUPERSEDED = "superseded"
    EVICTED = "evicted"


@dataclass(frozen=True, slots=True)
class RegisteredModel:
    """One row, as the broker's answer to a register has it."""

    name: str
    status: str
    outcome: str


@dataclass(frozen=True, slots=True)
class Registered:
    """The broker has the rows. `again`: the session was there before and had to be registered once more."""

    session_id: str
    models: tuple[RegisteredModel, ...]
    again: bool


@dataclass(frozen=True, slots=True)
class BrokerUnreachable:
    """A register could not be delivered; it is tried again in `retry_in_s` seconds."""

    message: str
    retry_in_s: float


@dataclass(frozen=True, slots=True)
class ChannelOpen:
    """`hello` has come: the rows are routable."""

    epoch: int


@dataclass(frozen=True, slots=True)
class ChannelLost:
    """The control channel ended, or could not be opened; it is opened again in `retry_in_s` seconds."""

    reason: str
    retry_in_s: float


@dataclass(frozen=True, slots=True)
class InferStarted:
    """An infer's frame has come."""

    task_id: str
    llm: str


@dataclass(frozen=True, slots=True)
class InferFinished:
    """An infer is over here. `status`: the engine's, None if it gave none. `uploaded`: bytes handed to the broker."""

    task_id: str
    llm: str
    outcome: InferOutcome
    status: int | None
    seconds: float
    uploaded: int
    message: str | None = None


@dataclass(frozen=True, slots=True)
class Waking:
    """A wake has begun. `llm`, here and in the next five: of which model, where each has a sleep of its own."""

    llm: str | None = None


@dataclass(frozen=True, slots=True)
class Awake:
    """The engine's health answers. `ran_command` is False when it did so without the command."""

    seconds: float
    ran_command: bool
    llm: str | None = None


@dataclass(frozen=True, slots=True)
class WakeFailed:
    """The wake failed, with the message that its waiters get."""

    message: str
    llm: str | None = None


@dataclass(frozen=True, slots=True)
class GoingToSleep:
    """Idle for long enough: hibernation is being announced."""

    llm: str | None = None


@dataclass(frozen=True, slots=True)
class Asleep:
    """The hibernate command is done."""

    llm: str | None = None


@dataclass(frozen=True, slots=True)
class SleepFailed:
    """Going to sleep came to nothing."""

    message: str
    llm: str | None = None


@dataclass(frozen=True, slots=True)
class Draining:
    """Stopping: the rows are being withdrawn, `in_flight` infers still run."""

    in_flight: int


@dataclass(frozen=True, slots=True)
class Drained:
    """Stopped: goodbye was said if the broker could be reached, `abandoned` infers had not ended within the grace."""

    abandoned: int


@dataclass(frozen=True, slots=True)
class Superseded:
    """Another process opened a channel with this session id; this publisher stops."""


@dataclass(frozen=True, slots=True)
class Evicted:
    """An operator evicted the session; this publisher stops."""


PublisherEvent: TypeAlias = (
    Registered
    | BrokerUnreachable
    | ChannelOpen
    | ChannelLost
    | InferStarted
    | InferFinished
    | Waking
    | Awake
    | WakeFailed
    | GoingToSleep
    | Asleep
    | SleepFailed
    | Draining
    | Drained
    | Superseded
    | Evicted
)
