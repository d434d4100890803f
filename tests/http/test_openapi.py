"""`/openapi.json`: an operation for each method of each route, no more; and what it says of answers is so.

That real answers are as described is checked in every test of the app, by `Served.ask`. Here are those that no other test
gets, and the check itself.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from tests.http.described import description_of, validator
from tests.http.served import JSON, Served, as_bytes
from tests.http.wire import Answer
from wakecall import errors
from wakecall.http import openapi
from wakecall.http.publisher import Heartbeat, Register

#: HTTP's own, and no operations of the API's: a HEAD wherever a GET is, and OPTIONS everywhere.
EVERYWHERE = {"HEAD", "OPTIONS"}


async def document(served: Served) -> dict[str, Any]:
    answer = await served.ask("GET", "/openapi.json")
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    return dict(answer.json)


async def test_every_route_and_method_is_described_and_nothing_else(served: Served) -> None:
    described = {(method.upper(), path) for path, item in (await document(served))["paths"].items() for method in item}
    there = set()
    for rule in served.app.url_map.iter_rules():
        methods = rule.methods - EVERYWHERE
        assert methods, rule
        there |= {(method, re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)) for method in methods}
        assert "HEAD" not in rule.methods or "GET" in rule.methods
    assert described == there


async def test_each_operation_says_whose_it_is(served: Served) -> None:
    """By the prefix of its path, as the protocol has it; beside them are those that need no key."""
    roles = {"v1": "client", "publisher": "publisher", "admin": "admin"}
    found = await document(served)
    assert found["openapi"] == "3.1.0"
    assert set(found["components"]["securitySchemes"]) == {"bearer", "api_key"}
    names = []
    for path, item in found["paths"].items():
        for operation in item.values():
            role = "monitor" if path == "/metrics" else roles.get(path.split("/")[1])
            holders = ["admin", "monitor"] if role == "monitor" else [role] if role else []
            assert operation["security"] == [{by: [each]} for each in holders for by in ("bearer", "api_key")]
            assert operation["summary"].endswith(".")
            assert "500" in operation["responses"]
            assert ("401" in operation["responses"]) is (role is not None)
            names.append(operation["operationId"])
    assert len(set(names)) == len(names)


async def test_what_varies_in_a_path_is_declared(served: Served) -> None:
    for path, item in (await document(served))["paths"].items():
        for operation in item.values():
            declared = [each["name"] for each in operation.get("parameters", ()) if each["in"] == "path"]
            assert declared == re.findall(r"{(\w+)}", path)


async def test_every_error_code_is_described_somewhere_with_its_status(served: Served) -> None:
    """But for the two that are no answer of an operation: a path that is none, and a caller who left."""
    described = set()
    for name, response in (await document(served))["components"]["responses"].items():
        schema = response["content"]["application/json"]["schema"]
        [_, named] = (schema["anyOf"][0] if "anyOf" in schema else schema)["allOf"]
        described |= {(int(name[:3]), code) for code in named["properties"]["error"]["properties"]["code"]["enum"]}
    tree = {getattr(errors, name) for name in errors.__all__ if name != "Phase"}
    concrete = {each for each in tree if "default_message" in vars(each)}
    missing = {each.code for each in concrete if (each.default_status, each.code) not in described}
    assert missing == {"client_disconnected"}


async def test_the_document_is_made_once_and_not_before_it_is_asked_for(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = 0
    make = openapi.document_of

    def count(routes: Any) -> bytes:
        nonlocal made
        made += 1
        return make(routes)

    monkeypatch.setattr(openapi, "document_of", count)
    first = await document(served)
    assert await document(served) == first
    assert made == 1


def test_an_app_is_made_without_what_makes_the_document() -> None:
    script = """
import sys, trio
from wakecall import create_app, open_broker
async def main():
    async with open_broker() as broker:
        create_app(broker)
