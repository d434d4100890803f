"""`/publisher/v1`: what publishers call."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Final, Literal, get_args

import msgspec
import trio

from ..broker import Broker
from ..config import BrokerConfig
from ..errors import (
    Forbidden,
    InvalidRequest,
    LLMIsPublic,
    LLMNameTaken,
    ModelNotFound,
    OffsetGap,
    ResultInProgress,
    SessionNotFound,
    SessionTaken,
    ShuttingDown,
    StoreUnavailable,
    TaskAlreadySettled,
    TaskCancelled,
    TaskNotFound,
    TooMany,
    UnsupportedEncoding,
    WakecallError,
)
from ..models import LLM, HeartbeatReply, LLMSpec, Registered, Status, is_id, is_llm_name
from ..upload import Upload
from .answers import PIECE_BYTES, Answer, StreamBody, json_answer, no_content, stream_answer
from .calls import Call, refuse_encoded
from .routes import Header, Media, Routes
from .shown import Id, Name
from .sse import FramesBody

__all__ = ["add_publisher_routes"]

_SESSION: Final = "/publisher/v1/sessions/<session_id>"
_TASK: Final = "/publisher/v1/tasks/<task_id>"

_STATUS: Final = Header(
    "Wakecall-Status",
    "[2-5][0-9]{2}",
    "An engine's status is 200 to 599.",
    "The engine's status; 200 when left out. Counts at offset 0.",
)
_OFFSET_IN_RESULT: Final = Header(
    "Wakecall-Offset",
    "[0-9]{1,18}",
    "An offset is a number of bytes.",
    "How many bytes of the answer come before this piece. Required where there were pieces before.",
)
_OFFSET: Final = replace(_OFFSET_IN_RESULT, is_required=True, refusal="A piece says where it begins, in bytes.")
_LONGEST_S: Final = 86_400

_Alive = Literal["active", "hibernating"]
_Budget = Annotated[float, msgspec.Meta(gt=0, le=_LONGEST_S)]


class OfferedLLM(msgspec.Struct, frozen=True):
    """One row of a register."""

    name: Annotated[str, Name]
    type: str | None = None
    model: str | None = None
    status: _Alive | None = None
    max_concurrency: Annotated[int, msgspec.Meta(ge=1, le=100_000)] | None = None
    wake_s: _Budget | None = None
    cancel: Literal["abort", "drain"] | None = None
    pool: Annotated[str, Name] | None = None
    group: Annotated[str, Name] | None = None
    queue_s: _Budget | None = None
    first_byte_s: _Budget | None = None
    idle_s: _Budget | None = None
    total_s: _Budget | None = None


class RegisteringAgent(msgspec.Struct, frozen=True):
    """What a publisher calls itself."""

    name: str | None = None
    version: str | None = None


class Register(msgspec.Struct, frozen=True):
    """All rows of a session; no name twice."""

    llms: list[OfferedLLM]
    agent: RegisteringAgent | None = None


# Told apart by hand, so that an error names the row.
_AliveText = Annotated[str, msgspec.Meta(extra_json_schema={"enum": list(get_args(_Alive))})]


class Heartbeat(msgspec.Struct, frozen=True):
    """Rows and tasks, as their publisher sees them."""

    llms: dict[str, _AliveText] | None = None
    tasks: list[Annotated[str, Id]] | None = None


class Which(msgspec.Struct, frozen=True):
    """Some rows of a session; left out: all that it has now."""

    llms: list[Annotated[str, Name]] | None = None


class Pausable(msgspec.Struct, frozen=True):
    """A row's status, and whether its publisher has paused it: the one says nothing of the other."""

    status: Status
    paused: bool


class Paused(msgspec.Struct, frozen=True):
    """All rows of the session."""

    llms: dict[str, Pausable]


class Failure(msgspec.Struct, frozen=True):
    """What went wrong with a task."""

    message: str
    code: str | None = None
    status: Annotated[int, msgspec.Meta(ge=400, le=599)] | None = None


class Completed(msgspec.Struct, frozen=True):
    """The whole answer is in the broker."""

    outcome: Literal["completed"] = "completed"


class Taken(msgspec.Struct, frozen=True):
    """This piece is in the broker."""

    outcome: Literal["taken"] = "taken"


class Failed(msgspec.Struct, frozen=True):
    """The task has failed."""

    outcome: Literal["failed"] = "failed"


