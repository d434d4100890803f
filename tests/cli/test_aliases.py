"""`wakecall aliases`: names of an operator's own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import Result

from tests.cli.stage import serve_answer, serve_broker
from tests.cli.test_keys import ask, invoke
from wakecall import LLMSpec
from wakecall.testing import FakePublisher


async def aliases(url: str, *args: str, state: Path) -> Result:
    return await ask("aliases", *args, state=state, WAKECALL_BROKER=url)


async def test_an_alias_is_made_changed_listed_and_removed(tmp_path: Path) -> None:
    async with serve_broker() as (broker, url), FakePublisher(broker, "laptop", [LLMSpec("qwen")]):
        assert "There are no aliases" in (await aliases(url, "ls", state=tmp_path)).stderr
        made = await aliases(url, "set", "team/fast", "gpus", "cloud", "qwen", state=tmp_path)
        assert (made.exit_code, made.stdout) == (0, "")
        assert made.stderr == "team/fast leads to gpus, then cloud, then qwen.\n"
        assert [each.alias.targets for each in broker.alias_views()] == [("gpus", "cloud", "qwen")]
        changed = await aliases(url, "set", "other", "nothing", state=tmp_path)
        assert changed.stderr == "other leads to nothing. None of them can take a request now.\n"
        listed = await aliases(url, "ls", state=tmp_path)
        assert [re.split(r"  +", line.strip()) for line in listed.stdout.splitlines()] == [
            ["NAME", "TARGET", "FALLBACKS", "ROUTABLE"],
            ["other", "nothing", "-", "no"],
            ["team/fast", "gpus", "cloud, qwen", "yes"],
        ]
        rows = json.loads((await aliases(url, "ls", "--json", state=tmp_path)).stdout)
        assert rows[1] == {"name": "team/fast", "target": "gpus", "fallbacks": ["cloud", "qwen"], "routable": True}
        removed = await aliases(url, "rm", "team/fast", state=tmp_path)
        assert (removed.exit_code, removed.stderr) == (0, "Removed team/fast.\n")
        assert [each.alias.name for each in broker.alias_views()] == ["other"]
        gone = await aliases(url, "rm", "team/fast", state=tmp_path)
        assert gone.exit_code == 1
        assert "(HTTP 404)" in gone.stderr


async def test_what_the_broker_refuses_is_said(tmp_path: Path) -> None:
    async with serve_broker() as (_, url):
        twice = await aliases(url, "set", "a", "b", "b", state=tmp_path)
    assert twice.exit_code == 78
    assert "(HTTP 400)" in twice.stderr


@pytest.mark.parametrize("name", ["../keys", "a b", "", "a?b", "a//b"])
@pytest.mark.parametrize("verb", [("set", "target"), ("rm",)])
def test_what_is_no_name_reaches_no_broker(verb: tuple[str, ...], name: str, tmp_path: Path) -> None:
    """It would become part of a path, and mean something else there."""
    done = invoke("aliases", verb[0], name, *verb[1:], "--broker", "http://127.0.0.1:1", state=tmp_path)
    assert done.exit_code == 2
    assert "no name that a model could have" in done.output


@pytest.mark.parametrize("args", [("ls",), ("set", "a", "b")])
async def test_what_is_no_broker_is_told_from_one(args: tuple[str, ...], tmp_path: Path) -> None:
    async with serve_answer(200, b"[]") as (url, _):
        done = await aliases(url, *args, state=tmp_path)
    assert done.exit_code == 1
    assert "no Wakecall broker" in done.stderr


def test_a_broker_that_is_away_is_said(tmp_path: Path) -> None:
    done = invoke("aliases", "ls", "--broker", "http://127.0.0.1:1", state=tmp_path)
    assert done.exit_code == 1
    assert "No broker answers at http://127.0.0.1:1" in done.output
