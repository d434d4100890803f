"""An infer's way through the agent: to the engine as it was, and back as it comes."""

from __future__ import annotations

import contextlib
import json

import pytest
import trio
import trio.testing

from tests.publisher.peers import Exchange, Stage, begin_stream, closed_port
from wakecall.publisher import InferFinished, PublishedModel


async def test_the_answer_is_streamed_back_piece_by_piece(stage: Stage) -> None:
    """Each piece is at the broker before the engine has sent the next; head and bytes are the engine's."""
    publisher, channel = await stage.publish()
    body = '{"model":"m",  "temperature":1.50e0,"x":[1,  2]}'
    await channel.infer("t1", body)
    request = await stage.engine.next()
    assert (request.method, request.path) == ("POST", "/v1/chat/completions")
    assert bytes(request.body) == body.encode()
    assert request.headers["accept-encoding"] == "identity"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["accept"] == "text/event-stream"
    await request.start(200, {"content-type": "text/event-stream; charset=utf-8"})
    assert not stage.broker.all("result"), "the upload opens at the first byte of the body"
    await request.send(b"data: 1\n\n")
    upload = await stage.broker.wait("result", "t1")
    await upload.wait_body(b"data: 1\n\n")
    await request.send(b"data: 2\n\n")
    await upload.wait_body(b"data: 1\n\ndata: 2\n\n")
    assert not upload.whole.is_set()
    await request.finish()
    await stage.broker.wait_whole("result", "t1")
    assert upload.headers["wakecall-status"] == "200"
    assert upload.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "wakecall-offset" not in upload.headers
    done = await publisher.wait(InferFinished)
    assert (done.outcome, done.status, done.uploaded) == ("completed", 200, 18)


async def test_an_error_of_the_engine_passes_through(stage: Stage) -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.respond(500, b'{"error":{"message":"no slot"}}')

    stage.engine.on_infer = answer
    publisher, channel = await stage.publish()
    await channel.infer("t1")
    upload = await stage.broker.wait_whole("result", "t1")
    assert upload.headers["wakecall-status"] == "500"
    assert bytes(upload.body) == b'{"error":{"message":"no slot"}}'
    assert (await publisher.wait(InferFinished)).outcome == "completed"


@pytest.mark.parametrize("mode", ["stream", "chunks"])
async def test_an_empty_answer_is_an_answer(stage: Stage, mode: str) -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.respond(204 if mode == "stream" else 200, b"", "text/plain")

    stage.engine.on_infer = answer
    publisher, channel = await stage.publish(upload=mode)
    await channel.infer("t1")
    upload = await stage.broker.wait_whole("result", "t1")
    assert upload.headers["content-length"] == "0"
    assert (await publisher.wait(InferFinished)).outcome == "completed"


async def test_the_model_is_replaced_where_the_engine_calls_it_otherwise(stage: Stage) -> None:
    _, channel = await stage.publish(models=(PublishedModel("m", "m:7b"),))
    await channel.infer("t1", '{"x":1.0,  "model":"m"}', model="m:7b")
    assert bytes((await stage.engine.next()).body) == b'{"x":1.0,  "model":"m:7b"}'
    assert (await stage.broker.wait_whole("register")).json["llms"][0]["model"] == "m:7b"


@pytest.mark.parametrize("model", ["m", "m:7b"])
async def test_the_engine_is_asked_by_its_own_id_whatever_the_caller_said(stage: Stage, model: str) -> None:
    """He may have said a pool's name, or an alias: no engine knows those, whether or not it calls the row as we do."""
    _, channel = await stage.publish(models=(PublishedModel("m", model),))
    for number, said in enumerate(("chat", "smart/one", "m", model)):
        await channel.infer(f"t{number}", f'{{"x":1.0,  "model":"{said}"}}', model=model)
        exchange = await stage.engine.next()
        assert bytes(exchange.body) == f'{{"x":1.0,  "model":"{model}"}}'.encode()


async def test_a_body_that_is_not_in_the_frame_is_fetched(stage: Stage) -> None:
    """Also one that is large enough to be scanned for its model in a thread."""
    large = b'{"x":"' + b"y" * 1_000_000 + b'","model":"m"}'
    stage.broker.bodies["t1"] = large
    _, channel = await stage.publish()
    await channel.infer("t1", None, model="m:7b")
    assert bytes((await stage.engine.next()).body) == large.replace(b'"m"', b'"m:7b"')