_FRAMES: Final = Media(
    "The channel: one event for each frame (`hello`, `infer`, `wake`, `cancel`, `results`, `bye`), its data one line of "
    "JSON; comments between them. It stays open.",
    {"text/event-stream": str},
)
_ENGINES_BODY: Final = Media("The engine's body, byte for byte, with its own Content-Type.", {"*/*": None})
_CLIENTS_BODY: Final = Media("The client's body, byte for byte, with its own Content-Type.", {"*/*": None})

_TASK_OVER: Final = (TaskNotFound, TaskAlreadySettled, TaskCancelled)
_UPLOAD: Final = (*_TASK_OVER, InvalidRequest, UnsupportedEncoding, ResultInProgress, OffsetGap, StoreUnavailable)


def add_publisher_routes(routes: Routes, broker: Broker) -> None:
    """Put the routes of publishers there."""
    config = broker.config

    @routes.add(
        "PUT",
        _SESSION,
        role="publisher",
        body=Register,
        answer=Registered,
        errors=(LLMNameTaken, LLMIsPublic, SessionTaken, ShuttingDown, StoreUnavailable),
    )
    async def register(call: Call, session_id: str, said: Register) -> Answer:
        """Register a session and all its rows: those left out are withdrawn."""
        if len(said.llms) > config.max_llms_per_session:
            raise TooMany(f"A session has at most {config.max_llms_per_session} models.", param="llms")
        agent = said.agent or RegisteringAgent()
        for index, llm in enumerate(said.llms):
            # (What is no name at all is the broker's to refuse.)
            if is_llm_name(llm.name) and not call.caller.may_use(llm.name):
                raise Forbidden("This key does not publish under this name.", param=f"llms[{index}].name")
            # A pool is a name that clients call, too.
            if llm.pool is not None and is_llm_name(llm.pool) and not call.caller.may_use(llm.pool):
                raise Forbidden("This key does not publish under this name.", param=f"llms[{index}].pool")
        registered = await broker.register(
            session_id,
            [_spec(llm, f"llms[{index}]", config) for index, llm in enumerate(said.llms)],
            owner=call.owner,
            agent_name=_bounded(agent.name, "agent.name", config) or "",
            agent_version=_bounded(agent.version, "agent.version", config) or "",
            key_id=call.caller.key_id,
        )
        return json_answer(registered)

    @routes.add(
        "POST",
        f"{_SESSION}/heartbeat",
        role="publisher",
        is_hot=True,
        body=Heartbeat,
        answer=HeartbeatReply,
        errors=(SessionNotFound, StoreUnavailable),
    )
    async def heartbeat(call: Call, session_id: str, said: Heartbeat) -> Answer:
        """Say that a session is alive."""
        statuses = {}
        for name, status in (said.llms or {}).items():
            if status not in get_args(_Alive):
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

    @routes.add(
        "POST",
        f"{_SESSION}/pause",
        role="publisher",
        body=Which,
        answer=Paused,
        errors=(SessionNotFound, ModelNotFound, StoreUnavailable),
    )
    async def pause_session(call: Call, session_id: str, said: Which) -> Answer:
        """Keep new infers from a session's rows until they are resumed."""
        return _paused(await broker.pause_session(session_id, said.llms, owner=call.owner))

    @routes.add(
        "POST",
        f"{_SESSION}/resume",
        role="publisher",
        body=Which,
        answer=Paused,
        errors=(SessionNotFound, ModelNotFound, StoreUnavailable),
    )
    async def resume_session(call: Call, session_id: str, said: Which) -> Answer:
        """Let a session's rows take infers again."""
        return _paused(await broker.resume_session(session_id, said.llms, owner=call.owner))

    @routes.add("DELETE", _SESSION, role="publisher", answer=None, errors=(SessionNotFound, StoreUnavailable))
    async def goodbye(call: Call, session_id: str) -> Answer:
        """End a session."""
        await broker.goodbye(session_id, owner=call.owner)
        return no_content()

    # A HEAD would be taken for a GET without a body; but opening a channel ends the one before it.
    @routes.add(
        "GET",
        f"{_SESSION}/frames",
        role="publisher",
        answer=_FRAMES,
        errors=(SessionNotFound, ShuttingDown),
        has_head=False,
        is_hot=True,
    )
    async def frames(call: Call, session_id: str) -> Answer:
        """Open the session's control channel."""
        key_id = call.caller.key_id
        channel = broker.open_channel_nowait(session_id, owner=call.owner, key_id=key_id, needs_open=key_id is None)
        call.exchange.on_disconnect(channel.disconnect)
        call.exchange.on_progress(channel.note_progress)
        return stream_answer(FramesBody(channel, config.keepalive_s), "text/event-stream")

    @routes.add("GET", f"{_TASK}/body", role="publisher", answer=_CLIENTS_BODY, errors=_TASK_OVER)
    async def task_body(call: Call, task_id: str) -> Answer:
        """Fetch the body of an infer whose frame came without it."""
        request = broker.task_request(task_id, owner=call.owner)
        answer = stream_answer(_TaskBody(broker, call, task_id, len(request.body)), request.content_type)
        answer.headers["Content-Length"] = str(len(request.body))
        return answer

    @routes.add(
        "POST",
        f"{_TASK}/result",
        role="publisher",
        is_hot=True,
        headers=(_STATUS, _OFFSET_IN_RESULT),
        body=_ENGINES_BODY,
        answer=Completed,
        errors=_UPLOAD,
    )
    async def task_result(call: Call, task_id: str) -> Answer:
        """Answer a task: with the engine's response, or for a wake with anything."""
        await _take(call, _open_upload(broker, call, task_id, final=True))
        return json_answer(Completed())

    @routes.add(
        "POST",
        f"{_TASK}/chunks",
        role="publisher",
        is_hot=True,
        headers=(_STATUS, _OFFSET),
        body=_ENGINES_BODY,
        answer=Taken,
        errors=_UPLOAD,
    )
    async def task_chunks(call: Call, task_id: str) -> Answer:
        """Give a piece of the engine's response."""
        await _take(call, _open_upload(broker, call, task_id, final=False))
        return json_answer(Taken())

    @routes.add(
        "POST",
        f"{_TASK}/failure",
        role="publisher",
        body=Failure,
        answer=Failed,
        errors=_TASK_OVER,
    )
    async def task_failure(call: Call, task_id: str, said: Failure) -> Answer:
        """Say that a task has failed."""
        broker.fail(
            task_id,
            _shortened(said.message, config.max_message_bytes),
            code=None if said.code is None else _shortened(said.code, config.max_message_bytes),
            status=said.status,
            owner=call.owner,
        )
        return json_answer(Failed())

    @routes.add("POST", f"{_TASK}/cancelled", role="publisher", answer=None, errors=(TaskNotFound,))
    async def task_cancelled(call: Call, task_id: str) -> Answer:
        """Say that the engine has stopped working on a task that was cancelled."""
        broker.confirm_cancelled(task_id, owner=call.owner)
        return no_content()


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


