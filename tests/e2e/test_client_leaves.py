"""A client that leaves takes its work with it: one `cancel` frame, the engine stopped, the slot free."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio

from tests.e2e.clients import ask_chat, open_chat
from tests.e2e.engine import Engine
from tests.e2e.stack import (
    POLL_S,
    BrokerProcess,
    clean_environment,
    open_broker_process,
    open_process,
    open_publisher_process,
    open_tap,
    within,
)
from tests.e2e.wire_publisher import open_wire_publisher


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[BrokerProcess]:
    async with open_broker_process(tmp_path / "w.db") as broker:
        yield broker


@asynccontextmanager
async def open_demo_engine(state: Path, delay_s: float) -> AsyncIterator[str]:
    """The demo's engine, which notices at once that its client has left, plain or streaming."""
    command = [sys.executable, "-m", "wakecall.cli.demo_engine", "--port", "0", "--delay-s", str(delay_s)]
    async with open_process("demo engine", command, clean_environment(state)) as running:
        yield (await running.wait_line(r"http://\S+", running.out))[0]


async def wait_health(url: str, **members: int) -> None:
    """Return once the demo engine counts so."""
    seen: dict[str, Any] = {}
    async with httpx2.AsyncClient(trust_env=False) as http:
        while not all(seen.get(name) == value for name, value in members.items()):
            seen = (await http.get(f"{url}/health")).raise_for_status().json()
            await trio.sleep(POLL_S)


@within(40)
async def test_a_streaming_client_that_leaves_stops_llama_cpp(
    broker: BrokerProcess, engine: Engine, tmp_path: Path
) -> None:
    """One cancel frame, llama.cpp's slot idle long before the answer's end, and the row's only slot free."""
    async with open_tap(broker.port) as tap:
        async with open_publisher_process(
            tmp_path, tap.url, engine.base_url, "--name", "noise", "--model", engine.model, "--max-concurrency", "1"
        ):
            await broker.wait_llm("noise", routable=True)
            await engine.wait_busy(0)
            before = await engine.tokens_predicted()
            async with open_chat(broker, "noise", stream=True, max_tokens=15_000) as wire:
                while b"data: " not in await wire.read_some():
                    pass
                assert await engine.busy_slots() == 1
            await engine.wait_busy(0)
            assert await engine.tokens_predicted() - before < 15_000
            await broker.wait_llm("noise", in_flight=0)
            assert (await ask_chat(broker, "noise")).status == 200
            assert (tap.frames("infer"), tap.frames("cancel")) == (2, 1)
            assert b'"reason":"client_disconnected"' in tap.down.replace(b" ", b"")
    assert (await broker.metrics())["wakecall_infers_ended_total{outcome=cancelled}"] == 1


@pytest.mark.parametrize("upload", ["stream", "chunks"])
@within(40)
async def test_a_plain_client_that_leaves_closes_the_engines_connection(
    broker: BrokerProcess, tmp_path: Path, upload: str
) -> None:
    """Nothing had come back yet: the engine's client leaves all the same, and the next caller has the slot."""
    async with open_demo_engine(tmp_path, 0.05) as engine, open_tap(broker.port) as tap:
        async with open_publisher_process(
            tmp_path, tap.url, engine, "--name", "m", "--max-concurrency", "1", "--upload", upload
        ):
            await broker.wait_llm("m", routable=True)
            async with open_chat(broker, "m", max_tokens=10_000):
                await wait_health(engine, generating=1)
            await wait_health(engine, abandoned=1)
            await broker.wait_llm("m", in_flight=0)
            assert (await ask_chat(broker, "m")).status == 200
            assert (tap.frames("infer"), tap.frames("cancel")) == (2, 1)


@within(40)
async def test_who_leaves_the_queue_or_a_wake_just_leaves(broker: BrokerProcess) -> None:
    """No frame had been sent for them, so none is sent now; the wake goes on, and its result counts."""
    rows = {"name": "m", "max_concurrency": 1}, {"name": "sleeper", "status": "hibernating"}
    async with open_wire_publisher(broker, *rows) as (publisher, channel):
        async with open_chat(broker, "m") as first:
            infer = await channel.next("infer")
            async with open_chat(broker, "m"):
                await broker.wait_llm("m", in_flight=1, waiting=1)
            await broker.wait_llm("m", in_flight=1, waiting=0)
            assert (await publisher.result(infer, b"{}")).status == 200
            assert (await first.read_answer("POST")).status == 200

        async with open_chat(broker, "sleeper"):
            wake = await channel.next("wake")
            await broker.wait_llm("sleeper", waiting=1)
        await broker.wait_llm("sleeper", waiting=0, waking=True)
        assert (await publisher.result(wake)).status == 200
        assert (await broker.llm("sleeper"))["status"] == "active"
        assert channel.events == ["hello", "infer", "wake"]
    counted = await broker.metrics()
    assert counted["wakecall_infers_ended_total{outcome=cancelled}"] == 2
