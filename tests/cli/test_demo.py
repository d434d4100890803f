"""`wakecall demo`: it works, on any terminal and on none, and leaves nothing."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.cli.processes import MARK, PATIENCE_S, call, environment, family, run_wakecall
from wakecall.cli.demo_engine import serve_demo_engine

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def left_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """Where the demo keeps its files while it runs."""
    path = tmp_path / "tmp"
    path.mkdir()
    return path


def test_it_shows_the_whole_way(tmp_path: Path, temporary: Path) -> None:
    """Registered, hibernating, one wake, first byte, done, in this order and with times; the answer whole; exit code 0."""
    env = environment(tmp_path, TMPDIR=str(temporary))
    run = subprocess.run(
        [sys.executable, "-m", "wakecall", "demo", "--prompt", "Is anybody there?"],
        capture_output=True,
        text=True,
        env=env,
        timeout=PATIENCE_S,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    told = ["listens on", "registered demo", "demo is hibernating", "channel is open", "you ask: Is anybody there?"]
    told += ["you call demo", "one wake goes out", "the engine is up", "the request follows", "first byte", "done"]
    notes = [line for line in run.stdout.splitlines() if re.match(r" *\d+\.\d\d s ", line)]
    assert len(notes) == len(told)
    for note, said in zip(notes, told, strict=True):
        assert said in note
    times = [float(note.split()[0]) for note in notes]
    assert times == sorted(times)
    answer = " ".join(line.removeprefix("> ") for line in run.stdout.splitlines() if line.startswith("> "))
    assert answer.startswith("You called a machine that cannot be called:")
    assert "You asked: “Is anybody there?”" in answer
    assert answer.endswith("it will answer you the same way.")
    assert "One call: one wake" in run.stdout
    for following in ("wakecall serve", "wakecall publish --engine", "curl http://127.0.0.1:8080/v1/chat/completions"):
        assert following in run.stdout
    assert family(env[MARK]) == []
    assert left_in(temporary) == []
    assert not (tmp_path / "wakecall").exists()


async def test_the_answer_comes_as_it_is_made(tmp_path: Path) -> None:
    """Its first words are on the screen while the engine still thinks about the next."""
    async with run_wakecall("demo", state=tmp_path) as demo:
        line = await demo.out.wait("> You called")
        assert "cannot be called" in line
        assert "done" not in demo.out.text
        assert await demo.wait() == 0


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("listens on", signal.SIGINT),
        ("demo is hibernating", signal.SIGINT),
        ("one wake goes out", signal.SIGINT),
        ("one wake goes out", signal.SIGTERM),
        ("first byte", signal.SIGINT),
        ("first byte", signal.SIGHUP),
    ],
)
async def test_interrupted_anywhere_it_leaves_nothing(
    moment: str, number: signal.Signals, tmp_path: Path, temporary: Path
) -> None:
    """No process, no file and no traceback, in the middle of starting the engine too; the code says which signal it was."""
    async with run_wakecall("demo", state=tmp_path, TMPDIR=str(temporary)) as demo:
        await demo.out.wait(moment)
        demo.send(number)
        assert await demo.wait() == 128 + number, demo.err.text
        assert demo.err.text == ""
        assert demo.family() == []
        assert left_in(temporary) == []


async def test_an_engine_that_is_just_starting_is_ended_too(tmp_path: Path) -> None:
    """It is nobody's child by then, and answers nobody yet; it is gone with the demo all the same."""
    async with run_wakecall("demo", state=tmp_path) as demo:
        while not any("demo_engine" in each and "--background" not in each for each in demo.family()):
            await trio.lowlevel.checkpoint()
        demo.send(signal.SIGINT)
        assert await demo.wait() == 130, demo.err.text
        assert demo.family() == []
        assert "the engine is up" not in demo.out.text


