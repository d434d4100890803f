"""`wakecall keys`."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource

from ..keys import ROLES, is_owner, is_pattern
from . import VERBS
from .common import ConfigurationError, F, SectionedCommand, broker_option, key_option, option, printable, program
from .database import DEFAULT_DB, IN_MEMORY, default_db
from .keyplaces import BrokerKeys, FileKeys, Key, Made, parsed
from .tables import Cell, age, print_table, time_left

if TYPE_CHECKING:
    from ..models import Role

__all__ = ["command"]

_DAY_S: Final = 86400.0
_COLUMNS: Final = ("id", "role", "owner", "name", "models", "limits", "created", "expires")
_FOR_WHOM: Final = {
    "client": "For OpenAI's and Anthropic's SDKs it is the API key: export OPENAI_API_KEY=…, or ANTHROPIC_API_KEY=…",
    "publisher": "On the publisher's machine: export WAKECALL_KEY=…, then `wakecall publish`.",
    "admin": "To operate the broker: export WAKECALL_KEY=…, then `wakecall keys` and `wakecall ls`.",
    "monitor": "For Prometheus, in its scrape_config: authorization: {credentials: …}",
}


@click.group("keys", short_help=VERBS["keys"])
def command() -> None:
    """Make, list and revoke API keys.

    A broker's first key closes it: from then on every call needs one. Those of a running broker are reached through it
    (--broker), with a key of role admin; those in a file that no broker has open, directly (--db).
    """


def _place_options(command: F) -> F:
    """Whose keys: `--broker` and `--key`, or `--db`."""
    command = option(
        "--db",
        envvar="WAKECALL_DB",
        metavar="[PATH]",
        is_flag=False,
        flag_value="",
        help=f"The keys in this file, which no broker has open; without a path, in the one that `serve` takes:"
        f" WAKECALL_DB, or {DEFAULT_DB}.",
    )(command)
    return broker_option(key_option("admin")(command))


def _place(broker: str, key: str | None, db: str | None) -> BrokerKeys | FileKeys:
    """Where the keys are that were meant.

    What is on the command line counts before variables, and of these the broker's: whoever may call a running broker
    need not stop it.
    """
    source = click.get_current_context().get_parameter_source
    by_broker, by_db = source("broker"), source("db")
    if by_db is ParameterSource.COMMANDLINE:
        if by_broker is ParameterSource.COMMANDLINE:
            raise click.UsageError("--broker and --db are two places for keys: name one of them.")
        path = os.path.expanduser(db or os.environ.get("WAKECALL_DB") or default_db())
        if path == IN_MEMORY:
            raise ConfigurationError(f"{IN_MEMORY} keeps no keys: name a file with --db, or a broker with --broker.")
        return FileKeys(path)
    if db and db != IN_MEMORY and by_broker not in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT):
        return FileKeys(os.path.expanduser(db))
    return BrokerKeys(broker, key)


# Making -------------------------------------------------------------------------------------------------------------


def _patterns(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> list[str] | None:
    patterns = [each for value in values for each in re.split(r"[,\s]+", value) if each]
    if values and not patterns:
        # An unset variable in a script must not open everything.
        raise click.BadParameter("it names no model; leave it out for all of them", ctx, param)
    for pattern in patterns:
        if not is_pattern(pattern):
            raise click.BadParameter(f"{printable(pattern)} is no model's name, with * for any characters", ctx, param)
    return patterns or None


def _owner(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value and not is_owner(value):
        raise click.BadParameter(
            "an owner is 1 to 128 of A-Z a-z 0-9 . _ : @ -, and begins with a letter or a digit", ctx, param
        )
    return value or None


def _seconds(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise click.BadParameter("a key lives for some time: a number of days above 0", ctx, param)
    return None if value is None else value * _DAY_S


@command.command("create", cls=SectionedCommand, short_help="Make a key, and show it this once.")
@click.argument("role", type=click.Choice(ROLES), metavar="ROLE")
@_place_options
@option("--name", envvar="WAKECALL_KEY_NAME", help="For people: who has it, say.")
@option(
    "--owner",
    envvar="WAKECALL_KEY_OWNER",
    callback=_owner,
    help="Whose sessions, names and tasks its holder's are; the key's own id, if left out. Keys of one owner share them;"
    " `local` is the owner of what was published without keys.",
)
@option(
    "--llms",
    envvar="WAKECALL_KEY_LLMS",
    multiple=True,
    callback=_patterns,
    metavar="PATTERN",
    show_default=False,
    help="The only models that a client may use, or names that a publisher may take; * stands for any characters. May be"
    " given several times; several in one are separated by commas or spaces.",
)
@option(
    "--rpm", envvar="WAKECALL_KEY_RPM", type=click.IntRange(min=1), metavar="N", help="A client's requests a minute."
)
@option(
    "--max-in-flight",
    envvar="WAKECALL_KEY_MAX_IN_FLIGHT",
    type=click.IntRange(min=1),
    metavar="N",
    help="A client's requests at a time.",
)
@option(
    "--expires",
    "expires_in_s",
    envvar="WAKECALL_KEY_EXPIRES",
    type=float,
    callback=_seconds,
    metavar="DAYS",
    help="How long it lives, in days; parts of a day are fine.",
)
def create(role: Role, broker: str, key: str | None, db: str | None, **settings: Any) -> None:
    """Make a key of ROLE and print it: the one time that it is shown.

    ROLE is client (calls models), publisher (publishes them), admin (operates the broker) or monitor (reads /metrics, and
    nothing else). None of them does what another does, but for an admin, who may read /metrics.
    """
    asked = {name: value for name, value in settings.items() if value is not None}
    place = _place(broker, key, db)
    made = place.create(role, asked)
    # Alone on stdout, for KEY=$(wakecall keys create client).
    click.echo(printable(made.key.key))
    for line in [*_about(made.key), *_next_steps(made, place)]:
        click.echo(printable(line), err=True)


def _about(key: Key) -> list[str]:
    name = f" ({key.name})" if key.name else ""
    said = [
        f"This key is shown once and kept nowhere. Its id is {key.id}{name}, its role {key.role}, its owner {key.owner}."
    ]
    bounds = []
    if key.llms is not None:
        bounds.append(f"{'publishes' if key.role == 'publisher' else 'opens'} only {', '.join(key.llms)}")
    if limits := _limits(key):
        bounds.append(f"makes at most {limits}")
    if key.expires_at is not None:
        bounds.append(f"expires at {key.expires_at}")
    return said + ([f"It {'; it '.join(bounds)}."] if bounds else [])


def _next_steps(made: Made, place: BrokerKeys | FileKeys) -> list[str]:
    role = made.key.role
    said = [_FOR_WHOM[role]] if role in _FOR_WHOM else []
    if not made.is_first:
        return said
    if isinstance(place, BrokerKeys):
        return [
            *said,
            "The broker is open no more: publishers and clients need keys of their own. What has been published so far is"
            " of the owner `local`.",
        ]
    named = f" --db {shlex.quote(place.path)}"
    if role != "admin":
        return [*said, f"To operate the broker there has to be one more: `{program()} keys create admin{named}`."]
    if place.path in (os.environ.get("WAKECALL_DB"), default_db()):
        named = ""
    return [*said, f"To serve others too: `{program()} serve --host 0.0.0.0{named}`."]


# Listing ------------------------------------------------------------------------------------------------------------


@command.command("ls", cls=SectionedCommand, short_help="List the keys: whose they are, what they open, until when.")
@_place_options
@option("--json", "as_json", envvar="WAKECALL_JSON", is_flag=True, help="What the broker says, as a JSON list.")
def ls(broker: str, key: str | None, db: str | None, as_json: bool) -> None:
    """List the keys: whose they are, what they open, until when. The keys themselves nobody can show."""
    data, now = _place(broker, key, db).listing()
    if as_json:
        click.echo(json.dumps(data, indent=2))
    elif data:
        print_table(_COLUMNS, [_row(each, now) for each in parsed(data)])
    else:
        click.echo("There are no keys: see `wakecall keys create --help`.", err=True)


def _row(key: Key, now: datetime) -> list[str | Cell]:
    models = "-" if key.role in ("admin", "monitor") else ", ".join(key.llms) if key.llms is not None else "all"
    if key.expired:
        expires = Cell(f"expired {age(key.expires_at, now)}", "red")
    else:
        expires = Cell("never" if key.expires_at is None else time_left(key.expires_at, now))
    head = [key.id, key.role, key.owner, key.name or "-"]
    return [*head, models, _limits(key) or "-", age(key.created_at, now), expires]


def _limits(key: Key) -> str:
    limits = []
    if key.rpm is not None:
        limits.append(f"{key.rpm} a minute")
    if key.max_in_flight is not None:
        limits.append(f"{key.max_in_flight} at a time")
    return ", ".join(limits)


# Revoking -----------------------------------------------------------------------------------------------------------


@command.command("revoke", cls=SectionedCommand, short_help="Revoke a key, at once.")
@click.argument("key_id", metavar="ID")
@_place_options
def revoke(key_id: str, broker: str, key: str | None, db: str | None) -> None:
    """Revoke the key of this ID: the next request with it is refused, and a publisher's sessions and channels end."""
    place = _place(broker, key, db)
    were = place.revoke(key_id)
    revoked = next((each for each in were if each.id == key_id), None)
    said = f"Revoked {key_id}"
    if revoked is not None:
        name = f" ({revoked.name})" if revoked.name else ""
        said += f"{name} of role {revoked.role}"
        if revoked.role == "publisher":
            said += ": its sessions and channels have ended"
    click.echo(printable(f"{said}."), err=True)
    if isinstance(place, FileKeys) and not any(
        each.id != key_id and each.role == "admin" and not each.expired for each in were
    ):
        # Through a running broker this cannot happen: it would lock out whoever operates it.
        click.echo(
            "There is no key of role admin any more."
            if len(were) > 1
            else "That was the last one: a broker without keys listens on loopback alone, and is open there.",
            err=True,
        )
