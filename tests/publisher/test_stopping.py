"""Whoever asks the agent to stop is heard, whatever it is doing."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from tests.publisher.peers import Exchange, Publisher, Stage, closed_port
from wakecall.publisher import (
    BrokerUnreachable,
    ChannelLost,
    Drained,
    Draining,
    PublisherEvent,
    StopReason,
    Waking,
)


async def hang(exchange: Exchange) -> None:
    """Take a request and never answer; the peer's leaving ends it."""
    await exchange.wait_peer_gone()


async def unavailable(exchange: Exchange) -> None:
    await exchange.read()
    await exchange.refuse(503, "shutting_down")


async def stop_and_expect_the_end(publisher: Publisher) -> None:
    publisher.stop.set()
    with trio.fail_after(2):
        await publisher.ended.wait()
    assert publisher.reason is StopReason.STOPPED
    told = [type(event) for event in publisher.events]
    assert told[-2:] == [Draining, Drained]


@pytest.mark.parametrize("settings", [{"models": ()}, {"wake_command": "true", "health_timeout_s": 60.0}])
async def test_stopping_while_the_engine_is_asked(stage: Stage, settings: dict[str, Any]) -> None:
    """For its models, or for its health: it takes the question and never answers."""
    stage.engine.on_get = hang
    publisher = Publisher()
    stage.nursery.start_soon(publisher.run, stage.config(**settings))
    with trio.fail_after(5):
        await stage.engine.asked.wait()
    await stop_and_expect_the_end(publisher)
    assert not stage.broker.seen


async def test_stopping_while_the_broker_is_not_there(stage: Stage) -> None:
    """In the pause before the next attempt."""
    publisher = Publisher()
    config = stage.config(broker_url=f"http://127.0.0.1:{closed_port()}", backoff_base_s=60.0, backoff_cap_s=60.0)
    stage.nursery.start_soon(publisher.run, config)
    await publisher.wait(BrokerUnreachable)
    await stop_and_expect_the_end(publisher)


async def test_stopping_while_a_register_is_not_answered(stage: Stage) -> None:
    stage.broker.on["register"] = hang
    publisher = Publisher()
    stage.nursery.start_soon(publisher.run, stage.config())
    await stage.broker.wait("register")
    await stop_and_expect_the_end(publisher)


@pytest.mark.parametrize(("frames", "event"), [(hang, None), (unavailable, ChannelLost)])
async def test_stopping_without_a_channel_says_goodbye(
    stage: Stage, frames: Any, event: type[PublisherEvent] | None
) -> None:
    """While it is being opened, and in the pause before that is tried again."""
    stage.broker.on["frames"] = frames
    publisher = Publisher()
    stage.nursery.start_soon(publisher.run, stage.config(backoff_base_s=60.0, backoff_cap_s=60.0))
    await stage.broker.wait("frames")
    if event is not None:
        await publisher.wait(event)
    await stop_and_expect_the_end(publisher)
    assert [kind for kind, _ in stage.broker.seen] == ["register", "frames", "register", "goodbye"]


async def test_stopping_while_the_engine_wakes(stage: Stage) -> None:
    """Nobody's answer waits for that wake any longer: the rows are withdrawn."""
    stage.engine.healthy = False
    publisher, channel = await stage.publish(hibernating=True, wake_command="sleep 60")
    await channel.wake("w1")
    await publisher.wait(Waking)
    publisher.stop.set()
    assert await publisher.wait_ended() is StopReason.STOPPED
    assert stage.broker.all("goodbye")


async def test_a_broker_that_has_gone_silent_holds_up_no_stop(stage: Stage) -> None:
    """A heartbeat without an answer has its turn, and goodbye would wait behind it."""
    stage.broker.on["heartbeat"] = hang
    stage.broker.heartbeat_interval_s = 0.02
    publisher, _ = await stage.publish(farewell_s=0.1)
    await stage.broker.wait("heartbeat")
    await stop_and_expect_the_end(publisher)
    assert not stage.broker.all("goodbye")


async def test_stopping_drains_and_says_goodbye(stage: Stage) -> None:
    """An empty register, then the infers' end, then DELETE."""
    publisher, channel = await stage.publish()
    await channel.infer("t1")
    request = await stage.engine.next()
    publisher.stop.set()
    withdrawn = await stage.broker.wait_whole("register", count=2)
    assert withdrawn.json["llms"] == []
    assert not stage.broker.all("goodbye")
    await request.respond(200, b"{}")
    assert await publisher.wait_ended() is StopReason.STOPPED
    kinds = [kind for kind, _ in stage.broker.seen]
    assert kinds == ["register", "frames", "register", "result", "goodbye"]
    assert publisher.all(Drained)[0].abandoned == 0
    assert not publisher.all(ChannelLost)


async def test_stopping_waits_for_an_infer_no_longer_than_the_grace(stage: Stage) -> None:
    publisher, channel = await stage.publish(drain_grace_s=0.05)
    await channel.infer("t1")
    request = await stage.engine.next()
    publisher.stop.set()
    assert await publisher.wait_ended() is StopReason.STOPPED
    assert publisher.all(Drained)[0].abandoned == 1
    assert stage.broker.all("goodbye")
    with trio.fail_after(5):
        await request.broken.wait()


async def test_stopping_without_a_broker_takes_no_time(stage: Stage) -> None:
    publisher, _ = await stage.publish()
    stage.broker.peer.stop()
    await stop_and_expect_the_end(publisher)
