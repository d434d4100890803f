"""The APIs behind public rows, over HTTP/1.1.

Each infer is one POST, made once. It goes where an operator's row says and nowhere else: no redirect is followed, no proxy
is taken from the environment, no cookie is kept, TLS is verified. Of the client's request it carries the path, the body and
what the body is, with the row's own id of the model; of the answer come back status, type, body and `Retry-After`.

This works on httpx2's transport, without the client around it: that is where redirects, cookies and the environment are.
"""

from __future__ import annotations

import logging
import os
import re
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Final

import httpx2
import trio

from .addresses import api_base
from .errors import PublisherError
from .keys import is_upstream_variable
from .models import LLM, InferRequest
from .outbound import abandon, describe
from .rewrite import split_at_model

__all__ = ["HttpxUpstream", "open_httpx_upstream"]

logger = logging.getLogger("wakecall.upstream")

_CONNECT_S: Final = 10.0
#: Of all upstreams together: descriptors are bounded, and clients need theirs.
_MAX_CONNECTIONS: Final = 1000
#: Looking for the model's place in more than this would hold up every other stream.
_INLINE_BYTES: Final = 256 * 1024
_PIECE_BYTES: Final = 64 * 1024
_LONGEST_RETRY_S: Final = 86_400
_ANTHROPIC_VERSION: Final = "2023-06-01"
#: What can stand in a header: a key with a line break in it would be quoted by whoever refuses to send it.
_KEY: Final = re.compile(r"[!-~]{1,8192}")

_UNREACHABLE: Final = "The upstream cannot be reached."


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    content_type: str | None
    retry_after_s: int | None
    chunks: AsyncIterator[bytes]


class HttpxUpstream:
    """Made by `open_httpx_upstream`."""

    def __init__(self) -> None:
        self._transport: httpx2.AsyncHTTPTransport | None = None
        self._opening = trio.Lock()
        # One at a time: more would only take the interpreter from the loop, and from each other.
        self._rewriting = trio.CapacityLimiter(1)

    @asynccontextmanager
    async def open_answer(self, llm: LLM, request: InferRequest) -> AsyncIterator[_Answer]:
        """See `hosting.Upstream`."""
        url = api_base(llm.url or "") + request.path
        headers = _headers_for(llm, request)
        parts = await self._parts_of(request, llm.model)
        headers["content-length"] = str(sum(map(len, parts)))
        transport = await self._open_transport()
        host = _host_of(llm)
        try:
            outgoing = httpx2.Request(
                "POST",
                url,
                headers=headers,
                content=_Body(parts),
                # For a slow upstream the deadlines of the infer are there.
                extensions={"timeout": {"connect": _CONNECT_S, "pool": _CONNECT_S, "read": None, "write": None}},
            )
            response = await transport.handle_async_request(outgoing)
        except httpx2.PoolTimeout as error:
            logger.warning(
                "%s: no connection was free in %g s: all %d are in use", llm.name, _CONNECT_S, _MAX_CONNECTIONS
            )
            raise PublisherError("Too many calls of upstreams are under way.", status=503) from error
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.UnsupportedProtocol, httpx2.InvalidURL) as error:
            logger.warning("%s: its upstream at %s cannot be reached (%s)", llm.name, host, describe(error))
            raise PublisherError(_UNREACHABLE) from error
        except httpx2.HTTPError as error:
            logger.warning("%s: its upstream at %s gave no answer (%s)", llm.name, host, describe(error))
            raise PublisherError("The upstream gave no answer.") from error
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        chunks = _Chunks(response.stream, llm.name, host)
        try:
            encoding = response.headers.get("content-encoding", "").strip().lower()
            if encoding not in ("", "identity"):
                logger.warning("%s: its upstream at %s encodes its answers though told not to", llm.name, host)
                raise PublisherError("The upstream encodes its answer though it was asked not to.")
            if response.is_redirect:
                logger.warning("%s: its upstream at %s sends elsewhere, and no redirect is followed", llm.name, host)
            yield _Answer(
                response.status_code,
                response.headers.get("content-type"),
                retry_after_of(response.headers.get("retry-after")),
                chunks,
            )
        finally:
            await chunks.aclose()
            await response.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        transport, self._transport = self._transport, None
        if transport is not None:
            await transport.aclose()

    async def _parts_of(self, request: InferRequest, model: str) -> Sequence[memoryview]:
        split = partial(split_at_model, request.body, request.content_type, model)
        if len(request.body) <= _INLINE_BYTES:
            return split()
        return await trio.to_thread.run_sync(split, limiter=self._rewriting)

    async def _open_transport(self) -> httpx2.AsyncHTTPTransport:
        """The one transport; made when it is first needed, for the list of CAs takes its time."""
        async with self._opening:
            if self._transport is None:
                try:
                    trust = await trio.to_thread.run_sync(httpx2.create_ssl_context)
                except OSError as error:
                    why = (
                        "it holds no certificate" if isinstance(error, ssl.SSLError) else error.strerror or "it failed"
                    )
                    logger.error(
                        "the list of CAs, or what SSL_CERT_FILE or SSL_CERT_DIR names, cannot be used: %s", why
                    )
                    raise PublisherError(_UNREACHABLE) from error
                self._transport = httpx2.AsyncHTTPTransport(
                    verify=trust,
                    trust_env=False,
                    http1=True,
                    http2=False,
                    retries=0,
                    # None is kept: it may be closed by the upstream just as it is used, and nothing is tried twice.
                    limits=httpx2.Limits(max_connections=_MAX_CONNECTIONS, max_keepalive_connections=0),
                )
            return self._transport


