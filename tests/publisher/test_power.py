"""Waking and going to sleep, with real commands."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.publisher.peers import Exchange, Peer, Stage, closed_port
from tests.publisher.test_process import is_running, wait_ended, wait_pid, wait_said
from wakecall.publisher import (
    Asleep,
    Awake,
    InferFinished,
    SleepFailed,
    StopReason,
    WakeFailed,
    Waking,
)
from wakecall.publisher.process import cut_log
from wakecall.publisher.state import state_path


@pytest.fixture
def up(stage: Stage) -> Path:
    """The engine is healthy while this file is there; a command makes or removes it."""
    marker = stage.directory / "up"

    async def health(exchange: Exchange) -> None:
        await exchange.respond(200 if marker.exists() else 503, b"{}")

    stage.engine.on_get = health
    return marker


def runs(stage: Stage) -> int:
    path = stage.directory / "runs"
    return path.read_text().count("run") if path.exists() else 0


def wake_command(stage: Stage, *more: str) -> str:
    return "; ".join([f"echo run >> {stage.directory}/runs", *more])


async def wait_file(path: Path) -> None:
    with trio.fail_after(5):
        while not path.exists():
            await trio.sleep(0.01)


async def test_a_wake_runs_the_command_once_for_all_who_ask(stage: Stage, up: Path) -> None:
    """Two wake frames and an infer: one run; the results go out once the engine's health answers."""
    go = stage.directory / "go"
    command = wake_command(stage, f"until test -e {go}; do sleep 0.01; done")
    publisher, channel = await stage.publish(hibernating=True, wake_command=command)
    assert (await stage.broker.wait_whole("register")).json["llms"][0]["status"] == "hibernating"
    await channel.wake("w1")
    await publisher.wait(Waking)
    await channel.wake("w2")
    await channel.infer("t1")
    assert not stage.broker.all("result")
    go.touch()
    for _ in range(3):
        with trio.fail_after(5):
            await stage.engine.asked.wait()
    assert not stage.broker.all("result"), "the command is done and the engine does not answer yet"
    up.touch()
    for task_id in ("w1", "w2"):
        result = await stage.broker.wait_whole("result", task_id)
        assert (result.headers["wakecall-status"], bytes(result.body)) == ("200", b"")
    await (await stage.engine.next()).respond(200, b"{}")
    await stage.broker.wait_whole("result", "t1")
    assert runs(stage) == 1
    assert (await publisher.wait(Awake)).ran_command


async def test_an_engine_that_is_awake_needs_no_command(stage: Stage, up: Path) -> None:
    up.touch()
    publisher, channel = await stage.publish(hibernating=True, wake_command=wake_command(stage))
    await channel.wake("w1")
    await stage.broker.wait_whole("result", "w1")
    assert not (await publisher.wait(Awake)).ran_command
    assert runs(stage) == 0


async def test_a_failed_wake_says_why_and_the_next_one_tries_again(stage: Stage, up: Path) -> None:
    command = wake_command(
        stage, f"test $(wc -l < {stage.directory}/runs) -gt 1 || {{ echo no power >&2; exit 1; }}", f"touch {up}"
    )
    publisher, channel = await stage.publish(hibernating=True, wake_command=command)
    await channel.wake("w1")
    assert (await stage.broker.wait_whole("failure", "w1")).json == {"message": "no power"}
    assert (await publisher.wait(WakeFailed)).message == "no power"
    await channel.wake("w2")
    await stage.broker.wait_whole("result", "w2")
    assert runs(stage) == 2


async def test_without_a_command_a_wake_fails_unless_the_engine_answers(stage: Stage, up: Path) -> None:
    _, channel = await stage.publish(hibernating=True)
    await channel.wake("w1")
    assert "no command" in (await stage.broker.wait_whole("failure", "w1")).json["message"]
    up.touch()
    await channel.wake("w2")
    await stage.broker.wait_whole("result", "w2")


async def test_at_the_deadline_the_commands_group_is_ended(stage: Stage, up: Path) -> None:
    pid_file = stage.directory / "pid"
    command = f"echo still booting >&2; sleep 60 & echo $! > {pid_file}; wait"
    _, channel = await stage.publish(hibernating=True, wake_command=command)
    await channel.wake("w1", deadline_s=1.0)
    pid = await wait_pid(pid_file)
    failure = await stage.broker.wait_whole("failure", "w1")
    assert "did not answer within 1 s: still booting" in failure.json["message"]
    await wait_ended(pid)


async def test_the_engine_that_a_wake_started_outlives_the_agent(stage: Stage, up: Path) -> None:
    pid_file = stage.directory / "pid"
    command = f"(while :; do echo noise >&2; sleep 0.02; done) & echo $! > {pid_file}; touch {up}"
    publisher, channel = await stage.publish(hibernating=True, wake_command=command)
    await channel.wake("w1")
    await stage.broker.wait_whole("result", "w1")
    pid = int(pid_file.read_text())
    try:
        publisher.stop.set()
        assert await publisher.wait_ended() is StopReason.STOPPED
        log = state_path(stage.config()).with_suffix(".log")
        cut_log(log, 0)
        await wait_said(log, "noise")  # where nobody reads any more
        assert is_running(pid)
    finally:
        os.kill(pid, signal.SIGKILL)


