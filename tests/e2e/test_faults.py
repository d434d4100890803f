"""Connections that are cut, stall or go silent, at every step of what an agent does and after several numbers of bytes.

Each case is an agent with a session, a row and a fault proxy of its own; the fault strikes one connection, once. Whatever it
is: who calls meanwhile gets one outcome of the protocol's table, and a clean one; the engine generates once at most; the
agent comes back by itself; and the broker, which all cases of a test share, has nothing left in the end.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from tests.e2e.clients import chat_request, open_chat
from tests.e2e.scripted_engine import EVENT, Exchange, ScriptedEngine, open_scripted_engine, wants_stream
from tests.e2e.stack import BrokerProcess, connect, open_broker_process, within
from tests.e2e.test_storm import check_all_accounted_for
from tests.faultproxy import Direction, Fault, FaultProxy, Kind, Toxics, open_fault_proxy
from tests.http.wire import Answer
from tests.publisher.peers import Publisher
from wakecall.publisher import ChannelOpen, InferFinished, InferStarted, PublishedModel, PublisherConfig

KINDS: tuple[Kind, ...] = ("fin", "rst", "stall", "silence")
CUTS = "fin", "rst"
#: For what stalls or goes silent, as that is waited for. A healthy call takes a hundredth of it.
IMPATIENT = {"keepalive_s": 0.8, "idle_s": 2.5, "first_byte_s": 3.5, "total_s": 5, "heartbeat_interval_s": 1}
DONE = b"data: [DONE]\n\n"
MIDDLE = b'data: {"choices":[],"MIDDLE":true}\n\n'
STREAM = EVENT * 3 + MIDDLE + EVENT * 3 + DONE
#: More than goes on a shared upload; and what goes there.
PLAIN = b'{"choices": [], "text": "' + b"x" * 3000 + b'MIDDLE"}' + b" " * 64 * 1024
SHORT = b'{"choices": [], "text": "SHORT"}' + b" " * 1000
#: More than goes into a frame, so that the agent fetches it.
LARGE = "x" * 100_000

WHOLE = (200, "")
LOST = (503, "publisher_disconnected")
BROKEN = (502, "publisher_error")
LATE = (504, "deadline_exceeded")
#: What a stream ends with once its head is out, whatever its code would have been before.
BROKEN_LATER = (200, "publisher_error")
LATE_LATER = (200, "deadline_exceeded")
NOBODY = {(404, "model_not_found"), (503, "model_offline")}

Outcome = tuple[int, str]


@dataclass(frozen=True)
class Place:
    """A step of an agent's work, and where in it something happens.

    Attributes:
        direction, mark, after: of the `Fault`; a case for each number.
        cut, stalled: how an infer that is under way may end.
        is_large: its body is fetched.
        reopens: the channel is a new one afterwards.
        generated: how often the engine has been asked.
    """

    name: str
    direction: Direction
    mark: bytes
    after: tuple[int, ...]
    cut: set[Outcome] = field(default_factory=set)
    stalled: set[Outcome] = field(default_factory=set)
    is_large: bool = False
    reopens: bool = False
    generated: int = 1


COMING = (
    Place("register", "up", b"PUT /publisher", (0, 100)),
    Place("register's body", "up", b'"llms"', (5,)),
    Place("register's answer", "down", b"HTTP/1.1 200", (0,)),
    Place("register's answer's body", "down", b'"session_id"', (10,)),
    Place("opening", "up", b"/frames HTTP/1.1", (0, 40)),
    Place("opening's answer", "down", b"text/event-stream", (0,)),
    Place("hello", "down", b"event: hello", (0, 30)),
)
WORKING = (
    Place("frame", "down", b"event: infer", (0, 20, 600), {LOST}, {LOST}, reopens=True, generated=0),
    Place("upload's head", "up", b"/result HTTP/1.1", (0, 60), {BROKEN}, {LATE}),
    Place("upload's body", "up", b"MIDDLE", (0, 10), {BROKEN, BROKEN_LATER}, {LATE, LATE_LATER}),
    Place("upload's answer", "down", b'"outcome"', (0,), {WHOLE}, {WHOLE}),
    # Nothing of it has been generated, and the publisher says so before the call's time is up.
    Place("body's request", "up", b"/body HTTP/1.1", (0, 30), {BROKEN}, {BROKEN}, is_large=True, generated=0),
    Place("body", "down", b"BODY", (0, 40_000), {BROKEN}, {BROKEN}, is_large=True, generated=0),
)


@dataclass
class Stage:
    """A broker, an engine that counts, and agents in this process that come and go with their cases."""

    broker: BrokerProcess
    engine: ScriptedEngine
    directory: Path
    is_impatient: bool
    generated: Counter[str] = field(default_factory=Counter)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    async def generate(self, exchange: Exchange) -> None:
        """Answer in several writes, and remember for whom."""
        self.generated[exchange.json["marker"]] += 1
        body = STREAM if wants_stream(exchange) else SHORT if exchange.json["marker"].startswith("short") else PLAIN
        kind = "text/event-stream" if wants_stream(exchange) else "application/json"
        await exchange.start(200, {"content-type": kind, "transfer-encoding": "chunked"})
        for start in range(0, len(body), 1000):
            await exchange.send(body[start : start + 1000])
        await exchange.finish()

    @asynccontextmanager
    async def open_agent(self, llm: str, proxy: FaultProxy) -> AsyncIterator[Publisher]:
        """An agent behind the proxy; it says goodbye at the end, with nothing in its hands."""
        config = PublisherConfig(
            broker_url=proxy.url,
            engine_url=self.engine.base_url,
            models=(PublishedModel(llm),),
            session_id=llm,
            state_dir=self.directory / llm,
            backoff_base_s=0.02,
            backoff_cap_s=0.1,
            request_s=2.0 if self.is_impatient else 20.0,
            keepalive_s=0.8 if self.is_impatient else 15.0,
        )
        agent = Publisher()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agent.run, config)
            yield agent
            assert not agent.ended.is_set(), agent.error or agent.reason
            agent.stop.set()
            await agent.ended.wait()
        assert len(agent.all(InferStarted)) == len(agent.all(InferFinished))

    async def call(self, llm: str, marker: str, *, stream: bool, is_large: bool = False) -> Outcome:
        """One call by a client whose own connection is good; what it got, which is checked to be clean."""
        text = f"BODY{LARGE}" if is_large else "BODY" + "y" * 800
        async with open_chat(self.broker, llm, stream=stream, marker=marker, text=text) as wire:
            answer = await wire.read_answer("POST")
        assert self.generated[marker] <= 1, "it was generated twice"
        return check_clean(answer, stream, SHORT if marker.startswith("short") else PLAIN)

    async def check_back(self, llm: str, agent: Publisher, channels: int = 1) -> None:
        """The agent is there by itself, on its so manieth channel that said hello, and serves: as the only one."""
        opened = await agent.wait(ChannelOpen, channels)
        (session,) = [each for each in await self.broker.list("sessions") if each["session_id"] == llm]
        assert (session["connected"], session["epoch"]) == (True, opened.epoch)
        marker = f"{llm}, to see whether it is back, {next(self._numbers)}"
        assert await self.call(llm, marker, stream=True) == WHOLE
        assert self.generated[marker] == 1
        row = await self.broker.wait_llm(llm, in_flight=0, waiting=0)
        assert (row["session_id"], row["status"], row["routable"]) == (llm, "active", True)


def check_clean(answer: Answer, stream: bool, plain: bytes) -> Outcome:
    """Status and code of an answer that is whole, or of a stream that ended as the protocol says it must."""
    if answer.status != 200:
        assert not answer.is_cut
        # Nothing that may have generated is to be tried again by an SDK.
        expected = None if answer.code in {"model_offline", "model_not_found"} else "false"
        assert answer.headers.get("x-should-retry") == expected
        return answer.status, answer.code
    if not stream:
        assert (answer.body, answer.is_cut) == (plain, False)
        return WHOLE
    if not answer.is_cut:
        assert answer.body == STREAM
        return WHOLE
    sent, error, last = answer.body.partition(b"event: error\ndata: ")
    assert error, "cut without a word"
    assert STREAM.startswith(sent), "what came before the error is not what was sent"
    assert last.count(b"\n\n") == 1
    assert DONE not in sent
    (code,) = [code for code in ("publisher_error", "deadline_exceeded") if f'"{code}"'.encode() in last]
    return 200, code


@asynccontextmanager
async def open_stage(directory: Path, *, is_impatient: bool = False) -> AsyncIterator[Stage]:
    """Checks at the end that every call is accounted for, and that the broker holds what it held at the start."""
    settings = IMPATIENT if is_impatient else {}
    async with open_broker_process(directory / "w.db", **settings) as broker, open_scripted_engine() as engine:
        stage = Stage(broker, engine, directory, is_impatient)
        engine.on_infer = stage.generate
        # What a first request opens for good is open now.
        await broker.list("llms")
        descriptors = broker.descriptors
        yield stage
        counted = await check_all_accounted_for(broker)
        assert counted["wakecall_channels"] == counted["wakecall_sessions"] == 0
        assert await broker.list("tasks") == []
        assert {row["status"] for row in await broker.list("llms")} == {"inactive"}
        await broker.wait_descriptors(descriptors)
        assert broker.process.returncode is None


@contextmanager
def named(*case: object) -> Iterator[None]:
    """Says of which case a failure is."""
    try:
        yield
    except Exception as error:
        error.add_note(f"--- in the case: {case}")
        raise


def cases(places: tuple[Place, ...], kind: Kind) -> list[tuple[Place, Fault]]:
    return [
        (place, Fault(place.direction, kind, after, place.mark)) for place in places for after in place.after
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@within(60)
async def test_an_agent_comes_through_whatever_happens_on_its_way(tmp_path: Path, kind: Kind) -> None:
    """While it registers and opens its channel: nobody is promised anything before it is there, and then it is."""

    async def run(stage: Stage, llm: str, fault: Fault) -> None:
        with named(fault):
            async with open_fault_proxy(stage.broker.port) as proxy:
                proxy.strike(fault)
                async with stage.open_agent(llm, proxy) as agent:
                    assert await stage.call(llm, llm, stream=False) in NOBODY | {WHOLE, LOST}
                    await proxy.wait_struck()
                    await stage.check_back(llm, agent)

    async with open_stage(tmp_path, is_impatient=kind not in CUTS) as stage, trio.open_nursery() as nursery:
        for index, (_, fault) in enumerate(cases(COMING, kind)):
            nursery.start_soon(run, stage, f"m{index}", fault)


# What is waited for is the same for a plain call and a stream, so each has one of the two.
@pytest.mark.parametrize(
    ("kind", "streams"), [("fin", (0, 1)), ("rst", (0, 1)), ("stall", (1,)), ("silence", (0,))], ids=KINDS
)
@within(60)
async def test_an_infer_ends_once_and_cleanly_whatever_happens_on_its_way(
    tmp_path: Path, kind: Kind, streams: tuple[int, ...]
) -> None:
    """Its frame, its body, its upload and the upload's answer, for plain calls and for streams."""

    async def run(stage: Stage, llm: str, place: Place, fault: Fault, stream: bool) -> None:
        with named(fault, "stream" if stream else "plain"):
            async with open_fault_proxy(stage.broker.port) as proxy, stage.open_agent(llm, proxy) as agent:
                await stage.check_back(llm, agent)
                proxy.strike(fault)
                outcome = await stage.call(llm, llm, stream=stream, is_large=place.is_large)
                await proxy.wait_struck()
                assert outcome in (place.cut if fault.kind in CUTS else place.stalled)
                assert stage.generated[llm] == place.generated
                await stage.check_back(llm, agent, channels=2 if place.reopens else 1)

    async with open_stage(tmp_path, is_impatient=kind not in CUTS) as stage, trio.open_nursery() as nursery:
        for index, (place, fault) in enumerate(cases(WORKING, kind)):
            for stream in streams:
                nursery.start_soon(run, stage, f"m{index}{'-stream' * stream}", place, fault, bool(stream))


