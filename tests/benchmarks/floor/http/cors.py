"""Which web pages may call the broker from a browser, and what a browser has to be told for that (Fetch, section 3.3).

A browser asks beforehand (the *preflight*) and looks at each answer whether the page may read it. Both are about paths under
`/v1` alone: a page is a client, never a publisher or an operator. There are no cookies here, so nothing is ever said of
credentials; a page that has a key sends it itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from .refusal import Headers

__all__ = ["Cors", "InvalidOrigin", "is_origin"]

ANY: Final = "*"

# RFC 6454, 6.2, as browsers write it: ASCII, lower case. Other schemes than http's are those of apps with a page inside.
_ORIGIN: Final = re.compile(r"([a-z][a-z0-9+.-]*)://([a-z0-9._~-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")
_DEFAULT_PORTS: Final = {"http": "80", "https": "443"}

_TOKEN: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_TOKENS: Final = re.compile(rb"%b(?:[ \t]*,[ \t]*%b)*" % (_TOKEN, _TOKEN))
_MAX_ECHOED_BYTES: Final = 4096

# Chrome takes no more than two hours, and asks again without this after five seconds.
_MAX_AGE_S: Final = 7200
_METHODS: Final = b"GET, HEAD, POST"
# A page sees no other header than these and the few that are safe for everybody. There is no wildcard for a prefix.
_EXPOSED: Final = b", ".join(
    [
        b"x-request-id",
        b"retry-after",
        b"x-should-retry",
        *(
            b"x-ratelimit-%b-%b" % (what, unit)
            for unit in (b"requests", b"tokens")
            for what in (b"limit", b"remaining", b"reset")
        ),
    ]
)


class InvalidOrigin(ValueError):
    """What should name the pages of one origin does not.

    Args:
        origin: it.
        why: what is wrong with it.
    """

    def __init__(self, origin: str, why: str) -> None:
        super().__init__(
            f"{origin!r} is no origin: {why}. One looks like https://chat.example.com, with a port if need be"
        )


def is_origin(text: str) -> bool:
    """Whether `text` is an origin as a browser sends it; `null` is none that could be told from another."""
    return _ORIGIN.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Cors:
    """The origins whose pages may call; see `of`.

    Args:
        named: each as a browser writes it.
        admits_any: whether pages of every other origin may, too.
    """

    named: frozenset[str]
    admits_any: bool

    @classmethod
    def of(cls, origins: Iterable[str]) -> Cors | None:
        """What a list of origins, and maybe `*`, allows; None for an empty one: nothing is said to browsers at all.

        Raises:
            InvalidOrigin: one of them is none.
        """
        given = list(origins)
        named = frozenset(_normal(each) for each in given if each != ANY)
        return cls(named, ANY in given) if given else None

    def names(self, path: str, origins: Sequence[str]) -> bool:
        """Whether a request comes from a page that somebody has admitted by name, and to a path that is for pages.

        Args:
            path: the request's.
            origins: its `Origin` headers; of a browser's there is one.
        """
        return _is_for_pages(path) and len(origins) == 1 and origins[0] in self.named

    def marks(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> Headers:
        """The headers that an answer needs, whoever makes it.

        Args:
            path: the request's.
            headers: the request's, names in lower case.
        """
        if not _is_for_pages(path):
            return []
        # Also where nobody is admitted: a cache must not give that answer to a page that is.
        marks = [(b"vary", b"Origin")]
        origin = self._admitted(headers)
        if origin is not None:
            marks += [(b"access-control-allow-origin", origin), (b"access-control-expose-headers", _EXPOSED)]
        return marks

    def preflight(self, method: str, path: str, headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str] | None:
        """What answers a browser that asks before it sends, beside `marks`; None if this is no such question, or the
        page may not.

        Args:
            method: the request's.
            path: the request's.
            headers: the request's, names in lower case.
        """
        if method != "OPTIONS" or not _is_for_pages(path) or self._admitted(headers) is None:
            return None
        asked = dict(headers)
        if b"access-control-request-method" not in asked:
            return None
        answer = {"Access-Control-Allow-Methods": _METHODS.decode(), "Access-Control-Max-Age": str(_MAX_AGE_S)}
        wanted = asked.get(b"access-control-request-headers", b"")
        if len(wanted) <= _MAX_ECHOED_BYTES and _TOKENS.fullmatch(wanted):
            answer["Access-Control-Allow-Headers"] = wanted.decode("ascii")
        return answer

    def _admitted(self, headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
        """The `Origin` of a request, if its page may call."""
        origins = [value for name, value in headers if name == b"origin"]
        if len(origins) != 1:
            return None
        origin = origins[0].decode("latin-1")
        return origins[0] if origin in self.named or (self.admits_any and is_origin(origin)) else None


def _is_for_pages(path: str) -> bool:
    return path == "/v1" or path.startswith("/v1/")


def _normal(origin: str) -> str:
    """An origin as a browser writes it: lower case, and without a port that its scheme has anyway."""
    text = origin.lower()
    if "://" not in text:
        raise InvalidOrigin(origin, "it has no scheme, such as https://")
    found = _ORIGIN.fullmatch(text)
    if found is None:
        after = text.partition("://")[2]
        why = "nothing stands behind the host and its port, not even a slash" if "/" in after else "its host is none"
        raise InvalidOrigin(origin, why)
    scheme, host, port = found.groups()
    if port is None or port == _DEFAULT_PORTS.get(scheme):
        return f"{scheme}://{host}"
    if not 0 < int(port) < 65536:
        raise InvalidOrigin(origin, "its port is none")
    return f"{scheme}://{host}:{int(port)}"
