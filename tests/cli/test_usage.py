"""`wakecall usage`: against a broker of this process."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import trio

from tests.cli.processes import PATIENCE_S, call
from tests.cli.stage import serve_answer, serve_broker
from wakecall import Broker, BrokerConfig, InferRequest
from wakecall.testing import FakePublisher

CALL = InferRequest("/v1/chat/completions", b'{"model": "qwen"}')
ANSWER = b'{"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 3}}'
HEAD = ["REQUESTS", "COMPLETED", "FAILED", "CANCELLED", "TOKENS IN", "TOKENS OUT", "UNKNOWN", "SECONDS"]


async def usage(url: str, *args: str, state: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    with trio.fail_after(PATIENCE_S):
        return await trio.to_thread.run_sync(
            lambda: call("usage", *args, state=state, WAKECALL_BROKER=url, **variables)
        )


def cells(line: str) -> list[str]:
    return re.split(r"  +", line.strip())


async def serve_one(broker: Broker, publisher: FakePublisher, name: str, secret: str | None, answer: bytes) -> None:
    claim = None if secret is None else broker.claim(broker.authenticate(secret))
    infer = broker.infer_nowait(name, CALL, claim=claim)
    await publisher.answer(await publisher.next("infer"), answer)
    infer.cancel()


async def test_it_shows_who_used_how_much(tmp_path: Path) -> None:
    """By key with its name, or by model; whole tokens, and what is not known."""
    async with serve_broker() as (broker, url), FakePublisher(broker, "laptop", ["qwen", "phi"]) as publisher:
        await serve_one(broker, publisher, "qwen", None, ANSWER)
        admin = (await broker.create_key("admin")).secret
        made = await broker.create_key("client", name="note\x1bbook")
        async with FakePublisher(broker, "desk", ["gpt"]) as desk:
            await serve_one(broker, desk, "gpt", made.secret, ANSWER)
            await serve_one(broker, desk, "gpt", made.secret, b"{}")
        by_key = await usage(url, state=tmp_path, WAKECALL_KEY=admin)
        by_llm = await usage(
            url, "--by", "llm", "--since", "2026-01-01T00:00:00+02:00", state=tmp_path, WAKECALL_KEY=admin
        )
        as_json = await usage(url, "--json", "--since", "1h", state=tmp_path, WAKECALL_KEY=admin)
        without = await usage(url, state=tmp_path)
    assert (by_key.returncode, by_key.stderr) == (0, "")
    head, *rows = [cells(line) for line in by_key.stdout.splitlines()]
    assert head == ["KEY", "NAME", *HEAD]
    assert [row[:9] for row in rows] == [
        ["-", "-", "1", "1", "0", "0", "12", "3", "0"],
        [made.key.key_id, "note\\x1bbook", "2", "2", "0", "0", "12", "3", "1"],
    ]
    head, *rows = [cells(line) for line in by_llm.stdout.splitlines()]
    assert head == ["LLM", *HEAD]
    assert [row[:3] for row in rows] == [["gpt", "2", "2"], ["qwen", "1", "1"]]
    assert [row["key_id"] for row in json.loads(as_json.stdout)] == [None, made.key.key_id]
    assert without.returncode == 78
    assert "WAKECALL_KEY" in without.stderr


async def test_what_goes_beyond_the_bound_is_shown_as_others(tmp_path: Path) -> None:
    async with serve_broker(BrokerConfig(max_usage_cells=1)) as (broker, url):
        async with FakePublisher(broker, "laptop", ["a", "b"]) as publisher:
            for name in ("a", "b"):
                await serve_one(broker, publisher, name, None, ANSWER)
        run = await usage(url, "--by", "llm", state=tmp_path)
    assert [cells(line)[0] for line in run.stdout.splitlines()] == ["LLM", "others", "a"]


async def test_nothing_used_is_no_error(tmp_path: Path) -> None:
    async with serve_broker() as (_, url):
        run = await usage(url, state=tmp_path)
        as_json = await usage(url, "--json", state=tmp_path)
    assert (run.returncode, run.stdout) == (0, "")
    assert "Nothing has been used since 2" in run.stderr
    assert json.loads(as_json.stdout) == []


@pytest.mark.parametrize(("option", "value"), [("--since", "yester\x1bday"), ("--since", "24"), ("--by", "model")])
async def test_what_is_not_understood_is_a_usage_error(option: str, value: str, tmp_path: Path) -> None:
    async with serve_broker() as (_, url):
        run = await usage(url, option, value, state=tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    assert option in run.stderr
    assert "\x1b" not in run.stderr


@pytest.mark.parametrize(
    "body", [b"<html>hello</html>", b'{"data": []}', b'{"since": "x", "data": [{"requests": "1"}]}']
)
async def test_what_is_no_broker_is_told_from_one(body: bytes, tmp_path: Path) -> None:
    async with serve_answer(200, body) as (url, _):
        run = await usage(url, state=tmp_path)
    assert (run.returncode, run.stdout) == (1, "")
    assert "no Wakecall broker" in run.stderr
