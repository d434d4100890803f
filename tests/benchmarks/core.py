"""What an infer costs in the broker itself, without HTTP: CPU time, beside the start and the join of a Trio task."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

import trio

from wakecall import InferRequest, open_broker
from wakecall.broker import Broker
from wakecall.frames import encode
from wakecall.http.metrics import Metrics
from wakecall.http.sniff import sniff
from wakecall.models import LLMSpec
from wakecall.session import Channel
from wakecall.task import Infer

from .report import Figure

__all__ = ["GROUP", "measure"]

GROUP: Final = "core"

#: Infers of one turn. In line they are many more than there are slots.
_BATCH: Final = 500

_BODY: Final = json.dumps({"model": "bench", "messages": [{"role": "user", "content": "z" * 330}]}).encode()
_ANSWER: Final = json.dumps(
    {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "y" * 200}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 90, "completion_tokens": 50, "total_tokens": 140},
    }
).encode()


@dataclass(frozen=True, slots=True)
class _Scene:
    """A broker with keys, usage and metrics, and one row whose channel is read here."""

    broker: Broker
    secret: str
    channel: Channel

    async def send(self) -> None:
        """Infers that find a free slot: from the key to the whole answer."""
        for _ in range(_BATCH):
            infer = self._accept()
            (frame,) = await self.channel.receive()
            await self._answer(infer.task_id)
            assert await (await infer.wait_head()).read() == _ANSWER
            infer.cancel()
            encode(frame)

    async def queue(self) -> None:
        """The same, all at once: nearly all of them wait in the line first."""
        infers = [self._accept() for _ in range(_BATCH)]
        done = 0
        while done < _BATCH:
            for frame in await self.channel.receive():
                encode(frame)
                await self._answer(frame.data["task_id"])
                done += 1
        for infer in infers:
            assert await (await infer.wait_head()).read() == _ANSWER
            infer.cancel()

    def _accept(self) -> Infer:
        with self.broker.claim(self.broker.authenticate(self.secret)) as claim:
            return self.broker.infer_nowait("bench", InferRequest("/v1/chat/completions", _BODY), claim=claim)

    async def _answer(self, task_id: str) -> None:
        await self.broker.complete(task_id, _ANSWER, content_type="application/json")


async def _spawn() -> None:
    for _ in range(_BATCH):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.lowlevel.checkpoint)


async def _sniff() -> None:
    for _ in range(_BATCH):
        sniff(_BODY, "application/json", b"key")


async def _take_times(works: dict[str, Callable[[], Awaitable[None]]], seconds: float) -> dict[str, float]:
    """Microseconds of CPU that one of each takes, all of them in turn until the time is over."""
    spent, batches = dict.fromkeys(works, 0.0), 0
    for work in works.values():
        await work()
    until = time.monotonic() + seconds
    while not batches or time.monotonic() < until:
        batches += 1
        for name, work in works.items():
            begun = time.process_time()
            await work()
            spent[name] += time.process_time() - begun
    return {name: each / (batches * _BATCH) * 1e6 for name, each in spent.items()}


async def _run(seconds: float) -> dict[str, float]:
    async with open_broker() as broker:
        Metrics(broker)
        secret = (await broker.create_key("client", max_in_flight=100_000)).secret
        await broker.register("bench", [LLMSpec("bench", max_concurrency=8)])
        async with broker.open_channel("bench") as channel:
            await channel.receive()
            scene = _Scene(broker, secret, channel)
            works = {
                "task": _spawn,
                "infer that is sent at once": scene.send,
                "infer that waits in line": scene.queue,
                "look into a body of 400 bytes": _sniff,
            }
            return await _take_times(works, seconds)


def measure(seconds: float) -> list[Figure]:
    """One round, in this process."""
    took = trio.run(partial(_run, seconds))
    floor = took.pop("task")
    return [Figure(f"core: {name}", "µs of CPU", ours, floor, ours / floor) for name, ours in took.items()]
