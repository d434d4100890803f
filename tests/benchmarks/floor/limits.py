"""How often: a rate of requests, as one number that moves."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

__all__ = ["RateState", "RequestRate"]

_WINDOW_S: Final = 60.0


class RateState(NamedTuple):
    """How a rate stands after a request.

    `allowed`: whether it may be made. `remaining`: how many more may follow at once. `reset_s`: seconds until the whole
    minute's worth is there again. `retry_after_s`: seconds until the next one may be made; 0 if it may now.
    """

    limit: int
    allowed: bool
    remaining: int
    reset_s: float
    retry_after_s: float


class RequestRate:
    """At most `rpm` requests at once, and as many a minute after that, evenly refilled.

    The generic cell rate algorithm (ITU-T I.371): `_full_at` is the instant at which nothing would be owed any more. Each
    request moves it on by its share of the minute; one that would move it beyond the minute's end is refused, and costs
    nothing. There is no window whose end lets twice as many through, and nothing to be cleared up.

    Args:
        rpm: requests a minute, 1 or more.
    """

    __slots__ = ("_full_at", "_share_s", "limit")

    def __init__(self, rpm: int) -> None:
        self.limit: Final = rpm
        self._share_s = _WINDOW_S / rpm
        self._full_at = -math.inf

    def look(self, now: float) -> RateState:
        """How it stands for one that is not made. `now` as for `take`."""
        return self._state(max(self._full_at, now), now, allowed=True)

    def take(self, now: float) -> RateState:
        """Make one request, if it may be made.

        Args:
            now: seconds, by any clock that only grows.
        """
        full_at = max(self._full_at, now)
        # Shares are rounded: the last one of a full minute must not fail by the sum of that.
        allowed = full_at + self._share_s - now <= _WINDOW_S + self._share_s * 1e-6
        if allowed:
            full_at = self._full_at = full_at + self._share_s
        return self._state(full_at, now, allowed)

    def _state(self, full_at: float, now: float, allowed: bool) -> RateState:
        owed_s = full_at - now
        remaining = max(math.floor((_WINDOW_S - owed_s) / self._share_s + 1e-6), 0)
        retry_after_s = 0.0 if remaining else max(owed_s + self._share_s - _WINDOW_S, 0.0)
        return RateState(self.limit, allowed, remaining, owed_s, retry_after_s)
