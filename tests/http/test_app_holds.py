"""What operators and publishers hold back: who may, what it does to calls, and that each is the other's to leave alone."""

from __future__ import annotations

from typing import Any

import pytest

from tests.http.served import JSON, Served, as_bytes, open_served, wait_until
from tests.http.test_app_keys import Keyed, keyed
from tests.http.wire import Answer
from wakecall.store.sqlite import open_sqlite_store

__all__ = ["keyed"]

CALL = {"model": "qwen"}
SESSION = "/publisher/v1/sessions/laptop"


async def operate(served: Served, verb: str, name: str) -> Answer:
    return await served.ask("POST", f"/admin/v1/{verb}", JSON, body=as_bytes({"llm": name}))


async def publish(served: Served, verb: str, **said: Any) -> Answer:
    return await served.ask("POST", f"{SESSION}/{verb}", JSON, body=as_bytes(said))


async def flags(served: Served) -> dict[str, tuple[str | None, bool]]:
    rows = (await served.ask("GET", "/admin/v1/llms")).json["data"]
    return {row["name"]: (row["hold"], row["paused"]) for row in rows}


async def test_a_hold_is_answered_with_the_rows_that_it_holds(served: Served) -> None:
    """One shape, whether a row or a pool was named."""
    async with served.publishing({"name": "a", "pool": "all"}, {"name": "b", "pool": "all"}, {"name": "solo"}):
        for verb, hold in (("drain", "drain"), ("pause", "pause"), ("resume", None)):
            for name, rows in (("solo", ["solo"]), ("all", ["a", "b"])):
                answer = await operate(served, verb, name)
                assert answer.status == 200
                assert [(row["name"], row["hold"]) for row in answer.json["data"]] == [(row, hold) for row in rows]
                one = (await served.ask("GET", f"/admin/v1/llms/{rows[0]}")).json
                assert answer.json["data"][0] == one
            assert await flags(served) == dict.fromkeys(("a", "b", "solo"), (hold, False))


@pytest.mark.parametrize("verb", ["drain", "pause", "resume"])
@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"{}", 400, "invalid_request", "llm"),
        (b'{"llm": null}', 400, "invalid_request", "llm"),
        (b'{"llm": ["qwen"]}', 400, "invalid_request", "llm"),
        (b'{"llm": "qwen", "llm": "qwen"}', 400, "invalid_json", None),
        (b'{"llm": "nobody"}', 404, "model_not_found", "llm"),
        (b'{"llm": "a b"}', 404, "model_not_found", "llm"),
        (b'{"llm": "alias"}', 404, "model_not_found", "llm"),
    ],
)
async def test_what_is_no_row_and_no_pool_is_not_held(
    served: Served, verb: str, body: bytes, status: int, code: str, param: str | None
) -> None:
    async with served.publishing():
        await served.ask("PUT", "/admin/v1/aliases/alias", JSON, body=b'{"target": "qwen"}')
        answer = await served.ask("POST", f"/admin/v1/{verb}", JSON, body=body)
        assert (answer.status, answer.code, answer.json["error"]["param"]) == (status, code, param)
        assert await flags(served) == {"qwen": (None, False)}


async def test_a_drained_row_takes_nothing_new_and_serves_who_waits(served: Served) -> None:
    async with served.publishing({"name": "qwen", "max_concurrency": 1}) as publisher, served.calling(CALL) as first:
        frame = await publisher.next("infer")
        async with served.calling(CALL) as second:
            await wait_until(lambda: served.broker.statistics().waiting == 1)
            [shown] = (await operate(served, "drain", "qwen")).json["data"]
            assert (shown["routable"], shown["in_flight"], shown["waiting"]) == (False, 1, 1)
            refused = await served.call(CALL)
            assert (refused.status, refused.code) == (503, "model_offline")
            await publisher.answer(frame, {"n": 1})
            await publisher.answer(await publisher.next("infer"), {"n": 2})
            assert [(await each.read_head()).status for each in (first, second)] == [200, 200]
        # No register and no heartbeat lets go of it.
        await served.register("laptop", {"name": "qwen", "max_concurrency": 1, "status": "active"})
        await served.ask("POST", f"{SESSION}/heartbeat", body=b'{"llms": {"qwen": "active"}}')
        assert (await served.call(CALL)).code == "model_offline"
        await operate(served, "resume", "qwen")
        async with served.calling(CALL) as third:
            await publisher.answer(await publisher.next("infer"), {})
            assert (await third.read_head()).status == 200


@pytest.mark.parametrize("whose", ["operator", "publisher"])
async def test_a_paused_row_sends_nothing_until_it_is_resumed(served: Served, whose: str) -> None:
    """What is in flight finishes; what waits stays, and goes when it is resumed."""

    async def act(verb: str) -> Answer:
        return await (operate(served, verb, "qwen") if whose == "operator" else publish(served, verb))

    async with served.publishing({"name": "qwen", "max_concurrency": 1}) as publisher, served.calling(CALL) as first:
        frame = await publisher.next("infer")
        async with served.calling(CALL) as second:
            await wait_until(lambda: served.broker.statistics().waiting == 1)
            assert (await act("pause")).status == 200
            refused = await served.call(CALL)
            assert (refused.status, refused.code) == (503, "model_offline")
            await publisher.answer(frame, {})
            assert (await first.read_head()).status == 200
            assert (served.broker.statistics().waiting, served.broker.statistics().in_flight) == (1, 0)
            assert (await act("resume")).status == 200
            await publisher.answer(await publisher.next("infer"), {})
            assert (await second.read_head()).status == 200


