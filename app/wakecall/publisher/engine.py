"""The engine: any server with OpenAI's API that this machine can reach."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx2
import msgspec
import trio

from ..addresses import is_loopback, shown
from ..keys import header_for
from ..outbound import abandon, describe
from .config import PublishedModel, PublisherConfig, name_for
from .errors import AmbiguousNames, EngineUnreachable, InvalidConfig
from .trust import trust_for

_DECODABLE = frozenset({"", "identity", "gzip", "deflate"})


class EngineFailed(Exception):
    """The engine gave no answer, or broke off in the middle of one. The message is for the client."""


class EngineRefused(EngineFailed):
    """No connection to the engine: nothing was sent, so that asking again is safe."""


class _Model(msgspec.Struct):
    id: str


class _ModelList(msgspec.Struct):
    data: list[_Model]


def open_client(url: str, *, key: str | None, timeout: httpx2.Timeout, keep: int) -> httpx2.AsyncClient:
    """An HTTP/1.1 client without a bound on its connections: each infer holds one for as long as it runs.

    Args:
        url: what it will talk to.
        key: sent with every request, as `keys.header_for` has it; None: without.
        timeout: for what a request does not say itself.
        keep: idle connections kept for the next request.

    Raises:
        InvalidConfig: `SSL_CERT_FILE` or `SSL_CERT_DIR` names what cannot be read.
    """
    # Not compressed: what is forwarded is the bytes themselves.
    headers = {"accept-encoding": "identity"}
    if key is not None:
        headers |= header_for(key, url)
    return httpx2.AsyncClient(
        http1=True,
        http2=False,
        headers=headers,
        timeout=timeout,
        follow_redirects=False,
        verify=trust_for(url),
        # A proxy from the environment has no business between two processes of one machine.
        trust_env=not is_loopback(urlsplit(url).hostname or ""),
        # Idle connections go before a server's own idle timeout (often 5 s) can race with a request on them.
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=keep, keepalive_expiry=3.0),
    )


@dataclass(frozen=True, slots=True)
class EngineAnswer:
    """The head of an engine's response, and its body as it arrives. `chunks` raises EngineFailed; `length` is the body's, if
    the engine has said it."""

    status: int
    content_type: str | None
    chunks: AsyncIterator[bytes]
    length: int | None = None


class Engine:
    """The engine's address and key over one HTTP client.

    Args:
        config: `engine_url`, `engine_key_env`, `health_path` and the times.
        client: from `open_engine`.
    """

    def __init__(self, config: PublisherConfig, client: httpx2.AsyncClient) -> None:
        self._base = config.engine_base
        self._health_paths = [config.health_path] if config.health_path else ["/health", "/v1/models"]
        self._health_timeout_s = config.health_timeout_s
        self._client = client
        self.where = shown(config.engine_base)

    async def is_healthy(self) -> bool:
        """Whether the engine answers its health question: `/health`, or `/v1/models` if there is no such path.

        llama.cpp and vLLM have `/health` (503 while llama.cpp loads); Ollama has only the list of models.
        """
        for path in self._health_paths:
            try:
                with trio.fail_after(self._health_timeout_s):
                    async with self._client.stream("GET", self._base + path) as response:
                        status = response.status_code
            except (httpx2.HTTPError, trio.TooSlowError):
                return False
            if 200 <= status < 300 or status in (401, 403):
                # Refusing our key is an answer too: the engine is awake, and an infer will say what is wrong.
                return True
            if status not in (404, 405, 501):
                return False
        return False

    async def list_models(self) -> list[str]:
        """The engine's model ids, in its own order (OpenAI reference, "List models").

        Raises:
            EngineUnreachable: no usable answer.
        """
        url = self._base + "/v1/models"
        try:
            response = await self._client.get(url, timeout=httpx2.Timeout(30.0, connect=10.0))
        except httpx2.HTTPError as error:
            raise EngineUnreachable(
                f"the engine at {self.where} does not answer ({describe(error)}); start it, or say which models to "
                "publish by their names"
            ) from error
        if response.status_code != 200:
            raise EngineUnreachable(f"the engine at {self.where} answers {response.status_code} to /v1/models")
        try:
            listed = msgspec.json.decode(response.content, type=_ModelList)
        except msgspec.MsgspecError as error:
            raise EngineUnreachable(f"the engine at {self.where} lists its models in no form that is known") from error
        return [model.id for model in listed.data]

    @asynccontextmanager
    async def open_answer(self, path: str, headers: dict[str, str], body: bytes) -> AsyncIterator[EngineAnswer]:
        """POST a body to the engine; leaving the block early closes the connection, which frees the engine's slot.

        Args:
            path: below the engine's address, such as `/v1/chat/completions`.
            headers: the client's content type and accept.
            body: what goes out, byte for byte.

        Raises:
            EngineRefused: no connection.
            EngineFailed: the connection broke before the head of the answer, or the answer cannot be passed on.
        """
        try:
            request = self._client.build_request("POST", self._base + path, content=body, headers=headers)
            response = await self._client.send(request, stream=True)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise EngineRefused(f"the engine does not accept connections ({describe(error)})") from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise EngineFailed(f"the engine gave no answer ({describe(error)})") from error
        chunks = response.aiter_bytes()
        try:
            encoding = response.headers.get("content-encoding", "").lower()
            if encoding not in _DECODABLE:
                raise EngineFailed("the engine compresses its answer though it was asked not to")
            yield EngineAnswer(
                status=response.status_code,
                content_type=response.headers.get("content-type"),
                chunks=_Body(chunks),
                length=_length_of(response) if encoding in ("", "identity") else None,
            )
        finally:
            await abandon(chunks)
            await response.aclose()


def _length_of(response: httpx2.Response) -> int | None:
    said = response.headers.get("content-length", "")
    return int(said) if said.isascii() and said.isdigit() else None


class _Body:
    """The chunks of a response, transport errors told as the engine's. No generator, so that it can be left early."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        while True:
            try:
                chunk = await anext(self._chunks)
            except (httpx2.HTTPError, httpx2.StreamError) as error:
                raise EngineFailed(f"the engine broke off in the middle of its answer ({describe(error)})") from error
            if chunk:
                return chunk


