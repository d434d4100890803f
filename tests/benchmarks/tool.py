"""`load.c` and `burst.c`, compiled once for each of their versions, and how they are asked."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from .servers import Server, load_core
from .sizes import ANSWER, EVENT, EVENTS

__all__ = ["Crowd", "Publisher", "build", "crowd", "offers_shared", "paced", "publishing", "requests", "streams"]

#: A load that is so busy may be what is measured.
_BUSY = 0.7
_SOURCE = Path(__file__).with_name("load.c")
_BURST = Path(__file__).with_name("burst.c")


@dataclass(frozen=True, slots=True, kw_only=True)
class Publisher:
    """The publisher that answers beside the load, in its process.

    Args:
        server: whose publisher; its key is used.
        session: its id, and the name of its one row.
        is_shared: plain answers go as records on one shared upload.
        pace: events a second of each stream; None: as fast as they go.
        events: of a stream.
        kept: connections for results, at the most.
    """

    server: Server
    session: str = "bench"
    is_shared: bool = False
    pace: float | None = None
    events: int = EVENTS
    kept: int = 64


def build(source: Path = _SOURCE) -> Path:
    """A program, compiled if this version of it is not there yet.

    Raises:
        RuntimeError: there is no compiler.
    """
    folder = Path(tempfile.gettempdir()) / f"wakecall-bench-{os.getuid()}"
    program = folder / f"{source.stem}-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}"
    if program.exists():
        return program
    compiler = shutil.which("cc")
    if compiler is None:
        raise RuntimeError("the benchmark needs a C compiler as `cc`: apt-get install gcc libc6-dev")
    folder.mkdir(mode=0o700, exist_ok=True)
    fresh = program.with_suffix(f".{os.getpid()}")
    subprocess.run([compiler, "-O2", "-Wall", "-Wextra", "-o", fresh, source], check=True)
    fresh.rename(program)  # so that nobody meets half a program
    return program


def requests(
    port: int, asked: Sequence[bytes], connections: int, seconds: float, publisher: Publisher | None = None
) -> dict[str, Any]:
    """Repeat one request on each connection; connection i has `asked[i % len(asked)]`. See `load.c` for what is found."""
    return _run("requests", port, asked, connections, seconds, publisher)


def streams(
    port: int, asked: bytes, connections: int, seconds: float, publisher: Publisher | None = None
) -> dict[str, Any]:
    """The same, and count the events of each answer."""
    return _run("streams", port, [asked], connections, seconds, publisher)


def paced(
    port: int,
    asked: bytes,
    connections: int,
    publisher: Publisher | None = None,
    *,
    limit_s: float,
    trim: tuple[float, float] = (2.0, 1.0),
) -> dict[str, Any]:
    """Ask once on each connection for a stream of stamped events, and see how late each is read.

    Args:
        limit_s: seconds after which it is given up.
        trim: seconds left out behind the last stream's begin, and before the first one's end.
    """
    extra = ["--trim-begin", str(trim[0]), "--trim-end", str(trim[1])]
    return _run("paced", port, [asked], connections, limit_s, publisher, extra)


def offers_shared(server: Server) -> bool:
    """Whether the broker takes answers on one shared upload: `results` in the features of `hello`."""
    headers = {"Authorization": f"Bearer {server.publisher}", "Content-Type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request("PUT", "/publisher/v1/sessions/probe", '{"llms": []}', headers)
        connection.getresponse().read()
        connection.request("GET", "/publisher/v1/sessions/probe/frames", headers=headers)
        answer = connection.getresponse()
        while not (line := answer.readline()).startswith(b"data: "):
            if not line:
                raise RuntimeError("the channel said no hello")
        return "results" in json.loads(line[6:])["features"]
    finally:
        connection.close()


@contextmanager
def publishing(publisher: Publisher, seconds: float) -> Iterator[SimpleQueue[dict[str, Any]]]:
    """A publisher in a process of its own, for at most so long. Yields what it says; all of it is there at the end."""
    said: SimpleQueue[dict[str, Any]] = SimpleQueue()
    with _files([]) as folder:
        command = [*_command("publish"), *_as_options(publisher, folder), "--limit", str(seconds)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=_onto_its_core
        )
        assert process.stdin is not None
        lines = process.stdout
        assert lines is not None
        hearer = threading.Thread(target=lambda: [said.put(json.loads(line)) for line in lines], daemon=True)
        try:
            if not lines.readline():
                raise RuntimeError("the publisher did not start")
            hearer.start()
            yield said
        finally:
            process.stdin.close()
            process.wait(10)
            if hearer.is_alive():
                hearer.join()
            lines.close()


class Crowd:
    """Many callers with a connection each, that all ask at once. Made by `crowd`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self) -> int:
        """Send the request on every connection. Returns when the first was sent, in ns of CLOCK_MONOTONIC."""
        assert self._process.stdin is not None
        self._process.stdin.write("ask\n")
        self._process.stdin.flush()
        return int(self._hear()["sent"])

    def wait(self) -> dict[str, Any]:
        """Wait for all answers: when the first and the last had been read, the number of each status, and their bytes."""
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the crowd's answers did not all come (it ended with {self._process.wait(10)})")
        found = json.loads(line)
        assert isinstance(found, dict)
        return found


