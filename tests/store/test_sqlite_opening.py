"""The SQLite store's file: how it is made, what is refused, and that a refused one stays as it is."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from subprocess import PIPE

import pytest
from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

from tests.store.records import batch_of, database_in, llm, session
from wakecall.models import Snapshot
from wakecall.store import StoreError, sqlite
from wakecall.store.sqlite import SqliteStore, open_sqlite_store

_NOBODY = 65534

# Opens the store named by the first argument, writes sessions of the names that follow, says so, and holds it.
HOLD = """
import sys, trio
from wakecall.models import Batch, SessionRecord
from wakecall.store.sqlite import open_sqlite_store
async def main():
    async with open_sqlite_store(sys.argv[1]) as store:
        await store.write(Batch(sessions={name: SessionRecord(name, "local", 1.0, 1.0) for name in sys.argv[2:]}))
        print("open", flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)
trio.run(main)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return database_in(tmp_path)


async def fill(path: Path, rows: int = 2000) -> None:
    async with open_sqlite_store(path) as store:
        await store.write(batch_of([llm(f"m{index:05}", model="x" * 100) for index in range(rows)], [session()]))


async def refusal(path: Path | str) -> str:
    """The message with which a path is refused."""
    with pytest.raises(StoreError) as caught:
        async with open_sqlite_store(path):
            pass
    assert str(path) in str(caught.value)
    return str(caught.value)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_only_open_sqlite_store_makes_one() -> None:
    """There is no store that was not opened."""
    with pytest.raises(TypeError, match="open_sqlite_store"):
        SqliteStore()


async def test_what_was_written_is_there_after_reopening(path: Path) -> None:
    """The point of it."""
    async with open_sqlite_store(path) as store:
        await store.write(batch_of([llm("a"), llm("b")], [session()]))
        before = await store.load()
    async with open_sqlite_store(path) as store:
        assert await store.load() == before
        assert len(before.llms) == 2