async def test_a_wake_goes_on_without_its_channel_and_its_result_counts(stage: Stage, up: Path) -> None:
    """The machine is booting already. While it does, no heartbeat says `active`; afterwards one does."""
    go = stage.directory / "go"
    command = wake_command(stage, f"until test -e {go}; do sleep 0.01; done", f"touch {up}")
    stage.broker.heartbeat_interval_s = 0.02
    publisher, channel = await stage.publish(hibernating=True, wake_command=command)
    assert (await stage.broker.wait_whole("heartbeat")).json == {"llms": {"m": "hibernating"}}
    await channel.wake("w1")
    await wait_file(stage.directory / "runs")
    channel.cut()
    channel = await stage.broker.next_channel()
    await channel.wake("w2")
    await stage.broker.wait_whole("heartbeat", count=len(stage.broker.all("heartbeat")) + 3)
    said = [one.json.get("llms") for one in stage.broker.all("heartbeat") if one.whole.is_set()]
    assert said[-1] is None
    assert {"m": "active"} not in said
    go.touch()
    await stage.broker.wait_whole("result", "w2")
    await publisher.wait(Awake)
    after = len(stage.broker.all("heartbeat"))
    assert (await stage.broker.wait_whole("heartbeat", count=after + 2)).json == {"llms": {"m": "active"}}
    assert not stage.broker.all("result", "w1")
    assert runs(stage) == 1


async def test_a_cancelled_wake_goes_on(stage: Stage, up: Path) -> None:
    go = stage.directory / "go"
    command = wake_command(stage, f"until test -e {go}; do sleep 0.01; done", f"touch {up}")
    publisher, channel = await stage.publish(hibernating=True, wake_command=command)
    await channel.wake("w1")
    await wait_file(stage.directory / "runs")
    await channel.send("cancel", task_id="w1", reason="client_disconnected")
    go.touch()
    await publisher.wait(Awake)
    # Nobody waits for its result, so a heartbeat tells.
    assert (await stage.broker.wait_whole("heartbeat")).json == {"llms": {"m": "active"}}
    assert not stage.broker.all("result", "w1")


async def test_an_infer_that_reaches_a_sleeping_engine_wakes_it(stage: Stage, up: Path) -> None:
    command = wake_command(stage, f"touch {up}")
    _, channel = await stage.publish(hibernating=True, wake_command=command)
    await channel.infer("t1")
    await (await stage.engine.next()).respond(200, b"{}")
    await stage.broker.wait_whole("result", "t1")
    assert runs(stage) == 1
    assert (await stage.broker.wait_whole("heartbeat")).json["llms"] == {"m": "active"}


async def test_an_infer_that_is_refused_a_connection_wakes_the_engine(stage: Stage) -> None:
    """It was believed to be awake, and has died since; the infer is relayed once, after the wake."""
    command = wake_command(stage)
    publisher, channel = await stage.publish(wake_command=command)
    assert (await stage.broker.wait_whole("register")).json["llms"][0]["status"] == "active"
    port = stage.engine.peer.port
    stage.engine.peer.stop()
    await channel.infer("t1")
    await publisher.wait(Waking)
    await wait_file(stage.directory / "runs")
    stage.engine.peer = Peer(stage.engine.peer.handler, port=port)
    await stage.nursery.start(stage.engine.peer.run)
    await (await stage.engine.next()).respond(200, b"{}")
    await stage.broker.wait_whole("result", "t1")
    assert runs(stage) == 1


async def test_an_infer_whose_wake_fails_says_why(stage: Stage, up: Path) -> None:
    publisher, channel = await stage.publish(hibernating=True, wake_command="echo no power >&2; exit 1")
    await channel.infer("t1")
    assert (await stage.broker.wait_whole("failure", "t1")).json["message"] == "no power"
    assert (await publisher.wait(InferFinished)).outcome == "failed"


async def test_an_engine_that_can_be_woken_and_does_not_answer_is_registered_as_asleep(stage: Stage) -> None:
    engine_url = f"http://127.0.0.1:{closed_port()}"
    await stage.publish(wake_command="true", engine_url=engine_url)
    assert (await stage.broker.wait_whole("register")).json["llms"][0]["status"] == "hibernating"


@pytest.mark.parametrize(
    ("settings", "answers", "healthy"),
    [
        ({}, {"/health": 200}, True),
        ({}, {"/health": 503}, False),
        ({}, {"/health": 404, "/v1/models": 200}, True),
        ({}, {"/health": 404, "/v1/models": 401}, True),
        ({}, {"/health": 404, "/v1/models": 404}, False),
        ({"health_path": "/ready"}, {"/ready": 200}, True),
        ({"health_path": "/ready"}, {"/ready": 404, "/health": 200}, False),
    ],
)
async def test_what_counts_as_healthy(
    stage: Stage, settings: dict[str, str], answers: dict[str, int], healthy: bool
) -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.respond(answers[exchange.path], b"{}")

    stage.engine.on_get = answer
    _, channel = await stage.publish(hibernating=True, **settings)
    await channel.wake("w1")
    await stage.broker.wait_whole("result" if healthy else "failure", "w1")


