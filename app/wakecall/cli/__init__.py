"""The command line.

This module loads click and nothing else: the module of a verb, with all that it needs, loads when the verb is asked for.
So `wakecall --help` is quick, and so is the engine of the demo, which lives beside it.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any, Final

import click

__all__ = ["main"]

#: Each verb is the `command` of the module of its name; the help of all verbs together has to do without the modules.
VERBS: Final = {
    "serve": "Run a broker.",
    "publish": "Publish the models of an engine on a broker.",
    "pause": "Pause this machine's publisher, or a model of a broker.",
    "resume": "Resume what has been paused or drained.",
    "ls": "List the models of a broker.",
    "drain": "Drain a model of a broker.",
    "aliases": "Give models names of an operator's own.",
    "usage": "Show who used how much.",
    "keys": "Make, list and revoke API keys.",
    "demo": "See everything work, in one go, on this machine.",
}


class Verbs(click.Group):
    """A group whose commands load on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = import_module(f".{cmd_name}", __name__).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """As click's, but an interrupt ends with what a shell expects of one, wherever it comes."""

        def run() -> Any:
            return super(Verbs, self).main(
                args, prog_name, complete_var, False, windows_expand_args=windows_expand_args, **extra
            )

        if not standalone_mode:
            return run()
        try:
            result = run()
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            sys.exit(128 + signal.SIGINT)
        # `ctx.exit` comes back as a code, a command that just returns as None.
        sys.exit(result if isinstance(result, int) else 0)


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"wakecall {version('wakecall')}")
        ctx.exit()


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
def main() -> None:
    """A broker for virtual LLMs: one OpenAI-compatible address for models on machines that nobody can call.

    See it work with `wakecall demo`. Every option can also be given by the variable that its help names.
    """
