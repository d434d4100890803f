"""Clients that are slow, rude or gone, at every step of an infer. Beside each a sibling's stream goes on.

What is theirs ends with them: a slot, a place in the queue, a body, a connection; their publisher is told once, if it had
been told of them at all. What is shared, such as a wake, goes on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

import pytest
import trio

from tests.hostile.sibling import Sibling, sibling
from tests.http.served import JSON, SSE, Frame, Served, WirePublisher, as_bytes, head, open_served, wait_until
from tests.http.wire import Answer, Wire, request_bytes
from wakecall.config import BrokerConfig
from wakecall.http.barrier import BarrierSettings
from wakecall.http.guard import BodyBudget

KIB = 1024
PATH = "/v1/chat/completions"
CALL = {"model": "qwen"}
STREAM = {"model": "qwen", "stream": True}
EVENT = b"data: 1\n\n"
CHUNKED = "transfer-encoding: chunked"

#: Seconds in which a body must go on, a head must be whole, a stream must begin. The sibling is held to them too: a machine
#: that stands still for a moment must not cut him.
STALL_S = 1.5
HEAD_S = 1.0
FIRST_BYTE_S = 3.0
CONFIG = BrokerConfig(peer_stall_s=STALL_S, first_byte_s=FIRST_BYTE_S, max_body_bytes=64 * KIB)


@dataclass
class Stage:
    """A broker under attack.

    Args:
        served: it.
        sibling: whom nothing of it may disturb.
        budget: what all bodies hold.
        held: what the sibling's does.
    """

    served: Served
    sibling: Sibling
    budget: BodyBudget
    held: int

    @property
    def connections(self) -> int:
        return len(self.served.server.barrier.connections)

    async def wait_let_go(self, connections: int) -> None:
        """Return once no more connections are open than so many."""
        await wait_until(lambda: self.connections <= connections)


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    """At its end no body is held but the sibling's."""
    async with open_served(CONFIG, settings=BarrierSettings(head_s=HEAD_S, peer_stall_s=STALL_S)) as served:
        async with sibling(served) as each:
            budget = served.app.asgi_app.budget
            held = budget.held_bytes
            yield Stage(served, each, budget, held)
            await wait_until(lambda: budget.held_bytes == held)


async def is_served(served: Served, publisher: WirePublisher) -> None:
    """A call of somebody else's goes through, and its frame is the very next that the publisher gets."""
    async with served.calling(CALL) as client:
        frame = await publisher.next("infer")
        assert (await publisher.answer(frame, b'{"next": 1}')).status == 200
        await client.read_head()
        assert (client.status, await client.rest()) == (200, (b'{"next": 1}', False))


def request(body: object, *headers: str) -> bytes:
    data = as_bytes(body)
    return head("POST", PATH, JSON, f"content-length: {len(data)}", *headers) + data


# Slow, and too much -------------------------------------------------------------------------------------------------


def code(answer: Answer) -> tuple[int, str, bool]:
    """Status, error code, and whether the connection is to end."""
    return answer.status, answer.code if answer.status >= 400 else "", answer.headers.get("connection") == "close"


@pytest.mark.parametrize("so_far", [b"", request(CALL)[:-25]], ids=["from the first byte", "from its last lines on"])
async def test_a_head_that_does_not_end_is_408(stage: Stage, so_far: bytes) -> None:
    """A byte now and then does not buy more time; then the end."""
    connections = stage.connections
    async with stage.served.server.connect() as wire, trio.open_nursery() as nursery:

        async def trickle() -> None:
            for byte in request(CALL, "x-slow: " + "y" * 1000)[:-25]:
                await wire.send(bytes([byte]))
                await stage.sibling.beat()

        await wire.send(so_far[: so_far.find(b"\r\n\r\n") + 2])
        start = trio.current_time()
        nursery.start_soon(trickle)
        assert code(await wire.read_answer("POST")) == (408, "request_timeout", True)
        assert trio.current_time() - start >= 0.9 * HEAD_S
        nursery.cancel_scope.cancel()
    await stage.wait_let_go(connections)
    assert stage.served.broker.statistics().accepted == 1, "the sibling's"


