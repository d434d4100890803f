"""What it costs to start: the package, the command's help, and a broker that has rows to read.

Imports and help are measured by the processor time of a process from its first instruction to its end: what else the
machine does meanwhile is none of theirs. A broker is ready when `/readyz` says 200; that is measured by the clock. Its
database is as a SIGKILL leaves it: all rows live, so each has to be lost. Every start has a fresh copy of it.
"""

from __future__ import annotations

import http.client
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import trio

from tests.benchmarks.report import Bar, Figure
from wakecall import Key, Status, open_sqlite_store
from wakecall.keys import digest_of
from wakecall.models import LLM, Batch, SessionRecord

GROUP = "start"

_ROWS = 100_000
_PER_SESSION = 100
_PER_OWNER = 20_000
_READY_WITHIN_S = 120.0


def cpu_ms(arguments: Sequence[str]) -> float:
    """The processor time of `python …` from start to end. Raises RuntimeError: it failed."""
    command = [sys.executable, *arguments]
    silent = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    _, status, used = os.wait4(os.posix_spawn(command[0], command, os.environ, file_actions=silent), 0)
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"python {' '.join(arguments)} failed")
    return (used.ru_utime + used.ru_stime) * 1e3


def compare(name: str, ours: Sequence[str], floor: Sequence[str], repeats: int, bar: Bar | None) -> Figure:
    """The medians of two programs that run in turn."""
    pairs = [(cpu_ms(ours), cpu_ms(floor)) for _ in range(repeats)]
    mine, theirs = (statistics.median(each) for each in zip(*pairs, strict=True))
    return Figure(name, "ms of processor time", mine, theirs, mine / theirs, bar)


async def write_rows(path: Path, rows: int) -> None:
    """A database with a key, and so many live rows, of as many sessions and owners as the bounds make of them."""
    now = time.time()
    llms, sessions = {}, {}
    for number in range(rows):
        owner, session_id = f"owner-{number // _PER_OWNER}", f"session-{number // _PER_SESSION}"
        name = f"{session_id}/model-{number}"
        llms[name] = LLM(name, owner, Status.ACTIVE, now, now, type="ollama", model=name, session_id=session_id)
        sessions[session_id] = SessionRecord(session_id, owner, now, now, epoch=1)
    key = Key("key_1", "client", "owner-0", digest_of("wk_0123456789"), now)
    async with open_sqlite_store(path) as store:
        await store.write(Batch(llms, sessions, {key.key_id: key}))


def seconds_until_ready(database: Path) -> float:
    """Start `wakecall serve` on a copy of a database, and stop it once it is ready."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "wakecall.db"
        shutil.copy(database, copy)
        command = [sys.executable, "-m", "wakecall", "serve", "--port", "0", "--db", str(copy), "--log-level", "error"]
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            if not (said := process.stdout.readline()):
                raise RuntimeError("the broker did not start")
            address = urlsplit(said.split()[-1])
            while True:
                connection = http.client.HTTPConnection("127.0.0.1", address.port, timeout=_READY_WITHIN_S)
                connection.request("GET", "/readyz")
                status = connection.getresponse().status
                connection.close()
                took = time.monotonic() - began
                if status == 200:
                    return took
                if took > _READY_WITHIN_S:
                    raise RuntimeError(f"the broker is not ready after {took:.0f} s")
        finally:
            process.terminate()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def serve(rows: int, repeats: int) -> Figure:
    """Ready with so many rows, beside ready with none."""
    with tempfile.TemporaryDirectory() as folder:
        full, empty = Path(folder) / "full.db", Path(folder) / "empty.db"
        trio.run(write_rows, full, rows)
        trio.run(write_rows, empty, 0)
        pairs = [(seconds_until_ready(full), seconds_until_ready(empty)) for _ in range(repeats)]
    ours, floor = (statistics.median(each) * 1e3 for each in zip(*pairs, strict=True))
    return Figure(f"serve with {rows:,} rows, ready", "ms", ours, floor, ours / floor, Bar("≤", 3.0))


def imports(repeats: int) -> list[Figure]:
    """The package and the command, each beside what it cannot do without."""
    trio_msgspec, trio_click = ["-c", "import trio, msgspec"], ["-c", "import trio, click"]
    return [
        compare("import wakecall", ["-c", "import wakecall"], trio_msgspec, repeats, Bar("≤", 1.5)),
        compare(
            "import wakecall, and its open_broker is loaded",
            ["-c", "from wakecall import open_broker"],
            trio_msgspec,
            repeats,
            None,
        ),
        compare("wakecall --help", ["-m", "wakecall", "--help"], trio_click, repeats, Bar("≤", 2.0)),
    ]


def measure(seconds: float) -> list[Figure]:
    """One round; about three times as long as `seconds`, and seldom less than half a minute."""
    return [*imports(max(3, round(seconds * 2))), serve(_ROWS, max(3, round(seconds)))]
