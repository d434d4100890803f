"""Peers that are slow are not peers that are stuck. In real time, for it is a kernel that fills and empties."""

from __future__ import annotations

import json

import pytest
import trio

from tests.http.served import Served, head, open_served, wait_until
from tests.http.wire import Wire
from wakecall.config import BrokerConfig
from wakecall.http.barrier import BarrierSettings
from wakecall.models import InferRequest, InferSettled
from wakecall.task import Infer

STALL_S = 1.0
CONFIG = BrokerConfig(peer_stall_s=STALL_S)
BARRIER = BarrierSettings(peer_stall_s=STALL_S)
NDJSON = "content-type: application/x-ndjson"
SSE = "content-type: text/event-stream"
MIB = 1 << 20


async def read_slowly(wire: Wire, seconds: float) -> bytearray:
    """A little of what arrives every 0.2 s, for so long."""
    got = bytearray()
    end = trio.current_time() + seconds
    while trio.current_time() < end:
        piece = await wire.read_some(8192)
        assert piece, "the connection ended"
        got += piece
        await trio.sleep(0.2)
    return got


async def call(wire: Wire) -> None:
    body = json.dumps({"model": "qwen", "stream": True}).encode()
    await wire.send(head("POST", "/v1/completions", f"content-length: {len(body)}") + body)


async def burst(served: Served, channel: Wire) -> list[Infer]:
    """A channel with far more frames for it than a kernel holds."""
    await channel.send(head("GET", "/publisher/v1/sessions/laptop/frames"))
    await wait_until(lambda: served.broker.statistics().channels == 1)
    request = InferRequest("/v1/completions", b"x" * 60_000)
    return [served.broker.infer_nowait("qwen", request) for _ in range(200)]


@pytest.mark.parametrize("content_type", [NDJSON, SSE])
async def test_a_client_that_reads_slowly_gets_everything(content_type: str) -> None:
    """For longer than three times the bound it reads a little at a time, with bytes for it held all the while."""
    line = b"data: %b\n\n" % (b"x" * 65528)
    async with open_served(CONFIG, settings=BARRIER) as served, served.publishing() as publisher:
        async with served.server.connect(receive_buffer=16384) as client, trio.open_nursery() as nursery:
            await call(client)
            frame = await publisher.next("infer")
            uploaded = trio.Event()

            async def upload() -> None:
                async with publisher.upload(frame, content_type) as pieces:
                    for _ in range(256):
                        await pieces.send(line)
                    assert (await pieces.finish()).status == 200
                    uploaded.set()

            nursery.start_soon(upload)
            got = await read_slowly(client, 3.5 * STALL_S)
            assert not uploaded.is_set()  # so there was something to take all the time
            while not got.endswith(b"\r\n0\r\n\r\n"):
                piece = await client.read_some()
                assert piece, "the connection ended"
                got += piece
            assert got.count(b"x" * 8192) >= 256
            await uploaded.wait()
        now = served.broker.statistics()
        assert (now.completed, now.cancelled, now.failed) == (1, 0, 0)


async def test_a_client_that_reads_nothing_is_cut() -> None:
    async with open_served(CONFIG, settings=BARRIER) as served, served.publishing() as publisher:
        settled: list[InferSettled] = []
        served.broker.add_observer(lambda event: settled.append(event) if isinstance(event, InferSettled) else None)
        async with served.server.connect(receive_buffer=16384) as client:
            await call(client)
            frame = await publisher.next("infer")
            start = trio.current_time()
            async with publisher.upload(frame, NDJSON) as pieces:
                async with trio.open_nursery() as nursery:

                    async def send() -> None:
                        while True:
                            await pieces.send(b"x" * 65536)

                    nursery.start_soon(send)
                    assert (await publisher.next("cancel")).task_id == frame.task_id
                    nursery.cancel_scope.cancel()
            assert STALL_S * 0.9 < trio.current_time() - start < 12
        await wait_until(lambda: bool(settled))
        assert [each.outcome for each in settled] == ["cancelled"]


async def test_a_publisher_that_reads_its_frames_slowly_keeps_its_channel() -> None:
    async with open_served(CONFIG, settings=BARRIER) as served:
        await served.register("laptop", {"name": "qwen"})
        async with served.server.connect(receive_buffer=16384) as channel:
            infers = await burst(served, channel)
            got = await read_slowly(channel, 3.5 * STALL_S)
            assert served.broker.statistics().waiting > 0  # so frames waited all the time
            # Each byte is looked at once: to count in all of them at every piece is more than a busy machine can do.
            mark, seen, looked_at = b"event: infer", 0, 0
            while seen < len(infers):
                if (found := got.find(mark, looked_at)) >= 0:
                    seen, looked_at = seen + 1, found + len(mark)
                    continue
                looked_at = max(looked_at, len(got) - len(mark) + 1)  # a mark may be cut in two by the pieces
                piece = await channel.read_some()
                assert piece, "the channel ended"
                got += piece
            assert b"event: bye" not in got
            assert not any(infer.is_over for infer in infers)
            for infer in infers:
                infer.cancel()


async def test_a_publisher_that_takes_no_frames_loses_its_channel() -> None:
    async with open_served(CONFIG, settings=BARRIER) as served:
        await served.register("laptop", {"name": "qwen"})
        async with served.server.connect(receive_buffer=16384) as channel:
            start = trio.current_time()  # the burst may take a good part of it
            infers = await burst(served, channel)
            await wait_until(lambda: served.broker.statistics().channels == 0)
            assert STALL_S * 0.9 < trio.current_time() - start < 12
            assert {infer.error.code for infer in infers if infer.error} <= {"publisher_disconnected", "model_offline"}
            assert all(infer.is_over for infer in infers)
