"""`/admin/v1`: what operators call."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
from quart import Quart

from ..broker import Broker
from ..errors import Forbidden, InvalidRequest
from ..models import KeyView, LLMView, Role, SessionView, TaskView, is_llm_name
from .answers import Answer, json_answer, no_content
from .calls import begin, read_json

__all__ = ["add_admin_routes", "describe_key"]

_LLM_PATH: Final = "/admin/v1/llms/<path:name>"
_KEY_ENV: Final = re.compile(r"WAKECALL_UPSTREAM_[A-Z0-9_]+")
_URL: Final = re.compile(r"[!-~]{1,2048}")


class _PublicLLM(msgspec.Struct, frozen=True):
    type: str
    model: str
    url: str
    key_env: str | None = None


class _NewOwner(msgspec.Struct, frozen=True):
    owner: str


class _NewKey(msgspec.Struct, frozen=True):
    role: Role
    name: str | None = None
    owner: str | None = None
    llms: list[str] | None = None
    rpm: int | None = None
    max_in_flight: int | None = None
    expires_in_s: float | None = None


def add_admin_routes(app: Quart, broker: Broker) -> None:
    """Put the routes of operators into `app`."""
    config = broker.config

    async def list_llms() -> Answer:
        begin(broker, "admin")
        return json_answer({"data": [_llm(view) for view in broker.llm_views()]})

    async def get_llm(name: str) -> Answer:
        begin(broker, "admin")
        return json_answer(_llm(broker.llm_view(name)))

    async def put_llm(name: str) -> Answer:
        call = begin(broker, "admin")
        said = await read_json(call, _PublicLLM, config.max_body_bytes)
        if not is_llm_name(name):
            raise InvalidRequest("This is no valid name for a model.", param="name")
        for param, text in (("type", said.type), ("model", said.model)):
            if len(text.encode()) > config.max_message_bytes:
                raise InvalidRequest(f"This text is longer than {config.max_message_bytes} bytes.", param=param)
        if not said.model:
            raise InvalidRequest("The upstream's own id of the model is required.", param="model")
        _check_url(said.url)
        if said.key_env is not None and not _KEY_ENV.fullmatch(said.key_env):
            raise InvalidRequest("A key is read from a variable named WAKECALL_UPSTREAM_….", param="key_env")
        view = await broker.put_public_llm(name, type=said.type, model=said.model, url=said.url, key_env=said.key_env)
        return json_answer(_llm(view))

    async def delete_llm(name: str) -> Answer:
        begin(broker, "admin")
        await broker.delete_llm(name)
        return no_content()

    async def list_sessions() -> Answer:
        begin(broker, "admin")
        return json_answer({"data": [_session(view) for view in broker.session_views()]})

    async def evict(session_id: str) -> Answer:
        begin(broker, "admin")
        await broker.evict(session_id)
        return no_content()

    async def change_session(session_id: str) -> Answer:
        call = begin(broker, "admin")
        said = await read_json(call, _NewOwner, config.max_body_bytes)
        return json_answer(_session(await broker.hand_over_session(session_id, said.owner)))

    async def change_llm(name: str) -> Answer:
        call = begin(broker, "admin")
        said = await read_json(call, _NewOwner, config.max_body_bytes)
        return json_answer(_llm(await broker.hand_over_llm(name, said.owner)))

    async def list_keys() -> Answer:
        begin(broker, "admin")
        return json_answer({"data": [describe_key(view) for view in broker.key_views()]})

    async def create_key() -> Answer:
        call = begin(broker, "admin")
        said = await read_json(call, _NewKey, config.max_body_bytes)
        if broker.is_open and said.role != "admin":
            raise Forbidden(
                "With this key the broker is open no more. Make one of role admin first, to operate it with."
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
        view = KeyView(made.key, 0, expired=False)
        return json_answer({**describe_key(view), "key": made.secret}, 201, {"Cache-Control": "no-store"})

    async def revoke_key(key_id: str) -> Answer:
        begin(broker, "admin")
        others = [view for view in broker.key_views() if view.key.key_id != key_id]
        if not any(view.key.role == "admin" and not view.expired for view in others) and not broker.is_open:
            raise Forbidden("This is the last key of role admin. Make another one first, and use that.")
        await broker.revoke_key(key_id)
        return no_content()

    async def list_tasks() -> Answer:
        begin(broker, "admin")
        return json_answer({"data": [_task(view) for view in broker.task_views()]})

    async def sweep() -> Answer:
        begin(broker, "admin")
        report = await broker.sweep()
        return json_answer({"inactivated": report.inactivated, "deleted": report.deleted})

    app.add_url_rule("/admin/v1/llms", "list_llms", list_llms)
    app.add_url_rule(_LLM_PATH, "get_llm", get_llm)
    app.add_url_rule(_LLM_PATH, "put_llm", put_llm, methods=["PUT"])
    app.add_url_rule(_LLM_PATH, "delete_llm", delete_llm, methods=["DELETE"])
    app.add_url_rule("/admin/v1/sessions", "list_sessions", list_sessions)
    app.add_url_rule("/admin/v1/sessions/<session_id>", "evict", evict, methods=["DELETE"])
    app.add_url_rule("/admin/v1/sessions/<session_id>", "change_session", change_session, methods=["PATCH"])
    app.add_url_rule(_LLM_PATH, "change_llm", change_llm, methods=["PATCH"])
    app.add_url_rule("/admin/v1/keys", "list_keys", list_keys)
    app.add_url_rule("/admin/v1/keys", "create_key", create_key, methods=["POST"])
    app.add_url_rule("/admin/v1/keys/<key_id>", "revoke_key", revoke_key, methods=["DELETE"])
    app.add_url_rule("/admin/v1/tasks", "list_tasks", list_tasks)
    app.add_url_rule("/admin/v1/sweep", "sweep", sweep, methods=["POST"])


def _check_url(url: str) -> None:
    """An upstream's address. Raises InvalidRequest: not http(s), not absolute, or with something secret in it."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise InvalidRequest("This is no URL.", param="url") from None
    if not _URL.fullmatch(url) or parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise InvalidRequest("An upstream's address is an absolute http or https URL.", param="url")
    if "@" in parts.netloc:
        raise InvalidRequest("A URL is no place for credentials: name a variable in `key_env`.", param="url")
    if parts.query or parts.fragment:
        raise InvalidRequest("An upstream's address has no query and no fragment.", param="url")


