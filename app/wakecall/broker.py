"""The broker: what embedders and our own routes call.

    async with open_broker() as broker:
        async with broker.infer("qwen", InferRequest("/v1/chat/completions", body)) as reply:
            async for chunk in reply: ...

The work is done below: `directory` holds the state, `registry` the sessions, `dispatch` the infers and wakes, `upload`
takes their answers in, `access` decides on keys and owners, `journal` brings decisions to the store, `views` shows how it
all stands. Here they are put together, given a nursery, and shown as one thing.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Final

import trio

from . import views
from .access import Access
from .config import BrokerConfig
from .directory import Directory, Row
from .dispatch import Dispatcher
from .errors import InvalidRequest, ModelNotFound, NotFound, SessionNotFound, ShuttingDown
from .faults import stacks_of
from .journal import Journal
from .keyring import Caller, Claim
from .local import Handler, WakeHandler, publish
from .models import (
    LLM,
    LOCAL_OWNER,
    Event,
    HeartbeatReply,
    InferRequest,
    KeyView,
    LLMSpec,
    LLMView,
    NewKey,
    Registered,
    Role,
    SessionView,
    Snapshot,
    Statistics,
    Status,
    SweepReport,
    TaskView,
)
from .registry import Registry
from .session import Channel
from .store.base import MemoryStore, Store
from .task import Infer, Reply
from .upload import Intake, Upload
from .wake import Wake

__all__ = ["Broker", "open_broker"]

logger = logging.getLogger("wakecall.broker")

#: How long closing waits for the last commit: what is not down by then is decided again at the next start.
_LAST_COMMIT_S = 5.0

#: What a publisher's own code may look like to be logged.
_CODE: Final = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


class Broker:
    """Made by `open_broker`. Methods that are not async decide in one step and never block."""

    config: BrokerConfig

    def __init__(self, store: Store, config: BrokerConfig, snapshot: Snapshot, nursery: trio.Nursery) -> None:
        self.config = config
        self._nursery = nursery
        self._journal = Journal(store)
        self._directory = Directory(config, self._journal)
        self._dispatcher = Dispatcher(self._directory)
        self._intake = Intake(self._directory, self._dispatcher)
        self._registry = Registry(self._directory, self._dispatcher, lambda: self._nursery)
        self._access = Access(self._directory, self._dispatcher, self._registry)
        self._directory.load(snapshot)
        self._access.load()

    # How it stands --------------------------------------------------------------------------------------------------

    def now(self) -> float:
        """Seconds since the epoch, by the broker's one clock."""
        return self._directory.clock.now()

    @property
    def stopping(self) -> bool:
        """Whether it is draining or closed: no new infers are taken."""
        return self._directory.stopping

    @property
    def store_ok(self) -> bool:
        """Whether the last commit went well."""
        return self._journal.ok

    def add_observer(self, observer: Callable[[Event], None]) -> None:
        """Have `observer` told of each outcome and each session's comings and goings.

        It is called synchronously, in the deciding step, so it must not raise, block, or call back.
        """

        def told(event: Event) -> None:
            try:
                observer(event)
            except Exception as error:
                logger.error("an observer failed: %s", stacks_of(error))

        self._directory.observers.append(told)

    def statistics(self) -> Statistics:
        """The counters, as they stand in this instant."""
        return views.statistics(self._directory)

    # Who may call ---------------------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether everybody may do everything: there is no key, and has been none since it was opened."""
        return self._directory.keyring.is_open

    def authenticate(self, secret: str | None) -> Caller:
        """Who presents this key; while the broker is open, whoever it is.

        Args:
            secret: the key; None: none was presented.

        Raises:
            InvalidApiKey: there is none, it is unknown or revoked, or its time is over.
        """
        return self._directory.keyring.find(secret, self.now())

    def check(self, caller: Caller) -> None:
        """Whether a caller still passes: behind a wait his key may have been revoked, or may be needed now.

        Raises:
            InvalidApiKey: he does not.
        """
        self._directory.keyring.check(caller, self.now())

    def claim(self, caller: Caller) -> Claim:
        """Begin a call on a caller's account: it counts against his key's limits until it is released.

        Raises:
            RateLimitExceeded: his key allows no more of them now.
        """
        return caller.claim(trio.current_time())

    def key_views(self) -> list[KeyView]:
        """All keys, oldest first, expired ones too. The keys themselves nobody has but their holders."""
        return self._access.view()

    async def create_key(
        self,
        role: Role,
        *,
        name: str = "",
        owner: str | None = None,
        llms: Sequence[str] | None = None,
        rpm: int | None = None,
        max_in_flight: int | None = None,
        expires_in_s: float | None = None,
    ) -> NewKey:
        """Make a key. With the first one the broker is no longer open.

        Args:
            role: `client`, `publisher` or `admin`.
            name: for people.
            owner: whose sessions, names and tasks its holder's are; None: the key's own id.
            llms: patterns of the names that a client may use or a publisher may register (`*`: any characters); None: all.
            rpm: a client's requests a minute; None: no bound.
            max_in_flight: a client's requests at a time; None: no bound.
            expires_in_s: seconds that it lives; None: until it is revoked.

        Raises:
            InvalidRequest, TooMany: what is asked cannot be.
            StoreUnavailable: there is no such key, for it could not be kept.
            NotFound: somebody revoked it before it was made.
        """
        made = self._access.create_nowait(role, name, owner, llms, rpm, max_in_flight, expires_in_s)
        kept = False
        try:
            await self._journal.commit().wait()
            kept = True
        finally:
            if not kept:
                # Whoever asked does not get it, be it for the store or because he left, so nobody shall have it.
                with suppress(NotFound):
                    self._access.revoke_nowait(made.key.key_id)
        if made.key.key_id not in self._directory.keyring.callers:
            raise NotFound("The key was revoked before it was made.")
        self._access.require_keys_nowait()
        return made

    async def revoke_key(self, key_id: str) -> None:
        """Delete a key: the next request with it is refused, and a publisher's sessions and channels end now.

        Infers that a client's key has under way go on.

        Raises:
            NotFound: there is none.
            StoreUnavailable: it is revoked, but that is not committed yet.
        """
        self._access.revoke_nowait(key_id)
        await self._journal.commit().wait()

    # Publishers -----------------------------------------------------------------------------------------------------

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
        return publish(self, spec, handler, on_wake)

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

    def task_request(self, task_id: str, *, owner: str = LOCAL_OWNER) -> InferRequest:
        """The client's call behind an infer's frame. Raises TaskNotFound, TaskAlreadySettled, TaskCancelled."""
        task = self._intake.find_task(task_id, owner)
        if isinstance(task, Wake):
            return InferRequest("", b"")
        return task.request

    # Clients --------------------------------------------------------------------------------------------------------

    def llms(self, caller: Caller | None = None) -> list[LLM]:
        """All rows by name, from memory: listing wakes nothing. With a caller, those alone that he may use."""
        rows = self._directory.rows
        return [rows[name].llm for name in sorted(rows) if caller is None or caller.may_use(name)]

    def llm(self, name: str, caller: Caller | None = None) -> LLM:
        """One row. Raises ModelNotFound: there is none, or not for this caller."""
        if caller is not None and not caller.may_use(name):
            raise ModelNotFound
        return self._find_row(name).llm

    def infer_nowait(self, name: str, request: InferRequest, *, claim: Claim | None = None) -> Infer:
        """Take an infer on. Whoever holds what this returns must call its `cancel` when he leaves.

        Args:
            name: the row's.
            request: the client's call.
            claim: on whose account, from `claim`; the infer holds it from now on. None: on nobody's, and without limits.

        Raises:
            ModelNotFound: there is no such row, or not for this caller.
            ModelOffline: nobody is there to be asked.
            QueueFull: as many wait as may.
            ShuttingDown: the broker is stopping.
        """
        return self._dispatcher.accept(name, request, claim)

    @asynccontextmanager
    async def infer(self, name: str, request: InferRequest, *, claim: Claim | None = None) -> AsyncIterator[Reply]:
        """An answer, from its first byte on, while the block lasts; leaving it early cancels the infer.

        Raises:
            WakecallError: as `infer_nowait` and `Infer.wait_head`.
        """
        infer = self.infer_nowait(name, request, claim=claim)
        try:
            yield await infer.wait_head()
        finally:
            infer.cancel()

    # Operators ------------------------------------------------------------------------------------------------------

    def llm_views(self) -> list[LLMView]:
        """All rows by name, at work."""
        rows = self._directory.rows
        return [views.view_llm(rows[name]) for name in sorted(rows)]

    def llm_view(self, name: str) -> LLMView:
        """One row, at work. Raises ModelNotFound."""
        return views.view_llm(self._find_row(name))

    def session_views(self) -> list[SessionView]:
        """All sessions by id."""
        sessions = self._directory.sessions
        return [views.view_session(sessions[session_id]) for session_id in sorted(sessions)]

    def task_views(self) -> list[TaskView]:
        """All infers and wakes under way: those sent, then those that wait, oldest first."""
        return views.view_tasks(self._directory)

    async def put_public_llm(
        self, name: str, *, type: str, model: str, url: str, key_env: str | None = None
    ) -> LLMView:
        """Make or change an operator's own row, which publishers cannot touch and no sweep does.

        Raises:
            InvalidRequest: that is no name.
            LLMIsVirtual: a publisher has it.
            StoreUnavailable: it is there, but not committed yet.
        """
        self._registry.put_public_nowait(name, type, model, url, key_env)
        await self._journal.commit().wait()
        return self.llm_view(name)

    async def delete_llm(self, name: str) -> None:
        """Delete a row of any kind; its infers fail. Raises ModelNotFound, StoreUnavailable."""
        self._registry.delete_llm_nowait(name)
        await self._journal.commit().wait()

    async def hand_over_session(self, session_id: str, owner: str) -> SessionView:
        """Make a session, with its rows, another owner's. Its channel ends: whoever holds it is not the new owner.

        Raises:
            SessionNotFound: there is none.
            InvalidRequest, TooMany: that is no owner, or one who has as much as he may.
            StoreUnavailable: it is done, but not committed yet.
        """
        self._access.hand_over_session_nowait(session_id, owner)
        await self._journal.commit().wait()
        session = self._directory.sessions.get(session_id)
        if session is None:
            raise SessionNotFound  # it went while this was committed
        return views.view_session(session)

    async def hand_over_llm(self, name: str, owner: str) -> LLMView:
        """Make a row another owner's. A virtual one is withdrawn from its session; its new owner's next register adopts it.

        Raises:
            ModelNotFound: there is none.
            InvalidRequest, TooMany: that is no owner, or one who has as much as he may.
            StoreUnavailable: it is done, but not committed yet.
        """
        self._access.hand_over_llm_nowait(name, owner)
        await self._journal.commit().wait()
        return self.llm_view(name)

    async def evict(self, session_id: str) -> None:
        """End a session as goodbye does, but its publisher is told not to come back. Raises SessionNotFound."""
        session = self._directory.sessions.get(session_id)
        if session is None:
            raise SessionNotFound
        self._registry.remove_session_nowait(session, "evicted")
        await self._journal.commit().wait()

    async def sweep(self) -> SweepReport:
        """One pass: rows without a heartbeat go inactive, those inactive for long are deleted. Idempotent.

        Raises:
            StoreUnavailable: it is done, but not committed yet.
        """
        report = self._registry.sweep_nowait()
        if report.inactivated or report.deleted:
            await self._journal.commit().wait()
        return report

    # Stopping -------------------------------------------------------------------------------------------------------

    async def drain(self, grace_s: float | None = None) -> None:
        """Stop: no new infers; what is under way goes on for the grace; then it is cancelled, and all channels end.

        Args:
            grace_s: seconds; `grace_s` of the config when left out.
        """
        self._directory.stopping = True
        with trio.move_on_after(self.config.grace_s if grace_s is None else grace_s):
            await self._dispatcher.wait_quiet()
        for channel in self._end_all():
            await channel.joined.wait()

    def _end_all(self) -> list[Channel]:
        """Fail all that is left, tell the publishers so, and end every channel, in one step."""
        directory = self._directory
        directory.stopping = True
        for row in list(directory.rows.values()):
            if row.waiting:
                self._dispatcher.refuse_waiting(row, ShuttingDown)
        ended = []
        for session in list(directory.sessions.values()):
            for channel in (session.pending, session.channel):
                if channel is not None:
                    self._dispatcher.lose_tasks(channel, shutdown=True)
                    self._registry.end_channel(channel, "shutdown")
                    ended.append(channel)
        return ended

    async def _run_sweeper(self) -> None:
        while True:
            await trio.sleep(self.config.sweep_interval_s)
            try:
                self._registry.sweep_nowait()  # a store that hangs must not keep dead rows alive
            except Exception as error:
                logger.error("a sweep failed: %s", stacks_of(error))

    def _find_row(self, name: str) -> Row:
        row = self._directory.rows.get(name)
        if row is None:
            raise ModelNotFound
        return row


