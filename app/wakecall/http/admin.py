"""`/admin/v1`: what operators call."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

import msgspec

from ..access import LONGEST_KEY_S, MAX_KEY_NAME_CHARS, MOST_OF_A_LIMIT
from ..broker import Broker
from ..errors import (
    Forbidden,
    InvalidRequest,
    LLMIsVirtual,
    LLMNameTaken,
    ModelNotFound,
    NotFound,
    SessionNotFound,
    StoreUnavailable,
)
from ..keys import MAX_PATTERNS, NAMES_PATTERN, OWNER_PATTERN, UPSTREAM_VARIABLE_PATTERN, is_upstream_variable
from ..models import Hold, KeyView, Kind, LLMView, Role, SessionView, Status, TaskView, is_llm_name
from .answers import Answer, json_answer, no_content
from .calls import Call
from .routes import Routes
from .shown import Id, Instant, Key, MadeKey, Name, describe_key, instant

__all__ = ["LLM", "LLMList", "add_admin_routes", "describe_llm"]

#: An operator's key that has less to live, in seconds, is not one to be left alone with.
_LASTING_S: Final = 3600.0
_LLM_PATH: Final = "/admin/v1/llms/<path:name>"
_URL: Final = r"[!-~]{1,2048}"


_Budget = Annotated[float, msgspec.Meta(gt=0, le=86_400)]


class PublicLLM(msgspec.Struct, frozen=True):
    """A public row as an operator enters it."""

    type: str
    model: Annotated[str, msgspec.Meta(description="The upstream's own id of it.", extra_json_schema={"minLength": 1})]
    url: Annotated[
        str,
        msgspec.Meta(
            description="An absolute http or https URL without credentials, query or fragment.",
            extra_json_schema={"format": "uri", "pattern": f"^(?=[Hh][Tt][Tt][Pp][Ss]?://[^?#@]+$){_URL}$"},
        ),
    ]
    key_env: (
        Annotated[
            str,
            msgspec.Meta(
                description="The name of the variable that holds the key.",
                extra_json_schema={"pattern": f"^{UPSTREAM_VARIABLE_PATTERN}$"},
            ),
        ]
        | None
    ) = None
    max_concurrency: Annotated[int, msgspec.Meta(ge=1, le=100_000)] | None = None
    queue_s: _Budget | None = None
    first_byte_s: _Budget | None = None
    idle_s: _Budget | None = None
    total_s: _Budget | None = None


_Owner = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": f"^{OWNER_PATTERN}$"})]
_Limit = Annotated[int, msgspec.Meta(extra_json_schema={"minimum": 1, "maximum": MOST_OF_A_LIMIT})]
_Names = Annotated[str, msgspec.Meta(extra_json_schema={"pattern": f"^{NAMES_PATTERN}$"})]


class NewOwner(msgspec.Struct, frozen=True):
    """Whose it is to be."""

    owner: _Owner


class NewKey(msgspec.Struct, frozen=True):
    """A key that is to be made. `llms` is not for `admin`, the limits are for `client` alone."""

    role: Role
    name: Annotated[str, msgspec.Meta(extra_json_schema={"maxLength": MAX_KEY_NAME_CHARS})] | None = None
    owner: _Owner | None = None
    llms: Annotated[list[_Names], msgspec.Meta(extra_json_schema={"minItems": 1, "maxItems": MAX_PATTERNS})] | None = (
        None
    )
    rpm: _Limit | None = None
    max_in_flight: _Limit | None = None
    expires_in_s: (
        Annotated[float, msgspec.Meta(extra_json_schema={"exclusiveMinimum": 0, "maximum": LONGEST_KEY_S})] | None
    ) = None


class KeyList(msgspec.Struct, frozen=True):
    """Keys, oldest first."""

    data: list[Key]


class LLM(msgspec.Struct, frozen=True):
    """A row with its work."""

    name: Annotated[str, Name]
    kind: Kind
    type: str
    model: str
    status: Status
    session_id: Annotated[str, Id] | None
    owner: str
    last_heartbeat_at: Annotated[str, Instant]
    inactive_since: Annotated[str, Instant] | None
    max_concurrency: int | None
    pool: Annotated[str, Name] | None
    group: Annotated[str, Name] | None
    wake_s: float | None
    queue_s: float | None
    first_byte_s: float | None
    idle_s: float | None
    total_s: float | None
    hold: Hold | None
    paused: bool
    in_flight: int
    stopping: int
    waiting: int
    waking: bool
    routable: bool
    penalty: float
    url: str | None
    key_env: str | None


class Agent(msgspec.Struct, frozen=True):
    """What a publisher calls itself."""

    name: str
    version: str


class Session(msgspec.Struct, frozen=True):
    """A publisher's registration."""

    session_id: Annotated[str, Id]
    owner: str
    epoch: int
    connected: bool
    agent: Agent
    llms: tuple[Annotated[str, Name], ...]
    last_heartbeat_at: Annotated[str, Instant]


