"""A plain answer whose end has not come with its beginning: held for a moment, for most are whole by then.

Whole, it may go on the shared upload. One that is longer, or whose engine takes its time, is streamed as any other: the
broker counts an engine's pauses from the first byte that it sees, and must not see that much later.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import trio

from ..records import MAX_ANSWER_BYTES
from .engine import EngineFailed
from .pieces import Buffer
from .shared import SharedUpload
from .wire import BrokerClient, BrokerError

__all__ = ["send_held"]

_HOLD_S: Final = 0.25


class _Rest:
    """What is in a buffer and what still comes. No generator: an upload that breaks leaves it where it is."""

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if piece := await self._buffer.take():
            return piece
        if self._buffer.error is not None:
            raise self._buffer.error
        raise StopAsyncIteration


async def send_held(
    broker: BrokerClient,
    shared: SharedUpload,
    task_id: str,
    chunks: AsyncIterator[bytes],
    *,
    status: int,
    content_type: str | None,
) -> None:
    """Send the engine's body, on the shared upload if it is soon whole and short.

    Args:
        broker: where to.
        shared: the channel's.
        task_id: of the infer.
        chunks: the engine's body; may raise EngineFailed.
        status, content_type: the engine's.

    Raises:
        EngineFailed: what `chunks` raised.
        BrokerError: the broker refused it, or could not be reached.
    """
    buffer = Buffer(MAX_ANSWER_BYTES + 1)
    ended: Exception | None = None

    async with trio.open_nursery() as nursery:
        nursery.start_soon(buffer.fill_from, chunks)
        with trio.move_on_after(_HOLD_S):
            await buffer.wait_full()
        try:
            if buffer.error is not None:
                raise buffer.error
            if not (buffer.ended and shared.give(task_id, status, content_type, buffer.held)):
                await broker.send_result(task_id, _Rest(buffer), status=status, content_type=content_type)
        except (BrokerError, EngineFailed) as error:
            # Raised below: out of a nursery it would come wrapped in a group.
            ended = error
            nursery.cancel_scope.cancel()
    if ended is not None:
        raise ended