def _spec(llm: OfferedLLM, where: str, config: BrokerConfig) -> LLMSpec:
    return LLMSpec(
        name=llm.name,
        type=_bounded(llm.type, f"{where}.type", config) or "",
        model=_bounded(llm.model, f"{where}.model", config),
        status=None if llm.status is None else Status(llm.status),
        max_concurrency=llm.max_concurrency,
        wake_s=llm.wake_s,
        cancel=llm.cancel or "abort",
        pool=llm.pool,
        group=llm.group,
        queue_s=llm.queue_s,
        first_byte_s=llm.first_byte_s,
        idle_s=llm.idle_s,
        total_s=llm.total_s,
    )


def _paused(rows: dict[str, LLM]) -> Answer:
    return json_answer(Paused({name: Pausable(llm.status, llm.paused) for name, llm in rows.items()}))


def _bounded(text: str | None, param: str, config: BrokerConfig) -> str | None:
    """Free text that is kept. Raises InvalidRequest: there is too much of it."""
    if text is not None and len(text.encode()) > config.max_text_bytes:
        raise InvalidRequest(f"This text is longer than {config.max_text_bytes} bytes.", param=param)
    return text


def _shortened(text: str, max_bytes: int) -> str:
    """A failure is heard whatever its length: refusing a long message would leave its client waiting."""
    return text.encode()[:max_bytes].decode(errors="ignore")


def _open_upload(broker: Broker, call: Call, task_id: str, *, final: bool) -> Upload:
    """Begin an upload, from its headers. Raises as `Broker.open_upload`, and InvalidRequest, UnsupportedEncoding."""
    refuse_encoded(call)
    status = _STATUS.read(call)
    offset = (_OFFSET_IN_RESULT if final else _OFFSET).read(call)
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
