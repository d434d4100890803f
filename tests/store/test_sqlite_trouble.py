"""The SQLite store when something goes wrong while it runs: full disks, other writers, cancellation, SIGKILL."""

from __future__ import annotations

import resource
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from subprocess import PIPE

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.store.records import batch_of, database_in, llm, session
from wakecall.models import Batch, Status
from wakecall.store import Store, StoreError
from wakecall.store.sqlite import open_sqlite_store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return database_in(tmp_path)


LARGE = batch_of([llm(f"m{index:04}", model="x" * 1000) for index in range(1000)], [session("large")])


async def names(store: Store) -> list[str]:
    return [row.name for row in (await store.load()).llms]


@contextmanager
def no_file_may_grow(beyond: int) -> Iterator[None]:
    """Writes beyond so many bytes fail in the kernel, as they do on a full disk (EFBIG for ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (beyond, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Held:
    """Holds the store's thread at the start of its next statement."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.arrived = threading.Event()
        self.release = threading.Event()
        self.statements = 0
        connection.set_trace_callback(self._statement)

    def _statement(self, sql: str) -> None:
        self.statements += 1
        self.arrived.set()
        assert self.release.wait(30)

    async def wait_arrived(self) -> None:
        assert await trio.to_thread.run_sync(self.arrived.wait, 30)


async def test_a_full_disk_fails_the_batch_and_no_later_one(path: Path) -> None:
    """The write that does not fit leaves nothing; what was there can be read; with room again, it is written."""
    async with open_sqlite_store(path) as store:
        await store.write(batch_of([llm("before")]))
        with no_file_may_grow(path.with_name(path.name + "-wal").stat().st_size + 8192):
            for _ in range(2):
                with pytest.raises(StoreError, match=r"Cannot write to .*wakecall\.db") as caught:
                    await store.write(LARGE)
                assert isinstance(caught.value.__cause__, sqlite3.Error)
            assert await names(store) == ["before"]
            assert (await store.load()).sessions == ()
        await store.write(LARGE)
        assert await names(store) == ["before", *LARGE.llms]
    async with open_sqlite_store(path) as store:
        assert await names(store) == ["before", *LARGE.llms]


async def test_a_full_database_fails_the_batch_and_no_later_one(
    path: Path, connections: list[sqlite3.Connection]
) -> None:
    """SQLite's own "database or disk is full", in the middle of a transaction."""
    async with open_sqlite_store(path) as store:
        await store.write(batch_of([llm("before")]))
        connections[-1].execute("PRAGMA max_page_count = 20")
        with pytest.raises(StoreError, match="full"):
            await store.write(LARGE)
        await store.write(batch_of([llm("small")]))
        assert await names(store) == ["before", "small"]
        connections[-1].execute("PRAGMA max_page_count = 1000000")
        await store.write(LARGE)
        assert len(await names(store)) == 1002


async def test_a_batch_waits_for_another_writer(path: Path, connections: list[sqlite3.Connection]) -> None:
    """Another program's short transaction delays the commit, and that is all."""
    async with open_sqlite_store(path, busy_timeout_s=30.0) as store:
        held = Held(connections[-1])
        held.release.set()
        with closing(sqlite3.connect(path, isolation_level=None)) as other, trio.fail_after(30):
            other.execute("BEGIN IMMEDIATE")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.write, batch_of([llm()]))
                await held.wait_arrived()
                await wait_all_tasks_blocked()
                assert held.statements == 1
                other.execute("ROLLBACK")
        assert held.statements > 1
        assert await names(store) == ["qwen"]


async def test_a_writer_that_takes_too_long_fails_the_batch_and_no_later_one(path: Path) -> None:
    """While another program's transaction is open: reading goes on, writing fails after its time; then it works."""
    async with open_sqlite_store(path, busy_timeout_s=0.01) as store:
        await store.write(batch_of([llm("before")]))
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            other.execute("UPDATE llms SET model = 'other'")
            with pytest.raises(StoreError, match="locked"):
                await store.write(batch_of([llm("after")]))
            assert await names(store) == ["before"]
            other.execute("ROLLBACK")
        await store.write(batch_of([llm("after")]))
        assert await names(store) == ["after", "before"]


