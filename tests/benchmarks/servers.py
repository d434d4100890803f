"""The servers that are measured, each in a process of its own: `python -m tests.benchmarks.servers KIND`.

* `floor-guarded`, `floor-bare`: the frozen floor, with the guard and without it;
* `wakecall`: ours with everything switched on: keys, limits, metrics, SQLite;
* `wakecall-wide`: the same with bounds that let ten thousand wait for one model, and have sessions.

Each prints one line of JSON: its port, and for ours a client's, a publisher's and an admin's key.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

__all__ = ["KINDS", "Server", "load_core", "server", "server_core"]

_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Server:
    """One that runs.

    Args:
        port: on 127.0.0.1.
        pid: its process.
        client, publisher, admin: keys; None where there are none.
    """

    port: int
    pid: int
    client: str | None = None
    publisher: str | None = None
    admin: str | None = None

    def cpu_s(self) -> float:
        """The processor time that it has used, all threads together."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_kib(self, what: str = "VmRSS") -> int:
        """What it holds now; `VmHWM`: has ever held at most."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{what}:"):
                return int(line.split()[1])
        raise ValueError(what)


def server_core() -> int | None:
    """The core of the server; None where there is but one core."""
    cores = sorted(_cores())
    return cores[0] if len(cores) > 1 else None


def load_core() -> int | None:
    """The core of load and publisher; None where there is but one core."""
    cores = sorted(_cores())
    return cores[1] if len(cores) > 1 else None


def _cores() -> set[int]:
    # Of the process as it started: a child of ours that was pinned asks for its parent's.
    return os.sched_getaffinity(os.getpid())


@contextmanager
def server(kind: str, core: int | None) -> Iterator[Server]:
    """A server in a process of its own.

    Args:
        kind: one of `KINDS`.
        core: what it runs on; None: anywhere.
    """
    # A store on tmpfs would be none: /tmp is a disk here, or what the system makes of it.
    command = [sys.executable, "-m", "tests.benchmarks.servers", kind]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=_ROOT)
    try:
        if core is not None:
            os.sched_setaffinity(process.pid, {core})
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server {kind} did not start")
        yield Server(pid=process.pid, **json.loads(line))
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


async def serve_floor(*, is_guarded: bool) -> None:
    from .floor.app import BareApp, guarded
    from .floor.http.server import hypercorn_config, serve_app
    from .floor.http.sockets import bind

    listening = bind("127.0.0.1", 0)
    _say(port=listening[0].getsockname()[1])
    bare = BareApp()
    await serve_app(guarded(bare) if is_guarded else bare, hypercorn_config(), listening)


async def serve_wakecall(*, is_wide: bool = False) -> None:
    from wakecall import BrokerConfig, ServeConfig, open_broker, open_sqlite_store, serve

    config, in_flight = BrokerConfig(), 1000
    if is_wide:
        # No key has the last place in a line, so ten thousand of one key want room for twice as many.
        wide = 40_000
        config = BrokerConfig(
            max_sessions_per_owner=wide, max_waiting=wide, max_waiting_per_llm=wide, max_waiting_per_key=wide
        )
        in_flight = wide
    with tempfile.TemporaryDirectory() as folder:
        async with (
            open_sqlite_store(Path(folder) / "bench.db") as store,
            open_broker(store, config) as broker,
            trio.open_nursery() as nursery,
        ):
            client = await broker.create_key("client", llms=["bench*"], rpm=1_000_000, max_in_flight=in_flight)
            publisher = await broker.create_key("publisher")
            admin = await broker.create_key("admin")
            urls = await nursery.start(serve, broker, ServeConfig(port=0))
            port = int(urls[0].rsplit(":", 1)[1])
            gc.freeze()  # as `wakecall serve` does once it listens
            _say(port=port, client=client.secret, publisher=publisher.secret, admin=admin.secret)


def _say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


KINDS = ("floor-guarded", "floor-bare", "wakecall", "wakecall-wide")


def main(kind: str) -> None:
    if kind in ("wakecall", "wakecall-wide"):
        trio.run(partial(serve_wakecall, is_wide=kind == "wakecall-wide"))
    elif kind in KINDS:

        async def run() -> None:
            await serve_floor(is_guarded=kind == "floor-guarded")

        trio.run(run)
    else:
        raise SystemExit(f"unknown server {kind}: {', '.join(KINDS)}")


if __name__ == "__main__":
    main(sys.argv[1])
