"""The real thing, in processes of its own: `wakecall serve`, `wakecall publish`, and what a test wants to know of them.

    async with open_broker_process(tmp_path / "w.db") as broker:
        async with open_publisher_process(tmp_path, broker.url, engine.base_url) as publisher:
            await broker.wait_llm("noise", routable=True)

Each process is killed when its block ends, however that ends. What it wrote to stderr is printed then, which pytest
shows with a test that failed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import trio
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.way import agents_way
from tests.http.wire import Answer, Wire, request_bytes

ROOT = Path(__file__).resolve().parents[2]
WAKECALL = [sys.executable, "-m", "wakecall"]

Test = Callable[..., Awaitable[None]]

#: No test here waits longer for a process to do what it should.
PATIENCE_S = 20.0
#: Between two questions where there is no event to wait for.
POLL_S = 0.02


def within(seconds: float) -> Callable[[Test], Test]:
    """Let an async test fail after so many seconds, and show what it was waiting for."""

    def decorate(test: Test) -> Test:
        @functools.wraps(test)
        async def bounded(*args: Any, **kwargs: Any) -> None:
            with trio.fail_after(seconds):
                await test(*args, **kwargs)

        return bounded

    return decorate


def clean_environment(state: Path, **settings: object) -> dict[str, str]:
    """This process's environment without settings of Wakecall's, its state under `state`, and `WAKECALL_*` as given."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WAKECALL_")}
    environment |= {"XDG_STATE_HOME": str(state), "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "COLUMNS": "200"}
    # A proxy setting of the machine is none of ours: everything here is on 127.0.0.1.
    environment |= {"NO_PROXY": "*", "no_proxy": "*"}
    return environment | {f"WAKECALL_{name.upper()}": str(value) for name, value in settings.items()}


class Running:
    """A process and the lines that it has written so far.

    Attributes:
        out, err: stdout and stderr, line by line.
    """

    def __init__(self, name: str, process: trio.Process) -> None:
        self.name = name
        self.process = process
        self.pid = process.pid
        self.out: list[str] = []
        self.err: list[str] = []
        self._news = trio.Event()

    async def read(self, stream: trio.abc.ReceiveStream, lines: list[str]) -> None:
        """Collect lines until the stream ends."""
        rest = b""
        async for data in stream:
            *whole, rest = (rest + data).split(b"\n")
            lines += [line.decode(errors="replace") for line in whole]
            self._news.set()
            self._news = trio.Event()
        lines += [rest.decode(errors="replace")] if rest else []
        self._news.set()

    async def wait_line(self, pattern: str, lines: list[str]) -> re.Match[str]:
        """The first line of `out` or `err` that matches, as soon as it is there."""
        seen = 0
        with trio.fail_after(PATIENCE_S):
            while True:
                for line in lines[seen:]:
                    if found := re.search(pattern, line):
                        return found
                seen = len(lines)
                if self.process.returncode is not None:
                    raise AssertionError(f"{self.name} ended ({self.process.returncode}) without saying {pattern!r}")
                news = self._news
                with trio.move_on_after(1.0):  # to notice an end that said nothing
                    await news.wait()
                    continue
                self.process.poll()

    def send(self, sig: signal.Signals) -> None:
        os.kill(self.pid, sig)

    async def wait(self) -> int:
        """Its exit code, once it has ended."""
        with trio.fail_after(PATIENCE_S):
            return await self.process.wait()

    async def end(self, sig: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
        """Signal it; its exit code and the seconds that it took to end."""
        started = time.monotonic()
        self.send(sig)
        code = await self.wait()
        return code, time.monotonic() - started

    @property
    def descriptors(self) -> int:
        """How many file descriptors it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    @property
    def cpu_s(self) -> float:
        """Seconds that it has spent on a processor, in its own code and in the kernel."""
        after_name = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def resident_bytes(self) -> int:
        """Its resident memory (VmRSS)."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
        assert found is not None
        return int(found[1]) * 1024


@asynccontextmanager
async def open_process(name: str, command: Sequence[str], environment: dict[str, str]) -> AsyncIterator[Running]:
    """Run `command` for the block, in a session of its own; killed at the end.

    Args:
        name: in what is printed of it.
        command: argv.
        environment: all of it.
    """
    process = await trio.lowlevel.open_process(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )
    running = Running(name, process)
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.read, process.stdout, running.out)
            nursery.start_soon(running.read, process.stderr, running.err)
            try:
                yield running
            finally:
                if process.returncode is None:
                    process.kill()
                with trio.move_on_after(5, shield=True):
                    await process.wait()
                nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(process.stdout)
            await trio.aclose_forcefully(process.stderr)
        print(f"--- {name} (exit {process.returncode})", *running.out, *running.err, sep="\n", file=sys.stderr)


async def run_to_end(*arguments: str, state: Path, **settings: object) -> tuple[int, str, str]:
    """A command of `wakecall` that ends by itself: exit code, stdout, stderr."""
    with trio.fail_after(PATIENCE_S):
        done = await trio.run_process(
            [*WAKECALL, *arguments],
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env=clean_environment(state, **settings),
        )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


class BrokerProcess(Running):
    """A running `wakecall serve`.

    Attributes:
        url: `http://127.0.0.1:PORT`.
        http: a client of it, without retries; open as long as the process's block is.
    """

    url: str
    port: int
    http: httpx2.AsyncClient

    @asynccontextmanager
    async def connect(self, *, receive_buffer: int | None = None) -> AsyncIterator[Wire]:
        """A raw connection to it, as `tests.http.wire.Server.connect`."""
        async with connect(self.port, receive_buffer=receive_buffer) as wire:
            yield wire

    async def ask(self, method: str, target: str, *headers: str, body: bytes = b"") -> Answer:
        """One raw request on a connection of its own."""
        async with self.connect() as wire:
            await wire.send(request_bytes(method, target, *headers, body=body, host=f"127.0.0.1:{self.port}"))
            return await wire.read_answer(method)

    async def llm(self, name: str) -> dict[str, Any]:
        """The operators' view of a row."""
        answer = await self.http.get(f"/admin/v1/llms/{name}")
        return answer.raise_for_status().json() if answer.status_code != 404 else {}

    async def list(self, what: str) -> list[dict[str, Any]]:
        """All `llms`, `sessions` or `tasks`, as operators see them."""
        return (await self.http.get(f"/admin/v1/{what}")).raise_for_status().json()["data"]

    async def wait_llm(self, name: str, **members: object) -> dict[str, Any]:
        """The row's view, once it has these members. There is no event for it outside the broker, so this asks."""
        seen: dict[str, Any] = {}
        with _patience(lambda: f"{name} did not become {members}: {seen}"):
            while True:
                seen = await self.llm(name)
                if seen and all(seen[member] == value for member, value in members.items()):
                    return seen
                await trio.sleep(POLL_S)

    async def wait_idle(self) -> None:
        """Return once it holds no task."""
        tasks: list[dict[str, Any]] = []
        with _patience(lambda: f"tasks are left: {tasks}"):
            while tasks := await self.list("tasks"):
                await trio.sleep(POLL_S)

    async def wait_descriptors(self, at_most: int) -> None:
        """Return once it has no more than so many descriptors, its client's idle connections excepted."""
        with _patience(lambda: f"{self.descriptors} descriptors, not {at_most}"):
            while self.descriptors > at_most:
                await trio.sleep(POLL_S)

    def holds(self, peer: tuple[str, int]) -> bool:
        """Whether its end of the connection from this address on this machine is still open."""
        ends = {f"{self.port:04X}", f"{peer[1]:04X}"}
        for line in Path(f"/proc/{self.pid}/net/tcp").read_text().splitlines()[1:]:
            _, local, remote, *rest = line.split()
            is_ours = local.endswith(f":{self.port:04X}") and {local[-4:], remote[-4:]} == ends
            # What nobody holds any more (FIN-WAIT, TIME-WAIT) has no inode.
            if is_ours and rest[6] != "0":
                return True
        return False

    async def wait_let_go(self, peer: tuple[str, int]) -> None:
        """Return once it holds that connection no more."""
        with _patience(lambda: f"the connection from {peer} is still open"):
            while self.holds(peer):
                await trio.sleep(POLL_S)

    async def metrics(self) -> dict[str, float]:
        """Every sample of `/metrics`, labels as `name{label=value}` in the order of their names."""
        text = (await self.http.get("/metrics")).raise_for_status().text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {_sample_name(sample.name, sample.labels): sample.value for sample in samples}


def _sample_name(name: str, labels: dict[str, str]) -> str:
    shown = ",".join(f"{label}={labels[label]}" for label in sorted(labels))
    return f"{name}{{{shown}}}" if shown else name


@contextlib.contextmanager
def _patience(explain: Any) -> Any:
    """`trio.fail_after` that says what did not come."""
    with trio.move_on_after(PATIENCE_S) as scope:
        yield
    if scope.cancelled_caught:
        raise AssertionError(explain())


@asynccontextmanager
async def open_broker_process(
    db: Path,
    *,
    port: int = 0,
    program: Sequence[str] = WAKECALL,
    arguments: Sequence[str] = (),
    under: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    **settings: object,
) -> AsyncIterator[BrokerProcess]:
    """`wakecall serve` on 127.0.0.1 for the block; it listens when this is entered.

    Args:
        db: its file; the state directory is the one it lies in.
        port: 0: a free one.
        program: what `serve` is a verb of.
        arguments: further options.
        under: a command that becomes it, such as `prlimit --nofile=64`.
        variables: of its environment.
        settings: of `BrokerConfig`, given as `WAKECALL_*`.
    """
    command = [*under, *program, "serve", "--port", str(port), "--db", str(db), *arguments]
    environment = clean_environment(db.parent, **settings) | dict(variables or {})
    async with open_process("serve", command, environment) as running:
        broker = _become(running, BrokerProcess)
        found = await broker.wait_line(r"http://127\.0\.0\.1:(\d+)", broker.out)
        broker.url, broker.port = found[0], int(found[1])
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx2.AsyncClient(base_url=broker.url, timeout=60, limits=limits, trust_env=False) as broker.http:
            yield broker


def _become(running: Running, kind: type[BrokerProcess]) -> BrokerProcess:
    running.__class__ = kind
    assert isinstance(running, kind)
    return running


@asynccontextmanager
async def open_publisher_process(
    state: Path,
    broker_url: str,
    engine_url: str,
    *arguments: str,
    variables: Mapping[str, str] | None = None,
    **settings: object,
) -> AsyncIterator[Running]:
    """`wakecall publish` for the block; whether it has registered is for the broker to tell (`wait_llm`).

    Args:
        state: its state directory.
        broker_url, engine_url: where it goes; to the broker through `way.py`'s faults, if the run is one of those.
        arguments: further options.
        variables: of its environment.
        settings: given as `WAKECALL_*`.
    """
    broker_url = await agents_way(broker_url)
    command = [*WAKECALL, "publish", "--broker", broker_url, "--engine", engine_url, *arguments]
    environment = clean_environment(state, **settings) | dict(variables or {})
    async with open_process("publish", command, environment) as running:
        yield running


@asynccontextmanager
async def connect(port: int, *, receive_buffer: int | None = None) -> AsyncIterator[Wire]:
    """A raw connection to 127.0.0.1.

    Args:
        port: where.
        receive_buffer: bytes, for a peer that should soon be full.
    """
    import socket

    sock = trio.socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    with sock:
        await sock.connect(("127.0.0.1", port))
        async with trio.SocketStream(sock) as stream:
            yield Wire(stream)


def closed_port() -> int:
    """A port of 127.0.0.1 on which nobody listens."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def kill_all_in(pid_file: Path) -> None:
    """End what a wake command left behind: the processes whose ids stand in the file."""
    for line in pid_file.read_text().split() if pid_file.exists() else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(line), signal.SIGKILL)


class Tap:
    """A relay between a publisher and its broker that keeps all bytes, in the order in which they passed.

    Attributes:
        port: where the publisher goes.
        up, down: what publisher and broker said, over all connections.
        passed: both, as `(direction, bytes)`.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.passed: list[tuple[str, bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def down(self) -> bytes:
        return b"".join(data for direction, data in self.passed if direction == "down")

    @property
    def up(self) -> bytes:
        return b"".join(data for direction, data in self.passed if direction == "up")

    def frames(self, event: str) -> int:
        """How many frames of this event the broker has sent."""
        return self.down.count(f"event: {event}\n".encode())

    def position(self, direction: str, text: bytes) -> int:
        """When this was said for the first time: an index into `passed`."""
        said = b""
        for index, (whose, data) in enumerate(self.passed):
            if whose == direction:
                said = said[-len(text) :] + data
                if text in said:
                    return index
        raise AssertionError(f"{text!r} has not passed")

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, self._serve, listeners)
            task_status.started()

    async def _serve(self, publisher: trio.SocketStream) -> None:
        try:
            broker = await trio.open_tcp_stream("127.0.0.1", self.target)
        except OSError:
            await trio.aclose_forcefully(publisher)
            return
        async with publisher, broker, trio.open_nursery() as nursery:
            nursery.start_soon(self._pass, publisher, broker, "up", nursery)
            nursery.start_soon(self._pass, broker, publisher, "down", nursery)

    async def _pass(
        self, source: trio.SocketStream, sink: trio.SocketStream, direction: str, nursery: trio.Nursery
    ) -> None:
        try:
            async for data in source:
                self.passed.append((direction, bytes(data)))
                await sink.send_all(data)
            await sink.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_tap(target: int) -> AsyncIterator[Tap]:
    """A tap on the way to port `target`, for the block."""
    tap = Tap(target)
    async with trio.open_nursery() as nursery:
        await nursery.start(tap.run)
        yield tap
        nursery.cancel_scope.cancel()