async def test_cancel_closes_the_engines_connection_and_the_upload(stage: Stage) -> None:
    publisher, channel = await stage.publish()
    first, upload = await begin_stream(stage, channel, "t1")
    await channel.infer("t2")
    second = await stage.engine.next()
    await channel.send("cancel", task_id="t1", reason="client_disconnected")
    with trio.fail_after(5):
        await first.broken.wait()
        await upload.broken.wait()
    assert (await publisher.wait(InferFinished)).outcome == "cancelled"
    await second.respond(200, b"{}")
    assert bytes((await stage.broker.wait_whole("result", "t2")).body) == b"{}"
    assert not stage.broker.all("failure")


async def test_cancel_before_the_first_byte_closes_the_engines_connection(stage: Stage) -> None:
    publisher, channel = await stage.publish()
    await channel.infer("t1")
    request = await stage.engine.next()
    await channel.send("cancel", task_id="t1", reason="client_disconnected")
    with trio.fail_after(5):
        await request.broken.wait()
    await publisher.wait(InferFinished)
    assert not stage.broker.all("result")


@pytest.mark.parametrize("mode", ["stream", "chunks"])
async def test_drain_lets_the_engine_finish_for_nobody(stage: Stage, mode: str) -> None:
    """`cancel: drain`: the upload ends, the engine's connection is read to its end."""
    publisher, channel = await stage.publish(cancel="drain", upload=mode)
    assert (await stage.broker.wait_whole("register")).json["llms"][0]["cancel"] == "drain"
    await channel.infer("t1")
    request = await stage.engine.next()
    await request.start(200, {"content-type": "text/event-stream"})
    await request.send(b"data: 1\n\n")
    await stage.broker.wait("result" if mode == "stream" else "chunks", "t1")
    await channel.send("cancel", task_id="t1", reason="client_disconnected")
    # Frames are taken in order: once this one has its answer, the cancel has been heard.
    await channel.infer("t2", llm="unknown")
    await stage.broker.wait_whole("failure", "t2")
    await publisher.wait(InferFinished)
    await request.send(b"data: 2\n\n")
    await request.send(b"data: 3\n\n")
    await request.finish()
    assert (await publisher.wait(InferFinished, 2)).outcome == "cancelled"
    uploads = stage.broker.all("result") + stage.broker.all("chunks")
    assert b"data: 3" not in b"".join(bytes(upload.body) for upload in uploads)
    assert not stage.broker.all("failure", "t1")


async def test_an_engine_that_refuses_the_connection_is_a_failure_with_a_message(stage: Stage) -> None:
    publisher, channel = await stage.publish(engine_url=f"http://127.0.0.1:{closed_port()}")
    await channel.infer("t1")
    failure = await stage.broker.wait_whole("failure", "t1")
    assert "does not accept connections" in failure.json["message"]
    done = await publisher.wait(InferFinished)
    assert (done.outcome, done.status) == ("failed", None)


@pytest.mark.parametrize("mode", ["stream", "chunks"])
async def test_an_engine_that_dies_midway_is_reported_before_the_upload_breaks_off(stage: Stage, mode: str) -> None:
    """So that the client reads the reason, and the upload never ends as if it were whole."""
    broken_before: list[bool] = []

    async def take_failure(exchange: Exchange) -> None:
        await exchange.read()
        await trio.testing.wait_all_tasks_blocked(0.02)
        broken_before.append(upload.broken.is_set())
        await exchange.respond_json(200, {})

    stage.broker.on["failure"] = take_failure
    publisher, channel = await stage.publish(upload=mode)
    request, upload = await begin_stream(stage, channel, "t1", "result" if mode == "stream" else "chunks")
    request.reset()
    failure = await stage.broker.wait_whole("failure", "t1")
    assert "broke off" in failure.json["message"]
    assert (await publisher.wait(InferFinished)).outcome == "failed"
    assert broken_before == [False]
    if mode == "stream":
        with trio.fail_after(5):
            await upload.broken.wait()
        assert not upload.whole.is_set()
    else:
        assert not stage.broker.all("result")


async def test_an_engine_that_dies_before_its_head_is_a_failure(stage: Stage) -> None:
    _, channel = await stage.publish()
    await channel.infer("t1")
    (await stage.engine.next()).reset()
    assert "no answer" in (await stage.broker.wait_whole("failure", "t1")).json["message"]


async def test_an_upload_that_is_reset_unread_is_reported(stage: Stage) -> None:
    """The broker never saw its head, so that the task is still there and its client waiting: only this ends it."""
    publisher, channel = await stage.publish()
    await channel.infer("t1")
    request = await stage.engine.next()
    stage.broker.peer.resets = 1
    await request.respond(200, b"{}")
    failure = await stage.broker.wait_whole("failure", "t1")
    assert "upload of the answer broke off" in failure.json["message"]
    assert (await publisher.wait(InferFinished)).outcome == "failed"
    assert not stage.broker.all("result")
    assert stage.broker.peer.resets == 0


