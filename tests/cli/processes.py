"""`wakecall` as a process of its own, under Trio: what it says as it says it, and nothing of it left behind."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

PATIENCE_S = 30
MARK = "WAKECALL_TESTS_MARK"


@dataclass
class Said:
    """What has come out of a stream so far."""

    text: str = ""
    news: trio.Event = field(default_factory=trio.Event)
    over: bool = False

    async def follow(self, stream: trio.abc.ReceiveStream) -> None:
        async for data in stream:
            self.text += data.decode()
            self._tell()
        self.over = True
        self._tell()

    def _tell(self) -> None:
        self.news.set()
        self.news = trio.Event()

    async def wait(self, wanted: str) -> str:
        """The first whole line with `wanted` in it."""
        while True:
            for line in self.text.splitlines(keepends=True):
                if wanted in line and line.endswith("\n"):
                    return line.rstrip("\n")
            assert not self.over, f"{wanted!r} was never said, but:\n{self.text}"
            await self.news.wait()


@dataclass
class Running:
    """A process under way."""

    process: trio.Process
    mark: str
    out: Said = field(default_factory=Said)
    err: Said = field(default_factory=Said)

    async def wait(self) -> int:
        """Its exit code, once it has ended and everything it said is here."""
        code = await self.process.wait()
        while not (self.out.over and self.err.over):
            await (self.err if self.out.over else self.out).news.wait()
        return code

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def url(self) -> str:
        """What `serve` listens on."""
        line = await self.out.wait("Wakecall listens on ")
        return line.removeprefix("Wakecall listens on ")

    def family(self) -> list[str]:
        """The command lines of all processes that came of it, whoever their parent is now; itself too."""
        return family(self.mark)


def family(mark: str) -> list[str]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue  # it has ended, or is somebody else's
    return found


def environment(state: Path, **variables: str) -> dict[str, str]:
    """Our own, without settings of Wakecall's or a terminal's, and with a state directory that is the test's."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("WAKECALL_") and name not in ("NO_COLOR", "COLUMNS", "FORCE_COLOR")
    }
    return {**kept, "XDG_STATE_HOME": str(state), MARK: secrets.token_hex(8), **variables}


@asynccontextmanager
async def run_wakecall(
    *args: str, state: Path, prepare: Callable[[], None] | None = None, **variables: str
) -> AsyncIterator[Running]:
    """`wakecall ARGS` while the block runs; killed at its end, if it is still there."""
    env = environment(state, **variables)
    with trio.fail_after(PATIENCE_S):
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "wakecall", *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            preexec_fn=prepare,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        running = Running(process, env[MARK])
        try:
            # Closed after those who read have gone.
            async with process.stdout, process.stderr, trio.open_nursery() as nursery:
                nursery.start_soon(running.out.follow, process.stdout)
                nursery.start_soon(running.err.follow, process.stderr)
                yield running
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                if process.returncode is None:
                    process.kill()
                await process.wait()


def call(*args: str, state: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """`wakecall ARGS`, run to its end."""
    return subprocess.run(
        [sys.executable, "-m", "wakecall", *args],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=environment(state, **variables),
        timeout=PATIENCE_S,
    )
