"""Models that take turns on one engine: with real commands, each told which one is meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.publisher.peers import Channel, Exchange, Peer, Publisher, Stage
from tests.publisher.test_power import wait_file
from wakecall.publisher import (
    Asleep,
    Awake,
    GoingToSleep,
    InferFinished,
    InferStarted,
    PublishedModel,
    SleepFailed,
    Waking,
)

MODELS = (PublishedModel("a", "a:7b"), PublishedModel("b"), PublishedModel("c"))


def done(stage: Stage) -> list[str]:
    """What the commands have done so far, in order."""
    path = stage.directory / "done"
    return path.read_text().splitlines() if path.exists() else []


async def publish(stage: Stage, **settings: Any) -> tuple[Publisher, Channel]:
    """A group of three, whose commands write down what they do."""
    defaults: dict[str, Any] = {
        "models": MODELS,
        "group": "gpu",
        "wake_command": f'echo "wake $WAKECALL_LLM $WAKECALL_MODEL" >> {stage.directory}/done',
        "hibernate_command": f'echo "sleep $WAKECALL_LLM $WAKECALL_MODEL" >> {stage.directory}/done',
    }
    return await stage.publish(**{**defaults, **settings})


async def infer(channel: Channel, task_id: str, llm: str) -> None:
    await channel.infer(task_id, json.dumps({"model": llm}), llm=llm, model=llm)


async def registered(stage: Stage) -> dict[str, str]:
    """What the latest register says of each row's status."""
    register = await stage.broker.wait_whole("register", count=len(stage.broker.all("register")))
    assert {row["group"] for row in register.json["llms"]} == {"gpu"}
    return {row["name"]: row["status"] for row in register.json["llms"]}


async def next_statuses(stage: Stage) -> dict[str, str]:
    """What the next heartbeat to begin says."""
    later = await stage.broker.wait_whole("heartbeat", count=len(stage.broker.all("heartbeat")) + 1)
    statuses: dict[str, str] = later.json["llms"]
    return statuses


async def test_the_first_is_awake_and_the_others_sleep(stage: Stage) -> None:
    await publish(stage)
    assert await registered(stage) == {"a": "active", "b": "hibernating", "c": "hibernating"}


async def test_all_that_an_engine_lists_may_be_a_group_and_all_asleep(stage: Stage) -> None:
    """An engine that swaps by itself answers whatever is loaded: it can be asked for its models."""
    stage.engine.models = ["x", "y"]
    await publish(stage, models=(), hibernating=True)
    assert await registered(stage) == {"x": "hibernating", "y": "hibernating"}


async def test_an_engine_that_can_be_woken_and_does_not_answer_has_nothing_awake(stage: Stage) -> None:
    stage.engine.healthy = False
    await publish(stage)
    assert set((await registered(stage)).values()) == {"hibernating"}


async def test_a_wake_puts_the_one_that_is_awake_to_sleep_first(stage: Stage) -> None:
    """Each command has its model's names; the result waits for health; heartbeats and registers say which is awake."""
    stage.engine.healthy = False
    publisher, channel = await publish(stage, hibernating=True)
    stage.broker.heartbeat_interval_s = 0.02
    stage.engine.healthy = True
    await channel.wake("w1", llm="a", hibernate=[])
    await stage.broker.wait_whole("result", "w1")
    stage.engine.healthy = False
    await channel.wake("w2", llm="b", hibernate=["a"])
    await publisher.wait(Asleep)
    with trio.fail_after(5):
        for _ in range(3):
            await stage.engine.asked.wait()
    assert not stage.broker.all("result", "w2"), "the engine does not answer yet"
    stage.engine.healthy = True
    await stage.broker.wait_whole("result", "w2")
    assert done(stage) == ["wake a a:7b", "sleep a a:7b", "wake b b"]
    assert await next_statuses(stage) == {"a": "hibernating", "b": "active", "c": "hibernating"}
    assert [event.llm for event in publisher.all(Awake)] == ["a", "b"]
    stage.broker.registered = False
    channel.cut()
    await stage.broker.next_channel()
    assert await registered(stage) == {"a": "hibernating", "b": "active", "c": "hibernating"}


