"""Uploads that are too much, too long or not what they said: each has its bounds, and its client is told the truth."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import trio
import trio.testing

from tests.hostile.connections import Told, end_of, told, told_of
from tests.hostile.memory import MIB, holding_less_than
from tests.hostile.sibling import sibling
from tests.http.served import JSON, SSE, Frame, Served, WirePublisher, as_bytes, head, open_served, wait_until
from tests.http.test_app_relay import last_event
from tests.http.wire import Wire, send_until_stuck
from wakecall.config import BrokerConfig
from wakecall.models import Status

CALL = {"model": "qwen"}
STREAM = {"model": "qwen", "stream": True}
AUDIO = "content-type: audio/wav"
EVENT = b'data: {"n": 1}\n\n'
GIB = 1 << 30

NO_HTTP = Told(400, "invalid_request", "fin")


def result(frame: Frame) -> str:
    return f"/publisher/v1/tasks/{frame.task_id}/result"


async def pour(wire: Wire, total: int) -> None:
    piece = bytes(65536)
    for _ in range(total // len(piece)):
        await wire.send(piece)


async def arrival_of(infer: Any, count: int) -> None:
    """So many bytes of its answer are in the broker."""
    if infer.received < count:
        await wait_until(lambda: infer.received >= count)


async def serve_one(served: Served, publisher: WirePublisher) -> None:
    """A whole call, as if nothing had been: its channel lives, and the slot is free."""
    async with served.calling(CALL) as client:
        assert (await publisher.answer(await publisher.next("infer"), b"{}")).status == 200
        await client.read_head()
        assert (client.status, await client.rest()) == (200, (b"{}", False))


# A flood ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content_type", "piece"),
    [
        pytest.param(SSE, b"10000\r\ndata: %b\n\n\r\n" % (b"x" * 65528), id="events"),
        pytest.param(SSE, b"10000\r\n%b\r\n" % (b"x" * 65536), id="one-endless-event"),
        pytest.param(JSON, b"10000\r\n%b\r\n" % (b"x" * 65536), id="held-then-raw"),
        pytest.param(AUDIO, (b"40\r\n%b\r\n" % (b"x" * 64)) * 1000, id="small-chunks"),
    ],
)
async def test_a_flood_to_a_client_that_reads_nothing_is_held_back(content_type: str, piece: bytes) -> None:
    """The publisher's upload stands still, with no more than a few hundred KiB of it in the broker. When the client leaves,
    the publisher gets one cancel, its upload 410 and its connection's end; its channel goes on."""
    async with (
        open_served() as served,
        sibling(served) as s,
        served.publishing({"name": "qwen", "max_concurrency": 1}) as p,
    ):
        async with served.server.connect(receive_buffer=4096) as client:
            body = as_bytes(STREAM)
            await client.send(head("POST", "/v1/completions", f"content-length: {len(body)}") + body)
            frame = await p.next("infer")
            async with p.upload(frame, content_type) as upload:
                sent = 0

                async def send() -> None:
                    nonlocal sent
                    await upload.wire.send(piece)
                    sent += len(piece)
                    assert sent < 64 * MIB, "nobody holds it back"

                with holding_less_than(4 * MIB):
                    await send_until_stuck(send)
                    await s.beat()
                client.reset()
                cancel = await p.next("cancel")
                assert (cancel.task_id, cancel.data["reason"]) == (frame.task_id, "client_disconnected")
                answer = await upload.wire.read_answer("POST")
                assert await told_of(upload.wire, answer) == (410, "task_cancelled", "fin")
        await serve_one(served, p)