class Task(msgspec.Struct, frozen=True):
    """An infer or a wake under way. `position` (1: next) and `estimate_s` (until it is sent) are of those that wait."""

    task_id: Annotated[str, Id]
    kind: Literal["infer", "wake"]
    llm: Annotated[str, Name]
    session_id: Annotated[str, Id] | None
    state: Literal["waking", "queued", "sent", "answering"]
    age_s: float
    position: int | None
    estimate_s: float | None


class LLMList(msgspec.Struct, frozen=True):
    """Rows."""

    data: list[LLM]


class SessionList(msgspec.Struct, frozen=True):
    """Sessions."""

    data: list[Session]


class TaskList(msgspec.Struct, frozen=True):
    """Tasks."""

    data: list[Task]


class Swept(msgspec.Struct, frozen=True):
    """What one sweep did: names of rows, in the order in which they went."""

    inactivated: tuple[str, ...]
    deleted: tuple[str, ...]


def add_admin_routes(routes: Routes, broker: Broker) -> None:
    """Put the routes of operators there."""
    config = broker.config

    @routes.add("GET", "/admin/v1/llms", role="admin", answer=LLMList)
    async def list_llms(call: Call) -> Answer:
        """List all rows."""
        return json_answer(LLMList([describe_llm(view) for view in broker.llm_views()]))

    @routes.add("GET", _LLM_PATH, role="admin", answer=LLM, errors=(ModelNotFound,))
    async def get_llm(call: Call, name: str) -> Answer:
        """Show one row."""
        return json_answer(describe_llm(broker.llm_view(name)))

    @routes.add(
        "PUT",
        _LLM_PATH,
        role="admin",
        body=PublicLLM,
        answer=LLM,
        errors=(LLMIsVirtual, LLMNameTaken, StoreUnavailable),
    )
    async def put_llm(call: Call, name: str, said: PublicLLM) -> Answer:
        """Make or change a public row."""
        if not is_llm_name(name):
            raise InvalidRequest("This is no valid name for a model.", param="name")
        for param, text in (("type", said.type), ("model", said.model)):
            if len(text.encode()) > config.max_text_bytes:
                raise InvalidRequest(f"This text is longer than {config.max_text_bytes} bytes.", param=param)
        if not said.model:
            raise InvalidRequest("The upstream's own id of the model is required.", param="model")
        _check_url(said.url)
        if said.key_env is not None and not is_upstream_variable(said.key_env):
            raise InvalidRequest("A key is read from a variable named WAKECALL_UPSTREAM_….", param="key_env")
        view = await broker.put_public_llm(name, **msgspec.structs.asdict(said))
        return json_answer(describe_llm(view))

    @routes.add("DELETE", _LLM_PATH, role="admin", answer=None, errors=(ModelNotFound, StoreUnavailable))
    async def delete_llm(call: Call, name: str) -> Answer:
        """Delete a row, and fail its infers."""
        await broker.delete_llm(name)
        return no_content()

    @routes.add("GET", "/admin/v1/sessions", role="admin", answer=SessionList)
    async def list_sessions(call: Call) -> Answer:
        """List all sessions."""
        return json_answer(SessionList([_session(view) for view in broker.session_views()]))

    @routes.add(
        "DELETE",
        "/admin/v1/sessions/<session_id>",
        role="admin",
        answer=None,
        errors=(SessionNotFound, StoreUnavailable),
    )
    async def evict(call: Call, session_id: str) -> Answer:
        """Evict a session: its rows are withdrawn, its publisher stops."""
        await broker.evict(session_id)
        return no_content()

    @routes.add(
        "PATCH",
        "/admin/v1/sessions/<session_id>",
        role="admin",
        body=NewOwner,
        answer=Session,
        errors=(SessionNotFound, StoreUnavailable),
    )
    async def change_session(call: Call, session_id: str, said: NewOwner) -> Answer:
        """Hand a session and its rows over to another owner."""
        return json_answer(_session(await broker.hand_over_session(session_id, said.owner)))

    @routes.add("PATCH", _LLM_PATH, role="admin", body=NewOwner, answer=LLM, errors=(ModelNotFound, StoreUnavailable))
    async def change_llm(call: Call, name: str, said: NewOwner) -> Answer:
        """Hand a row over to another owner."""
        return json_answer(describe_llm(await broker.hand_over_llm(name, said.owner)))

    @routes.add("GET", "/admin/v1/keys", role="admin", answer=KeyList)
    async def list_keys(call: Call) -> Answer:
        """List all keys."""
        return json_answer(KeyList([describe_key(view) for view in broker.key_views()]))

    @routes.add(
        "POST", "/admin/v1/keys", role="admin", body=NewKey, answer={"201": MadeKey}, errors=(StoreUnavailable,)
    )
    async def create_key(call: Call, said: NewKey) -> Answer:
        """Make a key."""
        lasts = said.expires_in_s is None or said.expires_in_s >= _LASTING_S
        if broker.is_open and not (said.role == "admin" and lasts):
            raise Forbidden(
                "With this key the broker is open no more. Make one of role admin first that lasts, to operate it with."
            )
        made = await broker.create_key(
            said.role,
            name=said.name or "",
            owner=said.owner,
            llms=said.llms,
            rpm=said.rpm,
            max_in_flight=said.max_in_flight,
            expires_in_s=said.expires_in_s,
        )
        shown = msgspec.structs.asdict(describe_key(KeyView(made.key, 0, expired=False)))
        return json_answer(MadeKey(**shown, key=made.secret), 201, {"Cache-Control": "no-store"})

    @routes.add("DELETE", "/admin/v1/keys/<key_id>", role="admin", answer=None, errors=(NotFound, StoreUnavailable))
    async def revoke_key(call: Call, key_id: str) -> Answer:
        """Revoke a key."""
        until = broker.now() + _LASTING_S
        others = [view.key for view in broker.key_views() if view.key.key_id != key_id and view.key.role == "admin"]
        if not broker.is_open and not any(key.expires_at is None or key.expires_at >= until for key in others):
            raise Forbidden("This is the last key of role admin that lasts. Make another one first, and use that.")
        await broker.revoke_key(key_id)
        return no_content()

    @routes.add("GET", "/admin/v1/tasks", role="admin", answer=TaskList)
    async def list_tasks(call: Call) -> Answer:
        """List the infers and wakes under way."""
        return json_answer(TaskList([_task(view) for view in broker.task_views()]))

    @routes.add("POST", "/admin/v1/sweep", role="admin", answer=Swept, errors=(StoreUnavailable,))
    async def sweep(call: Call) -> Answer:
        """Sweep now: stale rows go inactive, and those inactive for too long are deleted."""
        report = await broker.sweep()
        return json_answer(Swept(report.inactivated, report.deleted))