trio.run(main)
print("wakecall.http.openapi" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


# The check of answers ------------------------------------------------------------------------------------------------


async def test_every_operation_succeeds_as_described(served: Served) -> None:
    """One success of each. A route that is added needs a line here; the keys come last, for then it is open no more."""
    served.description = fresh = description_of(served.app)
    public = {"type": "openai", "model": "m", "url": "https://api.example/v1"}
    rows = [{"name": "qwen", "max_concurrency": 9, "pool": "all"}, {"name": "asleep", "status": "hibernating"}]
    for path in ("/", "/healthz", "/readyz", "/metrics", "/openapi.json", "/admin/v1/usage"):
        await served.ask("GET", path)
    async with served.publishing(*rows) as publisher:
        for relayed in (path for path in fresh.document["paths"] if path.startswith("/v1/") and "models" not in path):
            async with served.calling({"model": "qwen"}, relayed) as client:
                frame = await publisher.next("infer")
                if relayed == "/v1/completions":
                    await served.ask("GET", f"/publisher/v1/tasks/{frame.task_id}/body")
                    await served.ask(
                        "POST", f"/publisher/v1/tasks/{frame.task_id}/chunks", "wakecall-offset: 0", body=b"{"
                    )
                    await publisher.answer(frame, b"}", JSON, "wakecall-offset: 1")
                else:
                    await publisher.answer(frame, b"{}")
                await client.read_head()
                body, is_cut = await client.rest()
                fresh.check("POST", relayed, Answer(client.status, client.headers, body, is_cut))
        async with served.calling({"model": "asleep"}):
            await publisher.next("wake")
            async with served.calling({"model": "qwen"}):
                frame = await publisher.next("infer")
                await served.ask("PUT", "/admin/v1/aliases/org/alias", body=as_bytes({"target": "qwen"}))
                for listing in ("/v1/models", "/v1/models/qwen", "/admin/v1/llms", "/admin/v1/llms/qwen"):
                    await served.ask("GET", listing)
                assert len((await served.ask("GET", "/admin/v1/tasks")).json["data"]) == 3
                assert len((await served.ask("GET", "/admin/v1/sessions")).json["data"]) == 1
                beat = as_bytes({"llms": {"qwen": "active"}, "tasks": [frame.task_id, "other"]})
                await served.ask("POST", "/publisher/v1/sessions/laptop/heartbeat", body=beat)
                await publisher.fail(frame, message="x")
                await served.ask("POST", f"/publisher/v1/tasks/{frame.task_id}/cancelled")
                for verb in ("drain", "pause", "resume"):
                    await served.ask("POST", f"/admin/v1/{verb}", body=as_bytes({"llm": "qwen"}))
                for verb in ("pause", "resume"):
                    await served.ask("POST", f"/publisher/v1/sessions/laptop/{verb}", body=b"{}")
                await served.ask("POST", "/publisher/v1/sessions/laptop/results")
                for listing in ("/admin/v1/aliases", "/admin/v1/pools"):
                    assert len((await served.ask("GET", listing)).json["data"]) == 1
                await served.ask("DELETE", "/admin/v1/aliases/org/alias")
    async with served.channel("laptop") as publisher:
        reading = publisher.reading
        fresh.check("GET", "/publisher/v1/sessions/laptop/frames", Answer(200, reading.headers, b"", is_cut=True))
    await served.ask("PUT", "/admin/v1/llms/org/public", body=as_bytes(public))
    await served.ask("POST", "/admin/v1/sweep")
    await served.ask("DELETE", "/admin/v1/llms/org/public")
    await served.ask("DELETE", "/admin/v1/sessions/laptop")
    await served.register("laptop", *rows)
    owner = as_bytes({"owner": "somebody"})
    await served.ask("PATCH", "/admin/v1/llms/qwen", body=owner)
    await served.ask("PATCH", "/admin/v1/sessions/laptop", body=owner)
    await served.ask("PATCH", "/admin/v1/sessions/laptop", body=as_bytes({"owner": "local"}))
    await served.ask("DELETE", "/publisher/v1/sessions/laptop")
    made = await served.ask(
        "POST", "/admin/v1/keys", body=as_bytes({"role": "admin", "name": "n", "expires_in_s": 86_400})
    )
    key = f"x-api-key: {made.json['key']}"
    bound = as_bytes({"role": "client", "llms": ["a*"], "rpm": 1, "max_in_flight": 2})
    other = (await served.ask("POST", "/admin/v1/keys", key, body=bound)).json["id"]
    assert len((await served.ask("GET", "/admin/v1/keys", key)).json["data"]) == 2
    await served.ask("DELETE", f"/admin/v1/keys/{other}", key)
    assert list(fresh.unseen()) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"status": 418},
        {"headers": {"content-type": "text/html", "x-request-id": "a"}},
        {"headers": {"content-type": "application/json"}},
        {"body": b'{"data": 1}'},
        {"body": b'{"data": [], "more": 1}'},
    ],
)
async def test_an_answer_that_is_not_as_described_is_found(served: Served, wrong: dict[str, Any]) -> None:
    """The check itself."""
    headers = {"content-type": "application/json", "x-request-id": "a"}
    good = Answer(200, headers, b'{"data": []}')
    served.description.check("GET", "/admin/v1/llms", good)
    with pytest.raises((AssertionError, ValueError)):
        served.description.check("GET", "/admin/v1/llms", replace(good, **wrong))


