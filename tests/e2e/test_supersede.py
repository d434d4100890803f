"""Two channels of one session: the newer one is it, and the older one's end touches nothing of the newer."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from tests.e2e.clients import ask_chat, open_chat, start_crowd
from tests.e2e.scripted_engine import EVENT, open_scripted_engine
from tests.e2e.stack import BrokerProcess, open_broker_process, open_publisher_process, within
from tests.e2e.wire_publisher import WireChannel, WirePublisher, open_wire_publisher

STALL_S = 3


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[BrokerProcess]:
    async with open_broker_process(tmp_path / "w.db", peer_stall_s=STALL_S) as broker:
        yield broker


async def check_takeover(
    broker: BrokerProcess, publisher: WirePublisher, old: WireChannel, *, old_is_silent: bool = False
) -> None:
    """A plain and a streamed infer are in flight on `old`, another one queues; then a second channel opens."""
    async with trio.open_nursery() as nursery, open_chat(broker, "m", stream=True) as streamed:
        stream_frame = await old.next("infer")
        async with publisher.open_result(stream_frame) as upload:
            await upload.send(EVENT)
            read = b""
            while EVENT not in read:
                read += await streamed.read_some()
            plain = start_crowd(nursery, broker, "m", 1)
            plain_frame = await old.next("infer")
            queued = start_crowd(nursery, broker, "m", 1)
            await broker.wait_llm("m", in_flight=2, waiting=1)
            if old_is_silent:
                old.fall_silent()
            started = time.monotonic()
            async with publisher.open_channel() as new:
                # What queued goes out on the new one, of which nothing else is seen.
                frame = await new.next("infer")
                await plain.done.wait()
                assert plain.codes == {(503, "publisher_disconnected")}
                rest = await streamed.read_to_end()
                assert b"event: error\n" in rest
                assert b'"publisher_disconnected"' in rest
                assert time.monotonic() - started < 3
                assert (await publisher.result(frame, b'{"ok": 1}')).status == 200
                await queued.done.wait()
                assert queued.codes == {(200, "")}

                late = await publisher.result(plain_frame, b'{"ok": 0}')
                assert (late.status, late.code) == (410, "task_cancelled")
                assert (await upload.answer()).status == 410
                if old_is_silent:
                    assert "bye" not in old.events, "it hears after all"
                else:
                    await old.ended.wait()
                    assert old.frames[-1] == ("bye", {"reason": "superseded"})
                    old.reset()

                row = await broker.llm("m")
                assert (row["status"], row["routable"], row["in_flight"]) == ("active", True, 0)
                nursery.start_soon(answer_next, publisher, new)
                assert (await ask_chat(broker, "m")).status == 200
                assert new.events == ["hello", "infer", "infer"]
                (session,) = await broker.list("sessions")
                assert (session["connected"], session["epoch"]) == (True, new.frames[0][1]["epoch"])


async def answer_next(publisher: WirePublisher, channel: WireChannel) -> None:
    assert (await publisher.result(await channel.next("infer"), b'{"ok": 2}')).status == 200


@within(40)
async def test_a_second_channel_takes_over_while_infers_are_in_flight(broker: BrokerProcess) -> None:
    """Both ends alive: the old one hears `superseded`, its infers fail, what queued and what comes goes to the new."""
    async with open_wire_publisher(broker, {"name": "m", "max_concurrency": 2}) as (publisher, old):
        await check_takeover(broker, publisher, old)
    await broker.wait_llm("m", status="inactive")


@within(40)
async def test_a_half_open_channel_is_taken_over_at_once(broker: BrokerProcess) -> None:
    """The old machine's network is gone, no FIN will ever come: the new channel waits for nothing; nor does the socket."""
    row = {"name": "m", "max_concurrency": 2}
    async with open_wire_publisher(broker, row, is_straight=True) as (publisher, old):
        address = old.wire.stream.socket.getsockname()
        assert broker.holds(address)
        await check_takeover(broker, publisher, old, old_is_silent=True)
        await broker.wait_let_go(address)
        assert old.events == ["hello", "infer", "infer"]


@within(40)
async def test_of_two_publish_processes_with_one_session_the_first_stops(broker: BrokerProcess, tmp_path: Path) -> None:
    """It says that another one took its place, and exits; the second one serves."""
    async with open_scripted_engine() as engine:
        arguments = broker.url, engine.base_url, "--name", "m", "--session", "shared"
        async with open_publisher_process(tmp_path / "one", *arguments) as first:
            await broker.wait_llm("m", routable=True)
            async with open_publisher_process(tmp_path / "two", *arguments) as second:
                assert await first.wait() == 1
                await first.wait_line("took its place", first.err)
                await broker.wait_llm("m", routable=True, status="active")
                async with trio.open_nursery() as nursery:
                    crowd = start_crowd(nursery, broker, "m", 1)
                    await (await engine.next()).respond_json(200, {"from": "the second"})
                assert crowd.codes == {(200, "")}
                assert second.process.returncode is None


@within(40)
async def test_an_evicted_publisher_stops_and_says_so(broker: BrokerProcess, tmp_path: Path) -> None:
    """It does not come back by itself."""
    async with open_scripted_engine() as engine:
        async with open_publisher_process(
            tmp_path, broker.url, engine.base_url, "--name", "m", "--session", "mine"
        ) as publisher:
            await broker.wait_llm("m", routable=True)
            assert (await broker.ask("DELETE", "/admin/v1/sessions/mine")).status == 204
            assert await publisher.wait() == 1
            await publisher.wait_line("evicted", publisher.err)
        assert (await broker.llm("m"))["status"] == "inactive"