#: The shared upload: its opening costs nothing, and what was on it is posted again as soon as that is seen to be lost. Where
#: that takes longer than a call may, the call is late.
SHARED = (
    Place("its opening", "up", b"/results HTTP/1.1", (0, 60), {WHOLE}, {WHOLE}),
    Place("a record's head", "up", b'{"task_id"', (0, 5), {WHOLE}, {LATE}),
    Place("a record", "up", b"SHORT", (0, 10), {WHOLE}, {LATE}),
    Place("the last of a record", "up", b'SHORT"}', (1000,), {WHOLE}, {WHOLE, LATE}),
)


@pytest.mark.parametrize("kind", KINDS)
@within(60)
async def test_a_short_answer_survives_what_happens_to_the_upload_that_it_shares(tmp_path: Path, kind: Kind) -> None:
    async def run(stage: Stage, llm: str, place: Place, fault: Fault) -> None:
        with named(place.name, fault):
            async with open_fault_proxy(stage.broker.port) as proxy:
                proxy.strike(fault)
                async with stage.open_agent(llm, proxy) as agent:
                    await stage.check_back(llm, agent)
                    # The first may come before the upload is open, and have one of its own.
                    outcomes = []
                    while not outcomes or not proxy.struck:
                        outcomes.append(await stage.call(llm, f"short {llm} {len(outcomes)}", stream=False))
                    assert set(outcomes[:-1]) <= {WHOLE}
                    assert outcomes[-1] in (place.cut if fault.kind in CUTS else place.stalled)
                    await stage.check_back(llm, agent)

    async with open_stage(tmp_path, is_impatient=kind not in CUTS) as stage, trio.open_nursery() as nursery:
        for index, (place, fault) in enumerate(cases(SHARED, kind)):
            nursery.start_soon(run, stage, f"m{index}", place, fault)