@asynccontextmanager
async def open_httpx_upstream() -> AsyncIterator[HttpxUpstream]:
    """What asks the upstreams of public rows, for `open_broker`; open it before the broker, which it has to outlive."""
    upstream = HttpxUpstream()
    try:
        yield upstream
    finally:
        await upstream.aclose()


class _Body:
    """A body in small pieces, so that none of it is there twice. No generator: who leaves it early leaves nothing open."""

    def __init__(self, parts: Sequence[memoryview]) -> None:
        self._pieces = (
            bytes(part[start : start + _PIECE_BYTES]) for part in parts for start in range(0, len(part), _PIECE_BYTES)
        )

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        piece = next(self._pieces, None)
        if piece is None:
            raise StopAsyncIteration
        return piece


class _Chunks:
    """An answer's body, transport errors told as the upstream's. No generator, so that it can be left early."""

    def __init__(self, stream: httpx2.AsyncByteStream, name: str, host: str) -> None:
        self._stream = stream.__aiter__()
        self._name = name
        self._host = host

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await anext(self._stream)
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            logger.warning(
                "%s: its upstream at %s broke off in its answer (%s)", self._name, self._host, describe(error)
            )
            raise PublisherError("The upstream broke off in the middle of its answer.") from error

    async def aclose(self) -> None:
        await abandon(self._stream)


def _headers_for(llm: LLM, request: InferRequest) -> dict[str, str]:
    """All that an upstream is told beside the body. Raises PublisherError: the row's key is not there."""
    headers = {
        "content-type": request.content_type,
        "accept": request.accept or "*/*",
        # What is passed on is the bytes themselves.
        "accept-encoding": "identity",
        "user-agent": "wakecall",
        "via": ", ".join(f"1.1 {each}" for each in request.via),
    }
    anthropic = llm.type.lower() == "anthropic"
    if anthropic:
        headers["anthropic-version"] = request.anthropic_version or _ANTHROPIC_VERSION
    if llm.key_env is not None:
        key = os.environ.get(llm.key_env, "") if is_upstream_variable(llm.key_env) else ""
        if not _KEY.fullmatch(key):
            what = "is not set" if not key else "holds no key: it is of printable ASCII, without spaces"
            logger.error("%s: the environment variable %s for its upstream's key %s", llm.name, llm.key_env, what)
            raise PublisherError("The upstream's key is missing: whoever runs this broker has to set it.")
        if anthropic and request.path == "/v1/messages":
            headers["x-api-key"] = key
        else:
            headers["authorization"] = f"Bearer {key}"
    return headers


def _host_of(llm: LLM) -> str:
    """Where an upstream is, for the log."""
    try:
        return httpx2.URL(llm.url or "").host
    except httpx2.InvalidURL:
        return "an address that is none"


def retry_after_of(value: str | None) -> int | None:
    """Seconds of a `Retry-After` (RFC 9110, 10.2.3), be it a number or a date; None: it says none that can be used."""
    if value is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}", value.strip()):
        return min(int(value), _LONGEST_RETRY_S)
    try:
        at = parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    left = (at if at.tzinfo else at.replace(tzinfo=UTC)) - datetime.now(UTC)
    return int(min(max(left.total_seconds(), 0.0), _LONGEST_RETRY_S))
