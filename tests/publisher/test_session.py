"""Registering, the channel and its ends, heartbeats."""

from __future__ import annotations

import json

import pytest
import trio
import trio.testing

from tests.publisher.peers import Exchange, Peer, Publisher, Stage, begin_stream, closed_port
from wakecall.publisher import (
    AmbiguousNames,
    BrokerUnreachable,
    ChannelLost,
    ChannelOpen,
    EngineUnreachable,
    Evicted,
    InferFinished,
    InferStarted,
    PublishedModel,
    Registered,
    StopReason,
    Superseded,
    discover_models,
    open_engine,
    run_publisher,
)


async def test_a_register_says_what_the_configuration_says(stage: Stage) -> None:
    publisher, _ = await stage.publish(
        models=(PublishedModel("m"), PublishedModel("n", "n:7b")),
        type="llama.cpp",
        session_id="laptop",
        max_concurrency=2,
        wake_s=40.0,
    )
    register = await stage.broker.wait_whole("register")
    assert register.path == "/publisher/v1/sessions/laptop"
    common = {"type": "llama.cpp", "status": "active", "max_concurrency": 2, "wake_s": 40.0, "cancel": "abort"}
    assert register.json["llms"] == [{"name": "m", **common}, {"name": "n", "model": "n:7b", **common}]
    assert register.json["agent"]["name"] == "wakecall"
    assert [type(event) for event in publisher.events] == [Registered, ChannelOpen]
    assert not publisher.events[0].again


async def test_started_hands_back_the_session_once_the_channel_is_open(stage: Stage) -> None:
    async with trio.open_nursery() as nursery:
        session_id = await nursery.start(run_publisher, stage.config(session_id="s"))
        assert session_id == "s"
        assert stage.broker.all("frames")
        nursery.cancel_scope.cancel()


async def test_a_cut_channel_aborts_its_infers_and_is_opened_again(stage: Stage) -> None:
    """Engine requests and uploads of the epoch end; the engine stays reachable for the next."""
    publisher, channel = await stage.publish()
    first, upload = await begin_stream(stage, channel, "t1")
    await channel.infer("t2")
    second = await stage.engine.next()
    channel.cut()
    with trio.fail_after(5):
        for exchange in (first, second, upload):
            await exchange.broken.wait()
    again = await stage.broker.next_channel()
    assert {event.outcome for event in publisher.all(InferFinished)} == {"lost"}
    assert len(stage.broker.all("register")) == 1
    await again.infer("t3")
    await (await stage.engine.next()).respond(200, b"{}")
    await stage.broker.wait_whole("result", "t3")


@pytest.mark.parametrize("reason", ["stale", "shutdown", "goodbye"])
async def test_a_bye_is_followed_by_a_new_channel(stage: Stage, reason: str) -> None:
    publisher, channel = await stage.publish()
    await channel.bye(reason)
    await stage.broker.next_channel()
    assert (await publisher.wait(ChannelLost)).reason == reason


@pytest.mark.parametrize(
    ("reason", "event", "stop"),
    [("superseded", Superseded, StopReason.SUPERSEDED), ("evicted", Evicted, StopReason.EVICTED)],
)
async def test_superseded_and_evicted_stop(stage: Stage, reason: str, event: type, stop: StopReason) -> None:
    publisher, channel = await stage.publish()
    await channel.infer("t1")
    request = await stage.engine.next()
    await channel.bye(reason)
    assert await publisher.wait_ended() is stop
    assert publisher.all(event)
    with trio.fail_after(5):
        await request.broken.wait()
    assert len(stage.broker.all("frames")) == 1


async def test_a_silent_channel_is_opened_again(stage: Stage) -> None:
    """Three keep-alives without a byte; the engine's requests of that epoch are aborted."""
    stage.broker.keepalive_s = 0.1
    publisher, channel = await stage.publish()
    await channel.infer("t1")
    request = await stage.engine.next()
    await stage.broker.next_channel()
    assert "silent" in (await publisher.wait(ChannelLost)).reason
    with trio.fail_after(5):
        await request.broken.wait()


async def test_a_broker_that_does_not_know_the_session_is_registered_with_again(stage: Stage) -> None:
    """404 on the channel: PUT, then the channel, without a pause."""
    publisher, channel = await stage.publish(backoff_base_s=0.02)
    stage.broker.registered = False
    channel.cut()
    await stage.broker.next_channel()
    assert len(stage.broker.all("register")) == 2
    assert [event.again for event in publisher.all(Registered)] == [False, True]
    first, second = stage.broker.all("register")
    assert first.json == second.json


async def test_a_heartbeat_that_finds_no_session_registers_again(stage: Stage) -> None:
    stage.broker.heartbeat_interval_s = 0.02
    await stage.publish()
    stage.broker.registered = False
    await stage.broker.wait("register", count=2)


async def test_heartbeats_name_their_tasks_and_drop_what_nobody_waits_for(stage: Stage) -> None:
    """An engine whose sleep is not the publisher's is named no status: its rows stay what they are."""
    stage.broker.heartbeat_interval_s = 0.02
    publisher, channel = await stage.publish()
    assert (await stage.broker.wait_whole("heartbeat")).json == {}
    await channel.infer("t1")
    request = await stage.engine.next()
    stage.broker.drop = ["t1"]
    with trio.fail_after(5):
        await request.broken.wait()
    assert (await publisher.wait(InferFinished)).outcome == "cancelled"
    assert {"tasks": ["t1"]} in [one.json for one in stage.broker.all("heartbeat") if one.whole.is_set()]