def _check_url(url: str) -> None:
    """An upstream's address. Raises InvalidRequest: not http(s), not absolute, or with something secret in it."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise InvalidRequest("This is no URL.", param="url") from None
    if not re.fullmatch(_URL, url) or parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise InvalidRequest("An upstream's address is an absolute http or https URL.", param="url")
    if "@" in parts.netloc:
        raise InvalidRequest("A URL is no place for credentials: name a variable in `key_env`.", param="url")
    if parts.query or parts.fragment:
        raise InvalidRequest("An upstream's address has no query and no fragment.", param="url")


def describe_llm(view: LLMView) -> LLM:
    """A row as operators see it."""
    llm = view.llm
    return LLM(
        name=llm.name,
        kind=llm.kind,
        type=llm.type,
        model=llm.model,
        status=llm.status,
        session_id=llm.session_id,
        owner=llm.owner,
        last_heartbeat_at=instant(llm.last_heartbeat_at),
        inactive_since=None if llm.inactive_since is None else instant(llm.inactive_since),
        max_concurrency=llm.max_concurrency,
        pool=llm.pool,
        group=llm.group,
        wake_s=llm.wake_s,
        queue_s=llm.queue_s,
        first_byte_s=llm.first_byte_s,
        idle_s=llm.idle_s,
        total_s=llm.total_s,
        hold=llm.hold,
        paused=llm.paused,
        in_flight=view.in_flight,
        stopping=view.stopping,
        waiting=view.waiting,
        waking=view.waking,
        routable=view.routable,
        penalty=round(view.penalty, 3),
        url=llm.url,
        key_env=llm.key_env,
    )


def _session(view: SessionView) -> Session:
    record = view.record
    return Session(
        session_id=record.session_id,
        owner=record.owner,
        epoch=record.epoch,
        connected=view.connected,
        agent=Agent(record.agent_name, record.agent_version),
        llms=view.llms,
        last_heartbeat_at=instant(record.last_heartbeat_at),
    )


def _task(view: TaskView) -> Task:
    return Task(
        task_id=view.task_id,
        kind=view.kind,
        llm=view.llm,
        session_id=view.session_id,
        state=view.state,
        age_s=round(view.age_s, 3),
        position=view.position,
        estimate_s=None if view.estimate_s is None else round(view.estimate_s, 3),
    )
