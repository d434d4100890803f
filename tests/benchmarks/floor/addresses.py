"""What can be told of an address without asking anybody."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

__all__ = ["api_base", "has_credentials", "is_loopback", "shown"]


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine and nobody else can be there: a loopback address, or `localhost`.

    Args:
        host: a name (RFC 6761, 6.3: all below `localhost` count) or an IPv4 or IPv6 address, brackets and zone allowed.
    """
    name = host.strip("[]").partition("%")[0].lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def has_credentials(url: str) -> bool:
    """Whether a user name or a password stands in `url`: an HTTP client sends them as `Authorization: Basic`."""
    return "@" in urlsplit(url).netloc


def api_base(url: str) -> str:
    """What a path that begins with `/v1` is put behind, given where an OpenAI-compatible API is, with or without `/v1`."""
    base = url.rstrip("/")
    return base[: -len("/v1")] if base.endswith("/v1") else base


def shown(url: str) -> str:
    """`url` without user name and password, fit for a message or a file."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