class Messages:
    """Counts what the server hands to the app, by path."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.counts: Counter[str] = Counter()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def counting() -> Any:
            message = await receive()
            self.counts[scope["path"]] += 1
            return message

        await self._app(scope, counting, send)


async def test_chunks_of_one_byte_cost_the_broker_what_they_weigh() -> None:
    """Fifty thousand of them come in as a few hundred pieces, and not with a turn of the app for each; none is lost."""
    async with open_served() as served:
        messages = served.app.asgi_app = Messages(served.app.asgi_app)
        async with sibling(served) as s, served.publishing() as publisher, served.calling(CALL) as client:
            frame = await publisher.next("infer")
            async with publisher.upload(frame, AUDIO) as upload:
                for digit in b"12345":
                    await upload.wire.send(b"1\r\n%c\r\n" % digit * 10_000)
                assert (await upload.finish()).status == 200
            await s.beat()
            await client.read_head()
            assert await client.rest() == (b"".join(b"%c" % digit * 10_000 for digit in b"12345"), False)
            assert messages.counts[result(frame)] < 1000


async def test_a_flood_of_chunk_requests_to_a_client_that_reads_nothing_is_held_back() -> None:
    """One waits to be taken, and those beside it get 409 `result_in_progress`; when the client leaves all hear 410."""
    async with open_served() as served, sibling(served) as s, served.publishing() as publisher:
        async with served.server.connect(receive_buffer=4096) as client, trio.open_nursery() as nursery:
            body = as_bytes(STREAM)
            await client.send(head("POST", "/v1/completions", f"content-length: {len(body)}") + body)
            frame = await publisher.next("infer")
            target = f"/publisher/v1/tasks/{frame.task_id}/chunks"
            line = b"data: %b\n\n" % (b"x" * 524_280)
            taken, refused = 0, Told(200, "", "")

            async def post() -> Told:
                return await told(served, "POST", target, SSE, f"wakecall-offset: {taken * len(line)}", body=line)

            async def flood() -> None:
                nonlocal taken, refused
                while True:
                    refused = await post()
                    if refused != (200, "taken", "kept"):
                        return
                    taken += 1
                    assert taken < 100, "nobody holds it back"

            with holding_less_than(6 * MIB):
                nursery.start_soon(flood)
                await trio.testing.wait_all_tasks_blocked(0.02)
                for _ in range(5):
                    assert (await post())[:2] == (409, "result_in_progress")
                await s.beat()
            assert refused.status == 200
            client.reset()
            assert (await publisher.next("cancel")).task_id == frame.task_id
            assert (await post())[:2] == (410, "task_cancelled")
        assert refused[:2] == (410, "task_cancelled")
        await serve_one(served, publisher)


# For ever -----------------------------------------------------------------------------------------------------------


async def drip(wire: Wire, drop: bytes) -> None:
    """As slowly as it likes, but always in time."""
    try:
        while True:
            await wire.send(drop)
            await trio.sleep(0.03)
    except trio.BrokenResourceError:
        pass


async def test_an_upload_that_never_ends_is_ended_by_the_infers_total_time() -> None:
    """`total_s`, however lively it is. The client has 504 with that phase, or an event of it and the cut, or the cut; the
    publisher one cancel `deadline_exceeded`, and 410 to its upload. Four at once, one of each kind."""
    async with open_served(BrokerConfig(total_s=1.5)) as served, sibling(served), served.publishing() as publisher:
        ended: list[str] = []

        async def one(call: Any, content_type: str, drop: bytes, task_status: trio.TaskStatus[None]) -> None:
            async with served.calling(call) as client, trio.open_nursery() as nursery:
                start = trio.current_time()
                frame = await publisher.next("infer")
                task_status.started()
                async with publisher.upload(frame, content_type) as upload:
                    nursery.start_soon(drip, upload.wire, drop)
                    answer = await client.wire.read_answer("POST")
                    assert trio.current_time() - start > 1.4
                    if content_type == JSON:
                        assert (answer.status, answer.code, answer.is_cut) == (504, "deadline_exceeded", False)
                        assert answer.json["error"]["phase"] == "total"
                    else:
                        assert (answer.status, answer.is_cut) == (200, True)
                    if content_type == SSE:
                        assert last_event(answer.body)["error"]["phase"] == "total"
                    refusal = await upload.wire.read_answer("POST")
                    assert (refusal.status, refusal.code) == (410, "task_cancelled")
                    assert refusal.headers["connection"] == "close"
                    nursery.cancel_scope.cancel()
            ended.append(frame.task_id)

        async with trio.open_nursery() as nursery:
            await nursery.start(one, STREAM, SSE, b"10\r\n%b\r\n" % EVENT)
            await nursery.start(one, STREAM, SSE, b"1\r\nx\r\n")
            await nursery.start(one, CALL, JSON, b"1\r\n \r\n")
            await nursery.start(one, CALL, AUDIO, b"1\r\nx\r\n")
        cancels = [await publisher.next("cancel") for _ in range(4)]
        assert {each.data["reason"] for each in cancels} == {"deadline_exceeded"}
        assert sorted(each.task_id for each in cancels) == sorted(ended)
        await serve_one(served, publisher)


async def test_an_upload_that_never_begins_is_ended_by_the_first_byte_deadline() -> None:
    """Its head is there and no byte: 504 with phase `first_byte` to who asked for a stream, 410 to the upload."""
    async with open_served(BrokerConfig(first_byte_s=0.6)) as served, sibling(served), served.publishing() as publisher:
        async with served.calling(STREAM) as client:
            frame = await publisher.next("infer")
            async with publisher.upload(frame, SSE) as upload:
                got = await client.wire.read_answer("POST")
                assert (got.status, got.code, got.json["error"]["phase"]) == (504, "deadline_exceeded", "first_byte")
                assert (await publisher.next("cancel")).data["reason"] == "deadline_exceeded"
                answer = await upload.wire.read_answer("POST")
                assert await told_of(upload.wire, answer) == (410, "task_cancelled", "fin")


async def test_what_adds_nothing_does_not_keep_an_infer_alive() -> None:
    """Chunks that were taken already, or that are empty, are answered 200 and are no sign of life: `idle_s` ends it, as
    it does where nothing comes at all. The three at once."""
    async with open_served(BrokerConfig(idle_s=0.6)) as served, sibling(served), served.publishing() as publisher:

        async def one(again: tuple[int, bytes] | None, task_status: trio.TaskStatus[None]) -> None:
            async with served.calling(STREAM) as client, trio.open_nursery() as nursery:
                frame = await publisher.next("infer")
                task_status.started()
                answers: list[Told] = []

                async def post(offset: int, body: bytes) -> None:
                    target = f"/publisher/v1/tasks/{frame.task_id}/chunks"
                    answers.append(await told(served, "POST", target, SSE, f"wakecall-offset: {offset}", body=body))

                async def go_on(offset: int, body: bytes) -> None:
                    while True:
                        await post(offset, body)
                        await trio.sleep(0.05)

                await post(0, EVENT)
                if again is not None:
                    nursery.start_soon(go_on, *again)
                text, cut = await (await client.read_head()).rest()
                assert (cut, text.startswith(EVENT)) == (True, True)
                error = last_event(text)["error"]
                assert (error["code"], error["phase"]) == ("deadline_exceeded", "idle")
                nursery.cancel_scope.cancel()
            assert {each for each in answers if each.status != 410} == {(200, "taken", "kept")}
            await post(len(EVENT), EVENT)
            assert answers[-1] == (410, "task_cancelled", "kept")

        async with trio.open_nursery() as nursery:
            for again in (None, (0, EVENT), (len(EVENT), b"")):
                await nursery.start(one, again)
        assert {(await publisher.next("cancel")).data["reason"] for _ in range(3)} == {"deadline_exceeded"}


async def test_who_goes_on_uploading_to_what_is_over_is_cut_off() -> None:
    """After its 410 and the half-close about a MiB more is read and thrown away; then the connection is reset."""
    async with open_served() as served, sibling(served) as s, served.publishing() as publisher:
        async with served.calling(STREAM):
            frame = await publisher.next("infer")
        await publisher.next("cancel")
        async with served.server.connect(send_buffer=65536) as wire:
            await wire.send(head("POST", result(frame), SSE, f"content-length: {GIB}"))
            with holding_less_than(4 * MIB), pytest.raises(trio.BrokenResourceError):
                await pour(wire, 64 * MIB)
        await s.beat()


# A very large chunk -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "content_type"),
    [
        pytest.param(STREAM, SSE, id="one-endless-event"),
        pytest.param(CALL, JSON, id="held-then-raw"),
        pytest.param(CALL, AUDIO, id="raw"),
    ],
)
@pytest.mark.parametrize("framing", ["transfer-encoding: chunked", f"content-length: {GIB}"])
async def test_a_chunk_of_a_gibibyte_passes_through_piece_by_piece(call: Any, content_type: str, framing: str) -> None:
    """As it comes, and not once it is whole: 24 MiB of it have reached the client when its publisher dies; a few MiB at most
    were held. The rest is missing, so the client is cut."""
    async with open_served() as served, sibling(served) as s, served.publishing() as publisher:
        async with served.calling(call) as client, served.server.connect() as wire:
            frame = await publisher.next("infer")
            got = 0
            with holding_less_than(5 * MIB):
                await wire.send(head("POST", result(frame), content_type, framing))
                if framing.startswith("transfer"):
                    await wire.send(b"%X\r\n" % GIB)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(pour, wire, 24 * MIB)
                    await client.read_head()
                    while got < 24 * MIB:
                        got += len(await client.piece())
                await s.beat()
            wire.reset()
            assert await client.rest() == (b"", True)
            assert got == 24 * MIB
        await serve_one(served, publisher)


async def test_a_wakes_result_of_a_gibibyte_leaves_its_beginning() -> None:
    """The text of a failed wake is its first KiB; what follows is read and thrown away until the wake's time is up."""
    asleep = {"name": "qwen", "status": "hibernating", "wake_s": 5}
    async with open_served() as served, sibling(served), served.publishing(asleep) as publisher:
        async with served.calling(CALL) as client, served.server.connect() as wire:
            wake = await publisher.next("wake")
            length = f"content-length: {16 * MIB}"
            await wire.send(head("POST", result(wake), "wakecall-status: 500", length))
            with holding_less_than(4 * MIB):
                await pour(wire, 16 * MIB)
                answer = await wire.read_answer("POST")
            assert await told_of(wire, answer) == (200, "completed", "kept")
            got = await client.wire.read_answer("POST")
            assert (got.status, got.code) == (503, "wake_failed")
            assert len(got.json["error"]["message"]) <= 1024
        assert served.broker.llm("qwen").status is Status.HIBERNATING


