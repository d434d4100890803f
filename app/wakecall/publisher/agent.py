"""The publisher's agent: keeps rows registered and a channel open, and does what its frames say.

    run_publisher
    └─ agent nursery
       ├─ channel loop                      register, open, read frames, back off, again
       │   └─ epoch nursery                 one channel's life: its end cancels every infer of that epoch
       │       ├─ shared upload             carries short answers, where the broker takes them (shared.py)
       │       ├─ infer t1, t2, …           each with a supervisor of its own (relay.py); says when a cancelled one stopped
       │       └─ wake w1                   waits for the engine to be awake, then answers
       ├─ heartbeats                        go on while the channel is being opened anew
       ├─ the engine's sleep, its wakes     outlive a channel: a machine that boots goes on booting (power.py)
       └─ stop                              drains, says goodbye

Nothing in the nursery raises: what ends the agent is put into `_end` and the nursery is cancelled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import trio

from .backoff import Backoff
from .channel import Channel
from .commands import Commands
from .config import PublisherConfig
from .engine import Engine, discover_models, open_engine
from .errors import PublisherError
from .events import (
    BrokerUnreachable,
    ChannelLost,
    ChannelOpen,
    Drained,
    Draining,
    Evicted,
    PublisherEvent,
    Registered,
    StopReason,
    Superseded,
)
from .power import AnnounceFailed, Power, WakeError
from .registration import agent_version, fatal_error, key_refused, rows_to_register
from .relay import Relay
from .shared import SharedUpload
from .sse import EventTooLarge
from .state import State, open_state
from .swap import Sleep, SwapGroup
from .wire import (
    BrokerClient,
    BrokerError,
    BrokerLost,
    BrokerRefused,
    Cancel,
    Frame,
    Hello,
    Infer,
    Results,
    Wake,
    open_broker_client,
)

logger = logging.getLogger(__name__)

# A channel that lived for less is no proof that the broker is well again.
_GOOD_CHANNEL_S = 1.0
# How often it is tried to say that a cancelled infer has stopped.
_CONFIRMATIONS = 2


def _ignore(event: PublisherEvent) -> None:
    """The default for `on_event`."""


async def run_publisher(
    config: PublisherConfig,
    *,
    on_event: Callable[[PublisherEvent], None] = _ignore,
    stop: trio.Event | None = None,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> StopReason:
    """Publish an engine's models until told to stop, superseded or evicted.

    Args:
        config: what to publish, from where and to whom.
        on_event: called synchronously with each event; must not block or raise.
        stop: set it to drain: no new infers, those in flight end within `drain_grace_s`, goodbye. Cancelling instead
            drops everything at once.
        task_status: started with the session's id once the first channel is open.

    Returns:
        Why it came to its end.

    Raises:
        InvalidConfig: the engine key's variable is not set, or that of the CAs names what cannot be read.
        StateLocked, StateUnusable: this machine's record of the session is held by another agent or unusable.
        EngineUnreachable, AmbiguousNames: the engine was to be asked for its models.
        KeyRefused, NameTaken, RegistrationRefused: the broker will not have these rows.
    """
    with open_state(config) as state:
        async with open_engine(config) as engine, open_broker_client(config, state.session_id) as broker:
            agent = _Agent(config, state, engine, broker, on_event, task_status)
            return await agent.run(stop if stop is not None else trio.Event())


class _WakeWaiter:
    """One wake frame: waits for the wake that it starts or joins."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()

    def cancel(self) -> None:
        self.scope.cancel()


