"""Answers that no record can carry, and counts that promise no more than what is on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile.test_sessions import GatedStore
from tests.http.served import Reading, WirePublisher, head, open_served
from tests.http.test_app_results import NOBODYS, record, sharing
from tests.publisher.peers import open_stage
from tests.publisher.scripted import Exchange
from tests.publisher.test_shared import answered, plain, share, wait_records

CALL = {"model": "qwen"}


@pytest.mark.parametrize("status", [600, 999])
async def test_an_engines_status_that_no_record_has_leaves_the_shared_upload_whole(tmp_path: Path, status: int) -> None:
    """The broker ends an upload at such a record with 400: one engine's nonsense would cost all answers their upload, for
    the rest of the channel."""
    async with open_stage(tmp_path) as stage:
        statuses = iter([status, 200])

        async def answer(exchange: Exchange) -> None:
            await answered(exchange, status=next(statuses))

        stage.engine.on_infer = answer
        _, channel, upload = await share(stage)
        await plain(channel, "t1")
        await plain(channel, "t2")
        assert [head.status for head, _ in await wait_records(upload, 1)] == [200]


async def test_an_upload_that_ends_with_its_channel_counts_no_wake_that_is_not_committed() -> None:
    """`protocol.md`: a wake counts as taken once that is committed, and what comes after it only then."""
    store = GatedStore()
    async with open_served(store=store) as served, served.server.connect() as wire:
        await served.register("laptop", {"name": "qwen", "status": "hibernating"})
        await wire.send(head("GET", "/publisher/v1/sessions/laptop/frames"))
        publisher = WirePublisher(served, "laptop", await Reading(wire, "GET").read_head())
        await publisher.next("hello")
        async with sharing(served, publisher) as shared, served.calling(CALL) as client:
            wake = await publisher.next("wake")
            store.shut()
            await shared.send(NOBODYS + record(wake.task_id, b"") + NOBODYS)
            await publisher.next("infer")
            wire.reset()
            ended = await shared.wire.read_answer("POST")
            store.gate.set()
            assert ended.json == {"outcome": "ended", "taken": 1}
            await client.wire.read_answer("POST")
