"""The publisher's sticky identity: a session id in a file that one agent at a time can hold."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import platformdirs

from ..addresses import shown
from ..models import is_id
from .config import PublisherConfig
from .errors import StateLocked, StateUnusable

_LOCK_ATTEMPTS: Final = 5
_LOCK_PAUSE_S: Final = 0.01


@dataclass(frozen=True, slots=True)
class State:
    """A held state file: the session's id, the file, and where the commands' error output goes."""

    session_id: str
    path: Path
    command_log: Path


@dataclass(frozen=True, slots=True)
class KnownPublisher:
    """What a state file says. The addresses have no password; `is_running`: an agent holds the file."""

    session_id: str
    broker: str
    engine: str
    is_running: bool


def _directory(state_dir: Path | None) -> Path:
    return (state_dir or Path(platformdirs.user_state_dir("wakecall"))) / "publishers"


def known_publishers(state_dir: Path | None = None) -> list[KnownPublisher]:
    """The publishers that have run on this machine for this user, those that run among them.

    Args:
        state_dir: as in `PublisherConfig`.
    """
    paths = sorted(_directory(state_dir).glob("*.json"))
    return [known for path in paths if (known := _read_publisher(path)) is not None]


def _read_publisher(path: Path) -> KnownPublisher | None:
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "rb") as file:
            record = _read_record(file.read())
            try:
                # Shared and for an instant: see `_lock`.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                is_running = False
            except BlockingIOError:
                is_running = True
    except OSError:
        return None
    match record:
        case {"session_id": str(session_id), "broker": str(broker), "engine": str(engine)} if is_id(session_id):
            return KnownPublisher(session_id, broker, engine, is_running)
    return None


def state_path(config: PublisherConfig) -> Path:
    """The file of this broker and engine; with a session id of one's own, of this broker and that session."""
    identity = [shown(config.broker_base)]
    identity += [shown(config.engine_base)] if config.session_id is None else ["session", config.session_id]
    digest = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:20]
    return _directory(config.state_dir) / f"{digest}.json"


@contextmanager
def open_state(config: PublisherConfig) -> Iterator[State]:
    """Lock the state file for as long as the block runs, and read or make up the session id.

    The lock is flock(2)'s: it dies with the process however that ends, and a command's daemon does not inherit it.

    Raises:
        StateLocked: another agent holds it.
        StateUnusable: the file cannot be made, read or written.
    """
    path = state_path(config)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StateUnusable(f"the state file {path} cannot be opened: {error.strerror}") from error
    with os.fdopen(descriptor, "r+b") as file:
        try:
            _lock(file)
        except BlockingIOError as error:
            whose = "for this broker and engine" if config.session_id is None else "with this session id"
            raise StateLocked(f"another publisher is running {whose}: it holds {path}") from error
        except OSError as error:
            raise StateUnusable(f"the state file {path} cannot be locked: {error.strerror}") from error
        try:
            session_id = config.session_id or _read_session_id(file.read()) or secrets.token_urlsafe(16)
            record = {
                "session_id": session_id,
                "broker": shown(config.broker_base),
                "engine": shown(config.engine_base),
            }
            # Over what stands there and not into an emptied file: somebody may be reading it.
            file.seek(0)
            file.write(json.dumps(record, indent=2).encode() + b"\n")
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise StateUnusable(f"the state file {path} cannot be written: {error.strerror}") from error
        yield State(session_id=session_id, path=path, command_log=path.with_suffix(".log"))


def _lock(file: BinaryIO) -> None:
    # Whoever only asks whether it is held has it for an instant: it is held if it still is a moment later.
    for _ in range(_LOCK_ATTEMPTS - 1):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_PAUSE_S)
        else:
            return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _read_record(content: bytes) -> dict[str, Any]:
    try:
        record = json.loads(content)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _read_session_id(content: bytes) -> str | None:
    session_id = _read_record(content).get("session_id")
    if isinstance(session_id, str) and is_id(session_id):
        return session_id
    return None
