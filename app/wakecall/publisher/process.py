"""Commands of the user's that start and stop an engine.

A command runs in a session, and so a process group, of its own, with nothing on its standard input. Its error output
goes to a file rather than a pipe: a daemon that it leaves behind keeps that descriptor for as long as it lives, and
must neither be killed by SIGPIPE nor block on a full pipe when this agent stops reading or is gone. The file is opened
for appending, so that the agent may cut it back while the daemon goes on writing.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import trio

MAX_MESSAGE_BYTES = 1024
MAX_LOG_BYTES = 8 * 1024 * 1024
_TAIL_BYTES = 16 * 1024
_KEY_VARIABLE = "WAKECALL_KEY"
_GROUP_POLL_S = 0.02


class CommandFailed(Exception):
    """The command could not be run or said that it failed; the message is its last line on stderr, if it left one."""


class ProcessGroup:
    """What a command started: the group that its shell leads, and what it leaves behind there."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._gone = False

    def is_alive(self) -> bool:
        """Whether anything of the group still runs.

        Asked often while a wake goes on, because the number of a group that has ended may be given out again.
        """
        return self._signal(0)

    async def end(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL for what is left after `grace_s` seconds. Finishes even when cancelled."""
        with trio.CancelScope(shield=True):
            if not self._signal(signal.SIGTERM):
                return
            # The kernel tells of the end of a child, not of a group whose members are somebody else's children.
            with trio.move_on_after(grace_s):
                while self.is_alive():  # noqa: ASYNC110
                    await trio.sleep(_GROUP_POLL_S)
            self._signal(signal.SIGKILL)
            await self._process.wait()

    def _signal(self, number: int) -> bool:
        # Asking for the return code reaps the shell: unreaped, it would count as a living member.
        reaped = self._process.returncode is not None
        if not self._gone:
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                self._gone = True
            except PermissionError:
                # What macOS says of a group of nothing but zombies.
                self._gone = reaped
        return not self._gone


@asynccontextmanager
async def open_command(
    command: str, log: Path, *, grace_s: float, variables: Mapping[str, str] | None = None
) -> AsyncIterator[ProcessGroup]:
    """Run a command with `sh -c`; the block begins when it has exited with 0.

    Leaving the block by an error or a cancellation ends the whole group; leaving it normally leaves a daemon alone.

    Args:
        command: for the shell.
        log: the file that gets its error output; a daemon of an earlier run may still be writing to it.
        grace_s: seconds between SIGTERM and SIGKILL.
        variables: for its environment, beside our own.

    Raises:
        CommandFailed: it cannot be started, or exits with another code.
    """
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise CommandFailed(f"the command's log {log} cannot be opened: {error.strerror}") from error
    try:
        cut_log(log, 0)
        process = await trio.lowlevel.open_process(
            ["sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=descriptor,
            start_new_session=True,
            # An engine has no use for our key, and what a command says last is what callers are told.
            env={
                **{name: value for name, value in os.environ.items() if name != _KEY_VARIABLE},
                **(variables or {}),
            },
        )
    except OSError as error:
        raise CommandFailed(f"the command cannot be run: {error.strerror}") from error
    except ValueError as error:
        # An engine may call its model what no variable can hold.
        raise CommandFailed(f"the command cannot be run: {error}") from error
    finally:
        os.close(descriptor)
    group = ProcessGroup(process)
    left_well = False
    try:
        # The process, and not the end of its output: a daemon may hold that open for ever.
        code = await process.wait()
        if code != 0:
            raise CommandFailed(last_line(log) or _describe_exit(code))
        yield group
        left_well = True
    finally:
        if not left_well:
            await group.end(grace_s)


def _describe_exit(code: int) -> str:
    if code < 0:
        return f"the command was ended by signal {-code}"
    return f"the command exited with {code} and said nothing on stderr"


def last_line(log: Path) -> str | None:
    """The last non-empty line of a file, at most 1 KiB of it; None without one."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read(_TAIL_BYTES).splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        text = line.strip()[:MAX_MESSAGE_BYTES].decode("utf-8", "replace").strip()
        if text:
            return "".join(character if character.isprintable() else " " for character in text)
    return None


def cut_log(log: Path, above: int = MAX_LOG_BYTES) -> None:
    """Empty a log that has grown beyond `above` bytes: a daemon may go on writing to it for months."""
    try:
        if log.stat().st_size > above:
            os.truncate(log, 0)
    except OSError:
        # No log, no harm: it is there for the last line of a failed command.
        return
