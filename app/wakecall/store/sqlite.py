"""A store in one SQLite file.

How it works. One connection, used only from a worker thread and by one thread at a time (a limiter of one). A call that
has reached its thread runs to its end even if its caller is cancelled, so there never are two threads on the
connection, and a cancelled `write` was either not begun or is committed. A batch is one transaction of plain SQL:
`executemany` is several times as fast as sqlite-utils' upsert, which is used for what it is best at, the migrations.

Before anything is written, the file is looked at through a read-only connection: whatever is not ours, not whole or too
new is refused, and stays as it is to the last byte.

One broker to a file: a lock on `PATH.lock`, taken before the file is so much as opened. It is a file of its own because
closing any descriptor of the database would drop the locks that SQLite itself holds on it (POSIX locks belong to the
process), and a `flock` because the kernel drops it with its process, however that ends. Other programs may read the
file at any time.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, ParamSpec, TypeVar
from urllib.parse import quote

import trio
from sqlite_utils import Database

from ..ledger import CellKey, Usage, UsageBy
from ..models import LLM, Batch, SessionRecord, Snapshot
from . import rows
from .base import StoreError, StoreInUse
from .files import MAGIC, OpenFiles
from .migrations import KNOWN, MIGRATIONS

__all__ = ["SqliteStore", "open_sqlite_store"]

P = ParamSpec("P")
T = TypeVar("T")

# What SQLite, the binding of its parameters and the reading of its rows can raise: a lone surrogate is a UnicodeError,
# an integer beyond 64 bits an OverflowError, a status that is none a ValueError.
_TROUBLE: Final = (sqlite3.Error, OSError, OverflowError, ValueError)

# The store ----------------------------------------------------------------------------------------------------------


class SqliteStore:
    """What `open_sqlite_store` opens: a `Store` in one file."""

    _path: str
    _db: Database
    _files: OpenFiles
    _lock: int
    _connect: Callable[[], Database]
    _limiter: trio.CapacityLimiter
    _closed: bool

    def __init__(self) -> None:
        raise TypeError("use open_sqlite_store")

    @classmethod
    def _make(
        cls, path: str, db: Database, files: OpenFiles, lock: int, connect: Callable[[], Database]
    ) -> SqliteStore:
        self = cls.__new__(cls)
        self._path = path
        self._db = db
        self._files = files
        self._lock = lock
        self._connect = connect
        self._limiter = trio.CapacityLimiter(1)
        self._closed = False
        return self

    async def load(self) -> Snapshot:
        """All rows by name, all sessions and keys by id."""
        return await self._run("read", self._load)

    async def write(self, batch: Batch) -> None:
        """Commit a batch whole, or leave nothing of it."""
        await self._run("write to", self._write, batch)

    async def rows_of_session(self, session_id: str) -> tuple[LLM, ...]:
        """The rows of a session, by name."""
        return await self._run("read", self._query, rows.OF_SESSION, session_id)

    async def stale_rows(self, cutoff: float) -> tuple[LLM, ...]:
        """Live virtual rows whose last heartbeat is at or before `cutoff`, oldest first, then by name."""
        return await self._run("read", self._query, rows.STALE, cutoff)

    async def expired_rows(self, cutoff: float) -> tuple[LLM, ...]:
        """Inactive virtual rows that have been so since `cutoff` or before, oldest first, then by name."""
        return await self._run("read", self._query, rows.EXPIRED, cutoff)

    async def usage(self, since_hour: int, by: UsageBy) -> dict[str, Usage]:
        """All usage from an hour on, summed by the keys' ids or by the LLMs' names."""
        return await self._run("read", lambda: rows.sums_of(self._db.execute(rows.SUM_USAGE[by], (since_hour,))))

    async def usage_cells(self, since_hour: int) -> dict[CellKey, Usage]:
        """The cells from an hour on."""
        return await self._run("read", lambda: rows.cells_of(self._db.execute(rows.LOAD_CELLS, (since_hour,))))

    async def aclose(self) -> None:
        """Fold the log into the file, close it and give up its lock. Idempotent; what is under way ends first."""
        # Shielded: a cancelled owner would otherwise leave the lock behind for as long as its process lives.
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._close, limiter=self._limiter)

    async def _run(self, what: str, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        def guarded() -> T:
            if self._closed:
                raise StoreError(f"{self._path} has been closed.")
            try:
                return work(*args, **kwargs)
            except _TROUBLE as error:
                # SQLite keeps what it has read: a page that was damaged would be so still when the file is mended.
                with suppress(sqlite3.Error):
                    self._db.execute("PRAGMA shrink_memory")
                raise StoreError(f"Cannot {what} {self._path}: {error}") from error

        # Never abandoned on cancel: the thread would go on, and the next call would join it on the connection.
        return await trio.to_thread.run_sync(guarded, limiter=self._limiter)

    # What follows runs in the worker thread.

    def _load(self) -> Snapshot:
        # All reads from one transaction: they are one state.
        with _transaction(self._db, "BEGIN"):
            llms = rows.llms_of(self._db.execute(rows.LOAD_LLMS))
            sessions = tuple(SessionRecord(*row) for row in self._db.execute(rows.LOAD_SESSIONS))
            keys = rows.keys_of(self._db.execute(rows.LOAD_KEYS))
            aliases = rows.aliases_of(self._db.execute(rows.LOAD_ALIASES))
        return Snapshot(llms, sessions, keys, aliases)

    def _query(self, sql: str, argument: str | float) -> tuple[LLM, ...]:
        return rows.llms_of(self._db.execute(sql, (argument,)))

    def _write(self, batch: Batch) -> None:
        put_llms = [rows.llm_values(llm) for llm in batch.llms.values() if llm is not None]
        drop_llms = [(name,) for name, llm in batch.llms.items() if llm is None]
        put_sessions = [rows.session_values(session) for session in batch.sessions.values() if session is not None]
        drop_sessions = [(session_id,) for session_id, session in batch.sessions.items() if session is None]
        put_keys = [rows.key_values(key) for key in batch.keys.values() if key is not None]
        drop_keys = [(key_id,) for key_id, key in batch.keys.items() if key is None]
        put_aliases = [rows.alias_values(alias) for alias in batch.aliases.values() if alias is not None]
        drop_aliases = [(name,) for name, alias in batch.aliases.items() if alias is None]
        put_usage = [rows.usage_values(cell, usage) for cell, usage in batch.usage.items()]
        if not self._files.check():
            self._begin_new_log()
        # IMMEDIATE: whoever else is writing is waited for here, before anything is done. A deferred transaction that
        # has read would fail at its first write, without waiting.
        with _transaction(self._db, "BEGIN IMMEDIATE"):
            connection = self._db.conn
            if batch.lost_at is not None:
                connection.execute(rows.LOSE_LLMS, (batch.lost_at,))
            connection.executemany(rows.DROP_LLM, drop_llms)
            connection.executemany(rows.PUT_LLM, put_llms)
            connection.executemany(rows.DROP_SESSION, drop_sessions)
            connection.executemany(rows.PUT_SESSION, put_sessions)
            connection.executemany(rows.DROP_KEY, drop_keys)
            connection.executemany(rows.PUT_KEY, put_keys)
            connection.executemany(rows.DROP_ALIAS, drop_aliases)
            connection.executemany(rows.PUT_ALIAS, put_aliases)
            connection.executemany(rows.PUT_USAGE, put_usage)
            if batch.usage_before:
                connection.execute(rows.DROP_USAGE, (batch.usage_before,))

    def _begin_new_log(self) -> None:
        """Fold a log that has been deleted into the file, while we still have it open, and begin another one."""
        busy, *_ = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise StoreError(
                f"The log of {self._path} has been deleted, and another program is reading what was in it."
            )
        before, self._db = self._db, self._connect()
        before.close()
        _set_pragmas(self._path, self._db)
        self._db.execute("SELECT count(*) FROM sqlite_schema").fetchone()  # SQLite makes them when it first reads
        self._files.learn()

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            self._db.close()
        except sqlite3.Error as error:
            raise StoreError(f"Cannot close {self._path}: {error}") from error
        finally:
            self._files.close()
            os.close(self._lock)


@contextmanager
def _transaction(db: Database, begin: str) -> Iterator[None]:
    db.execute(begin)
    try:
        yield
        db.commit()
    finally:
        db.rollback()  # does nothing after a commit; after an error the next batch must find no transaction open


# Opening ------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def open_sqlite_store(path: str | os.PathLike[str], *, busy_timeout_s: float = 2.0) -> AsyncIterator[SqliteStore]:
    """Open, and create where there is none, a store in the SQLite file at `path`.

    A new file is readable by its owner alone (0600); folders on the way to it are made. Beside it stand SQLite's own
    `-wal` and `-shm`, and `.lock`, which marks the broker that has it open.

    Args:
        path: the file.
        busy_timeout_s: how long a write waits for another program that is writing to the file, in seconds.

    Raises:
        StoreError: the path cannot be used, the file is no database, a broken one, another program's or a newer
            Wakecall's, or another broker has it open. The file is then as it was.
    """
    store = await trio.to_thread.run_sync(_open, os.fspath(path), busy_timeout_s)
    try:
        yield store
    finally:
        await store.aclose()


def _open(path: str, busy_timeout_s: float) -> SqliteStore:
    try:
        # Through links, so that two names of one file are one lock.
        real = os.path.realpath(path)
        with ExitStack() as undo:
            # Without a lock file no broker has the file open. Then it is looked at before, too: a file that is not
            # ours gets no lock beside it.
            if not os.path.exists(_lock_path(real)):
                _examine(path, real, busy_timeout_s)
            lock = _lock(path, real)
            undo.callback(os.close, lock)
            _examine(path, real, busy_timeout_s)
            connect = partial(_connect, real, busy_timeout_s)
            db = connect()
            undo.callback(db.close)
            _set_pragmas(path, db)
            # All in one transaction: an upgrade that fails leaves the file to the version that it was of.
            with _transaction(db, "BEGIN IMMEDIATE"):
                MIGRATIONS.apply(db)
            store = SqliteStore._make(path, db, OpenFiles(path, real), lock, connect)
            undo.pop_all()
            return store
    except _TROUBLE as error:
        raise StoreError(f"Cannot open {path}: {error}. Check that it can be written, or name another file.") from error


def _connect(real: str, busy_timeout_s: float) -> Database:
    # check_same_thread: the worker thread is not always the same one; one at a time it is. isolation_level: the driver
    # begins no transactions of its own. Plugins of sqlite-utils have no business in here.
    connection = sqlite3.connect(real, timeout=busy_timeout_s, check_same_thread=False, isolation_level=None)
    return Database(connection, recursive_triggers=False, execute_plugins=False)


def _lock_path(real: str) -> str:
    return f"{real}.lock"


def _examine(path: str, real: str, busy_timeout_s: float) -> None:
    _check_kind(path, real)
    if _create_or_peek(path, real):
        _inspect(path, real, busy_timeout_s)


def _check_kind(path: str, real: str) -> None:
    try:
        mode = os.stat(real).st_mode
    except FileNotFoundError:
        # 0700: what the rows say is nobody else's business.
        Path(real).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return
    if stat.S_ISDIR(mode):
        raise StoreError(f"{path} is a folder. Name a file in it, as in {os.path.join(path, 'wakecall.db')}.")
    if not stat.S_ISREG(mode):
        raise StoreError(f"{path} is no regular file. Name another file.")


def _lock(path: str, real: str) -> int:
    lock = os.open(_lock_path(real), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The holder's process id is for the message alone; the lock is the flock.
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
    except BlockingIOError as error:
        holder = os.pread(lock, 20, 0).decode("ascii", "replace")
        os.close(lock)
        who = f" (process {holder})" if holder.isdigit() else ""
        raise StoreInUse(
            f"{path} is in use by another broker{who}. Stop that one, or give this one another file."
        ) from error
    except OSError:
        os.close(lock)
        raise
    return lock


def _create_or_peek(path: str, real: str) -> bool:
    """Make the file if there is none. Returns whether there is something in it."""
    # For reading and writing, so that a file which we may not write is refused here, before SQLite sees it. 0600 is
    # what SQLite then gives its own files, too.
    file = os.open(real, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        head = os.pread(file, len(MAGIC), 0)
    finally:
        os.close(file)
    if head and head != MAGIC:
        raise StoreError(f"{path} is no SQLite database. Name another file; this one has been left as it is.")
    return bool(head)


def _inspect(path: str, real: str, busy_timeout_s: float) -> None:
    """Refuse what we should not touch, without touching it.

    Read-only, for closing a read-write connection would fold the log of a broken file into it. Only where a
    transaction of a rollback journal was cut short must SQLite write before it can read.
    """
    mode = "rw" if os.path.exists(f"{real}-journal") else "ro"
    uri = f"file:{quote(os.fsencode(real))}?mode={mode}"
    with closing(sqlite3.connect(uri, uri=True, timeout=busy_timeout_s, isolation_level=None)) as connection:
        db = Database(connection, recursive_triggers=False, execute_plugins=False)
        try:
            problem = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            tables = set(db.table_names())
            applied = [each.name for each in MIGRATIONS.applied(db)]
        except sqlite3.OperationalError:
            raise  # locked, unreadable: nothing is wrong with what is in it
        except sqlite3.DatabaseError as error:
            raise StoreError(_broken(path, str(error))) from error
        if problem != "ok":
            raise StoreError(_broken(path, problem))
    if unknown := [name for name in applied if name not in KNOWN]:
        raise StoreError(
            f"{path} was written by a newer Wakecall (its {unknown[0]} is not known here)."
            " Upgrade Wakecall, or name another file; this one has been left as it is."
        )
    if not applied and tables - {MIGRATIONS.migrations_table}:
        raise StoreError(f"{path} is another program's database. Name another file; this one has been left as it is.")


def _broken(path: str, problem: str) -> str:
    return (
        f"{path} is damaged ({' '.join(problem.split())}). Move it aside to start anew, publishers will register"
        " again; or restore a copy. It has been left as it is."
    )


def _set_pragmas(path: str, db: Database) -> None:
    # WAL: a commit is one append, and programs that read the file neither wait for it nor hold it up.
    (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise StoreError(f"{path} lies where SQLite cannot keep a write-ahead log. Name a file on a local disk.")
    # NORMAL: in WAL an acknowledged commit survives the death of the process without a sync each. A power cut may take
    # the last ones, never the file: publishers register again.
    db.execute("PRAGMA synchronous = NORMAL")
    # The log grows while somebody reads for long; afterwards it is cut back to this, in bytes.
    db.execute("PRAGMA journal_size_limit = 16777216")