@within(60)
async def test_a_way_on_which_everything_arrives_in_crumbs_changes_nothing(tmp_path: Path) -> None:
    """Heads, frames, JSON and chunks, split in all places, in both directions; then a narrow way for much."""
    async with open_stage(tmp_path) as stage:
        async with open_fault_proxy(stage.broker.port) as proxy, stage.open_agent("m", proxy) as agent:
            await stage.check_back("m", agent)
            proxy.up = proxy.down = Toxics(fragment=7)
            # Everything is asked for once more, beginning with the channel.
            proxy.reset_all()
            await stage.check_back("m", agent, channels=2)
            proxy.up = proxy.down = Toxics(bandwidth=400_000, latency_s=0.02, jitter_s=0.02)
            assert await stage.call("m", "plain", stream=False) == WHOLE
            assert await stage.call("m", "large", stream=True, is_large=True) == WHOLE
            assert set(stage.generated.values()) == {1}
            assert len(agent.all(ChannelOpen)) == 2


@pytest.mark.parametrize("kind", ["fin", "rst"])
@within(60)
async def test_a_clients_broken_connection_costs_nobody_else_anything(tmp_path: Path, kind: Kind) -> None:
    """Cut in its head, its body, while it waits, in its answer: what it asked for ends, its publisher stays."""
    places: tuple[tuple[Direction, bytes, int], ...] = (
        ("up", b"POST /v1", 10),
        ("up", b"\r\n\r\n", 0),
        ("up", b'"marker"', 3),
        ("up", b"LAST", 2),
        ("down", b"", 0),
        ("down", b"HTTP/1.1 200", 20),
        ("down", EVENT, 0),
        ("down", b"MIDDLE", 0),
    )

    async def leave(stage: Stage, marker: str, fault: Fault) -> None:
        with named(fault):
            async with open_fault_proxy(stage.broker.port) as proxy, connect(proxy.port) as wire:
                proxy.strike(fault)
                await wire.send(chat_request(stage.broker, "m", stream=True, marker=marker, text="LAST"))
                answer = await wire.read_answer("POST")
                assert answer.is_cut
                assert DONE not in answer.body
                assert proxy.struck == [fault]

    async with open_stage(tmp_path) as stage, open_fault_proxy(stage.broker.port) as proxy:
        async with stage.open_agent("m", proxy) as agent:
            await stage.check_back("m", agent)
            async with trio.open_nursery() as nursery:
                for index, (direction, mark, after) in enumerate(places):
                    nursery.start_soon(leave, stage, f"leaves {index}", Fault(direction, kind, after, mark))
                    nursery.start_soon(stage.check_back, "m", agent)
            assert len(agent.all(ChannelOpen)) == 1
            assert set(stage.generated.values()) == {1}
            for index in range(3):
                assert stage.generated[f"leaves {index}"] == 0, "its request was never whole"