async def test_an_engine_that_runs_is_used_and_left_running(tmp_path: Path) -> None:
    """With `--engine` nothing is started: what is there is asked, for the model that is named, or its first."""
    async with trio.open_nursery() as nursery:
        port = await nursery.start(partial(serve_demo_engine, delay_s=0.0))
        engine = f"http://127.0.0.1:{port}/v1"
        for args in ([], ["--model", "wakecall-demo"]):
            async with run_wakecall("demo", "--engine", engine, *args, state=tmp_path) as demo:
                assert await demo.wait() == 0, demo.err.text
            assert "is active" in demo.out.text
            assert "one wake" not in demo.out.text
            assert "> You called" in demo.out.text
            assert f"wakecall publish --engine {engine}" in demo.out.text
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--engine", "http://127.0.0.1:1"], 1, "without --engine the demo brings an engine of its own"),
        (["--engine", "nonsense"], 1, "address"),
        (["--model", "m"], 2, "--model is for --engine"),
    ],
)
def test_what_cannot_be_is_said(args: list[str], code: int, said: str, tmp_path: Path) -> None:
    run = call("demo", *args, state=tmp_path)
    assert run.returncode == code
    assert said.lower() in run.stderr.lower()
    assert "Traceback" not in run.stderr


async def test_an_engine_that_refuses_is_said(tmp_path: Path) -> None:
    """Its own words, and exit code 1; the screen says so too."""

    async def refuse(stream: trio.SocketStream) -> None:
        async with stream:
            request = await stream.receive_some()
            body = b'{"error": {"message": "out of memory"}}'
            if request.startswith(b"GET"):
                body = b'{"data": [{"id": "m"}]}'
            status = b"200 ok" if request.startswith(b"GET") else b"500 no"
            head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n" % (status, len(body))
            await stream.send_all(head + b"connection: close\r\n\r\n" + body)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, refuse, 0, host="127.0.0.1"))
        engine = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        async with run_wakecall("demo", "--engine", engine, state=tmp_path) as demo:
            assert await demo.wait() == 1
        nursery.cancel_scope.cancel()
    assert demo.err.text == "Error: out of memory (HTTP 500)\n"


@pytest.mark.parametrize("columns", [40, 80])
def test_without_a_terminal_it_is_lines_that_fit(columns: int, tmp_path: Path) -> None:
    """No escapes, no colour; and where a width is given, what can be folded keeps to it."""
    run = call("demo", state=tmp_path, COLUMNS=str(columns))
    assert run.returncode == 0
    assert "\x1b" not in run.stdout
    shown = run.stdout.partition("  wakecall serve")[0]
    assert max(map(len, shown.splitlines())) <= columns


def test_where_there_is_only_ascii_it_makes_do(tmp_path: Path) -> None:
    """Marks have another form, and what an engine says beyond it costs a question mark, not the demo."""
    run = call("demo", state=tmp_path, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert run.returncode == 0, run.stderr
    assert run.stdout.isascii()
    assert "z demo is hibernating" in run.stdout


@pytest.mark.parametrize(("columns", "variables"), [(100, {}), (80, {"NO_COLOR": "1"}), (40, {})])
def test_on_a_terminal_it_lives(columns: int, variables: dict[str, str], tmp_path: Path) -> None:
    """What is drawn again and again fits; colour is only where it is wanted; what stays is whole, with its cursor back."""
    ours, theirs = pty.openpty()
    env = environment(tmp_path, COLUMNS=str(columns), LINES="24", TERM="xterm-256color", **variables)
    process = subprocess.Popen([sys.executable, "-m", "wakecall", "demo"], stdin=theirs, stdout=theirs, env=env)
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
    text = written.decode()
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0
    assert ("\x1b[32m" in text) is not bool(variables)
    assert text.count("the answer") > 20
    final = ESCAPES.sub("", text[text.rfind("the answer") :]).replace("\r", "")
    frame = final.partition("One call")[0].splitlines()
    assert max(map(len, frame[1:])) <= columns
    for said in ("You called a machine", "way.", "hibernating", "one wake goes out", "first byte", "done"):
        assert said in final
    assert family(env[MARK]) == []
