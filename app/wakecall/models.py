"""What the broker knows and says, as frozen records. Instants are seconds since the Unix epoch (float), UTC."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Literal

__all__ = [
    "LLM",
    "Batch",
    "ChannelEvent",
    "HeartbeatReply",
    "InferRequest",
    "InferSettled",
    "Key",
    "KeyEvent",
    "KeyView",
    "Kind",
    "LLMSpec",
    "LLMView",
    "NewKey",
    "Registered",
    "RegisteredLLM",
    "Role",
    "SessionEvent",
    "SessionRecord",
    "SessionView",
    "Snapshot",
    "Statistics",
    "Status",
    "SweepReport",
    "TaskView",
    "WakeSettled",
    "is_id",
    "is_llm_name",
]

LOCAL_OWNER: Final = "local"
MAX_NAME_LENGTH: Final = 128

#: Of the whole text, in what Python's and ECMA 262's patterns have in common: `/openapi.json` shows them.
NAME_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9._:@-]*(?:/[A-Za-z0-9][A-Za-z0-9._:@-]*)*"
ID_PATTERN: Final = r"[A-Za-z0-9_-]{1,128}"

_NAME = re.compile(NAME_PATTERN)
_ID = re.compile(ID_PATTERN)


def is_llm_name(name: str) -> bool:
    """Whether `name` may be an LLM's: segments joined by `/`, 128 characters in all (protocol.md, Conventions)."""
    return len(name) <= MAX_NAME_LENGTH and _NAME.fullmatch(name) is not None


def is_id(text: str) -> bool:
    """Whether `text` may be a session's or a task's id: `[A-Za-z0-9_-]{1,128}`."""
    return _ID.fullmatch(text) is not None


class Kind(StrEnum):
    """Whose a row is: a publisher's (`virtual`) or an operator's (`public`)."""

    VIRTUAL = "virtual"
    PUBLIC = "public"


class Status(StrEnum):
    """Where a row stands in its lifecycle."""

    ACTIVE = "active"
    HIBERNATING = "hibernating"
    INACTIVE = "inactive"


CancelMode = Literal["abort", "drain"]

#: What a key is for (protocol.md): inference, publishing, operating. None of them holds another.
Role = Literal["client", "publisher", "admin"]


@dataclass(frozen=True, slots=True)
class LLM:
    """One row: a published model, as it is stored.

    `remembers` is what an inactive row comes back as when its publisher does; None once it was withdrawn.
    `inactive_since` is None unless the row is inactive. `url` and `key_env` are a public row's.
    """

    name: str
    owner: str
    status: Status
    created_at: float
    last_heartbeat_at: float
    kind: Kind = Kind.VIRTUAL
    type: str = ""
    model: str = ""
    session_id: str | None = None
    remembers: Status | None = None
    inactive_since: float | None = None
    max_concurrency: int | None = None
    wake_s: float | None = None
    cancel: CancelMode = "abort"
    pool: str | None = None
    url: str | None = None
    key_env: str | None = None


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A publisher's sticky registration, as it is stored.

    `epoch` is that of its latest channel (0: none yet). `unused_since` is the instant from which it has had neither a
    row nor a channel; None while it has one. `key_id` is the key that registered it last; None: no key did.
    """

    session_id: str
    owner: str
    created_at: float
    last_heartbeat_at: float
    epoch: int = 0
    agent_name: str = ""
    agent_version: str = ""
    unused_since: float | None = None
    key_id: str | None = None


@dataclass(frozen=True, slots=True)
class Key:
    """An API key, as it is stored: not the key itself, but its digest (`keys.digest_of`).

    `llms` are the patterns of the names that it opens (`keys.matcher_of`); None: all. `rpm` bounds a client's requests a
    minute, `max_in_flight` those at a time; None: no bound.
    """

    key_id: str
    role: Role
    owner: str
    digest: str = field(repr=False)
    created_at: float
    name: str = ""
    expires_at: float | None = None
    llms: tuple[str, ...] | None = None
    rpm: int | None = None
    max_in_flight: int | None = None


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that has just been made. `secret` is the key itself, which nothing keeps: it is shown once."""

    key: Key
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class LLMSpec:
    """One entry of a register. `status` None: a row that is there keeps its own and a new one is active."""

    name: str
    type: str = ""
    model: str | None = None
    status: Status | None = None
    max_concurrency: int | None = None
    wake_s: float | None = None
    cancel: CancelMode = "abort"
    pool: str | None = None


