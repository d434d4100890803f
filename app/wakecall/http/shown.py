"""How a record is shown, whoever shows it: the routes, or the command line out of a file. So it loads no web server."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Final

import msgspec

from ..models import ID_PATTERN, MAX_NAME_LENGTH, NAME_PATTERN, KeyView, Role

__all__ = ["Id", "Instant", "Key", "MadeKey", "Name", "describe_key", "instant"]


def _text(description: str, **schema: Any) -> msgspec.Meta:
    # In the schema only: what decides stands in models.py, and raises errors that name the member in our own words.
    return msgspec.Meta(description=description, extra_json_schema=schema)


#: How a Struct says that a text is the name of a model, an id, an instant.
Name: Final = _text("A model's name.", pattern=f"^{NAME_PATTERN}$", maxLength=MAX_NAME_LENGTH)
Id: Final = _text("A session's, a task's or a key's id.", pattern=f"^{ID_PATTERN}$")
Instant: Final = _text("RFC 3339, in UTC.", format="date-time")


class Key(msgspec.Struct, frozen=True):
    """What is kept of a key. It is not the key itself."""

    id: Annotated[str, Id]
    role: Role
    owner: str
    name: str
    llms: tuple[str, ...] | None
    rpm: int | None
    max_in_flight: int | None
    created_at: Annotated[str, Instant]
    expires_at: Annotated[str, Instant] | None
    expired: bool
    in_flight: int


class MadeKey(Key, frozen=True):
    """A key that has been made, and in `key` the key itself, this once."""

    key: str


def describe_key(view: KeyView) -> Key:
    """A key as operators see it, which is all but the key itself."""
    key = view.key
    return Key(
        id=key.key_id,
        role=key.role,
        owner=key.owner,
        name=key.name,
        llms=key.llms,
        rpm=key.rpm,
        max_in_flight=key.max_in_flight,
        created_at=instant(key.created_at),
        expires_at=None if key.expires_at is None else instant(key.expires_at),
        expired=view.expired,
        in_flight=view.in_flight,
    )


def instant(seconds: float) -> str:
    """RFC 3339 in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