async def test_after_idle_it_announces_awaits_the_answer_finishes_and_sleeps(stage: Stage, up: Path) -> None:
    """The order of the protocol; what was sent before the broker knew is served before the command runs."""
    up.touch()
    acknowledge = trio.Event()
    slept = stage.directory / "slept"

    async def heartbeat(exchange: Exchange) -> None:
        await exchange.read()
        await acknowledge.wait()
        await exchange.respond_json(200, {"llms": {}, "drop": []})

    stage.broker.on["heartbeat"] = heartbeat
    command = f"rm {up}; touch {slept}"
    publisher, channel = await stage.publish(
        hibernate_after_s=0.05, hibernate_command=command, wake_command=wake_command(stage, f"touch {up}")
    )
    assert (await stage.broker.wait_whole("heartbeat")).json["llms"] == {"m": "hibernating"}
    await channel.infer("t1")
    request = await stage.engine.next()
    acknowledge.set()
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert not slept.exists()
    await request.respond(200, b"{}")
    await stage.broker.wait_whole("result", "t1")
    await publisher.wait(Asleep)
    assert slept.exists()
    await channel.wake("w1")
    await stage.broker.wait_whole("result", "w1")
    assert runs(stage) == 1
    await publisher.wait(Asleep, 2)


async def test_a_wake_frame_calls_off_going_to_sleep(stage: Stage, up: Path) -> None:
    """It comes while the announcement is under way: the command does not run, and the wake succeeds."""
    up.touch()
    slept = stage.directory / "slept"
    hold = trio.Event()

    async def heartbeat(exchange: Exchange) -> None:
        await exchange.read()
        await hold.wait()
        await exchange.respond_json(200, {})

    stage.broker.on["heartbeat"] = heartbeat
    publisher, channel = await stage.publish(hibernate_after_s=0.2, hibernate_command=f"touch {slept}")
    await stage.broker.wait("heartbeat")
    assert not slept.exists()
    await channel.wake("w1")
    await publisher.wait(SleepFailed)
    hold.set()
    await stage.broker.wait_whole("result", "w1")
    assert "a wake came first" in publisher.all(SleepFailed)[0].message


async def test_a_wake_waits_for_the_hibernate_command_and_then_wakes(stage: Stage, up: Path) -> None:
    up.touch()
    started, go = stage.directory / "started", stage.directory / "go"
    publisher, channel = await stage.publish(
        hibernate_after_s=0.05,
        hibernate_command=f"touch {started}; until test -e {go}; do sleep 0.01; done; rm {up}",
        wake_command=wake_command(stage, f"touch {up}"),
    )
    await wait_file(started)
    await channel.wake("w1")
    await channel.infer("t1")
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert runs(stage) == 0
    go.touch()
    await stage.broker.wait_whole("result", "w1")
    await (await stage.engine.next()).respond(200, b"{}")
    await stage.broker.wait_whole("result", "t1")
    assert runs(stage) == 1
    assert not publisher.all(WakeFailed)


async def test_without_the_brokers_answer_nothing_sleeps(stage: Stage, up: Path) -> None:
    up.touch()
    slept = stage.directory / "slept"

    async def heartbeat(exchange: Exchange) -> None:
        await exchange.read()
        if exchange.json["llms"] == {"m": "hibernating"}:
            await exchange.refuse(503, "store_unavailable")
        else:
            await exchange.respond_json(200, {})

    stage.broker.on["heartbeat"] = heartbeat
    publisher, _ = await stage.publish(hibernate_after_s=0.05, hibernate_command=f"touch {slept}")
    await publisher.wait(SleepFailed, 2)
    said = [one.json["llms"]["m"] for one in stage.broker.all("heartbeat") if one.whole.is_set()]
    assert said[:3] == ["hibernating", "active", "hibernating"]
    assert not slept.exists()


async def test_a_hibernate_command_that_fails_leaves_the_engine_what_it_is(stage: Stage, up: Path) -> None:
    up.touch()
    publisher, _ = await stage.publish(hibernate_after_s=0.05, hibernate_command="echo stuck >&2; exit 1")
    assert (await publisher.wait(SleepFailed)).message == "stuck"
    second = await stage.broker.wait_whole("heartbeat", count=2)
    assert second.json["llms"] == {"m": "active"}


async def test_stopping_ends_a_wake_command(stage: Stage, up: Path) -> None:
    pid_file = stage.directory / "pid"
    publisher, channel = await stage.publish(hibernating=True, wake_command=f"sleep 60 & echo $! > {pid_file}; wait")
    await channel.wake("w1")
    pid = await wait_pid(pid_file)
    publisher.stop.set()
    assert await publisher.wait_ended() is StopReason.STOPPED
    await wait_ended(pid)
