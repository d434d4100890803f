"""Whatever happens to its file, a broker that runs goes on with those it serves, and loses nothing that it decided.

Real processes, a real file, real sockets; a stream is under way through every fault. The store's own tests say how each
fault ends inside SQLite.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE

import trio

from tests.e2e.clients import ask_chat
from tests.e2e.scripted_engine import open_scripted_engine
from tests.e2e.stack import (
    PATIENCE_S,
    POLL_S,
    WAKECALL,
    BrokerProcess,
    clean_environment,
    open_broker_process,
    open_publisher_process,
    within,
)
from tests.e2e.wire_publisher import WirePublisher
from tests.faults.live import Live, open_live
from tests.faults.machine import Machine


def beside(db: Path, suffix: str) -> Path:
    return db.with_name(db.name + suffix)


def query(db: Path, sql: str) -> list[tuple[str, ...]]:
    """What another program reads in the file that the path names now."""
    with closing(sqlite3.connect(f"file:{db}?mode=ro", uri=True)) as connection:
        return connection.execute(sql).fetchall()


def stored(db: Path) -> dict[str, str]:
    return dict(query(db, "SELECT name, status FROM llms"))


def fold_log(db: Path) -> None:
    """Let another program write, then bring all that is in the log into the file."""
    with closing(sqlite3.connect(db, isolation_level=None)) as other:
        other.execute("UPDATE llms SET type = type")
        assert other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0


async def wait_ready(broker: BrokerProcess) -> None:
    """Return once it says of itself that it is ready. It tries again by itself; there is no event for that."""
    with trio.fail_after(PATIENCE_S):
        while (await broker.ask("GET", "/readyz")).status != 200:
            await trio.sleep(POLL_S)


#: Makes root a user like any other, to whom a file's mode applies.
BOUND_BY_PERMISSIONS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner"] if os.geteuid() == 0 else []


async def check_refused(db: Path, words: str, under: Sequence[str] = ()) -> None:
    """`serve` on this file is refused as a mistake of its configuration: 78, in words."""
    command = [*under, *WAKECALL, "serve", "--port", "0", "--db", str(db)]
    environment = clean_environment(db.parent)
    with trio.fail_after(PATIENCE_S):
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False, env=environment)
    said = done.stderr.decode()
    assert (done.returncode, done.stdout) == (78, b""), said
    assert words in said
    assert "Traceback" not in said


# The faults: each is there while its block runs --------------------------------------------------------------------


@dataclass
class Place:
    """Where a fault happens."""

    broker: BrokerProcess
    machine: Machine
    db: Path


Fault = Callable[[Place], AbstractAsyncContextManager[None]]

HOLD_LOCK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
"""


