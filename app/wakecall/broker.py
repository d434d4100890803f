"""The broker: what embedders and our own routes call.

    async with open_broker() as broker:
        async with broker.infer("qwen", InferRequest("/v1/chat/completions", body)) as reply:
            async for chunk in reply: ...

The work is done below: `directory` holds the state, `registry` the sessions, `dispatch` the infers and wakes, `upload`
takes their answers in, `access` decides on keys and owners, `accounting` counts what was used, `journal` brings decisions to
the store, `views` shows how it all stands. `core` puts them together; `publishing` is what publishers call, `operating` what
operators do; here is what clients call, and the one thing that all this is, with its nursery.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from .config import BrokerConfig
from .directory import Clock
from .errors import ModelNotFound, ShuttingDown
from .faults import stacks_of
from .hosting import Upstream
from .keyring import Caller, Claim
from .ledger import hour_of
from .models import (
    LLM,
    InferRequest,
    ModelView,
)
from .operating import Operating
from .publishing import Publishing
from .session import Channel
from .store.base import MemoryStore, Store
from .task import Infer, Reply

__all__ = ["Broker", "open_broker"]

logger = logging.getLogger("wakecall.broker")

#: How long closing waits for the last commit: what is not down by then is decided again at the next start.
_LAST_COMMIT_S = 5.0


class Broker(Publishing, Operating):
    """Made by `open_broker`. Methods that are not async decide in one step and never block."""

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

    def models(self, caller: Caller | None = None) -> list[ModelView]:
        """All that can be called, by name: aliases, rows and pools; with a caller, those alone that he may use."""
        return self._naming.models(_anything if caller is None else caller.may_use)

    def model_names(self) -> list[str]:
        """What `models` lists, for whoever looks at them a few at a time: one of them may be gone by then."""
        return self._naming.names()

    def model(self, name: str, caller: Caller | None = None) -> ModelView:
        """What is called by a name. Raises ModelNotFound: nothing, or nothing for this caller."""
        if caller is not None and not caller.may_use(name):
            raise ModelNotFound
        return self._naming.model(name)

    def infer_nowait(self, name: str, request: InferRequest, *, claim: Claim | None = None) -> Infer:
        """Take an infer on. Whoever holds what this returns must call its `cancel` when he leaves.

        Args:
            name: a row's, a pool's or an alias.
            request: the client's call.
            claim: on whose account, from `claim`; the infer holds it from now on. None: on nobody's, and without limits.

        Raises:
            ModelNotFound: there is no such row, or not for this caller.
            ModelOffline: nobody is there to be asked.
            QueueFull: as many wait as may, or for so long that this one would be out of time.
            ShuttingDown: the broker is stopping.
        """
        return self._dispatcher.accept(name, request, claim)

    def place_of(self, infer: Infer) -> tuple[int, float | None] | None:
        """Which place in its line a waiting infer has (1: next), and about how many seconds it will wait, if that is known;
        None: it does not wait."""
        return self._dispatcher.placer.place_of(infer)

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
        self._dispatcher.refuse_all_waiting(ShuttingDown)
        ended = []
        for session in list(directory.sessions.values()):
            for channel in (session.pending, session.channel):
                if channel is not None:
                    self._dispatcher.lose_tasks(channel, shutdown=True)
                    self._registry.end_channel(channel, "shutdown")
                    ended.append(channel)
        if self._host is not None:
            ended += self._host.close_nowait()
        directory.disarm_probes()
        return ended

    async def _run_sweeper(self) -> None:
        while True:
            await trio.sleep(self.config.sweep_interval_s)
            try:
                await self._registry.sweep()  # without its commit: a store that hangs must not keep dead rows alive
                self._accounting.expire_nowait()
            except Exception as error:
                logger.error("a sweep failed: %s", stacks_of(error))


def _anything(name: str) -> bool:
    return True


@asynccontextmanager
async def open_broker(
    store: Store | None = None, config: BrokerConfig | None = None, upstream: Upstream | None = None
) -> AsyncIterator[Broker]:
    """A broker at work, with its root nursery; leaving the block ends and joins everything.

    Args:
        store: where rows and sessions outlive it; it stays the caller's to close. None: in memory.
        config: every time and bound; None: the defaults.
        upstream: asks the APIs behind public rows; it stays the caller's to close. None: those rows are offline.

    Raises:
        StoreError: what the store holds cannot be read.
    """
    store = MemoryStore() if store is None else store
    snapshot = await store.load()
    cells = await store.usage_cells(hour_of(Clock().now()))
    body_error: Exception | None = None
    async with trio.open_nursery() as nursery:
        broker = Broker(store, BrokerConfig() if config is None else config, nursery, upstream)
        await broker._load(snapshot, cells)
        nursery.start_soon(broker._journal.run)
        nursery.start_soon(broker._accounting.run)
        nursery.start_soon(broker._directory.waiting_deadlines.run)
        nursery.start_soon(broker._run_sweeper)
        if broker._host is not None:
            broker._host.open_nowait()
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
                broker._accounting.flush_nowait()
                await broker._journal.close()
            nursery.cancel_scope.cancel()
    if body_error is not None:
        raise body_error
