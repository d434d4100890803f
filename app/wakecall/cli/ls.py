"""`wakecall ls`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Final

import click
import msgspec

from . import VERBS
from .brokerclient import ask, no_broker
from .common import SectionedCommand, broker_option, key_option, option
from .tables import Cell, age, print_table

__all__ = ["command"]

_STYLES: Final = {"active": "green", "hibernating": "yellow", "inactive": "dim"}


class _Row(msgspec.Struct):
    """What is shown of an LLM (protocol.md, Operators)."""

    name: str
    kind: str
    status: str
    in_flight: int
    waiting: int
    waking: bool = False
    routable: bool = True
    hold: str | None = None
    paused: bool = False
    session_id: str | None = None
    last_heartbeat_at: str | None = None


class _Listing(msgspec.Struct):
    data: list[_Row]


@click.command("ls", cls=SectionedCommand, short_help=VERBS["ls"])
@broker_option
@key_option("admin")
@option("--json", "as_json", envvar="WAKECALL_JSON", is_flag=True, help="What the broker says, as a JSON list.")
def command(broker: str, key: str | None, as_json: bool) -> None:
    """List the models of a broker: whose they are, how they stand, and what they have to do."""
    body, now = ask(broker, "/admin/v1/llms", key=key)
    try:
        rows = msgspec.json.decode(body, type=_Listing).data
    except msgspec.MsgspecError as error:
        raise click.ClickException(no_broker(broker)) from error
    if as_json:
        click.echo(json.dumps(json.loads(body)["data"], indent=2))
    elif rows:
        _print_table(rows, now)
    else:
        click.echo("Nothing is published here yet: see `wakecall publish --help`.", err=True)


def _status(row: _Row) -> str:
    if row.waking:
        return f"{row.status}, waking"
    if row.paused or row.hold == "pause":
        return f"{row.status}, paused"
    if row.hold == "drain":
        return f"{row.status}, draining"
    if row.kind == "virtual" and row.status != "inactive" and not row.routable:
        return f"{row.status}, no channel"
    return row.status


def _print_table(rows: Sequence[_Row], now: datetime) -> None:
    columns = ("name", "kind", "status", "session", "in flight", "waiting", "last heartbeat")
    table: list[list[str | Cell]] = []
    for row in rows:
        heartbeat = age(row.last_heartbeat_at, now) if row.kind == "virtual" else "-"
        status = Cell(_status(row), _STYLES.get(row.status, ""))
        table.append(
            [row.name, row.kind, status, row.session_id or "-", str(row.in_flight), str(row.waiting), heartbeat]
        )
    print_table(columns, table, right=("in flight", "waiting", "last heartbeat"))
