"""What our HTTP clients share: how a response is left early, and what a transport error is called."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from typing import Any, Final

import httpx2
import trio

__all__ = ["abandon", "describe", "describe_tls"]

# OpenSSL's X509_V_ERR_…: what a person can do something about. The rest comes down to one more word.
_VERDICTS: Final = {
    9: "its certificate is not valid yet, by this machine's clock",
    10: "its certificate has expired",
    62: "its certificate is for another name",
    64: "its certificate is for another address",
}
_NOT_TRUSTED: Final = "its certificate is not trusted here; SSL_CERT_FILE can name the file of its CA"


async def abandon(stream: AsyncIterator[bytes]) -> None:
    """Stop reading a response's body before its end, closing its connection.

    httpx2 nests generators and closes only the outermost. A cancellation at the innermost read unwinds them all.
    """
    with trio.CancelScope() as scope:
        scope.cancel()
        try:
            while True:
                await anext(stream)
        except (StopAsyncIteration, httpx2.HTTPError, httpx2.StreamError):
            return


def describe(error: Exception) -> str:
    """A transport error in a few words, without addresses that the client should not see."""
    words: dict[type[Any], str] = {
        httpx2.ConnectTimeout: "connecting timed out",
        httpx2.ConnectError: "connection refused or host not found",
        httpx2.TimeoutException: "timed out",
        httpx2.RemoteProtocolError: "the connection ended too early",
        httpx2.NetworkError: "the connection broke",
    }
    if (tls := describe_tls(error)) is not None:
        return tls
    return next((text for kind, text in words.items() if isinstance(error, kind)), type(error).__name__)


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