async def test_a_connection_on_which_nothing_is_said_is_ended(stage: Stage) -> None:
    """Without a word: there is no request to be answered."""
    settings = BarrierSettings(keep_alive_s=0.3)
    async with open_served(settings=settings) as served, sibling(served), served.server.connect() as wire:
        assert await wire.read_to_end() == b""
        async with served.server.connect() as spoken:
            assert (await spoken.ask("GET", "/v1/models", "x: y")).status in (200, 403)
            assert await spoken.read_to_end() == b""


async def test_a_body_may_be_slow_as_long_as_it_goes_on(stage: Stage) -> None:
    """A byte a beat for longer than a body may stall: the call is served as any other."""
    served = stage.served
    body = as_bytes(CALL)
    async with served.publishing() as publisher, served.server.connect() as wire:
        await wire.send(head("POST", PATH, JSON, f"content-length: {len(body)}"))
        start = trio.current_time()
        for byte in body[:-1]:
            await wire.send(bytes([byte]))
            await stage.sibling.beat()
        assert trio.current_time() - start > STALL_S
        await wire.send(body[-1:])
        await publisher.answer(await publisher.next("infer"), b"{}")
        assert (await wire.read_answer("POST")).status == 200


async def test_a_body_that_stops_is_408(stage: Stage) -> None:
    """Also one that never began, and one that was asked for; the answer comes when nothing came for so long."""
    served, begun = stage.served, []
    connections = stage.connections

    async def stop(*headers: str, sent: bytes = b"") -> None:
        async with served.server.connect() as wire:
            await wire.send(head("POST", PATH, JSON, *headers) + sent)
            start = trio.current_time()
            begun.append(headers)
            answer = await wire.read_answer("POST")
            assert code(answer) == (408, "request_timeout", True)
            assert answer.interim == ([100] if "expect: 100-continue" in headers else [])
            assert trio.current_time() - start >= 0.9 * STALL_S
            assert await wire.read_to_end() == b""

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(stop, "content-length: 10"))
        nursery.start_soon(partial(stop, "content-length: 10", sent=b'{"model"'))
        nursery.start_soon(partial(stop, CHUNKED))
        nursery.start_soon(partial(stop, CHUNKED, sent=b'8\r\n{"model"\r\n'))
        nursery.start_soon(partial(stop, CHUNKED, sent=b"8\r\n{"))
        nursery.start_soon(partial(stop, CHUNKED, sent=b"ffff"))
        nursery.start_soon(partial(stop, "content-length: 10", "expect: 100-continue"))
    assert len(begun) == 7
    await stage.wait_let_go(connections)
    assert served.broker.statistics().accepted == 1, "the sibling's"


async def test_a_request_without_a_body_is_400(stage: Stage) -> None:
    """With no length, with none of it, and with chunks that hold nothing; the connection serves on."""
    async with stage.served.server.connect() as wire:
        for framing, sent in (((), b""), (("content-length: 0",), b""), ((CHUNKED,), b"0\r\n\r\n")):
            await wire.send(head("POST", PATH, JSON, *framing) + sent)
            assert code(await wire.read_answer("POST")) == (400, "invalid_json", False)
        await wire.send(head("POST", PATH, "content-type: multipart/form-data; boundary=x"))
        assert code(await wire.read_answer("POST")) == (400, "invalid_request", False)
        await wire.send(head("GET", "/v1/models"))
        assert (await wire.read_answer()).status == 200


