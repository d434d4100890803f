"""The broker, as the wire protocol has it: one method for each request, one struct for each frame."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeAlias, TypeVar
from urllib.parse import quote

import httpx2
import msgspec
import trio

from ..outbound import abandon, describe
from .config import AnnouncedStatus, PublisherConfig
from .engine import open_client
from .events import RegisteredModel
from .sse import EventStreamParser, ServerSentEvent

MAX_BODY_BYTES = 256 * 1024 * 1024
MAX_ANSWER_BYTES = 4 * 1024 * 1024
AGENT_NAME = "wakecall"
_T = TypeVar("_T")


def sayable(content_type: str | None) -> str | None:
    """An engine's content type if it can be passed on. One that is not printable ASCII means nothing to anybody, and the
    answer is worth more than it."""
    if content_type is None or not (content_type.isascii() and content_type.isprintable()):
        return None
    return content_type


class BrokerError(Exception):
    """A request to the broker did not succeed."""


class BrokerLost(BrokerError):
    """The connection could not be made or broke; whether the broker took the request is not known."""


class BrokerRefused(BrokerError):
    """The broker answered with an error.

    Args:
        status: of the response.
        code: the stable code of the protocol, empty if the answer is not in its form (a proxy's, say).
        message: for people.
        param: the member of the request at fault, such as `llms[0].name`; empty if it is none.
    """

    def __init__(self, status: int, code: str, message: str, param: str = "") -> None:
        super().__init__(f"{message} ({status} {code})" if code else f"{message} ({status})")
        self.status = status
        self.code = code
        self.message = message
        self.param = param

    @property
    def is_over(self) -> bool:
        """404, 409 and 410 are one to a publisher: the task is over, stop the engine and forget it."""
        return self.status in (404, 409, 410)


class Row(msgspec.Struct, frozen=True, omit_defaults=True):
    """One entry of a register."""

    name: str
    type: str | None = None
    model: str | None = None
    status: AnnouncedStatus | None = None
    max_concurrency: int | None = None
    wake_s: float | None = None
    cancel: str | None = None
    pool: str | None = None
    group: str | None = None
    queue_s: float | None = None
    first_byte_s: float | None = None
    idle_s: float | None = None
    total_s: float | None = None


class Registration(msgspec.Struct, frozen=True):
    session_id: str
    heartbeat_interval_s: float
    llms: tuple[RegisteredModel, ...]


class HeartbeatAnswer(msgspec.Struct, frozen=True):
    llms: dict[str, str] = {}
    drop: list[str] = []


class Hello(msgspec.Struct, frozen=True):
    epoch: int
    heartbeat_interval_s: float = 30.0
    keepalive_s: float = 15.0
    features: list[str] = []


class Infer(msgspec.Struct, frozen=True):
    """One infer. `body` is None when it has to be fetched."""

    task_id: str
    llm: str
    path: str
    deadline_s: float
    model: str = ""
    method: str = "POST"
    headers: dict[str, str] = {}
    stream: bool = False
    body: str | None = None


class Wake(msgspec.Struct, frozen=True):
    task_id: str
    llm: str
    deadline_s: float
    hibernate: list[str] = []


class Cancel(msgspec.Struct, frozen=True):
    task_id: str
    reason: str = ""


class Results(msgspec.Struct, frozen=True):
    """So many records of the shared upload have been taken."""

    taken: int


class Bye(msgspec.Struct, frozen=True):
    reason: str = ""


Frame: TypeAlias = Hello | Infer | Wake | Cancel | Results | Bye
_FRAMES: dict[str, type[Frame]] = {
    "hello": Hello,
    "infer": Infer,
    "wake": Wake,
    "cancel": Cancel,
    "results": Results,
    "bye": Bye,
}


class BadFrame(BrokerError):
    """A frame that is known but not in the protocol's form."""


def decode_frame(event: ServerSentEvent) -> Frame | None:
    """The frame in an event; None for an event that this version does not know.

    Raises:
        BadFrame: its data is not what the protocol says.
    """
    kind = _FRAMES.get(event.event)
    if kind is None:
        return None
    try:
        frame: Frame = msgspec.json.decode(event.data, type=kind)
    except (msgspec.MsgspecError, UnicodeEncodeError) as error:
        raise BadFrame(f"a malformed {event.event} frame") from error
    return frame


class _ErrorDetail(msgspec.Struct):
    message: str = ""
    code: str | None = None
    param: str | None = None


class _ErrorBody(msgspec.Struct):
    error: _ErrorDetail


class FrameStream:
    """One open control channel. Leave it by cancelling: see `abandon`."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._parser = EventStreamParser()

    async def receive(self) -> list[Frame] | None:
        """The frames that the next bytes complete, maybe none (a comment keeps the channel alive); None at the end.

        Raises:
            BrokerLost: the connection broke.
            BadFrame, EventTooLarge: what came is not the protocol.
        """
        try:
            chunk = await anext(self._chunks)
        except StopAsyncIteration:
            return None
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            raise BrokerLost(describe(error)) from error
        frames = (decode_frame(event) for event in self._parser.feed(chunk))
        return [frame for frame in frames if frame is not None]


class BrokerClient:
    """The broker's address, the key and the session over one HTTP client; see `open_broker_client`."""

    def __init__(self, config: PublisherConfig, session_id: str, client: httpx2.AsyncClient) -> None:
        self._base = f"{config.broker_base}/publisher/v1"
        self._session = f"{self._base}/sessions/{session_id}"
        self._client = client
        self._short = httpx2.Timeout(config.request_s, connect=config.connect_s)
        # An upload is held back for as long as the client is slow: the task's deadline and its channel bound it.
        self._patient = httpx2.Timeout(None, connect=config.connect_s)
        # A publisher has at most one PUT, heartbeat, DELETE or wake result under way, in the order they were asked for.
        self.in_order = trio.Lock()

    async def register(self, rows: Sequence[Row], version: str) -> Registration:
        """PUT the session with its rows. The caller holds `in_order`, for this and the next two."""
        content = msgspec.json.encode({"llms": rows, "agent": {"name": AGENT_NAME, "version": version}})
        answer = await self._send("PUT", self._session, content=content, content_type="application/json")
        return _decode(answer, Registration)

    async def heartbeat(self, statuses: Mapping[str, AnnouncedStatus], tasks: Sequence[str]) -> HeartbeatAnswer:
        """POST a heartbeat; empty `statuses` name none."""
        members: dict[str, Any] = {"tasks": tasks} if tasks else {}
        if statuses:
            members["llms"] = statuses
        url = f"{self._session}/heartbeat"
        content = msgspec.json.encode(members)
        return _decode(await self._send("POST", url, content=content, content_type="application/json"), HeartbeatAnswer)

    async def goodbye(self) -> None:
        """DELETE the session."""
        await self._send("DELETE", self._session)

    @asynccontextmanager
    async def open_frames(self) -> AsyncIterator[FrameStream]:
        """GET the control channel.

        Raises:
            BrokerLost, BrokerRefused: there is none.
        """
        request = self._client.build_request(
            "GET",
            f"{self._session}/frames",
            headers={"accept": "text/event-stream", "cache-control": "no-store"},
            timeout=self._patient,
        )
        response = await self._open(request)
        chunks = response.aiter_bytes()
        try:
            if response.status_code != 200:
                await self._raise_refusal(response)
            yield FrameStream(chunks)
        finally:
            await abandon(chunks)
            await response.aclose()

    async def fetch_body(self, task_id: str) -> tuple[bytes, str | None]:
        """GET the client's body, and its content type."""
        request = self._client.build_request("GET", self._task(task_id, "body"), timeout=self._short)
        response = await self._open(request)
        try:
            if response.status_code != 200:
                await self._raise_refusal(response)
            return await _read(response, MAX_BODY_BYTES), response.headers.get("content-type")
        finally:
            await response.aclose()

    async def send_result(
        self,
        task_id: str,
        content: bytes | AsyncIterable[bytes],
        *,
        status: int = 200,
        content_type: str | None = None,
        offset: int | None = None,
    ) -> None:
        """POST the engine's response; an iterable is sent piece by piece as it yields.

        Args:
            task_id: of the infer or wake.
            content: the engine's body, or what is left of it after `offset`.
            status, content_type: the engine's.
            offset: bytes sent as chunks before; None without chunks.
        """
        await self._upload("result", task_id, content, status, content_type, offset)

    async def send_chunk(
        self, task_id: str, content: bytes, *, status: int, content_type: str | None, offset: int
    ) -> None:
        """POST one piece of the engine's response that begins `offset` bytes into it."""
        await self._upload("chunks", task_id, content, status, content_type, offset)

    async def send_results(self, records: AsyncIterable[bytes]) -> None:
        """POST the shared upload, as its records come; the broker answers once they or the channel have ended."""
        request = self._client.build_request(
            "POST",
            f"{self._session}/results",
            content=records,
            headers={"content-type": "application/octet-stream"},
            timeout=self._patient,
        )
        await self._finish(await self._open(request))

    async def send_failure(self, task_id: str, message: str, status: int | None = None) -> None:
        """POST that the task failed here; `message` reaches the client."""
        members: dict[str, Any] = {"message": message}
        if status is not None:
            members["status"] = status
        content = msgspec.json.encode(members)
        await self._send("POST", self._task(task_id, "failure"), content=content, content_type="application/json")

    async def confirm_cancelled(self, task_id: str) -> None:
        """POST that nothing here works any more on a task that the broker has cancelled."""
        await self._send("POST", self._task(task_id, "cancelled"))

    async def _upload(
        self,
        kind: Literal["result", "chunks"],
        task_id: str,
        content: bytes | AsyncIterable[bytes],
        status: int,
        content_type: str | None,
        offset: int | None,
    ) -> None:
        headers = {"wakecall-status": str(status)}
        if (content_type := sayable(content_type)) is not None:
            headers["content-type"] = content_type
        if offset is not None:
            headers["wakecall-offset"] = str(offset)
        if content == b"":
            headers["content-length"] = "0"
        url = self._task(task_id, kind)
        request = self._client.build_request("POST", url, content=content, headers=headers, timeout=self._patient)
        await self._finish(await self._open(request))

    async def _send(
        self, method: str, url: str, *, content: bytes | None = None, content_type: str | None = None
    ) -> bytes:
        headers = {"content-type": content_type} if content_type else {}
        request = self._client.build_request(method, url, content=content, headers=headers, timeout=self._short)
        return await self._finish(await self._open(request))

    async def _open(self, request: httpx2.Request) -> httpx2.Response:
        try:
            return await self._client.send(request, stream=True)
        except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError) as error:
            raise BrokerLost(describe(error)) from error

    async def _finish(self, response: httpx2.Response) -> bytes:
        try:
            if not 200 <= response.status_code < 300:
                await self._raise_refusal(response)
            return await _read(response, MAX_ANSWER_BYTES)
        finally:
            await response.aclose()

    async def _raise_refusal(self, response: httpx2.Response) -> None:
        content = await _read(response, MAX_ANSWER_BYTES)
        try:
            detail = msgspec.json.decode(content, type=_ErrorBody).error
        except (msgspec.MsgspecError, UnicodeDecodeError):
            detail = _ErrorDetail()
        message = detail.message[:1024] or f"the broker answers {response.status_code}"
        raise BrokerRefused(response.status_code, detail.code or "", message, detail.param or "")

    def _task(self, task_id: str, what: str) -> str:
        return f"{self._base}/tasks/{quote(task_id, safe='')}/{what}"


async def _read(response: httpx2.Response, at_most: int) -> bytes:
    """The whole of a response's body, which ends as BrokerLost when it is larger than `at_most` bytes."""
    content = bytearray()
    chunks = response.aiter_bytes()
    try:
        async for chunk in chunks:
            content += chunk
            if len(content) > at_most:
                await abandon(chunks)
                raise BrokerLost(f"an answer of more than {at_most} bytes")
    except (httpx2.HTTPError, httpx2.StreamError) as error:
        raise BrokerLost(describe(error)) from error
    return bytes(content)


def _decode(answer: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(answer, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BrokerLost("an answer that is not the protocol's; is this a Wakecall broker?") from error


@asynccontextmanager
async def open_broker_client(config: PublisherConfig, session_id: str) -> AsyncIterator[BrokerClient]:
    """The broker of a configuration, with a client of its own. Raises InvalidConfig: see `open_client`."""
    timeout = httpx2.Timeout(config.request_s, connect=config.connect_s)
    async with open_client(config.broker_url, key=config.broker_key, timeout=timeout, keep=64) as client:
        yield BrokerClient(config, session_id, client)
