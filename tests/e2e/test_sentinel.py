"""Keys, prompts and answers in real processes at their most talkative: neither broker nor agent writes any of it down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.e2e.scripted_engine import EVENT
from tests.e2e.stack import within
from tests.e2e.test_sdk_keys import open_keyed_stage
from tests.sentinel import leaks_of, new_sentinel


@within(60)
@pytest.mark.parametrize("log_format", ["text", "json"])
async def test_nothing_of_a_call_is_written_down_by_broker_or_agent(log_format: str, tmp_path: Path) -> None:
    """An answer, a stream, an engine's error that quotes the prompt, one that breaks off, a client that leaves, a call that
    is none, wrong keys; then both are stopped, and everything that they wrote is searched."""
    prompt, answer, strange = (new_sentinel(what) for what in ("prompt", "answer", "key"))
    call = {"model": "m", "messages": [{"role": "user", "content": prompt}], prompt: prompt}
    settings = {"log_level": "debug", "log_format": log_format}
    async with open_keyed_stage(tmp_path, **settings) as stage, trio.open_nursery() as nursery:
        broker, engine = stage.broker, stage.engine
        client = await stage.make("client")

        async def ask(body: Any, key: str = client) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            headers = f"authorization: Bearer {key}", f"x-prompt: {prompt}"
            await broker.ask("POST", "/v1/chat/completions", *headers, body=data)

        nursery.start_soon(ask, call)
        await (await engine.next()).respond_json(200, {"said": answer})
        nursery.start_soon(ask, {**call, "stream": True})
        exchange = await engine.next()
        await exchange.start(200, {"content-type": "text/event-stream"})
        await exchange.send(EVENT.replace(b"word", answer.encode()))
        exchange.reset()
        nursery.start_soon(ask, call)
        await (await engine.next()).respond(500, json.dumps({"error": {"message": f"cannot: {prompt}"}}).encode())
        nursery.start_soon(ask, call)
        (await engine.next()).reset()
        with trio.CancelScope() as leaving:

            async def leave() -> None:
                await engine.next()
                leaving.cancel()

            nursery.start_soon(leave)
            await ask(call)
        await ask(json.dumps(call).encode()[:-1])
        await ask(call, strange)
        await ask(call, stage.admin)
        await ask({**call, "model": f"{prompt} !"})
        await broker.wait_idle()
        metrics = (await broker.http.get("/metrics")).content
        await stage.publisher.end()
        await broker.end()
        nursery.cancel_scope.cancel()
    secrets = [prompt, answer, strange, client, *stage.secrets]
    places = {
        "the broker": "\n".join([*broker.out, *broker.err]).encode(),
        "the agent": "\n".join([*stage.publisher.out, *stage.publisher.err]).encode(),
        "the metrics": metrics,
        **{str(file): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()},
    }
    assert all(b"channel" in places[whose] for whose in ("the broker", "the agent")), "one of them wrote nothing"
    for where, written in places.items():
        for secret in secrets:
            assert leaks_of(written, secret.rpartition("_")[2]) == [], where
