"""How well a row has been doing of late: what it costs to be answered by it, and whether it is to be avoided.

A publisher that fails fast would, of all, be the one with free slots, and draw everybody to it. So a failure puts a penalty
on its row, and it is avoided wherever another can do the work

- for `2 ** (penalty - 1)` seconds, at most a minute: where there is much traffic, that is what spares it;
- and until `2 ** failures` infers, at most 64, have gone to its pool meanwhile: where there is little, that is. By time
  alone, each call in a quiet pool would find it forgiven, idle, and (if it was the fastest) first choice. But for no longer
  than ten times `2 ** (failures - 1)` seconds, at most ten minutes: it may be well again, and the others busy.

After that it is tried with one infer at a time until one has gone well. A success halves the penalty, and so does each half
minute in which it is not avoided. Pure: `now` is an argument, in seconds, by any clock that only grows; `sent` is how many
infers have gone to the row's pool so far.
"""

from __future__ import annotations

import math
from typing import Final

__all__ = ["Health"]

_WEIGHT: Final = 0.2  # how fast an average follows what is measured
_HALF_LIFE_S: Final = 30.0
_LONGEST_S: Final = 60.0
_MOST_SPARED: Final = 64
_SPARED_FOR: Final = 10.0
_WORST: Final = 8.0
#: Below it a row is trusted with as many infers as it takes.
_TRUSTED: Final = 0.5


class Health:
    """One row's.

    Attributes:
        first_byte_s: mean seconds from a frame to its answer's first byte; None: nothing has been measured.
        service_s: mean seconds that an infer holds its slot; None: likewise.
        wake_s: mean seconds that a wake takes; None: likewise.
        avoided_until: the instant until which others are to be preferred, however many infers there are.
    """

    __slots__ = (
        "_at",
        "_failures",
        "_penalty",
        "_sent",
        "_spared_until",
        "avoided_until",
        "first_byte_s",
        "service_s",
        "wake_s",
    )

    def __init__(self) -> None:
        self.first_byte_s: float | None = None
        self.service_s: float | None = None
        self.wake_s: float | None = None
        self.avoided_until = -math.inf
        self._penalty = 0.0
        self._at = 0.0  # from when on the penalty is less than that
        self._failures = 0  # since it last did well
        self._sent = 0  # infers that had gone to the pool at the last of them
        self._spared_until = -math.inf

    def penalty(self, now: float) -> float:
        """0: in good health. It halves by itself every half minute."""
        if not self._penalty:
            return 0.0
        return float(self._penalty * 2.0 ** (-max(now - self._at, 0.0) / _HALF_LIFE_S))

    def is_avoided(self, now: float, sent: int) -> bool:
        """Whether others are to be preferred."""
        if now < self.avoided_until:
            return True
        if not self._failures or now >= self._spared_until:
            return False
        # Where fewer had gone before, that was another pool.
        return 0 <= sent - self._sent < min(1 << self._failures, _MOST_SPARED)

    def is_on_trial(self, now: float) -> bool:
        """Whether one infer at a time is enough for it."""
        return self._failures > 0 or self.penalty(now) >= _TRUSTED

    def note_failure(self, now: float, sent: int) -> None:
        """It failed an infer or a wake, or would not have it."""
        self._penalty = min(self.penalty(now) + 1.0, _WORST)
        self._at = self.avoided_until = now + min(2.0 ** (self._penalty - 1.0), _LONGEST_S)
        self._failures = min(self._failures + 1, _MOST_SPARED)
        self._sent = sent
        self._spared_until = now + _SPARED_FOR * min(2.0 ** (self._failures - 1), _LONGEST_S)

    def note_first_byte(self, seconds: float) -> None:
        """An answer has begun."""
        self.first_byte_s = _follow(self.first_byte_s, seconds)

    def note_success(self, now: float, seconds: float) -> None:
        """It has answered, and the slot was held for so long."""
        self.service_s = _follow(self.service_s, seconds)
        self._penalty, self._at = self.penalty(now) / 2.0, now
        self._failures = 0
        if self._penalty < _TRUSTED:
            self._penalty = 0.0
            self.avoided_until = -math.inf

    def note_wake(self, seconds: float) -> None:
        """It has woken."""
        self.wake_s = _follow(self.wake_s, seconds)


def _follow(mean: float | None, measured: float) -> float:
    return measured if mean is None else mean + (measured - mean) * _WEIGHT
