"""A publisher's paths, over the bare wire: registering, the channel, heartbeats, results."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from tests.http.served import JSON, SSE, Served, as_bytes, head, open_served, wait_until
from tests.http.wire import Answer
from wakecall.config import BrokerConfig
from wakecall.errors import StoreUnavailable
from wakecall.models import Batch, Status
from wakecall.store import MemoryStore, StoreError

SESSION = "/publisher/v1/sessions/laptop"
CALL = {"model": "qwen"}
STREAM = {"model": "qwen", "stream": True}
MIB = 1 << 20


async def heartbeat(served: Served, said: Any, session_id: str = "laptop") -> Answer:
    target = f"/publisher/v1/sessions/{session_id}/heartbeat"
    return await served.ask("POST", target, JSON, body=as_bytes(said))


def statuses(served: Served) -> dict[str, Status]:
    return {llm.name: llm.status for llm in served.broker.llms()}


# Registering --------------------------------------------------------------------------------------------------------


async def test_a_register_answers_each_row_with_what_became_of_it(served: Served) -> None:
    llms = (
        {"name": "a", "type": "ollama", "model": "a:7b", "max_concurrency": 2, "wake_s": 40, "cancel": "drain"},
        {"name": "org/b:7b@q4", "status": "hibernating", "pool": None, "unknown": {"x": 1}},
    )
    answer = await served.register("laptop", *llms)
    assert answer.status == 200
    assert answer.json == {
        "session_id": "laptop",
        "heartbeat_interval_s": 30.0,
        "llms": [
            {"name": "a", "status": "active", "outcome": "created"},
            {"name": "org/b:7b@q4", "status": "hibernating", "outcome": "created"},
        ],
    }
    again = await served.register("laptop", *llms)
    assert [each["outcome"] for each in again.json["llms"]] == ["reactivated"] * 2
    row = served.broker.llm("a")
    assert (row.type, row.model, row.max_concurrency, row.wake_s, row.cancel) == ("ollama", "a:7b", 2, 40, "drain")
    assert served.broker.llm("org/b:7b@q4").model == "org/b:7b@q4"


async def test_a_register_says_all_of_a_row_each_time(served: Served) -> None:
    said = {"pool": "org/all", "group": "gpu:0", "queue_s": 0.5, "first_byte_s": 2, "idle_s": 3.5, "total_s": 86_400}
    for described in (said, {}, said, dict.fromkeys(said)):
        assert (await served.register("laptop", {"name": "a", **described})).status == 200
        row = served.broker.llm("a")
        assert {name: getattr(row, name) for name in said} == dict.fromkeys(said) | described


async def test_another_sessions_row_is_taken_while_it_lives_and_adopted_when_it_does_not(served: Served) -> None:
    await served.register("laptop", {"name": "qwen"})
    answer = await served.register("box", {"name": "own"}, {"name": "qwen"})
    assert (answer.status, answer.code) == (409, "llm_name_taken")
    assert answer.json["error"]["param"] == "llms[1].name"
    assert "own" not in statuses(served)  # all or nothing
    await served.register("laptop")
    answer = await served.register("box", {"name": "qwen"})
    assert answer.json["llms"] == [{"name": "qwen", "status": "active", "outcome": "adopted"}]


async def test_a_public_row_is_not_a_publishers(served: Served) -> None:
    await served.broker.put_public_llm("gpt", type="openai", model="gpt", url="https://api.example/v1")
    answer = await served.register("laptop", {"name": "gpt"})
    assert (answer.status, answer.code) == (409, "llm_is_public")


async def test_a_row_that_is_left_out_is_withdrawn(served: Served) -> None:
    async with served.publishing({"name": "a"}, {"name": "b"}):
        await served.register("laptop", {"name": "b"})
        assert statuses(served) == {"a": Status.INACTIVE, "b": Status.ACTIVE}
        await heartbeat(served, {"llms": {"a": "active"}})
        assert statuses(served)["a"] is Status.INACTIVE
        answer = await served.call({"model": "a"})
        assert (answer.status, answer.code) == (503, "model_offline")


@pytest.mark.parametrize(
    ("llms", "code", "param"),
    [
        ("x", "invalid_request", "llms"),
        ([1], "invalid_request", "llms[0]"),
        ([{}], "invalid_request", "llms[0].name"),
        ([{"name": 1}], "invalid_request", "llms[0].name"),
        ([{"name": ""}], "invalid_request", "llms[0].name"),
        ([{"name": "a b"}], "invalid_request", "llms[0].name"),
        ([{"name": "/a"}], "invalid_request", "llms[0].name"),
        ([{"name": "a\n"}], "invalid_request", "llms[0].name"),
        ([{"name": "a" * 129}], "invalid_request", "llms[0].name"),
        ([{"name": "a"}, {"name": "a"}], "invalid_request", "llms[1].name"),
        ([{"name": "a", "status": "inactive"}], "invalid_request", "llms[0].status"),
        ([{"name": "a", "max_concurrency": 0}], "invalid_request", "llms[0].max_concurrency"),
        ([{"name": "a", "max_concurrency": 100_001}], "invalid_request", "llms[0].max_concurrency"),
        ([{"name": "a", "max_concurrency": "2"}], "invalid_request", "llms[0].max_concurrency"),
        ([{"name": "a", "wake_s": 0}], "invalid_request", "llms[0].wake_s"),
        ([{"name": "a", "wake_s": -1.5}], "invalid_request", "llms[0].wake_s"),
        ([{"name": "a", "wake_s": 86_400.5}], "invalid_request", "llms[0].wake_s"),
        *(
            ([{"name": "a", budget: value}], "invalid_request", f"llms[0].{budget}")
            for budget in ("queue_s", "first_byte_s", "idle_s", "total_s")
            for value in (0, -1.5, 86_400.5, 1e300, "1", True, [1])
        ),
        *(
            ([{"name": "a"}, {"name": "b", member: value}], "invalid_request", f"llms[1].{member}")
            for member in ("pool", "group")
            for value in ("", "a b", "/a", "a" * 129, "é", 1)
        ),
        ([{"name": "a", "cancel": "maybe"}], "invalid_request", "llms[0].cancel"),
        ([{"name": "a", "type": "t" * 4097}], "invalid_request", "llms[0].type"),
        ([{"name": "a", "model": "é" * 2049}], "invalid_request", "llms[0].model"),
        ([{"name": f"m{each}"} for each in range(257)], "too_many", "llms"),
    ],
)
async def test_a_register_that_cannot_be_is_refused_and_changes_nothing(
    served: Served, llms: Any, code: str, param: str
) -> None:
    answer = await served.ask("PUT", SESSION, JSON, body=as_bytes({"llms": llms}))
    assert (answer.status, answer.code, answer.json["error"]["param"]) == (400, code, param)
    assert served.broker.llms() == []
    assert served.broker.session_views() == []


async def test_what_a_publisher_may_say_at_most_is_taken(served: Served) -> None:
    llms = [{"name": f"m{each}", "type": "t" * 512} for each in range(256)]
    assert (await served.register("a" * 128, *llms)).status == 200


@pytest.mark.parametrize("session_id", ["a" * 129, "a.b", "a%20b", "%C3%A9", "a%0A"])
async def test_a_session_id_is_well_formed(served: Served, session_id: str) -> None:
    answer = await served.ask("PUT", f"/publisher/v1/sessions/{session_id}", JSON, body=b'{"llms": []}')
    assert (answer.status, answer.code, answer.json["error"]["param"]) == (400, "invalid_request", "session_id")


@pytest.mark.parametrize(
    ("target", "method"),
    [(SESSION, "PUT"), (f"{SESSION}/heartbeat", "POST"), ("/publisher/v1/tasks/t/failure", "POST")],
)
@pytest.mark.parametrize("body", [b"", b"{", b'{"a": NaN}', b'{"a": "\xff"}', b"[" * 70, b'{"a": 1, "a": 1}'])
async def test_json_that_is_not_well_formed_is_400(served: Served, target: str, method: str, body: bytes) -> None:
    answer = await served.ask(method, target, JSON, body=body)
    assert (answer.status, answer.code) == (400, "invalid_json")


async def test_an_encoded_body_is_415_on_every_path_of_a_publisher(served: Served) -> None:
    async with served.publishing() as publisher, served.calling(CALL) as client:
        frame = await publisher.next("infer")
        task = f"/publisher/v1/tasks/{frame.task_id}"
        for method, target in (
            ("PUT", SESSION),
            ("POST", f"{SESSION}/heartbeat"),
            ("POST", f"{task}/result"),
            ("POST", f"{task}/chunks"),
            ("POST", f"{task}/failure"),
        ):
            answer = await served.ask(method, target, "content-encoding: gzip", "wakecall-offset: 0", body=b"x")
            assert (answer.status, answer.code) == (415, "unsupported_encoding"), target
        assert (await publisher.answer(frame, b"{}", JSON, "content-encoding: identity")).status == 200
        await client.read_head()


async def test_more_sessions_than_an_owner_may_have_are_refused() -> None:
    async with open_served(BrokerConfig(max_sessions_per_owner=2)) as served:
        assert [(await served.register(each)).status for each in "ab"] == [200, 200]
        answer = await served.register("c")
        assert (answer.status, answer.code) == (400, "too_many")


async def test_a_store_that_cannot_write_is_503() -> None:
    class Full(MemoryStore):
        async def write(self, batch: Batch) -> None:
            raise StoreError("disk full")

    async with open_served(store=Full()) as served:
        answer = await served.register("laptop", {"name": "qwen"})
        assert (answer.status, answer.code) == (503, StoreUnavailable.code)
        ready = await served.ask("GET", "/readyz")
        assert (ready.status, ready.json["reasons"]) == (503, ["store_unavailable"])


# The channel --------------------------------------------------------------------------------------------------------


async def test_a_channel_begins_with_hello(served: Served) -> None:
    await served.register("laptop", {"name": "qwen"})
    async with served.server.connect() as wire:
        await wire.send(head("GET", f"{SESSION}/frames", "accept: text/event-stream", "last-event-id: 3-9"))
        raw = b""
        while b"\n\n" not in raw:
            raw += await wire.read_some()
        top, _, body = raw.partition(b"\r\n\r\n")
        assert top.startswith(b"HTTP/1.1 200")
        for line in (b"content-type: text/event-stream", b"cache-control: no-store", b"x-accel-buffering: no"):
            assert line in top.lower()
        assert b"x-request-id: " in top.lower()
        assert (
            b'id: 1-1\nevent: hello\ndata: {"session_id":"laptop","epoch":1,"heartbeat_interval_s":30.0,'
            b'"keepalive_s":15.0,"features":["results"]}\n\n' in body
        )


async def test_a_channel_of_nobody_is_404(served: Served) -> None:
    for target in (f"{SESSION}/frames", "/publisher/v1/sessions/a.b/frames"):
        answer = await served.ask("GET", target)
        assert (answer.status, answer.code) == (404, "session_not_found")


async def test_a_silent_channel_carries_comments() -> None:
    async with open_served(BrokerConfig(keepalive_s=0.05)) as served, served.publishing() as publisher:
        for _ in range(2):
            assert await publisher.reading.piece() == b": keep-alive\n\n"


async def test_a_head_request_opens_no_channel(served: Served) -> None:
    """It would supersede the one that is open."""
    async with served.publishing() as publisher:
        for method, status in (("HEAD", 405), ("PUT", 405), ("OPTIONS", 200)):
            answer = await served.ask(method, f"{SESSION}/frames")
            assert answer.status == status
            assert set(answer.headers["allow"].split(", ")) == {"GET", "OPTIONS"}
        async with served.calling(CALL) as client:
            await publisher.answer(await publisher.next("infer"), b"{}")
            await client.read_head()


async def test_a_newer_channel_supersedes(served: Served) -> None:
    async with served.publishing() as older, served.calling(CALL) as client:
        await older.next("infer")
        async with served.channel("laptop") as newer:
            assert (await older.next("bye")).data == {"reason": "superseded"}
            assert await older.reading.rest() == (b"", False)
            answer = await client.wire.read_answer("POST")
            assert (answer.status, answer.code) == (503, "publisher_disconnected")
            async with served.calling(CALL) as second:
                await newer.answer(await newer.next("infer"), b"{}")
                await second.read_head()
                assert second.status == 200


async def test_a_burst_of_frames_is_written_at_once(served: Served) -> None:
    async with served.publishing() as publisher, trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(served.call, CALL)
        seen = {(await publisher.next("infer")).task_id for _ in range(20)}
        assert len(seen) == 20
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_a_channel_that_is_gone_loses_its_rows_at_once(served: Served, how: str) -> None:
    async with served.publishing({"name": "a"}, {"name": "b", "status": "hibernating"}) as publisher:
        if how == "rst":
            publisher.reading.wire.reset()
        else:
            await publisher.reading.wire.stream.aclose()
        await wait_until(lambda: set(statuses(served).values()) == {Status.INACTIVE})
        assert served.broker.statistics().channels == 0
        async with served.channel("laptop"):
            assert statuses(served) == {"a": Status.ACTIVE, "b": Status.HIBERNATING}


async def test_goodbye_ends_the_session(served: Served) -> None:
    async with served.publishing() as publisher:
        answer = await served.ask("DELETE", SESSION)
        assert (answer.status, answer.body) == (204, b"")
        assert "content-length" not in answer.headers
        assert (await publisher.next("bye")).data == {"reason": "goodbye"}
        assert await publisher.reading.rest() == (b"", False)
    for method, target in (("DELETE", SESSION), ("POST", f"{SESSION}/heartbeat"), ("GET", f"{SESSION}/frames")):
        answer = await served.ask(method, target, body=b"{}" if method == "POST" else b"")
        assert (answer.status, answer.code) == (404, "session_not_found")


# Heartbeats ---------------------------------------------------------------------------------------------------------


async def test_a_heartbeat_reports_and_is_told_what_to_drop(served: Served) -> None:
    async with served.publishing({"name": "qwen"}, {"name": "b"}) as publisher, served.calling(CALL):
        frame = await publisher.next("infer")
        answer = await heartbeat(
            served, {"llms": {"b": "hibernating", "other": "active"}, "tasks": [frame.task_id, "gone"]}
        )
        assert answer.status == 200
        assert answer.json == {"llms": {"qwen": "active", "b": "hibernating"}, "drop": ["gone"]}
        assert (await heartbeat(served, {"llms": None, "tasks": None, "more": 1})).status == 200


@pytest.mark.parametrize(
    ("said", "code", "param"),
    [
        ({"llms": {"qwen": "inactive"}}, "invalid_request", "llms.qwen"),
        ({"llms": {"qwen": 1}}, "invalid_request", "llms"),
        ({"llms": ["qwen"]}, "invalid_request", "llms"),
        ({"tasks": [1]}, "invalid_request", "tasks[0]"),
        ({"tasks": ["a", "not an id"]}, "invalid_request", "tasks[1]"),
        ({"tasks": ["a"] * 10_001}, "too_many", "tasks"),
        ([], "invalid_request", None),
    ],
)
async def test_a_heartbeat_that_cannot_be_is_refused(served: Served, said: Any, code: str, param: str | None) -> None:
    await served.register("laptop", {"name": "qwen"})
    answer = await heartbeat(served, said)
    assert (answer.status, answer.code, answer.json["error"]["param"]) == (400, code, param)


async def test_a_heartbeat_names_ten_thousand_tasks(served: Served) -> None:
    await served.register("laptop", {"name": "qwen"})
    answer = await heartbeat(served, {"tasks": [f"{each:0128}" for each in range(10_000)]})
    assert len(answer.json["drop"]) == 10_000


# Results ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 100, 65_536, 65_537, 32 * MIB])
async def test_the_body_arrives_byte_for_byte(served: Served, size: int) -> None:
    body = b'{ "odd": 1.0e+00,\n"model":"qwen" ,"pad":"' + b"x" * max(0, size - 44) + b'"}'
    body += b" " * (size - len(body))
    async with (
        served.publishing() as publisher,
        served.calling(body, "/v1/responses", "content-type: application/json; a=b"),
    ):
        frame = await publisher.next("infer")
        assert frame.data["headers"] == {"content-type": "application/json; a=b"}
        assert ("body" in frame.data) == (len(body) <= 65_536)
        if "body" in frame.data:
            assert frame.data["body"].encode() == body
        answer = await served.ask("GET", f"/publisher/v1/tasks/{frame.task_id}/body")
        assert (answer.status, answer.headers["content-type"]) == (200, "application/json; a=b")
        assert answer.body == body


async def test_a_task_of_nobody_is_404(served: Served) -> None:
    for method, what in (("GET", "body"), ("POST", "result"), ("POST", "chunks"), ("POST", "failure")):
        for task_id in ("nobody", "a.b", "x" * 200):
            target = f"/publisher/v1/tasks/{task_id}/{what}"
            answer = await served.ask(
                method, target, "wakecall-offset: 0", body=b'{"message": ""}' if method == "POST" else b""
            )
            assert (answer.status, answer.code) == (404, "task_not_found")


async def test_a_task_that_its_publisher_ended_takes_nothing_more(served: Served) -> None:
    async with served.publishing() as publisher, served.calling(CALL) as client:
        frame = await publisher.next("infer")
        await publisher.answer(frame, b"{}")
        await client.read_head()
        for late in (await publisher.answer(frame, b"{}"), await publisher.fail(frame, message="x")):
            assert (late.status, late.code) == (409, "task_already_settled")
        body = await served.ask("GET", f"/publisher/v1/tasks/{frame.task_id}/body")
        assert (body.status, body.code) == (409, "task_already_settled")


@pytest.mark.parametrize(
    ("header", "param"),
    [
        ("wakecall-status: 199", "Wakecall-Status"),
        ("wakecall-status: 600", "Wakecall-Status"),
        ("wakecall-status: 2e2", "Wakecall-Status"),
        ("wakecall-status: 0200", "Wakecall-Status"),
        ("wakecall-status: -200", "Wakecall-Status"),
        ("wakecall-status:", "Wakecall-Status"),
        ("wakecall-status: 200\r\nwakecall-status: 201", "Wakecall-Status"),
        ("wakecall-offset: x", "Wakecall-Offset"),
        ("wakecall-offset: -1", "Wakecall-Offset"),
        ("wakecall-offset: 1.5", "Wakecall-Offset"),
        ("wakecall-offset: 99999999999999999999", "Wakecall-Offset"),
    ],
)
async def test_a_header_out_of_range_is_refused_and_the_task_goes_on(served: Served, header: str, param: str) -> None:
    async with served.publishing() as publisher, served.calling(CALL) as client:
        frame = await publisher.next("infer")
        answer = await publisher.answer(frame, b"{}", header)
        assert (answer.status, answer.code, answer.json["error"]["param"]) == (400, "invalid_request", param)
        await publisher.answer(frame, b"{}", "wakecall-status: 201")
        await client.read_head()
        assert client.status == 201


async def test_a_result_in_pieces(served: Served) -> None:
    """Each says where it begins: what has arrived is skipped, a gap is refused, and nothing is lost or doubled."""
    async with served.publishing() as publisher, served.calling(STREAM) as client:
        frame = await publisher.next("infer")
        task = f"/publisher/v1/tasks/{frame.task_id}"

        async def post(what: str, offset: int | None, body: bytes) -> Answer:
            headers = [SSE, "wakecall-status: 201"] + ([] if offset is None else [f"wakecall-offset: {offset}"])
            return await served.ask("POST", f"{task}/{what}", *headers, body=body)

        missing = await post("chunks", None, b"x")
        assert (missing.status, missing.code, missing.json["error"]["param"]) == (
            400,
            "invalid_request",
            "Wakecall-Offset",
        )
        assert (await post("chunks", 0, b"data: 1\n\n")).status == 200
        await client.read_head()
        assert client.status == 201
        assert await client.piece() == b"data: 1\n\n"
        gap = await post("chunks", 10, b"x")
        assert (gap.status, gap.code) == (409, "offset_gap")
        assert (await post("chunks", 0, b"data: 1\n\n")).status == 200
        assert (await post("chunks", 5, b" 1\n\ndata: 2\n\n")).status == 200
        assert await client.piece() == b"data: 2\n\n"
        unsaid = await post("result", None, b"x")
        assert (unsaid.status, unsaid.code) == (400, "invalid_request")
        final = await post("result", 18, b"data: 3\n\n")
        assert (final.status, final.json) == (200, {"outcome": "completed"})
        assert await client.rest() == (b"data: 3\n\n", False)


async def test_two_uploads_for_one_task_exclude_each_other(served: Served) -> None:
    async with served.publishing() as publisher, served.calling(STREAM) as client:
        frame = await publisher.next("infer")
        async with publisher.upload(frame, SSE) as upload:
            await upload.send(b"data: 1\n\n")
            await client.read_head()
            second = await publisher.answer(frame, b"x")
            assert (second.status, second.code) == (409, "result_in_progress")
            third = await served.ask(
                "POST", f"/publisher/v1/tasks/{frame.task_id}/chunks", "wakecall-offset: 0", body=b"x"
            )
            assert (third.status, third.code) == (409, "result_in_progress")
            assert (await upload.finish()).status == 200


async def test_a_piece_that_breaks_off_is_sent_again(served: Served) -> None:
    async with served.publishing() as publisher, served.calling(STREAM) as client:
        frame = await publisher.next("infer")
        async with publisher.upload(frame, SSE, "wakecall-offset: 0", to="chunks") as upload:
            await upload.send(b"data: 1\n\nda")
            await client.read_head()
            await client.piece()
        answer: Answer | None = None
        while answer is None or answer.code == "result_in_progress":
            answer = await publisher.answer(frame, b"data: 1\n\ndata: 2\n\n", SSE, "wakecall-offset: 0")
            if answer.status == 200:
                break
        assert await client.rest() == (b"data: 2\n\n", False)


@pytest.mark.parametrize(
    ("said", "param"),
    [
        ({}, "message"),
        ({"message": 1}, "message"),
        ({"message": "x", "status": 200}, "status"),
        ({"message": "x", "status": 600}, "status"),
        ({"message": "x", "code": []}, "code"),
    ],
)
async def test_a_failure_that_cannot_be_is_refused(served: Served, said: Any, param: str) -> None:
    async with served.publishing() as publisher, served.calling(CALL):
        answer = await publisher.fail(await publisher.next("infer"), **said)
        assert (answer.status, answer.code, answer.json["error"]["param"]) == (400, "invalid_request", param)


async def test_a_failures_message_is_cut_to_its_bound(served: Served) -> None:
    """Refusing it would leave a client waiting for a task that has failed."""
    async with served.publishing() as publisher, served.calling(CALL) as client:
        frame = await publisher.next("infer")
        assert (await publisher.fail(frame, message="x" + "é" * 5000)).status == 200
        answer = await client.wire.read_answer("POST")
        assert answer.json["error"]["message"] == "x" + "é" * 2047


async def test_an_upload_for_a_task_that_is_over_is_answered_before_its_end(served: Served) -> None:
    """It says that it closes, and what the publisher still sends does not reset it."""
    async with served.publishing() as publisher:
        async with served.calling(STREAM):
            frame = await publisher.next("infer")
        await publisher.next("cancel")
        async with publisher.upload(frame, SSE) as upload:
            await upload.send(b"x" * 1000)
            answer = await upload.wire.read_answer("POST")
            assert (answer.status, answer.code, answer.headers["connection"]) == (410, "task_cancelled", "close")
            assert await upload.wire.read_some() == b""


async def test_an_upload_that_breaks_off_fails_its_task(served: Served) -> None:
    async with served.publishing() as publisher:
        for headers in ([SSE], [JSON]):
            async with served.calling(STREAM) as client:
                frame = await publisher.next("infer")
                async with publisher.upload(frame, *headers) as upload:
                    await upload.send(b"data: 1\n\n")
                    if headers == [SSE]:
                        await client.read_head()
                    upload.wire.reset()
                    text, cut = await client.rest() if headers == [SSE] else (b"publisher_error", True)
                    assert cut
                    assert b"publisher_error" in text
                assert (await publisher.fail(frame, message="x")).code == "task_already_settled"


async def test_an_upload_may_take_longer_than_any_body(served: Served) -> None:
    """Results have no bound: 33 MiB pass, held back by a client that reads them."""
    async with served.publishing() as publisher, served.calling(STREAM) as client:
        frame = await publisher.next("infer")
        total = 0

        async def read() -> None:
            nonlocal total
            await client.read_head()
            while piece := await client.piece():
                total += len(piece)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            async with publisher.upload(frame, "content-type: audio/wav") as upload:
                for _ in range(33 * 16):
                    await upload.send(b"x" * 65536)
                assert (await upload.finish()).status == 200
        assert total == 33 * MIB
