"""One control channel, from its GET to its end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import trio

from .sse import EventTooLarge
from .wire import BadFrame, BrokerError, BrokerLost, Bye, Frame, FrameStream, Hello

_SILENT_KEEPALIVES = 3


class Channel:
    """Reads frames until the channel ends, and ends it itself when it has been silent for three keep-alives.

    Args:
        keepalive_s: what to assume until `hello` says it.
        handle: called synchronously with each frame but `bye`, and the nursery of what this channel asks for: it is
            cancelled when the channel ends.
    """

    def __init__(self, keepalive_s: float, handle: Callable[[Frame, trio.Nursery], None]) -> None:
        self._patience_s = _SILENT_KEEPALIVES * keepalive_s
        self._handle = handle
        self._silence = trio.CancelScope()
        self._ended: str | None = None
        self._error: BrokerError | EventTooLarge | None = None

    async def run(self, opening: AbstractAsyncContextManager[FrameStream]) -> str:
        """Open and read it; returns why it ended: a `bye`'s reason, or words for people.

        Raises:
            BrokerError, EventTooLarge: it could not be opened, broke, or is no control channel.
        """
        # The GET itself has to answer as soon as a keep-alive comment would have come.
        with self._silence:
            self._heard()
            async with opening as frames:
                await self._read(frames)
        if self._ended is not None:
            return self._ended
        if self._error is not None:
            raise self._error
        return f"silent for {self._patience_s:g} s"

    async def _read(self, frames: FrameStream) -> None:
        # An error is kept and raised outside: out of a nursery it would come wrapped in a group.
        async with trio.open_nursery() as epoch:
            try:
                while (received := await frames.receive()) is not None:
                    self._heard()
                    for frame in received:
                        self._take(frame, epoch)
                # The first reason counts: a `bye` comes before the end of its stream.
                self._ended = self._ended or "the broker ended the channel"
            except (BrokerLost, BadFrame, EventTooLarge) as error:
                self._error = error
            # Whatever the broker sent on this channel died with it: engine requests and uploads are aborted.
            epoch.cancel_scope.cancel()

    def _take(self, frame: Frame, epoch: trio.Nursery) -> None:
        if isinstance(frame, Bye):
            self._ended = self._ended or frame.reason or "bye"
            # By cancelling and not by leaving the loop: see `abandon`.
            self._silence.cancel()
            return
        if isinstance(frame, Hello):
            self._patience_s = _SILENT_KEEPALIVES * frame.keepalive_s
            self._heard()
        self._handle(frame, epoch)

    def _heard(self) -> None:
        self._silence.deadline = trio.current_time() + self._patience_s
