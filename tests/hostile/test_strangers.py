"""Strangers who ask without a key, again and again, and read no answer: they hold nobody's place but each other's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
import trio.testing

from tests.http.served import JSON, Served, head, open_served, wait_until
from wakecall.config import BrokerConfig
from wakecall.http.barrier import BarrierSettings

PLACES = 8
BUFFER = 4096
#: What asks for enough that it does not fit between a server and a peer that reads nothing.
MANY = head("GET", "/openapi.json") * 400


@asynccontextmanager
async def strangers(served: Served, count: int) -> AsyncIterator[None]:
    """So many, each with an answer that it does not take."""
    async with AsyncExitStack() as stack:
        for _ in range(count):
            wire = await stack.enter_async_context(served.server.connect(receive_buffer=BUFFER))
            await wire.send(MANY)
        await wait_until(lambda: len(served.server.barrier.unread) == count)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert len(served.server.barrier.unread) == count
        yield


async def test_strangers_who_read_nothing_shut_nobody_out() -> None:
    """All places are theirs: a client with his key gets one at once, and so do a probe and a publisher."""
    settings = BarrierSettings(max_connections=PLACES, stranger_s=1000)
    async with open_served(settings=settings) as served:
        publisher = f"x-api-key: {(await served.broker.create_key('publisher')).secret}"
        client = f"x-api-key: {(await served.broker.create_key('client')).secret}"
        async with strangers(served, PLACES):
            assert (await served.ask("GET", "/v1/models", client)).status == 200
            assert (await served.ask("GET", "/healthz")).status == 200
            body = b'{"llms": [{"name": "qwen"}]}'
            answer = await served.ask("PUT", "/publisher/v1/sessions/laptop", publisher, JSON, body=body)
            assert answer.status == 200
        barrier = served.server.barrier
        await wait_until(lambda: not barrier.connections)
        assert (len(barrier.unread), len(barrier.idle), len(barrier.leaving)) == (0, 0, 0)


async def test_who_has_shown_a_key_is_not_sacrificed_for_others() -> None:
    """A slow reader with a key keeps his place, whatever knocks; and what strangers hold is not counted as clients'."""
    async with open_served(settings=BarrierSettings(max_connections=PLACES, stranger_s=1000)) as served:
        client = f"x-api-key: {(await served.broker.create_key('client')).secret}"
        barrier = served.server.barrier
        async with served.server.connect(receive_buffer=BUFFER) as slow:
            await slow.send(head("GET", "/v1/models", client))
            assert (await slow.read_answer()).status == 200
            await slow.send(MANY)
            await wait_until(lambda: not barrier.idle)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert not barrier.unread
            async with strangers(served, PLACES - 1):
                for _ in range(PLACES + 2):
                    assert (await served.ask("GET", "/v1/models", client)).status == 200
            assert (await slow.read_answer()).status == 200


@pytest.mark.parametrize("is_open", [False, True])
async def test_a_stranger_has_two_seconds_to_take_an_answer(mock_clock: trio.testing.MockClock, is_open: bool) -> None:
    """Then he is cut. On a broker without keys nobody is a stranger: there `peer_stall_s` rules."""
    async with open_served(BrokerConfig(), settings=BarrierSettings(), patience_s=1000) as served:
        if not is_open:
            await served.broker.create_key("admin")
        barrier = served.server.barrier
        async with served.server.connect(receive_buffer=BUFFER) as wire:
            await wire.send(MANY)
            await wait_until(lambda: len(barrier.connections) == 1 and not barrier.idle)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert len(barrier.unread) == (0 if is_open else 1)
            mock_clock.jump(1.9)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert len(barrier.connections) == 1
            mock_clock.jump(0.2)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert len(barrier.connections) == (1 if is_open else 0)
            assert not barrier.unread
