"""Who is calling. One place: what a key may do is looked up here, and nowhere else.

There are no keys yet: the broker is *open*, everyone is the owner `local` and may do everything. What keeps the rest of the
world out is that it listens on loopback only. A web page in the user's own browser could still reach it, so a request that
names a foreign host (DNS rebinding) or comes from a foreign origin is refused before anything looks at it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from quart import Request

from ..errors import Forbidden
from ..models import LOCAL_OWNER
from .sockets import is_loopback

__all__ = ["Principal", "Role", "authenticate", "refuse_foreign"]

Role = Literal["client", "publisher", "admin"]

_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")
_ORIGIN: Final = re.compile(r"https?://(.+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller: whose sessions, names and tasks are his, and which paths he may use."""

    owner: str
    roles: frozenset[Role]


_EVERYONE: Final = Principal(LOCAL_OWNER, frozenset({"client", "publisher", "admin"}))


def authenticate(request: Request) -> Principal:
    """The caller of a request.

    Raises:
        InvalidApiKey: a key is required, and this is none.
    """
    return _EVERYONE


def refuse_foreign(host: str | None, origins: Iterable[str]) -> None:
    """Let only requests pass that a program on this machine makes on its own account.

    Args:
        host: the `Host` header.
        origins: every `Origin` header; browsers send one, and `null` is foreign as well.

    Raises:
        Forbidden: one of them names something else than this machine's loopback.
    """
    if host is not None and not _is_ours(host):
        raise Forbidden("This broker is open, so it answers to loopback names only. This Host is not one.")
    for origin in origins:
        found = _ORIGIN.fullmatch(origin)
        if found is None or not _is_ours(found[1]):
            raise Forbidden("This broker is open, so it takes no requests from pages of other origins.")


def _is_ours(authority: str) -> bool:
    # Nearly every request's, and cheap to see.
    if authority.startswith(("127.0.0.1:", "localhost:")) and authority.rpartition(":")[2].isdecimal():
        return True
    found = _HOST.fullmatch(authority)
    return found is not None and is_loopback(found[1])