async def test_the_one_that_is_awake_needs_no_command(stage: Stage) -> None:
    _, channel = await publish(stage)
    await channel.wake("w1", llm="a")
    await stage.broker.wait_whole("result", "w1")
    await infer(channel, "t1", "a")
    await (await stage.engine.next()).respond(200, b"{}")
    assert done(stage) == []


async def test_without_commands_a_swap_only_asks_for_health(stage: Stage) -> None:
    """An engine that swaps by itself: what is left and what is woken is known here alone, and at the broker."""
    _, channel = await publish(stage, wake_command=None, hibernate_command=None)
    await channel.wake("w1", llm="c", hibernate=["a"])
    await stage.broker.wait_whole("result", "w1")
    assert (await stage.broker.wait_whole("heartbeat")).json["llms"] == {
        "a": "hibernating",
        "b": "hibernating",
        "c": "active",
    }
    stage.engine.healthy = False
    await channel.wake("w2", llm="a", hibernate=["c"])
    assert "no command" in (await stage.broker.wait_whole("failure", "w2")).json["message"]


async def test_a_busy_model_is_left_when_its_requests_are_over_and_newer_ones_wait(stage: Stage) -> None:
    """The newer ones do not keep it awake for ever: they are served after the next swap back."""
    publisher, channel = await publish(stage)
    await infer(channel, "t1", "a")
    first = await stage.engine.next()
    await channel.wake("w1", llm="b", hibernate=["a"])
    await publisher.wait(Waking)
    await infer(channel, "t2", "a")
    await publisher.wait(Waking, 2)
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert done(stage) == []
    assert not stage.broker.all("result")
    await first.respond(200, b"{}")
    await stage.broker.wait_whole("result", "w1")
    second = await stage.engine.next()
    assert done(stage) == ["sleep a a:7b", "wake b b", "sleep b b", "wake a a:7b"]
    await second.respond(200, b"{}")
    await stage.broker.wait_whole("result", "t2")


async def test_a_request_for_one_that_sleeps_swaps_and_is_served_before_the_next_swap(stage: Stage) -> None:
    """Two sleeping models are asked for at once: each has its turn, in order, and none is left before it has served."""
    publisher, channel = await publish(stage)
    stage.engine.healthy = False  # the first swap waits until all of them are here
    await infer(channel, "t1", "b")
    await publisher.wait(Waking)
    await infer(channel, "t2", "c")
    await infer(channel, "t3", "b")
    await publisher.wait(InferStarted, 3)
    with trio.fail_after(5):
        for _ in range(3):
            await stage.engine.asked.wait()
    stage.engine.healthy = True
    served = [await stage.engine.next() for _ in range(2)]
    assert done(stage) == ["sleep a a:7b", "wake b b"]
    for request in served:
        assert request.json == {"model": "b"}
        await request.respond(200, b"{}")
    request = await stage.engine.next()
    assert request.json == {"model": "c"}
    assert done(stage) == ["sleep a a:7b", "wake b b", "sleep b b", "wake c c"]
    await request.respond(200, b"{}")
    await stage.broker.wait_whole("result", "t2")


async def test_a_busy_model_that_makes_no_room_in_time_stays_what_it_is(stage: Stage) -> None:
    _, channel = await publish(stage)
    await infer(channel, "t1", "a")
    first = await stage.engine.next()
    await channel.wake("w1", llm="b", deadline_s=0.1, hibernate=["a"])
    failure = await stage.broker.wait_whole("failure", "w1")
    assert failure.json["message"] == "a did not make room within 0 s"
    assert (await stage.broker.wait_whole("heartbeat")).json["llms"] == {
        "a": "active",
        "b": "hibernating",
        "c": "hibernating",
    }
    await infer(channel, "t2", "a")
    await (await stage.engine.next()).respond(200, b"{}")
    await first.respond(200, b"{}")
    assert done(stage) == []


