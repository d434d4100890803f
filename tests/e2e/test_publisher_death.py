"""`kill -9` of a publisher: nobody who waits for it is left hanging, and the broker keeps nothing of it."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import trio

from tests.e2e.clients import ask_chat, open_chat, start_crowd
from tests.e2e.scripted_engine import EVENT, ScriptedEngine, open_scripted_engine, wants_stream
from tests.e2e.stack import BrokerProcess, open_broker_process, open_publisher_process, within
from tests.http.wire import Wire

MANY = 100
#: Promised is a second; the rest is for a machine that has other things to do.
AT_ONCE_S = 3.0


async def start_answers(engine: ScriptedEngine) -> None:
    """Take all requests; give the streams a head and an event, the others nothing."""
    for exchange in await engine.take(MANY):
        if wants_stream(exchange):
            await exchange.start(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
            await exchange.send(EVENT)


async def read_until_event(wire: Wire) -> bytes:
    """The head and the first event of a streamed answer, as raw bytes."""
    read = b""
    while EVENT not in read:
        data = await wire.read_some()
        assert data, read
        read += data
    return read


@within(40)
async def test_kill_9_with_a_hundred_infers_in_flight(tmp_path: Path) -> None:
    """50 plain: a 503 each. 50 streams that had begun: an error event and a cut. All within a second; nothing is kept."""
    async with (
        open_broker_process(tmp_path / "w.db") as broker,
        open_scripted_engine() as engine,
        trio.open_nursery() as nursery,
    ):
        # What a first request opens for good is open now.
        await broker.list("llms")
        descriptors = broker.descriptors
        async with open_publisher_process(tmp_path, broker.url, engine.base_url, "--name", "m") as publisher:
            await broker.wait_llm("m", routable=True)
            plain = start_crowd(nursery, broker, "m", MANY // 2)
            begun, ended, times = Count(MANY // 2), [], []

            async def stream() -> None:
                async with open_chat(broker, "m", stream=True) as wire:
                    read = await read_until_event(wire)
                    begun.add()
                    rest = await wire.read_to_end()
                    times.append(time.monotonic())
                    ended.append(read + rest)

            async with trio.open_nursery() as streams:
                for _ in range(MANY // 2):
                    streams.start_soon(stream)
                await start_answers(engine)
                await begun.reached.wait()
                assert (await broker.llm("m"))["in_flight"] == MANY
                killed = time.monotonic()
                publisher.send(signal.SIGKILL)
            await plain.done.wait()
        assert plain.codes == {(503, "publisher_disconnected")}
        assert {answer.headers.get("x-should-retry") for answer in plain.answers} == {"false"}
        assert len(ended) == MANY // 2
        for read in ended:
            events = read.partition(EVENT)[2]
            assert b"event: error\n" in events
            # Which of its connections the broker sees end first is the kernel's choice.
            assert b'"publisher_disconnected"' in events or b'"publisher_error"' in events
            assert b"[DONE]" not in events
            assert not read.endswith(b"0\r\n\r\n"), "the end must not look clean"
        assert max(*plain.times, *times) - killed < AT_ONCE_S

        row = await broker.llm("m")
        assert (row["status"], row["routable"], row["in_flight"], row["waiting"]) == ("inactive", False, 0, 0)
        assert await broker.list("tasks") == []
        assert [session["connected"] for session in await broker.list("sessions")] == [False]
        await check_counters(broker)
        await broker.wait_descriptors(descriptors)
        assert (await ask_chat(broker, "m")).code == "model_offline"


async def check_counters(broker: BrokerProcess) -> None:
    counted = await broker.metrics()
    assert counted["wakecall_infers_accepted_total"] == MANY
    assert counted["wakecall_infers_ended_total{outcome=failed}"] == MANY
    assert counted["wakecall_infers_in_flight"] == counted["wakecall_infers_waiting"] == 0
    assert counted["wakecall_channels"] == 0


class Count:
    """An event that comes when something has happened so often."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.reached = trio.Event()

    def add(self) -> None:
        self.wanted -= 1
        if self.wanted == 0:
            self.reached.set()
