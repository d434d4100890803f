"""The schema of the SQLite store, as the steps that made it what it is. A step that has been released is never changed."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import Final

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

__all__ = ["KNOWN", "MIGRATIONS"]

MIGRATIONS: Final = Migrations("wakecall")


@MIGRATIONS(name="0001_llms_and_sessions")
def _llms_and_sessions(db: Database) -> None:
    # WITHOUT ROWID: rows are small and always asked for by their key, so one tree does instead of two.
    db.execute(
        """
        CREATE TABLE llms (
            name TEXT NOT NULL PRIMARY KEY,
            owner TEXT NOT NULL,
            status TEXT NOT NULL,
            created_at REAL NOT NULL,
            last_heartbeat_at REAL NOT NULL,
            kind TEXT NOT NULL,
            type TEXT NOT NULL,
            model TEXT NOT NULL,
            session_id TEXT,
            remembers TEXT,
            inactive_since REAL,
            max_concurrency INTEGER,
            wake_s REAL,
            cancel TEXT NOT NULL,
            pool TEXT,
            url TEXT,
            key_env TEXT
        ) WITHOUT ROWID
        """
    )
    db.execute(
        """
        CREATE TABLE sessions (
            session_id TEXT NOT NULL PRIMARY KEY,
            owner TEXT NOT NULL,
            created_at REAL NOT NULL,
            last_heartbeat_at REAL NOT NULL,
            epoch INTEGER NOT NULL,
            agent_name TEXT NOT NULL,
            agent_version TEXT NOT NULL,
            unused_since REAL
        ) WITHOUT ROWID
        """
    )
    # Each index ends in the name, so that its order is the answer's; the partial ones hold only what a sweep may
    # retire, and a public row stands in neither.
    db.execute("CREATE INDEX llms_by_session ON llms (session_id, name)")
    db.execute(
        "CREATE INDEX llms_by_heartbeat ON llms (last_heartbeat_at, name)"
        " WHERE kind = 'virtual' AND status <> 'inactive'"
    )
    db.execute(
        "CREATE INDEX llms_by_inactivity ON llms (inactive_since, name) WHERE kind = 'virtual' AND status = 'inactive'"
    )


@MIGRATIONS(name="0002_keys")
def _keys_table(db: Database) -> None:
    db.execute("ALTER TABLE sessions ADD COLUMN key_id TEXT")
    # `llms` is a JSON list of patterns. A digest that stood here twice would be two keys that are one.
    db.execute(
        """
        CREATE TABLE keys (
            key_id TEXT NOT NULL PRIMARY KEY,
            role TEXT NOT NULL,
            owner TEXT NOT NULL,
            digest TEXT NOT NULL UNIQUE,
            created_at REAL NOT NULL,
            name TEXT NOT NULL,
            expires_at REAL,
            llms TEXT,
            rpm INTEGER,
            max_in_flight INTEGER
        ) WITHOUT ROWID
        """
    )


@MIGRATIONS(name="0003_traffic")
def _traffic(db: Database) -> None:
    # `group` is a word of SQL's, hence the quotes. `targets` is a JSON list of names.
    for column in ('"group" TEXT', "queue_s REAL", "first_byte_s REAL", "idle_s REAL", "total_s REAL", "hold TEXT"):
        db.execute(f"ALTER TABLE llms ADD COLUMN {column}")
    db.execute("ALTER TABLE llms ADD COLUMN paused INTEGER NOT NULL DEFAULT 0")
    db.execute(
        """
        CREATE TABLE aliases (
            name TEXT NOT NULL PRIMARY KEY,
            targets TEXT NOT NULL,
            created_at REAL NOT NULL
        ) WITHOUT ROWID
        """
    )


@MIGRATIONS(name="0004_usage")
def _usage(db: Database) -> None:
    # By the hour first: what is asked for, and what is deleted, is from an hour on or before one.
    db.execute(
        """
        CREATE TABLE usage (
            hour INTEGER NOT NULL,
            key_id TEXT NOT NULL,
            llm TEXT NOT NULL,
            requests INTEGER NOT NULL,
            completed INTEGER NOT NULL,
            failed INTEGER NOT NULL,
            cancelled INTEGER NOT NULL,
            unknown INTEGER NOT NULL,
            tokens_in INTEGER NOT NULL,
            tokens_out INTEGER NOT NULL,
            seconds REAL NOT NULL,
            PRIMARY KEY (hour, key_id, llm)
        ) WITHOUT ROWID
        """
    )


# All of them are still to be applied to an empty database.
with closing(Database(sqlite3.connect(":memory:"), execute_plugins=False)) as _empty:
    KNOWN: Final = frozenset(each.name for each in MIGRATIONS.pending(_empty))
