"""How `wakecall serve` and `wakecall publish` begin and end."""

from __future__ import annotations

import signal
from contextlib import AsyncExitStack
from pathlib import Path

import trio

from tests.e2e.clients import ask_chat, open_chat, start_crowd
from tests.e2e.scripted_engine import EVENT, open_scripted_engine
from tests.e2e.stack import open_broker_process, open_publisher_process, open_tap, run_to_end, within
from tests.e2e.way import agents_way
from tests.e2e.wire_publisher import WirePublisher
from tests.http.wire import request_bytes


@within(40)
async def test_serve_ends_at_once_with_idle_channels(tmp_path: Path) -> None:
    """Promised is well under a second: ten channels and twenty idle connections hold nothing up."""
    async with open_broker_process(tmp_path / "w.db") as broker, AsyncExitStack() as stack:
        channels = []
        for index in range(10):
            publisher = WirePublisher(broker, f"s{index}")
            assert (await publisher.register(f"m{index}")).status == 200
            channels.append(await stack.enter_async_context(publisher.open_channel()))
        for _ in range(20):
            wire = await stack.enter_async_context(broker.connect())
            await wire.send(request_bytes("GET", "/v1/models", host=f"127.0.0.1:{broker.port}"))
            assert (await wire.read_answer()).status == 200
        code, seconds = await broker.end(signal.SIGTERM)
        assert code == 0
        assert seconds < 2
        for channel in channels:
            await channel.ended.wait()
            assert channel.frames[-1] == ("bye", {"reason": "shutdown"})


@within(40)
async def test_what_is_in_flight_has_the_grace(tmp_path: Path) -> None:
    """A stream under way may end while the broker stops; a new call is refused meanwhile; then it ends, at once."""
    async with open_broker_process(tmp_path / "w.db", arguments=("--grace", "20")) as broker:
        publisher = WirePublisher(broker)
        assert (await publisher.register("m")).status == 200
        async with publisher.open_channel() as channel, open_chat(broker, "m", stream=True) as client:
            async with publisher.open_result(await channel.next("infer")) as upload:
                await upload.send(EVENT)
                while EVENT not in await client.read_some():
                    pass
                broker.send(signal.SIGTERM)
                # A call that overtakes the signal would be taken, and wait for its answer.
                while (await broker.ask("GET", "/readyz")).status != 503:
                    pass
                refused = await ask_chat(broker, "m")
                assert (refused.status, refused.code) == (503, "shutting_down")
                assert refused.headers["retry-after"] == "5"
                await upload.send(b"data: [DONE]\n\n")
                assert (await upload.finish()).status == 200
            rest = await client.read_to_end()
            assert b"data: [DONE]\n\n" in rest
            assert rest.endswith(b"0\r\n\r\n")
            assert await broker.wait() == 0


@within(40)
async def test_a_second_signal_skips_the_grace(tmp_path: Path) -> None:
    """What is in flight gets its error then, and the process ends."""
    async with open_broker_process(tmp_path / "w.db", arguments=("--grace", "30")) as broker:
        publisher = WirePublisher(broker)
        assert (await publisher.register("m")).status == 200
        async with publisher.open_channel() as channel, trio.open_nursery() as nursery:
            crowd = start_crowd(nursery, broker, "m", 1)
            await channel.next("infer")
            broker.send(signal.SIGTERM)
            await broker.wait_line("stopping", broker.err)
            code, seconds = await broker.end(signal.SIGTERM)
            assert (code, seconds < 3) == (0, True)
            await crowd.done.wait()
            assert crowd.codes == {(503, "shutting_down")}
            await channel.ended.wait()
            assert channel.events[-2:] == ["cancel", "bye"]


@within(40)
async def test_serve_refuses_every_bind_but_loopback(tmp_path: Path) -> None:
    """Exit 78, with the reason on stderr and nothing on stdout."""
    for host in ("0.0.0.0", "::"):
        code, out, err = await run_to_end("serve", "--host", host, "--port", "0", "--db", ":memory:", state=tmp_path)
        assert (code, out) == (78, "")
        assert host in err
        assert "key" in err


@within(40)
async def test_publish_drains_and_says_goodbye(tmp_path: Path) -> None:
    """SIGTERM with an infer in flight: no new ones, that one ends well, then the session is gone, and exit 0."""
    async with open_scripted_engine() as engine, open_broker_process(tmp_path / "w.db") as broker:
        async with open_tap(broker.port) as tap, trio.open_nursery() as nursery:
            async with open_publisher_process(tmp_path, tap.url, engine.base_url, "--name", "m") as publisher:
                await broker.wait_llm("m", routable=True)
                crowd = start_crowd(nursery, broker, "m", 1)
                exchange = await engine.next()
                publisher.send(signal.SIGTERM)
                await broker.wait_llm("m", status="inactive", in_flight=1)
                assert (await ask_chat(broker, "m")).code == "model_offline"
                assert publisher.process.returncode is None
                await exchange.respond_json(200, {"ok": True})
                await crowd.done.wait()
                assert crowd.codes == {(200, "")}
                assert await publisher.wait() == 0
            assert b"DELETE /publisher/v1/sessions/" in tap.up
            assert tap.frames("cancel") == 0
            assert b'"reason":"goodbye"' in tap.down.replace(b" ", b"")
            row = await broker.llm("m")
            assert (row["status"], row["routable"]) == ("inactive", False)
            assert await broker.list("sessions") == []


@within(40)
async def test_a_second_agent_for_the_same_engine_exits_78(tmp_path: Path) -> None:
    """It says so, and does not disturb the first."""
    async with open_scripted_engine() as engine, open_broker_process(tmp_path / "w.db") as broker:
        async with open_publisher_process(tmp_path, broker.url, engine.base_url, "--name", "m") as first:
            before = await broker.wait_llm("m", routable=True)
            url = await agents_way(broker.url)
            code, out, err = await run_to_end(
                "publish", "--broker", url, "--engine", engine.base_url, "--name", "n", state=tmp_path
            )
            assert (code, out) == (78, "")
            assert "another publisher is running" in err.lower()
            assert (await broker.llm("m"))["session_id"] == before["session_id"]
            assert await broker.llm("n") == {}
            assert first.process.returncode is None


@within(40)
async def test_a_publisher_keeps_its_session_over_restarts(tmp_path: Path) -> None:
    """Sticky: killed and started again, it takes its own rows back at once."""
    async with open_scripted_engine() as engine, open_broker_process(tmp_path / "w.db") as broker:
        sessions = []
        for _ in range(2):
            async with open_publisher_process(tmp_path, broker.url, engine.base_url) as publisher:
                sessions.append((await broker.wait_llm("m", routable=True))["session_id"])
                publisher.send(signal.SIGKILL)
            await broker.wait_llm("m", status="inactive", routable=False)
        assert sessions[0] == sessions[1]
        assert len(await broker.list("sessions")) == 1
