"""Whom a client of ours trusts over TLS, and what it says when that went wrong."""

from __future__ import annotations

import os
import ssl
from typing import Final
from urllib.parse import urlsplit

import httpx2

from ..addresses import is_loopback
from .errors import InvalidConfig

__all__ = ["describe_tls", "trust_for"]

# OpenSSL's X509_V_ERR_…: what a person can do something about. The rest comes down to one more word.
_VERDICTS: Final = {
    9: "its certificate is not valid yet, by this machine's clock",
    10: "its certificate has expired",
    62: "its certificate is for another name",
    64: "its certificate is for another address",
}
_NOT_TRUSTED: Final = "its certificate is not trusted here; SSL_CERT_FILE can name the file of its CA"


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


def describe_tls(error: BaseException) -> str | None:
    """Why TLS failed, in a few words and without addresses; None if it is not TLS that did.

    Args:
        error: whatever httpx2 raised.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    if isinstance(cause, ssl.SSLCertVerificationError):
        return _VERDICTS.get(cause.verify_code, _NOT_TRUSTED)
    if cause.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"):
        return "it does not speak TLS; is its address http://?"
    return f"TLS failed ({cause.reason or type(cause).__name__})"
