"""Records of every shape, as Hypothesis strategies, and ways to open a store of each kind."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from hypothesis import strategies as st

from wakecall.keys import ROLES
from wakecall.ledger import CellKey, Usage
from wakecall.models import LLM, Alias, Batch, Key, Kind, SessionRecord, Status
from wakecall.store import MemoryStore, Store
from wakecall.store.sqlite import open_sqlite_store

OpenStore = Callable[[str | os.PathLike[str]], AbstractAsyncContextManager[Store]]


@asynccontextmanager
async def open_memory_store(path: str | os.PathLike[str]) -> AsyncIterator[Store]:
    """A `MemoryStore`; the path is ignored."""
    store = MemoryStore()
    yield store
    await store.aclose()


OPENERS: dict[str, OpenStore] = {"memory": open_memory_store, "sqlite": open_sqlite_store}


def llm(name: str = "qwen", **changes: object) -> LLM:
    """An active virtual row of session `laptop`, except as said."""
    values: dict[str, object] = {
        "name": name,
        "owner": "local",
        "status": Status.ACTIVE,
        "created_at": 1000.0,
        "last_heartbeat_at": 1000.0,
        "session_id": "laptop",
    }
    return LLM(**{**values, **changes})  # type: ignore[arg-type]


def session(session_id: str = "laptop", **changes: object) -> SessionRecord:
    """A session, except as said."""
    values: dict[str, object] = {
        "session_id": session_id,
        "owner": "local",
        "created_at": 1000.0,
        "last_heartbeat_at": 1000.0,
    }
    return SessionRecord(**{**values, **changes})  # type: ignore[arg-type]


def key(key_id: str = "key_1", **changes: object) -> Key:
    """A client's key, except as said; no two ids have one digest."""
    values: dict[str, object] = {
        "key_id": key_id,
        "role": "client",
        "owner": "local",
        "digest": f"digest of {key_id}",
        "created_at": 1000.0,
    }
    return Key(**{**values, **changes})  # type: ignore[arg-type]


def alias(name: str = "fast", **changes: object) -> Alias:
    """An alias of `qwen`, except as said."""
    values: dict[str, object] = {"name": name, "targets": ("qwen",), "created_at": 1000.0}
    return Alias(**{**values, **changes})  # type: ignore[arg-type]


def batch_of(
    rows: Iterable[LLM] = (),
    sessions: Iterable[SessionRecord] = (),
    keys: Iterable[Key] = (),
    aliases: Iterable[Alias] = (),
    usage: Mapping[CellKey, Usage] | None = None,
) -> Batch:
    """A batch that writes these and deletes nothing."""
    return Batch(
        {each.name: each for each in rows},
        {each.session_id: each for each in sessions},
        {each.key_id: each for each in keys},
        {each.name: each for each in aliases},
        dict(usage or {}),
    )


def database_in(folder: Path) -> Path:
    return folder / "wakecall.db"


# Whatever Unicode can hold but lone surrogates, and oftener what breaks lines, quotes and C strings.
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.sampled_from(
        ["", "\u2028", "a\u2029b", "nul\0nul", "'; DROP TABLE llms; --", '"', "\U0001f999", "é", "e\u0301"]
    ),
)
#: Instants to the last bit; few enough whole ones that ties and cutoffs meet.
instants = st.one_of(st.integers(0, 5).map(float), st.floats(allow_nan=False, allow_infinity=False))
statuses = st.sampled_from(Status)
counts = st.integers(1, 2**63 - 1)

