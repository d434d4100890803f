"""A publisher in the broker's own process: the same session, channel and tasks as any other, without a wire."""

from __future__ import annotations

import inspect
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from .errors import SessionNotFound, ShuttingDown, StoreUnavailable, TaskOver
from .frames import Frame
from .models import InferRequest, LLMSpec

if TYPE_CHECKING:
    from .broker import Broker
    from .session import Channel

__all__ = ["Handler", "InferReply", "WakeHandler", "publish"]

logger = logging.getLogger("wakecall.local")


@dataclass(frozen=True, slots=True)
class InferReply:
    """A handler's answer where status or media type matter.

    Args:
        body: all of it, or its pieces as they come.
        status: as an engine's, 200 to 599.
        content_type: its media type.
    """

    body: bytes | AsyncIterator[bytes]
    status: int = 200
    content_type: str = "application/json"


Handler = Callable[[InferRequest], Awaitable[bytes | AsyncIterator[bytes] | InferReply] | AsyncIterator[bytes]]
WakeHandler = Callable[[], Awaitable[None]]


@asynccontextmanager
async def publish(broker: Broker, spec: LLMSpec, handler: Handler, on_wake: WakeHandler | None) -> AsyncIterator[None]:
    """See `Broker.publish`."""
    publisher = _LocalPublisher(broker, f"local-{secrets.token_urlsafe(16)}", spec, handler, on_wake)
    await broker.register(publisher.session_id, [spec], agent_name="wakecall.local")
    body_error: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(publisher.run)
            nursery.start_soon(publisher.run_heartbeat)
            try:
                yield
            except Exception as error:
                body_error = error  # raised as it is, outside the nursery
            nursery.cancel_scope.cancel()
    finally:
        try:
            with trio.CancelScope(shield=True):  # one commit, bounded by the store's own limits
                await broker.goodbye(publisher.session_id)
        except (SessionNotFound, StoreUnavailable):
            pass  # it was evicted, or the journal repeats it
    if body_error is not None:
        raise body_error


class _LocalPublisher:
    def __init__(
        self, broker: Broker, session_id: str, spec: LLMSpec, handler: Handler, on_wake: WakeHandler | None
    ) -> None:
        self.session_id = session_id
        self._broker = broker
        self._spec = spec
        self._handler = handler
        self._on_wake = on_wake
        self._scopes: dict[str, trio.CancelScope] = {}

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """Hold a channel, and open another when it ends (it may be superseded by nobody, but may go stale)."""
        while True:
            try:
                async with self._broker.open_channel(self.session_id) as channel, trio.open_nursery() as nursery:
                    reason = await self._serve(channel, nursery, task_status)
                    nursery.cancel_scope.cancel()
            except SessionNotFound:
                await self._broker.register(self.session_id, [self._spec], agent_name="wakecall.local")
                continue
            except ShuttingDown:
                return
            task_status = trio.TASK_STATUS_IGNORED
            if reason != "stale":
                return

    async def run_heartbeat(self) -> None:
        while True:
            await trio.sleep(self._broker.config.heartbeat_interval_s)
            try:
                await self._broker.heartbeat(self.session_id, tasks=list(self._scopes))
            except (SessionNotFound, StoreUnavailable):
                pass  # evicted; or it counts all the same

    async def _serve(self, channel: Channel, nursery: trio.Nursery, task_status: trio.TaskStatus[None]) -> str:
        async for frame in channel:
            match frame.event:
                case "hello":
                    task_status.started()
                case "infer":
                    self._start(nursery, self._infer, frame)
                case "wake":
                    self._start(nursery, self._wake, frame)
                case "cancel":
                    if (scope := self._scopes.get(frame.data["task_id"])) is not None:
                        scope.cancel()
                case "bye":
                    return str(frame.data["reason"])
        return "disconnected"

    def _start(self, nursery: trio.Nursery, work: Callable[[str], Awaitable[None]], frame: Frame) -> None:
        task_id = frame.data["task_id"]
        self._scopes[task_id] = trio.CancelScope()
        nursery.start_soon(self._supervise, task_id, work)

    async def _supervise(self, task_id: str, work: Callable[[str], Awaitable[None]]) -> None:
        try:
            with self._scopes[task_id]:
                await work(task_id)
        except TaskOver:
            pass  # its caller left while we answered
        except Exception as error:
            if work == self._wake:
                self._fail(task_id, str(error) or type(error).__name__)
            else:
                logger.exception("the handler of %s failed", self._spec.name)
                self._fail(task_id, f"The model's handler raised {type(error).__name__}.")
        finally:
            del self._scopes[task_id]

    def _fail(self, task_id: str, message: str) -> None:
        try:
            self._broker.fail(task_id, message[: self._broker.config.max_message_bytes])
        except TaskOver:
            pass

    async def _wake(self, task_id: str) -> None:
        if self._on_wake is not None:
            await self._on_wake()
        try:
            await self._broker.complete(task_id)
        except StoreUnavailable:
            pass  # it counts all the same

    async def _infer(self, task_id: str) -> None:
        request = self._broker.task_request(task_id)
        result: Any = self._handler(request)
        if inspect.isawaitable(result):
            result = await result
        if not isinstance(result, InferReply):
            streamed = request.stream and not isinstance(result, bytes)
            result = InferReply(result, content_type="text/event-stream" if streamed else "application/json")
        with self._broker.open_upload(task_id, status=result.status, content_type=result.content_type) as upload:
            if isinstance(result.body, bytes):
                await upload.send(result.body)
            else:
                async for piece in result.body:
                    await upload.send(piece)
            await upload.finish()