@asynccontextmanager
async def another_writer(place: Place) -> AsyncIterator[None]:
    """A program that began a transaction and forgot it."""
    with subprocess.Popen([sys.executable, "-c", HOLD_LOCK, str(place.db)], stdin=PIPE, stdout=PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert await trio.to_thread.run_sync(holder.stdout.readline) == b"locked\n"
            yield
        finally:
            holder.kill()


@asynccontextmanager
async def no_room(place: Place) -> AsyncIterator[None]:
    """The kernel lets no file of the broker grow."""
    before = resource.prlimit(place.broker.pid, resource.RLIMIT_FSIZE)
    size = beside(place.db, "-wal").stat().st_size
    resource.prlimit(place.broker.pid, resource.RLIMIT_FSIZE, (size, before[1]))
    yield
    resource.prlimit(place.broker.pid, resource.RLIMIT_FSIZE, before)


def refusing(code: int) -> Fault:
    @asynccontextmanager
    async def refuse(place: Place) -> AsyncIterator[None]:
        with place.machine.disk_refuses(code):
            yield

    return refuse


def overwritten(spoil: Callable[[bytes], bytes], *, read_anew: bool = False) -> Fault:
    """In place, by somebody else; then put back as it was.

    Args:
        spoil: what becomes of the content.
        read_anew: let the broker need all of it again. Else it has in memory what it writes on, and sees nothing.
    """

    @asynccontextmanager
    async def overwrite(place: Place) -> AsyncIterator[None]:
        if read_anew:
            fold_log(place.db)
        before = place.db.read_bytes()
        _overwrite(place.db, spoil(before))
        yield
        _overwrite(place.db, before)

    return overwrite


def _overwrite(path: Path, content: bytes) -> None:
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()


@asynccontextmanager
async def moved(place: Place) -> AsyncIterator[None]:
    place.db.rename(beside(place.db, ".aside"))
    yield
    beside(place.db, ".aside").rename(place.db)


@asynccontextmanager
async def replaced(place: Place) -> AsyncIterator[None]:
    """By a database that is as good as the first one, a copy of it; the first one is put back."""
    fold_log(place.db)
    copy = beside(place.db, ".copy")
    copy.write_bytes(place.db.read_bytes())
    place.db.rename(beside(place.db, ".aside"))
    copy.rename(place.db)
    yield
    beside(place.db, ".aside").rename(place.db)


@asynccontextmanager
async def log_replaced(place: Place) -> AsyncIterator[None]:
    log = beside(place.db, "-wal")
    log.rename(beside(place.db, ".aside"))
    log.touch()
    yield
    beside(place.db, ".aside").rename(log)


FAULTS: dict[str, Fault] = {
    "another program holds the lock": another_writer,
    "no file may grow": no_room,
    "the disk is full": refusing(errno.ENOSPC),
    "the disk has become read-only": refusing(errno.EROFS),
    "the file is garbage": overwritten(lambda content: b"\xa5" * len(content)),
    "the file is empty": overwritten(lambda _: b""),
    "its pages are garbage": overwritten(
        lambda content: content[:4096] + b"\xa5" * (len(content) - 4096), read_anew=True
    ),
    "the file has been moved away": moved,
    "the file has been replaced": replaced,
    "its log has been replaced": log_replaced,
}


async def check_it_goes_on(live: Live, name: str) -> None:
    """What a publisher and a client see while nothing can be written."""
    broker, newcomer = live.broker, WirePublisher(live.broker, name)
    for answer in (await newcomer.register(name), await live.publisher.heartbeat(llms={"live": "active"})):
        assert (answer.status, answer.code) == (503, "store_unavailable")
        assert answer.headers["retry-after"] == "5"
    ready = await broker.ask("GET", "/readyz")
    assert (ready.status, ready.code, ready.json["reasons"]) == (503, "store_unavailable", ["store_unavailable"])
    assert (await broker.ask("GET", "/healthz")).status == 200
    await live.go_on()
    # The decision stands, though it is not down: memory is the truth.
    assert (await broker.llm(name))["status"] == "active"


@within(90)
async def test_one_fault_after_the_other_ends_nothing_and_loses_nothing(tmp_path: Path, machine: Machine) -> None:
    """Writes are 503, `/readyz` too; the stream and new infers go on; then it is well by itself, with all in the file."""
    db = tmp_path / "w.db"
    async with open_broker_process(db, variables=machine.variables) as broker, open_live(broker) as live:
        place, expected = Place(broker, machine, db), {"live": "active"}
        for number, (what, fault) in enumerate(FAULTS.items()):
            print(what, file=sys.stderr)
            name = f"decided-{number}"
            async with fault(place):
                await check_it_goes_on(live, name)
            await wait_ready(broker)
            expected[name] = "active"
            assert stored(db) == expected
            assert (await live.publisher.heartbeat()).status == 200
            await live.go_on()
        await live.finish()
        assert not [line for line in broker.err if "Traceback" in line]
        assert len([line for line in broker.err if "the store failed" in line]) == len(FAULTS)
        broker.send(signal.SIGKILL)
        await broker.wait()
    async with open_broker_process(db) as restarted:
        assert {row["name"] for row in await restarted.list("llms")} == set(expected)


@within(40)
async def test_a_log_that_was_deleted_is_begun_anew(tmp_path: Path) -> None:
    """What was in it is folded into the file first: acknowledged before and after, and there after a SIGKILL."""
    db = tmp_path / "w.db"
    async with open_broker_process(db) as broker, open_live(broker) as live:
        for number, gone in enumerate((("-wal",), ("-shm",), ("-wal", "-shm"))):
            for suffix in gone:
                beside(db, suffix).unlink()
            answer = await WirePublisher(broker, f"s{number}").register(f"m{number}")
            assert (answer.status, stored(db)[f"m{number}"]) == (200, "active")
            await live.go_on()
        assert stored(db).keys() == {"live", "m0", "m1", "m2"}
        assert (await broker.ask("GET", "/readyz")).status == 200
        broker.send(signal.SIGKILL)
        await broker.wait()
    async with open_broker_process(db) as restarted:
        assert {row["name"] for row in await restarted.list("llms")} == {"live", "m0", "m1", "m2"}


@within(40)
async def test_an_agent_sits_a_fault_out(tmp_path: Path, machine: Machine) -> None:
    """`wakecall publish` keeps its channel over heartbeats that are 503, is called all the while, and is in the file."""
    db = tmp_path / "w.db"
    often = {"heartbeat_interval_s": 0.1, "heartbeat_timeout_s": 30}
    async with (
        open_scripted_engine() as engine,
        open_broker_process(db, variables=machine.variables, **often) as broker,
        open_publisher_process(tmp_path / "state", broker.url, engine.base_url, "--name", "m"),
        trio.open_nursery() as nursery,
    ):

        async def answer() -> None:
            while True:
                await (await engine.next()).respond_json(200, {"ok": True})

        nursery.start_soon(answer)
        before = await broker.wait_llm("m", routable=True)
        (session,) = await broker.list("sessions")
        with machine.disk_refuses(errno.ENOSPC):
            await broker.wait_line("the store failed", broker.err)
            while (await broker.llm("m"))["last_heartbeat_at"] <= before["last_heartbeat_at"]:
                await trio.sleep(POLL_S)
            assert (await ask_chat(broker, "m")).status == 200
        await wait_ready(broker)
        assert (await ask_chat(broker, "m")).status == 200
        (still,) = await broker.list("sessions")
        assert (still["epoch"], still["connected"]) == (session["epoch"], True)
        assert stored(db) == {"m": "active"}
        nursery.cancel_scope.cancel()


@within(40)
async def test_permissions_that_are_taken_away_from_a_running_broker_change_nothing(tmp_path: Path) -> None:
    """It has its files open; only its next start is refused, with 78 and the file untouched."""
    folder = tmp_path / "state"
    folder.mkdir()
    db = folder / "w.db"
    async with open_broker_process(db, under=BOUND_BY_PERMISSIONS) as broker, open_live(broker) as live:
        try:
            for each in folder.iterdir():
                each.chmod(0o400)
            folder.chmod(0o500)
            assert (await WirePublisher(broker, "new").register("new")).status == 200
            await live.go_on()
            assert (await broker.ask("GET", "/readyz")).status == 200
            assert stored(db) == {"live": "active", "new": "active"}
        finally:
            folder.chmod(0o700)
        assert (await broker.end())[0] == 0
    before = db.read_bytes()
    await check_refused(db, "Permission denied", under=BOUND_BY_PERMISSIONS)
    assert db.read_bytes() == before


# At the start ------------------------------------------------------------------------------------------------------


def another_programs(db: Path) -> None:
    with closing(sqlite3.connect(db)) as connection:
        connection.execute("CREATE TABLE letters (text)")
        connection.commit()


SPOILS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "letter": ("no SQLite database", lambda _: b"Dear Sir or Madam, this is no database"),
    "garbage": ("no SQLite database", lambda content: b"\xa5" * len(content)),
    "pages": ("damaged", lambda content: content[:4096] + b"\xa5" * (len(content) - 4096)),
    "half": ("damaged", lambda content: content[: len(content) // 2]),
}


@within(60)
async def test_a_file_that_cannot_be_used_is_refused_at_the_start_and_stays_as_it_is(tmp_path: Path) -> None:
    """To the last byte, and so does the log that a killed broker left beside it: whoever mends it finds everything."""
    original = tmp_path / "w.db"
    async with open_broker_process(original) as broker:
        for number in range(20):
            assert (await WirePublisher(broker, f"s{number}").register(f"m{number}")).status == 200
        fold_log(original)
        assert (await WirePublisher(broker, "last").register("last")).status == 200
        broker.send(signal.SIGKILL)
        await broker.wait()
    log = beside(original, "-wal").read_bytes()
    assert log
    kept: dict[Path, bytes] = {}
    words: dict[Path, str] = {}
    for name, (said, spoil) in SPOILS.items():
        db = tmp_path / name / "w.db"
        db.parent.mkdir()
        kept[db] = spoil(original.read_bytes())
        kept[beside(db, "-wal")] = log
        words[db] = said
    stranger = tmp_path / "stranger.db"
    another_programs(stranger)
    kept[stranger], words[stranger] = stranger.read_bytes(), "another program's"
    for path, content in kept.items():
        path.write_bytes(content)
    async with trio.open_nursery() as nursery:
        for db, said in words.items():
            nursery.start_soon(check_refused, db, said)
    assert {path: path.read_bytes() for path in kept} == kept
    assert not beside(stranger, ".lock").exists()
