"""What a register says, and what its refusal means."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Iterable, Sequence

from .config import AnnouncedStatus, PublishedModel, PublisherConfig
from .errors import KeyRefused, NameTaken, PublisherError, RegistrationRefused
from .wire import BrokerRefused, Row

_MEMBER_OF_ROW = re.compile(r"llms\[([0-9]{1,6})\](?:\.(\w+))?")


def rows_to_register(
    config: PublisherConfig, models: Iterable[PublishedModel], status_of: Callable[[str], AnnouncedStatus]
) -> list[Row]:
    """The rows of a register."""
    return [
        Row(
            name=model.name,
            type=config.type,
            model=model.engine_id if model.engine_id != model.name else None,
            status=status_of(model.name),
            max_concurrency=config.max_concurrency,
            wake_s=config.wake_s,
            cancel=config.cancel,
            pool=config.pool,
            group=config.group,
            queue_s=config.queue_s,
            first_byte_s=config.first_byte_s,
            idle_s=config.idle_s,
            total_s=config.total_s,
        )
        for model in models
    ]


def key_refused(error: BrokerRefused, *, had_key: bool) -> KeyRefused | None:
    """What ends the publisher if the refusal is of who it is; else None.

    Args:
        error: the broker's answer.
        had_key: whether the publisher has an API key.
    """
    if error.status not in (401, 403):
        return None
    if not error.code:
        return KeyRefused(f"what stands before the broker refuses this publisher: {error.message}")
    if had_key:
        return KeyRefused(f"the broker refuses this publisher's API key: {error.message}", code=error.code)
    if error.status == 401:
        return KeyRefused("the broker wants an API key, and this publisher has none", code=error.code)
    return KeyRefused(f"the broker refuses this publisher: {error.message}", code=error.code)


def fatal_error(error: BrokerRefused, rows: Sequence[Row], *, again: bool, had_key: bool) -> PublisherError | None:
    """What a refused register means for the publisher; None if trying again may help.

    Args:
        error: the broker's answer.
        rows: what was to be registered: the answer names a row by its place.
        again: whether the broker had the session before.
        had_key: whether the publisher has an API key.
    """
    if again and not error.code:
        # Not the broker's words but those of a proxy, which has no broker behind it while that restarts.
        return None
    name, member, what = _row_at_fault(error.param, rows)
    said = f"the broker refuses to register {what}{' again' if again else ''}: {error.message}"
    if (refused := key_refused(error, had_key=had_key)) is not None:
        return refused if name is None else KeyRefused(said, code=error.code, name=name, member=member)
    if not 400 <= error.status < 500 or error.status in (408, 429):
        return None
    kind = NameTaken if error.status == 409 else RegistrationRefused
    return kind(said, code=error.code, name=name, member=member)


def _row_at_fault(param: str, rows: Sequence[Row]) -> tuple[str | None, str, str]:
    """The name of the row that a `param` such as `llms[0].name` means, its member, and words for what is refused."""
    found = _MEMBER_OF_ROW.fullmatch(param)
    if found is None or int(found[1]) >= len(rows):
        return None, "", "its models"
    row, member = rows[int(found[1])], found[2] or ""
    if member == "pool" and row.pool is not None:
        return row.name, member, f"{row.name!r} in the pool {row.pool!r}"
    return row.name, member, repr(row.name) if member in ("", "name") else f"{row.name!r} ({member})"


def agent_version() -> str:
    """Of this agent, as its registers say it."""
    try:
        return importlib.metadata.version("wakecall")
    except importlib.metadata.PackageNotFoundError:
        # Run from a source tree that nobody installed.
        return "unknown"
