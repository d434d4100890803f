"""What publishers call, and those who embed one."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Final, cast

from .core import Core
from .errors import InvalidRequest
from .local import Handler, WakeHandler, publish
from .models import LLM, LOCAL_OWNER, HeartbeatReply, InferRequest, LLMSpec, Registered, Status
from .results import Results
from .session import Channel
from .upload import Upload
from .wake import Wake

if TYPE_CHECKING:
    from .broker import Broker

__all__ = ["Publishing"]

logger = logging.getLogger("wakecall.broker")

#: What a publisher's own code may look like to be logged.
_CODE: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


class Publishing(Core):
    """Sessions and their channels, and what comes in for their tasks."""

    async def register(
        self,
        session_id: str,
        llms: Sequence[LLMSpec],
        *,
        owner: str = LOCAL_OWNER,
        agent_name: str = "",
        agent_version: str = "",
        key_id: str | None = None,
    ) -> Registered:
        """Register a session's rows, all or nothing; those it leaves out are withdrawn. Idempotent.

        Args:
            session_id: chosen and kept by the publisher.
            llms: at most `max_llms_per_session`.
            owner: whose session and names these are.
            agent_name, agent_version: what the publisher says it is.
            key_id: the key that this came with: the session ends when that is revoked or expires.

        Raises:
            InvalidRequest, TooMany: what is asked cannot be.
            LLMNameTaken, LLMIsPublic, SessionTaken: it is another's.
            StoreUnavailable: it is registered, but not committed yet.
        """
        registered = self._registry.register_nowait(session_id, llms, owner, agent_name, agent_version, key_id)
        await self._journal.commit().wait()
        return registered

    async def heartbeat(
        self,
        session_id: str,
        statuses: Mapping[str, Status] | None = None,
        tasks: Sequence[str] = (),
        *,
        owner: str = LOCAL_OWNER,
    ) -> HeartbeatReply:
        """A sign of life: bumps every row of the session, and revives those that were lost.

        Args:
            session_id: whose heartbeat.
            statuses: row names to `active` or `hibernating`; names that are not the session's are ignored.
            tasks: ids of what is in flight over there, at most `max_heartbeat_tasks`.
            owner: of the session.

        Raises:
            SessionNotFound: register again.
            InvalidRequest, TooMany: what is said cannot be.
            StoreUnavailable: it counts, but is not committed yet.
        """
        reply = self._registry.heartbeat_nowait(session_id, statuses or {}, tasks, owner)
        await self._journal.commit().wait()
        return reply

    async def pause_session(
        self, session_id: str, llms: Sequence[str] | None = None, *, owner: str = LOCAL_OWNER
    ) -> dict[str, LLM]:
        """Keep new infers from a session's rows until `resume_session`. What is in flight finishes; what waits stays.

        It stands beside the status and the operator's hold, and no register, heartbeat or restart takes it away.

        Args:
            session_id: whose rows.
            llms: which of them; None: all that it has now.
            owner: of the session.

        Returns:
            All rows of the session, by name.

        Raises:
            SessionNotFound: register first.
            ModelNotFound, InvalidRequest, TooMany: the session has no such row; that is no name; those are too many.
            StoreUnavailable: it is done, but not committed yet.
        """
        rows = self._naming.pause_nowait(session_id, llms, owner, paused=True)
        await self._journal.commit().wait()
        return rows

    async def resume_session(
        self, session_id: str, llms: Sequence[str] | None = None, *, owner: str = LOCAL_OWNER
    ) -> dict[str, LLM]:
        """Take the pause from a session's rows; an operator's hold stays. As `pause_session`."""
        rows = self._naming.pause_nowait(session_id, llms, owner, paused=False)
        await self._journal.commit().wait()
        return rows

    async def goodbye(self, session_id: str, *, owner: str = LOCAL_OWNER) -> None:
        """End a session: its rows are withdrawn, its tasks fail, its channel gets `bye`.

        Raises:
            SessionNotFound: there is none.
            StoreUnavailable: it is gone, but that is not committed yet.
        """
        self._registry.remove_session_nowait(self._registry.find_session(session_id, owner), "goodbye")
        await self._journal.commit().wait()

    @asynccontextmanager
    async def open_channel(
        self, session_id: str, *, owner: str = LOCAL_OWNER, key_id: str | None = None
    ) -> AsyncIterator[Channel]:
        """The control channel of a session, while the block lasts; leaving it is the disconnect.

        It returns at once. The first frame is `hello`, and comes when this epoch is current.

        Args:
            session_id: whose channel.
            owner: of the session.
            key_id: the key that this came with: the channel ends when that is revoked or expires.

        Raises:
            SessionNotFound: register first.
            ShuttingDown: the broker is stopping.
        """
        channel = self.open_channel_nowait(session_id, owner=owner, key_id=key_id)
        try:
            yield channel
        finally:
            channel.disconnect()

    def open_channel_nowait(
        self, session_id: str, *, owner: str = LOCAL_OWNER, key_id: str | None = None, needs_open: bool = False
    ) -> Channel:
        """The same for a transport whose channel ends elsewhere: whoever holds it must call its `disconnect`.

        Args:
            session_id, owner, key_id: as for `open_channel`.
            needs_open: whether it was opened without a key by somebody who needs one once the broker is open no more.
        """
        return self._registry.open_channel_nowait(session_id, owner, key_id, needs_open)

    def publish(
        self,
        name: str,
        handler: Handler,
        *,
        hibernating: bool = False,
        on_wake: WakeHandler | None = None,
        max_concurrency: int | None = None,
        type: str = "embedded",
    ) -> AbstractAsyncContextManager[None]:
        """An in-process publisher, alive while the block is. Its handlers run in a nursery of the block's own.

        Args:
            name: the row's.
            handler: `async def handler(request: InferRequest) -> bytes | AsyncIterator[bytes] | InferReply`. It is
                cancelled when its caller leaves; what it raises fails its one infer.
            hibernating: begin asleep; `on_wake` is then awaited before the first infer.
            on_wake: wakes the model; what it raises fails the wake, with its text as the message.
            max_concurrency: how many handlers may run at once.
            type: free text for listings.

        Raises:
            LLMNameTaken, LLMIsPublic, InvalidRequest: the name cannot be had.
        """
        spec = LLMSpec(
            name,
            type=type,
            max_concurrency=max_concurrency,
            status=Status.HIBERNATING if hibernating else Status.ACTIVE,
        )
        return publish(cast("Broker", self), spec, handler, on_wake)

    # What publishers send of tasks ----------------------------------------------------------------------------------

    def open_upload(
        self,
        task_id: str,
        *,
        owner: str = LOCAL_OWNER,
        status: int = 200,
        content_type: str | None = None,
        offset: int | None = None,
        final: bool = True,
    ) -> Upload:
        """Begin an upload of an answer, or of a wake's result.

        Args:
            task_id: of the frame.
            owner: of the session that the frame was sent to.
            status: the engine's, 200 to 599; it counts with the first byte.
            content_type: the engine's; likewise.
            offset: bytes of the answer before this upload; None: it is the whole answer.
            final: whether the task ends with it.

        Raises:
            TaskNotFound, TaskAlreadySettled, TaskCancelled: the task takes nothing.
            ResultInProgress: another upload for it is under way.
            OffsetGap, InvalidRequest: the offset leaves a gap or is missing; the status is none.
        """
        return self._intake.open_upload(task_id, owner, status, content_type, offset, final)

    def open_results(
        self, session_id: str, *, owner: str = LOCAL_OWNER, key_id: str | None = None, needs_open: bool = False
    ) -> Results:
        """Begin a session's shared upload, on which it sends whole answers to many tasks; it ends with the channel.

        Feed it the upload's bytes as they come (protocol.md, Results). What has been taken is told on the channel, by the
        event `results`; the first, at once, says 0.

        Args:
            session_id: whose.
            owner: of the session.
            key_id: the key that this came with: it ends when that is revoked or expires.
            needs_open: whether it was opened without a key by somebody who needs one once the broker is open no more.

        Raises:
            SessionNotFound: there is none, or it has no open channel.
            ResultInProgress: its channel has one already.
        """
        return self._intake.open_results(self._registry.find_session(session_id, owner), key_id, needs_open)

    async def push_chunk(
        self,
        task_id: str,
        data: bytes,
        *,
        offset: int,
        status: int = 200,
        content_type: str | None = None,
        owner: str = LOCAL_OWNER,
    ) -> None:
        """Add one piece to an answer, once there is room for it. Raises as `open_upload` and `Upload.send`."""
        with self.open_upload(
            task_id, owner=owner, status=status, content_type=content_type, offset=offset, final=False
        ) as upload:
            await upload.send(data)
            await upload.finish()

    async def complete(
        self,
        task_id: str,
        data: bytes = b"",
        *,
        status: int = 200,
        content_type: str | None = None,
        offset: int | None = None,
        owner: str = LOCAL_OWNER,
    ) -> None:
        """End a task well, with the last (or only) piece of its answer. Raises as `open_upload` and `Upload.finish`."""
        with self.open_upload(task_id, owner=owner, status=status, content_type=content_type, offset=offset) as upload:
            await upload.send(data)
            await upload.finish()

    def fail(
        self,
        task_id: str,
        message: str,
        *,
        code: str | None = None,
        status: int | None = None,
        owner: str = LOCAL_OWNER,
    ) -> None:
        """End a task badly, during an upload too.

        Args:
            task_id: of the frame.
            message: for the caller.
            code: the publisher's own, for the log alone: the caller's is `publisher_error`.
            status: 400 to 599, for the caller.
            owner: of the session that the frame was sent to.

        Raises:
            TaskNotFound, TaskAlreadySettled, TaskCancelled: the task has ended.
            InvalidRequest: that is no status of a failure.
        """
        if status is not None and not 400 <= status <= 599:
            raise InvalidRequest("A failure's status is 400 to 599.", param="status")
        task = self._intake.find_task(task_id, owner)
        # Free text, which may quote a prompt, or a line of this very log: it is told only if it looks like a code.
        shown = code if code is None or _CODE.fullmatch(code) else "no plain code"
        logger.debug("task %s failed at its publisher (%s)", task_id, shown)
        self._intake.fail(task, message, status)

    def confirm_cancelled(self, task_id: str, *, owner: str = LOCAL_OWNER) -> None:
        """The publisher's engine has stopped working on a task that had ended without it: its slot is free. Idempotent.

        Of a task that has not ended it is a failure.

        Raises:
            TaskNotFound: there is none, or it ended too long ago.
        """
        self._intake.confirm_cancelled(task_id, owner)

    def task_request(self, task_id: str, *, owner: str = LOCAL_OWNER) -> InferRequest:
        """The client's call behind an infer's frame. Raises TaskNotFound, TaskAlreadySettled, TaskCancelled."""
        task = self._intake.find_task(task_id, owner)
        if isinstance(task, Wake):
            return InferRequest("", b"")
        return task.request