LLM_FIELDS = {
    "name": texts,
    "owner": texts,
    "status": statuses,
    "created_at": instants,
    "last_heartbeat_at": instants,
    "kind": st.sampled_from(Kind),
    "type": texts,
    "model": texts,
    "session_id": st.none() | st.sampled_from(["s1", "s2"]) | texts,
    "remembers": st.none() | statuses,
    "inactive_since": st.none() | instants,
    "max_concurrency": st.none() | counts,
    "wake_s": st.none() | instants,
    "cancel": st.sampled_from(["abort", "drain"]),
    "pool": st.none() | texts,
    "url": st.none() | texts,
    "key_env": st.none() | texts,
    "group": st.none() | texts,
    "queue_s": st.none() | instants,
    "first_byte_s": st.none() | instants,
    "idle_s": st.none() | instants,
    "total_s": st.none() | instants,
    "hold": st.sampled_from([None, "drain", "pause"]),
    "paused": st.booleans(),
}
SESSION_FIELDS = {
    "session_id": texts,
    "owner": texts,
    "created_at": instants,
    "last_heartbeat_at": instants,
    "epoch": st.integers(0, 2**63 - 1),
    "agent_name": texts,
    "agent_version": texts,
    "unused_since": st.none() | instants,
    "key_id": st.none() | texts,
}
KEY_FIELDS = {
    "key_id": texts,
    "role": st.sampled_from(ROLES),
    "owner": texts,
    "digest": texts,
    "created_at": instants,
    "name": texts,
    "expires_at": st.none() | instants,
    "llms": st.none() | st.lists(texts, max_size=3).map(tuple),
    "rpm": st.none() | counts,
    "max_in_flight": st.none() | counts,
}
ALIAS_FIELDS = {
    "name": texts,
    "targets": st.lists(texts, max_size=3).map(tuple),
    "created_at": instants,
}
USAGE_FIELDS = {
    "requests": st.integers(0, 10**6),
    "completed": st.integers(0, 10**6),
    "failed": st.integers(0, 10**6),
    "cancelled": st.integers(0, 10**6),
    "unknown": st.integers(0, 10**6),
    "tokens_in": st.integers(0, 10**15),
    "tokens_out": st.integers(0, 10**15),
    # Sums of these are exact, in whatever order they are made.
    "seconds": st.integers(0, 10**6).map(lambda eighths: eighths / 8),
}
llms = st.builds(LLM, **LLM_FIELDS)
sessions = st.builds(SessionRecord, **SESSION_FIELDS)
tables = st.lists(llms, max_size=12, unique_by=lambda x: x.name)
keys = st.builds(Key, **KEY_FIELDS)
key_tables = st.lists(keys, max_size=6, unique_by=(lambda x: x.key_id, lambda x: x.digest))
aliases = st.builds(Alias, **ALIAS_FIELDS)
alias_tables = st.lists(aliases, max_size=6, unique_by=lambda x: x.name)
usages = st.builds(Usage, **USAGE_FIELDS)
hours = st.integers(480_000, 480_005)
#: Few hours, keys and names, so that cells meet and sums have more than one.
cells = st.tuples(hours, st.sampled_from(["", "key_1"]) | texts, st.sampled_from(["qwen", "*"]) | texts)
cell_tables = st.dictionaries(cells, usages, max_size=12)
session_tables = st.lists(sessions, max_size=12, unique_by=lambda x: x.session_id)

# Few keys, so that batches meet.
_keys = st.sampled_from(["a", "b", "B", "ä", "a/b"])
batches = st.builds(
    Batch,
    st.dictionaries(_keys, st.none() | llms).map(
        lambda d: {key: value and llm(key, model=value.model, status=value.status) for key, value in d.items()}
    ),
    st.dictionaries(_keys, st.none() | sessions).map(
        lambda d: {key: value and session(key, epoch=value.epoch) for key, value in d.items()}
    ),
    st.dictionaries(_keys, st.none() | keys).map(
        lambda d: {key_id: value and key(key_id, name=value.name, llms=value.llms) for key_id, value in d.items()}
    ),
    st.dictionaries(_keys, st.none() | aliases).map(
        lambda d: {name: value and alias(name, targets=value.targets) for name, value in d.items()}
    ),
    st.dictionaries(st.tuples(hours, st.sampled_from(["", "key_1"]), st.just("qwen")), usages, max_size=6),
    st.just(0) | hours,
)
