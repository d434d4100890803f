"""`/publisher/v1`: what publishers call."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

import msgspec
import trio
from quart import Quart

from ..broker import Broker
from ..config import BrokerConfig
from ..errors import Forbidden, InvalidRequest, TaskCancelled, TooMany, WakecallError
from ..models import LLMSpec, Status, is_id, is_llm_name
from ..upload import Upload
from .answers import PIECE_BYTES, Answer, StreamBody, json_answer, no_content, stream_answer
from .calls import Call, begin, one_header, read_json, refuse_encoded
from .sse import FramesBody

__all__ = ["add_publisher_routes"]

_SESSION: Final = "/publisher/v1/sessions/<session_id>"
_TASK: Final = "/publisher/v1/tasks/<task_id>"

_STATUS: Final = re.compile(r"[2-5][0-9]{2}")
_OFFSET: Final = re.compile(r"[0-9]{1,18}")
_LONGEST_WAKE_S: Final = 86_400

_Alive = Literal["active", "hibernating"]


class _LLM(msgspec.Struct, frozen=True):
    name: str
    type: str | None = None
    model: str | None = None
    status: _Alive | None = None
    max_concurrency: Annotated[int, msgspec.Meta(ge=1, le=100_000)] | None = None
    wake_s: Annotated[float, msgspec.Meta(gt=0, le=_LONGEST_WAKE_S)] | None = None
    cancel: Literal["abort", "drain"] | None = None
    pool: str | None = None


class _Agent(msgspec.Struct, frozen=True):
    name: str | None = None
    version: str | None = None


class _Register(msgspec.Struct, frozen=True):
    llms: list[_LLM]
    agent: _Agent | None = None


class _Heartbeat(msgspec.Struct, frozen=True):
    llms: dict[str, str] | None = None
    tasks: list[str] | None = None


class _Failure(msgspec.Struct, frozen=True):
    message: str
    code: str | None = None
    status: Annotated[int, msgspec.Meta(ge=400, le=599)] | None = None


def add_publisher_routes(app: Quart, broker: Broker) -> None:
    """Put the routes of publishers into `app`."""
    config = broker.config

    async def register(session_id: str) -> Answer:
        call = begin(broker, "publisher")
        said = await read_json(call, _Register, config.max_body_bytes)
        if len(said.llms) > config.max_llms_per_session:
            raise TooMany(f"A session has at most {config.max_llms_per_session} models.", param="llms")
        agent = said.agent or _Agent()
        for index, llm in enumerate(said.llms):
            if not call.caller.may_use(llm.name):
                raise Forbidden("This key does not publish under this name.", param=f"llms[{index}].name")
        registered = await broker.register(
            session_id,
            [_spec(llm, f"llms[{index}]", config) for index, llm in enumerate(said.llms)],
            owner=call.owner,
            agent_name=_bounded(agent.name, "agent.name", config) or "",
            agent_version=_bounded(agent.version, "agent.version", config) or "",
            key_id=call.caller.key_id,
        )
        return json_answer(registered)

    async def heartbeat(session_id: str) -> Answer:
        call = begin(broker, "publisher")
        said = await read_json(call, _Heartbeat, config.max_body_bytes)
        statuses = {}
        for name, status in (said.llms or {}).items():
            if status not in ("active", "hibernating"):
                # What is no name is not quoted: it may be anything that the peer has.
                param = f"llms.{name}" if is_llm_name(name) else "llms"
                raise InvalidRequest("A status is active or hibernating.", param=param)
            statuses[name] = Status(status)
        tasks = said.tasks or []
        if len(tasks) > config.max_heartbeat_tasks:
            raise TooMany(f"A heartbeat names at most {config.max_heartbeat_tasks} tasks.", param="tasks")
        for index, task_id in enumerate(tasks):
            if not is_id(task_id):
                raise InvalidRequest("This is no task's id.", param=f"tasks[{index}]")
        return json_answer(await broker.heartbeat(session_id, statuses, tasks, owner=call.owner))

    async def goodbye(session_id: str) -> Answer:
        call = begin(broker, "publisher")
        await broker.goodbye(session_id, owner=call.owner)
        return no_content()

    async def frames(session_id: str) -> Answer:
        call = begin(broker, "publisher")
        channel = broker.open_channel_nowait(session_id, owner=call.owner, key_id=call.caller.key_id)
        call.exchange.on_disconnect(channel.disconnect)
        call.exchange.on_progress(channel.note_progress)
        return stream_answer(FramesBody(channel, config.keepalive_s), "text/event-stream")

    async def get_body(task_id: str) -> Answer:
        call = begin(broker, "publisher")
        request = broker.task_request(task_id, owner=call.owner)
        answer = stream_answer(_TaskBody(broker, call, task_id, len(request.body)), request.content_type)
        answer.headers["Content-Length"] = str(len(request.body))
        return answer

    async def post_result(task_id: str) -> Answer:
        call = begin(broker, "publisher")
        await _take(call, _open_upload(broker, call, task_id, final=True))
        return json_answer({"outcome": "completed"})

    async def post_chunk(task_id: str) -> Answer:
        call = begin(broker, "publisher")
        await _take(call, _open_upload(broker, call, task_id, final=False))
        return json_answer({"outcome": "taken"})

    async def post_failure(task_id: str) -> Answer:
        call = begin(broker, "publisher")
        said = await read_json(call, _Failure, config.max_body_bytes)
        broker.fail(
            task_id,
            _shortened(said.message, config.max_message_bytes),
            code=None if said.code is None else _shortened(said.code, config.max_message_bytes),
            status=said.status,
            owner=call.owner,
        )
        return json_answer({"outcome": "failed"})

    app.add_url_rule(_SESSION, "register", register, methods=["PUT"])
    app.add_url_rule(_SESSION, "goodbye", goodbye, methods=["DELETE"])
    app.add_url_rule(f"{_SESSION}/heartbeat", "heartbeat", heartbeat, methods=["POST"])
    app.add_url_rule(f"{_SESSION}/frames", "frames", frames, methods=["GET"])
    for rule in app.url_map.iter_rules("frames"):
        # Werkzeug takes a HEAD for a GET without a body; but opening a channel ends the one before it.
        assert rule.methods is not None
        rule.methods.discard("HEAD")
    app.add_url_rule(f"{_TASK}/body", "task_body", get_body, methods=["GET"])
    app.add_url_rule(f"{_TASK}/result", "task_result", post_result, methods=["POST"])
    app.add_url_rule(f"{_TASK}/chunks", "task_chunks", post_chunk, methods=["POST"])
    app.add_url_rule(f"{_TASK}/failure", "task_failure", post_failure, methods=["POST"])


class _TaskBody(StreamBody):
    """A client's body, piece by piece. Its infer alone holds it: once that is over, nothing is kept, and the rest is cut."""

    def __init__(self, broker: Broker, call: Call, task_id: str, length: int) -> None:
        self._broker = broker
        self._call = call
        self._task_id = task_id
        self._length = length
        self._sent = 0

    async def __anext__(self) -> bytes:
        try:
            body = self._broker.task_request(self._task_id, owner=self._call.owner).body
        except WakecallError:
            if self._sent < self._length:
                self._call.exchange.cut()
            raise StopAsyncIteration from None
        piece = body[self._sent : self._sent + PIECE_BYTES]
        if not piece:
            raise StopAsyncIteration
        self._sent += len(piece)
        return piece

    async def aclose(self) -> None:
        """There is nothing to let go of."""


