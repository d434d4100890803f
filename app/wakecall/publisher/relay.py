"""One infer: from its frame to the engine, and the engine's answer back as it arrives."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Callable

import trio

from ..faults import stacks_of
from ..records import MAX_ANSWER_BYTES
from ..rewrite import replace_model
from .config import PublisherConfig
from .engine import Engine, EngineAnswer, EngineFailed, EngineRefused
from .events import InferFinished, InferOutcome, InferStarted, PublisherEvent
from .held import send_held
from .pieces import send_in_pieces
from .power import WakeError
from .shared import SharedUpload
from .swap import Sleep
from .wire import BrokerClient, BrokerError, BrokerLost, BrokerRefused, Infer, sayable

logger = logging.getLogger(__name__)

# The broker ends a task at its deadline and says so by `cancel`. This is for the case that it cannot: to be earlier
# would turn its `deadline_exceeded` into an upload that broke off.
_DEADLINE_SLACK_S = 5.0
# Scanning more than this for the model's place would hold up every other infer for a moment.
_REWRITE_INLINE_BYTES = 256 * 1024
# The broker relays only a few paths below /v1/. An engine has others, to delete a model for instance.
_RELAYABLE = re.compile(r"/v1/[a-z]+(?:/[a-z]+)*")


class _Discarded(EngineFailed):
    """The answer is not wanted any more, and the engine is to finish it all the same (`cancel: drain`)."""


class _Chunks:
    """The engine's body on its way into an upload. No generator: an upload that breaks leaves it where it is."""

    def __init__(self, relay: Relay, first: bytes, rest: AsyncIterator[bytes]) -> None:
        self._relay = relay
        self._first = first
        self._rest = rest

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._first:
            chunk, self._first = self._first, b""
        else:
            try:
                chunk = await anext(self._rest)
            except EngineFailed as error:
                # Before the upload breaks off: the first of the two to arrive is what the client gets to read.
                await self._relay.report(error)
                raise
        if self._relay.is_discarded:
            raise _Discarded("not wanted any more")
        self._relay.uploaded += len(chunk)
        return chunk