async def test_an_error_with_a_code_that_is_not_described_is_found(served: Served) -> None:
    headers = {"content-type": "application/json", "x-request-id": "a"}
    error = {"message": "m", "type": "t", "param": None, "code": "model_not_found"}
    good = Answer(404, headers, as_bytes({"error": error}))
    served.description.check("GET", "/v1/models/qwen", good)
    with pytest.raises(ValueError, match="task_not_found"):
        served.description.check(
            "GET", "/v1/models/qwen", replace(good, body=as_bytes({"error": error | {"code": "task_not_found"}}))
        )


# The schemas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type", "path", "said"),
    [
        (Register, "/publisher/v1/sessions/laptop", {"llms": [{"name": "qwen"}], "agent": None}),
        (Register, "/publisher/v1/sessions/laptop", {"llms": [{"name": "a b"}]}),
        (Register, "/publisher/v1/sessions/laptop", {"llms": [{"name": "a" * 129}]}),
        (Register, "/publisher/v1/sessions/laptop", {"llms": [{"name": "a", "max_concurrency": 0}]}),
        (Register, "/publisher/v1/sessions/laptop", {"llms": [{"name": "a", "wake_s": 86_401}]}),
        (Register, "/publisher/v1/sessions/laptop", {"llms": [{"name": "a", "status": "inactive"}]}),
        (Register, "/publisher/v1/sessions/laptop", {"llms": [{}]}),
        (Register, "/publisher/v1/sessions/laptop", {"llms": {}}),
        (Register, "/publisher/v1/sessions/laptop", []),
        (Heartbeat, "/publisher/v1/sessions/laptop/heartbeat", {"llms": {"x": "active"}, "tasks": ["a"], "y": 1}),
        (Heartbeat, "/publisher/v1/sessions/laptop/heartbeat", {"llms": {"x": "inactive"}}),
        (Heartbeat, "/publisher/v1/sessions/laptop/heartbeat", {"tasks": ["a/b"]}),
        (Heartbeat, "/publisher/v1/sessions/laptop/heartbeat", {"tasks": [None]}),
    ],
)
async def test_a_body_is_taken_exactly_if_its_schema_has_it(served: Served, type: Any, path: str, said: Any) -> None:
    """Schemathesis asks the same of every body; these are the bounds that it would seldom hit."""
    await served.register("laptop")
    [schema], components = msgspec.json.schema_components([type], ref_template="#/components/schemas/{name}")
    is_valid = validator(msgspec.json.encode({**schema, "components": {"schemas": components}}).decode()).is_valid(said)
    answer = await served.ask("POST" if path.endswith("heartbeat") else "PUT", path, JSON, body=as_bytes(said))
    assert (answer.status == 200) is is_valid, answer
