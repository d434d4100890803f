"""That the engine has stopped is said once it is true, so that the broker can give the slot to somebody else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from tests.publisher.peers import Channel, Exchange, Stage, begin_stream
from tests.publisher.test_registration import refuse, reset
from wakecall.publisher import InferFinished, Waking

Handler = Callable[[Exchange], Awaitable[None]]


async def cancel(channel: Channel, task_id: str) -> None:
    await channel.send("cancel", task_id=task_id, reason="client_disconnected")


def note_engine(stage: Stage, requests: list[Exchange]) -> list[bool]:
    """Whether the engine's connection was closed each time that a cancel was confirmed."""
    closed: list[bool] = []

    async def take(exchange: Exchange) -> None:
        await exchange.read()
        await trio.testing.wait_all_tasks_blocked(0.02)  # for the engine to have read what came before this
        closed.append(all(request.broken.is_set() for request in requests))
        await exchange.start(204)
        await exchange.finish()

    stage.broker.on["cancelled"] = take
    return closed


@pytest.mark.parametrize("mode", ["stream", "chunks"])
async def test_it_is_said_after_the_engines_connection_is_closed(stage: Stage, mode: str) -> None:
    _, channel = await stage.publish(upload=mode)
    request, _ = await begin_stream(stage, channel, "t1", "result" if mode == "stream" else "chunks")
    closed = note_engine(stage, [request])
    await cancel(channel, "t1")
    said = await stage.broker.wait_whole("cancelled", "t1")
    assert (said.method, said.path, bytes(said.body)) == ("POST", "/publisher/v1/tasks/t1/cancelled", b"")
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert closed == [True]


async def test_it_is_said_of_an_infer_that_still_waits_for_its_engine(stage: Stage) -> None:
    """Which has not sent a byte: also then its connection is closed first."""
    _, channel = await stage.publish()
    await channel.infer("t1")
    closed = note_engine(stage, [await stage.engine.next()])
    await cancel(channel, "t1")
    await stage.broker.wait_whole("cancelled", "t1")
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert closed == [True]


async def test_it_is_said_of_an_infer_that_has_not_begun(stage: Stage) -> None:
    """The cancel comes with its frame, or while it waits for a wake."""
    stage.engine.healthy = False
    publisher, channel = await stage.publish(hibernating=True, wake_command="sleep 60")
    frame = '{{"task_id": "{0}", "llm": "m", "path": "/v1/completions", "deadline_s": 60, "body": "{{}}"}}'
    both = f"event: infer\ndata: {frame.format('t1')}\n\n" + 'event: cancel\ndata: {"task_id": "t1"}\n\n'
    await channel.exchange.send(both.encode())
    await stage.broker.wait_whole("cancelled", "t1")
    await channel.infer("t2")
    await publisher.wait(Waking)
    await cancel(channel, "t2")
    await stage.broker.wait_whole("cancelled", "t2")
    assert not stage.broker.all("failure")


@pytest.mark.parametrize("mode", ["stream", "chunks"])
async def test_with_drain_it_is_said_when_the_engine_is_done(stage: Stage, mode: str) -> None:
    publisher, channel = await stage.publish(cancel="drain", upload=mode)
    request, _ = await begin_stream(stage, channel, "t1", "result" if mode == "stream" else "chunks")
    await cancel(channel, "t1")
    # Frames are taken in order: once this one has its answer, the cancel has been heard.
    await channel.infer("t2", llm="unknown")
    await stage.broker.wait_whole("failure", "t2")
    await request.send(b"data: 2\n\n")
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert not stage.broker.all("cancelled"), "it still generates"
    await request.finish()
    await stage.broker.wait_whole("cancelled", "t1")
    assert (await publisher.wait(InferFinished, 2)).outcome == "cancelled"


