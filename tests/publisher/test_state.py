"""The session id is kept, and one agent at a time holds it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.publisher.test_process import wait_pid
from wakecall.publisher import PublishedModel, PublisherConfig, StateLocked, StateUnusable, run_publisher
from wakecall.publisher.process import open_command
from wakecall.publisher.state import open_state


def config(directory: Path, **settings: Any) -> PublisherConfig:
    defaults: dict[str, Any] = {
        "broker_url": "http://broker",
        "engine_url": "http://user:s3cret@engine/v1",
        "models": (PublishedModel("m"),),
        "state_dir": directory,
    }
    return PublisherConfig(**{**defaults, **settings})


def test_the_session_id_is_random_and_stays(tmp_path: Path) -> None:
    with open_state(config(tmp_path)) as first:
        assert len(first.session_id) >= 20
        assert first.path.stat().st_mode & 0o777 == 0o600
        assert "s3cret" not in first.path.read_text()
    with open_state(config(tmp_path)) as second:
        assert second.session_id == first.session_id
    with open_state(config(tmp_path, broker_url="http://other")) as other:
        assert other.session_id != first.session_id


@pytest.mark.parametrize("session_id", [None, "mine"])
def test_a_second_holder_is_refused_with_the_files_name(tmp_path: Path, session_id: str | None) -> None:
    with open_state(config(tmp_path, session_id=session_id)) as held:
        with (
            pytest.raises(StateLocked, match=held.path.name) as refused,
            open_state(config(tmp_path, session_id=session_id)),
        ):
            pytest.fail("both hold it")
        assert refused.value.exit_code == 78
        with open_state(config(tmp_path, session_id="another")) as another:
            assert another.session_id == "another"
    with open_state(config(tmp_path, session_id=session_id)) as again:
        assert again.session_id == held.session_id


async def test_a_second_agent_ends_before_it_speaks_to_anybody(tmp_path: Path) -> None:
    with open_state(config(tmp_path)), pytest.raises(StateLocked):
        await run_publisher(config(tmp_path))


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"session_id": "a b"}', b"\xff", b'{"session_id": 3}'])
def test_an_unreadable_record_is_replaced(tmp_path: Path, content: bytes) -> None:
    with open_state(config(tmp_path)) as first:
        pass
    first.path.write_bytes(content)
    with open_state(config(tmp_path)) as state:
        assert json.loads(state.path.read_text())["session_id"] == state.session_id
        assert state.session_id != first.session_id


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "publishers").write_text("in the way")
    with pytest.raises(StateUnusable), open_state(config(tmp_path)):
        pytest.fail("opened")


async def test_a_daemon_does_not_inherit_the_lock(tmp_path: Path) -> None:
    with open_state(config(tmp_path)) as state:
        with trio.fail_after(5):
            async with open_command(f"sleep 60 & echo $! > {tmp_path}/pid", state.command_log, grace_s=1):
                pid = await wait_pid(tmp_path / "pid")
    try:
        with open_state(config(tmp_path)):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
