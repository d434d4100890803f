"""Who is calling. One place: whether a request may pass is decided here, and nowhere else.

A broker that has keys knows its callers by them. One that has none is *open*: everyone is the owner `local` and may do
everything. What keeps the rest of the world out then is that it listens on loopback only. A web page in the user's own
browser could still reach it, so a request that names a foreign host (DNS rebinding) or comes from a foreign origin is
refused before anything looks at it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from typing import Final, TypeVar

from quart import Request
from werkzeug.datastructures import Headers

from ..broker import Broker
from ..errors import Forbidden, InternalError, InvalidApiKey, WakecallError
from ..faults import stacks_of
from ..keyring import Caller
from ..models import Role
from .raw import RawHeaders, RawRequest
from .sockets import is_loopback

__all__ = ["authenticate", "check_again", "refuse_foreign", "refuse_other_origins"]

T = TypeVar("T")

logger = logging.getLogger("wakecall.server")

_HOST: Final = re.compile(r"(\[(?=[^\]]*:)[0-9A-Fa-f:.]+(?:%[0-9A-Za-z._~-]+)?\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")
_ORIGIN: Final = re.compile(r"https?://(.+)", re.IGNORECASE)


def authenticate(broker: Broker, request: Request | RawRequest, role: Role) -> Caller:
    """The caller of a request, who may do what this role does.

    Args:
        broker: who knows the keys.
        request: theirs.
        role: which the path is for.

    Raises:
        InvalidApiKey: a key is required, and this is none that opens anything.
        Forbidden: it is another role's.
        InternalError: something of ours went wrong: nobody passes for that (503).
    """
    caller = _sure_of(lambda: broker.authenticate(_presented(request.headers)))
    if role not in caller.roles:
        raise Forbidden(f"This path takes a key of role {role}.")
    return caller


def check_again(broker: Broker, caller: Caller) -> None:
    """Whether a caller still passes, behind a wait for his body: his key may be revoked by now.

    Raises:
        InvalidApiKey: he does not.
        InternalError: something of ours went wrong (503).
    """
    _sure_of(lambda: broker.check(caller))


def _sure_of(check: Callable[[], T]) -> T:
    try:
        return check()
    except WakecallError:
        raise
    except Exception as error:
        logger.error("a key could not be checked: %s", stacks_of(error))
        raise InternalError("The broker cannot check API keys.", status=503) from None


def _presented(headers: Headers | RawHeaders) -> str | None:
    """The key that a request presents, in either way or in both (protocol.md, Conventions).

    Raises:
        InvalidApiKey: it presents two, and they are not the same.
    """
    presented = {key.strip() for key in headers.getlist("x-api-key")}
    for value in headers.getlist("authorization"):
        scheme, _, key = value.strip().partition(" ")
        # Another scheme is a proxy's between: its password is none of our keys.
        if scheme.lower() == "bearer":
            presented.add(key.strip())
    presented.discard("")
    if len(presented) > 1:
        raise InvalidApiKey("The request presents two different API keys.")
    return presented.pop() if presented else None


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


def refuse_other_origins(host: str | None, origins: Iterable[str]) -> None:
    """Let no web page pass that was not loaded from here: it would call on its visitor's account, who knows nothing of it.

    Args:
        host: the `Host` header.
        origins: every `Origin` header; programs send none.

    Raises:
        Forbidden: one of them is neither this server's own nor this machine's loopback.
    """
    for origin in origins:
        found = _ORIGIN.fullmatch(origin)
        if found is None or not (found[1].lower() == (host or "").lower() or _is_ours(found[1])):
            raise Forbidden("This broker is open, so it takes no requests from pages of other origins.")


def _is_ours(authority: str) -> bool:
    # Nearly every request's, and cheap to see.
    host, _, port = authority.partition(":")
    if host in ("127.0.0.1", "localhost") and len(port) <= 5 and port.isascii() and port.isdecimal():
        return True
    found = _HOST.fullmatch(authority)
    return found is not None and is_loopback(found[1])
