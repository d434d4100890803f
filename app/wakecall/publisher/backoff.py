"""Pauses between attempts to reach the broker, whatever for."""

from __future__ import annotations

import random

_GROWTH = 1.6


class Backoff:
    """Growing, jittered pauses, so that a broker's restart is met neither by a storm nor by a long silence.

    Growth is slow on purpose: after an outage of `t` seconds the next attempt is at most about `t / 2` away.

    Args:
        base_s: the first pause at most.
        cap_s: the longest pause.
    """

    def __init__(self, base_s: float, cap_s: float) -> None:
        self._base_s = base_s
        self._cap_s = cap_s
        self._next_s = base_s

    def reset(self) -> None:
        """What was tried went well: begin again with the first pause."""
        self._next_s = self._base_s

    def next_pause(self) -> float:
        """Seconds to wait now: half to all of the current pause."""
        pause_s = min(self._next_s, self._cap_s)
        self._next_s = min(pause_s * _GROWTH, self._cap_s)
        return pause_s * random.uniform(0.5, 1.0)
