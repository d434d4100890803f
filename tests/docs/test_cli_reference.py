"""A command or an option that `docs/reference/cli.md` does not speak of is a failure."""

from __future__ import annotations

import re

import click
import pytest

from tests.docs.cli_options import COMMANDS, command_of, default_of, options_of
from tests.docs.pages import DOCS
from wakecall.cli import main

PAGE = DOCS / "reference" / "cli.md"


def chapter(verb: str) -> str:
    """What the page says of a verb: from its heading to the next of the same rank."""
    found = re.search(rf"^## wakecall {verb}$(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, f"{PAGE} has no heading `## wakecall {verb}`"
    return found[1]


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_option_is_documented(verb: str) -> None:
    """By its name, with its variable and its default, in its verb's own chapter."""
    text = chapter(verb)
    for option in options_of(verb):
        (name,) = option.opts
        row = next((line for line in text.splitlines() if re.match(rf"\| `{name}[` ]", line)), None)
        assert row is not None, f"wakecall {verb} {name} is not documented"
        assert f"`{option.envvar}`" in row
        assert default_of(option) in row


@pytest.mark.parametrize("verb", COMMANDS)
def test_what_is_documented_exists(verb: str) -> None:
    """Nor does the page promise an option, or a variable, that is none."""
    text = chapter(verb)
    options = options_of(verb)
    named = set(re.findall(r"^\| `(--[a-z0-9-]+)", text, re.MULTILINE))
    assert named == {option.opts[0] for option in options}
    assert set(re.findall(r"^\| `--.*?\| `(WAKECALL_\w+)`", text, re.MULTILINE)) == {
        option.envvar for option in options
    }


def test_every_verb_is_documented_and_no_other() -> None:
    assert re.findall(r"^## wakecall (.+)$", PAGE.read_text(), re.MULTILINE) == COMMANDS


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_argument_is_documented(verb: str) -> None:
    """What stands without a dash, by the name that the usage gives it."""
    for param in command_of(verb).params:
        if isinstance(param, click.Argument):
            assert f"`{param.make_metavar(click.Context(command_of(verb)))}`" in chapter(verb)


def test_every_exit_code_is_documented() -> None:
    text = PAGE.read_text()
    assert [code for code in (0, 1, 2, 78, 130) if f"\n| {code} |" not in text] == []


def test_options_of_the_group_are_documented() -> None:
    for param in main.get_params(click.Context(main)):
        for name in param.opts:
            assert f"`{name}`" in PAGE.read_text()


@pytest.mark.parametrize("verb", COMMANDS)
def test_the_page_says_what_a_verb_is_for(verb: str) -> None:
    """In the words of its help, so that the two do not drift apart."""
    assert command_of(verb).get_short_help_str() in chapter(verb)
