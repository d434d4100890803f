"""Commands: what ends with them, and what stays."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import trio

from wakecall.publisher.process import CommandFailed, cut_log, last_line, open_command


async def wait_pid(path: Path) -> int:
    """The process id that a command writes into a file, which is its only way to tell us."""
    with trio.fail_after(5):
        while not path.exists() or not path.read_text().strip():
            await trio.sleep(0.01)
    return int(path.read_text())


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def wait_ended(pid: int) -> None:
    with trio.fail_after(5):
        while is_running(pid):
            await trio.sleep(0.01)


async def wait_said(log: Path, line: str) -> None:
    with trio.fail_after(5):
        while last_line(log) != line:
            await trio.sleep(0.01)


async def cancel_once_running(command: str, log: Path, *pid_files: Path, grace_s: float) -> list[int]:
    """Cancel a command that has written its process ids and would not end; returns them once that is done."""

    async def run() -> None:
        async with open_command(command, log, grace_s=grace_s):
            pytest.fail("the block began")

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            pids = [await wait_pid(path) for path in pid_files]
            nursery.cancel_scope.cancel()
    return pids


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "command.log"


async def test_a_daemon_that_holds_stderr_survives_a_successful_command(tmp_path: Path, log: Path) -> None:
    """The block begins when the shell has exited, not when its output is closed; the daemon may go on writing."""
    command = f"(while :; do echo still here >&2; sleep 0.05; done) & echo $! > {tmp_path}/pid"
    with trio.fail_after(5):
        async with open_command(command, log, grace_s=1) as group:
            pid = await wait_pid(tmp_path / "pid")
            assert group.is_alive()
    try:
        assert is_running(pid)
        await wait_said(log, "still here")
        cut_log(log, 0)
        await wait_said(log, "still here")
        assert b"\0" not in log.read_bytes(), "the daemon goes on at the new end, not at its old place"
        assert is_running(pid)
        assert os.getpgid(pid) != os.getpgid(0)
    finally:
        os.kill(pid, signal.SIGKILL)


async def test_a_command_that_fails_says_its_last_line(tmp_path: Path, log: Path) -> None:
    with pytest.raises(CommandFailed, match=r"^no such machine$"):
        async with open_command(
            "echo first >&2; echo no such machine >&2; echo; echo '  ' >&2; exit 3", log, grace_s=1
        ):
            pytest.fail("the block began")


async def test_what_a_failed_command_left_behind_is_ended(tmp_path: Path, log: Path) -> None:
    with pytest.raises(CommandFailed, match="exited with 4"):
        async with open_command(f"sleep 60 & echo $! > {tmp_path}/pid; exit 4", log, grace_s=5):
            pytest.fail("the block began")
    await wait_ended(await wait_pid(tmp_path / "pid"))


async def test_cancelling_ends_the_whole_group(tmp_path: Path, log: Path) -> None:
    command = f"sleep 60 & echo $! > {tmp_path}/child; echo $$ > {tmp_path}/shell; wait"
    pids = await cancel_once_running(command, log, tmp_path / "child", tmp_path / "shell", grace_s=2)
    assert not any(is_running(pid) for pid in pids)


async def test_a_group_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path, log: Path) -> None:
    command = f"trap '' TERM; sleep 60 & echo $! > {tmp_path}/pid; wait; wait"
    [pid] = await cancel_once_running(command, log, tmp_path / "pid", grace_s=0.05)
    await wait_ended(pid)


async def test_leaving_the_block_by_an_error_ends_the_daemon(tmp_path: Path, log: Path) -> None:
    """A wake that runs out of time takes what it started with it, or the next one would start it twice."""
    with pytest.raises(TimeoutError):
        async with open_command(f"sleep 60 & echo $! > {tmp_path}/pid", log, grace_s=5):
            raise TimeoutError
    await wait_ended(await wait_pid(tmp_path / "pid"))


async def test_a_command_reads_nothing_and_its_log_is_the_users_alone(log: Path) -> None:
    async with open_command('read line; test -z "$line" && echo kept >&2', log, grace_s=1):
        pass
    assert last_line(log) == "kept"
    assert log.stat().st_mode & 0o777 == 0o600


async def test_a_command_has_our_environment_but_not_our_key(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says last may reach a caller, and the engine that it starts lives longer than the key should be read."""
    monkeypatch.setenv("WAKECALL_KEY", "k3y")
    monkeypatch.setenv("VLLM_API_KEY", "its own")
    async with open_command('echo "${WAKECALL_KEY-none} $VLLM_API_KEY" >&2', log, grace_s=1):
        pass
    assert last_line(log) == "none its own"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", None),
        (b"\n \n", None),
        (b"a\nb\n\n", "b"),
        (b"x" * 5000, "x" * 1024),
        ("é".encode() * 3 + b"\xff\x1b[31m", "ééé\ufffd [31m"),
        (b"a\n" * 100_000 + b"end", "end"),
    ],
)
def test_the_last_line_is_found_bounded_and_printable(log: Path, content: bytes, line: str | None) -> None:
    log.write_bytes(content)
    assert last_line(log) == line


def test_a_log_is_cut_only_when_it_has_grown(log: Path) -> None:
    log.write_bytes(b"x" * 100)
    cut_log(log, 100)
    assert log.stat().st_size == 100
    cut_log(log, 99)
    assert log.stat().st_size == 0
