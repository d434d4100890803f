"""Public rows end to end: the unmodified SDKs at `wakecall serve`, and an upstream that no publisher stands before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
import trio

from tests.e2e.clients import open_chat
from tests.e2e.engine import Engine
from tests.e2e.scripted_engine import EVENT, open_scripted_engine
from tests.e2e.stack import BrokerProcess, open_broker_process, run_to_end, within
from tests.e2e.test_sdk_keys import CHAT, MESSAGE, QUESTION, make_key
from tests.sentinel import leaks_of, new_sentinel

VARIABLE = "WAKECALL_UPSTREAM_KEY"


async def put(broker: BrokerProcess, name: str, url: str, **said: Any) -> None:
    row = {"type": "openai", "model": "m", "url": url, **said}
    (await broker.http.put(f"/admin/v1/llms/{name}", json=row)).raise_for_status()


@within(60)
async def test_sdks_use_a_public_model_and_its_key_is_written_down_nowhere(tmp_path: Path) -> None:
    """Plain and streamed, both APIs, an upstream that refuses and one that breaks off; a publisher that wants the name; and
    all of it again after a restart. Then everything that was written is searched, at the broker's most talkative."""
    secret, prompt = new_sentinel("key"), new_sentinel("prompt")
    question: Any = [{"role": "user", "content": prompt}]
    db = tmp_path / "w.db"
    admin = await make_key("admin", state=tmp_path, db=db)
    client = await make_key("client", state=tmp_path, db=db)
    publisher = await make_key("publisher", state=tmp_path, db=db)
    written: list[str] = []
    async with open_scripted_engine() as engine, trio.open_nursery() as nursery:

        async def answer() -> None:
            while True:
                exchange = await engine.next()
                is_anthropic = exchange.path == "/v1/messages"
                given = exchange.headers.get("x-api-key" if is_anthropic else "authorization", "")
                if given.removeprefix("Bearer ") != secret:
                    await exchange.refuse(401, "no_key")
                elif exchange.json["model"] == "busy":
                    await exchange.start(
                        429, {"content-type": "application/json", "retry-after": "7", "content-length": "2"}
                    )
                    await exchange.send(b"{}")
                elif exchange.json["model"] == "broken":
                    exchange.reset()
                elif exchange.json.get("stream"):
                    await exchange.start(200, {"content-type": "text/event-stream"})
                    for _ in range(3):
                        await exchange.send(EVENT)
                    await exchange.send(b"data: [DONE]\n\n")
                    await exchange.finish()
                else:
                    await exchange.respond_json(200, MESSAGE if is_anthropic else CHAT)

        nursery.start_soon(answer)
        for is_restarted in (False, True):
            settings = {"log_level": "debug", "log_format": "json" if is_restarted else "text"}
            async with open_broker_process(db, variables={VARIABLE: secret}, **settings) as broker:
                broker.http.headers["authorization"] = f"Bearer {admin}"
                if not is_restarted:
                    await put(broker, "gpt", f"{engine.base_url}/v1", key_env=VARIABLE, max_concurrency=4, queue_s=30)
                    await put(broker, "claude", engine.base_url, type="anthropic", key_env=VARIABLE)
                    await put(broker, "busy", engine.base_url, model="busy", key_env=VARIABLE)
                    await put(broker, "broken", engine.base_url, model="broken", key_env=VARIABLE)
                    await put(broker, "keyless", engine.base_url, key_env=f"{VARIABLE}_2")
                assert (await broker.llm("gpt"))["routable"] is True
                async with openai.AsyncOpenAI(base_url=f"{broker.url}/v1", api_key=client, max_retries=0) as sdk:
                    chat = await sdk.chat.completions.create(model="gpt", messages=question)
                    assert chat.choices[0].message.content == "asleep"
                    async with await sdk.chat.completions.create(model="gpt", messages=question, stream=True) as stream:
                        assert [chunk.choices[0].delta.content async for chunk in stream] == ["word "] * 3
                    with pytest.raises(openai.RateLimitError) as busy:
                        await sdk.chat.completions.create(model="busy", messages=question)
                    assert busy.value.response.headers["retry-after"] == "7"
                    for name in ("broken", "keyless"):
                        with pytest.raises(openai.InternalServerError) as failed:
                            await sdk.chat.completions.create(model=name, messages=question)
                        assert (failed.value.status_code, failed.value.code) == (502, "publisher_error")
                async with anthropic.AsyncAnthropic(base_url=broker.url, api_key=client, max_retries=0) as claude:
                    message = await claude.messages.create(model="claude", messages=question, max_tokens=8)
                    assert message.content[0].to_dict()["text"] == "asleep"
                options = "--engine", engine.base_url, "--name", "gpt", "--model", "m"
                code, _, err = await run_to_end(
                    "publish", "--broker", broker.url, *options, state=tmp_path, key=publisher, **settings
                )
                assert code != 0
                assert "public model" in err
                await broker.wait_idle()
                for target in ("/metrics", "/admin/v1/llms", "/admin/v1/sessions"):
                    shown = await broker.http.get(target)
                    written.append(shown.text)
                await broker.end()
                written += [*broker.out, *broker.err, err]
                assert any(f"{VARIABLE}_2" in line for line in broker.err)
        nursery.cancel_scope.cancel()
    places = {"what was said": "\n".join(written).encode()}
    places |= {str(file): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for where, data in places.items():
        for each in (secret, prompt):
            assert leaks_of(data, each) == [], where


@within(40)
async def test_a_real_engine_answers_as_if_it_were_called_itself(engine: Engine, tmp_path: Path) -> None:
    asked = {"messages": QUESTION, "max_tokens": 12, "seed": 7}
    async with open_broker_process(tmp_path / "w.db") as broker:
        await put(broker, "noise", engine.base_url, model=engine.model)
        answers = []
        for url, model in ((engine.base_url, engine.model), (broker.url, "noise")):
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as sdk:
                create: Any = sdk.chat.completions.create
                chat = await create(model=model, **asked)
                async with await create(model=model, stream=True, **asked) as stream:
                    parts = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
                answers.append((chat.choices[0].message.content, "".join(parts)))
        assert all(answers[0])
        assert answers[0] == answers[1]
        async with open_chat(broker, "noise", max_tokens=12_000, stream=True) as wire:
            assert await wire.read_some()
        await engine.wait_busy(0)
