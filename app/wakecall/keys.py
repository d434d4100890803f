"""API keys: what they look like, what is kept of them, and which models they open.

A key is `wakecall_ROLE_` and 256 random bits in Base32 (RFC 4648, lower case, no padding), so that whoever finds one, a
person or a scanner for leaked secrets, knows what it is. Only its SHA-256 is kept: of so many random bits a plain digest
cannot be turned back, and a slow one would only slow every request down.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Final, get_args

from .addresses import has_credentials
from .models import Role

__all__ = [
    "ENTROPY_BYTES",
    "MAX_PATTERNS",
    "NAMES_PATTERN",
    "OWNER_PATTERN",
    "ROLES",
    "UPSTREAM_VARIABLE_PATTERN",
    "digest_of",
    "format_key",
    "header_for",
    "is_owner",
    "is_pattern",
    "is_presentable",
    "is_upstream_variable",
    "matcher_of",
    "role_of",
    "roles_held_by",
]

ENTROPY_BYTES: Final = 32
MAX_PATTERNS: Final = 64

ROLES: Final[tuple[Role, ...]] = get_args(Role)

#: Of the whole text; `/openapi.json` shows them.
OWNER_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}"
NAMES_PATTERN: Final = r"[A-Za-z0-9._:@/*-]{1,128}"
UPSTREAM_VARIABLE_PATTERN: Final = r"WAKECALL_UPSTREAM_[A-Z0-9_]{1,128}"

_OWNER: Final = re.compile(OWNER_PATTERN)
_PRESENTABLE: Final = re.compile(r"[!-~]{1,1024}")
_PATTERN: Final = re.compile(NAMES_PATTERN)
_UPSTREAM_VARIABLE: Final = re.compile(UPSTREAM_VARIABLE_PATTERN)


def roles_held_by(role: Role) -> frozenset[Role]:
    """Whose paths a key of this role opens: its own; an operator may also read what a monitor may, and no more than that."""
    return frozenset({role, "monitor"} if role == "admin" else {role})


def format_key(role: Role, entropy: bytes) -> str:
    """A key of this role.

    Args:
        role: what it is for; stands in it.
        entropy: 32 random bytes.

    Raises:
        ValueError: these are not 32 bytes.
    """
    if len(entropy) != ENTROPY_BYTES:
        raise ValueError(f"a key is made of {ENTROPY_BYTES} random bytes, not {len(entropy)}")
    return f"wakecall_{role}_{base64.b32encode(entropy).decode('ascii').rstrip('=').lower()}"


def digest_of(key: str) -> str:
    """What is kept of a key: its SHA-256, in hexadecimal.

    Args:
        key: whatever a caller presents as one.
    """
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def is_presentable(text: str) -> bool:
    """Whether `text` can be sent as a key, whoever made it: 1 to 1,024 printable ASCII characters without a space."""
    return _PRESENTABLE.fullmatch(text) is not None


def header_for(key: str, url: str) -> dict[str, str]:
    """The header in which a key goes to the broker at `url` (protocol.md, Conventions).

    A user name in the URL is a proxy's: it takes up `Authorization`, so that the key has to come in the other one.

    Args:
        key: as `is_presentable` has it.
        url: what will be called.
    """
    return {"x-api-key": key} if has_credentials(url) else {"authorization": f"Bearer {key}"}


def is_upstream_variable(name: str) -> bool:
    """Whether an environment variable may hold an upstream's key: no other is ever read for one."""
    return _UPSTREAM_VARIABLE.fullmatch(name) is not None


def role_of(key: str) -> Role | None:
    """Which role a key says that it has; None: it is none of ours."""
    return next((role for role in ROLES if key.startswith(f"wakecall_{role}_")), None)


def is_owner(text: str) -> bool:
    """Whether `text` may name an owner: 1 to 128 of `A-Z a-z 0-9 . _ : @ -`, the first a letter or a digit."""
    return _OWNER.fullmatch(text) is not None


def is_pattern(text: str) -> bool:
    """Whether `text` is a pattern of LLMs' names: their characters, and `*` for any number of them, `/` included."""
    return _PATTERN.fullmatch(text) is not None


def matcher_of(patterns: Sequence[str] | None) -> Callable[[str], bool]:
    """Whether a name matches one of `patterns`, case and all; None: every name does.

    Args:
        patterns: each as `is_pattern` takes it.
    """
    if patterns is None:
        return _any_name
    # Greedy stars side by side would try every way to share a name out between them; one says the same.
    each = (re.sub(r"\*+", "*", pattern) for pattern in patterns)
    # `(?>.*?literal)`: the earliest place for a literal is as good as any later one, so there is no way back to try. The
    # last literal has to stand at the end, which one plain star before it finds.
    found = re.compile("|".join(f"(?:{_expression(pattern)})" for pattern in each) or r"(?!)")
    return lambda name: found.fullmatch(name) is not None


def _any_name(name: str) -> bool:
    return True


def _expression(pattern: str) -> str:
    first, *rest = (re.escape(literal) for literal in pattern.split("*"))
    if not rest:
        return first
    *middle, last = rest
    return first + "".join(f"(?>.*?{literal})" for literal in middle) + ".*" + last
