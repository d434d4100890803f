"""More connections than descriptors: nobody who is being served notices, who asks is answered, and nothing spins."""

from __future__ import annotations

import os
import resource
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import trio

from tests.e2e.clients import chat_request
from tests.e2e.stack import PATIENCE_S, POLL_S, BrokerProcess, open_broker_process, within
from tests.e2e.wire_publisher import WirePublisher, open_wire_publisher
from tests.faults.live import open_live
from tests.http.wire import Wire, request_bytes

#: Descriptors that the broker may have in all.
LIMIT = 200
LIMITED = ("prlimit", f"--nofile={LIMIT}")
SHORTAGE = "no connection can be accepted"


class Window:
    """A stretch of the broker's time: what it cost, measured over comments that come every `keepalive_s`."""

    def __init__(self, broker: BrokerProcess, wire: Wire) -> None:
        self._broker = broker
        self._wire = wire

    async def cost(self, comments: int) -> float:
        """Seconds of a processor that the broker used until so many comments had come."""
        before, seen = self._broker.cpu_s, 0
        with trio.fail_after(PATIENCE_S):
            while seen < comments:
                piece = await self._wire.read_some()
                assert piece, "the channel ended"
                seen += piece.count(b"\n:")
        return self._broker.cpu_s - before


async def open_window(broker: BrokerProcess, stack: AsyncExitStack) -> Window:
    publisher = WirePublisher(broker, "window")
    assert (await publisher.register()).status == 200
    wire = await stack.enter_async_context(broker.connect())
    await wire.send(request_bytes("GET", "/publisher/v1/sessions/window/frames", host=f"127.0.0.1:{broker.port}"))
    return Window(broker, wire)


def assert_no_trouble(broker: BrokerProcess) -> None:
    assert not [line for line in broker.err if "Traceback" in line or SHORTAGE in line]


@within(60)
async def test_a_flood_of_silent_connections_disturbs_nobody(tmp_path: Path) -> None:
    """Three hundred that say nothing, with two hundred descriptors: the stream goes on, and so does all that is new."""
    async with (
        open_broker_process(tmp_path / "w.db", under=LIMITED, keepalive_s=0.2) as broker,
        open_live(broker) as live,
        AsyncExitStack() as stack,
    ):
        window = await open_window(broker, stack)
        most = 0
        async with AsyncExitStack() as flood:
            for number in range(300):
                await flood.enter_async_context(broker.connect())
                if number % 50 == 49:
                    await live.go_on()
                    assert (await broker.ask("GET", "/healthz")).status == 200
                    most = max(most, broker.descriptors)
            assert (await WirePublisher(broker, "new").register("new")).status == 200
            # Nothing happens now but a comment every 0.2 s.
            assert await window.cost(5) < 0.4
            most = max(most, broker.descriptors)
        assert LIMIT / 2 < most < LIMIT - 20, most
        await live.go_on()
        await live.finish()
        await broker.wait_descriptors(30)
        assert_no_trouble(broker)


