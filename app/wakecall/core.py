"""What every part of the broker stands on: its rooms, put together."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from . import loading, views
from .access import Access
from .accounting import Accounting
from .config import BrokerConfig
from .directory import Directory
from .dispatch import Dispatcher
from .errors import ModelNotFound
from .faults import stacks_of
from .hosting import Host, Upstream
from .journal import Journal
from .ledger import CellKey, Usage
from .models import Event, Snapshot, Statistics
from .naming import Naming
from .registry import Registry
from .row import Row
from .store.base import Store
from .upload import Intake

__all__ = ["Core"]

logger = logging.getLogger("wakecall.broker")


class Core:
    """The part of `Broker` that the others are made of."""

    config: BrokerConfig

    def __init__(
        self,
        store: Store,
        config: BrokerConfig,
        nursery: trio.Nursery,
        upstream: Upstream | None = None,
    ) -> None:
        self.config = config
        self._nursery = nursery
        self._journal = Journal(store)
        self._directory = Directory(config, self._journal)
        self._dispatcher = Dispatcher(self._directory)
        self._intake = Intake(self._directory, self._dispatcher)
        self._registry = Registry(self._directory, self._dispatcher, lambda: self._nursery)
        self._access = Access(self._directory, self._dispatcher, self._registry)
        self._naming = Naming(self._directory, self._dispatcher, self._registry)
        self._accounting = Accounting(self._directory, store)
        self.add_observer(self._accounting.observe)
        self._host: Host | None = None
        if upstream is not None:
            self._host = Host(
                self._directory,
                self._dispatcher,
                self._intake,
                upstream,
                on_room=self._registry.pump_rows,
                nursery=lambda: self._nursery,
            )

    async def _load(self, snapshot: Snapshot, cells: dict[CellKey, Usage]) -> None:
        """Take what the store holds, once, before anybody else has this broker."""
        await loading.load(self._directory, snapshot)
        self._access.load()
        self._accounting.load(cells)

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

    def _find_row(self, name: str) -> Row:
        row = self._directory.rows.get(name)
        if row is None:
            raise ModelNotFound
        return row
