"""Publishers that read nothing, or are gone without a word. In real time, for it is a kernel that notices.

Either way `peer_stall_s` rules: a peer that takes no byte for so long while bytes wait for it, or whose machine does not
answer TCP's own probes, is cut. Here it is one or two seconds.
"""

from __future__ import annotations

import pytest
import trio

from tests.hostile.connections import end_of, told
from tests.hostile.memory import MIB, holding_less_than
from tests.hostile.sibling import sibling
from tests.hostile.test_uploads import CALL, EVENT, STREAM, serve_one
from tests.http.served import SSE, Reading, Served, as_bytes, head, open_served, wait_until
from tests.http.test_app_relay import last_event
from tests.http.test_sockets import fall_silent, linux_only
from wakecall.config import BrokerConfig
from wakecall.http.barrier import BarrierSettings, Connection
from wakecall.models import InferRequest, Status

STALL_S = 1.0
FRAMES = "/publisher/v1/sessions/laptop/frames"


def connection_to(served: Served, path: str) -> Connection:
    """The server's end of the only connection that asked for `path`."""
    (found,) = (each for each in served.server.barrier.connections if each._http._path == path)
    return found


async def wait_ended(served: Served, connection: Connection) -> None:
    if connection in served.server.barrier.connections:
        await wait_until(lambda: connection not in served.server.barrier.connections)


@pytest.mark.parametrize("reads_again", [False, True])
async def test_a_publisher_that_reads_no_frames_loses_its_channel(reads_again: bool) -> None:
    """After `peer_stall_s` all that it was sent fails with 503 `publisher_disconnected`, and what still queued with
    `model_offline`. Its own connection is reset a moment later; if it reads again before that it finds what was on its way,
    `bye` with `stale`, and a clean end. What it answers gets 410. It may come back at once."""
    # Its socket has another clock than its channel, which starts with the write: here one of the two goes first.
    barrier = BarrierSettings(peer_stall_s=10 if reads_again else STALL_S)
    async with open_served(BrokerConfig(peer_stall_s=STALL_S), settings=barrier) as served, sibling(served) as s:
        await served.register("laptop", {"name": "qwen"})
        async with served.server.connect(receive_buffer=16384) as channel:
            await channel.send(head("GET", FRAMES))
            await wait_until(lambda: served.broker.statistics().channels == 2)
            connection = connection_to(served, FRAMES)
            request = InferRequest("/v1/completions", b"x" * 60_000)
            async with served.calling(CALL) as client:
                await wait_until(lambda: served.broker.llm_view("qwen").in_flight == 1)
                (task_id,) = (each.task_id for each in served.broker.task_views() if each.llm == "qwen")
                # 12 MB of frames: what is untaken stays within its bound, and encoded is a part at a time.
                with holding_less_than(8 * MIB):
                    infers = [served.broker.infer_nowait("qwen", request) for _ in range(200)]
                    start = trio.current_time()
                    await s.beat()
                    assert served.broker.llm_view("qwen").waiting > 0
                    got = await client.wire.read_answer("POST")
                if reads_again:
                    reading = await Reading(channel, "GET").read_head()
                    text, cut = await reading.rest()
                    assert (cut, text.count(b"event: bye\n")) == (False, 1)
                    assert text.endswith(b'event: bye\ndata: {"reason":"stale"}\n\n')
                else:
                    await wait_ended(served, connection)
                    assert await end_of(channel) == "rst"
                assert STALL_S * 0.9 < trio.current_time() - start < 12
                assert (got.status, got.code, got.headers["x-should-retry"]) == (503, "publisher_disconnected", "false")
            codes = {infer.error.code for infer in infers if infer.error is not None}
            assert codes == {"publisher_disconnected", "model_offline"}
            assert all(infer.is_over for infer in infers)
            row = served.broker.llm("qwen")
            assert (row.status, row.remembers) == (Status.INACTIVE, Status.ACTIVE)
        late = await told(served, "POST", f"/publisher/v1/tasks/{task_id}/result", body=b"{}")
        assert late == (410, "task_cancelled", "kept")
        async with served.channel("laptop") as publisher:
            assert served.broker.llm("qwen").status is Status.ACTIVE
            await serve_one(served, publisher)


async def test_a_publisher_that_fetches_a_body_and_does_not_read_it_is_reset() -> None:
    """And that is all: a piece of the body was held for it, its channel is another connection, and it may still answer."""
    config, barrier = BrokerConfig(peer_stall_s=STALL_S), BarrierSettings(peer_stall_s=STALL_S)
    async with open_served(config, settings=barrier) as served, sibling(served) as s, served.publishing() as publisher:
        async with served.calling(as_bytes({**CALL, "pad": "x" * 24 * MIB})) as client:
            frame = await publisher.next("infer")
            assert "body" not in frame.data
            target = f"/publisher/v1/tasks/{frame.task_id}/body"
            async with served.server.connect(receive_buffer=4096) as wire:
                with holding_less_than(2 * MIB):
                    await wire.send(head("GET", target))
                    await wire.read_some(1)
                    start = trio.current_time()
                    await s.beat()
                    await wait_ended(served, connection_to(served, target))
                assert STALL_S * 0.9 < trio.current_time() - start < 12
                assert await end_of(wire) == "rst"
            assert (await publisher.answer(frame, b'{"all": "the same"}')).status == 200
            await client.read_head()
            assert (client.status, await client.rest()) == (200, (b'{"all": "the same"}', False))