@asynccontextmanager
async def open_engine(config: PublisherConfig) -> AsyncIterator[Engine]:
    """The engine of a configuration, with a client of its own.

    Raises:
        InvalidConfig: the variable of its key is not set, or that of the CAs names what cannot be read.
    """
    key = config.engine_key()
    # No patience of our own with a slow model: the deadline of each infer bounds it.
    timeout = httpx2.Timeout(None, connect=config.connect_s)
    # A new connection for each request: one that was kept may be closed by the engine just then, and the infer on it
    # could be neither repeated nor blamed on the engine.
    async with open_client(config.engine_url, key=key, timeout=timeout, keep=0) as client:
        yield Engine(config, client)


async def discover_models(engine: Engine) -> tuple[PublishedModel, ...]:
    """Every model that the engine lists, under a name that can be published.

    Raises:
        EngineUnreachable: the engine does not answer, or lists nothing.
        AmbiguousNames: two models come to one name, or one to none.
    """
    models: dict[str, PublishedModel] = {}
    for engine_id in dict.fromkeys(await engine.list_models()):
        try:
            name = name_for(engine_id)
        except InvalidConfig as error:
            raise AmbiguousNames(str(error)) from error
        if name in models:
            raise AmbiguousNames(
                f"the engine's models {models[name].engine_id!r} and {engine_id!r} would both be called {name!r}: "
                "publish them one by one, with names of your own"
            )
        models[name] = PublishedModel(name, engine_id)
    if not models:
        raise EngineUnreachable(f"the engine at {engine.where} lists no model")
    return tuple(models.values())
