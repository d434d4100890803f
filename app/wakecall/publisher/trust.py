"""Whom a client of ours trusts over TLS."""

from __future__ import annotations

import os
import ssl
from urllib.parse import urlsplit

import httpx2

from ..addresses import is_loopback
from .errors import InvalidConfig

__all__ = ["trust_for"]


def trust_for(url: str) -> ssl.SSLContext | bool:
    """What httpx2's `verify` has to be for `url`: the machine's list of CAs, or that of `SSL_CERT_FILE` or `SSL_CERT_DIR`.

    httpx2 reads the two variables as well, but not where it is kept from the environment, as it is on loopback.

    Raises:
        InvalidConfig: the variable names what cannot be read.
    """
    parts = urlsplit(url)
    if parts.scheme != "https" and is_loopback(parts.hostname or ""):
        return True  # no TLS will be spoken
    try:
        return httpx2.create_ssl_context()
    except OSError as error:
        # ssl.SSLError is one of them; only these files can be at fault, or the machine's own list.
        why = "it holds no certificate" if isinstance(error, ssl.SSLError) else error.strerror or "it failed"
        name = next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), None)
        whose = f"{name} names {os.environ[name]}, which" if name else "this machine's list of CAs"
        raise InvalidConfig(f"{whose} cannot be used: {why}") from error
