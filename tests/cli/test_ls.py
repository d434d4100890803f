"""`wakecall ls`: against a broker of this process."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio

from tests.cli.processes import PATIENCE_S, call, environment
from tests.cli.stage import serve_answer, serve_broker
from wakecall import LLMSpec, Status
from wakecall.cli.tables import age
from wakecall.testing import FakePublisher

LONG = "a-name-that-is-" + "rather-" * 14 + "long"


async def ls(url: str, *args: str, state: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    with trio.fail_after(PATIENCE_S):
        return await trio.to_thread.run_sync(lambda: call("ls", *args, state=state, WAKECALL_BROKER=url, **variables))


def cells(line: str) -> list[str]:
    return re.split(r"  +", line.strip())


async def test_it_lists_every_row(tmp_path: Path) -> None:
    """Name, kind, status, session, what is in flight, what waits, and how long ago the last heartbeat was."""
    async with serve_broker() as (broker, url):
        await broker.put_public_llm("cloud", type="openai", model="m", url="https://example.org")
        llms = [LLMSpec("awake", max_concurrency=1), LLMSpec("asleep", status=Status.HIBERNATING)]
        async with FakePublisher(broker, "laptop", llms) as publisher:
            await broker.register("gone", [LLMSpec("offline")])
            run = await ls(url, state=tmp_path)
            assert publisher.channel is not None
        lost = await ls(url, state=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    head, *rows = [cells(line) for line in run.stdout.splitlines()]
    assert head == ["NAME", "KIND", "STATUS", "SESSION", "IN FLIGHT", "WAITING", "LAST HEARTBEAT"]
    assert [row[:6] for row in rows] == [
        ["asleep", "virtual", "hibernating", "laptop", "0", "0"],
        ["awake", "virtual", "active", "laptop", "0", "0"],
        ["cloud", "public", "active", "-", "0", "0"],
        ["offline", "virtual", "active, no channel", "gone", "0", "0"],
    ]
    assert [row[6] for row in rows] == [*(["now"] * 2), "-", "now"] or all("ago" in row[6] for row in rows[:2])
    assert cells(lost.stdout.splitlines()[2])[:4] == ["awake", "virtual", "inactive", "laptop"]


async def test_as_json_it_is_what_the_broker_says(tmp_path: Path) -> None:
    """A list, on stdout alone; empty when there is nothing."""
    async with serve_broker() as (broker, url):
        empty = await ls(url, "--json", state=tmp_path)
        await broker.register("laptop", [LLMSpec("a"), LLMSpec("b")])
        run = await ls(url, "--json", state=tmp_path)
    assert (empty.returncode, json.loads(empty.stdout)) == (0, [])
    rows = json.loads(run.stdout)
    assert [row["name"] for row in rows] == ["a", "b"]
    assert {"kind", "status", "session_id", "in_flight", "waiting", "last_heartbeat_at", "waking"} <= rows[0].keys()


async def test_nothing_published_is_no_error(tmp_path: Path) -> None:
    async with serve_broker() as (_, url):
        run = await ls(url + "/", state=tmp_path)
    assert (run.returncode, run.stdout) == (0, "")
    assert "Nothing is published" in run.stderr


async def test_piped_nothing_is_cut_folded_or_coloured(tmp_path: Path) -> None:
    """One row, one line, however narrow the terminal is said to be."""
    async with serve_broker() as (broker, url):
        await broker.register("laptop", [LLMSpec(LONG)])
        run = await ls(url, state=tmp_path, COLUMNS="20")
    assert len(run.stdout.splitlines()) == 2
    assert LONG in run.stdout
    assert "\x1b" not in run.stdout


def on_terminal(url: str, state: Path, **variables: str) -> str:
    """What `wakecall ls` writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    env = environment(state, WAKECALL_BROKER=url, COLUMNS="80", TERM="xterm-256color", **variables)
    process = subprocess.Popen([sys.executable, "-m", "wakecall", "ls"], stdin=theirs, stdout=theirs, env=env)
    os.close(theirs)
    written = b""
    try:
        while data := os.read(ours, 65536):
            written += data
    except OSError:
        pass  # how Linux tells that nobody holds the other end any more
    finally:
        os.close(ours)
        assert process.wait(PATIENCE_S) == 0
    return written.decode()


async def test_a_terminal_gets_colour_unless_it_wants_none(tmp_path: Path) -> None:
    """And every line fits it, with a long name folded, not lost."""
    async with serve_broker() as (broker, url):
        await broker.register("laptop", [LLMSpec(LONG)])
        with trio.fail_after(PATIENCE_S):
            colored = await trio.to_thread.run_sync(on_terminal, url, tmp_path)
            plain = await trio.to_thread.run_sync(lambda: on_terminal(url, tmp_path, NO_COLOR="1"))
    assert "\x1b[32m" in colored
    assert "\x1b[32m" not in plain
    lines = re.sub(r"\x1b\[[0-9;]*m", "", plain).replace("\r", "").splitlines()
    assert max(map(len, lines)) <= 80
    # What of the name stands on each of the lines that it was folded over.
    assert "".join(line.split("  ")[0].strip(" ─") for line in lines if line) == f"NAME{LONG}"


def test_without_a_broker_it_says_what_to_do(tmp_path: Path) -> None:
    run = call("ls", "--broker", "http://127.0.0.1:1", state=tmp_path)
    assert run.returncode == 1
    assert run.stdout == ""
    assert "No broker answers at http://127.0.0.1:1" in run.stderr
    assert "wakecall serve" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (200, b"<html>hello</html>", "no Wakecall broker"),
        (200, b'{"data": [{"name": 1}]}', "no Wakecall broker"),
        (404, b"not found", "no Wakecall broker"),
        (401, b'{"error": {"message": "no \\u001b[31mkey"}}', "no \\x1b[31mkey (HTTP 401)"),
    ],
)
async def test_what_is_no_broker_is_told_from_one(status: int, body: bytes, said: str, tmp_path: Path) -> None:
    """And nothing that it says reaches the terminal as more than text."""

    async with serve_answer(status, body) as (url, _):
        run = await ls(url, state=tmp_path)
    assert run.returncode == 1
    assert said in run.stderr
    assert "\x1b" not in run.stderr


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://example.org", "http://", "http://[::1"])
def test_what_is_no_url_is_a_usage_error(url: str, tmp_path: Path) -> None:
    run = call("ls", "--broker", url, state=tmp_path)
    assert run.returncode == 2
    assert "--broker" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-5, "now"),
        (0.4, "now"),
        (1, "1 s ago"),
        (59, "59 s ago"),
        (60, "1 min ago"),
        (3 * 3600, "3 h ago"),
        (86400 * 9, "9 d ago"),
    ],
)
def test_an_age_is_said_in_one_unit(seconds: float, said: str) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    then = datetime.fromtimestamp(now.timestamp() - seconds, UTC).isoformat().replace("+00:00", "Z")
    assert age(then, now) == said


def test_what_has_no_age_has_none() -> None:
    assert age(None, datetime.now(UTC)) == age("yesterday", datetime.now(UTC)) == "-"
