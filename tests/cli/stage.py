"""What the verbs meet: a broker of this process, an engine behind it, or something that is no broker at all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

import httpx2
import trio

from wakecall import Broker, BrokerConfig, ServeConfig, open_broker, serve
from wakecall.cli.demo_engine import serve_demo_engine


@dataclass
class Stage:
    """A broker and an engine; `args` is what a publisher between them needs."""

    broker: Broker
    url: str
    engine_url: str

    @property
    def args(self) -> tuple[str, ...]:
        return ("publish", "--broker", self.url, "--engine", self.engine_url)

    async def chat(self, name: str, prompt: str = "hi") -> httpx2.Response:
        return await post_chat(self.url, name, prompt)

    def statuses(self) -> dict[str, str]:
        return {llm.name: str(llm.status) for llm in self.broker.llms()}


async def post_chat(url: str, name: str, prompt: str = "hi", *, key: str | None = None) -> httpx2.Response:
    """One chat completion."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    async with httpx2.AsyncClient(base_url=url, timeout=None) as http:
        body = {"model": name, "messages": [{"role": "user", "content": prompt}]}
        return await http.post("/v1/chat/completions", json=body, headers=headers)


@asynccontextmanager
async def serve_broker(config: BrokerConfig | None = None) -> AsyncIterator[tuple[Broker, str]]:
    """An open broker on a free port, and its address."""
    async with open_broker(config=config) as broker, trio.open_nursery() as nursery:
        urls = await nursery.start(partial(serve, broker, ServeConfig(port=0)))
        yield broker, urls[0]
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_engine(delay_s: float = 0.0) -> AsyncIterator[str]:
    """The demo's engine on a free port: its address."""
    async with trio.open_nursery() as nursery:
        port = await nursery.start(partial(serve_demo_engine, delay_s=delay_s))
        yield f"http://127.0.0.1:{port}"
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_stage(delay_s: float = 0.0, config: BrokerConfig | None = None) -> AsyncIterator[Stage]:
    async with serve_broker(config) as (broker, url), open_engine(delay_s) as engine_url:
        yield Stage(broker, url, engine_url)


@asynccontextmanager
async def serve_answer(status: int, body: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Something that gives everybody the same answer: its address, and what it was sent."""
    heard: list[bytes] = []

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            heard.append(bytes(await stream.receive_some()))
            head = f"HTTP/1.1 {status} x\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            await stream.send_all(head.encode() + body)
            # What it has not read would make its closing a reset, and that may overtake the answer.
            with suppress(trio.BrokenResourceError):
                await stream.send_eof()
                while await stream.receive_some():
                    pass

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, answer, 0, host="127.0.0.1"))
        yield f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}", heard
        nursery.cancel_scope.cancel()