async def test_an_upload_that_is_reset_midway_is_reported_and_its_engine_stopped(stage: Stage) -> None:
    publisher, channel = await stage.publish()
    request, upload = await begin_stream(stage, channel, "t1")
    upload.reset()
    with contextlib.suppress(trio.BrokenResourceError):
        # A reset is noticed by what is sent next.
        while not request.broken.is_set():
            await request.send(b"data: 2\n\n")
    await stage.broker.wait_whole("failure", "t1")
    assert (await publisher.wait(InferFinished)).outcome == "failed"
    assert len(stage.broker.all("failure")) == 1


@pytest.mark.parametrize("mode", ["stream", "chunks"])
async def test_after_its_channel_nothing_of_an_infer_is_posted(stage: Stage, mode: str) -> None:
    """Neither a result nor a failure: not for one that was answering, nor for one whose engine had yet to."""
    _, channel = await stage.publish(upload=mode)
    answering, _ = await begin_stream(stage, channel, "t1", "result" if mode == "stream" else "chunks")
    await channel.infer("t2")
    thinking = await stage.engine.next()
    cut_at = len(stage.broker.seen)
    channel.cut()
    with trio.fail_after(5):
        await answering.broken.wait()
        await thinking.broken.wait()
    again = await stage.broker.next_channel()
    await again.infer("t3")
    await (await stage.engine.next()).respond(200, b"{}")
    await stage.broker.wait_whole("result", "t3")
    posted = [exchange.path for _, exchange in stage.broker.seen[cut_at:] if "/tasks/" in exchange.path]
    assert posted
    assert all("/t3/" in path for path in posted)


@pytest.mark.parametrize("status", [404, 409, 410])
async def test_an_early_refusal_of_the_upload_stops_the_engine(stage: Stage, status: int) -> None:
    """The broker answers in the middle of the upload and closes; no failure is posted for what is over."""

    async def refuse(exchange: Exchange) -> None:
        await exchange.read_some()
        body = json.dumps({"error": {"message": "over", "code": "task_cancelled"}}).encode()
        await exchange.start(status, {"connection": "close", "content-length": str(len(body))})
        await exchange.send(body)
        await exchange.finish()
        await exchange.stream.send_eof()
        drained = 0
        while drained < 2**20:
            drained += len(await exchange.stream.receive_some(65536))

    stage.broker.on["result"] = refuse
    publisher, channel = await stage.publish()
    await channel.infer("t1")
    request = await stage.engine.next()
    await request.start(200, {"content-type": "text/event-stream"})
    with trio.fail_after(5):
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while True:
                await request.send(b"x" * 65536)
    assert (await publisher.wait(InferFinished)).outcome == "refused"
    assert not stage.broker.all("failure")
    await channel.infer("t2")
    assert (await stage.engine.next()).path == "/v1/chat/completions"


@pytest.mark.parametrize("status", [404, 409, 410])
async def test_a_refusal_at_the_end_is_the_end(stage: Stage, status: int) -> None:
    async def refuse(exchange: Exchange) -> None:
        await exchange.read()
        await exchange.refuse(status, "task_cancelled")

    stage.broker.on["result"] = refuse
    publisher, channel = await stage.publish()
    await channel.infer("t1")
    await (await stage.engine.next()).respond(200, b"{}")
    assert (await publisher.wait(InferFinished)).outcome == "refused"
    assert not stage.broker.all("failure")


async def test_chunks_carry_their_offsets_and_end_with_a_result(stage: Stage) -> None:
    publisher, channel = await stage.publish(upload="chunks")
    await channel.infer("t1")
    request = await stage.engine.next()
    await request.start(201, {"content-type": "text/plain"})
    await request.send(b"abc")
    first = await stage.broker.wait_whole("chunks", "t1")
    await request.send(b"defg")
    second = await stage.broker.wait_whole("chunks", "t1", 2)
    await request.finish()
    last = await stage.broker.wait_whole("result", "t1")
    pieces = [(one.headers["wakecall-offset"], bytes(one.body)) for one in (first, second, last)]
    assert pieces == [("0", b"abc"), ("3", b"defg"), ("7", b"")]
    assert (first.headers["wakecall-status"], first.headers["content-type"]) == ("201", "text/plain")
    done = await publisher.wait(InferFinished)
    assert (done.outcome, done.uploaded) == ("completed", 7)


