"""What the broker's tests say over and over."""

from collections.abc import Iterable

import trio

from wakecall import Broker, InferRequest, Reply, Status, WakecallError
from wakecall.models import Event, LLMView

CALL = InferRequest("/v1/chat/completions", b'{"model":"qwen"}')
STREAM = InferRequest("/v1/chat/completions", b'{"model":"qwen","stream":true}', stream=True)


class Call:
    """One client's call, in a task of its own.

    Args:
        reads: False: it takes the head and then stands still.
    """

    def __init__(self, broker: Broker, name: str, request: InferRequest, reads: bool) -> None:
        self._broker = broker
        self._name = name
        self._request = request
        self._scope = trio.CancelScope()
        self._reads = trio.Event()
        if reads:
            self._reads.set()
        self.reply: Reply | None = None
        self.headed = trio.Event()
        self.body: bytes | None = None
        self.error: WakecallError | None = None
        self.over = trio.Event()
        self.over_at = -1.0

    async def run(self) -> None:
        try:
            with self._scope:
                async with self._broker.infer(self._name, self._request) as self.reply:
                    self.headed.set()
                    await self._reads.wait()
                    self.body = await self.reply.read()
        except WakecallError as error:
            self.error = error
        finally:
            self.over_at = trio.current_time()
            self.over.set()

    def leave(self) -> None:
        self._scope.cancel()

    def read_on(self) -> None:
        self._reads.set()

    @property
    def code(self) -> str | None:
        return None if self.error is None else self.error.code


def start_call(
    nursery: trio.Nursery, broker: Broker, name: str = "qwen", request: InferRequest = CALL, *, reads: bool = True
) -> Call:
    call = Call(broker, name, request, reads)
    nursery.start_soon(call.run)
    return call


async def start_calls(nursery: trio.Nursery, broker: Broker, count: int, name: str = "qwen") -> list[Call]:
    """So many calls, in this order, each as far as it gets."""
    calls = []
    for _ in range(count):
        calls.append(start_call(nursery, broker, name))
        await trio.testing.wait_all_tasks_blocked()
    return calls


def statuses(broker: Broker) -> dict[str, Status]:
    return {llm.name: llm.status for llm in broker.llms()}


def view(broker: Broker, name: str = "qwen") -> LLMView:
    return broker.llm_view(name)


def observe(broker: Broker) -> list[Event]:
    events: list[Event] = []
    broker.add_observer(events.append)
    return events


def codes(calls: Iterable[Call]) -> set[str | None]:
    return {call.code for call in calls}