async def test_one_that_will_not_sleep_keeps_its_place(stage: Stage) -> None:
    publisher, channel = await publish(stage, hibernate_command="echo stuck >&2; exit 1")
    await channel.wake("w1", llm="b", hibernate=["a"])
    assert (await stage.broker.wait_whole("failure", "w1")).json["message"] == "a does not make room: stuck"
    assert (await publisher.wait(SleepFailed)) == SleepFailed("stuck", llm="a")
    assert (await stage.broker.wait_whole("heartbeat")).json["llms"]["a"] == "active"
    assert done(stage) == []


async def test_a_wake_that_fails_leaves_all_asleep_and_the_next_one_tries_again(stage: Stage) -> None:
    broken = stage.directory / "broken"
    broken.touch()
    command = (
        f'test ! -e {broken} || {{ echo no memory >&2; exit 1; }}; echo "wake $WAKECALL_LLM" >> {broken.parent}/done'
    )
    _, channel = await publish(stage, wake_command=command)
    await channel.wake("w1", llm="b", hibernate=["a"])
    assert (await stage.broker.wait_whole("failure", "w1")).json["message"] == "no memory"
    assert set((await stage.broker.wait_whole("heartbeat")).json["llms"].values()) == {"hibernating"}
    broken.unlink()
    await channel.wake("w2", llm="a")
    await stage.broker.wait_whole("result", "w2")
    # It may have come half-way: whoever is next has it put to sleep first.
    assert done(stage) == ["sleep a a:7b", "sleep b b", "wake a"]


async def test_what_the_broker_takes_for_awake_is_put_to_sleep_too(stage: Stage) -> None:
    """Whatever we believe of it; that its command then fails is no surprise and no obstacle."""
    command = f'echo "sleep $WAKECALL_LLM" >> {stage.directory}/done; test $WAKECALL_LLM = a'
    _, channel = await publish(stage, hibernate_command=command)
    await channel.wake("w1", llm="b", hibernate=["c", "a", "b", "unknown"])
    await stage.broker.wait_whole("result", "w1")
    assert done(stage) == ["sleep a", "sleep c", "wake b b"]


async def test_a_model_that_is_not_published_cannot_be_woken(stage: Stage) -> None:
    _, channel = await publish(stage)
    await channel.wake("w1", llm="z")
    assert "no model z" in (await stage.broker.wait_whole("failure", "w1")).json["message"]
    await infer(channel, "t1", "z")
    assert "no model z" in (await stage.broker.wait_whole("failure", "t1")).json["message"]
    assert done(stage) == []


async def test_a_cancelled_request_does_not_hold_up_a_swap(stage: Stage) -> None:
    _, channel = await publish(stage)
    await channel.infer("t1", llm="a")
    request = await stage.engine.next()
    await channel.wake("w1", llm="b", hibernate=["a"])
    await channel.send("cancel", task_id="t1", reason="client_disconnected")
    await stage.broker.wait_whole("result", "w1")
    assert request.broken.is_set()
    assert done(stage) == ["sleep a a:7b", "wake b b"]


async def test_an_engine_that_has_died_is_woken_for_the_model_that_is_asked_for(stage: Stage) -> None:
    """It refuses a connection: nothing was sent, and the request is relayed once, after the wake."""
    publisher, channel = await publish(stage)
    port = stage.engine.peer.port
    stage.engine.peer.stop()
    await infer(channel, "t1", "a")
    await publisher.wait(Waking)
    await wait_file(stage.directory / "done")
    stage.engine.peer = Peer(stage.engine.peer.handler, port=port)
    await stage.nursery.start(stage.engine.peer.run)
    await (await stage.engine.next()).respond(200, b"{}")
    await stage.broker.wait_whole("result", "t1")
    assert done(stage) == ["wake a a:7b"]


