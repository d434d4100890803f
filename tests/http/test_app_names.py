"""Aliases and pools, as operators make them and clients see them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.http.served import JSON, Served, as_bytes, open_served
from tests.http.test_app_keys import Keyed
from tests.http.wire import Answer
from wakecall.config import BrokerConfig

ROWS = ({"name": "big/1", "pool": "big"}, {"name": "big/2", "pool": "big", "status": "hibernating"}, {"name": "solo"})


async def put(served: Served, name: str, **said: Any) -> Answer:
    return await served.ask("PUT", f"/admin/v1/aliases/{name}", JSON, body=as_bytes(said))


async def listed(served: Served, what: str) -> Any:
    return (await served.ask("GET", f"/admin/v1/{what}")).json["data"]


async def test_an_alias_is_made_changed_listed_and_deleted(served: Served) -> None:
    made = await put(served, "org/gpt", target="solo", fallbacks=["big", "gone"], unknown=1)
    shown = {"name": "org/gpt", "target": "solo", "fallbacks": ["big", "gone"], "routable": False}
    assert (made.status, made.json) == (200, shown)
    async with served.publishing(*ROWS):
        assert await listed(served, "aliases") == [shown | {"routable": True}]
        for fallbacks in ({}, {"fallbacks": None}, {"fallbacks": []}):
            changed = await put(served, "org/gpt", target="gone", **fallbacks)
            assert changed.json == {"name": "org/gpt", "target": "gone", "fallbacks": [], "routable": False}
        await put(served, "a", target="solo")
        assert [each["name"] for each in await listed(served, "aliases")] == ["a", "org/gpt"]
        deleted = await served.ask("DELETE", "/admin/v1/aliases/org/gpt")
        assert (deleted.status, deleted.body) == (204, b"")
        gone = await served.ask("DELETE", "/admin/v1/aliases/org/gpt")
        assert (gone.status, gone.code) == (404, "not_found")
        assert [each["name"] for each in await listed(served, "aliases")] == ["a"]


@pytest.mark.parametrize(
    ("name", "said", "param"),
    [
        ("new", {}, "target"),
        ("new", {"target": None}, "target"),
        ("new", {"target": 1}, "target"),
        ("new", {"target": ""}, "target"),
        ("new", {"target": "a b"}, "target"),
        ("new", {"target": "there"}, "target"),
        ("new", {"target": "solo", "fallbacks": "big"}, "fallbacks"),
        ("new", {"target": "solo", "fallbacks": [1]}, "fallbacks[0]"),
        ("new", {"target": "solo", "fallbacks": ["big", "solo"]}, "fallbacks[1]"),
        ("new", {"target": "solo", "fallbacks": ["there"]}, "fallbacks[0]"),
        ("new", {"target": "solo", "fallbacks": ["a" * 129]}, "fallbacks[0]"),
        ("a%20b", {"target": "solo"}, "name"),
        ("a//b", {"target": "solo"}, "name"),
        ("%C3%A9", {"target": "solo"}, "name"),
        ("a" * 129, {"target": "solo"}, "name"),
        ("led-to", {"target": "solo"}, "name"),
    ],
)
async def test_an_alias_that_cannot_be_is_refused(served: Served, name: str, said: Any, param: str) -> None:
    await put(served, "there", target="led-to")
    answer = await put(served, name, **said)
    assert (answer.status, answer.code, answer.json["error"]["param"]) == (400, "invalid_request", param)
    assert [each["name"] for each in await listed(served, "aliases")] == ["there"]


async def test_aliases_and_their_fallbacks_are_bounded() -> None:
    async with open_served(BrokerConfig(max_aliases=1)) as served:
        most = [f"m{number}" for number in range(8)]
        assert (await put(served, "a", target="solo", fallbacks=most)).status == 200
        many = await put(served, "a", target="solo", fallbacks=[*most, "one-more"])
        assert (many.status, many.code, many.json["error"]["param"]) == (400, "too_many", "fallbacks")
        second = await put(served, "b", target="solo")
        assert (second.status, second.code) == (400, "too_many")


async def test_pools_are_listed_with_their_rows(served: Served) -> None:
    assert await listed(served, "pools") == []
    async with served.publishing(*ROWS):
        assert await listed(served, "pools") == [
            {"name": "big", "owner": "local", "llms": ["big/1", "big/2"], "waiting": 0}
        ]


async def test_clients_see_pools_and_aliases_beside_rows(served: Served) -> None:
    await put(served, "gpt", target="gone", fallbacks=["big"])
    async with served.publishing(*ROWS):
        answer = await served.ask("GET", "/v1/models")
        models = {each["id"]: each for each in answer.json["data"]}
        assert list(models) == ["big", "big/1", "big/2", "gpt", "solo"]
        assert {name: each["wakecall"] for name, each in models.items()} == {
            "big": {"status": "active", "kind": "pool", "type": ""},
            "big/1": {"status": "active", "kind": "virtual", "type": ""},
            "big/2": {"status": "hibernating", "kind": "virtual", "type": ""},
            "gpt": {"status": "active", "kind": "alias", "type": ""},
            "solo": {"status": "active", "kind": "virtual", "type": ""},
        }
        for name, model in models.items():
            assert model["object"] == "model"
            assert isinstance(model["created"], int)
            assert model["owned_by"] == "local"
            one = await served.ask("GET", f"/v1/models/{name}")
            assert (one.status, one.json) == (200, model)
        gone = await served.ask("GET", "/v1/models/gone")
        assert (gone.status, gone.code) == (404, "model_not_found")


async def test_an_alias_with_a_rows_name_is_what_clients_see(served: Served) -> None:
    async with served.publishing(*ROWS):
        await put(served, "solo", target="solo", fallbacks=["big"])
        one = await served.ask("GET", "/v1/models/solo")
        assert one.json["wakecall"] == {"status": "active", "kind": "alias", "type": ""}
        assert (await served.ask("GET", "/admin/v1/llms/solo")).json["kind"] == "virtual"


async def test_a_call_goes_where_its_name_leads(served: Served) -> None:
    """To a row, to a member of a pool, through an alias to either; and to a fallback where the target is not there."""
    await put(served, "to-a-row", target="solo")
    await put(served, "to-a-pool", target="big")
    await put(served, "to-a-fallback", target="gone", fallbacks=["solo"])
    async with served.publishing(*ROWS) as publisher:
        for name, expected in (
            ("solo", "solo"),
            ("big", "big/1"),
            ("to-a-row", "solo"),
            ("to-a-pool", "big/1"),
            ("to-a-fallback", "solo"),
        ):
            async with served.calling({"model": name}) as client:
                frame = await publisher.next("infer")
                assert frame.data["llm"] == expected
                assert (
                    json.loads(frame.data["body"])["model"] == name
                )  # untouched: the publisher puts its engine's id there
                await publisher.answer(frame, {})
                assert (await client.read_head()).status == 200
        await served.ask("DELETE", "/admin/v1/aliases/to-a-row")
        assert (await served.call({"model": "to-a-row"})).code == "model_not_found"


# Whose names --------------------------------------------------------------------------------------------------------


@pytest.fixture
async def keyed(served: Served) -> Keyed:
    broker = served.broker
    secrets = {role: (await broker.create_key(role)).secret for role in ("admin", "publisher")}
    for name, patterns in (("stranger", None), ("bound", ["big/*"])):
        secrets[name] = (await broker.create_key("publisher", llms=patterns)).secret
    for name, patterns in (("all", None), ("some", ["big", "gpt*"])):
        secrets[name] = (await broker.create_key("client", llms=patterns)).secret
    return Keyed(served, secrets)


async def test_a_key_that_is_bound_to_names_sees_those_alone(keyed: Keyed) -> None:
    await keyed.register("laptop", *ROWS)
    for name in ("gpt", "hidden"):
        await keyed.ask("admin", "PUT", f"/admin/v1/aliases/{name}", {"target": "solo"})

    async def names(whose: str) -> list[str]:
        return [each["id"] for each in (await keyed.ask(whose, "GET", "/v1/models")).json["data"]]

    assert await names("all") == ["big", "big/1", "big/2", "gpt", "hidden", "solo"]
    assert await names("some") == ["big", "gpt"]
    assert (await keyed.ask("some", "GET", "/v1/models/gpt")).status == 200
    for name in ("hidden", "big/1", "solo"):
        hidden = await keyed.ask("some", "GET", f"/v1/models/{name}")
        assert (hidden.status, hidden.code) == (404, "model_not_found")
        called = await keyed.ask("some", "POST", "/v1/completions", {"model": name})
        assert (called.status, called.code) == (404, "model_not_found")
    # The operator's word, not the key's patterns, says where an alias leads.
    offline = await keyed.ask("some", "POST", "/v1/completions", {"model": "gpt"})
    assert (offline.status, offline.code) == (503, "model_offline")


async def test_a_pool_is_one_owners(keyed: Keyed) -> None:
    """Nobody else joins it, or takes its name, or names his pool as another's row."""
    await keyed.register("laptop", *ROWS)
    for row, param in (
        ({"name": "mine", "pool": "big"}, "llms[0].pool"),
        ({"name": "mine", "pool": "solo"}, "llms[0].pool"),
        ({"name": "big"}, "llms[0].name"),
    ):
        answer = await keyed.register("theirs", row, whose="stranger")
        assert (answer.status, answer.code, answer.json["error"]["param"]) == (409, "llm_name_taken", param), row
    assert (await keyed.register("second", {"name": "big/3", "pool": "big"})).status == 200


async def test_a_publishers_key_that_is_bound_to_names_is_bound_to_pools_too(keyed: Keyed) -> None:
    """A pool is a name that clients call."""
    answer = await keyed.register("laptop", {"name": "big/1", "pool": "small"}, whose="bound")
    assert (answer.status, answer.code, answer.json["error"]["param"]) == (403, "forbidden", "llms[0].pool")
    assert (await keyed.register("laptop", {"name": "big/1", "pool": "big/all"}, whose="bound")).status == 200
