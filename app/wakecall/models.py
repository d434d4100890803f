"""What the broker knows and says, as frozen records. Instants are seconds since the Unix epoch (float), UTC."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Literal

from .events import ChannelEvent, Event, InferSettled, KeyEvent, SessionEvent, SlotReleased, WakeSettled
from .ledger import CellKey, Usage

__all__ = [
    "LLM",
    "Alias",
    "AliasView",
    "Batch",
    "ChannelEvent",
    "Event",
    "HeartbeatReply",
    "Hold",
    "InferRequest",
    "InferSettled",
    "Key",
    "KeyEvent",
    "KeyView",
    "Kind",
    "LLMSpec",
    "LLMView",
    "ModelView",
    "NewKey",
    "PoolView",
    "Priority",
    "Registered",
    "RegisteredLLM",
    "Role",
    "SessionEvent",
    "SessionRecord",
    "SessionView",
    "SlotReleased",
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

#: What keeps an operator's row from new infers: `drain` lets what waits for it go on, `pause` sends nothing more.
Hold = Literal["drain", "pause"]

#: A client's class (`x-wakecall-priority`): batch is served where nothing interactive waits, and now and then before it.
Priority = Literal["interactive", "batch"]

#: What a key is for (protocol.md): inference, publishing, operating. None of them holds another.
Role = Literal["client", "publisher", "admin", "monitor"]


@dataclass(frozen=True, slots=True)
class LLM:
    """One row: a published model, as it is stored.

    `remembers` is what an inactive row comes back as when its publisher does; None once it was withdrawn.
    `inactive_since` is None unless the row is inactive. `url` and `key_env` are a public row's. `pool` is a name that
    several rows answer to; of the rows of one session that share a `group` only one can be awake. `queue_s` to `total_s` are
    the row's own budgets; None: the broker's. `hold` is the operator's, `paused` the publisher's: beside the status, and
    untouched by registers and heartbeats.
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
    group: str | None = None
    queue_s: float | None = None
    first_byte_s: float | None = None
    idle_s: float | None = None
    total_s: float | None = None
    hold: Hold | None = None
    paused: bool = False


@dataclass(frozen=True, slots=True)
class Alias:
    """An operator's own name for a row or a pool, as it is stored.

    `targets` are names of rows and pools: the first is what it stands for, the others its fallbacks, in order.
    """

    name: str
    targets: tuple[str, ...]
    created_at: float


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
    group: str | None = None
    queue_s: float | None = None
    first_byte_s: float | None = None
    idle_s: float | None = None
    total_s: float | None = None


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
        priority: its class.
        timeout_s: seconds that the caller grants it in all, where that is less than it would have.
        affinity: what calls that share a beginning have in common, so that they meet the same prefix cache; never sent on.
        via: pseudonyms of the brokers that it has come through, for an upstream alone.
        anthropic_version: the client's `anthropic-version`, for an upstream of that type; publishers never get it.
    """

    path: str
    body: bytes = field(repr=False)
    content_type: str = "application/json"
    accept: str | None = None
    stream: bool = False
    method: str = "POST"
    request_id: str | None = None
    priority: Priority = "interactive"
    timeout_s: float | None = None
    affinity: bytes | None = field(default=None, repr=False)
    anthropic_version: str | None = None
    via: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What one sweep did: names of rows, in the order in which they went."""

    inactivated: tuple[str, ...]
    deleted: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LLMView:
    """A row as an operator sees it.

    `in_flight`: infers that it works on. `stopping`: slots still held by infers that are over, until the publisher confirms
    that its engine has stopped. `waiting`: for it by name; those that wait for its pool are the pool's. `penalty`: 0 for a
    row in good health; it is avoided the longer the greater it is.
    """

    llm: LLM
    in_flight: int
    waiting: int
    waking: bool
    routable: bool
    stopping: int = 0
    penalty: float = 0.0


@dataclass(frozen=True, slots=True)
class PoolView:
    """A pool: its rows' names, and how many infers wait for any of them."""

    name: str
    owner: str
    llms: tuple[str, ...]
    waiting: int


@dataclass(frozen=True, slots=True)
class AliasView:
    """An alias, and whether one of its targets could take an infer."""

    alias: Alias
    routable: bool


@dataclass(frozen=True, slots=True)
class ModelView:
    """What a client may name: a row, a pool or an alias.

    The status of the last two is that of their rows' which is nearest to an answer; inactive, if there is none.
    """

    name: str
    kind: Literal["virtual", "public", "pool", "alias"]
    status: Status
    type: str
    owner: str
    created_at: float


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
    """An infer or a wake under way, as an operator sees it.

    `llm` is the row that has it, or what it waits for: a row or a pool. `position` (1: next) and `estimate_s` (seconds until
    it is sent; None: nothing has been measured) are of those that wait.
    """

    task_id: str
    kind: Literal["infer", "wake"]
    llm: str
    session_id: str | None
    state: Literal["waking", "queued", "sent", "answering"]
    age_s: float
    position: int | None = None
    estimate_s: float | None = None


@dataclass(frozen=True, slots=True)
class Statistics:
    """What can be counted. Always `accepted == completed + failed + cancelled + waiting + in_flight` (invariant 1).

    `stopping`: slots that are held by infers which are over.
    """

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
    stopping: int = 0


# What a store is given, and gives back ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Batch:
    """Changes that are committed together: the last state of each row, session, key and alias, None where it is gone.

    `lost_at`: before all else every live virtual row that the store holds has become inactive, as of this instant, and
    remembers what it was; None: nothing of the kind. `usage`: cells as they stand. Those of hours before `usage_before` are
    gone.
    """

    llms: dict[str, LLM | None] = field(default_factory=dict)
    sessions: dict[str, SessionRecord | None] = field(default_factory=dict)
    keys: dict[str, Key | None] = field(default_factory=dict)
    aliases: dict[str, Alias | None] = field(default_factory=dict)
    usage: dict[CellKey, Usage] = field(default_factory=dict)
    usage_before: int = 0
    lost_at: float | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a store holds, but for usage."""

    llms: tuple[LLM, ...] = ()
    sessions: tuple[SessionRecord, ...] = ()
    keys: tuple[Key, ...] = ()
    aliases: tuple[Alias, ...] = ()