@asynccontextmanager
async def open_broker(store: Store | None = None, config: BrokerConfig | None = None) -> AsyncIterator[Broker]:
    """A broker at work, with its root nursery; leaving the block ends and joins everything.

    Args:
        store: where rows and sessions outlive it; it stays the caller's to close. None: in memory.
        config: every time and bound; None: the defaults.

    Raises:
        StoreError: what the store holds cannot be read.
    """
    store = MemoryStore() if store is None else store
    snapshot = await store.load()
    body_error: Exception | None = None
    async with trio.open_nursery() as nursery:
        broker = Broker(store, BrokerConfig() if config is None else config, snapshot, nursery)
        nursery.start_soon(broker._journal.run)
        nursery.start_soon(broker._directory.waiting_deadlines.run)
        nursery.start_soon(broker._run_sweeper)
        try:
            yield broker
        except Exception as error:
            body_error = error  # raised as it is, outside the nursery, which would put it into a group
        finally:
            channels = broker._end_all()
            broker._access.close()
            # Both are short: joining awaits nobody outside, and the commit has its limit.
            with trio.move_on_after(_LAST_COMMIT_S, shield=True):
                for channel in channels:
                    await channel.joined.wait()
                await broker._journal.close()
            nursery.cancel_scope.cancel()
    if body_error is not None:
        raise body_error
