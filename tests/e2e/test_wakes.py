"""A call wakes what sleeps: real commands, a real engine, fifty callers at once."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from pathlib import Path

import pytest
import trio

from tests.e2e.clients import ask_chat, start_crowd
from tests.e2e.engine import engine_command
from tests.e2e.stack import (
    POLL_S,
    BrokerProcess,
    closed_port,
    kill_all_in,
    open_broker_process,
    open_publisher_process,
    open_tap,
    within,
)
from tests.e2e.wire_publisher import open_wire_publisher

MANY = 50


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[BrokerProcess]:
    async with open_broker_process(tmp_path / "w.db") as broker:
        yield broker


@pytest.fixture
def pids(tmp_path: Path) -> Iterator[Path]:
    """A file for the process ids of what a wake command starts; all of them are gone after the test."""
    path = tmp_path / "pids"
    yield path
    kill_all_in(path)


def llama(noise_model: Path, port: int, pids: Path) -> str:
    """A shell command that starts llama.cpp in the background, as `systemctl start` would."""
    command = engine_command(noise_model, port=port, slots=8, context=2048)
    return f"{shlex.join([*command, '--pid-file', str(pids), '--lifetime', '120'])} >/dev/null &"


def demo_engine(port: int, pids: Path, delay_s: float = 0.001) -> str:
    """The same with the demo's engine, which is there sooner."""
    command = [sys.executable, "-m", "wakecall.cli.demo_engine", "--port", str(port), "--delay-s", str(delay_s)]
    return shlex.join([*command, "--background", "--lifetime-s", "120", "--pid-file", str(pids)])


@within(40)
async def test_fifty_callers_of_a_sleeping_engine_make_one_wake(
    broker: BrokerProcess, noise_model: Path, tmp_path: Path, pids: Path
) -> None:
    """One frame, one run of the command; the infers' frames only after its result; every caller answered."""
    port = closed_port()
    runs = tmp_path / "runs"
    command = f"echo run >> {shlex.quote(str(runs))}; {llama(noise_model, port, pids)}"
    async with open_tap(broker.port) as tap:
        async with open_publisher_process(
            tmp_path, tap.url, f"http://127.0.0.1:{port}", "--name", "noise", "--hibernating", "--wake-command", command,
            "--model", str(noise_model),
        ):  # fmt: skip
            before = await broker.wait_llm("noise", routable=True, status="hibernating")
            assert not runs.exists(), "publishing alone must not wake it"
            async with trio.open_nursery() as nursery:
                crowd = start_crowd(nursery, broker, "noise", MANY)
            assert crowd.codes == {(200, "")}
            assert all(answer.json["usage"]["completion_tokens"] == 8 for answer in crowd.answers)
            assert runs.read_text().split() == ["run"]
            assert len(pids.read_text().split()) == 1
            after = await broker.llm("noise")
            assert after["status"] == "active"
            assert datetime.fromisoformat(after["last_heartbeat_at"]) > datetime.fromisoformat(
                before["last_heartbeat_at"]
            )
            assert (tap.frames("wake"), tap.frames("infer"), tap.frames("cancel")) == (1, MANY, 0)
            assert tap.position("up", b"/result HTTP/1.1") < tap.position("down", b"event: infer\n")
    counted = await broker.metrics()
    assert counted["wakecall_wakes_total{state=started}"] == counted["wakecall_wakes_total{state=succeeded}"] == 1
    assert counted["wakecall_infers_ended_total{outcome=completed}"] == MANY


@within(40)
async def test_no_infer_is_sent_before_the_wake_has_succeeded(broker: BrokerProcess) -> None:
    """By hand: while the wake is under way the channel is silent, though fifty wait and a heartbeat comes."""
    async with open_wire_publisher(broker, {"name": "m", "status": "hibernating"}) as (publisher, channel):
        async with trio.open_nursery() as nursery:
            crowd = start_crowd(nursery, broker, "m", MANY)
            wake = await channel.next("wake")
            await broker.wait_llm("m", waiting=MANY, waking=True)
            assert (await publisher.heartbeat()).status == 200
            assert channel.events == ["hello", "wake"]
            before = datetime.fromisoformat((await broker.llm("m"))["last_heartbeat_at"])
            assert (await publisher.result(wake)).status == 200
            for _ in range(MANY):
                nursery.start_soon(publisher.result, await channel.next("infer"), b'{"ok": true}')
        assert crowd.codes == {(200, "")}
        assert sorted(set(channel.events)) == ["hello", "infer", "wake"]
        assert channel.events.count("wake") == 1
        assert datetime.fromisoformat((await broker.llm("m"))["last_heartbeat_at"]) > before


