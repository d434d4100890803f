"""What clients may call, what is refused before any publisher hears of it, and what passes untouched."""

from __future__ import annotations

import contextlib
import json
import threading
from typing import Any

import pytest
import trio

from tests.http.served import HOST, JSON, Served, as_bytes, head, open_served, wait_until
from tests.http.wire import Wire
from wakecall.config import BrokerConfig
from wakecall.http import calls, client
from wakecall.http.client import RELAYED

MIB = 1 << 20
CALL = {"model": "qwen"}
FORM = "content-type: multipart/form-data; boundary=B"


async def test_models_are_listed_whatever_state_they_are_in(served: Served) -> None:
    """And listing wakes none."""
    async with served.publishing(
        {"name": "b", "status": "hibernating", "type": "ollama"}, {"name": "org/a:7b"}
    ) as publisher:
        await served.register("laptop", {"name": "b"})
        await served.broker.put_public_llm("gpt", type="openai", model="gpt", url="https://api.example/v1")
        answer = await served.ask("GET", "/v1/models")
        assert answer.status == 200
        assert answer.json["object"] == "list"
        created = {each.pop("id"): each.pop("created") for each in answer.json["data"]}
        assert list(created) == ["b", "gpt", "org/a:7b"]
        listed = {each["id"]: each for each in answer.json["data"]}
        assert listed["b"] == {
            "id": "b",
            "object": "model",
            "created": created["b"],
            "owned_by": "local",
            "wakecall": {"status": "hibernating", "kind": "virtual", "type": ""},
        }
        assert isinstance(created["b"], int)
        assert listed["org/a:7b"]["wakecall"]["status"] == "inactive"
        assert listed["gpt"]["wakecall"] == {"status": "active", "kind": "public", "type": "openai"}
        for target in ("/v1/models/org/a:7b", "/v1/models/org%2Fa%3A7b"):
            one = await served.ask("GET", target)
            assert (one.status, one.json) == (200, listed["org/a:7b"])
        gone = await served.ask("GET", "/v1/models/nobody/at/all")
        assert (gone.status, gone.code) == (404, "model_not_found")
        public = await served.call({"model": "gpt"})
        assert (public.status, public.code) == (503, "model_offline")
        async with served.calling({"model": "b"}):
            assert (await publisher.next()).event == "wake"  # the first frame since hello


@pytest.mark.parametrize("path", RELAYED)
async def test_each_path_of_the_protocol_is_relayed(served: Served, path: str) -> None:
    async with served.publishing() as publisher, served.calling(CALL, path, JSON, "accept: text/plain") as client:
        frame = await publisher.next("infer")
        assert (frame.data["method"], frame.data["path"]) == ("POST", path)
        assert frame.data["headers"] == {"content-type": "application/json", "accept": "text/plain"}
        await publisher.answer(frame, b"{}")
        answer = await client.wire.read_answer("POST")
        assert (answer.status, answer.body) == (200, b"{}")


async def test_no_other_path_is_relayed(served: Served) -> None:
    async with served.publishing():
        for target in (
            "/v1/files",
            "/v1/chat/completions/",
            "/v1//chat/completions",
            "/v1/chat",
            "/v1/../v1/embeddings",
        ):
            answer = await served.ask("POST", target, JSON, body=b'{"model": "qwen"}')
            assert (answer.status, answer.code) == (404, "not_found"), target