@contextmanager
def crowd(port: int, asked: bytes, callers: int, limit_s: int = 120) -> Iterator[Crowd]:
    """So many callers, connected, who are to ask this; for at most so long."""
    with _files([asked]) as folder:
        command = [str(build(_BURST)), "--port", str(port), "--connections", str(callers)]
        command += ["--request", str(folder / "0"), "--limit", str(limit_s)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=_onto_its_core
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            everybody = Crowd(process)
            everybody._hear()
            yield everybody
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()


def _run(
    mode: str,
    port: int,
    asked: Sequence[bytes],
    connections: int,
    seconds: float,
    publisher: Publisher | None,
    extra: Sequence[str] = (),
) -> dict[str, Any]:
    with _files(asked) as folder:
        command = [*_command(mode), "--port", str(port), "--connections", str(connections), "--seconds", str(seconds)]
        command += ["--warm", str(min(0.3, seconds / 4)), *extra]
        for number in range(len(asked)):
            command += ["--request", str(folder / str(number))]
        if publisher is not None:
            command += _as_options(publisher, folder)
        ran = subprocess.run(command, capture_output=True, text=True, preexec_fn=_onto_its_core)
    if ran.returncode:
        raise RuntimeError(f"{mode}: {ran.stderr.strip() or f'ended with {ran.returncode}'}")
    found = json.loads(ran.stdout)
    assert isinstance(found, dict)
    if found["cpu_s"] > _BUSY * found["all_s"]:
        print(f"{mode}: the load used {found['cpu_s'] / found['all_s']:.0%} of its core", file=sys.stderr)
    return found


def _command(mode: str) -> list[str]:
    return [str(build()), mode]


def _onto_its_core() -> None:
    core = load_core()
    if core is not None:
        os.sched_setaffinity(0, {core})


@contextmanager
def _files(asked: Sequence[bytes]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, request in enumerate(asked):
            (folder / str(number)).write_bytes(request)
        (folder / "answer").write_bytes(ANSWER)
        (folder / "event").write_bytes(EVENT)
        yield folder


def _as_options(publisher: Publisher, folder: Path) -> list[str]:
    options: dict[str, object] = {
        "--publish-port": publisher.server.port,
        "--session": publisher.session,
        "--answer": folder / "answer",
        "--event": folder / "event",
        "--events": publisher.events,
        "--kept": publisher.kept,
    }
    if publisher.server.publisher is not None:
        options["--key"] = publisher.server.publisher
    if publisher.pace is not None:
        options["--pace"] = publisher.pace
    words = [str(word) for pair in options.items() for word in pair]
    return [*words, "--shared"] if publisher.is_shared else words