def _llm(view: LLMView) -> dict[str, Any]:
    llm = view.llm
    return {
        "name": llm.name,
        "kind": llm.kind,
        "type": llm.type,
        "model": llm.model,
        "status": llm.status,
        "session_id": llm.session_id,
        "owner": llm.owner,
        "last_heartbeat_at": _instant(llm.last_heartbeat_at),
        "inactive_since": _instant(llm.inactive_since),
        "max_concurrency": llm.max_concurrency,
        "in_flight": view.in_flight,
        "waiting": view.waiting,
        "waking": view.waking,
        "routable": view.routable,
    }


def _session(view: SessionView) -> dict[str, Any]:
    record = view.record
    return {
        "session_id": record.session_id,
        "owner": record.owner,
        "epoch": record.epoch,
        "connected": view.connected,
        "agent": {"name": record.agent_name, "version": record.agent_version},
        "llms": view.llms,
        "last_heartbeat_at": _instant(record.last_heartbeat_at),
    }


def describe_key(view: KeyView) -> dict[str, Any]:
    """A key as operators see it, which is all but the key itself."""
    key = view.key
    return {
        "id": key.key_id,
        "role": key.role,
        "owner": key.owner,
        "name": key.name,
        "llms": key.llms,
        "rpm": key.rpm,
        "max_in_flight": key.max_in_flight,
        "created_at": _instant(key.created_at),
        "expires_at": _instant(key.expires_at),
        "expired": view.expired,
        "in_flight": view.in_flight,
    }


def _task(view: TaskView) -> dict[str, Any]:
    return {
        "task_id": view.task_id,
        "kind": view.kind,
        "llm": view.llm,
        "session_id": view.session_id,
        "state": view.state,
        "age_s": round(view.age_s, 3),
    }


def _instant(seconds: float | None) -> str | None:
    """RFC 3339 in UTC, to the millisecond."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
