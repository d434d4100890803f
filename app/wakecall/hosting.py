"""Public rows: served by the broker itself, which has an `Upstream` ask the API that an operator named.

To all other parts of the broker they are rows like any: they belong to a session with a channel, and `Host` is the publisher
at its other end. It takes the frames, and feeds each answer in as any publisher's upload is. So slots, waiting, deadlines,
cancelling and settling are the code that all rows have. Nobody else can speak for that session: it is in no list, its id is
none that a path can have, and its owner is none that a key can have. Its channel ends with the broker; should it end
before, by a fault of ours, the next one is there in the same step.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol

import trio

from .directory import Directory
from .errors import PublisherError, TaskOver
from .faults import stacks_of
from .frames import Frame
from .models import LLM, InferRequest, SessionRecord
from .session import Channel, Session, run_session
from .task import Infer

if TYPE_CHECKING:
    from .dispatch import Dispatcher
    from .upload import Intake

__all__ = ["HOST", "MOST_BROKERS", "PSEUDONYM", "Host", "Upstream", "UpstreamAnswer"]

logger = logging.getLogger("wakecall.upstream")

#: The hidden session's id and its owner: neither is what `models.is_id` and `keys.is_owner` take.
HOST: Final = "@host"

#: What this process calls itself in `Via` (RFC 9110, 7.6.3) where it calls an upstream: a public row may lead, straight or
#: through other brokers, back to here, and would go round until something is full.
PSEUDONYM: Final = f"wakecall-{secrets.token_hex(8)}"
MOST_BROKERS: Final = 8


class UpstreamAnswer(Protocol):
    """The head of an upstream's answer.

    Attributes:
        status, content_type: the upstream's.
        retry_after_s: seconds after which it is to be asked again, if it said so.
        chunks: its body as it comes, byte for byte. Raises PublisherError: it broke off.
    """

    @property
    def status(self) -> int: ...
    @property
    def content_type(self) -> str | None: ...
    @property
    def retry_after_s(self) -> int | None: ...
    @property
    def chunks(self) -> AsyncIterator[bytes]: ...


class Upstream(Protocol):
    """Asks the APIs behind public rows. Given to `open_broker`; it has to outlive the broker."""

    def open_answer(self, llm: LLM, request: InferRequest) -> AbstractAsyncContextManager[UpstreamAnswer]:
        """Ask once, and never again; leaving the block, or being cancelled, stops the upstream's work.

        Args:
            llm: the row, with `url`, `model` and `key_env`.
            request: the client's call.

        Raises:
            PublisherError: there is no answer. Its message is for the client.
        """
        ...


class Host:
    """Made by the broker, whose nursery its channels run in.

    Args:
        on_room: lets those who wait for the rows of a channel's session go.
        nursery: the broker's.
    """

    def __init__(
        self,
        directory: Directory,
        dispatcher: Dispatcher,
        intake: Intake,
        upstream: Upstream,
        *,
        on_room: Callable[[Channel], None],
        nursery: Callable[[], trio.Nursery],
    ) -> None:
        now = directory.clock.now()
        self._session: Final = Session(SessionRecord(HOST, HOST, now, now))
        self._directory = directory
        self._dispatcher = dispatcher
        self._intake = intake
        self._upstream = upstream
        self._on_room = on_room
        self._nursery = nursery
        self._epoch = 0
        self._closed = False
        self._relays: dict[str, trio.CancelScope] = {}

    def open_nowait(self) -> None:
        """From now on public rows can be called."""
        self._directory.give_public_rows(self._session)
        self._open_channel()

    def close_nowait(self) -> list[Channel]:
        """Fail all that is under way, for the broker is stopping. Returns the channels that are to be joined. Idempotent."""
        self._closed = True
        channels = [each for each in (self._session.pending, self._session.channel) if each is not None]
        for channel in channels:
            self._dispatcher.lose_tasks(channel, shutdown=True)
            self._end(channel)
        return channels

    # Its channels ---------------------------------------------------------------------------------------------------

    def _open_channel(self) -> None:
        self._epoch += 1
        channel = Channel(
            self._session,
            self._epoch,
            self._directory.config,
            on_disconnect=self._end,
            on_overflow=self._end,
            on_room=self._on_room,
        )
        self._session.pending = channel
        self._nursery().start_soon(self._hold, channel, self._session.leaving)

    def _make_current(self, channel: Channel) -> None:
        session = self._session
        session.pending, session.channel, session.leaving = None, channel, None
        self._on_room(channel)

    def _end(self, channel: Channel) -> None:
        """As `registry.Registry.end_channel`, but for a session whose rows are never lost. Idempotent."""
        if channel.ended is not None:
            return
        session = self._session
        channel.ended = "disconnected"
        if session.channel is channel:
            session.channel, session.leaving = None, channel
        elif session.pending is channel:
            session.pending = None
        # First its successor, for whose sake those who wait go on waiting.
        if not self._closed:
            self._open_channel()
        channel.close(None)
        self._dispatcher.lose_tasks(channel)
        channel.scope.cancel()

    async def _hold(self, channel: Channel, before: Channel | None) -> None:
        """Be both ends of a channel, until it has ended."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run_session, channel, before, self._make_current)
                while taken := await channel.receive():
                    for frame in taken:
                        self._take(frame, nursery)
                nursery.cancel_scope.cancel()
        except Exception as error:
            logger.error("the channel of public models failed: %s", stacks_of(error))
            self._end(channel)

    # Its infers -----------------------------------------------------------------------------------------------------

    def _take(self, frame: Frame, nursery: trio.Nursery) -> None:
        if frame.event == "cancel":
            if (scope := self._relays.get(frame.data["task_id"])) is not None:
                scope.cancel()
        elif frame.event == "infer":
            task_id = frame.data["task_id"]
            try:
                infer = self._intake.find_task(task_id, HOST)
            except TaskOver:
                return
            assert isinstance(infer, Infer)
            assert infer.row is not None
            # The row as it is now: what changes while it is relayed is for those who come after it.
            scope = self._relays[task_id] = trio.CancelScope()
            nursery.start_soon(self._supervise, task_id, infer, infer.row.llm, scope)

    async def _supervise(self, task_id: str, infer: Infer, llm: LLM, scope: trio.CancelScope) -> None:
        """Relay one infer: whatever goes wrong in it ends it and nothing else."""
        try:
            with scope:
                await self._relay(task_id, infer, llm)
        except TaskOver:
            pass  # its caller left, or its time was up, while an answer came
        except PublisherError as error:
            self._fail(task_id, error)
        except Exception as error:
            logger.error("a call of %s failed in the broker itself: %s", llm.name, stacks_of(error))
            self._fail(task_id, PublisherError("The upstream's answer cannot be passed on."))
        finally:
            del self._relays[task_id]
            # Now only is the upstream rid of it: if it was cancelled, its slot is free from here on.
            with suppress(TaskOver):
                self._intake.confirm_cancelled(task_id, HOST)

    async def _relay(self, task_id: str, infer: Infer, llm: LLM) -> None:
        request = replace(infer.request, via=(*infer.request.via, PSEUDONYM))
        async with self._upstream.open_answer(llm, request) as answer:
            if not 200 <= answer.status <= 599:
                raise PublisherError(f"The upstream answered {answer.status}, which is no answer.")
            infer.retry_after_s = answer.retry_after_s
            with self._intake.open_upload(task_id, HOST, answer.status, answer.content_type, None, True) as upload:
                try:
                    async for chunk in answer.chunks:
                        await upload.send(chunk)
                except PublisherError as error:
                    self._fail(task_id, error)  # before the upload breaks off, which would say less
                    return
                await upload.finish()

    def _fail(self, task_id: str, error: PublisherError) -> None:
        try:
            self._intake.fail(self._intake.find_task(task_id, HOST), error.message, error.status)
        except TaskOver:
            pass
