"""A publisher in the broker's own process: the same session, channel and tasks as any other, without a wire."""

from __future__ import annotations

import inspect
import logging
import secrets
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from .errors import SessionNotFound, ShuttingDown, StoreUnavailable, TaskOver
from .frames import Frame
from .models import LOCAL_OWNER, InferRequest, LLMSpec

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
    body_error: Exception | None = None
    try:
        # In here, because it is registered even where its commit fails or is not waited for to the end.
        await broker.register(publisher.session_id, [spec], agent_name="wakecall.local")
        async with trio.open_nursery() as nursery:
            try:
                await nursery.start(publisher.run)
                nursery.start_soon(publisher.run_heartbeat)
                yield
            except Exception as error:
                body_error = error  # raised as it is, outside the nursery
            nursery.cancel_scope.cancel()
    finally:
        # Decided, and left to the journal: a block must end in no time, whatever the store is stuck in.
        registry = broker._registry
        try:
            registry.remove_session_nowait(registry.find_session(publisher.session_id, LOCAL_OWNER), "goodbye")
        except SessionNotFound:
            pass  # it was evicted, or never registered
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
        self._opened = False

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """Hold a channel, and open another when it ends as stale; any other end of it is meant.

        Raises:
            SessionNotFound, ShuttingDown: it never opened.
        """
        while True:
            try:
                async with self._broker.open_channel(self.session_id) as channel, trio.open_nursery() as nursery:
                    reason = await self._serve(channel, nursery, task_status)
                    nursery.cancel_scope.cancel()
            except (SessionNotFound, ShuttingDown):
                if not self._opened:
                    raise
                return
            if not self._opened:
                raise ShuttingDown if reason == "shutdown" else SessionNotFound
            if reason != "stale":
                logger.info("%s is published no more: %s", self._spec.name, reason)
                return

    async def run_heartbeat(self) -> None:
        while True:
            await trio.sleep(self._broker.config.heartbeat_interval_s)
            try:
                # It counts from its arrival: a store that hangs does not make it late.
                self._broker._registry.heartbeat_nowait(self.session_id, {}, (), LOCAL_OWNER)
            except SessionNotFound:
                return  # evicted

    async def _serve(self, channel: Channel, nursery: trio.Nursery, task_status: trio.TaskStatus[None]) -> str:
        async for frame in channel:
            match frame.event:
                case "hello":
                    if not self._opened:
                        self._opened = True
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
        scope, was_over = self._scopes[task_id], False
        try:
            with scope:
                await work(task_id)
        except TaskOver:
            was_over = True  # its caller left while we answered
        except Exception as error:
            if work == self._wake:
                self._fail(task_id, str(error) or type(error).__name__)
            else:
                self._handler_failed(task_id, error)
        finally:
            del self._scopes[task_id]
            if scope.cancel_called or was_over:
                # Its slot is free from here on.
                with suppress(TaskOver):
                    self._broker.confirm_cancelled(task_id)

    def _handler_failed(self, task_id: str, error: Exception) -> None:
        # Where, and not what: its text may hold the prompt.
        where = "".join(traceback.format_tb(error.__traceback__))
        logger.error("the handler of %s raised %s\n%s", self._spec.name, type(error).__name__, where)
        self._fail(task_id, f"The model's handler raised {type(error).__name__}.")

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
            try:
                if isinstance(result.body, bytes):
                    await upload.send(result.body)
                else:
                    async with _closing(result.body):
                        async for piece in result.body:
                            await upload.send(piece)
            except TaskOver:
                raise
            except Exception as error:
                self._handler_failed(task_id, error)  # before the upload breaks off, which would say less
                return
            await upload.finish()


@asynccontextmanager
async def _closing(pieces: AsyncIterator[bytes]) -> AsyncIterator[None]:
    """Close a generator where its reader leaves it: left to the collector it would hold on to what it holds."""
    try:
        yield
    finally:
        if isinstance(pieces, AsyncGenerator):
            await pieces.aclose()
