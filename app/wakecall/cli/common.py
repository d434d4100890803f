"""What the verbs share: options, errors, and text that is fit for a terminal."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar, Final, TextIO, TypeVar

import click
import trio

from ..keys import is_presentable

__all__ = [
    "ConfigurationError",
    "SectionedCommand",
    "broker_option",
    "handle_signals",
    "key_option",
    "log_options",
    "option",
    "printable",
    "program",
    "wants_color",
]

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_BROKER: Final = "http://127.0.0.1:8080"


class ConfigurationError(click.ClickException):
    """What was asked for is well-formed, and cannot be had like that (EX_CONFIG of sysexits.h)."""

    exit_code = 78


class SectionedOption(click.Option):
    """An option with a place of its own in the help."""

    def __init__(self, *args: Any, section: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class SectionedCommand(click.Command):
    """A command whose help lists its options in sections: those without one first."""

    default_section: ClassVar[str] = "Options"

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            # Arguments stand in the usage.
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None:
                section = getattr(param, "section", "") or self.default_section
                sections.setdefault(section, []).append(record)
        if (help_option := self.get_help_option(ctx)) is not None:
            # It is the last of the parameters, and belongs at the end of the first section.
            record = help_option.get_help_record(ctx)
            assert record is not None
            sections[self.default_section].remove(record)
            sections[self.default_section].append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)


def option(*names: str, envvar: str, **kwargs: Any) -> Callable[[F], F]:
    """An option that is also a variable, and says so; its default is shown, if it has one."""
    kwargs.setdefault("show_default", True)
    return click.option(*names, cls=SectionedOption, envvar=envvar, show_envvar=True, **kwargs)


def broker_option(command: F) -> F:
    """`--broker`, the same for everyone who calls one."""
    return option(
        "--broker",
        envvar="WAKECALL_BROKER",
        default=DEFAULT_BROKER,
        metavar="URL",
        help="The broker's address.",
    )(command)


def _key(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    key = (value or "").strip()
    if key and not is_presentable(key):
        # Without it in the text: it may be a key with something beside it.
        raise click.BadParameter("this is no API key: it is of printable ASCII, without spaces", ctx, param)
    return key or None


def key_option(role: str) -> Callable[[F], F]:
    """`--key`, the same for everyone who calls a broker.

    Args:
        role: which one the verb needs.
    """
    return option(
        "--key",
        envvar="WAKECALL_KEY",
        metavar="KEY",
        callback=_key,
        help=f"Your API key at the broker, of role {role}, if it has keys. Better in the variable: others on this machine"
        " can read command lines.",
    )


def program() -> str:
    """How a shell calls this program again, as it has been called now."""
    called = Path(sys.argv[0])
    if called.stem == "__main__":
        return f"{shlex.quote(sys.executable)} -m wakecall"
    found = shutil.which("wakecall")
    if found is not None and Path(found).resolve() == called.resolve():
        return "wakecall"
    return shlex.quote(sys.argv[0])


def log_options(command: F) -> F:
    """`--log-level` and `--log-format`, for verbs that run until they are stopped."""
    levels = click.Choice(["debug", "info", "warning", "error"])
    formats = click.Choice(["text", "json"])
    command = option(
        "--log-format",
        envvar="WAKECALL_LOG_FORMAT",
        type=formats,
        default="text",
        help="One line of text, or one JSON object, for each thing that happens; on stderr.",
    )(command)
    return option(
        "--log-level", envvar="WAKECALL_LOG_LEVEL", type=levels, default="info", help="What is worth a line."
    )(command)


@asynccontextmanager
async def handle_signals(on_signal: Callable[[int], None], *numbers: signal.Signals) -> AsyncIterator[None]:
    """Call `on_signal` with each SIGINT and SIGTERM (or `numbers`) that comes while the block runs."""

    async def receive(task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(*(numbers or (signal.SIGINT, signal.SIGTERM))) as signals:
            task_status.started()
            async for number in signals:
                on_signal(number)

    error: Exception | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(receive)
        try:
            yield
        except Exception as raised:
            error = raised  # raised outside, for the nursery would put it into a group
        nursery.cancel_scope.cancel()
    if error is not None:
        raise error


def printable(text: str) -> str:
    """`text` with everything that could move a cursor, or break a line, as an escape."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def wants_color(stream: TextIO) -> bool:
    """Whether to colour what goes to `stream`: a terminal, unless `NO_COLOR` (https://no-color.org) is set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