@within(40)
async def test_a_publisher_killed_during_the_wake_fails_all_waiters_at_once(
    broker: BrokerProcess, tmp_path: Path, pids: Path
) -> None:
    """Promised within a second: 50 × 503, which may be tried again, for nothing has generated."""
    command = f"echo $$ >> {shlex.quote(str(pids))}; exec sleep 60"
    async with open_publisher_process(
        tmp_path, broker.url, f"http://127.0.0.1:{closed_port()}", "--name", "m", "--hibernating", "--wake-command", command
    ) as publisher:  # fmt: skip
        await broker.wait_llm("m", routable=True)
        async with trio.open_nursery() as nursery:
            crowd = start_crowd(nursery, broker, "m", MANY)
            await broker.wait_llm("m", waiting=MANY, waking=True)
            killed = time.monotonic()
            publisher.send(signal.SIGKILL)
        assert crowd.codes == {(503, "publisher_disconnected")}
        assert {answer.headers.get("retry-after") for answer in crowd.answers} == {"2"}
        assert {answer.headers.get("x-should-retry") for answer in crowd.answers} == {None}
        assert max(crowd.times) - killed < 3
        await broker.wait_llm("m", status="inactive", routable=False, waiting=0, waking=False)
        assert await broker.list("tasks") == []


@within(40)
async def test_a_wake_command_that_fails_says_why_and_the_next_call_tries_again(
    broker: BrokerProcess, tmp_path: Path, pids: Path
) -> None:
    """All fifty get its last line of stderr; the row still hibernates; the next call runs it anew and is answered."""
    port = closed_port()
    runs, go = tmp_path / "runs", tmp_path / "go"
    command = f"""
        echo run >> {shlex.quote(str(runs))}
        if [ $(wc -l < {shlex.quote(str(runs))}) = 1 ]; then
            while [ ! -e {shlex.quote(str(go))} ]; do sleep 0.02; done
            echo "sending the magic packet" >&2
            echo "no answer from the gpu box" >&2
            exit 3
        fi
        {demo_engine(port, pids)}
    """
    async with open_publisher_process(
        tmp_path, broker.url, f"http://127.0.0.1:{port}", "--name", "m", "--hibernating", "--wake-command", command
    ):
        await broker.wait_llm("m", routable=True, status="hibernating")
        async with trio.open_nursery() as nursery:
            crowd = start_crowd(nursery, broker, "m", MANY)
            await broker.wait_llm("m", waiting=MANY, waking=True)
            go.touch()
        assert crowd.codes == {(503, "wake_failed")}
        assert {answer.headers.get("x-should-retry") for answer in crowd.answers} == {"false"}
        for answer in crowd.answers:
            assert "no answer from the gpu box" in answer.json["error"]["message"]
            assert "magic packet" not in answer.json["error"]["message"]
        row = await broker.llm("m")
        assert (row["status"], row["routable"], row["waking"]) == ("hibernating", True, False)
        assert runs.read_text().split() == ["run"]
        assert (await ask_chat(broker, "m")).status == 200
        assert runs.read_text().split() == ["run", "run"]
        assert (await broker.llm("m"))["status"] == "active"


@within(40)
async def test_an_idle_engine_is_put_to_sleep_and_woken_by_the_next_call(
    broker: BrokerProcess, tmp_path: Path, pids: Path
) -> None:
    """`--hibernate-after`: announced first, then the command runs; and round again."""
    port = closed_port()
    stopped = tmp_path / "stopped"
    hibernate = f"kill $(cat {shlex.quote(str(pids))}) && echo stopped >> {shlex.quote(str(stopped))}"
    async with open_tap(broker.port) as tap:
        async with open_publisher_process(
            tmp_path, tap.url, f"http://127.0.0.1:{port}", "--name", "m", "--hibernating",
            "--wake-command", demo_engine(port, pids), "--hibernate-command", hibernate, "--hibernate-after", "0.5",
        ):  # fmt: skip
            await broker.wait_llm("m", routable=True, status="hibernating")
            for round_ in (1, 2):
                assert (await ask_chat(broker, "m")).status == 200
                await broker.wait_llm("m", status="hibernating", routable=True)
                assert b'"hibernating"' in tap.up
                while not stopped.exists() or len(stopped.read_text().split()) < round_:
                    await trio.sleep(POLL_S)
                await _wait_gone(int(pids.read_text()))
            assert tap.frames("wake") == 2


async def _wait_gone(pid: int) -> None:
    """The process has ended, or is a zombie that nobody waits for in this container."""
    while os.path.exists(f"/proc/{pid}") and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        await trio.sleep(POLL_S)
