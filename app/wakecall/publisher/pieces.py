"""An answer in pieces (`--upload chunks`), for proxies that would hold a streaming upload until its end.

One task reads the engine while another posts what has come since its last post: a slow broker makes larger pieces, not
a longer queue. A piece that is lost is posted again from its own offset; the broker skips what it has.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import trio

from .backoff import Backoff
from .engine import EngineFailed
from .wire import BrokerClient, BrokerError, BrokerLost, BrokerRefused

MAX_PIECE_BYTES = 1024 * 1024
_ATTEMPTS = 10
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0


class Buffer:
    """What the engine has sent and the broker has not been given; bounded, one reader and one writer.

    Attributes:
        ended: nothing more comes into it.
        error: with which the engine's body ended.
        is_discarding: what comes is dropped.
    """

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._bytes = bytearray()
        self.ended = False
        self._changed = trio.Event()
        self.error: Exception | None = None
        self.is_discarding = False

    async def fill_from(self, chunks: AsyncIterator[bytes]) -> None:
        """Put all of an engine's body there, and its end, which may be an `EngineFailed`."""
        try:
            async for chunk in chunks:
                await self.put(chunk)
        except EngineFailed as error:
            self.end(error)
        else:
            self.end()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def put(self, chunk: bytes) -> None:
        if not self.is_discarding:
            self._bytes += chunk
            self._notify()
        while len(self._bytes) >= self._bound and not self.is_discarding:
            await self._changed.wait()

    def discard(self) -> None:
        """From now on take everything and keep nothing."""
        self.is_discarding = True
        self._bytes.clear()
        self._notify()

    def end(self, error: Exception | None = None) -> None:
        self.error = error
        self.ended = True
        self._notify()

    @property
    def held(self) -> bytes:
        """All that is there, and stays."""
        return bytes(self._bytes)

    async def wait_full(self) -> None:
        """Return when nothing more comes, for it is all there or there is no room."""
        while len(self._bytes) < self._bound and not self.ended:
            await self._changed.wait()

    async def take(self) -> bytes:
        """All that is there, b"" at the end."""
        while not self._bytes and not self.ended:
            await self._changed.wait()
        piece = bytes(self._bytes)
        self._bytes.clear()
        self._notify()
        return piece


async def send_in_pieces(
    broker: BrokerClient,
    task_id: str,
    chunks: AsyncIterator[bytes],
    *,
    status: int,
    content_type: str | None,
    drain: bool = False,
) -> int:
    """Post the engine's body as chunks and the `/result` that ends it.

    Args:
        broker: where to.
        task_id: of the infer.
        chunks: the engine's body; may raise EngineFailed.
        status, content_type: the engine's.
        drain: read `chunks` to the end even if the broker refuses them.

    Returns:
        The bytes posted.

    Raises:
        EngineFailed: what `chunks` raised; nothing ended the answer.
        BrokerError: the broker refused a piece, or could not be reached in several attempts.
    """
    buffer = Buffer(MAX_PIECE_BYTES)
    refused: BrokerError | None = None
    offset = 0

    async with trio.open_nursery() as nursery:
        nursery.start_soon(buffer.fill_from, chunks)
        try:
            while piece := await buffer.take():
                post = partial(broker.send_chunk, task_id, piece, status=status, content_type=content_type)
                await _insist(partial(post, offset=offset))
                offset += len(piece)
        except BrokerError as error:
            # Raised below: out of a nursery it would come wrapped in a group.
            refused = error
            if drain:
                buffer.discard()
            else:
                nursery.cancel_scope.cancel()
    if refused is not None:
        raise refused
    if buffer.error is not None:
        raise buffer.error
    final = partial(broker.send_result, task_id, b"", status=status, content_type=content_type, offset=offset)
    await _insist(final, last=True)
    return offset


async def _insist(post: Callable[[], Awaitable[None]], *, last: bool = False) -> None:
    """Post again what was lost on the way or came at a bad moment; what the broker has decided stands."""
    backoff = Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S)
    for attempt in range(_ATTEMPTS):
        try:
            await post()
        except BrokerLost:
            if attempt == _ATTEMPTS - 1:
                raise
        except BrokerRefused as error:
            repeated = attempt > 0
            if repeated and last and error.code == "task_already_settled":
                # The lost attempt did arrive.
                return
            # The broker may not have noticed yet that the connection of the lost attempt is gone.
            still_busy = repeated and error.code == "result_in_progress"
            if attempt == _ATTEMPTS - 1 or not (still_busy or error.status == 429 or error.status >= 500):
                raise
        else:
            return
        await trio.sleep(backoff.next_pause())
