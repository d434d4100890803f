"""SIGTERM while much is under way: nothing new is begun, what has begun ends well in the grace, and then it is over."""

from __future__ import annotations

import secrets
import signal
import sqlite3
import time
from collections import Counter
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.cli.processes import MARK, family
from tests.e2e.clients import Crowd, ask_chat, chat_request, start_crowd
from tests.e2e.scripted_engine import EVENT
from tests.e2e.stack import BrokerProcess, connect, open_broker_process, within
from tests.e2e.wire_publisher import WireChannel, WirePublisher, WireUpload
from tests.http.wire import Wire, request_bytes

PUBLISHERS = 4
STREAMS = 4
PLAIN = 5
DONE = b"data: [DONE]\n\n"


@dataclass
class Load:
    """A publisher with much in flight.

    Attributes:
        streams: of which an event has passed; upload and client of each.
        crowd, frames: clients who wait for a plain answer, and what the publisher was asked for them.
    """

    publisher: WirePublisher
    channel: WireChannel
    crowd: Crowd
    streams: list[tuple[WireUpload, Wire]] = field(default_factory=list)
    frames: list[dict[str, Any]] = field(default_factory=list)

    async def finish(self) -> None:
        """Let all of it end well."""
        for upload, client in self.streams:
            await upload.send(DONE)
            assert (await upload.finish()).json == {"outcome": "completed"}
            rest = b""
            while not rest.endswith(b"\r\n0\r\n\r\n"):
                piece = await client.read_some()
                assert piece, rest
                rest += piece
            assert DONE in rest
        for frame in self.frames:
            assert (await self.publisher.result(frame, b'{"whole": true}')).status == 200
        await self.crowd.done.wait()
        assert [(each.status, each.body) for each in self.crowd.answers] == [(200, b'{"whole": true}')] * PLAIN


async def put_load(broker: BrokerProcess, number: int, stack: AsyncExitStack, nursery: trio.Nursery) -> Load:
    publisher, row = WirePublisher(broker, f"s{number}"), f"m{number}"
    assert (await publisher.register(row)).status == 200
    channel = await stack.enter_async_context(publisher.open_channel())
    streams = []
    for _ in range(STREAMS):
        client = await stack.enter_async_context(broker.connect())
        await client.send(chat_request(broker, row, stream=True))
        upload = await stack.enter_async_context(publisher.open_result(await channel.next("infer")))
        await upload.send(EVENT)
        while EVENT not in await client.read_some():
            pass
        streams.append((upload, client))
    crowd = start_crowd(nursery, broker, row, PLAIN)
    return Load(publisher, channel, crowd, streams, [await channel.next("infer") for _ in range(PLAIN)])


class Newcomers:
    """Clients who ask again and again, before and during the end, of a row that answers at once.

    Attributes:
        outcomes: how often which; `nobody`: there was no server any more, or it hung up before it was asked anything.
    """

    def __init__(self, broker: BrokerProcess) -> None:
        self.broker = broker
        self.outcomes = Counter[str]()
        self.refused = trio.Event()

    async def serve(self, channel: WireChannel, publisher: WirePublisher) -> None:
        while True:
            assert (await publisher.result(await channel.next("infer"), b"{}")).status == 200

    async def ask(self) -> None:
        while True:
            try:
                answer = await ask_chat(self.broker, "quick")
            except OSError:
                self.outcomes["nobody"] += 1
                return
            except trio.BrokenResourceError:
                self.outcomes["nobody"] += 1
                continue
            outcome = "nobody" if answer.status == 0 else str(answer.status)
            if answer.status >= 400:
                outcome = answer.code
                self.refused.set()
            self.outcomes["cut" if answer.is_cut and answer.status else outcome] += 1