@linux_only
async def test_a_publisher_gone_silent_is_lost_within_the_stall_time() -> None:
    """No FIN, no RST, as with a pulled cable. Two publishers at once, for it takes two seconds:

    *laptop*, all of whose connections fall silent: its callers get 503, or the error event and the cut, with one of two
    codes (its channel and its upload end at the same moment), and its rows are inactive.
    *box*, one of whose uploads falls silent: that one task fails as `publisher_error`; its channel serves the next call.
    """
    barrier = BarrierSettings(peer_stall_s=2)
    async with open_served(BrokerConfig(peer_stall_s=2), settings=barrier) as served, sibling(served) as s:
        async with served.publishing() as laptop, served.publishing({"name": "other"}, session_id="box") as box:
            async with (
                served.calling(CALL) as plain,
                served.calling(STREAM) as stream,
                served.calling({"model": "other", "stream": True}) as others,
            ):
                frames = sorted(
                    [await laptop.next("infer"), await laptop.next("infer")], key=lambda f: f.data["stream"]
                )
                async with laptop.upload(frames[1], SSE) as lost, box.upload(await box.next("infer"), SSE) as broken:
                    for upload, client in ((lost, stream), (broken, others)):
                        await upload.send(EVENT)
                        await client.read_head()
                        assert await client.until(EVENT) == EVENT
                    for wire in (laptop.reading.wire, lost.wire, broken.wire):
                        fall_silent(wire.stream.socket)
                    start = trio.current_time()
                    await s.beat()
                    got = await plain.wire.read_answer("POST")
                    assert (got.status, got.code) == (503, "publisher_disconnected")
                    assert got.headers["x-should-retry"] == "false"
                    for client, codes in (
                        (stream, {"publisher_disconnected", "publisher_error"}),
                        (others, {"publisher_error"}),
                    ):
                        text, cut = await client.rest()
                        assert cut
                        assert last_event(text)["error"]["code"] in codes
                    assert 1 < trio.current_time() - start < 8
                assert served.broker.llm("qwen").status is Status.INACTIVE
            assert served.broker.llm("other").status is Status.ACTIVE
            async with served.calling({"model": "other"}) as client:
                assert (await box.answer(await box.next("infer"), b"{}")).status == 200
                await client.read_head()
                assert client.status == 200


@linux_only
async def test_a_publisher_gone_silent_comes_back_before_it_is_missed() -> None:
    """Its new channel supersedes the silent one at once: nobody waits for what the dead connection has in its buffers."""
    async with open_served() as served, sibling(served) as s, served.publishing() as publisher:
        async with served.calling(CALL) as client:
            frame = await publisher.next("infer")
            fall_silent(publisher.reading.wire.stream.socket)
            async with served.channel("laptop") as newer:
                got = await client.wire.read_answer("POST")
                assert (got.status, got.code) == (503, "publisher_disconnected")
                assert (await newer.answer(frame, b"{}")).code == "task_cancelled"
                await s.beat()
                await serve_one(served, newer)


@pytest.mark.parametrize("end", ["fin", "rst"])
async def test_a_publisher_that_dies_whole_takes_its_own_tasks_and_no_others(end: str) -> None:
    """Channel and upload at one moment, in the middle of a chunk. Its rows are inactive at once, and there again as soon as
    it is back."""
    async with open_served() as served, sibling(served) as s:
        async with served.publishing() as publisher:
            async with served.calling(STREAM) as stream, served.calling(CALL) as plain:
                frames = sorted(
                    [await publisher.next("infer"), await publisher.next("infer")], key=lambda f: f.data["stream"]
                )
                async with publisher.upload(frames[1], SSE) as upload:
                    await upload.wire.send(b"3E8\r\n" + EVENT + b"data: ha")
                    await stream.read_head()
                    assert await stream.until(EVENT) == EVENT
                    for wire in (upload.wire, publisher.reading.wire):
                        if end == "rst":
                            wire.reset()
                        else:
                            await wire.stream.aclose()
                text, cut = await stream.rest()
                assert (cut, text.startswith(b"event: error\n")) == (True, True)
                assert last_event(text)["error"]["code"] in {"publisher_disconnected", "publisher_error"}
                got = await plain.wire.read_answer("POST")
                assert (got.status, got.code) == (503, "publisher_disconnected")
        assert served.broker.llm("qwen").status is Status.INACTIVE
        await s.beat()
        async with served.channel("laptop") as back:
            await serve_one(served, back)
