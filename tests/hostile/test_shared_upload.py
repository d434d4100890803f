"""A shared upload that is a flood, a trickle or a standstill: it costs what one upload costs, and nobody beside it."""

from __future__ import annotations

import struct

import pytest
import trio

from tests.hostile.connections import Told, told_of
from tests.hostile.memory import MIB, holding_less_than
from tests.hostile.sibling import sibling
from tests.http.served import WirePublisher, open_served, wait_until
from tests.http.test_app_results import NOBODYS, record, sharing
from wakecall.records import MAX_ANSWER_BYTES, encode_record

CALL = {"model": "qwen"}


async def take_acknowledgements(publisher: WirePublisher, until: int) -> None:
    while (await publisher.next("results")).data["taken"] < until:
        pass


async def test_a_flood_of_records_for_nobody_is_dropped_and_others_go_on() -> None:
    """200,000 of them: no memory, no answer, an acknowledgement for many, and a sibling that notices nothing."""
    piece = NOBODYS * 2000
    async with open_served(patience_s=60) as served, served.publishing() as publisher, sibling(served):
        with holding_less_than(8 * MIB):
            async with sharing(served, publisher) as shared, trio.open_nursery() as nursery:
                nursery.start_soon(take_acknowledgements, publisher, 200_000)
                for _ in range(100):
                    await shared.send(piece)


async def test_the_largest_records_that_nobody_waits_for_leave_nothing_behind() -> None:
    largest = encode_record("nobody", 200, None, bytes(MAX_ANSWER_BYTES))
    async with open_served(patience_s=60) as served, served.publishing() as publisher:
        with holding_less_than(8 * MIB):
            async with sharing(served, publisher) as shared, trio.open_nursery() as nursery:
                nursery.start_soon(take_acknowledgements, publisher, 500)
                for _ in range(500):
                    await shared.send(largest)


@pytest.mark.parametrize("kept", [1, 5, 6, 40])
async def test_an_upload_that_stands_still_in_a_record_holds_nobody(kept: int) -> None:
    """Nor its own task, which is answered another way, nor its channel, nor the broker's end."""
    async with open_served() as served, served.publishing() as publisher, served.calling(CALL) as client:
        frame = await publisher.next("infer")
        async with sharing(served, publisher) as shared:
            await shared.send(record(frame.task_id, b'{"half": 1}')[:kept])
            assert (await publisher.answer(frame, b"{}")).status == 200
            assert (await client.wire.read_answer("POST")).body == b"{}"
            await served.broker.drain(0)
            assert (await shared.wire.read_answer("POST")).json["outcome"] == "ended"


@pytest.mark.parametrize(
    "bad",
    [
        struct.pack(">IH", 0xFFFFFFFF, 0xFFFF),
        struct.pack(">IH", 2 + 4096, 4096) + b"[" * 4096,
        struct.pack(">IH", 2 + 4096, 4096) + b'{"task_id":"t","x":' + b'{"x":' * 815 + b"  ",
        struct.pack(">IH", 2 + 4096, 4096) + b"\x00" * 4096,
    ],
    ids=["a length of 4 GiB", "nesting", "nested members", "zeros"],
)
async def test_what_is_no_record_is_told_so_and_its_connection_ends(bad: bytes) -> None:
    async with open_served() as served, served.publishing() as publisher, sharing(served, publisher) as shared:
        await shared.send(bad)
        answer = await shared.wire.read_answer("POST")
        assert await told_of(shared.wire, answer) == Told(400, "invalid_request", "fin")
        assert "nested" not in answer.body.decode()


async def test_uploads_that_are_cut_again_and_again_leave_the_channel_its_next() -> None:
    async with open_served(patience_s=60) as served, served.publishing() as publisher:
        channel = served.broker._directory.sessions["laptop"].channel
        assert channel is not None
        for _ in range(50):
            async with sharing(served, publisher) as shared:
                await shared.send(NOBODYS[:9])
                shared.wire.reset()
                if channel.results is not None:
                    await wait_until(lambda: channel.results is None)
        async with sharing(served, publisher) as shared, served.calling(CALL) as client:
            await shared.send(record((await publisher.next("infer")).task_id, b"{}"))
            assert (await client.wire.read_answer("POST")).body == b"{}"


async def test_a_client_that_reads_nothing_holds_back_no_record_behind_his() -> None:
    answer = b'"' + b"x" * (MAX_ANSWER_BYTES - 2) + b'"'
    async with open_served() as served, served.publishing() as publisher, sharing(served, publisher) as shared:
        async with served.calling(CALL), served.calling(CALL) as reading:
            first, second = [await publisher.next("infer") for _ in range(2)]
            await shared.send(record(first.task_id, answer) + record(second.task_id, answer))
            assert (await reading.wire.read_answer("POST")).body == answer
            assert served.broker.statistics().completed == 2
