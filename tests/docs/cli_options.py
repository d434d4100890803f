"""The options of each verb, as tables for `docs/reference/cli.md`; made from the commands themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import click

from wakecall.cli import VERBS, main


def command_of(verb: str) -> click.Command:
    """A verb's command: `ls`, or `keys ls` where the verb is a group."""
    command: click.Command = main
    for word in verb.split():
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), word)
        assert found is not None, verb
        command = found
    return command


def _with_their_own(verbs: Sequence[str]) -> Iterator[str]:
    for verb in verbs:
        yield verb
        if isinstance(command := command_of(verb), click.Group):
            yield from _with_their_own([f"{verb} {each}" for each in command.list_commands(click.Context(command))])


#: Every verb, and after a group its own: `keys`, `keys create`, …
COMMANDS = list(_with_their_own(list(VERBS)))


def options_of(verb: str) -> list[click.Option]:
    """What `--help` lists, except `--help`."""
    return [param for param in command_of(verb).params if isinstance(param, click.Option)]


def sections_of(verb: str) -> dict[str, list[click.Option]]:
    sections: dict[str, list[click.Option]] = {}
    for option in options_of(verb):
        sections.setdefault(getattr(option, "section", ""), []).append(option)
    return sections


def default_of(option: click.Option) -> str:
    if isinstance(option.show_default, str):
        return option.show_default
    if option.required:
        return "required"
    # What click has for "none was given" is no value either.
    given = isinstance(option.default, str | int | float) and not isinstance(option.default, bool)
    return f"`{option.default}`" if given else ""


def usage_of(option: click.Option) -> str:
    name = option.opts[0]
    if option.is_flag:
        return f"`{name}`"
    kind = option.type
    if isinstance(kind, click.Choice):
        return f"`{name}` " + ", ".join(f"`{choice}`" for choice in kind.choices)
    return f"`{name} {option.metavar or kind.name.split()[0].upper()}`"


def table(verb: str) -> str:
    lines: list[str] = []
    for section, options in sections_of(verb).items():
        if section:
            lines += ["", f"{section}:"]
        lines += ["", "| option | variable | default | what it is |", "| --- | --- | --- | --- |"]
        lines += [f"| {' | '.join(_cells(option))} |" for option in options]
    return "\n".join(lines) + "\n\n"


def _cells(option: click.Option) -> Iterator[str]:
    yield usage_of(option)
    yield f"`{option.envvar}`"
    yield default_of(option)
    yield option.help or ""


PARTS: dict[str, Callable[[], str]] = {
    f"options_{verb.replace(' ', '_')}": partial(table, verb) for verb in COMMANDS if options_of(verb)
}
