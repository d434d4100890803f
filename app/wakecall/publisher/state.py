"""The publisher's sticky identity: a session id in a file that one agent at a time can hold."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from ..addresses import shown
from ..models import is_id
from .config import PublisherConfig
from .errors import StateLocked, StateUnusable


@dataclass(frozen=True, slots=True)
class State:
    """A held state file: the session's id, the file, and where the commands' error output goes."""

    session_id: str
    path: Path
    command_log: Path


def state_path(config: PublisherConfig) -> Path:
    """The file of this broker and engine; with a session id of one's own, of this broker and that session."""
    directory = config.state_dir
    if directory is None:
        directory = Path(platformdirs.user_state_dir("wakecall"))
    identity = [shown(config.broker_base)]
    identity += [shown(config.engine_base)] if config.session_id is None else ["session", config.session_id]
    digest = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:20]
    return directory / "publishers" / f"{digest}.json"


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
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
            file.seek(0)
            file.truncate()
            file.write(json.dumps(record, indent=2).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise StateUnusable(f"the state file {path} cannot be written: {error.strerror}") from error
        yield State(session_id=session_id, path=path, command_log=path.with_suffix(".log"))


def _read_session_id(content: bytes) -> str | None:
    try:
        record = json.loads(content)
    except ValueError:
        return None
    session_id = record.get("session_id") if isinstance(record, dict) else None
    if isinstance(session_id, str) and is_id(session_id):
        return session_id
    return None