async def test_its_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    """0600, the log's and the lock's too, however lax the umask; folders on the way are made."""
    path = tmp_path / "state" / "wakecall" / "wakecall.db"
    before = os.umask(0)
    try:
        async with open_sqlite_store(path) as store:
            await store.write(batch_of([llm()]))
            files = {each.name: mode_of(each) for each in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert set(files) == {"wakecall.db", "wakecall.db-wal", "wakecall.db-shm", "wakecall.db.lock"}
    assert set(files.values()) == {0o600}
    assert mode_of(path.parent) == 0o700


async def test_closing_leaves_one_whole_file(path: Path) -> None:
    """The log is folded in: the file alone can be copied."""
    await fill(path)
    assert {each.name for each in path.parent.iterdir()} == {"wakecall.db", "wakecall.db.lock"}


async def test_it_commits_by_a_log_that_readers_need_not_wait_for(
    path: Path, connections: list[sqlite3.Connection]
) -> None:
    """WAL and NORMAL: what survives a killed process is said of these, and of no other."""
    async with open_sqlite_store(path):
        connection = connections[-1]
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (1,)
        assert connection.execute("PRAGMA busy_timeout").fetchone() == (2000,)
        assert connection.execute("PRAGMA journal_size_limit").fetchone() == (16 * 1024 * 1024,)


@pytest.mark.parametrize("content", [b"", None], ids=["empty", "missing"])
async def test_an_empty_file_is_a_new_one(path: Path, content: bytes | None) -> None:
    """As SQLite itself sees it."""
    if content is not None:
        path.write_bytes(content)
    async with open_sqlite_store(path) as store:
        assert await store.load() == Snapshot()


async def test_a_file_that_is_no_database_is_left_as_it_is(path: Path) -> None:
    """Somebody's notes are not overwritten, and get no lock beside them."""
    path.write_bytes(b"Dear diary,\n" * 1000)
    before = path.stat()
    assert "no SQLite database" in await refusal(path)
    assert path.read_bytes() == b"Dear diary,\n" * 1000
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert [each.name for each in path.parent.iterdir()] == [path.name]


async def test_another_programs_database_is_left_as_it_is(path: Path) -> None:
    """A browser's history named by mistake gains neither tables nor a write-ahead log."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE places (url TEXT)")
        connection.commit()
    before = path.read_bytes()
    assert "another program's" in await refusal(path)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == [path.name]


async def test_a_newer_wakecalls_database_is_left_as_it_is(path: Path) -> None:
    """A migration that is not known here is named, and what to do about it."""
    await fill(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(
            "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('wakecall', '0999_wings', '')"
        )
        connection.commit()
    before = path.read_bytes()
    message = await refusal(path)
    assert "0999_wings" in message
    assert "Upgrade" in message
    assert path.read_bytes() == before


def garble_the_middle(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + b"\xa5" * 8192 + content[middle + 8192 :]


DAMAGES = {
    "garbage in the middle": garble_the_middle,
    "cut in half": lambda content: content[: len(content) // 2],
    "a header and zeros": lambda content: content[:100] + bytes(len(content) - 100),
    "a header alone": lambda content: content[:16],
    "one page": lambda content: content[:4096],
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_file_is_left_as_it_is(path: Path, damage: str) -> None:
    """It is told from a good one at the start, not at some write later; what can be saved of it still can."""
    await fill(path)
    content = DAMAGES[damage](path.read_bytes())
    path.write_bytes(content)
    message = await refusal(path)
    assert "damaged" in message
    assert "aside" in message
    assert path.read_bytes() == content
    await refusal(path)


async def test_a_damaged_file_does_not_swallow_the_log_beside_it(path: Path) -> None:
    """What a killed broker left in its log stays there, for whoever mends the file."""
    await fill(path)
    # Held open until it is killed: closing would fold the log in.
    with subprocess.Popen([sys.executable, "-c", HOLD, path, "last"], stdin=PIPE, stdout=PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        holder.kill()
    wal = path.with_name(path.name + "-wal")
    log = wal.read_bytes()
    assert log
    content = garble_the_middle(path.read_bytes())
    path.write_bytes(content)
    assert "damaged" in await refusal(path)
    assert path.read_bytes() == content
    assert wal.read_bytes() == log


async def test_a_transaction_cut_short_by_another_program_is_undone(path: Path) -> None:
    """An editor of the file that used a rollback journal and was killed: the store opens, with what was committed."""
    await fill(path, rows=200)
    script = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("PRAGMA journal_mode = DELETE")
connection.execute("PRAGMA cache_size = 1")
connection.execute("BEGIN IMMEDIATE")
connection.execute("UPDATE llms SET model = 'broken'")
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", script, path], check=True)
    assert path.with_name(path.name + "-journal").stat().st_size > 0
    async with open_sqlite_store(path) as store:
        assert {row.model for row in (await store.load()).llms} == {"x" * 100}


async def test_a_folder_is_refused(tmp_path: Path) -> None:
    """With the name of a file that it could be."""
    assert str(tmp_path / "wakecall.db") in await refusal(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero"])
async def test_a_device_is_refused(path: str) -> None:
    """Nothing is read from it, nothing made beside it."""
    assert "no regular file" in await refusal(path)
    assert not os.path.exists(path + ".lock")


async def test_a_path_through_a_file_is_refused(tmp_path: Path) -> None:
    """A folder that cannot be made."""
    (tmp_path / "file").write_bytes(b"mine")
    message = await refusal(tmp_path / "file" / "wakecall.db")
    assert "Check that it can be written" in message
    assert (tmp_path / "file").read_bytes() == b"mine"


async def test_a_path_that_cannot_be_is_refused() -> None:
    """No traceback for a slip of the shell."""
    await refusal("wake\0call.db")
    await refusal("/" + "x" * 5000)


@pytest.fixture
def path_of_nobody() -> Iterator[Path]:
    """A path in a folder of a user who is not root: root may write everywhere, so who is root is somebody else here."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if os.geteuid() == 0:
            os.chown(folder, _NOBODY, _NOBODY)
            os.seteuid(_NOBODY)
            stack.callback(os.seteuid, 0)
        yield Path(folder) / "wakecall.db"


@pytest.mark.parametrize("what", ["file", "folder"])
async def test_what_may_not_be_written_is_refused(path_of_nobody: Path, what: str) -> None:
    """By permission: the file itself, or a new one in its folder."""
    path = path_of_nobody
    if what == "file":
        await fill(path, rows=1)
        path.chmod(0o400)
    else:
        path.parent.chmod(0o500)
    try:
        assert "Permission denied" in await refusal(path)
    finally:
        path.parent.chmod(0o700)


async def test_one_file_has_one_broker(path: Path) -> None:
    """Within a process too, by a link too; the first one works on, and the next can follow it."""
    link = path.with_name("link.db")
    link.symlink_to(path)
    async with open_sqlite_store(path) as store:
        assert f"process {os.getpid()}" in await refusal(path)
        await refusal(link)
        await store.write(batch_of([llm()]))
        # A second opening that had so much as closed a descriptor of the file would have dropped SQLite's own locks.
        with closing(sqlite3.connect(path, timeout=0)) as reader:
            assert reader.execute("SELECT name FROM llms").fetchall() == [("qwen",)]
        await refusal(path)
    async with open_sqlite_store(link) as store:
        assert len((await store.load()).llms) == 1


async def test_another_process_is_refused_until_this_one_is_gone(path: Path) -> None:
    """The lock dies with its process, killed or not; while it is held, other programs can still read."""
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdin=PIPE, stdout=PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"open\n"
            message = await refusal(path)
            assert f"process {holder.pid}" in message
            assert "another broker" in message
            with closing(sqlite3.connect(path, timeout=0)) as reader:
                assert reader.execute("SELECT count(*) FROM llms").fetchone() == (0,)
        finally:
            holder.kill()
    async with open_sqlite_store(path) as store:
        assert await store.load() == Snapshot()


async def test_each_migration_has_its_record(path: Path) -> None:
    """Under sqlite-utils' own table, which its command line reads."""
    await fill(path)
    with closing(sqlite3.connect(path)) as connection:
        found = connection.execute("SELECT migration_set, name FROM _sqlite_migrations").fetchall()
    names = ["0001_llms_and_sessions", "0002_keys", "0003_traffic", "0004_usage"]
    assert found == [("wakecall", name) for name in names]


async def test_an_upgrade_that_fails_leaves_nothing_of_itself(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its migrations or none; the version before can still open the file, with all that is in it."""
    await fill(path, rows=3)
    upgrade = Migrations("wakecall")

    @upgrade(name="0002_fine")
    def fine(db: Database) -> None:
        db.execute("CREATE TABLE half (x)")
        db.execute("DELETE FROM llms")

    @upgrade(name="0003_broken")
    def broken(db: Database) -> None:
        db.execute("CREATE TABLE half (x)")

    with monkeypatch.context() as newer:
        newer.setattr(sqlite, "MIGRATIONS", upgrade)
        newer.setattr(sqlite, "KNOWN", sqlite.KNOWN | {"0002_fine", "0003_broken"})
        assert "half" in await refusal(path)
    async with open_sqlite_store(path) as store:
        assert len((await store.load()).llms) == 3
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master WHERE name = 'half'").fetchall() == []