@dataclass(frozen=True, slots=True)
class RegisteredLLM:
    name: str
    status: Status
    outcome: Literal["created", "reactivated", "adopted"]


@dataclass(frozen=True, slots=True)
class Registered:
    """The answer to a register."""

    session_id: str
    heartbeat_interval_s: float
    llms: tuple[RegisteredLLM, ...]


@dataclass(frozen=True, slots=True)
class HeartbeatReply:
    """`llms`: each row of the session with its status. `drop`: ids that the broker does not wait for."""

    llms: dict[str, Status]
    drop: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A client's call, to be relayed as it is.

    Args:
        path: one of OpenAI's or Anthropic's, such as `/v1/chat/completions`; no query.
        body: the client's bytes, forwarded untouched.
        content_type: their media type.
        accept: what the client accepts, if it said.
        stream: whether the client asked for a stream (the body's `stream`): the first-byte deadline rules only then.
        method: the HTTP method.
        request_id: names the call in logs; never sent on.
    """

    path: str
    body: bytes = field(repr=False)
    content_type: str = "application/json"
    accept: str | None = None
    stream: bool = False
    method: str = "POST"
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What one sweep did: names of rows, in the order in which they went."""

    inactivated: tuple[str, ...]
    deleted: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LLMView:
    """A row as an operator sees it."""

    llm: LLM
    in_flight: int
    waiting: int
    waking: bool
    routable: bool


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session as an operator sees it. `llms` are the names of its rows."""

    record: SessionRecord
    connected: bool
    llms: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class KeyView:
    """A key as an operator sees it. `expired`: its time is over; it opens nothing, and is still listed."""

    key: Key
    in_flight: int
    expired: bool


@dataclass(frozen=True, slots=True)
class TaskView:
    """An infer or a wake under way, as an operator sees it."""

    task_id: str
    kind: Literal["infer", "wake"]
    llm: str
    session_id: str | None
    state: Literal["waking", "queued", "sent", "answering"]
    age_s: float


@dataclass(frozen=True, slots=True)
class Statistics:
    """What can be counted. Always `accepted == completed + failed + cancelled + waiting + in_flight` (invariant 1)."""

    accepted: int
    completed: int
    failed: int
    cancelled: int
    waiting: int
    in_flight: int
    wakes_started: int
    wakes_succeeded: int
    wakes_failed: int
    wakes_in_flight: int
    sessions: int
    channels: int
    llms: dict[Status, int]
    public_llms: int


# What a store is given, and gives back ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Batch:
    """Changes that are committed together: the last state of each row, session and key, None where it is gone."""

    llms: dict[str, LLM | None] = field(default_factory=dict)
    sessions: dict[str, SessionRecord | None] = field(default_factory=dict)
    keys: dict[str, Key | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a store holds."""

    llms: tuple[LLM, ...] = ()
    sessions: tuple[SessionRecord, ...] = ()
    keys: tuple[Key, ...] = ()


# What observers (logs, metrics) are told ----------------------------------------------------------------------------


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


@dataclass(frozen=True, slots=True)
class InferSettled:
    """An infer's one outcome. `code` is `completed`, or that of the error; `seconds` since it was accepted.

    `first_byte_s` is None where no byte of an answer came; `engine_status` where no head did; `key_id` where none was
    needed.
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


@dataclass(frozen=True, slots=True)
class WakeSettled:
    """A wake's one outcome; `waiters` is how many were waiting for it then."""

    task_id: str
    llm: str
    outcome: Literal["succeeded", "failed", "timed_out", "lost"]
    seconds: float
    waiters: int


Event = SessionEvent | ChannelEvent | KeyEvent | InferSettled | WakeSettled
