"""Answers that are not theirs to give, or not any more: each is refused in words, and nobody else notices."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from tests.hostile.connections import Told, told, told_of
from tests.hostile.sibling import sibling
from tests.http.served import JSON, SSE, Served, WirePublisher, as_bytes, open_served, wait_until
from tests.http.test_app_relay import last_event
from wakecall.config import BrokerConfig
from wakecall.models import LLMSpec, Status
from wakecall.testing import FakePublisher

CALL = {"model": "qwen"}
STREAM = {"model": "qwen", "stream": True}
HELD, EVENTS = pytest.param(CALL, JSON, id="held"), pytest.param(STREAM, SSE, id="events")

NOT_FOUND = Told(404, "task_not_found", "kept")
SETTLED = Told(409, "task_already_settled", "kept")
CANCELLED = Told(410, "task_cancelled", "kept")

EVENT = b'data: {"n": 1}\n\n'


async def knock(served: Served, task_id: str) -> set[Told]:
    """Speak of a task on each of its four paths."""
    task = f"/publisher/v1/tasks/{task_id}"
    return {
        await told(served, "GET", f"{task}/body"),
        await told(served, "POST", f"{task}/result", JSON, body=b'{"not": "yours"}'),
        await told(served, "POST", f"{task}/chunks", SSE, "wakecall-offset: 0", body=b"data: not yours\n\n"),
        await told(served, "POST", f"{task}/failure", JSON, body=as_bytes({"message": "not yours", "status": 500})),
    }


async def give_up(served: Served, publisher: WirePublisher, call: Any = STREAM) -> str:
    """A task whose client has left: its id."""
    async with served.calling(call):
        frame = await publisher.next("infer")
    assert (await publisher.next("cancel")).task_id == frame.task_id
    return frame.task_id


# Others' ------------------------------------------------------------------------------------------------------------


async def test_another_owners_infer_is_not_found_on_any_path() -> None:
    """Neither while it is under way, nor while its own publisher uploads, nor once it is over: its caller has the answer of
    its own publisher, whole."""
    async with open_served() as served, sibling(served) as s:
        async with FakePublisher(served.broker, "box", ["theirs"], owner="another") as box:
            async with served.calling({"model": "theirs"}) as client:
                frame = await box.next("infer")
                task_id = frame.data["task_id"]
                assert await knock(served, task_id) == {NOT_FOUND}
                with box.upload(frame) as upload:
                    await upload.send(b'{"half": ')
                    assert await knock(served, task_id) == {NOT_FOUND}
                    await upload.send(b"2}")
                    await upload.finish()
                await client.read_head()
                assert (client.status, await client.rest()) == (200, (b'{"half": 2}', False))
            assert await knock(served, task_id) == {NOT_FOUND}
            async with served.calling({"model": "theirs"}):
                left = (await box.next("infer")).data["task_id"]
            assert (await box.next("cancel")).data["task_id"] == left
            assert await knock(served, left) == {NOT_FOUND}
        await s.beat()


async def test_another_owners_wake_is_not_found_on_any_path() -> None:
    """Nobody can say in its publisher's place that a model is awake, or that it never will be."""
    async with open_served() as served, sibling(served):
        asleep = LLMSpec("theirs", status=Status.HIBERNATING)
        async with FakePublisher(served.broker, "box", [asleep], owner="another") as box:
            async with served.calling({"model": "theirs"}) as client:
                wake = await box.next("wake")
                assert await knock(served, wake.data["task_id"]) == {NOT_FOUND}
                assert served.broker.llm("theirs").status is Status.HIBERNATING
                await box.answer(wake)
                await box.answer(await box.next("infer"), b"{}")
                await client.read_head()
                assert client.status == 200
            assert await knock(served, wake.data["task_id"]) == {NOT_FOUND}