async def test_a_reader_that_takes_its_time_delays_nothing(path: Path) -> None:
    """A backup, or somebody at the SQLite shell, keeps its state; the writer goes on."""
    async with open_sqlite_store(path, busy_timeout_s=0.01) as store:
        await store.write(batch_of([llm("before")]))
        with closing(sqlite3.connect(path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            assert reader.execute("SELECT count(*) FROM llms").fetchone() == (1,)
            await store.write(LARGE)
            assert reader.execute("SELECT count(*) FROM llms").fetchone() == (1,)
        assert len(await names(store)) == 1001


@pytest.mark.parametrize("gone", [("-wal",), ("-shm",), ("-wal", "-shm")])
async def test_a_log_that_was_deleted_is_folded_in_and_begun_anew(path: Path, gone: tuple[str, ...]) -> None:
    """Nothing that was committed is lost with its name; and what is committed from then on has one."""
    async with open_sqlite_store(path) as store:
        await store.write(batch_of([llm("before")]))
        for suffix in gone:
            path.with_name(path.name + suffix).unlink()
        await store.write(batch_of([llm("after")]))
        for suffix in ("-wal", "-shm"):
            assert path.with_name(path.name + suffix).exists()
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as reader:
            assert reader.execute("SELECT name FROM llms ORDER BY name").fetchall() == [("after",), ("before",)]
        assert await names(store) == ["after", "before"]


async def test_a_deleted_log_that_somebody_reads_is_waited_for(path: Path) -> None:
    """It cannot be folded in before he is done: writing fails until then, and then goes on with nothing lost."""
    async with open_sqlite_store(path, busy_timeout_s=0.01) as store:
        await store.write(batch_of([llm("before")]))
        with closing(sqlite3.connect(path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            assert reader.execute("SELECT count(*) FROM llms").fetchone() == (1,)
            await store.write(batch_of([llm("meanwhile")]))
            path.with_name(path.name + "-wal").unlink()
            with pytest.raises(StoreError, match="another program is reading"):
                await store.write(batch_of([llm("after")]))
        await store.write(batch_of([llm("after")]))
    async with open_sqlite_store(path) as store:
        assert await names(store) == ["after", "before", "meanwhile"]


async def test_a_file_that_has_moved_takes_nothing_until_it_is_back(path: Path) -> None:
    """SQLite would write on into a file that no later start finds; the one that took its place stays as it is."""
    aside = path.with_name("aside.db")
    async with open_sqlite_store(path) as store:
        await store.write(batch_of([llm("before")]))
        path.rename(aside)
        with pytest.raises(StoreError, match="deleted or moved"):
            await store.write(batch_of([llm("after")]))
        path.write_bytes(b"a letter")
        with pytest.raises(StoreError, match="replaced"):
            await store.write(batch_of([llm("after")]))
        assert path.read_bytes() == b"a letter"
        aside.rename(path)
        await store.write(batch_of([llm("after")]))
    async with open_sqlite_store(path) as store:
        assert await names(store) == ["after", "before"]


POISON = {
    "a lone surrogate": llm("poison", model="\ud800"),
    "an integer beyond 64 bits": llm("poison", max_concurrency=2**63),
    "not a number": llm("poison", created_at=float("nan")),
    "no value at all": llm("poison", owner=None),
    "a type that is none": llm("poison", type=object()),
}


@pytest.mark.parametrize("poison", POISON)
async def test_a_record_that_cannot_be_stored_fails_its_batch_whole(path: Path, poison: str) -> None:
    """Deletes, rows and sessions before and after it: nothing is there; the next batch is written."""
    async with open_sqlite_store(path) as store:
        await store.write(batch_of([llm("kept")], [session("kept")]))
        before = await store.load()
        bad = Batch(
            {"kept": None, "a": llm("a"), "poison": POISON[poison], "z": llm("z")},
            {"kept": None, "new": session("new")},
        )
        with pytest.raises(StoreError) as caught:
            await store.write(bad)
        assert caught.value.__cause__ is not None
        assert await store.load() == before
        await store.write(batch_of([llm("next")]))
        assert await names(store) == ["kept", "next"]


async def test_a_row_that_somebody_spoilt_is_a_store_error(path: Path) -> None:
    """An edit by hand that makes no sense is said, not a traceback; mended, it can be read."""
    async with open_sqlite_store(path) as store:
        await store.write(batch_of([llm()]))
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("UPDATE llms SET status = 'dozing'")
            with pytest.raises(StoreError, match="dozing"):
                await store.load()
            other.execute("UPDATE llms SET status = 'hibernating'")
        assert (await store.load()).llms[0].status is Status.HIBERNATING


async def test_a_closed_store_says_so(path: Path) -> None:
    """Using it after its end is a StoreError, as everything is."""
    async with open_sqlite_store(path) as store:
        pass
    for use in (store.load, lambda: store.write(batch_of([llm()])), lambda: store.stale_rows(1.0)):
        with pytest.raises(StoreError, match="closed"):
            await use()


async def test_a_cancelled_caller_leaves_no_second_thread_on_the_connection(
    path: Path, connections: list[sqlite3.Connection]
) -> None:
    """A write under way goes on to its commit; the next call waits for it; one that waits for its turn just leaves."""
    async with open_sqlite_store(path) as store:
        held = Held(connections[-1])
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                first, third = trio.CancelScope(), trio.CancelScope()
                returned = []

                async def write(scope: trio.CancelScope, name: str) -> None:
                    with scope:
                        await store.write(batch_of([llm(name)]))
                        returned.append(name)

                nursery.start_soon(write, first, "first")
                await held.wait_arrived()
                first.cancel()
                nursery.start_soon(write, trio.CancelScope(), "second")
                await wait_all_tasks_blocked()
                nursery.start_soon(write, third, "third")
                await wait_all_tasks_blocked()
                third.cancel()
                await wait_all_tasks_blocked()
                assert held.statements == 1
                assert returned == []
                held.release.set()
        connections[-1].set_trace_callback(None)
        assert returned == ["first", "second"]
        assert await names(store) == ["first", "second"]


async def test_a_cancelled_owner_still_closes_the_store(path: Path, connections: list[sqlite3.Connection]) -> None:
    """After what is under way: the commit is in the file, and the file is free for the next broker."""
    with trio.fail_after(30), trio.CancelScope() as scope:
        async with open_sqlite_store(path) as store, trio.open_nursery() as nursery:
            held = Held(connections[-1])
            nursery.start_soon(store.write, batch_of([llm("under way")]))
            await held.wait_arrived()
            scope.cancel()
            held.release.set()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    async with open_sqlite_store(path) as store:
        assert await names(store) == ["under way"]


# Writes one row after the other, and says each once it is committed.
ACKNOWLEDGE = """
import itertools, sys, trio
from wakecall.models import LLM, Batch, Status
from wakecall.store.sqlite import open_sqlite_store
async def main():
    async with open_sqlite_store(sys.argv[1]) as store:
        for number in itertools.count():
            name = f"row-{number}"
            await store.write(Batch({name: LLM(name, "local", Status.ACTIVE, 1.0, float(number))}))
            print(name, flush=True)
trio.run(main)
"""


def test_what_was_acknowledged_survives_a_kill(path: Path) -> None:
    """SIGKILL in the middle of writing, three times on one file: all that was said is there, and it opens at once."""
    for acknowledged_at_least in (300, 1, 50):
        with subprocess.Popen([sys.executable, "-c", ACKNOWLEDGE, path], stdin=PIPE, stdout=PIPE) as writer:
            assert writer.stdout is not None
            said = [writer.stdout.readline() for _ in range(acknowledged_at_least)]
            writer.kill()
            said += writer.stdout.readlines()
        acknowledged = {line.decode().strip() for line in said if line.endswith(b"\n")}
        assert len(acknowledged) >= acknowledged_at_least

        async def stored() -> set[str]:
            async with open_sqlite_store(path) as store:
                return set(await names(store))

        assert acknowledged <= trio.run(stored)


async def test_a_sweep_costs_what_it_finds(path: Path, connections: list[sqlite3.Connection]) -> None:
    """Each query is one search in one index, in that index's order: nothing is scanned and nothing is sorted."""
    async with open_sqlite_store(path) as store:
        await store.write(LARGE)
        asked: list[str] = []
        connections[-1].set_trace_callback(asked.append)
        await store.rows_of_session("laptop")
        await store.stale_rows(1.0)
        await store.expired_rows(1.0)
        connections[-1].set_trace_callback(None)
    with closing(sqlite3.connect(path)) as connection:
        plans = [[step[3] for step in connection.execute(f"EXPLAIN QUERY PLAN {sql}")] for sql in asked]
    assert plans == [
        ["SEARCH llms USING INDEX llms_by_session (session_id=?)"],
        ["SEARCH llms USING INDEX llms_by_heartbeat (last_heartbeat_at<?)"],
        ["SEARCH llms USING INDEX llms_by_inactivity (inactive_since<?)"],
    ]


async def test_usage_is_read_and_deleted_by_the_hour(path: Path, connections: list[sqlite3.Connection]) -> None:
    """Each is one search in the table's own order: hours that are not asked for cost nothing."""
    async with open_sqlite_store(path) as store:
        asked: list[str] = []
        connections[-1].set_trace_callback(asked.append)
        await store.usage(1, "key")
        await store.usage(1, "llm")
        await store.usage_cells(1)
        await store.write(Batch(usage_before=1))
        connections[-1].set_trace_callback(None)
    asked = [sql for sql in asked if "usage" in sql]
    with closing(sqlite3.connect(path)) as connection:
        plans = [connection.execute(f"EXPLAIN QUERY PLAN {sql}").fetchall()[0][3] for sql in asked]
    assert plans == [*["SEARCH usage USING PRIMARY KEY (hour>?)"] * 3, "SEARCH usage USING PRIMARY KEY (hour<?)"]
