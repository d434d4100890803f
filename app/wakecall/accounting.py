"""Usage on its way from the outcomes of infers to the store, and back to who asks for it.

An outcome is added to the ledger in its own step, in memory. From then on it takes at most `usage_flush_s`, and what a
commit takes, until the store has it: that much a SIGKILL can lose.
"""

from __future__ import annotations

from contextlib import suppress

import trio

from .directory import Directory
from .errors import StoreUnavailable
from .ledger import CellKey, Ledger, Usage, UsageBy, hour_of
from .models import Event, InferSettled
from .store.base import Store, StoreError

__all__ = ["Accounting"]


class Accounting:
    """Works on a `Directory`; made by the broker, which runs it."""

    def __init__(self, directory: Directory, store: Store) -> None:
        self._directory = directory
        self._store = store
        self._config = directory.config
        self._ledger = Ledger(self._config.max_usage_cells)
        self._news = trio.Event()
        self._kept_from = 0

    def load(self, cells: dict[CellKey, Usage]) -> None:
        """Take what the store holds of this hour."""
        self._ledger.load(cells)

    def observe(self, event: Event) -> None:
        """Count an infer's outcome."""
        if not isinstance(event, InferSettled):
            return
        # A status that is no 2xx says that nothing was made; else who was sent it may have made something.
        worked = event.service_s is not None and (event.engine_status is None or 200 <= event.engine_status <= 299)
        is_unknown = worked and (event.tokens_in is None or event.tokens_out is None)
        outcome = event.outcome
        usage = Usage(
            1,
            1 if outcome == "completed" else 0,
            1 if outcome == "failed" else 0,
            1 if outcome == "cancelled" else 0,
            1 if is_unknown else 0,
            event.tokens_in or 0,
            event.tokens_out or 0,
            event.service_s or 0.0,
        )
        self._ledger.add(hour_of(self._directory.clock.now()), event.key_id, event.llm, usage)
        self._news.set()

    async def run(self) -> None:
        """Write what has been counted, until cancelled."""
        while True:
            await self._news.wait()
            await trio.sleep(self._config.usage_flush_s)
            self._news = trio.Event()
            with suppress(StoreUnavailable):
                # The journal repeats it until it is down, so there is nothing to be done here.
                await self._flush()

    def flush_nowait(self) -> dict[CellKey, Usage]:
        """Put what has been counted into the journal. Returns it."""
        cells = self._ledger.unwritten()
        if cells:
            self._directory.journal.put_usage(cells)
        return cells

    async def _flush(self) -> None:
        if cells := self.flush_nowait():
            await self._directory.journal.commit().wait()
            self._ledger.note_written(cells)

    def expire_nowait(self) -> None:
        """Have what has been kept for long enough deleted: whole hours, the last second of which is as old as that."""
        keep_from = hour_of(self._directory.clock.now() - self._config.usage_retention_s)
        if keep_from > self._kept_from:
            self._kept_from = keep_from
            self._directory.journal.drop_usage(keep_from)

    async def read(self, by: UsageBy, since: float) -> dict[str, Usage]:
        """See `Broker.usage`."""
        await self._flush()
        try:
            return await self._store.usage(hour_of(since), by)
        except StoreError as error:
            raise StoreUnavailable from error
