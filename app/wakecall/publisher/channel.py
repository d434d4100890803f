"""What is known of one control channel."""

from __future__ import annotations

import trio

from .sse import EventTooLarge
from .wire import BrokerError

_SILENT_KEEPALIVES = 3


class Channel:
    """When a channel will have been silent for too long, and how it ended.

    Args:
        keepalive_s: what to assume until `hello` says it.
    """

    def __init__(self, keepalive_s: float) -> None:
        self.patience_s = _SILENT_KEEPALIVES * keepalive_s
        self.silence = trio.CancelScope()
        self.ended: str | None = None
        self.error: BrokerError | EventTooLarge | None = None

    def be_patient(self, keepalive_s: float) -> None:
        """`hello` has said how often the broker makes itself heard."""
        self.patience_s = _SILENT_KEEPALIVES * keepalive_s
        self.heard()

    def heard(self) -> None:
        """Bytes have come: the wait for the next ones begins."""
        self.silence.deadline = trio.current_time() + self.patience_s

    def end(self, reason: str) -> None:
        """It is over; the first reason counts, as a `bye` comes before the end of its stream."""
        if self.ended is None:
            self.ended = reason