async def test_a_publisher_pauses_some_of_its_rows_or_all(served: Served) -> None:
    async with served.publishing({"name": "a"}, {"name": "b", "status": "hibernating"}, {"name": "c"}):
        paused = await publish(served, "pause", llms=["b", "a"])
        assert (paused.status, paused.json) == (
            200,
            {
                "llms": {
                    "a": {"status": "active", "paused": True},
                    "b": {"status": "hibernating", "paused": True},
                    "c": {"status": "active", "paused": False},
                }
            },
        )
        for said in ({}, {"llms": None}):
            everyone = (await publish(served, "pause", **said)).json["llms"]
            assert [each["paused"] for each in everyone.values()] == [True] * 3
        assert await flags(served) == dict.fromkeys("abc", (None, True))
        resumed = (await publish(served, "resume", llms=["c"])).json["llms"]
        assert [each["paused"] for each in resumed.values()] == [True, True, False]
        assert [each["paused"] for each in (await publish(served, "resume")).json["llms"].values()] == [False] * 3


@pytest.mark.parametrize("verb", ["pause", "resume"])
@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"", 400, "invalid_json", None),
        (b'{"llms": "qwen"}', 400, "invalid_request", "llms"),
        (b'{"llms": [7]}', 400, "invalid_request", "llms[0]"),
        (b'{"llms": ["qwen", "a b"]}', 400, "invalid_request", "llms[1]"),
        (b'{"llms": ["qwen", "elsewhere"]}', 404, "model_not_found", "llms[1]"),
        (b'{"llms": [' + b'"qwen",' * 256 + b'"qwen"]}', 400, "too_many", "llms"),
    ],
)
async def test_a_publisher_pauses_what_it_has_and_nothing_else(
    served: Served, verb: str, body: bytes, status: int, code: str, param: str | None
) -> None:
    await served.register("other", {"name": "elsewhere"})
    await served.register("laptop", {"name": "qwen"})
    before = await flags(served)
    answer = await served.ask("POST", f"{SESSION}/{verb}", JSON, body=body)
    assert (answer.status, answer.code, answer.json["error"]["param"]) == (status, code, param)
    assert await flags(served) == before
    unknown = await served.ask("POST", f"/publisher/v1/sessions/nobody/{verb}", JSON, body=b"{}")
    assert (unknown.status, unknown.code) == (404, "session_not_found")


async def test_neither_takes_away_what_the_other_has_said(served: Served) -> None:
    async with served.publishing():
        await operate(served, "drain", "qwen")
        await publish(served, "pause")
        assert await flags(served) == {"qwen": ("drain", True)}
        await publish(served, "resume")
        assert await flags(served) == {"qwen": ("drain", False)}
        await publish(served, "pause")
        await operate(served, "resume", "qwen")
        assert await flags(served) == {"qwen": (None, True)}
        assert (await served.call(CALL)).code == "model_offline"


async def test_both_outlive_the_broker(tmp_path: Any) -> None:
    async with open_sqlite_store(tmp_path / "w.db") as store, open_served(store=store) as served:
        await served.register("laptop", {"name": "qwen"}, {"name": "phi"})
        await operate(served, "pause", "qwen")
        await publish(served, "pause", llms=["phi"])
        await served.ask("PUT", "/admin/v1/aliases/gpt", JSON, body=b'{"target": "qwen", "fallbacks": ["phi"]}')
    async with open_sqlite_store(tmp_path / "w.db") as store, open_served(store=store) as served:
        assert await flags(served) == {"qwen": ("pause", False), "phi": (None, True)}
        [alias] = (await served.ask("GET", "/admin/v1/aliases")).json["data"]
        assert (alias["name"], alias["target"], alias["fallbacks"]) == ("gpt", "qwen", ["phi"])


async def test_a_session_is_its_owners_to_pause(keyed: Keyed) -> None:
    """To anybody else it is not there; and an operator's key is no publisher's."""
    await keyed.register("laptop")
    for verb in ("pause", "resume"):
        theirs = await keyed.ask("stranger", "POST", f"{SESSION}/{verb}", {})
        assert (theirs.status, theirs.code) == (404, "session_not_found")
        for role in ("admin", "client"):
            other = await keyed.ask(role, "POST", f"{SESSION}/{verb}", {})
            assert (other.status, other.code) == (403, "forbidden")
    for role in ("publisher", "client"):
        for verb in ("drain", "pause", "resume"):
            refused = await keyed.ask(role, "POST", f"/admin/v1/{verb}", {"llm": "qwen"})
            assert (refused.status, refused.code) == (403, "forbidden")
    assert not keyed.served.broker.llm("qwen").paused
    assert (await keyed.ask("publisher", "POST", f"{SESSION}/pause", {})).status == 200
