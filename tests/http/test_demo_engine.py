"""The demo's own engine, over real sockets and through the unmodified SDKs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from pathlib import Path

import anthropic
import httpx2
import openai
import pytest
import trio
import trio.testing

from wakecall.cli.demo_engine import serve_demo_engine

QUESTION = "Why is it so quiet?"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]


@pytest.fixture
async def base_url(nursery: trio.Nursery) -> str:
    """An engine that thinks in no time."""
    return f"http://127.0.0.1:{await nursery.start(partial(serve_demo_engine, delay_s=0))}"


@pytest.fixture
async def slow_url(nursery: trio.Nursery) -> str:
    """An engine that takes an hour for each word."""
    return f"http://127.0.0.1:{await nursery.start(partial(serve_demo_engine, delay_s=3600))}"


@pytest.fixture
async def http(base_url: str) -> AsyncIterator[httpx2.AsyncClient]:
    with trio.fail_after(30):
        async with httpx2.AsyncClient(base_url=base_url) as client:
            yield client


async def stream_lines(http: httpx2.AsyncClient, path: str, body: dict[str, object]) -> list[str]:
    async with http.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream"
        return [line async for line in response.aiter_lines() if line]


async def test_health_and_models(http: httpx2.AsyncClient) -> None:
    """What a publisher asks before it publishes."""
    assert (await http.get("/health")).json()["status"] == "ok"
    listed = (await http.get("/v1/models")).json()
    assert [model["id"] for model in listed["data"]] == ["wakecall-demo"]


async def test_chat_answers_the_question_and_says_that_it_is_no_llm(http: httpx2.AsyncClient) -> None:
    answer = (await http.post("/v1/chat/completions", json={"model": "m", "messages": MESSAGES})).json()
    content = answer["choices"][0]["message"]["content"]
    assert f"“{QUESTION}”" in content
    assert "no language model" in content
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "m"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len(content.split())
    assert answer["usage"]["prompt_tokens"] == len(QUESTION.split())


async def test_a_streamed_chat_says_the_same_word_by_word(http: httpx2.AsyncClient) -> None:
    """Joined, the chunks are the plain answer; usage only when asked for; `[DONE]` last."""
    plain = (await http.post("/v1/chat/completions", json={"messages": MESSAGES})).json()
    for options in ({}, {"stream_options": {"include_usage": True}}):
        lines = await stream_lines(http, "/v1/chat/completions", {"messages": MESSAGES, "stream": True, **options})
        assert lines[-1] == "data: [DONE]"
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        usages = [chunk["usage"] for chunk in chunks if "usage" in chunk]
        assert usages == ([plain["usage"]] if options else [])
        deltas = [chunk["choices"][0]["delta"].get("content") for chunk in chunks if chunk["choices"]]
        words = [word for word in deltas if word]
        assert len(words) == plain["usage"]["completion_tokens"]
        assert "".join(words) == plain["choices"][0]["message"]["content"]


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
async def test_a_limit_cuts_the_answer(http: httpx2.AsyncClient, limit: str) -> None:
    answer = (await http.post("/v1/chat/completions", json={"messages": MESSAGES, limit: 3})).json()
    assert answer["choices"][0]["message"]["content"] == "You called a"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3


async def test_openai_sdk(base_url: str) -> None:
    """Plain and streamed chat, completions, and embeddings, which the SDK asks for as base64."""
    with trio.fail_after(30):
        async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as sdk:
            assert [model.id async for model in sdk.models.list()] == ["wakecall-demo"]
            answer = await sdk.chat.completions.create(model="m", messages=MESSAGES)
            async with await sdk.chat.completions.create(model="m", messages=MESSAGES, stream=True) as stream:
                words = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(words) == answer.choices[0].message.content
            completion = await sdk.completions.create(model="m", prompt="hello", max_tokens=4)
            assert completion.choices[0].text == "You called a machine"
            async with await sdk.completions.create(model="m", prompt="hello", max_tokens=4, stream=True) as stream:
                assert "".join([chunk.choices[0].text async for chunk in stream]) == "You called a machine"
            given = await sdk.embeddings.create(model="m", input=["a cat", "a cat", "the sea"])
    first, second, third = (item.embedding for item in given.data)
    assert first == second != third
    assert sum(number * number for number in first) == pytest.approx(1)


async def test_anthropic_sdk(base_url: str) -> None:
    """`/v1/messages`, plain and streamed, and its own shape of an error."""
    with trio.fail_after(30):
        async with anthropic.AsyncAnthropic(base_url=base_url, api_key="none", max_retries=0) as sdk:
            asked = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
            message = await sdk.messages.create(model="m", max_tokens=500, messages=asked)
            assert QUESTION in message.content[0].text
            assert message.stop_reason == "end_turn"
            async with sdk.messages.stream(model="m", max_tokens=500, messages=asked) as stream:
                streamed = await stream.get_final_message()
            assert streamed.content[0].text == message.content[0].text
            assert streamed.usage.output_tokens == message.usage.output_tokens
            with pytest.raises(anthropic.BadRequestError, match="role"):
                await sdk.messages.create(model="m", max_tokens=5, messages=[{"content": "no role"}])


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"{}", 400),
        ("POST", "/v1/chat/completions", b'{"messages": [1]}', 400),
        ("POST", "/v1/chat/completions", b'{"x":' + b"[" * 100_000, 400),
        ("POST", "/v1/completions", b'{"prompt": "\\ud800"}', 400),
        ("POST", "/v1/embeddings", b'{"input": 5}', 400),
        ("GET", "/v1/chat/completions", b"", 405),
        ("POST", "/v1/nothing", b"{}", 404),
    ],
)
async def test_a_bad_request_is_an_error_and_nothing_more(
    http: httpx2.AsyncClient, method: str, path: str, body: bytes, status: int
) -> None:
    """The error is JSON in OpenAI's shape, and the connection serves the next request."""
    answer = await http.request(method, path, content=body)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
    assert (await http.get("/health")).status_code == 200


