"""The unmodified SDKs against llama.cpp behind `wakecall publish`, in four processes: what works there works here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import anthropic
import openai
import pytest
import trio

from tests.e2e.engine import Engine
from tests.e2e.stack import BrokerProcess, open_broker_process, open_publisher_process, within

QUESTION = [{"role": "user", "content": "How is a machine called that nobody can call?"}]
NAME = "noise"


@pytest.fixture
async def broker(tmp_path: Path, engine: Engine) -> AsyncIterator[BrokerProcess]:
    """A broker on which the engine's only model is published, under the name that its path gives."""
    async with open_broker_process(tmp_path / "w.db") as broker:
        async with open_publisher_process(tmp_path, broker.url, f"{engine.base_url}/v1"):
            await broker.wait_llm(NAME, routable=True)
            yield broker


@pytest.fixture
async def sdk(broker: BrokerProcess) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{broker.url}/v1", api_key="none") as client:
        yield client


@within(40)
async def test_openai_sdk_on_trio(sdk: openai.AsyncOpenAI, engine: Engine) -> None:
    """models, chat, completions and responses, each with the very answer that the engine gives when asked directly."""
    assert [model.id async for model in sdk.models.list()] == [NAME]
    assert (await sdk.models.retrieve(NAME)).id == NAME
    answers = []
    async with openai.AsyncOpenAI(base_url=f"{engine.base_url}/v1", api_key="none") as direct:
        for client, model in ((direct, engine.model), (sdk, NAME)):
            chat = await client.chat.completions.create(model=model, messages=QUESTION, max_tokens=12, seed=7)
            text = await client.completions.create(model=model, prompt="once upon", max_tokens=5, seed=7)
            response = await client.responses.create(
                model=model, input="hello", max_output_tokens=16, temperature=0, top_p=1
            )
            assert text.usage is not None
            assert text.usage.completion_tokens == 5
            answers.append((chat.choices[0].message.content, text.choices[0].text, response.output_text))
    assert all(answers[0])
    assert answers[0] == answers[1]


@within(40)
async def test_openai_sdk_streams_on_trio(sdk: openai.AsyncOpenAI) -> None:
    """Chat with its usage, completions, and the events of a response up to the last."""
    async with await sdk.chat.completions.create(
        model=NAME, messages=QUESTION, max_tokens=20, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = [chunk async for chunk in stream]
    assert len(chunks) > 10
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20
    async with await sdk.completions.create(model=NAME, prompt="once", max_tokens=20, stream=True) as texts:
        assert len([text async for text in texts]) > 10
    async with await sdk.responses.create(model=NAME, input="hello", max_output_tokens=16, stream=True) as events:
        kinds = [event.type async for event in events]
    assert kinds[0] == "response.created"
    assert "response.output_text.delta" in kinds
    assert kinds[-1] == "response.completed"


@within(40)
async def test_chunks_arrive_while_the_engine_still_generates(sdk: openai.AsyncOpenAI, engine: Engine) -> None:
    """One by one: the first is here long before the last is made, and leaving then stops the engine."""
    async with await sdk.chat.completions.create(
        model=NAME, messages=QUESTION, max_tokens=12_000, stream=True
    ) as stream:
        arrived = 0
        async for _ in stream:
            arrived += 1
            if arrived in (1, 50, 100):
                assert await engine.busy_slots() == 1, "it has made all of them already"
            if arrived == 100:
                break
    await engine.wait_busy(0)


@within(40)
async def test_openai_sdk_synchronous(broker: BrokerProcess, engine: Engine) -> None:
    """The blocking client in a thread: models, chat plain and streamed, responses."""

    def use() -> None:
        with openai.OpenAI(base_url=f"{broker.url}/v1", api_key="none") as client:
            assert [model.id for model in client.models.list()] == [NAME]
            answer = client.chat.completions.create(model=NAME, messages=QUESTION, max_tokens=5)
            assert answer.choices[0].message.content
            with client.chat.completions.create(model=NAME, messages=QUESTION, max_tokens=20, stream=True) as stream:
                assert len(list(stream)) > 10
            assert client.responses.create(model=NAME, input="hello", max_output_tokens=16).output_text

    await trio.to_thread.run_sync(use)


@within(40)
async def test_embeddings(
    broker: BrokerProcess, sdk: openai.AsyncOpenAI, embedding_engine: Engine, tmp_path: Path
) -> None:
    """From an engine in embedding mode, beside the other one; that one's own refusal comes through untouched."""
    async with open_publisher_process(tmp_path, broker.url, embedding_engine.base_url, "--name", "vectors"):
        await broker.wait_llm("vectors", routable=True)
        given = await sdk.embeddings.create(model="vectors", input=["a machine", "another"])
        vectors = [item.embedding for item in given.data]
        assert [len(vector) for vector in vectors] == [64, 64]
        assert vectors[0] != vectors[1]
        with pytest.raises(openai.InternalServerError) as refused:
            await sdk.embeddings.create(model=NAME, input="a machine")
        assert refused.value.status_code == 501


@within(40)
async def test_anthropic_sdk(broker: BrokerProcess) -> None:
    """`/v1/messages` on Trio, plain and streamed, and with the blocking client."""
    async with anthropic.AsyncAnthropic(base_url=broker.url, api_key="none") as client:
        message = await client.messages.create(model=NAME, max_tokens=8, messages=QUESTION)
        assert message.content[0].type == "text"
        assert message.usage.output_tokens == 8
        async with client.messages.stream(model=NAME, max_tokens=20, messages=QUESTION) as stream:
            pieces = [text async for text in stream.text_stream]
            assert len(pieces) > 5
            assert (await stream.get_final_message()).usage.output_tokens == 20

    def use() -> None:
        with anthropic.Anthropic(base_url=broker.url, api_key="none") as client:
            message = client.messages.create(model=NAME, max_tokens=8, messages=QUESTION)
            assert message.usage.output_tokens == 8

    await trio.to_thread.run_sync(use)


@within(40)
async def test_uploads_in_chunks_carry_the_same_answers(tmp_path: Path, engine: Engine) -> None:
    """`--upload chunks`, for proxies that buffer: plain and streamed, whole and in order."""
    async with open_broker_process(tmp_path / "w.db") as broker:
        async with open_publisher_process(tmp_path, broker.url, engine.base_url, "--upload", "chunks") as publisher:
            await broker.wait_llm(NAME, routable=True)
            async with openai.AsyncOpenAI(base_url=f"{broker.url}/v1", api_key="none") as client:
                whole = await client.chat.completions.create(model=NAME, messages=QUESTION, max_tokens=200, seed=7)
                async with await client.chat.completions.create(
                    model=NAME, messages=QUESTION, max_tokens=200, seed=7, stream=True
                ) as stream:
                    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
            assert "".join(pieces) == whole.choices[0].message.content
            await broker.wait_idle()
            assert publisher.process.returncode is None