@pytest.mark.parametrize("status", [404, 409, 410])
@pytest.mark.parametrize("mode", ["stream", "chunks"])
@pytest.mark.parametrize("on_cancel", ["abort", "drain"])
async def test_it_is_said_where_the_upload_tells_that_the_infer_is_over(
    stage: Stage, status: int, mode: str, on_cancel: str
) -> None:
    for kind in ("result", "chunks"):
        stage.broker.on[kind] = refuse(status, "task_cancelled")
    _, channel = await stage.publish(upload=mode, cancel=on_cancel)
    await channel.infer("t1")
    await (await stage.engine.next()).respond(200, b"{}")
    await stage.broker.wait_whole("cancelled", "t1")


async def test_it_is_said_where_the_report_of_a_failure_tells_it(stage: Stage) -> None:
    stage.broker.on["failure"] = refuse(410, "task_cancelled")
    _, channel = await stage.publish()
    await channel.infer("t1")
    (await stage.engine.next()).reset()
    await stage.broker.wait_whole("cancelled", "t1")


async def test_it_is_said_of_what_a_heartbeat_drops_and_of_what_is_over_already(stage: Stage) -> None:
    """A cancel that crossed the end of its infer finds nothing to stop."""
    stage.broker.heartbeat_interval_s = 0.02
    _, channel = await stage.publish()
    await channel.infer("t1")
    await (await stage.engine.next()).respond(200, b"{}")
    await stage.broker.wait_whole("result", "t1")
    assert not stage.broker.all("cancelled"), "nobody cancelled it"
    await cancel(channel, "t1")
    await stage.broker.wait_whole("cancelled", "t1")
    stage.broker.drop = ["t2"]
    await channel.infer("t2")
    await stage.broker.wait_whole("cancelled", "t2")


@pytest.mark.parametrize(
    ("handler", "tries"),
    [
        pytest.param(refuse(404, "not_found"), 1, id="an older broker"),
        pytest.param(refuse(404, ""), 1, id="a proxy before one"),
        pytest.param(refuse(410, "task_cancelled"), 1, id="gone"),
        pytest.param(refuse(503, "store_unavailable"), 1, id="unwell"),
        pytest.param(reset, 2, id="cut"),
    ],
)
async def test_what_becomes_of_it_changes_nothing(stage: Stage, handler: Handler, tries: int) -> None:
    """It is said once, and once more if it was lost; the next infer is none the worse for it."""
    stage.broker.on["cancelled"] = handler
    _, channel = await stage.publish()
    await begin_stream(stage, channel, "t1")
    await cancel(channel, "t1")
    await stage.broker.wait("cancelled", "t1", tries)
    await channel.infer("t2")
    await (await stage.engine.next()).respond(200, b"{}")
    await stage.broker.wait_whole("result", "t2")
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert len(stage.broker.all("cancelled")) == tries
    assert not stage.broker.all("failure")


async def test_it_holds_up_nothing_and_ends_with_its_channel(stage: Stage) -> None:
    """Whatever the broker does with it: infers and heartbeats go on, and no later channel hears of it."""
    stuck = trio.Event()

    async def hang(exchange: Exchange) -> None:
        await exchange.read()
        await exchange.wait_peer_gone()
        stuck.set()

    stage.broker.on["cancelled"] = hang
    stage.broker.heartbeat_interval_s = 0.02
    publisher, channel = await stage.publish()
    await begin_stream(stage, channel, "t1")
    await cancel(channel, "t1")
    await stage.broker.wait("cancelled", "t1")
    await stage.broker.wait_whole("heartbeat", count=len(stage.broker.all("heartbeat")) + 2)
    assert stage.broker.all("heartbeat")[-1].json == {}, "the infer is over: it is in flight no more"
    await channel.infer("t2")
    await (await stage.engine.next()).respond(200, b"{}")
    assert (await publisher.wait(InferFinished, 2)).outcome == "completed"
    assert not stuck.is_set()
    channel.cut()
    await stage.broker.next_channel()
    with trio.fail_after(5):
        await stuck.wait()
    assert len(stage.broker.all("cancelled")) == 1
