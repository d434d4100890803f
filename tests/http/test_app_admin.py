"""An operator's paths."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from tests.http.served import JSON, Served, as_bytes, wait_until
from wakecall.models import Status

CALL = {"model": "qwen"}
PUBLIC = {"type": "openai", "model": "gpt-x", "url": "https://api.example/v1", "key_env": "WAKECALL_UPSTREAM_X"}


def seconds(instant: str) -> float:
    assert instant.endswith("Z")
    return datetime.fromisoformat(instant).timestamp()


async def test_a_model_is_shown_with_its_work(served: Served) -> None:
    spec = {"name": "org/qwen", "type": "ollama", "model": "qwen:7b", "max_concurrency": 1}
    spec |= {"pool": "org/all", "group": "gpu:0", "wake_s": 40, "queue_s": 1800, "total_s": 3000.5}
    async with served.publishing(spec) as publisher, served.calling({"model": "org/qwen"}):
        await publisher.next("infer")
        async with served.calling({"model": "org/qwen"}):
            await wait_until(lambda: served.broker.statistics().waiting == 1)
            answer = await served.ask("GET", "/admin/v1/llms/org/qwen")
            shown = answer.json
            assert abs(seconds(shown.pop("last_heartbeat_at")) - served.broker.now()) < 10
            assert shown == {
                "name": "org/qwen",
                "kind": "virtual",
                "type": "ollama",
                "model": "qwen:7b",
                "status": "active",
                "session_id": "laptop",
                "owner": "local",
                "inactive_since": None,
                "max_concurrency": 1,
                "pool": "org/all",
                "group": "gpu:0",
                "wake_s": 40,
                "queue_s": 1800,
                "first_byte_s": None,
                "idle_s": None,
                "total_s": 3000.5,
                "hold": None,
                "paused": False,
                "in_flight": 1,
                "stopping": 0,
                "waiting": 1,
                "waking": False,
                "routable": True,
                "penalty": 0,
                "url": None,
                "key_env": None,
            }
            tasks = (await served.ask("GET", "/admin/v1/tasks")).json["data"]
            assert [(each["kind"], each["llm"], each["session_id"], each["state"]) for each in tasks] == [
                ("infer", "org/qwen", "laptop", "sent"),
                ("infer", "org/qwen", "laptop", "queued"),
            ]
            assert all(0 <= each["age_s"] < 10 and each["task_id"] for each in tasks)
            sessions = (await served.ask("GET", "/admin/v1/sessions")).json["data"]
            assert abs(seconds(sessions[0].pop("last_heartbeat_at")) - served.broker.now()) < 10
            assert sessions == [
                {
                    "session_id": "laptop",
                    "owner": "local",
                    "epoch": 1,
                    "connected": True,
                    "agent": {"name": "", "version": ""},
                    "llms": ["org/qwen"],
                }
            ]


async def test_an_agent_is_shown_as_it_named_itself(served: Served) -> None:
    said = {"llms": [], "agent": {"name": "wakecall", "version": "0.1.0"}}
    await served.ask("PUT", "/publisher/v1/sessions/laptop", JSON, body=as_bytes(said))
    sessions = (await served.ask("GET", "/admin/v1/sessions")).json["data"]
    assert sessions[0]["agent"] == {"name": "wakecall", "version": "0.1.0"}
    assert sessions[0]["connected"] is False


async def test_a_public_model_is_made_changed_and_deleted(served: Served) -> None:
    made = await served.ask("PUT", "/admin/v1/llms/org/gpt", JSON, body=as_bytes(PUBLIC))
    assert made.status == 200
    assert (made.json["name"], made.json["kind"], made.json["model"]) == ("org/gpt", "public", "gpt-x")
    assert (made.json["url"], made.json["key_env"]) == (PUBLIC["url"], PUBLIC["key_env"])
    assert made.json["routable"] is False, "nothing here asks an upstream"
    changed = await served.ask("PUT", "/admin/v1/llms/org/gpt", JSON, body=as_bytes(PUBLIC | {"model": "y"}))
    assert changed.json["model"] == "y"
    assert served.broker.llm("org/gpt").key_env == "WAKECALL_UPSTREAM_X"
    listed = await served.ask("GET", "/admin/v1/llms")
    assert [each["name"] for each in listed.json["data"]] == ["org/gpt"]
    deleted = await served.ask("DELETE", "/admin/v1/llms/org/gpt")
    assert (deleted.status, deleted.body) == (204, b"")
    for method in ("GET", "DELETE"):
        gone = await served.ask(method, "/admin/v1/llms/org/gpt")
        assert (gone.status, gone.code) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"url": "api.example/v1"}, "url"),
        ({"url": "ftp://api.example"}, "url"),
        ({"url": "https://"}, "url"),
        ({"url": "/v1"}, "url"),
        ({"url": "https://user:secret@api.example"}, "url"),
        ({"url": "https://user@api.example"}, "url"),
        ({"url": "https://api.example:99999"}, "url"),
        ({"url": "https://[::1"}, "url"),
        ({"url": "https://api.example/a b"}, "url"),
        ({"url": "https://api.example/\n"}, "url"),
        ({"url": "https://api.example/v1?key=secret"}, "url"),
        ({"url": "https://api.example/" + "x" * 3000}, "url"),
        ({"url": 1}, "url"),
        ({"key_env": "PATH"}, "key_env"),
        ({"key_env": "WAKECALL_UPSTREAM_"}, "key_env"),
        ({"key_env": "WAKECALL_UPSTREAM_x"}, "key_env"),
        ({"key_env": "WAKECALL_UPSTREAM_X\n"}, "key_env"),
        ({"model": ""}, "model"),
        ({"model": "m" * 5000}, "model"),
        ({"type": None}, "type"),
    ],
)
async def test_a_public_model_that_cannot_be_is_refused(served: Served, change: dict[str, Any], param: str) -> None:
    answer = await served.ask("PUT", "/admin/v1/llms/gpt", JSON, body=as_bytes(PUBLIC | change))
    assert (answer.status, answer.code, answer.json["error"]["param"]) == (400, "invalid_request", param)
    assert b"secret" not in answer.body
    assert served.broker.llms() == []


async def test_a_public_models_name_is_a_name(served: Served) -> None:
    for name in ("a%20b", "a//b", "%C3%A9", "a" * 129):
        answer = await served.ask("PUT", f"/admin/v1/llms/{name}", JSON, body=as_bytes(PUBLIC))
        assert (answer.status, answer.code, answer.json["error"]["param"]) == (400, "invalid_request", "name")


async def test_a_virtual_model_is_not_an_operators_to_change(served: Served) -> None:
    await served.register("laptop", {"name": "qwen"})
    answer = await served.ask("PUT", "/admin/v1/llms/qwen", JSON, body=as_bytes(PUBLIC))
    assert (answer.status, answer.code) == (409, "llm_is_virtual")


async def test_deleting_a_model_fails_its_infers(served: Served) -> None:
    async with served.publishing() as publisher, served.calling(CALL) as client:
        frame = await publisher.next("infer")
        assert (await served.ask("DELETE", "/admin/v1/llms/qwen")).status == 204
        assert (await publisher.next("cancel")).task_id == frame.task_id
        answer = await client.wire.read_answer("POST")
        assert (answer.status, answer.code) == (503, "publisher_disconnected")


async def test_an_evicted_session_is_told_so(served: Served) -> None:
    async with served.publishing() as publisher:
        answer = await served.ask("DELETE", "/admin/v1/sessions/laptop")
        assert (answer.status, answer.body) == (204, b"")
        assert (await publisher.next("bye")).data == {"reason": "evicted"}
        assert served.broker.llm("qwen").status is Status.INACTIVE
        gone = await served.ask("DELETE", "/admin/v1/sessions/laptop")
        assert (gone.status, gone.code) == (404, "session_not_found")


async def test_a_sweep_reports_what_it_did(served: Served) -> None:
    await served.register("laptop", {"name": "qwen"})
    answer = await served.ask("POST", "/admin/v1/sweep")
    assert (answer.status, answer.json) == (200, {"inactivated": [], "deleted": []})