class _Agent:
    def __init__(
        self,
        config: PublisherConfig,
        state: State,
        engine: Engine,
        broker: BrokerClient,
        emit: Callable[[PublisherEvent], None],
        task_status: trio.TaskStatus[str],
    ) -> None:
        self._config = config
        self._state = state
        self._engine = engine
        self._broker = broker
        self._emit = emit
        self._task_status = task_status
        self._version = agent_version()
        self._has_key = config.broker_key is not None
        # The entire mutable state.
        self._models = config.models
        self._served: frozenset[str] = frozenset()
        self._end: StopReason | PublisherError | None = None
        self._registered = 0
        self._heartbeat_interval_s = 30.0
        self._heartbeat_wanted = trio.Event()
        self._draining = False
        self._in_hand: dict[str, Relay | _WakeWaiter] = {}
        self._shared: SharedUpload | None = None
        self._started = False

    async def run(self, stop: trio.Event) -> StopReason:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            kind = Power if self._config.group is None else SwapGroup
            self._power: Sleep = kind(
                self._config,
                Commands(self._config, self._engine, self._state.command_log),
                emit=self._emit,
                nursery=nursery,
                announce=self._announce_sleep,
                on_change=self._want_heartbeat,
            )
            # First, and beside everything else: whoever asks the agent to stop is heard in whatever it is doing.
            nursery.start_soon(self._run_stop, stop)
            nursery.start_soon(self._run_session)
        if isinstance(self._end, PublisherError):
            raise self._end
        assert self._end is not None
        self._report_started()
        return self._end

    def _finish(self, end: StopReason | PublisherError) -> None:
        if self._end is None:
            self._end = end
        self._nursery.cancel_scope.cancel()

    def _end_if_refused(self, error: BrokerRefused) -> None:
        # Without a code it is a proxy that speaks, in a broker's absence perhaps.
        if error.code and (refused := key_refused(error, had_key=self._has_key)) is not None:
            self._finish(refused)

    def _report_started(self) -> None:
        if not self._started:
            self._started = True
            self._task_status.started(self._state.session_id)

    # Register

    async def _register(self, known: int) -> None:
        """PUT the rows, unless somebody did since `known` registers were done.

        Raises:
            BrokerError: not delivered, or refused for now. What is refused for good ends the agent.
        """
        async with self._broker.in_order:
            if self._registered != known or self._draining:
                return
            rows = rows_to_register(self._config, self._models, self._power.register_status)
            try:
                answer = await self._broker.register(rows, self._version)
            except BrokerRefused as error:
                fatal = fatal_error(error, rows, again=self._registered > 0, had_key=self._has_key)
                if fatal is not None:
                    self._finish(fatal)
                raise
            self._registered += 1
            self._heartbeat_interval_s = answer.heartbeat_interval_s
        self._emit(Registered(session_id=answer.session_id, models=answer.llms, again=self._registered > 1))

    async def _register_until_done(self) -> None:
        backoff = Backoff(self._config.backoff_base_s, self._config.backoff_cap_s)
        while not self._registered:
            try:
                await self._register(0)
            except BrokerError as error:
                pause_s = backoff.next_pause()
                await trio.lowlevel.checkpoint_if_cancelled()
                self._emit(BrokerUnreachable(str(error), pause_s))
                await trio.sleep(pause_s)

    # Channels

    async def _run_session(self) -> None:
        if not self._models:
            try:
                self._models = await discover_models(self._engine)
            except PublisherError as error:
                self._finish(error)
                return
        self._served = frozenset(model.name for model in self._models)
        await self._power.begin(self._models)
        if self._config.hibernate_after_s is not None:
            self._nursery.start_soon(self._power.run_idle)
        await self._register_until_done()
        # Not before: the answer says how often.
        self._nursery.start_soon(self._run_heartbeats)
        await self._run_channels()

    async def _run_channels(self) -> None:
        backoff = Backoff(self._config.backoff_base_s, self._config.backoff_cap_s)
        unknown_before = False
        while True:
            known = self._registered
            opened = trio.current_time()
            unknown = False
            try:
                channel = Channel(self._config.keepalive_s, self._handle)
                reason = await channel.run(self._broker.open_frames())
            except BrokerRefused as error:
                reason, unknown = str(error), error.status == 404
                self._end_if_refused(error)
            except (BrokerError, EventTooLarge) as error:
                reason = str(error)
            if reason == "superseded":
                self._emit(Superseded())
                self._finish(StopReason.SUPERSEDED)
            elif reason == "evicted":
                self._emit(Evicted())
                self._finish(StopReason.EVICTED)
            await trio.lowlevel.checkpoint_if_cancelled()
            if unknown and await self._register_again(known) and not unknown_before:
                # The broker is there and knows us again: no reason to wait, the first time.
                unknown_before = True
                continue
            unknown_before = unknown
            if trio.current_time() - opened >= _GOOD_CHANNEL_S:
                backoff.reset()
            pause_s = backoff.next_pause()
            if not self._draining:
                self._emit(ChannelLost(reason, pause_s))
            await trio.sleep(pause_s)

    async def _register_again(self, known: int) -> bool:
        try:
            await self._register(known)
        except BrokerError as error:
            logger.info("registering again failed: %s", error)
            return False
        return True

    def _handle(self, frame: Frame, epoch: trio.Nursery) -> None:
        match frame:
            case Hello():
                self._heartbeat_interval_s = frame.heartbeat_interval_s
                self._shared = None
                if "results" in frame.features and self._config.upload == "stream":
                    self._shared = SharedUpload(self._broker, frame.keepalive_s, self._heartbeat_at_once)
                    epoch.start_soon(self._shared.run)
                self._emit(ChannelOpen(frame.epoch))
                self._report_started()
            case Results() if self._shared is not None:
                self._shared.acknowledge(frame.taken)
            case Infer() if frame.task_id not in self._in_hand:
                relay = Relay(
                    frame,
                    served=self._served,
                    config=self._config,
                    broker=self._broker,
                    engine=self._engine,
                    power=self._power,
                    shared=self._shared,
                    emit=self._emit,
                    on_key_refused=self._heartbeat_at_once,
                )
                self._in_hand[frame.task_id] = relay
                epoch.start_soon(self._run_relay, relay)
            case Wake() if frame.task_id not in self._in_hand:
                waiter = _WakeWaiter()
                self._in_hand[frame.task_id] = waiter
                epoch.start_soon(self._run_wake, frame, waiter)
            case Cancel() if frame.task_id in self._in_hand:
                self._drop(frame.task_id)
            case Cancel():
                # It came to its end here before the broker heard of that: there is nothing to stop.
                epoch.start_soon(self._confirm_cancelled, frame.task_id)
            case Infer() | Wake():
                logger.warning("the broker sent task %s twice", frame.task_id)

    def _drop(self, task_id: str) -> None:
        task = self._in_hand.get(task_id)
        if task is not None:
            task.cancel()

    async def _run_relay(self, relay: Relay) -> None:
        try:
            await relay.run()
        finally:
            self._forget(relay.frame.task_id, relay)
        if relay.is_unwanted:
            await self._confirm_cancelled(relay.frame.task_id)

    async def _confirm_cancelled(self, task_id: str) -> None:
        """Free the slot that the broker keeps until the engine has stopped; without this it is free after a lease."""
        for _ in range(_CONFIRMATIONS):
            try:
                await self._broker.confirm_cancelled(task_id)
            except BrokerLost as error:
                logger.debug("that a cancelled infer has stopped could not be said: %s", error)
                continue
            except BrokerRefused as error:
                # An older broker has no such path, and a newer one may have forgotten the task.
                logger.debug("that a cancelled infer has stopped was of no use: %s", error)
            return

    async def _run_wake(self, frame: Wake, waiter: _WakeWaiter) -> None:
        try:
            with waiter.scope:
                failure: str | None = None
                try:
                    await self._power.wake(frame.llm, frame.deadline_s, frame.hibernate)
                except WakeError as error:
                    failure = str(error)
                async with self._broker.in_order:
                    if failure is None:
                        await self._broker.send_result(frame.task_id, b"")
                    else:
                        await self._broker.send_failure(frame.task_id, failure)
            if self._config.group is not None:
                # Of the others a result says nothing, and a failed swap may have put one to sleep.
                self._heartbeat_at_once()
        except BrokerError as error:
            # The wake itself stands: a heartbeat names what the engine is.
            self._heartbeat_at_once()
            logger.info("the result of a wake could not be delivered: %s", error)
        finally:
            self._forget(frame.task_id, waiter)

    def _forget(self, task_id: str, task: Relay | _WakeWaiter) -> None:
        if self._in_hand.get(task_id) is task:
            del self._in_hand[task_id]

    # Heartbeats

    def _want_heartbeat(self) -> None:
        # The result of a wake says it by itself; a heartbeat that overtook it would only have it refused.
        if not any(isinstance(task, _WakeWaiter) for task in self._in_hand.values()):
            self._heartbeat_at_once()

    def _heartbeat_at_once(self) -> None:
        self._heartbeat_wanted.set()

    async def _run_heartbeats(self) -> None:
        backoff = Backoff(self._config.backoff_base_s, self._config.backoff_cap_s)
        pause_s = self._heartbeat_interval_s
        while True:
            with trio.move_on_after(pause_s):
                await self._heartbeat_wanted.wait()
            self._heartbeat_wanted = trio.Event()
            pause_s = self._heartbeat_interval_s
            known = self._registered
            self._power.trim_log()
            try:
                await self._heartbeat()
            except BrokerRefused as error:
                # The channel of a publisher without a key stays open when the broker gets its first one.
                self._end_if_refused(error)
                if error.status == 404 and not self._draining:
                    await self._register_again(known)
            except BrokerError as error:
                logger.info("a heartbeat was lost: %s", error)
                pause_s = min(backoff.next_pause(), pause_s)
            else:
                backoff.reset()

    async def _heartbeat(self) -> None:
        async with self._broker.in_order:
            # Looked up when it is our turn: a wake's result may have gone out while we waited.
            statuses = {} if self._draining else self._power.heartbeat_statuses()
            answer = await self._broker.heartbeat(
                statuses, [task_id for task_id, task in self._in_hand.items() if not _is_discarded(task)]
            )
        for task_id in answer.drop:
            self._drop(task_id)

    async def _announce_sleep(self, llms: Iterable[str]) -> None:
        try:
            async with self._broker.in_order:
                await self._broker.heartbeat(dict.fromkeys(llms, "hibernating"), list(self._in_hand))
        except BrokerError as error:
            raise AnnounceFailed(f"the broker did not acknowledge it: {error}") from error

    # Stop

    async def _run_stop(self, stop: trio.Event) -> None:
        await stop.wait()
        self._draining = True
        self._emit(Draining(in_flight=self._power.in_flight))
        if self._registered:
            try:
                await self._say_goodbye()
            except (BrokerError, trio.TooSlowError) as error:
                logger.info("goodbye could not be said: %s", error or "the broker does not answer")
        self._emit(Drained(abandoned=self._power.in_flight))
        self._finish(StopReason.STOPPED)

    async def _say_goodbye(self) -> None:
        # Each with a bound of its own: a broker that has gone silent holds up no stop.
        with trio.fail_after(self._config.farewell_s):
            async with self._broker.in_order:
                await self._broker.register([], self._version)
        with trio.move_on_after(self._config.drain_grace_s):
            await self._power.wait_until_idle()
        if self._shared is not None:
            # What still is on its way would be cut off by the goodbye.
            with trio.move_on_after(self._config.farewell_s):
                await self._shared.wait_settled()
        with trio.fail_after(self._config.farewell_s):
            async with self._broker.in_order:
                await self._broker.goodbye()


def _is_discarded(task: Relay | _WakeWaiter) -> bool:
    return isinstance(task, Relay) and task.is_discarded