async def test_a_body_that_is_too_large_is_413_and_the_end(stage: Stage) -> None:
    """Declared: before a byte of it came, asked for or not. In chunks: with the one that is too much. To one who sends on
    until he has all of it out, too; and nothing of it is held any more."""
    connections = stage.connections
    most = CONFIG.max_body_bytes
    chunk = b"%x\r\n%b\r\n" % (most, bytes(most))
    too_large = (413, "request_too_large", True)
    cases: tuple[tuple[tuple[str, ...], bytes], ...] = (
        ((f"content-length: {most + 1}",), b""),
        ((f"content-length: {most + 1}", "expect: 100-continue"), b""),
        ((f"content-length: {10**18}",), b"x" * (1 << 20)),
        ((CHUNKED,), chunk + b"1\r\nx\r\n"),
        ((CHUNKED,), chunk * 16),
        ((CHUNKED,), b"%x\r\n" % 10**18 + bytes(1 << 20)),
    )
    for path in (PATH, "/publisher/v1/sessions/laptop/heartbeat", "/publisher/v1/tasks/t/failure"):
        for headers, sent in cases:
            async with stage.served.server.connect() as wire:
                await wire.send(head("POST", path, JSON, *headers) + sent)
                answer = await wire.read_answer("POST")
                assert (code(answer), answer.interim) == (too_large, []), (path, headers)
                assert await wire.read_to_end() == b""
    await stage.wait_let_go(connections)
    assert stage.budget.held_bytes == stage.held
    assert stage.served.broker.statistics().accepted == 1, "the sibling's"


async def test_a_body_longer_than_it_said_is_a_body_and_junk(stage: Stage) -> None:
    """Its first bytes are the call, as was said; the rest is no request, and the end."""
    async with stage.served.server.connect() as wire:
        await wire.send(request(b'{"model": "nobody"}') + b"and more")
        assert code(await wire.read_answer("POST")) == (404, "model_not_found", False)
        await wire.send(b"\r\n\r\n")
        assert code(await wire.read_answer("POST")) == (400, "invalid_request", True)
        assert await wire.read_to_end() == b""


async def test_a_head_that_began_behind_a_request_goes_on_after_its_answer(stage: Stage) -> None:
    """Wherever the packets end: also before the empty line that is its own end."""
    for at in (1, 20, -4, -3, -2, -1):
        async with stage.served.server.connect() as wire:
            behind = head("GET", "/v1/models")
            await wire.send(request(b'{"model": "nobody"}') + behind[:at])
            assert code(await wire.read_answer("POST")) == (404, "model_not_found", False)
            await wire.send(behind[at:])
            assert code(await wire.read_answer()) == (200, "", False)


async def test_one_who_half_closes_at_once_gets_a_whole_answer_or_none(stage: Stage) -> None:
    """His FIN is his leaving, if it comes before the answer: what was not begun by then is not said."""
    for _ in range(20):
        async with stage.served.server.connect() as wire:
            await wire.send(head("GET", "/v1/models"))
            await wire.half_close()
            answer = await wire.read_answer()
            if answer.status:
                assert (answer.status, len(answer.body)) == (200, int(answer.headers["content-length"]))
            assert await wire.read_to_end() == b""


# Leaving ------------------------------------------------------------------------------------------------------------


async def half_close(wire: Wire) -> None:
    await wire.half_close()


async def close(wire: Wire) -> None:
    await wire.stream.aclose()


async def reset(wire: Wire) -> None:
    wire.reset()


LEAVE: dict[str, Callable[[Wire], Awaitable[None]]] = {"half-close": half_close, "close": close, "rst": reset}


async def check_end(how: str, wire: Wire, already: bytes = b"") -> None:
    """Who only said that it sends no more gets what was on its way, nothing more, and the end."""
    if how == "half-close":
        assert await wire.read_to_end() == already