def _spec(llm: _LLM, where: str, config: BrokerConfig) -> LLMSpec:
    return LLMSpec(
        name=llm.name,
        type=_bounded(llm.type, f"{where}.type", config) or "",
        model=_bounded(llm.model, f"{where}.model", config),
        status=None if llm.status is None else Status(llm.status),
        max_concurrency=llm.max_concurrency,
        wake_s=llm.wake_s,
        cancel=llm.cancel or "abort",
        pool=_bounded(llm.pool, f"{where}.pool", config),
    )


def _bounded(text: str | None, param: str, config: BrokerConfig) -> str | None:
    """Free text that is kept. Raises InvalidRequest: there is too much of it."""
    if text is not None and len(text.encode()) > config.max_message_bytes:
        raise InvalidRequest(f"This text is longer than {config.max_message_bytes} bytes.", param=param)
    return text


def _shortened(text: str, max_bytes: int) -> str:
    """A failure is heard whatever its length: refusing a long message would leave its client waiting."""
    return text.encode()[:max_bytes].decode(errors="ignore")


def _open_upload(broker: Broker, call: Call, task_id: str, *, final: bool) -> Upload:
    """Begin an upload, from its headers. Raises as `Broker.open_upload`, and InvalidRequest, UnsupportedEncoding."""
    refuse_encoded(call)
    status = one_header(call, "Wakecall-Status")
    if status is not None and not _STATUS.fullmatch(status):
        raise InvalidRequest("An engine's status is 200 to 599.", param="Wakecall-Status")
    offset = one_header(call, "Wakecall-Offset")
    if offset is not None and not _OFFSET.fullmatch(offset):
        raise InvalidRequest("An offset is a number of bytes.", param="Wakecall-Offset")
    if offset is None and not final:
        raise InvalidRequest("A piece says where it begins.", param="Wakecall-Offset")
    return broker.open_upload(
        task_id,
        owner=call.owner,
        status=200 if status is None else int(status),
        content_type=call.request.headers.get("content-type"),
        offset=None if offset is None else int(offset),
        final=final,
    )


async def _take(call: Call, upload: Upload) -> None:
    """Pass an upload on as it arrives; it is held back while its client is slow.

    The task may end while nothing arrives: then the wait for the next piece is given up, and the publisher learns why.

    Raises:
        TaskCancelled, TaskAlreadySettled: the task ended before its upload did.
        ClientGone: the publisher broke off.
    """
    with upload:
        waiting = trio.CancelScope()
        upload.on_over(waiting.cancel)
        with waiting:
            async for piece in call.exchange.stream_body():
                await upload.send(piece)
        if waiting.cancelled_caught:
            await upload.send(b"")
            raise TaskCancelled
        await upload.finish()
