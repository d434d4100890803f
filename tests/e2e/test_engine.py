"""What the other e2e tests lean on: the engine itself does all of it, without a broker in between."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import anthropic
import httpx2
import openai
import pytest
import trio

from tests.e2e.engine import Engine, open_engine, write_model

QUESTION = [{"role": "user", "content": "How is a machine called that nobody can call?"}]


@pytest.fixture
async def http(engine: Engine):
    async with httpx2.AsyncClient(base_url=engine.base_url, timeout=60) as client:
        yield client


@pytest.fixture
async def sdk(engine: Engine):
    async with openai.AsyncOpenAI(base_url=f"{engine.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def anthropic_sdk(engine: Engine):
    async with anthropic.AsyncAnthropic(base_url=engine.base_url, api_key="none", max_retries=0) as client:
        yield client


def chat(engine: Engine, **members: object) -> dict[str, object]:
    return {"model": engine.model, "messages": QUESTION, "max_tokens": 12, **members}


def test_the_model_is_the_same_on_every_run(tmp_path: Path) -> None:
    """Tests may compare answers of one seed: the weights do not change from run to run."""
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    write_model(first)
    write_model(second)
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size < 1_000_000


async def test_it_lists_its_model_under_the_files_path(engine: Engine, http: httpx2.AsyncClient) -> None:
    """The id is a path, which is no valid name at the broker: publishing has to cope with that."""
    models = (await http.get("/v1/models")).raise_for_status().json()
    assert [model["id"] for model in models["data"]] == [engine.model]
    assert engine.model.startswith("/")
    assert engine.model.endswith(".gguf")


async def test_chat_answers_with_exactly_the_tokens_asked_for(engine: Engine, http: httpx2.AsyncClient) -> None:
    """It never ends by itself, so that `max_tokens` decides how long an answer takes."""
    answer = (await http.post("/v1/chat/completions", json=chat(engine, max_tokens=300))).raise_for_status().json()
    assert answer["usage"]["completion_tokens"] == 300
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["message"]["content"]


async def test_a_seed_makes_an_answer_repeatable(engine: Engine, http: httpx2.AsyncClient) -> None:
    """What came through a relay can be compared with what the engine says directly."""
    bodies = [(await http.post("/v1/chat/completions", json=chat(engine, seed=7))).json() for _ in range(2)]
    contents = [body["choices"][0]["message"]["content"] for body in bodies]
    assert contents[0] == contents[1]


async def test_chat_streams_events_with_usage_and_done(engine: Engine, http: httpx2.AsyncClient) -> None:
    """One event for a token or so, then usage, then `[DONE]`."""
    body = chat(engine, stream=True, stream_options={"include_usage": True})
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert lines[-1] == "[DONE]"
    events = [json.loads(line) for line in lines[:-1]]
    assert events[-1]["usage"]["completion_tokens"] == 12
    assert len([event for event in events if event["choices"] and event["choices"][0]["delta"].get("content")]) > 6


async def test_embeddings_come_from_embedding_mode_only(engine: Engine, embedding_engine: Engine) -> None:
    """Elsewhere the engine's own 501 is a handy error to relay."""
    async with httpx2.AsyncClient() as client:
        body = {"model": "noise", "input": ["a machine", "another"]}
        refused = await client.post(f"{engine.base_url}/v1/embeddings", json=body)
        given = await client.post(f"{embedding_engine.base_url}/v1/embeddings", json=body)
    assert refused.status_code == 501
    vectors = [item["embedding"] for item in given.raise_for_status().json()["data"]]
    assert [len(vector) for vector in vectors] == [64, 64]
    assert vectors[0] != vectors[1]


async def test_openai_sdk_on_trio(sdk: openai.AsyncOpenAI, engine: Engine) -> None:
    """models, chat plain and streaming, completions and responses of the unmodified SDK."""
    with trio.fail_after(60):
        assert [model.id async for model in sdk.models.list()] == [engine.model]
        answer = await sdk.chat.completions.create(model=engine.model, messages=QUESTION, max_tokens=5)
        assert answer.choices[0].message.content
        async with await sdk.chat.completions.create(
            model=engine.model, messages=QUESTION, max_tokens=20, stream=True
        ) as stream:
            assert len([chunk async for chunk in stream]) > 10
        completion = await sdk.completions.create(model=engine.model, prompt="once upon", max_tokens=5)
        assert completion.usage is not None
        assert completion.usage.completion_tokens == 5
        response = await sdk.responses.create(model=engine.model, input="hello", max_output_tokens=16)
        assert response.output_text
        async with await sdk.responses.create(
            model=engine.model, input="hello", max_output_tokens=16, stream=True
        ) as events:
            kinds = [event.type async for event in events]
        assert kinds[0] == "response.created"
        assert kinds[-1] == "response.completed"


