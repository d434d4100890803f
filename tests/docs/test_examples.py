"""What the documentation shows can be done: commands exist, Python compiles, JSON parses, and the examples run."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path

import click
import pytest
import trio

from tests.docs.pages import DOCS, ROOT, Block, blocks, read
from wakecall import ServeConfig, serve
from wakecall.broker import open_broker
from wakecall.cli import main as wakecall
from wakecall.cli.demo_engine import main as demo_engine
from wakecall.models import ChannelEvent, Event, InferRequest

README = ROOT / "README.md"
EMBED = DOCS / "how-to/embed.py"
PROTOCOL = DOCS / "reference/protocol.md"


# Commands -----------------------------------------------------------------------------------------------------------


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands of a shell script, as words. Comments stand on lines of their own."""
    text = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|<>()\n")
    lexer.whitespace = " \t"
    lexer.whitespace_split = True
    lexer.commenters = ""
    words: list[str] = []
    for word in [*lexer, "\n"]:
        if set(word) <= set(";&|<>()\n"):
            if words:
                yield words
            words = []
        else:
            words.append(word)


def problem_with(words: list[str]) -> str | None:
    """What is wrong with a command of ours: a verb or an option that is not there. Other programs' are not looked at."""
    while words and re.fullmatch(r"\w+=.*", words[0], re.DOTALL):
        words = words[1:]
    program = Path(words[0]).name if words else ""
    if program == "wakecall":
        return _problem_with_options(wakecall, words[1:])
    if words[1:3] == ["-m", "wakecall.cli.demo_engine"]:
        return _problem_with_options(demo_engine, words[3:])
    return None


def _problem_with_options(command: click.Command, words: list[str]) -> str | None:
    context = click.Context(command)
    if isinstance(command, click.Group) and words and not words[0].startswith("-"):
        verb = command.get_command(context, words[0])
        return f"there is no verb {words[0]}" if verb is None else _problem_with_options(verb, words[1:])
    known = {name for param in command.get_params(context) for name in param.opts} | {"--help", "-h"}
    given = [word.partition("=")[0] for word in words if word.startswith("-")]
    unknown = [each for each in given if each not in known]
    return f"there is no {', '.join(unknown)}" if unknown else None


def problems_with(text: str) -> list[str]:
    """What is wrong with a script, and with the commands that it hands to others (`--wake-command '…'`)."""
    found = []
    for words in commands(text):
        found += [problem] if (problem := problem_with(words)) else []
        for word in words:
            if " " in word:
                found += problems_with(word)
    return found


@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_commands_name_only_verbs_and_options_that_are_there(block: Block) -> None:
    assert problems_with(block.text) == []


@pytest.mark.parametrize(
    "text",
    [
        "wakecall fly",
        ".venv/bin/wakecall serve --prot 8080",
        "true && wakecall publish \\\n    --engin http://127.0.0.1:1",
        "WAKECALL_PORT=0 wakecall serve --colour=red &",
        "python -m wakecall.cli.demo_engine --backgrund",
        "wakecall publish --wake-command 'python -m wakecall.cli.demo_engine --backgrund'",
    ],
)
def test_a_command_that_is_not_there_is_found(text: str) -> None:
    """The check itself."""
    assert problems_with(text) != []


def test_the_readme_begins_with_its_two_commands() -> None:
    """CI runs these two blocks as they stand."""
    first, second = [block.text for block in read(README)[1] if block.language == "sh"][:2]
    assert first == "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/wakecall demo\n"
    assert second == "python3 -m venv .venv && .venv/bin/pip install -e '.[dev]' && .venv/bin/pytest\n"


# Code ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_compiles_and_imports_what_is_there(block: Block) -> None:
    text = textwrap.dedent(block.text)
    compile(text, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            module = import_module(node.module)
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert missing == [], f"{node.module} has no {missing}"


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_parses(block: Block) -> None:
    json.loads(block.text)


def test_every_code_block_says_what_it_is() -> None:
    assert [str(block) for block in blocks("")] == []


# The examples -------------------------------------------------------------------------------------------------------


def test_the_embedding_example_prints_what_its_page_says() -> None:
    command = [sys.executable, "-W", "error", str(EMBED)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert run.stderr == ""
    (shown,) = [block.text for block in read(EMBED.with_suffix(".md"))[1] if block.language == "text"]
    assert run.stdout == shown


def test_the_embedding_page_shows_what_the_example_does() -> None:
    """Its Python blocks are cut out of the program, not written beside it."""
    program = EMBED.read_text()
    shown = [block.text for block in read(EMBED.with_suffix(".md"))[1] if block.language == "python"]
    assert shown
    assert [text for text in shown if text not in program] == []


def run_python(text: str, *, cwd: Path) -> str:
    """What a script prints; it has to end well, and to have nothing to complain of."""
    script = cwd / "script.py"
    script.write_text(text)
    command = [sys.executable, "-W", "error", str(script)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert run.stderr == ""
    return run.stdout


def test_the_readmes_embedding_example_runs(tmp_path: Path) -> None:
    (program,) = [block.text for block in blocks("python") if block.page == README and "trio.run" in block.text]
    assert run_python(program, cwd=tmp_path) == 'b\'{"prompt": "hello"}\'\n'


def test_the_testing_example_passes(tmp_path: Path) -> None:
    """As pytest-trio would run it: on a virtual clock."""
    page = DOCS / "reference/python.md"
    (program,) = [block.text for block in blocks("python") if block.page == page and "def test_" in block.text]
    run = """
import trio.testing

clock = trio.testing.MockClock(autojump_threshold=0)
trio.run(test_a_call_is_answered, clock, clock=clock)
"""
    assert run_python(program + run, cwd=tmp_path) == ""


async def test_the_protocols_forty_line_publisher_answers(tmp_path: Path) -> None:
    """It registers, is woken, answers one infer over the wire, says goodbye and ends by itself."""
    (program,) = [block.text for block in read(PROTOCOL)[1] if block.language == "python"]
    with trio.fail_after(30):
        async with open_broker() as broker, trio.open_nursery() as nursery:
            (url,) = await nursery.start(serve, broker, ServeConfig(port=0))
            script = tmp_path / "publisher.py"
            script.write_text(program.replace("http://127.0.0.1:8080", url))
            connected = trio.Event()

            def observe(event: Event) -> None:
                if isinstance(event, ChannelEvent) and event.event == "open":
                    connected.set()

            broker.add_observer(observe)
            run = partial(trio.run_process, [sys.executable, str(script)], stdout=subprocess.PIPE)
            process = await nursery.start(run)
            await connected.wait()
            body = b'{"model": "tiny", "messages": []}'
            async with broker.infer("tiny", InferRequest("/v1/chat/completions", body)) as reply:
                assert json.loads(await reply.read())["choices"][0]["message"]["content"] == "hi"
            printed = b"".join([piece async for piece in process.stdout])
            assert printed.split() == [b"hello", b"wake", b"infer", b"bye"]
            assert await process.wait() == 0
            nursery.cancel_scope.cancel()
