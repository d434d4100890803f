"""What a sweep retires. Pure, and it costs what it retires: both inputs come oldest first and are read no further."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .models import LLM, SessionRecord

__all__ = ["SweepDecision", "decide"]


@dataclass(frozen=True, slots=True)
class SweepDecision:
    """Names of rows and ids of sessions.

    Args:
        stale: live rows without a heartbeat for the timeout: they are lost.
        expired: rows inactive for the retention time: they are deleted.
        unused: sessions that had neither row nor channel for the retention time: they are forgotten.
    """

    stale: tuple[str, ...]
    expired: tuple[str, ...]
    unused: tuple[str, ...]

    @property
    def has_work(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.stale or self.expired or self.unused)


def decide(
    live: Iterable[LLM],
    inactive: Iterable[LLM],
    unused: Iterable[SessionRecord],
    *,
    now: float,
    heartbeat_timeout_s: float,
    inactive_retention_s: float,
    deletes: bool,
) -> SweepDecision:
    """Decide one sweep.

    Args:
        live: active and hibernating virtual rows, the longest without a heartbeat first.
        inactive: inactive virtual rows, the longest inactive first.
        unused: sessions with neither row nor channel, the longest so first.
        now: seconds since the epoch, by the broker's clock.
        heartbeat_timeout_s, inactive_retention_s: of `BrokerConfig`.
        deletes: False within the first heartbeat timeout of a broker's life: publishers are still on their way.
    """
    # Cutoffs, not ages: a store that is asked for the rows at or before one answers with the same to the last bit.
    heartbeat_cutoff = now - heartbeat_timeout_s
    retention_cutoff = now - inactive_retention_s
    stale = []
    for row in live:
        if row.last_heartbeat_at > heartbeat_cutoff:
            break
        stale.append(row.name)
    expired = []
    forgotten = []
    if deletes:
        for row in inactive:
            assert row.inactive_since is not None
            if row.inactive_since > retention_cutoff:
                break
            expired.append(row.name)
        for session in unused:
            assert session.unused_since is not None
            if session.unused_since > retention_cutoff:
                break
            forgotten.append(session.session_id)
    return SweepDecision(tuple(stale), tuple(expired), tuple(forgotten))