async def test_a_session_of_the_same_owner_ends_a_task_by_its_id_alone() -> None:
    """A task is its owner's, and no path names a session: whoever of the owner's has the id may answer, once, that one task.
    A heartbeat does tell them apart: what the broker waits for elsewhere is to be dropped here."""
    async with open_served() as served, sibling(served), served.publishing() as laptop:
        async with served.publishing({"name": "other"}, session_id="box") as box:
            async with served.calling(CALL) as first, served.calling(CALL) as second:
                frames = {frame.task_id: frame for frame in (await laptop.next("infer"), await laptop.next("infer"))}
                ids = list(frames)
                for session_id, dropped in (("box", ids), ("laptop", [])):
                    answer = await served.ask(
                        "POST", f"/publisher/v1/sessions/{session_id}/heartbeat", JSON, body=as_bytes({"tasks": ids})
                    )
                    assert answer.json["drop"] == dropped
                assert (await box.answer(frames[ids[0]], b'{"by": "box"}')).json == {"outcome": "completed"}
                assert (await laptop.answer(frames[ids[0]], b'{"by": "laptop"}')).code == "task_already_settled"
                assert (await laptop.answer(frames[ids[1]], b'{"by": "laptop"}')).json == {"outcome": "completed"}
                bodies = set()
                for client in (first, second):
                    await client.read_head()
                    bodies.add((client.status, await client.rest()))
                assert bodies == {(200, (b'{"by": "box"}', False)), (200, (b'{"by": "laptop"}', False))}


# Twice --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "content_type"), [HELD, EVENTS])
async def test_a_result_that_comes_twice_is_refused_the_second_time(call: Any, content_type: str) -> None:
    """409 `task_already_settled` on a connection that goes on; one whose upload has not ended is half-closed behind it."""
    async with open_served() as served, sibling(served), served.publishing() as publisher:
        async with served.calling(call) as client:
            frame = await publisher.next("infer")
            target = f"/publisher/v1/tasks/{frame.task_id}/result"
            assert await told(served, "POST", target, content_type, body=EVENT) == (200, "completed", "kept")
            assert await told(served, "POST", target, content_type, body=b"data: twice\n\n") == SETTLED
            async with publisher.upload(frame, content_type) as upload:
                await upload.send(b"data: twice\n\n")
                answer = await upload.wire.read_answer("POST")
                assert await told_of(upload.wire, answer) == (409, "task_already_settled", "fin")
            await client.read_head()
            assert (client.status, await client.rest()) == (200, (EVENT, False))


async def test_of_results_that_come_at_once_one_is_the_answer() -> None:
    """The others get 409: `result_in_progress` while it is being uploaded, `task_already_settled` after that. The client has
    the bytes of that one, and of no other."""
    async with open_served() as served, sibling(served), served.publishing() as publisher:
        for _ in range(5):
            async with served.calling(CALL) as client:
                target = f"/publisher/v1/tasks/{(await publisher.next('infer')).task_id}/result"
                outcomes: dict[int, Told] = {}

                async def post(number: int, target: str = target, outcomes: dict[int, Told] = outcomes) -> None:
                    body = b'"%b"' % (b"%d" % number * 200_000)
                    outcomes[number] = await told(served, "POST", target, JSON, body=body)

                async with trio.open_nursery() as nursery:
                    for number in range(6):
                        nursery.start_soon(post, number)
                (winner,) = (number for number, each in outcomes.items() if each.status == 200)
                for number, each in outcomes.items():
                    if number != winner:
                        assert each[:2] in {(409, "result_in_progress"), (409, "task_already_settled")}, outcomes
                await client.read_head()
                assert (client.status, await client.rest()) == (200, (b'"%b"' % (b"%d" % winner * 200_000), False))


async def test_while_one_result_is_uploaded_every_other_is_refused() -> None:
    """409 `result_in_progress`, for results and chunks, as often as they come; the first goes on as if nothing had been."""
    async with open_served() as served, sibling(served) as s, served.publishing() as publisher:
        async with served.calling(STREAM) as client:
            frame = await publisher.next("infer")
            task = f"/publisher/v1/tasks/{frame.task_id}"
            async with publisher.upload(frame, SSE) as upload:
                await upload.send(EVENT)
                await client.read_head()
                for _ in range(3):
                    for target in (f"{task}/result", f"{task}/chunks"):
                        refused = await told(served, "POST", target, SSE, "wakecall-offset: 0", body=b"data: 2\n\n")
                        assert refused == (409, "result_in_progress", "kept")
                await s.beat()
                await upload.send(EVENT)
                assert (await upload.finish()).status == 200
            assert await client.rest() == (EVENT + EVENT, False)


