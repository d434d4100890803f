"""SIGKILL amid traffic, again and again on one file: what was written of usage is there, and goes on, each infer once."""

from __future__ import annotations

import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import trio

from tests.e2e.clients import ask_chat
from tests.e2e.stack import PATIENCE_S, POLL_S, BrokerProcess, open_broker_process, within
from tests.e2e.wire_publisher import WireChannel, WirePublisher, open_wire_publisher

ROUNDS = 3
ANSWER = b'{"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 3}}'


def stored(db: Path) -> tuple[int, int, int, int]:
    """Requests, completed, tokens in and out, by the file alone."""
    with closing(sqlite3.connect(f"file:{db}?mode=ro", uri=True)) as connection:
        sums = "coalesce(sum(requests), 0), total(completed), total(tokens_in), total(tokens_out)"
        return tuple(map(int, connection.execute(f"SELECT {sums} FROM usage").fetchone()))  # type: ignore[return-value]


async def wait_stored(db: Path, requests: int) -> None:
    """Return once the file has so many, or more. There is no event for that outside the broker."""
    with trio.fail_after(PATIENCE_S):
        while stored(db)[0] < requests:
            await trio.sleep(POLL_S)


async def serve(broker: BrokerProcess, publisher: WirePublisher, channel: WireChannel, count: int) -> None:
    """So many whole infers, one after the other."""
    for _ in range(count):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer_next, publisher, channel)
            assert (await ask_chat(broker, "m")).status == 200


async def answer_next(publisher: WirePublisher, channel: WireChannel) -> None:
    assert (await publisher.result(await channel.next("infer"), ANSWER)).status == 200


async def shown(broker: BrokerProcess) -> tuple[int, int, int, int]:
    """The same as an operator is told."""
    [row] = (await broker.http.get("/admin/v1/usage?by=llm&since=48h")).raise_for_status().json()["data"]
    return row["requests"], row["completed"], row["tokens_in"], row["tokens_out"]


@within(90)
async def test_usage_survives_a_kill_but_for_what_was_not_written_yet(tmp_path: Path) -> None:
    """What is written is written within `usage_flush_s`, without anybody asking; a kill takes what came since and nothing
    else; the next broker goes on in the same hour; and one that is stopped in good order leaves nothing out."""
    db, kept = tmp_path / "w.db", 0
    for number in range(ROUNDS):
        async with open_broker_process(db, usage_flush_s=0.2) as broker:
            if number:
                assert await shown(broker) == stored(db)
            async with open_wire_publisher(broker, "m") as (publisher, channel):
                await serve(broker, publisher, channel, 5)
                await wait_stored(db, kept + 5)
                await serve(broker, publisher, channel, 3)
                broker.send(signal.SIGKILL)
                await broker.wait()
        requests, completed, tokens_in, tokens_out = stored(db)
        assert kept + 5 <= requests <= kept + 8
        assert (completed, tokens_in, tokens_out) == (requests, 12 * requests, 3 * requests)
        kept = requests
    async with open_broker_process(db, usage_flush_s=3600) as broker:
        async with open_wire_publisher(broker, "m") as (publisher, channel):
            await serve(broker, publisher, channel, 2)
            assert stored(db)[0] == kept
            assert (await broker.end())[0] == 0
    assert stored(db) == (kept + 2, kept + 2, 12 * (kept + 2), 3 * (kept + 2))
