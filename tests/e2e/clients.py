"""Clients that are looked at closely: raw requests, and many of them at once."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from tests.e2e.stack import BrokerProcess
from tests.http.wire import Answer, Wire, request_bytes

QUESTION = [{"role": "user", "content": "How is a machine called that nobody can call?"}]


def chat(model: str, **members: Any) -> dict[str, Any]:
    """The body of a chat completion."""
    return {"model": model, "messages": QUESTION, "max_tokens": 8, **members}


def chat_request(broker: BrokerProcess, model: str, path: str = "/v1/chat/completions", **members: Any) -> bytes:
    """It as a whole HTTP request."""
    body = json.dumps(chat(model, **members)).encode()
    return request_bytes("POST", path, "content-type: application/json", body=body, host=f"127.0.0.1:{broker.port}")


async def ask_chat(broker: BrokerProcess, model: str, **members: Any) -> Answer:
    """One chat completion on a connection of its own."""
    async with broker.connect() as wire:
        await wire.send(chat_request(broker, model, **members))
        return await wire.read_answer("POST")


@asynccontextmanager
async def open_chat(broker: BrokerProcess, model: str, **members: Any) -> AsyncIterator[Wire]:
    """One that has been asked and not been read; leaving the block is the client's leaving."""
    async with broker.connect() as wire:
        await wire.send(chat_request(broker, model, **members))
        yield wire


@dataclass
class Crowd:
    """Clients that ask at once.

    Attributes:
        answers: of those that are done, and when each came (`time.monotonic`).
    """

    count: int
    answers: list[Answer] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    done: trio.Event = field(default_factory=trio.Event)

    def add(self, answer: Answer) -> None:
        self.answers.append(answer)
        self.times.append(time.monotonic())
        if len(self.answers) == self.count:
            self.done.set()

    @property
    def codes(self) -> set[tuple[int, str]]:
        """Status and error code of all answers."""
        return {(answer.status, answer.code if answer.status >= 400 else "") for answer in self.answers}


def start_crowd(
    nursery: trio.Nursery,
    broker: BrokerProcess,
    model: str,
    count: int,
    members: Callable[[int], dict[str, Any]] | None = None,
) -> Crowd:
    """`count` clients, each with a connection and a chat completion of its own."""
    crowd = Crowd(count)

    async def ask(index: int) -> None:
        crowd.add(await ask_chat(broker, model, **(members(index) if members else {})))

    for index in range(count):
        nursery.start_soon(ask, index)
    return crowd