async def test_a_failure_during_a_stream_ends_it_with_an_error_event_and_the_cut() -> None:
    """Whoever reports it gets 200, a second time 409; the upload is told so at once, and its connection half-closed."""
    async with open_served() as served, sibling(served) as s, served.publishing() as publisher:
        async with served.calling(STREAM) as client:
            frame = await publisher.next("infer")
            target = f"/publisher/v1/tasks/{frame.task_id}/failure"
            async with publisher.upload(frame, SSE) as upload:
                await upload.send(EVENT + b"data: half of an ev")
                await client.read_head()
                body = as_bytes({"message": "out of memory"})
                assert await told(served, "POST", target, JSON, body=body) == (200, "failed", "kept")
                assert await told(served, "POST", target, JSON, body=body) == SETTLED
                answer = await upload.wire.read_answer("POST")
                assert await told_of(upload.wire, answer) == (409, "task_already_settled", "fin")
            text, cut = await client.rest()
            assert cut
            assert text.startswith(EVENT + b"event: error\n")
            assert last_event(text)["error"]["message"] == "out of memory"
            await s.beat()


async def test_a_failure_during_a_held_answer_is_the_clients_answer() -> None:
    """Whole, with the failure's status, though half of another answer had arrived."""
    async with open_served() as served, sibling(served), served.publishing() as publisher:
        async with served.calling(CALL) as client:
            frame = await publisher.next("infer")
            async with publisher.upload(frame, JSON) as upload:
                await upload.send(b'{"half": ')
                await wait_until(lambda: served.broker._directory.tasks[frame.task_id].received == 9)
                assert (await publisher.fail(frame, message="out of memory", status=507)).status == 200
                answer = await upload.wire.read_answer("POST")
                assert await told_of(upload.wire, answer) == (409, "task_already_settled", "fin")
            got = await client.wire.read_answer("POST")
            assert (got.status, got.code, got.is_cut) == (507, "publisher_error", False)


async def test_a_failure_that_is_none_does_not_touch_the_upload() -> None:
    """400 for what is no failure: the answer goes on, and is the client's."""
    async with open_served() as served, sibling(served), served.publishing() as publisher:
        async with served.calling(STREAM) as client:
            frame = await publisher.next("infer")
            target = f"/publisher/v1/tasks/{frame.task_id}/failure"
            async with publisher.upload(frame, SSE) as upload:
                await upload.send(EVENT)
                for body, code in (
                    (b"{", "invalid_json"),
                    (b"{}", "invalid_request"),
                    (b'{"message": "x", "status": 200}', "invalid_request"),
                    (b'{"message": "x", "status": 99}', "invalid_request"),
                    (b'{"message": "x", "status": 1000}', "invalid_request"),
                    (b'{"message": null}', "invalid_request"),
                ):
                    assert await told(served, "POST", target, JSON, body=body) == (400, code, "kept")
                assert (await upload.finish()).status == 200
            await client.read_head()
            assert await client.rest() == (EVENT, False)


# Late ---------------------------------------------------------------------------------------------------------------


async def test_nothing_is_taken_after_the_end() -> None:
    """409 `task_already_settled` on every path, whether a result, chunks or a failure was the end."""
    async with open_served() as served, sibling(served), served.publishing() as publisher:
        for what, headers, body in (
            ("result", (JSON,), b"{}"),
            ("result", (SSE, "wakecall-offset: 0"), EVENT),
            ("failure", (JSON,), b'{"message": "broken"}'),
        ):
            async with served.calling(STREAM) as client:
                frame = await publisher.next("infer")
                target = f"/publisher/v1/tasks/{frame.task_id}/{what}"
                assert (await told(served, "POST", target, *headers, body=body)).status == 200
                assert await knock(served, frame.task_id) == {SETTLED}
                await client.read_head()
                got, cut = await client.rest()
                assert (cut, b"not yours" in got) == (False, False)


async def test_nothing_is_taken_after_a_cancel() -> None:
    """410 `task_cancelled` on every path, once the client has left."""
    async with open_served() as served, sibling(served), served.publishing() as publisher:
        for call in (CALL, STREAM):
            assert await knock(served, await give_up(served, publisher, call)) == {CANCELLED}