class Relay:
    """The supervisor of one infer: whatever goes wrong in it ends it and nothing else.

    Args:
        frame: what to do.
        served: the names that this publisher has.
        shared: where short answers may go, if the broker takes them there.
        on_key_refused: called when the broker does not know us any more; what that means is not for one infer to say.

    `is_unwanted` once the broker has ended it, by a `cancel` or by its answer to a request about it.
    """

    def __init__(
        self,
        frame: Infer,
        *,
        served: frozenset[str],
        config: PublisherConfig,
        broker: BrokerClient,
        engine: Engine,
        power: Sleep,
        shared: SharedUpload | None,
        emit: Callable[[PublisherEvent], None],
        on_key_refused: Callable[[], None],
    ) -> None:
        self.frame = frame
        self.is_discarded = False
        self.is_unwanted = False
        self.uploaded = 0
        self._served = served
        self._config = config
        self._broker = broker
        self._engine = engine
        self._power = power
        self._shared = shared
        self._emit = emit
        self._on_key_refused = on_key_refused
        self._scope = trio.CancelScope()
        self._cancelled = False
        self._asked_engine = False
        self._reported = False
        self._status: int | None = None
        self._message: str | None = None

    def cancel(self) -> None:
        """The broker waits for it no longer: stop the engine, or let it finish for nobody (`cancel: drain`)."""
        self.is_unwanted = self._cancelled = True
        if self._config.cancel == "drain" and self._asked_engine:
            self.is_discarded = True
        else:
            self._scope.cancel()

    async def run(self) -> None:
        """Relay. Raises nothing but a cancellation from outside, when the channel has ended."""
        started = trio.current_time()
        self._emit(InferStarted(self.frame.task_id, self.frame.llm))
        self._visit = self._power.infer_arrived(self.frame.llm)
        self._scope.deadline = started + self.frame.deadline_s + _DEADLINE_SLACK_S
        outcome: InferOutcome = "lost"
        try:
            with self._scope:
                outcome = await self._supervise()
            if self._scope.cancelled_caught:
                outcome = "cancelled" if self._cancelled else "deadline"
        finally:
            self._power.infer_left(self._visit)
            self._emit(
                InferFinished(
                    task_id=self.frame.task_id,
                    llm=self.frame.llm,
                    outcome=outcome,
                    status=self._status,
                    seconds=trio.current_time() - started,
                    uploaded=self.uploaded,
                    message=self._message,
                )
            )

    async def _supervise(self) -> InferOutcome:
        try:
            await self._relay()
        except (EngineFailed, WakeError) as error:
            await self.report(error)
        except BrokerRefused as error:
            self._message = str(error)
            if error.is_over:
                self.is_unwanted = True
                return "cancelled" if self._cancelled else "refused"
            if error.status == 401:
                self._on_key_refused()
            await self.report(error)
        except BrokerLost as error:
            # If the request never reached the broker, only this tells it that no answer will come.
            await self.report(BrokerLost(f"the upload of the answer broke off ({error})"))
        except Exception as error:
            logger.error("an infer failed in the publisher itself: %s", stacks_of(error))
            await self.report(RuntimeError(f"the publisher failed: {type(error).__name__}"))
        else:
            return "cancelled" if self._cancelled else "completed"
        return "failed"

    async def report(self, error: Exception) -> None:
        """Tell the broker, once, that the infer failed. That it is over already, or unreachable, changes nothing."""
        if self._reported:
            return
        self._reported = True
        self._message = str(error)
        try:
            await self._broker.send_failure(self.frame.task_id, self._message)
        except BrokerError as refused:
            self.is_unwanted = self.is_unwanted or (isinstance(refused, BrokerRefused) and refused.is_over)
            logger.debug("the failure of an infer could not be reported: %s", refused)

    async def _relay(self) -> None:
        frame = self.frame
        if frame.llm not in self._served:
            raise EngineFailed(f"this publisher has no model {frame.llm}")
        if frame.method != "POST" or _RELAYABLE.fullmatch(frame.path) is None:
            raise EngineFailed("this publisher relays only POST requests to paths below /v1/")
        body, headers = await self._prepare()
        await self._power.admit(self._visit)
        try:
            await self._ask(body, headers)
        except EngineRefused:
            if not self._power.can_wake:
                raise
            # Nothing was sent to the engine, so that asking once more cannot generate twice.
            await self._power.recover(self._visit)
            await self._ask(body, headers)

    async def _prepare(self) -> tuple[bytes, dict[str, str]]:
        frame = self.frame
        content_type = frame.headers.get("content-type")
        if frame.body is not None:
            body = frame.body.encode()
        else:
            body, fetched_type = await self._broker.fetch_body(frame.task_id)
            content_type = content_type or fetched_type
        content_type = content_type or "application/json"
        if frame.model:
            # Whatever its caller said: the row's name, its pool's, or an alias that leads there.
            if len(body) <= _REWRITE_INLINE_BYTES:
                body = replace_model(body, content_type, frame.model)
            else:
                body = await trio.to_thread.run_sync(replace_model, body, content_type, frame.model)
        return body, {"content-type": content_type, "accept": frame.headers.get("accept", "*/*")}

    async def _ask(self, body: bytes, headers: dict[str, str]) -> None:
        self._asked_engine = True
        async with self._engine.open_answer(self.frame.path, headers, body) as answer:
            self._status = answer.status
            try:
                await self._upload(answer)
            except _Discarded:
                pass
            except BrokerRefused as error:
                if self._config.cancel != "drain" or not error.is_over:
                    raise
            else:
                return
            # `cancel: drain`: the engine finishes, and the answer is thrown away.
            self.is_discarded = self.is_unwanted = self._cancelled = True
            async for _ in answer.chunks:
                pass

    async def _upload(self, answer: EngineAnswer) -> None:
        # The upload opens at the first byte: until then the broker may be telling the client to wait.
        first = await anext(answer.chunks, b"")
        if self.is_discarded:
            raise _Discarded("not wanted any more")
        if self._shared is not None and self._shared.is_open and await self._share(self._shared, answer, first):
            return
        chunks = _Chunks(self, first, answer.chunks)
        task_id, status, content_type = self.frame.task_id, answer.status, answer.content_type
        if self._config.upload == "chunks":
            drain = self._config.cancel == "drain"
            await send_in_pieces(self._broker, task_id, chunks, status=status, content_type=content_type, drain=drain)
        elif first:
            await self._broker.send_result(task_id, chunks, status=status, content_type=content_type)
        else:
            await self._broker.send_result(task_id, b"", status=status, content_type=content_type)

    async def _share(self, shared: SharedUpload, answer: EngineAnswer, first: bytes) -> bool:
        """Send an answer on the shared upload, if it is one for it; whether it has been sent at all."""
        task_id, status, content_type = self.frame.task_id, answer.status, sayable(answer.content_type)
        if not first or len(first) == answer.length:
            if given := shared.give(task_id, status, content_type, first):
                self.uploaded += len(first)
            return given
        if self.frame.stream or not _is_plain(content_type):
            return False
        if answer.length is not None and answer.length > MAX_ANSWER_BYTES:
            return False
        chunks = _Chunks(self, first, answer.chunks)
        await send_held(self._broker, shared, task_id, chunks, status=status, content_type=content_type)
        return True


def _is_plain(content_type: str | None) -> bool:
    """Whether the broker holds an answer of this type until it has all of it; others it passes on as they come."""
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if media_type.startswith("application/"):
        return media_type == "application/json" or media_type.endswith("+json")
    return media_type.startswith("text/") and media_type != "text/event-stream"