async def test_the_one_that_is_awake_goes_to_sleep_when_idle(stage: Stage) -> None:
    """Announced for itself alone; what was sent before the broker knew is served first."""
    acknowledge = trio.Event()

    async def heartbeat(exchange: Exchange) -> None:
        await exchange.read()
        await acknowledge.wait()
        await exchange.respond_json(200, {"llms": {}, "drop": []})

    stage.broker.on["heartbeat"] = heartbeat
    publisher, channel = await publish(stage, hibernate_after_s=0.05)
    assert (await stage.broker.wait_whole("heartbeat")).json["llms"] == {"a": "hibernating"}
    assert await publisher.wait(GoingToSleep) == GoingToSleep(llm="a")
    await infer(channel, "t1", "a")
    request = await stage.engine.next()
    acknowledge.set()
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert done(stage) == []
    await request.respond(200, b"{}")
    assert await publisher.wait(Asleep) == Asleep(llm="a")
    assert done(stage) == ["sleep a a:7b"]
    await channel.wake("w1", llm="b")
    await stage.broker.wait_whole("result", "w1")
    assert done(stage)[1:2] == ["wake b b"]


async def test_a_wake_of_another_calls_off_going_to_sleep_and_swaps(stage: Stage) -> None:
    hold = trio.Event()

    async def heartbeat(exchange: Exchange) -> None:
        await exchange.read()
        await hold.wait()
        await exchange.respond_json(200, {})

    stage.broker.on["heartbeat"] = heartbeat
    publisher, channel = await publish(stage, hibernate_after_s=0.2)
    await stage.broker.wait("heartbeat")
    await channel.wake("w1", llm="b", hibernate=["a"])
    assert (await publisher.wait(SleepFailed)).message == "a wake came first"
    hold.set()
    await stage.broker.wait_whole("result", "w1")
    assert done(stage)[:2] == ["sleep a a:7b", "wake b b"]


async def test_a_swap_goes_on_without_its_channel(stage: Stage) -> None:
    go = stage.directory / "go"
    command = f"touch {stage.directory}/started; until test -e {go}; do sleep 0.01; done"
    publisher, channel = await publish(stage, wake_command=command)
    await channel.wake("w1", llm="b", hibernate=["a"])
    await wait_file(stage.directory / "started")
    channel.cut()
    channel = await stage.broker.next_channel()
    go.touch()
    assert (await publisher.wait(Awake)).llm == "b"
    await channel.infer("t1", llm="b", model="b")
    await (await stage.engine.next()).respond(200, b"{}")
    assert (await publisher.wait(InferFinished)).outcome == "completed"


@pytest.mark.parametrize(
    ("models", "said"),
    [((PublishedModel("a", "a:7b"),), "a a:7b key=\n"), (MODELS, "x y key=\n")],
)
async def test_without_a_group_a_command_is_told_the_model_if_there_is_one(
    stage: Stage, models: tuple[PublishedModel, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several, all wake together: what the variables said before stands. The key is never among them."""
    monkeypatch.setenv("WAKECALL_LLM", "x")
    monkeypatch.setenv("WAKECALL_MODEL", "y")
    monkeypatch.setenv("WAKECALL_KEY", "s3cret")
    out = stage.directory / "out"
    stage.engine.healthy = False
    command = f'echo "$WAKECALL_LLM $WAKECALL_MODEL key=$WAKECALL_KEY" > {out}.part; mv {out}.part {out}'
    _, channel = await stage.publish(models=models, hibernating=True, wake_command=command)
    await channel.wake("w1", llm="a")
    await wait_file(out)
    assert out.read_text() == said


async def test_the_key_is_in_no_command_of_a_group(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WAKECALL_KEY", "s3cret")
    commands = {
        f"{verb}_command": f"env > {stage.directory}/{verb}.part; mv {stage.directory}/{verb}.part {stage.directory}/{verb}"
        for verb in ("wake", "hibernate")
    }
    _, channel = await publish(stage, **commands)
    await channel.wake("w1", llm="b", hibernate=["a"])
    await stage.broker.wait_whole("result", "w1")
    for verb, llm in (("wake", "b"), ("hibernate", "a")):
        said = Path(stage.directory / verb).read_text()
        assert f"WAKECALL_LLM={llm}\n" in said
        assert "s3cret" not in said