async def test_heartbeats_go_on_while_there_is_no_channel(stage: Stage) -> None:
    stage.broker.heartbeat_interval_s = 0.02
    _, channel = await stage.publish()

    async def refuse(exchange: Exchange) -> None:
        await exchange.read()
        await exchange.refuse(503, "shutting_down")

    stage.broker.on["frames"] = refuse
    channel.cut()
    await stage.broker.wait("frames", count=3)
    await stage.broker.wait("heartbeat", count=len(stage.broker.all("heartbeat")) + 2)


async def test_no_two_requests_of_the_session_overlap(stage: Stage) -> None:
    under_way = most = 0

    async def one_at_a_time(exchange: Exchange) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await trio.testing.wait_all_tasks_blocked(0.02)  # for any other request to arrive meanwhile
        await {"PUT": stage.broker._register, "POST": stage.broker._heartbeat}[exchange.method](exchange)
        under_way -= 1

    async def wake_result(exchange: Exchange) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await trio.testing.wait_all_tasks_blocked(0.02)
        await stage.broker._settle(exchange)
        under_way -= 1

    stage.broker.heartbeat_interval_s = 0.001
    stage.broker.on |= {"register": one_at_a_time, "heartbeat": one_at_a_time, "result": wake_result}
    _, channel = await stage.publish(hibernating=True)
    await channel.wake("w1")
    await stage.broker.wait_whole("result", "w1")
    await stage.broker.wait("heartbeat", count=4)
    assert most == 1


async def test_a_broker_that_is_not_there_yet_is_waited_for(stage: Stage) -> None:
    port = closed_port()
    publisher = Publisher()
    config = stage.config(broker_url=f"http://127.0.0.1:{port}")
    stage.nursery.start_soon(publisher.run, config)
    await publisher.wait(BrokerUnreachable, 2)
    stage.broker.peer = Peer(stage.broker.peer.handler, port=port)
    await stage.nursery.start(stage.broker.peer.run)
    await stage.broker.next_channel()


async def test_a_restarted_broker_has_its_publisher_back_at_once(stage: Stage) -> None:
    publisher, _ = await stage.publish(backoff_base_s=0.2, backoff_cap_s=15.0)
    port = stage.broker.peer.port
    stage.broker.peer.stop()
    await publisher.wait(ChannelLost)
    stage.broker.registered = False
    stage.broker.peer = Peer(stage.broker.peer.handler, port=port)
    await stage.nursery.start(stage.broker.peer.run)
    with trio.fail_after(2):
        await stage.broker.next_channel()
    assert len(stage.broker.all("register")) == 2


async def test_an_event_or_a_frame_of_tomorrow_is_ignored(stage: Stage) -> None:
    _, channel = await stage.publish()
    await channel.send("novelty", x=1)
    await channel.infer("t1", novelty={"a": 1})
    await stage.engine.next()


async def test_a_malformed_frame_ends_the_channel_and_not_the_agent(stage: Stage) -> None:
    publisher, channel = await stage.publish()
    await channel.send("infer", task_id=3)
    await stage.broker.next_channel()
    assert "malformed" in publisher.all(ChannelLost)[0].reason


async def test_a_frame_sent_twice_is_done_once(stage: Stage) -> None:
    publisher, channel = await stage.publish()
    await channel.infer("t1")
    await channel.infer("t1")
    await channel.infer("t2")
    await stage.engine.next()
    await stage.engine.next()
    assert len(publisher.all(InferStarted)) == 2


async def test_models_are_discovered_under_valid_names(stage: Stage) -> None:
    stage.engine.models = ["/models/tiny.Q4.gguf", "qwen2.5:7b"]
    await stage.publish(models=())
    rows = (await stage.broker.wait_whole("register")).json["llms"]
    assert [(row["name"], row.get("model")) for row in rows] == [
        ("tiny.Q4", "/models/tiny.Q4.gguf"),
        ("qwen2.5:7b", None),
    ]


async def test_two_models_of_one_name_are_an_error(stage: Stage) -> None:
    stage.engine.models = ["/a/tiny.gguf", "/b/tiny.gguf"]
    async with open_engine(stage.config()) as engine:
        with pytest.raises(AmbiguousNames, match="tiny"):
            await discover_models(engine)


@pytest.mark.parametrize("answer", [(500, b"{}"), (200, b"<html>"), (200, b'{"data": []}')])
async def test_an_engine_that_lists_nothing_usable_is_an_error(stage: Stage, answer: tuple[int, bytes]) -> None:
    async def reply(exchange: Exchange) -> None:
        await exchange.respond(*answer)

    stage.engine.on_get = reply
    with pytest.raises(EngineUnreachable):
        await run_publisher(stage.config(models=()))


async def test_an_engine_that_is_not_there_cannot_be_asked_for_its_models(stage: Stage) -> None:
    with pytest.raises(EngineUnreachable, match="does not answer"):
        await run_publisher(stage.config(models=(), engine_url=f"http://127.0.0.1:{closed_port()}"))


async def test_nothing_that_the_client_wrote_is_in_an_event(stage: Stage) -> None:
    publisher, channel = await stage.publish(broker_key="k3y")
    await channel.infer("t1", json.dumps({"model": "m", "messages": "s3cret"}))
    request = await stage.engine.next()
    await request.respond(500, b"s3cret")
    await publisher.wait(InferFinished)
    assert "s3cret" not in repr(publisher.events)
    assert "k3y" not in repr(publisher.events)