async def test_chunks_that_go_on_after_a_cancel_are_refused_each() -> None:
    """The one that was on its way is answered at once, and its connection half-closed; those that follow hear the same."""
    async with open_served() as served, sibling(served), served.publishing() as publisher:
        async with served.calling(STREAM) as client:
            frame = await publisher.next("infer")
            async with publisher.upload(frame, SSE, "wakecall-offset: 0", to="chunks") as upload:
                await upload.send(EVENT)
                await client.read_head()
                await client.wire.stream.aclose()
                assert (await publisher.next("cancel")).data["reason"] == "client_disconnected"
                answer = await upload.wire.read_answer("POST")
                assert await told_of(upload.wire, answer) == (410, "task_cancelled", "fin")
            for offset in (0, len(EVENT), 10**9):
                late = await told(
                    served,
                    "POST",
                    f"/publisher/v1/tasks/{frame.task_id}/chunks",
                    SSE,
                    f"wakecall-offset: {offset}",
                    body=EVENT,
                )
                assert late == CANCELLED


async def test_nothing_is_taken_after_a_deadline() -> None:
    """410 as after a cancel; the client has had its 504."""
    async with open_served(BrokerConfig(first_byte_s=0.6)) as served, sibling(served), served.publishing() as publisher:
        async with served.calling(STREAM) as client:
            frame = await publisher.next("infer")
            got = await client.wire.read_answer("POST")
            assert (got.status, got.code, got.json["error"]["phase"]) == (504, "deadline_exceeded", "first_byte")
            assert (await publisher.next("cancel")).data["reason"] == "deadline_exceeded"
            assert await knock(served, frame.task_id) == {CANCELLED}


async def test_a_superseded_epochs_results_are_refused() -> None:
    """Its channel gets `bye` and a clean end, its upload and what it still sends 410, its callers 503 or the error event.
    The newer channel, which had been sent nothing of that, serves what comes."""
    async with open_served() as served, sibling(served) as s, served.publishing() as older:
        async with served.calling(CALL) as plain, served.calling(STREAM) as stream:
            frames = [await older.next("infer"), await older.next("infer")]
            if frames[0].data["stream"]:
                frames.reverse()
            async with older.upload(frames[1], SSE) as upload:
                await upload.send(EVENT)
                await stream.read_head()
                async with served.channel("laptop") as newer:
                    assert (await older.next("bye")).data == {"reason": "superseded"}
                    assert await older.reading.rest() == (b"", False)
                    answer = await upload.wire.read_answer("POST")
                    assert await told_of(upload.wire, answer) == (410, "task_cancelled", "fin")
                    for frame in frames:
                        assert await knock(served, frame.task_id) == {CANCELLED}
                    got = await plain.wire.read_answer("POST")
                    assert (got.status, got.code) == (503, "publisher_disconnected")
                    text, cut = await stream.rest()
                    assert (cut, last_event(text)["error"]["code"]) == (True, "publisher_disconnected")
                    await s.beat()
                    async with served.calling(CALL) as later:
                        frame = await newer.next("infer")
                        assert frame.id.startswith("2-")
                        assert (await newer.answer(frame, b'{"epoch": 2}')).status == 200
                        await later.read_head()
                        assert (later.status, await later.rest()) == (200, (b'{"epoch": 2}', False))


async def test_a_superseded_epochs_wake_is_over_too() -> None:
    """410, and it wakes nothing: whoever waited gets 503, and the newer channel is asked anew by the next call."""
    async with open_served() as served, sibling(served):
        async with served.publishing({"name": "qwen", "status": "hibernating"}) as older:
            async with served.calling(CALL) as client:
                wake = await older.next("wake")
                async with served.channel("laptop") as newer:
                    got = await client.wire.read_answer("POST")
                    assert (got.status, got.code, got.headers["retry-after"]) == (503, "publisher_disconnected", "2")
                    assert await knock(served, wake.task_id) == {CANCELLED}
                    assert served.broker.llm("qwen").status is Status.HIBERNATING
                    async with served.calling(CALL) as later:
                        assert (await newer.answer(await newer.next("wake"))).status == 200
                        assert (await newer.answer(await newer.next("infer"), b"{}")).status == 200
                        await later.read_head()
                        assert later.status == 200
