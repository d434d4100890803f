"""`wakecall aliases`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final
from urllib.parse import quote

import click
import msgspec

from ..models import is_llm_name
from . import VERBS
from .brokerclient import ask, no_broker
from .common import SectionedCommand, broker_option, key_option, option, printable
from .tables import Cell, print_table

__all__ = ["command"]

_COLUMNS: Final = ("name", "target", "fallbacks", "routable")


class _Alias(msgspec.Struct):
    """What is shown of an alias (protocol.md, Operators)."""

    name: str
    target: str
    fallbacks: list[str]
    routable: bool


class _Listing(msgspec.Struct):
    data: list[_Alias]


@click.group("aliases", short_help=VERBS["aliases"])
def command() -> None:
    """Give models names of an operator's own, with others to fall back on.

    An alias stands for a model or a pool. Its fallbacks are tried in order while those before are offline or full, or have
    refused a request themselves.
    """


def _path(name: str) -> str:
    return f"/admin/v1/aliases/{quote(name, safe='/')}"


def _name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not is_llm_name(value):
        # It becomes part of a path, and may be anything.
        raise click.BadParameter(f"{printable(value)} is no name that a model could have", ctx, param)
    return value


@command.command("set", cls=SectionedCommand, short_help="Make an alias, or change where it leads.")
@click.argument("name", metavar="NAME", callback=_name)
@click.argument("target", metavar="TARGET")
@click.argument("fallbacks", metavar="[FALLBACK]...", nargs=-1)
@broker_option
@key_option("admin")
def set_(name: str, target: str, fallbacks: Sequence[str], broker: str, key: str | None) -> None:
    """Have NAME lead to TARGET, a model or a pool, and where that cannot take a request to the FALLBACKs in their order.

    It comes before a model or a pool of its name.
    """
    body = ask(broker, _path(name), key=key, method="PUT", said={"target": target, "fallbacks": list(fallbacks)}).body
    try:
        alias = msgspec.json.decode(body, type=_Alias)
    except msgspec.MsgspecError as error:
        raise click.ClickException(no_broker(broker)) from error
    ways = ", then ".join([alias.target, *alias.fallbacks])
    idle = "" if alias.routable else " None of them can take a request now."
    click.echo(printable(f"{alias.name} leads to {ways}.{idle}"), err=True)


@command.command("ls", cls=SectionedCommand, short_help="List the aliases, and where they lead.")
@broker_option
@key_option("admin")
@option("--json", "as_json", envvar="WAKECALL_JSON", is_flag=True, help="What the broker says, as a JSON list.")
def ls(broker: str, key: str | None, as_json: bool) -> None:
    """List the aliases, where they lead, and whether a request for them can be taken now."""
    body = ask(broker, "/admin/v1/aliases", key=key).body
    try:
        aliases = msgspec.json.decode(body, type=_Listing).data
    except msgspec.MsgspecError as error:
        raise click.ClickException(no_broker(broker)) from error
    if as_json:
        click.echo(json.dumps(json.loads(body)["data"], indent=2))
    elif aliases:
        print_table(_COLUMNS, [_row(alias) for alias in aliases])
    else:
        click.echo("There are no aliases: see `wakecall aliases set --help`.", err=True)


def _row(alias: _Alias) -> list[str | Cell]:
    routable = Cell("yes", "green") if alias.routable else Cell("no", "dim")
    return [alias.name, alias.target, ", ".join(alias.fallbacks) or "-", routable]


@command.command("rm", cls=SectionedCommand, short_help="Remove an alias; what it led to stays.")
@click.argument("name", metavar="NAME", callback=_name)
@broker_option
@key_option("admin")
def rm(name: str, broker: str, key: str | None) -> None:
    """Remove the alias NAME. What it led to stays as it is."""
    ask(broker, _path(name), key=key, method="DELETE")
    click.echo(printable(f"Removed {name}."), err=True)
