"""`wakecall ls`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final
from urllib.parse import urlsplit

import click
import httpx2
import msgspec

from ..http.sockets import is_loopback
from ..publisher.config import shown
from ..publisher.errors import InvalidConfig
from ..publisher.trust import describe_tls, trust_for
from . import VERBS
from .common import ConfigurationError, SectionedCommand, broker_option, option, printable

__all__ = ["age", "command"]

_PATIENCE_S: Final = 10.0
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
    session_id: str | None = None
    last_heartbeat_at: str | None = None


class _Listing(msgspec.Struct):
    data: list[_Row]


class _Error(msgspec.Struct):
    message: str


class _ErrorBody(msgspec.Struct):
    error: _Error


@click.command("ls", cls=SectionedCommand, short_help=VERBS["ls"])
@broker_option
@option("--json", "as_json", envvar="WAKECALL_JSON", is_flag=True, help="What the broker says, as a JSON list.")
def command(broker: str, as_json: bool) -> None:
    """List the models of a broker: whose they are, how they stand, and what they have to do."""
    body, now = _fetch(broker, "/admin/v1/llms")
    try:
        rows = msgspec.json.decode(body, type=_Listing).data
    except msgspec.MsgspecError as error:
        raise click.ClickException(_no_broker(broker)) from error
    if as_json:
        click.echo(json.dumps(json.loads(body)["data"], indent=2))
    elif rows:
        _print_table(rows, now)
    else:
        click.echo("Nothing is published here yet: see `wakecall publish --help`.", err=True)


def _fetch(broker: str, path: str) -> tuple[bytes, datetime]:
    """A GET's body, and the broker's own time: ages are wrong by whatever two clocks differ."""
    try:
        parts = urlsplit(broker)
        host = parts.hostname if parts.scheme in ("http", "https") else None
    except ValueError:
        host = None
    if not host:
        raise click.BadParameter("this is no http:// or https:// URL", param_hint="--broker")
    try:
        verify = trust_for(broker)
    except InvalidConfig as error:
        raise ConfigurationError(f"{printable(str(error))}.") from error
    try:
        # A proxy from the environment has no business between two processes of one machine.
        with httpx2.Client(timeout=_PATIENCE_S, trust_env=not is_loopback(host), verify=verify) as client:
            answer = client.get(broker.rstrip("/") + path)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        if (tls := describe_tls(error)) is not None:
            raise click.ClickException(f"There is no secure way to {printable(shown(broker))}: {tls}.") from error
        why = "it took too long" if isinstance(error, httpx2.TimeoutException) else printable(str(error))
        raise click.ClickException(
            f"No broker answers at {printable(shown(broker))} ({why}). Start one with `wakecall serve`, or name another with"
            " --broker."
        ) from error
    if answer.status_code != 200:
        try:
            said = msgspec.json.decode(answer.content, type=_ErrorBody).error.message
        except msgspec.MsgspecError:
            said = _no_broker(broker)
        raise click.ClickException(f"{printable(said)} (HTTP {answer.status_code})")
    try:
        now = parsedate_to_datetime(answer.headers["date"])
    except (KeyError, ValueError):
        now = datetime.now(UTC)
    return answer.content, now


def _no_broker(broker: str) -> str:
    return f"What answers at {printable(shown(broker))} is no Wakecall broker. Name one with --broker."


def age(then: str | None, now: datetime) -> str:
    """How long ago an RFC 3339 instant was, in the largest unit that fits."""
    try:
        seconds = (now - datetime.fromisoformat(then or "")).total_seconds()
    except (ValueError, TypeError):
        return "-"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return "now"


def _status(row: _Row) -> str:
    if row.waking:
        return f"{row.status}, waking"
    if row.kind == "virtual" and row.status != "inactive" and not row.routable:
        return f"{row.status}, no channel"
    return row.status


def _print_table(rows: Sequence[_Row], now: datetime) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    # Piped, nothing is folded to fit a width: one row, one line.
    console = Console() if terminal else Console(width=10_000)
    table = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False, header_style="bold")
    for column in ("name", "kind", "status", "session"):
        table.add_column(column.upper(), overflow="fold")
    for column in ("in flight", "waiting", "last heartbeat"):
        table.add_column(column.upper(), justify="right")
    for row in rows:
        cells = [row.name, row.kind, _status(row), row.session_id or "-", str(row.in_flight), str(row.waiting)]
        heartbeat = age(row.last_heartbeat_at, now) if row.kind == "virtual" else "-"
        texts = [Text(printable(cell)) for cell in (*cells, heartbeat)]
        texts[2].stylize(_STYLES.get(row.status, ""))
        table.add_row(*texts)
    console.print(table)