@within(60)
async def test_what_is_in_flight_ends_well_and_nothing_new_is_begun(tmp_path: Path) -> None:
    """Streams and plain answers of four publishers, with clients coming all the time; exit 0 as soon as all is done."""
    db, mark = tmp_path / "state" / "w.db", secrets.token_hex(8)
    db.parent.mkdir()
    async with (
        open_broker_process(db, arguments=("--grace", "30"), variables={MARK: mark}) as broker,
        trio.open_nursery() as nursery,
        AsyncExitStack() as stack,
    ):
        loads = [await put_load(broker, number, stack, nursery) for number in range(PUBLISHERS)]
        quick = WirePublisher(broker, "quick")
        assert (await quick.register("quick")).status == 200
        channel = await stack.enter_async_context(quick.open_channel())
        newcomers = Newcomers(broker)
        async with trio.open_nursery() as serving:
            serving.start_soon(newcomers.serve, channel, quick)
            for _ in range(8):
                nursery.start_soon(newcomers.ask)
            while newcomers.outcomes["200"] < 50:
                await quick.heartbeat()
            broker.send(signal.SIGTERM)
            await newcomers.refused.wait()
            ready = await broker.ask("GET", "/readyz")
            assert (ready.status, ready.json["reasons"]) == (503, ["shutting_down"])
            for answer in (await ask_chat(broker, "m0"), await WirePublisher(broker, "new").register("new")):
                assert (answer.status, answer.code) == (503, "shutting_down")
            frames = "/publisher/v1/sessions/quick/frames"
            assert (await broker.ask("GET", frames)).code == "shutting_down"
            while [task for task in await broker.list("tasks") if task["llm"] == "quick"]:
                await trio.lowlevel.checkpoint()
            serving.cancel_scope.cancel()
        for load in loads:
            assert load.channel.events == ["hello"] + ["infer"] * (STREAMS + PLAIN)
            await load.finish()
        finished = time.monotonic()
        assert await broker.wait() == 0
        assert time.monotonic() - finished < 5
        for each in (channel, *(load.channel for load in loads)):
            await each.ended.wait()
            assert each.frames[-1] == ("bye", {"reason": "shutdown"})
            assert not each.all("cancel")
        with pytest.raises(ConnectionRefusedError):
            async with connect(broker.port):
                pass
        assert not [line for line in broker.err if "Traceback" in line]
    assert set(newcomers.outcomes) <= {"200", "shutting_down", "nobody"}, newcomers.outcomes
    assert newcomers.outcomes["shutting_down"] > 0
    # Nothing is left behind: no process, no log beside the file, no row that passes for a live one.
    assert family(mark) == []
    assert {each.name for each in db.parent.iterdir()} == {"w.db", "w.db.lock"}
    with closing(sqlite3.connect(db)) as connection:
        assert set(connection.execute("SELECT name, status, remembers FROM llms")) == {
            (name, "inactive", "active") for name in ("quick", *(f"m{number}" for number in range(PUBLISHERS)))
        }


@within(60)
async def test_what_outlasts_the_grace_is_ended_in_so_many_words(tmp_path: Path) -> None:
    """Streams by an error event and a cut, plain calls by a 503, publishers by `cancel` and `bye`; exit 0, in time."""
    async with (
        open_broker_process(tmp_path / "w.db", arguments=("--grace", "0.5")) as broker,
        trio.open_nursery() as nursery,
        AsyncExitStack() as stack,
    ):
        loads = [await put_load(broker, number, stack, nursery) for number in range(2)]
        # These hold nothing up: one that reads nothing and says nothing, one in the middle of a head, of a body.
        silent, head, body = [await stack.enter_async_context(broker.connect()) for _ in range(3)]
        await head.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: ")
        await body.send(request_bytes("POST", "/v1/chat/completions", "content-length: 1000", host="127.0.0.1") + b"{")
        code, seconds = await broker.end(signal.SIGTERM)
        assert (code, 0.5 <= seconds < 5) == (0, True), seconds
        for load in loads:
            for _, client in load.streams:
                rest = await client.read_to_end()
                assert rest.count(b"event: error") == 1
                assert b'"code":"shutting_down"' in rest
                assert DONE not in rest
                assert not rest.endswith(b"\r\n0\r\n\r\n")
            await load.crowd.done.wait()
            assert load.crowd.codes == {(503, "shutting_down")}
            assert {each.headers["x-should-retry"] for each in load.crowd.answers} == {"false"}
            await load.channel.ended.wait()
            assert [each["reason"] for each in load.channel.all("cancel")] == ["shutdown"] * (STREAMS + PLAIN)
            assert load.channel.frames[-1] == ("bye", {"reason": "shutdown"})
        assert await silent.read_to_end() == b""
        assert not [line for line in broker.err if "Traceback" in line]