@pytest.mark.parametrize("framing", ["transfer-encoding: chunked", f"content-length: {GIB}"])
async def test_a_gibibyte_that_is_no_result_is_refused_at_its_bound(framing: str) -> None:
    """413 to a register, a heartbeat, a failure; 404 to a result of no task: before the end, and the connection closes."""
    async with (
        open_served(BrokerConfig(max_body_bytes=2 * MIB)) as served,
        sibling(served),
        served.publishing() as publisher,
    ):
        async with served.calling(CALL) as client:
            frame = await publisher.next("infer")
            session = "/publisher/v1/sessions/laptop"
            for method, target, status, code in (
                ("PUT", session, 413, "request_too_large"),
                ("POST", f"{session}/heartbeat", 413, "request_too_large"),
                ("POST", result(frame).replace("result", "failure"), 413, "request_too_large"),
                ("POST", "/publisher/v1/tasks/nobody/result", 404, "task_not_found"),
                ("POST", "/publisher/v1/tasks/nobody/chunks", 404, "task_not_found"),
            ):
                async with served.server.connect() as wire:
                    with holding_less_than(8 * MIB):
                        await wire.send(head(method, target, JSON, "wakecall-offset: 0", framing))
                        if framing.startswith("transfer"):
                            await wire.send(b"%X\r\n" % GIB + bytes(3 * MIB if status == 413 else 1000))
                        answer = await wire.read_answer(method)
                    assert (answer.status, answer.code, answer.headers["connection"]) == (status, code, "close"), target
                    assert await end_of(wire) in {"fin", "rst"}
            assert (await publisher.answer(frame, b"{}")).status == 200
            await client.read_head()
            assert client.status == 200
