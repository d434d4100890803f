"""`/admin/v1/usage`: what answers that come over the wire say of themselves, by key and by model."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import pytest

from tests.http.served import SSE, Served, open_served
from tests.http.wire import Answer
from wakecall.http.usage import parse_since
from wakecall.store import MemoryStore, StoreError
from wakecall.testing import FakePublisher

CALL = {"model": "qwen"}
STREAM = {"model": "qwen", "stream": True}
PLAIN = {"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 3}}
MESSAGES = (
    b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":7,"output_tokens":1}}}\n\n',
    b'event: message_delta\ndata: {"type":"message_del',
    b'ta","usage":{"output_tokens":9}}\n\n',
)


async def usage(served: Served, query: str = "", *headers: str) -> dict[str, Any]:
    answer = await served.ask("GET", f"/admin/v1/usage{query}", *headers)
    assert answer.status == 200, answer
    return dict(answer.json)


def instant(text: str) -> datetime:
    assert text.endswith("Z")
    return datetime.fromisoformat(text)


async def call_once(served: Served, publisher: Any, *headers: str) -> None:
    async with served.calling(CALL, "/v1/chat/completions", "content-type: application/json", *headers) as client:
        await publisher.answer(await publisher.next("infer"), PLAIN)
        assert (await client.read_head()).status == 200
        assert json.loads((await client.rest())[0]) == PLAIN


async def test_what_was_used_is_there_with_the_answer(served: Served) -> None:
    """By model: plain, streamed in pieces, without usage, and the engine's own error."""
    async with served.publishing() as publisher:
        await call_once(served, publisher)
        async with served.calling(STREAM, "/v1/messages") as client:
            async with publisher.upload(await publisher.next("infer"), SSE) as upload:
                for piece in MESSAGES:
                    await upload.send(piece)
                await upload.finish()
            await client.read_head()
            assert await client.rest() == (b"".join(MESSAGES), False)
        for headers in (("content-type: audio/mpeg",), ("content-type: application/json", "wakecall-status: 400")):
            async with served.calling(CALL) as client:
                await publisher.answer(await publisher.next("infer"), PLAIN, *headers)
                await client.read_head()
                await client.rest()
        found = await usage(served, "?by=llm")
        [row] = found["data"]
        assert 0 <= row.pop("seconds") < 10
        assert row == {
            "key_id": None,
            "key_name": None,
            "llm": "qwen",
            "requests": 4,
            "completed": 4,
            "failed": 0,
            "cancelled": 0,
            "unknown": 1,
            "tokens_in": 19,
            "tokens_out": 12,
        }
        assert found["by"] == "llm"
        metrics = (await served.ask("GET", "/metrics")).body.decode()
        assert 'wakecall_tokens_total{direction="in"} 19.0' in metrics
        assert 'wakecall_tokens_total{direction="out"} 12.0' in metrics


async def test_it_is_by_key_with_the_keys_names_and_those_of_the_revoked_stay(served: Served) -> None:
    """What was called while the broker was open has no key."""
    async with served.publishing() as publisher:
        await call_once(served, publisher)
        admin = f"x-api-key: {(await served.broker.create_key('admin')).secret}"
        made = await served.broker.create_key("client", name="notebook")
    # The channel that was opened without a key has ended. Another publisher takes over, one that needs none.
    async with FakePublisher(served.broker, "laptop", ["qwen"]) as by_hand:
        async with served.calling(CALL, "/v1/chat/completions", f"x-api-key: {made.secret}") as client:
            await by_hand.answer(await by_hand.next("infer"), json.dumps(PLAIN).encode())
            await client.read_head()
            await client.rest()
    for name in ("notebook", None):
        found = await usage(served, "?by=key&since=1h", admin)
        assert [(row["key_id"], row["key_name"], row["llm"], row["requests"]) for row in found["data"]] == [
            (None, None, None, 1),
            (made.key.key_id, name, None, 1),
        ]
        if name is not None:
            await served.broker.revoke_key(made.key.key_id)


async def test_since_is_rounded_down_to_the_hour_and_is_a_day_by_default(served: Served) -> None:
    now = datetime.fromtimestamp(served.broker.now(), UTC)
    for query, back in (("", timedelta(days=1)), ("?since=3h", timedelta(hours=3)), ("?since=7d", timedelta(days=7))):
        since = instant((await usage(served, query))["since"])
        assert since <= now - back < since + timedelta(hours=1, seconds=30)
        assert (since.minute, since.second, since.microsecond) == (0, 0, 0)
    for text, expected in (
        ("2026-11-01", "2026-11-01T00:00:00.000Z"),
        ("2026-11-01T12:59:59Z", "2026-11-01T12:00:00.000Z"),
        ("2026-11-01t12:59:59.123456789z", "2026-11-01T12:00:00.000Z"),
        ("2026-11-01T01:30:00+02:00", "2026-10-31T23:00:00.000Z"),
        ("0001-01-01", "1970-01-01T00:00:00.000Z"),
        ("99999d", "1970-01-01T00:00:00.000Z"),
    ):
        assert (await usage(served, f"?since={quote(text)}"))["since"] == expected
    since = instant((await usage(served, "?since=9999-12-31T23:59:59-23:59"))["since"])
    assert since <= datetime.fromtimestamp(served.broker.now(), UTC)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("by=model", "by"),
        ("by=", "by"),
        ("by=key&by=llm", "by"),
        ("since=", "since"),
        ("since=yesterday", "since"),
        ("since=24", "since"),
        ("since=-1h", "since"),
        ("since=1.5h", "since"),
        ("since=1000000d", "since"),
        ("since=2026-13-01", "since"),
        ("since=2026-02-30", "since"),
        ("since=2026-11-01T12:00:00", "since"),
        ("since=2026-11-01T25:00:00Z", "since"),
        ("since=2026-W45", "since"),
        ("since=%D9%A1h", "since"),
        ("since=1h%0A", "since"),
        ("since=1h&since=1h", "since"),
    ],
)
async def test_what_is_not_understood_is_refused(served: Served, query: str, param: str) -> None:
    answer = await served.ask("GET", f"/admin/v1/usage?{query}")
    assert (answer.status, answer.code, answer.json["error"]["param"]) == (400, "invalid_request", param)


async def test_a_query_that_means_nothing_is_ignored(served: Served) -> None:
    assert (await usage(served, "?by=llm&color=red"))["data"] == []


async def test_a_store_that_cannot_be_read_is_said_to_be() -> None:
    class Unreadable(MemoryStore):
        async def usage(self, since_hour: int, by: Any) -> Any:
            raise StoreError("gone")

    async with open_served(store=Unreadable()) as served:
        answer: Answer = await served.ask("GET", "/admin/v1/usage")
        assert (answer.status, answer.code) == (503, "store_unavailable")
        assert answer.headers["retry-after"]


def test_a_span_never_reaches_before_1970() -> None:
    assert parse_since("1h", 60.0) == 0.0
    assert parse_since("1h", 7200.0) == 3600.0