@pytest.fixture(params=LEAVE)
def how(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def leaving(
    stage: Stage, *llms: dict[str, object], failed: int = 0
) -> AsyncIterator[tuple[Served, WirePublisher, Wire]]:
    """A publisher of `qwen`, and a client who is gone by the end of the block; then nothing of his is left, nobody else's
    infer ended badly, and the model serves on."""
    served = stage.served
    async with AsyncExitStack() as stack:
        publisher = await stack.enter_async_context(served.publishing(*llms))
        connections = stage.connections
        async with served.server.connect() as wire:
            yield served, publisher, wire
            await stage.wait_let_go(connections)
        await stage.sibling.beat()
        view = served.broker.llm_view("qwen")
        assert (view.in_flight, view.waiting, view.waking) == (0, 0, False)
        await is_served(served, publisher)
        assert served.broker.statistics().failed == failed


async def check_cancelled(publisher: WirePublisher, frame: Frame) -> None:
    """One `cancel`, that says why; what comes for the task after it is 410."""
    cancel = await publisher.next("cancel")
    assert cancel.data == {"task_id": frame.task_id, "reason": "client_disconnected"}
    late = await publisher.answer(frame, b"{}")
    assert (late.status, late.code) == (410, "task_cancelled")


@pytest.mark.parametrize("framing", ["content-length: 1000", CHUNKED])
async def test_one_who_leaves_while_his_body_is_uploading_was_never_there(stage: Stage, how: str, framing: str) -> None:
    """Not accepted, not counted, no frame. Who only half-closes is told that this is no request."""
    async with leaving(stage) as (served, _, wire):
        accepted = served.broker.statistics().accepted
        await wire.send(head("POST", PATH, JSON, framing) + b'8\r\n{"model"\r\n')
        await wait_until(lambda: stage.budget.held_bytes > stage.held)
        await LEAVE[how](wire)
        if how == "half-close":
            answer = await wire.read_answer("POST")
            assert (answer.status, answer.code, answer.headers["connection"]) == (400, "invalid_request", "close")
        await check_end(how, wire)
        await wait_until(lambda: stage.budget.held_bytes == stage.held)
        assert served.broker.statistics().accepted == accepted


async def test_one_who_leaves_the_queue_just_leaves_it(stage: Stage, how: str) -> None:
    """His publisher never hears of him, and those before and behind him keep their turn."""
    async with leaving(stage, {"name": "qwen", "max_concurrency": 1}) as (served, publisher, wire):
        async with served.calling(CALL) as before:
            first = await publisher.next("infer")
            await wire.send(request(CALL))
            await wait_until(lambda: served.broker.statistics().waiting == 1)
            async with served.calling(CALL) as behind:
                await wait_until(lambda: served.broker.statistics().waiting == 2)
                await LEAVE[how](wire)
                await check_end(how, wire)
                await wait_until(lambda: served.broker.statistics().waiting == 1)
                for client, frame in ((before, first), (behind, None)):
                    # Of the one who left there is no frame between theirs.
                    frame = frame or await publisher.next("infer")
                    assert (await publisher.answer(frame, b"{}")).status == 200
                    assert (await client.wire.read_answer("POST")).body == b"{}"
        assert served.broker.statistics().cancelled == 1


async def test_one_who_leaves_a_wake_leaves_it_to_the_others(stage: Stage, how: str) -> None:
    """It goes on though he was the last; what comes of it is kept."""
    async with leaving(stage, {"name": "qwen", "status": "hibernating"}) as (served, publisher, wire):
        await wire.send(request(CALL))
        wake = await publisher.next("wake")
        await LEAVE[how](wire)
        await check_end(how, wire)
        await wait_until(lambda: served.broker.statistics().waiting == 0)
        assert served.broker.llm_view("qwen").waking
        assert (await publisher.answer(wake)).status == 200
        assert served.broker.llm("qwen").status == "active"
        assert served.broker.statistics().cancelled == 1


@pytest.mark.parametrize("body", [CALL, STREAM], ids=["plain", "stream"])
async def test_one_who_leaves_before_the_first_byte_cancels(stage: Stage, how: str, body: dict[str, object]) -> None:
    async with leaving(stage) as (served, publisher, wire):
        await wire.send(request(body))
        frame = await publisher.next("infer")
        await LEAVE[how](wire)
        await check_cancelled(publisher, frame)
        await check_end(how, wire)
        assert served.broker.statistics().cancelled == 1


@pytest.mark.parametrize(
    ("sent", "shown"),
    [((EVENT,), EVENT), ((EVENT, EVENT, b"data: half"), EVENT + EVENT)],
    ids=["first byte", "mid-stream"],
)
async def test_one_who_leaves_a_stream_ends_its_upload(
    stage: Stage, how: str, sent: tuple[bytes, ...], shown: bytes
) -> None:
    """The upload is answered 410 before its end, which ends the engine's work."""
    async with leaving(stage) as (served, publisher, wire):
        await wire.send(request(STREAM))
        frame = await publisher.next("infer")
        async with publisher.upload(frame, SSE) as upload:
            for each in sent:
                await upload.send(each)
            got = b""
            while got.count(EVENT) < shown.count(EVENT):
                got += await wire.read_some()
            await LEAVE[how](wire)
            early = await upload.wire.read_answer("POST")
            assert (early.status, early.code, early.headers["connection"]) == (410, "task_cancelled", "close")
        await check_cancelled(publisher, frame)
        await check_end(how, wire)
        assert served.broker.statistics().cancelled == 1


async def test_one_who_leaves_while_his_plain_answer_is_held_cancels(stage: Stage, how: str) -> None:
    """All but its end is here, and he has had nothing of it: not even a head."""
    async with leaving(stage) as (served, publisher, wire):
        await wire.send(request(CALL))
        frame = await publisher.next("infer")
        async with publisher.upload(frame, JSON) as upload:
            await upload.send(b'{"nearly": "all of it"')
            await stage.sibling.beat()
            await LEAVE[how](wire)
            early = await upload.wire.read_answer("POST")
            assert (early.status, early.code) == (410, "task_cancelled")
        await check_cancelled(publisher, frame)
        await check_end(how, wire)
        assert served.broker.statistics().cancelled == 1


@pytest.mark.parametrize("body", [CALL, STREAM], ids=["plain", "stream"])
async def test_one_who_leaves_after_the_end_was_served(stage: Stage, how: str, body: dict[str, object]) -> None:
    """He has had it all; nobody is told of anything."""
    async with leaving(stage) as (served, publisher, wire):
        await wire.send(request(body))
        frame = await publisher.next("infer")
        sent = EVENT if body is STREAM else b"{}"
        assert (await publisher.answer(frame, sent, SSE if body is STREAM else JSON)).status == 200
        answer = await wire.read_answer("POST")
        assert (answer.status, answer.body, answer.is_cut) == (200, sent, False)
        await LEAVE[how](wire)
        await check_end(how, wire)
        assert (served.broker.statistics().cancelled, served.broker.statistics().completed) == (0, 1)


# Bytes behind a request ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "behind",
    [b"\r\n", request_bytes("GET", "/v1/models"), request(CALL), b"\x00junk", b"x" * 60_000],
    ids=["an empty line", "a request", "an infer", "junk", "60,000 bytes"],
)
@pytest.mark.parametrize("body", [CALL, STREAM], ids=["plain", "stream"])
async def test_bytes_behind_a_request_do_not_hide_its_clients_end(
    stage: Stage, body: dict[str, object], behind: bytes
) -> None:
    """Pipelined, then FIN: what was under way is cancelled at once; what had not begun never does; he gets the end."""
    async with leaving(stage) as (served, publisher, wire):
        await wire.send(request(body) + behind)
        frame = await publisher.next("infer")
        await stage.sibling.beat()
        await wire.half_close()
        await check_cancelled(publisher, frame)
        assert await wire.read_to_end() == b""
        assert served.broker.statistics().accepted == 2, "the sibling's, and one of his"


async def test_more_bytes_behind_a_request_than_are_read_ahead_leave_it_to_its_deadlines(stage: Stage) -> None:
    """200,000 of them hide the FIN; then the answer is what his own time says, and they are answered for what they are."""
    async with leaving(stage, failed=1) as (_, publisher, wire):
        await wire.send(request(STREAM) + b"x" * 200_000)
        frame = await publisher.next("infer")
        await wire.half_close()
        cancel = await publisher.next("cancel")
        assert cancel.data == {"task_id": frame.task_id, "reason": "deadline_exceeded"}
        answer = await wire.read_answer("POST")
        assert (answer.status, answer.code, answer.json["error"]["phase"]) == (504, "deadline_exceeded", "first_byte")
        junk = await wire.read_answer()
        assert (junk.status, junk.headers["connection"]) == (431, "close")
        assert await wire.read_to_end() == b""
