"""Records as rows of SQLite's tables: the statements that write and read them, and the way from one to the other."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import fields
from operator import attrgetter
from typing import Final

from ..drafts import LLMDraft
from ..keys import ROLES
from ..ledger import CellKey, Usage, UsageBy
from ..models import LLM, Alias, Key, Kind, SessionRecord, Status

_LLM_COLUMNS: Final = tuple(each.name for each in fields(LLM))
_SESSION_COLUMNS: Final = tuple(each.name for each in fields(SessionRecord))
_KEY_COLUMNS: Final = tuple(each.name for each in fields(Key))
_ALIAS_COLUMNS: Final = tuple(each.name for each in fields(Alias))


def _quoted(columns: tuple[str, ...]) -> str:
    return ", ".join(f'"{name}"' for name in columns)


def _upsert(table: str, columns: tuple[str, ...], *, keys: int = 1) -> str:
    """An upsert by the first columns. It updates in place: REPLACE would take the row out of every index and back."""
    key = ", ".join(columns[:keys])
    sets = ", ".join(f'"{name}" = excluded."{name}"' for name in columns[keys:])
    marks = ", ".join("?" for _ in columns)
    names = _quoted(columns)
    return f"INSERT INTO {table} ({names}) VALUES ({marks}) ON CONFLICT ({key}) DO UPDATE SET {sets}"  # noqa: S608


PUT_LLM: Final = _upsert("llms", _LLM_COLUMNS)
PUT_SESSION: Final = _upsert("sessions", _SESSION_COLUMNS)
PUT_KEY: Final = _upsert("keys", _KEY_COLUMNS)
PUT_ALIAS: Final = _upsert("aliases", _ALIAS_COLUMNS)
# The condition is that of the index of live rows, as below. One statement, for at a start these are all that were live.
LOSE_LLMS: Final = (
    "UPDATE llms SET remembers = status, status = 'inactive', inactive_since = ?"
    " WHERE kind = 'virtual' AND status <> 'inactive'"
)
DROP_LLM: Final = "DELETE FROM llms WHERE name = ?"
DROP_SESSION: Final = "DELETE FROM sessions WHERE session_id = ?"
DROP_KEY: Final = "DELETE FROM keys WHERE key_id = ?"
DROP_ALIAS: Final = "DELETE FROM aliases WHERE name = ?"

_SELECT_LLMS: Final = f"SELECT {_quoted(_LLM_COLUMNS)} FROM llms"  # noqa: S608
LOAD_LLMS: Final = f"{_SELECT_LLMS} ORDER BY name"
LOAD_SESSIONS: Final = f"SELECT {_quoted(_SESSION_COLUMNS)} FROM sessions ORDER BY session_id"  # noqa: S608
LOAD_KEYS: Final = f"SELECT {_quoted(_KEY_COLUMNS)} FROM keys ORDER BY key_id"  # noqa: S608
LOAD_ALIASES: Final = f"SELECT {_quoted(_ALIAS_COLUMNS)} FROM aliases ORDER BY name"  # noqa: S608
OF_SESSION: Final = f"{_SELECT_LLMS} WHERE session_id = ? ORDER BY name"
# The conditions stand here word for word as in the partial indexes: SQLite takes those only where it sees the same.
STALE: Final = (
    f"{_SELECT_LLMS} WHERE kind = 'virtual' AND status <> 'inactive' AND last_heartbeat_at <= ?"
    " ORDER BY last_heartbeat_at, name"
)
EXPIRED: Final = (
    f"{_SELECT_LLMS} WHERE kind = 'virtual' AND status = 'inactive' AND inactive_since <= ?"
    " ORDER BY inactive_since, name"
)

llm_values: Final = attrgetter(*_LLM_COLUMNS)
session_values: Final = attrgetter(*_SESSION_COLUMNS)
# An enum's own constructor takes longer than all else that a row is made with.
_STATUSES: Final = {each.value: each for each in Status}
_REMEMBERED: Final[dict[str | None, Status | None]] = {None: None} | {each.value: each for each in Status}
_KINDS: Final = {each.value: each for each in Kind}


def llms_of(rows: sqlite3.Cursor) -> tuple[LLM, ...]:
    found = []
    # Fetched first: a cursor that is left in the middle keeps its snapshot, and with it the log from being cut back.
    for row in rows.fetchall():
        draft = LLMDraft(*row)
        try:
            draft.status = _STATUSES[draft.status]
            draft.remembers = _REMEMBERED[draft.remembers]
            draft.kind = _KINDS[draft.kind]
        except KeyError as error:
            raise ValueError(f"a row has the status or kind {error}, which is none") from error
        draft.paused = bool(draft.paused)
        draft.__class__ = LLM
        found.append(draft)
    return tuple(found)


def keys_of(rows: sqlite3.Cursor) -> tuple[Key, ...]:
    found = []
    for row in rows.fetchall():
        values = dict(zip(_KEY_COLUMNS, row, strict=True))
        if values["role"] not in ROLES:
            raise ValueError(f"a key has the role {values['role']!r}, which is none")
        if values["llms"] is not None:
            values["llms"] = tuple(json.loads(values["llms"]))
        found.append(Key(**values))
    return tuple(found)


def aliases_of(rows: sqlite3.Cursor) -> tuple[Alias, ...]:
    return tuple(Alias(name, tuple(json.loads(targets)), created_at) for name, targets, created_at in rows.fetchall())


def alias_values(alias: Alias) -> tuple[object, ...]:
    return alias.name, json.dumps(alias.targets), alias.created_at


def key_values(key: Key) -> tuple[object, ...]:
    patterns = None if key.llms is None else json.dumps(key.llms)
    return tuple(patterns if name == "llms" else getattr(key, name) for name in _KEY_COLUMNS)


# Usage --------------------------------------------------------------------------------------------------------------

_CELL_KEY: Final = ("hour", "key_id", "llm")
_COUNTS: Final = tuple(each.name for each in fields(Usage))

PUT_USAGE: Final = _upsert("usage", (*_CELL_KEY, *_COUNTS), keys=len(_CELL_KEY))
DROP_USAGE: Final = "DELETE FROM usage WHERE hour < ?"
LOAD_CELLS: Final = f"SELECT {_quoted((*_CELL_KEY, *_COUNTS))} FROM usage WHERE hour >= ?"  # noqa: S608
_SUMS: Final = ", ".join(f"sum({name})" for name in _COUNTS)


def _sum_by(column: str) -> str:
    return f"SELECT {column}, {_SUMS} FROM usage WHERE hour >= ? GROUP BY {column} ORDER BY {column}"  # noqa: S608


SUM_USAGE: Final[dict[UsageBy, str]] = {"key": _sum_by("key_id"), "llm": _sum_by("llm")}

_count_values = attrgetter(*_COUNTS)


def usage_values(cell: CellKey, usage: Usage) -> tuple[object, ...]:
    return (*cell, *_count_values(usage))


def cells_of(rows: sqlite3.Cursor) -> dict[CellKey, Usage]:
    return {(hour, key_id, llm): Usage(*counts) for hour, key_id, llm, *counts in rows.fetchall()}


def sums_of(rows: sqlite3.Cursor) -> dict[str, Usage]:
    return {name: Usage(*counts) for name, *counts in rows.fetchall()}
