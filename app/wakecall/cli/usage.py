"""`wakecall usage`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final
from urllib.parse import urlencode

import click
import msgspec

from ..ledger import OTHERS
from . import VERBS
from .brokerclient import BrokerRefused, ask, no_broker
from .common import SectionedCommand, broker_option, key_option, option, printable
from .tables import Cell, print_table

__all__ = ["command"]

_COUNTS: Final = ("requests", "completed", "failed", "cancelled", "tokens in", "tokens out", "unknown", "seconds")


class _Used(msgspec.Struct):
    """What is shown of a sum (docs/reference/http.md, Operators' paths)."""

    requests: int
    completed: int
    failed: int
    cancelled: int
    unknown: int
    tokens_in: int
    tokens_out: int
    seconds: float
    key_id: str | None = None
    key_name: str | None = None
    llm: str | None = None


class _Listing(msgspec.Struct):
    since: str
    data: list[_Used]


@click.command("usage", cls=SectionedCommand, short_help=VERBS["usage"])
@broker_option
@key_option("admin")
@option(
    "--by",
    envvar="WAKECALL_USAGE_BY",
    type=click.Choice(["key", "llm"]),
    default="key",
    help="What it is summed by.",
)
@option(
    "--since",
    envvar="WAKECALL_USAGE_SINCE",
    metavar="WHEN",
    default="24h",
    help="From when on: hours (24h) or days (7d) ago, a date (2026-11-01, in UTC) or an instant (2026-11-01T12:00:00Z).",
)
@option("--json", "as_json", envvar="WAKECALL_JSON", is_flag=True, help="What the broker says, as a JSON list.")
def command(broker: str, key: str | None, by: str, since: str, as_json: bool) -> None:
    """Show who used how much: requests, tokens and seconds, by key or by model."""
    try:
        body, _ = ask(broker, f"/admin/v1/usage?{urlencode({'by': by, 'since': since})}", key=key)
    except BrokerRefused as error:
        if error.code == "invalid_request":
            # Of the two only this can be wrong: the other is a choice.
            raise click.BadParameter(
                f"{printable(since)} is neither a span (24h, 7d) nor a date (2026-11-01) nor an instant",
                param_hint="--since",
            ) from error
        raise
    try:
        listing = msgspec.json.decode(body, type=_Listing)
    except msgspec.MsgspecError as error:
        raise click.ClickException(no_broker(broker)) from error
    if as_json:
        click.echo(json.dumps(json.loads(body)["data"], indent=2))
    elif listing.data:
        _print_table(listing.data, by)
    else:
        click.echo(f"Nothing has been used since {printable(listing.since)}.", err=True)


def _print_table(data: Sequence[_Used], by: str) -> None:
    table: list[list[str | Cell]] = []
    for used in data:
        if by == "llm":
            who: list[str | Cell] = [_shown(used.llm)]
        else:
            who = [_shown(used.key_id), used.key_name or "-"]
        counts = (used.requests, used.completed, used.failed, used.cancelled, used.tokens_in, used.tokens_out)
        unknown = Cell(str(used.unknown), "yellow" if used.unknown else "")
        table.append([*who, *map(str, counts), unknown, f"{used.seconds:.1f}"])
    print_table((*(("llm",) if by == "llm" else ("key", "name")), *_COUNTS), table, right=_COUNTS)


def _shown(name: str | None) -> str:
    return "others" if name == OTHERS else name or "-"
