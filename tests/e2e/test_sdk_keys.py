"""The unmodified SDKs at a broker that has keys, in four processes: each with a key of its own, and what they make of a
refusal. OpenAI's sends `Authorization: Bearer`, Anthropic's `x-api-key`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
import trio

from tests.e2e.scripted_engine import ScriptedEngine, open_scripted_engine
from tests.e2e.stack import BrokerProcess, Running, open_broker_process, open_publisher_process, run_to_end, within

QUESTION = [{"role": "user", "content": "How is a machine called that nobody can call?"}]
CHAT = {
    "id": "x",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "asleep"}, "finish_reason": "stop"}],
}
MESSAGE = {
    "id": "x",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [{"type": "text", "text": "asleep"}],
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 1, "output_tokens": 1},
}


@dataclass
class Stage:
    """A broker with keys, and an engine published on it with one."""

    broker: BrokerProcess
    engine: ScriptedEngine
    state: Path
    admin: str
    publisher: Running
    secrets: tuple[str, ...]

    async def make(self, role: str, *options: str) -> str:
        """A key, as an operator makes it."""
        return await make_key(role, *options, state=self.state, broker=self.broker.url, key=self.admin)

    def serve(self, nursery: trio.Nursery) -> None:
        """From now on the engine answers, as the path wants it."""

        async def answer() -> None:
            while True:
                exchange = await self.engine.next()
                await exchange.respond_json(200, MESSAGE if exchange.path == "/v1/messages" else CHAT)

        nursery.start_soon(answer)


async def make_key(role: str, *options: str, state: Path, **settings: object) -> str:
    code, out, err = await run_to_end("keys", "create", role, *options, state=state, **settings)
    assert code == 0, err
    return out.strip()


@asynccontextmanager
async def open_keyed_stage(tmp_path: Path, **settings: object) -> AsyncIterator[Stage]:
    """Broker and agent with these settings, given as `WAKECALL_*`."""
    db = tmp_path / "w.db"
    admin = await make_key("admin", state=tmp_path, db=db)
    publisher = await make_key("publisher", state=tmp_path, db=db)
    async with open_broker_process(db, **settings) as broker, open_scripted_engine("m", "hidden") as engine:
        broker.http.headers["authorization"] = f"Bearer {admin}"
        async with open_publisher_process(tmp_path, broker.url, engine.base_url, key=publisher, **settings) as agent:
            await broker.wait_llm("m", routable=True)
            yield Stage(broker, engine, tmp_path, admin, agent, (admin, publisher))


def openai_sdk(stage: Stage, key: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{stage.broker.url}/v1", api_key=key, max_retries=0)


def anthropic_sdk(stage: Stage, key: str) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=stage.broker.url, api_key=key, max_retries=0)


async def chat(stage: Stage, key: str, model: str) -> tuple[str, Any]:
    """The answer's text, and its headers."""
    async with openai_sdk(stage, key) as sdk:
        raw = await sdk.chat.completions.with_raw_response.create(model=model, messages=QUESTION)
        return raw.parse().choices[0].message.content or "", raw.headers


async def message(stage: Stage, key: str, model: str) -> tuple[str, Any]:
    async with anthropic_sdk(stage, key) as sdk:
        raw = await sdk.messages.with_raw_response.create(model=model, messages=QUESTION, max_tokens=8)
        return (await raw.parse()).content[0].text, raw.headers


Ask = Callable[[Stage, str, str], Awaitable[tuple[str, Any]]]


@within(40)
@pytest.mark.parametrize(("sdk", "ask"), [(openai, chat), (anthropic, message)], ids=["openai", "anthropic"])
async def test_each_refusal_is_the_sdks_own_error(sdk: Any, ask: Ask, tmp_path: Path) -> None:
    """Its own key answers; a wrong one, another role's, a model that is not its own and one call too many are told apart."""
    async with open_keyed_stage(tmp_path) as stage, trio.open_nursery() as nursery:
        stage.serve(nursery)
        client = await stage.make("client", "--llms", "m", "--rpm", "2")

        with pytest.raises(sdk.AuthenticationError) as unknown:
            await ask(stage, "wakecall_client_" + "a" * 52, "m")
        assert (unknown.value.status_code, error_of(unknown)["code"]) == (401, "invalid_api_key")
        with pytest.raises(sdk.PermissionDeniedError) as wrong_role:
            await ask(stage, stage.admin, "m")
        assert (wrong_role.value.status_code, error_of(wrong_role)["code"]) == (403, "forbidden")
        with pytest.raises(sdk.NotFoundError) as hidden:
            await ask(stage, client, "hidden")
        assert (hidden.value.status_code, error_of(hidden)["code"]) == (404, "model_not_found")

        # Refused or not, that was one of the two a minute.
        text, headers = await ask(stage, client, "m")
        assert text == "asleep"
        assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("2", "0")
        with pytest.raises(sdk.RateLimitError) as too_many:
            await ask(stage, client, "m")
        assert (too_many.value.status_code, error_of(too_many)["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(too_many.value.response.headers["retry-after"]) <= 30
        nursery.cancel_scope.cancel()


def error_of(caught: Any) -> dict[str, Any]:
    """The body's `error`: OpenAI's SDK hands out that alone, Anthropic's all of it."""
    body = caught.value.body
    error: dict[str, Any] = body.get("error", body)
    return error


@within(40)
async def test_a_key_lists_only_its_own_models(tmp_path: Path) -> None:
    """`/v1/models`, whole and one by one, with either SDK."""
    async with open_keyed_stage(tmp_path) as stage:
        client = await stage.make("client", "--llms", "m")
        async with openai_sdk(stage, client) as sdk:
            assert [model.id async for model in sdk.models.list()] == ["m"]
            with pytest.raises(openai.NotFoundError):
                await sdk.models.retrieve("hidden")
        async with openai_sdk(stage, await stage.make("client")) as sdk:
            assert [model.id async for model in sdk.models.list()] == ["hidden", "m"]


@within(40)
async def test_one_call_at_a_time_is_one_call_at_a_time(tmp_path: Path) -> None:
    """The second is refused while the first is under way, and taken once that is over."""
    async with open_keyed_stage(tmp_path) as stage, trio.open_nursery() as nursery:
        client = await stage.make("client", "--max-in-flight", "1")
        done = trio.Event()

        async def first() -> None:
            assert (await chat(stage, client, "m"))[0] == "asleep"
            done.set()

        nursery.start_soon(first)
        under_way = await stage.engine.next()
        with pytest.raises(openai.RateLimitError) as refused:
            await chat(stage, client, "m")
        assert refused.value.response.headers["retry-after"] == "1"
        await under_way.respond_json(200, CHAT)
        await done.wait()
        stage.serve(nursery)
        assert (await message(stage, client, "m"))[0] == "asleep"
        nursery.cancel_scope.cancel()