@within(60)
async def test_more_clients_than_connections_are_told_so_and_the_others_served(tmp_path: Path) -> None:
    """Each hears 503 `too_many_connections` or gets its whole answer; publishers and probes still find room meanwhile."""
    clients, outcomes, release = 250, Counter[str](), trio.Event()
    async with (
        open_broker_process(tmp_path / "w.db", under=LIMITED) as broker,
        open_live(broker) as live,
        open_wire_publisher(broker, "slow") as (publisher, channel),
        trio.open_nursery() as nursery,
    ):

        async def ask(task_status: trio.TaskStatus[None]) -> None:
            try:
                async with broker.connect() as wire:
                    try:
                        await wire.send(chat_request(broker, "slow"))
                    finally:
                        task_status.started()
                    answer = await wire.read_answer("POST")
            except trio.BrokenResourceError:
                outcomes["reset"] += 1
            else:
                outcomes[answer.code if answer.status >= 400 else str(answer.status or "cut")] += 1

        async def publish() -> None:
            await release.wait()
            while True:
                assert (await publisher.result(await channel.next("infer"), b"{}")).status == 200

        nursery.start_soon(publish)
        async with trio.open_nursery() as crowd:
            for _ in range(clients):
                await crowd.start(ask)  # one has asked before the next one knocks
            with trio.fail_after(PATIENCE_S):
                while len(tasks := await broker.list("tasks")) + outcomes.total() < clients + 1:
                    await trio.sleep(POLL_S)
            taken = len(tasks) - 1  # the other one is the long stream
            # Whoever was so slow to ask that others came first finds his connection closed, having been served nothing; how
            # many those are is this machine's doing.
            assert outcomes["too_many_connections"] > 0
            assert set(outcomes) <= {"too_many_connections", "cut", "reset"}
            assert broker.descriptors < LIMIT
            assert (await broker.ask("GET", "/healthz")).status == 200
            assert (await live.publisher.heartbeat()).status == 200
            release.set()
        assert outcomes["200"] == taken > LIMIT / 8
        await live.go_on()
        await live.finish()
        assert_no_trouble(broker)
        nursery.cancel_scope.cancel()


@within(60)
async def test_without_any_descriptor_left_those_connected_go_on_and_those_who_knock_wait(tmp_path: Path) -> None:
    """One line of the log, hardly any work; as soon as somebody leaves, whoever waited is answered."""
    async with open_broker_process(tmp_path / "w.db", keepalive_s=0.2) as broker, AsyncExitStack() as stack:
        window = await open_window(broker, stack)
        host = f"127.0.0.1:{broker.port}"
        async with open_wire_publisher(broker, "m") as (_, channel), AsyncExitStack() as leaving:
            client, results, control = [await stack.enter_async_context(broker.connect()) for _ in range(3)]
            for wire in (client, results, control):
                await wire.send(request_bytes("GET", "/healthz", host=host))
                assert (await wire.read_answer()).status == 200
            for _ in range(10):
                wire = await leaving.enter_async_context(broker.connect())
                await wire.send(request_bytes("GET", "/healthz", host=host))
                assert (await wire.read_answer()).status == 200

            # The lowest number that is free: from now on the kernel gives out none.
            taken = {int(name) for name in os.listdir(f"/proc/{broker.pid}/fd")}
            soft = next(number for number in range(len(taken) + 1) if number not in taken)
            hard = resource.prlimit(broker.pid, resource.RLIMIT_NOFILE)[1]
            resource.prlimit(broker.pid, resource.RLIMIT_NOFILE, (soft, hard))

            knocking = await stack.enter_async_context(broker.connect())
            await knocking.send(request_bytes("GET", "/healthz", host=host))
            await broker.wait_line(SHORTAGE, broker.err)
            assert await window.cost(8) < 0.4
            for number in range(5):
                await client.send(chat_request(broker, "m"))
                frame = await channel.next("infer")
                target = f"/publisher/v1/tasks/{frame['task_id']}/result"
                await results.send(request_bytes("POST", target, "content-type: text/plain", body=b"yes", host=host))
                assert (await results.read_answer("POST")).json == {"outcome": "completed"}
                assert (await client.read_answer("POST")).body == b"yes"
                body = b'{"llms": [{"name": "new-%d"}]}' % number
                await control.send(request_bytes("PUT", "/publisher/v1/sessions/new", body=body, host=host))
                assert (await control.read_answer("PUT")).status == 200
            assert not [line for line in broker.err if "Traceback" in line]
            assert len([line for line in broker.err if SHORTAGE in line]) == 1

            await leaving.aclose()
            with trio.fail_after(PATIENCE_S):
                assert (await knocking.read_answer()).status == 200
            assert (await broker.ask("GET", "/readyz")).status == 200
            assert not channel.ended.is_set()