def test_openai_sdk_synchronous(engine: Engine, embedding_engine: Engine) -> None:
    """The blocking client, chat and embeddings."""
    with openai.OpenAI(base_url=f"{engine.base_url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(model=engine.model, messages=QUESTION, max_tokens=5)
        assert answer.choices[0].message.content
    with openai.OpenAI(base_url=f"{embedding_engine.base_url}/v1", api_key="none", max_retries=0) as client:
        given = client.embeddings.create(model="noise", input="a machine")
        assert len(given.data[0].embedding) == 64


async def test_anthropic_sdk_on_trio(anthropic_sdk: anthropic.AsyncAnthropic, engine: Engine) -> None:
    """`/v1/messages`, plain and streaming, of the unmodified SDK."""
    with trio.fail_after(60):
        message = await anthropic_sdk.messages.create(model=engine.model, max_tokens=8, messages=QUESTION)
        assert message.content[0].type == "text"
        assert message.usage.output_tokens == 8
        async with anthropic_sdk.messages.stream(model=engine.model, max_tokens=20, messages=QUESTION) as stream:
            pieces = [text async for text in stream.text_stream]
        assert len(pieces) > 5


async def leave(engine: Engine, body: dict[str, object]) -> None:
    """Ask, and go away as soon as a slot works on it."""
    await engine.wait_busy(0)
    async with trio.open_nursery() as nursery:

        async def ask() -> None:
            async with httpx2.AsyncClient(base_url=engine.base_url, timeout=60) as client:
                await client.post("/v1/chat/completions", json=body)

        nursery.start_soon(ask)
        await engine.wait_busy(1)
        nursery.cancel_scope.cancel()


async def test_a_streaming_client_that_leaves_frees_its_slot(engine: Engine) -> None:
    """The engine stops generating when the connection closes; `busy_slots` shows it."""
    with trio.fail_after(60):
        before = await engine.tokens_predicted()
        await leave(engine, chat(engine, max_tokens=15_000, stream=True))
        await engine.wait_busy(0)
        assert await engine.tokens_predicted() - before < 15_000


async def test_a_plain_client_that_leaves_does_not_stop_this_engine(engine: Engine) -> None:
    """llama.cpp of this version looks at the connection only when it writes (ggml-org/llama.cpp#24496).

    So a freed slot can be shown only with a stream here. When this fails, the engine has learned it.
    """
    with trio.fail_after(60):
        before = await engine.tokens_predicted()
        await leave(engine, chat(engine, max_tokens=2_000))
        await engine.wait_busy(0)
        assert await engine.tokens_predicted() - before == 2_000


async def test_more_requests_than_slots_wait_inside_the_engine(noise_model: Path) -> None:
    """100 at once on 2 slots: nobody is refused, nobody is forgotten."""
    with trio.fail_after(120):
        async with open_engine(noise_model, slots=2) as engine:
            limits = httpx2.Limits(max_connections=None)
            async with httpx2.AsyncClient(base_url=engine.base_url, timeout=60, limits=limits) as client:
                codes: list[int] = []

                async def ask() -> None:
                    response = await client.post("/v1/chat/completions", json=chat(engine))
                    codes.append(response.status_code)

                async with trio.open_nursery() as nursery:
                    for _ in range(100):
                        nursery.start_soon(ask)
            assert codes == [200] * 100


async def test_an_engine_of_its_own_ends_with_its_block(noise_model: Path) -> None:
    """Nothing is left behind, even when it was frozen."""
    with trio.fail_after(30):
        async with open_engine(noise_model) as engine:
            os.kill(engine.pid, signal.SIGSTOP)
        with pytest.raises(ProcessLookupError):
            os.kill(engine.pid, 0)


async def test_an_engine_that_cannot_start_says_why(tmp_path: Path) -> None:
    """The end of its log is in the error."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no model")
    with pytest.raises(RuntimeError, match=r"broken\.gguf"):
        async with open_engine(broken):
            pass
