"""Everything that a publisher can be told, checked before anything is opened."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias
from urllib.parse import urlsplit

from ..addresses import api_base
from ..keys import is_presentable
from ..models import MAX_NAME_LENGTH, CancelMode, is_id, is_llm_name
from .errors import InvalidConfig

Upload: TypeAlias = Literal["stream", "chunks"]
AnnouncedStatus: TypeAlias = Literal["active", "hibernating"]

_INVALID_IN_SEGMENT = re.compile(r"[^A-Za-z0-9._:@-]+")


def name_for(engine_id: str) -> str:
    """The name under which an engine's model is published.

    A valid name is kept. Anything else (llama.cpp lists the path of its file) becomes its last path segment without
    `.gguf`, and what is still no valid name has its offending characters replaced by `-`.

    Raises:
        InvalidConfig: nothing of the id can stand in a name.
    """
    if is_llm_name(engine_id):
        return engine_id
    segment = re.split(r"[/\\]", engine_id.rstrip("/\\"))[-1]
    if segment.lower().endswith(".gguf"):
        segment = segment[: -len(".gguf")]
    name = _INVALID_IN_SEGMENT.sub("-", segment).lstrip("._:@-")[:MAX_NAME_LENGTH]
    if not is_llm_name(name):
        raise InvalidConfig(
            f"the engine's model id {engine_id!r} gives no valid name; publish it with a name of your own"
        )
    return name


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """One model to publish: under `name`, as the engine's `model` (default: the same)."""

    name: str
    model: str | None = None

    @property
    def engine_id(self) -> str:
        return self.model if self.model is not None else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class PublisherConfig:
    """The settings of `run_publisher`. Durations are in seconds.

    Args:
        broker_url: the broker's address, a path prefix included if it has one.
        engine_url: the engine's address, with or without `/v1`.
        models: what to publish; empty: every model that the engine lists (then the engine must be up).
        type: the engine's kind, free text that the broker shows.
        pool: a name that all of them answer to beside their own, as may models of other publishers; None: none.
        group: a name for this engine's room, which has space for one of its models at a time (swap.py); None: for all.
        session_id: the sticky identity; None: one is made up and kept in the state file of this broker and engine.
        max_concurrency: infers at a time for each model; None: no bound.
        hibernating: the engine sleeps when the publisher starts; needs `models`, unless they are a group.
        wake_command, hibernate_command: run with `sh -c` to start and to stop the engine, or the model in WAKECALL_LLM (and
            WAKECALL_MODEL, the engine's own id of it) where they are a group.
        hibernate_after_s: go to sleep after so long without an infer; None: never.
        engine_key_env: the environment variable that holds the engine's key; None: it wants none.
        broker_key: the broker's API key, if it has some; see `keys.header_for`.
        upload: `stream`, one streaming POST for each answer, or `chunks` for proxies that buffer uploads.
        cancel: `abort` closes the engine's connection when an infer is cancelled; `drain` reads its answer to the end.
        wake_s: the most that a wake may take.
        queue_s, first_byte_s, idle_s, total_s: what a request may take of each, at most; None: the broker's own bounds.
        health_path: what to ask the engine for instead of `/health` and then `/v1/models`.
        state_dir: where the state file is kept; None: the user's state directory.
        connect_s: for opening a connection to broker or engine.
        request_s: for each read and write of a short request to the broker (register, heartbeat, goodbye).
        keepalive_s: what to assume until `hello` says it; a channel silent for three of them is opened anew.
        backoff_base_s, backoff_cap_s: first and longest pause before the channel is opened again.
        drain_grace_s: how long infers in flight are waited for when stopping.
        farewell_s: then, for each of the two requests of a goodbye, their turn among others included.
        health_interval_s, health_timeout_s: pause between two probes of a waking engine, and patience with one.
        hibernate_s: the most that the hibernate command may take.
        terminate_grace_s: between SIGTERM and SIGKILL for a command that is being ended.

    Raises:
        InvalidConfig: a value is out of range, or two of them do not go together.
    """

    broker_url: str
    engine_url: str
    models: tuple[PublishedModel, ...] = ()
    type: str | None = None
    pool: str | None = None
    group: str | None = None
    session_id: str | None = None
    max_concurrency: int | None = None
    hibernating: bool = False
    wake_command: str | None = None
    hibernate_command: str | None = None
    hibernate_after_s: float | None = None
    engine_key_env: str | None = None
    broker_key: str | None = field(default=None, repr=False)
    upload: Upload = "stream"
    cancel: CancelMode = "abort"
    wake_s: float = 120.0
    queue_s: float | None = None
    first_byte_s: float | None = None
    idle_s: float | None = None
    total_s: float | None = None
    health_path: str | None = None
    state_dir: Path | None = None
    connect_s: float = 10.0
    request_s: float = 30.0
    keepalive_s: float = 15.0
    backoff_base_s: float = 0.2
    backoff_cap_s: float = 15.0
    drain_grace_s: float = 30.0
    farewell_s: float = 5.0
    health_interval_s: float = 0.25
    health_timeout_s: float = 5.0
    hibernate_s: float = 120.0
    terminate_grace_s: float = 2.0

    def __post_init__(self) -> None:
        _check_url("broker", self.broker_url)
        _check_url("engine", self.engine_url)
        names = [model.name for model in self.models]
        for name in names:
            if not is_llm_name(name):
                raise InvalidConfig(f"{name!r} is no valid name for a model")
        if len(set(names)) != len(names):
            raise InvalidConfig("a name is given twice")
        if self.pool is not None and not is_llm_name(self.pool):
            raise InvalidConfig(f"{self.pool!r} is no valid name for a pool")
        if self.pool in names:
            raise InvalidConfig("a pool's name is not that of a model")
        if self.session_id is not None and not is_id(self.session_id):
            raise InvalidConfig("a session id is 1 to 128 of A-Z a-z 0-9 _ -")
        if self.broker_key is not None and not is_presentable(self.broker_key):
            # Which it is not said: it may be a key with something beside it.
            raise InvalidConfig("an API key is of printable ASCII, without spaces")
        if self.max_concurrency is not None and not 1 <= self.max_concurrency <= 100_000:
            raise InvalidConfig("max_concurrency is 1 to 100,000")
        if self.group is not None and not is_llm_name(self.group):
            raise InvalidConfig(f"{self.group!r} is no valid name for a group")
        if self.hibernating and not self.models and self.group is None:
            raise InvalidConfig("an engine that sleeps cannot be asked for its models: give their names")
        if self.hibernate_command is not None and self.hibernate_after_s is None and self.group is None:
            raise InvalidConfig("the hibernate command never runs without hibernate_after_s")
        if self.upload not in ("stream", "chunks"):
            raise InvalidConfig("upload is stream or chunks")
        if self.cancel not in ("abort", "drain"):
            raise InvalidConfig("cancel is abort or drain")
        if self.health_path is not None and not self.health_path.startswith("/"):
            raise InvalidConfig("the health path starts with /")
        for setting in ("wake_s", "keepalive_s", "connect_s", "request_s", "backoff_base_s", "backoff_cap_s"):
            if not getattr(self, setting) > 0:
                raise InvalidConfig(f"{setting} is more than 0")
        for setting in ("hibernate_after_s", "queue_s", "first_byte_s", "idle_s", "total_s"):
            if (seconds := getattr(self, setting)) is not None and not seconds > 0:
                raise InvalidConfig(f"{setting} is more than 0")

    @property
    def broker_base(self) -> str:
        """The broker's address without a slash at its end."""
        return self.broker_url.rstrip("/")

    @property
    def engine_base(self) -> str:
        """The engine's address without `/v1` and without a slash at its end: paths of frames begin with `/v1`."""
        return api_base(self.engine_url)

    @property
    def manages_sleep(self) -> bool:
        """Whether this publisher has a say in whether the engine sleeps, and so a status to announce."""
        return self.hibernating or self.wake_command is not None or self.hibernate_after_s is not None

    def engine_key(self) -> str | None:
        """The engine's key from its environment variable.

        Raises:
            InvalidConfig: the variable is named but not set.
        """
        if self.engine_key_env is None:
            return None
        key = os.environ.get(self.engine_key_env, "")
        if not key:
            raise InvalidConfig(f"the environment variable {self.engine_key_env} for the engine's key is not set")
        return key


def _check_url(what: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise InvalidConfig(f"the {what}'s address has to be an http:// or https:// URL")
    if parts.query or parts.fragment:
        raise InvalidConfig(f"the {what}'s address has no query and no fragment")