async def test_a_lost_piece_is_sent_again_from_its_offset(stage: Stage) -> None:
    """The broker may not have noticed that the first attempt's connection is gone: 409 result_in_progress."""
    attempts: list[tuple[str, bytes]] = []

    async def take(exchange: Exchange) -> None:
        attempts.append((exchange.headers["wakecall-offset"], await exchange.read()))
        if len(attempts) == 1:
            exchange.reset()
        elif len(attempts) == 2:
            await exchange.refuse(409, "result_in_progress")
        else:
            await exchange.respond_json(200, {})

    async def lose_the_answer(exchange: Exchange) -> None:
        await exchange.read()
        if len(stage.broker.all("result")) == 1:
            exchange.reset()
        else:
            await exchange.refuse(409, "task_already_settled")

    stage.broker.on["chunks"] = take
    stage.broker.on["result"] = lose_the_answer
    publisher, channel = await stage.publish(upload="chunks")
    await channel.infer("t1")
    await (await stage.engine.next()).respond(200, b"abc")
    assert (await publisher.wait(InferFinished)).outcome == "completed"
    assert attempts == [("0", b"abc")] * 3


@pytest.mark.parametrize(
    "frame", [{"path": "/api/delete"}, {"path": "/v1/../api/delete"}, {"method": "DELETE"}, {"llm": "other"}]
)
async def test_a_frame_beyond_what_is_relayed_never_reaches_the_engine(stage: Stage, frame: dict[str, str]) -> None:
    _, channel = await stage.publish()
    await channel.infer("t1", **frame)
    await stage.broker.wait_whole("failure", "t1")
    assert stage.engine.peer.connections == 0


async def test_the_engine_gets_its_key_and_the_broker_its_own(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_KEY", "for-the-engine")
    _, channel = await stage.publish(engine_key_env="ENGINE_KEY", broker_key="for-the-broker")
    await channel.infer("t1")
    request = await stage.engine.next()
    assert request.headers["authorization"] == "Bearer for-the-engine"
    await request.respond(200, b"{}")
    await stage.broker.wait_whole("result", "t1")
    assert {one.headers["authorization"] for _, one in stage.broker.seen} == {"Bearer for-the-broker"}


async def test_between_two_processes_of_one_machine_no_proxy_is_asked(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the environment says for the world outside."""
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{closed_port()}")
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    _, channel = await stage.publish()
    await channel.infer("t1")
    await (await stage.engine.next()).respond(200, b"{}")
    await stage.broker.wait_whole("result", "t1")


async def test_a_hundred_infers_stream_at_once(stage: Stage) -> None:
    """No pool of connections makes the hundredth wait for the first."""
    publisher, channel = await stage.publish()
    for number in range(100):
        await channel.infer(f"t{number}")
    requests = [await stage.engine.next() for _ in range(100)]
    for request in requests:
        await request.start(200, {"content-type": "text/event-stream"})
        await request.send(b"data: 1\n\n")
    await stage.broker.wait("result", count=100)
    for request in requests:
        await request.finish()
    await publisher.wait(InferFinished, 100)
    assert {event.outcome for event in publisher.all(InferFinished)} == {"completed"}


async def test_a_slow_upload_holds_back_its_own_engine_and_nothing_else(stage: Stage) -> None:
    release = trio.Event()

    async def slow(exchange: Exchange) -> None:
        if "/t1/" in exchange.path:
            await release.wait()
        await exchange.read()
        await exchange.respond_json(200, {})

    stage.broker.on["result"] = slow
    publisher, channel = await stage.publish()
    await channel.infer("t1")
    request = await stage.engine.next()
    await request.start(200, {"content-type": "text/event-stream"})
    sent = 0
    with trio.move_on_after(0.5):
        while sent < 64 * 2**20:
            await request.send(b"x" * 65536)
            sent += 65536
    assert sent < 64 * 2**20, "the engine was held back by its own socket"
    await channel.infer("t2")
    await (await stage.engine.next()).respond(200, b"{}")
    assert (await publisher.wait(InferFinished)).task_id == "t2"


async def test_an_odd_content_type_does_not_cost_the_answer(stage: Stage) -> None:
    """A header that is not ASCII cannot be sent on; the body can."""
    publisher, channel = await stage.publish()
    await channel.infer("t1")
    request = await stage.engine.next()
    await request.start(200, {"content-type": "text/pl\xffain"})
    await request.send(b"all the same")
    await request.finish()
    upload = await stage.broker.wait_whole("result", "t1")
    assert bytes(upload.body) == b"all the same"
    assert "content-type" not in upload.headers
    assert (await publisher.wait(InferFinished)).outcome == "completed"