async def test_words_come_at_the_pace_not_at_the_end(slow_url: str) -> None:
    """The head and the role are there at once, an hour before the first word."""
    body = {"messages": MESSAGES, "stream": True}
    with trio.fail_after(30):
        async with httpx2.AsyncClient(base_url=slow_url) as client:
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                async with aclosing(response.aiter_bytes()) as pieces:
                    assert b'"role":"assistant"' in await anext(pieces)
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(anext, pieces)
                        await trio.testing.wait_all_tasks_blocked(0.01)
                        assert len(nursery.child_tasks) == 1  # nothing more has come
                        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("stream", [True, False])
async def test_it_stops_when_its_client_leaves(slow_url: str, stream: bool) -> None:
    """Plain or streamed: the client closes, and nothing generates any more."""
    with trio.fail_after(30):
        async with httpx2.AsyncClient(base_url=slow_url) as watching:

            async def wait_for(**wanted: int) -> None:
                while not wanted.items() <= (await watching.get("/health")).json().items():
                    await trio.lowlevel.checkpoint()

            async with httpx2.AsyncClient(base_url=slow_url) as client, trio.open_nursery() as nursery:
                body = {"messages": MESSAGES, "stream": stream}
                nursery.start_soon(partial(client.post, "/v1/chat/completions", json=body))
                await wait_for(generating=1, abandoned=0)
                nursery.cancel_scope.cancel()
            await wait_for(generating=0, abandoned=1)


async def test_a_peer_that_speaks_no_http_ends_only_its_own_connection(http: httpx2.AsyncClient, base_url: str) -> None:
    port = int(base_url.rpartition(":")[2])
    for nonsense in (b"\x00\xff\r\n\r\n", b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nhalf"):
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            await stream.send_all(nonsense)
            await stream.send_eof()
            assert await stream.receive_some() == b""
    assert (await http.get("/health")).status_code == 200


def test_in_the_background_it_outlives_the_command_that_started_it(tmp_path: Path) -> None:
    """As a wake command: it returns at once, and the process id is where the next command finds it."""
    pid_file = tmp_path / "pid"
    command = [sys.executable, "-m", "wakecall.cli.demo_engine", "--port", "0", "--background"]
    subprocess.run([*command, "--pid-file", str(pid_file), "--lifetime-s", "60"], check=True, timeout=30)

    async def wait_and_stop() -> None:
        with trio.fail_after(30):
            while not pid_file.exists() or not pid_file.read_text():
                await trio.sleep(0.02)
            os.kill(int(pid_file.read_text()), signal.SIGTERM)

    trio.run(wait_and_stop)
