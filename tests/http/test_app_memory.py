"""What one request can make the broker hold: a piece of a body at a time, however many ask for it and read nothing."""

from __future__ import annotations

import os
import tracemalloc
from typing import Any

import pytest
import trio
import trio.testing

from tests.http.served import JSON, Served, head
from tests.http.wire import Wire
from wakecall.http.answers import PIECE_BYTES
from wakecall.http.guard import BodyBudget, Guard, current_exchange_of
from wakecall.http.sse import FramesBody
from wakecall.models import InferRequest
from wakecall.testing import FakePublisher

MIB = 1 << 20
PATIENCE_S = 15


class Sends:
    """Counts what the app hands to the server at a time."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.sizes: list[int] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counting(message: Any) -> None:
            self.sizes.append(len(message.get("body", b"")))
            await send(message)

        await self._app(scope, receive, counting)


@pytest.fixture
def sends(served: Served) -> Sends:
    counter = Sends(served.app.asgi_app)
    served.app.asgi_app = counter
    return counter


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * MIB])
async def test_a_body_that_is_fetched_goes_out_in_pieces_with_its_length(
    served: Served, sends: Sends, size: int
) -> None:
    body = os.urandom(size)
    async with FakePublisher(served.broker, "laptop", ["qwen"]) as publisher:
        infer = served.broker.infer_nowait("qwen", InferRequest("/v1/audio/transcriptions", body, "audio/wav"))
        frame = await publisher.next("infer")
        answer = await served.ask("GET", f"/publisher/v1/tasks/{frame.data['task_id']}/body")
        assert (answer.status, answer.headers["content-type"]) == (200, "audio/wav")
        assert answer.headers["content-length"] == str(size)
        assert answer.body == body
        assert max(sends.sizes) <= PIECE_BYTES
        infer.cancel()


async def test_publishers_that_fetch_a_body_and_read_nothing_hold_no_copies_of_it(served: Served) -> None:
    size = 16 * MIB
    async with FakePublisher(served.broker, "laptop", ["qwen"]) as publisher:
        infer = served.broker.infer_nowait("qwen", InferRequest("/v1/completions", bytes(size)))
        frame = await publisher.next("infer")
        target = f"/publisher/v1/tasks/{frame.data['task_id']}/body"
        tracemalloc.start()
        try:
            async with trio.open_nursery() as nursery:

                async def fetch(task_status: trio.TaskStatus[Wire]) -> None:
                    async with served.server.connect(receive_buffer=4096) as wire:
                        await wire.send(head("GET", target))
                        await wire.stream.receive_some(1)
                        task_status.started(wire)
                        await trio.sleep_forever()

                wires = [await nursery.start(fetch) for _ in range(10)]
                await trio.testing.wait_all_tasks_blocked(0.02)
                assert tracemalloc.get_traced_memory()[1] < size
                infer.cancel()
                # The infer is over: nobody holds its body any more, and what is fetched of it has no end.
                assert len(await wires[0].read_to_end()) < size
                nursery.cancel_scope.cancel()
        finally:
            tracemalloc.stop()


async def test_a_plain_answer_goes_out_in_pieces_with_its_length(served: Served, sends: Sends) -> None:
    body = b'"' + b"x" * 500_000 + b'"'
    async with served.publishing() as publisher, served.calling({"model": "qwen"}) as client:
        await publisher.answer(await publisher.next("infer"), body, JSON)
        answer = await client.wire.read_answer("POST")
        assert (answer.headers["content-length"], answer.body) == (str(len(body)), body)
        assert max(sends.sizes) <= PIECE_BYTES


async def test_a_burst_of_frames_is_written_a_part_at_a_time(served: Served) -> None:
    """In order, and none is left out."""
    await served.register("laptop", {"name": "qwen"})
    async with served.broker.open_channel("laptop") as channel:
        await channel.receive()
        body = FramesBody(channel, 15)
        infers = [served.broker.infer_nowait("qwen", InferRequest("/v1/x", b"x" * 50_000)) for _ in range(30)]
        text = b""
        for _ in range(100):
            piece = await anext(body)
            assert len(piece) < 256 * 1024
            text += piece
            if text.count(b"event: infer") == 30:
                break
        places = [text.index(infer.task_id.encode()) for infer in infers]
        assert places == sorted(places)


async def test_tiny_pieces_weigh_what_is_in_them() -> None:
    """A body in chunks of two bytes counts for its bytes against the bound; so it must not hold many times as much."""
    count = 20_000
    left = count

    async def receive() -> Any:
        nonlocal left
        if not left:
            await trio.sleep_forever()
        left -= 1
        return {"type": "http.request", "body": left.to_bytes(4)[2:], "more_body": left > 0}

    async def send(_: Any) -> None:
        await trio.lowlevel.checkpoint()

    taken = b""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal taken
        async with trio.open_nursery() as nursery:

            async def pump() -> None:
                while True:
                    await receive()

            nursery.start_soon(pump)
            taken = await current_exchange_of(scope).read_body(MIB)
            nursery.cancel_scope.cancel()

    scope: Any = {"type": "http", "path": "/", "headers": [(b"transfer-encoding", b"chunked")]}
    tracemalloc.start()
    try:
        with trio.fail_after(PATIENCE_S):
            await Guard(app, budget=BodyBudget())(scope, receive, send)
        assert len(taken) == 2 * count
        assert tracemalloc.get_traced_memory()[1] < 10 * len(taken)
    finally:
        tracemalloc.stop()