async def test_a_query_is_not_passed_on(served: Served) -> None:
    async with served.publishing() as publisher, served.calling(CALL, "/v1/messages?beta=true"):
        assert (await publisher.next("infer")).data["path"] == "/v1/messages"


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"", 400, "invalid_json", None),
        (b"not json", 400, "invalid_json", None),
        (b'{"model": "qwen", "x": "\xff"}', 400, "invalid_json", None),
        (b'{"model": "qwen", "x": ' + b"[" * 64 + b"]" * 64 + b"}", 400, "invalid_json", None),
        (b'{"x": ' + b"[" * 200_000, 400, "invalid_json", None),
        (b'{"model": "qwen", "seed": 18446744073709551616}', 400, "invalid_json", None),
        (b'{"model": "qwen", "stop": "\\ud800"}', 400, "invalid_json", None),
        (b"[]", 400, "invalid_request", None),
        (b"{}", 400, "model_required", "model"),
        (b'{"model": 7}', 400, "invalid_request", "model"),
        (b'{"model": "qwen", "stream": "yes"}', 400, "invalid_request", "stream"),
        (b'{"model": "qwen", "Model": "qwen"}', 400, "ambiguous_model", "model"),
        (b'{"model": "qwen", "stream": true, "stream": true}', 400, "ambiguous_model", "stream"),
        (b'{"model": ""}', 404, "model_not_found", "model"),
        (b'{"model": "Qwen"}', 404, "model_not_found", "model"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_a_call_that_cannot_be_is_refused(
    served: Served, path: str, body: bytes, status: int, code: str, param: str | None
) -> None:
    async with served.publishing():
        answer = await served.call(body, path)
        assert (answer.status, answer.code, answer.json["error"]["param"]) == (status, code, param)
        assert set(answer.json) == ({"type", "error"} if path == "/v1/messages" else {"error"})
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert served.broker.statistics().accepted == 0


async def test_an_encoded_body_is_415(served: Served) -> None:
    for encoding in ("gzip", "br", "zstd", "identity, gzip"):
        answer = await served.call(b"x", "/v1/embeddings", JSON, f"content-encoding: {encoding}")
        assert (answer.status, answer.code) == (415, "unsupported_encoding")
    answer = await served.call(CALL, "/v1/embeddings", JSON, "content-encoding: identity")
    assert answer.code == "model_not_found"


async def test_a_form_is_relayed_byte_for_byte(served: Served) -> None:
    """Binary, so its publisher fetches it."""
    body = (
        b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
        + bytes(range(256)) * 100
        + b'\r\n--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nqwen\r\n--B--\r\n'
    )
    async with served.publishing() as publisher, served.calling(body, "/v1/audio/transcriptions", FORM) as client:
        frame = await publisher.next("infer")
        assert "body" not in frame.data
        assert frame.data["headers"]["content-type"] == "multipart/form-data; boundary=B"
        assert (await served.ask("GET", f"/publisher/v1/tasks/{frame.task_id}/body")).body == body
        await publisher.answer(frame, b"1\n00:00 --> 00:01\nhello\n", "content-type: text/plain; charset=utf-8")
        answer = await client.wire.read_answer("POST")
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"


async def test_a_body_without_a_content_type_is_json(served: Served) -> None:
    async with served.publishing() as publisher, served.calling(CALL, "/v1/embeddings", "x-other: 1"):
        assert (await publisher.next("infer")).data["headers"] == {"content-type": "application/json"}


async def send_in_vain(wire: Wire, data: bytes) -> None:
    """Send to a server that may close at any moment."""
    with contextlib.suppress(trio.BrokenResourceError):
        await wire.send(data)


@pytest.mark.parametrize("chunked", [False, True])
async def test_32_mebibytes_pass_and_33_do_not(served: Served, chunked: bool) -> None:
    async with served.publishing() as publisher:
        for size in (32, 33):
            body = b'{"model": "qwen", "pad": "'
            body += b"x" * (size * MIB - len(body) - 2) + b'"}'
            async with served.server.connect() as wire:
                if chunked:
                    await wire.send(head("POST", "/v1/embeddings", JSON, "transfer-encoding: chunked"))
                    message = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
                else:
                    await wire.send(head("POST", "/v1/embeddings", JSON, f"content-length: {len(body)}"))
                    message = body
                if size == 32:
                    await wire.send(message)
                    frame = await publisher.next("infer")
                    got = await served.ask("GET", f"/publisher/v1/tasks/{frame.task_id}/body")
                    assert got.body == body
                    await publisher.answer(frame, b"{}")
                    assert (await wire.read_answer("POST")).status == 200
                else:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(send_in_vain, wire, message)
                        answer = await wire.read_answer("POST")
                    assert (answer.status, answer.code) == (413, "request_too_large")
                    assert answer.headers["connection"] == "close"


async def test_all_bodies_together_have_a_bound() -> None:
    """A body is held as long as its infer may need it."""
    async with open_served(BrokerConfig(max_held_bytes=100_000)) as served, served.publishing() as publisher:
        large: Any = {"model": "qwen", "pad": "x" * 60_000}
        async with served.calling(large) as first:
            frame = await publisher.next("infer")
            second = await served.call(large)
            assert (second.status, second.code) == (429, "queue_full")
            assert int(second.headers["retry-after"]) >= 1
            await publisher.answer(frame, b"{}")
            await first.read_head()
        async with served.calling(large):
            await publisher.next("infer")


async def test_a_client_that_leaves_in_the_middle_of_its_body_was_never_there(served: Served) -> None:
    async with served.publishing():
        async with served.server.connect() as wire:
            await wire.send(head("POST", "/v1/embeddings", JSON, "content-length: 100") + b'{"model"')
        await wait_until(lambda: not served.server.barrier.connections or len(served.server.barrier.connections) == 1)
        assert served.broker.statistics().accepted == 0


async def test_one_connection_serves_many_calls(served: Served) -> None:
    async with served.publishing() as publisher, served.server.connect() as wire:
        body = json.dumps(CALL).encode()
        for number in range(3):
            await wire.send(head("POST", "/v1/embeddings", JSON, f"content-length: {len(body)}") + body)
            await publisher.answer(await publisher.next("infer"), b"%d" % number)
            assert (await wire.read_answer("POST")).body == b"%d" % number
            await wire.send(head("POST", "/v1/embeddings", JSON, "content-length: 2") + b"{}")
            assert (await wire.read_answer("POST")).code == "model_required"


async def test_a_request_id_is_kept_or_given(served: Served) -> None:
    own = await served.ask("GET", "/v1/models", "x-request-id: abc-123")
    assert own.headers["x-request-id"] == "abc-123"
    given = await served.ask("GET", "/v1/models", "x-request-id: a b", host=HOST)
    assert given.headers["x-request-id"] not in ("a b", "")


async def test_a_header_too_long_for_a_frame_is_refused(served: Served) -> None:
    """Content-Type and Accept go into the frame, which has a bound."""
    for header in ("content-type", "accept"):
        answer = await served.call(CALL, "/v1/chat/completions", f"{header}: a/{'b' * 1100}")
        assert (answer.status, answer.code) == (400, "invalid_request")


# Large bodies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("large", [False, True])
async def test_a_large_body_is_looked_into_beside_the_loop(
    served: Served, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    """A client's, a publisher's: what may take seconds must not hold up every stream. A small one is not worth a thread."""
    threads: list[int] = []

    def noting(look: Any) -> Any:
        def noted(*arguments: Any) -> Any:
            threads.append(threading.get_ident())
            return look(*arguments)

        return noted

    monkeypatch.setattr(client, "sniff", noting(client.sniff))
    monkeypatch.setattr(calls, "decode", noting(calls.decode))
    pad = "x" * (300_000 if large else 200_000)
    assert (await served.call({"model": "nobody", "pad": pad})).code == "model_not_found"
    assert (await served.ask("PUT", "/publisher/v1/sessions/s", JSON, body=as_bytes({"pad": pad}))).code == (
        "invalid_request"
    )
    assert [thread != threading.get_ident() for thread in threads] == [large, large]


async def test_a_client_that_leaves_while_its_body_is_looked_into_leaves_nothing(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the thread is free for the next one."""
    started, release = trio.Event(), threading.Event()
    token = trio.lowlevel.current_trio_token()
    real = client.sniff

    def slow(*arguments: Any) -> Any:
        token.run_sync_soon(started.set)
        release.wait(10)
        return real(*arguments)

    monkeypatch.setattr(client, "sniff", slow)
    async with served.publishing():
        async with served.calling({"model": "qwen", "pad": "x" * 300_000}):
            await started.wait()
        release.set()
        assert (await served.call({"model": "nobody", "pad": "x" * 300_000})).code == "model_not_found"
        now = served.broker.statistics()
        assert (now.in_flight, now.waiting) == (0, 0)
