"""What `pause`, `resume` and `drain` share: whose models are meant, and what was done to them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Final, TypeVar

import click
import msgspec
from click.core import ParameterSource

from ..addresses import api_base, shown
from ..publisher.state import KnownPublisher, known_publishers
from .brokerclient import BrokerRefused, ask, no_broker
from .common import DEFAULT_BROKER, ConfigurationError, F, key_option, option, printable

__all__ = ["change_hold", "change_pause", "json_option", "listed", "which_options"]

_T = TypeVar("_T")
_OWN_ONLY: Final = {"llms": "--llm", "engine": "--engine", "session": "--session"}

json_option = option("--json", "as_json", envvar="WAKECALL_JSON", is_flag=True, help="What the broker says, as JSON.")


class _Own(msgspec.Struct):
    """One of this machine's models (protocol.md, Pause)."""

    status: str
    paused: bool


class _Paused(msgspec.Struct):
    llms: dict[str, _Own]


class _Row(msgspec.Struct):
    """One of a broker's models (protocol.md, Operators)."""

    name: str
    in_flight: int
    paused: bool = False


class _Rows(msgspec.Struct):
    data: list[_Row]


def which_options(command: F) -> F:
    """Which of this machine's publishers, and which of its models; or a broker's model, as an argument."""
    command = json_option(command)
    command = option("--session", envvar="WAKECALL_SESSION", metavar="ID", help="The publisher with this session id.")(
        command
    )
    command = option(
        "--engine", envvar="WAKECALL_ENGINE", metavar="URL", help="The publisher of this engine, if there are several."
    )(command)
    command = option(
        "--llm",
        "llms",
        envvar="WAKECALL_LLMS",
        multiple=True,
        show_default=False,
        metavar="NAME",
        help="Only this model of the publisher. May be given more than once; in the variable, with spaces between.",
    )(command)
    command = key_option("publisher (with LLM: admin)")(command)
    command = option(
        "--broker",
        envvar="WAKECALL_BROKER",
        metavar="URL",
        show_default=f"the publisher's own; with LLM `{DEFAULT_BROKER}`",
        help="The broker's address.",
    )(command)
    return click.argument("llm", required=False, metavar="[LLM]")(command)


# An operator's ------------------------------------------------------------------------------------------------------


def change_hold(verb: str, llm: str, broker: str | None, key: str | None, as_json: bool) -> list[_Row]:
    """Have a broker `drain`, `pause` or `resume` a model, or all of a pool; returns them, once they are printed as JSON.

    Raises:
        click.UsageError: this machine's publisher was meant as well.
        click.ClickException: see `ask`.
    """
    source = click.get_current_context().get_parameter_source
    own = [name for param, name in _OWN_ONLY.items() if source(param) is ParameterSource.COMMANDLINE]
    if own:
        raise click.UsageError(
            f"{own[0]} is about this machine's publisher, and {printable(llm)} about any model of a broker: leave one out."
        )
    address = broker or DEFAULT_BROKER
    try:
        body = ask(address, f"/admin/v1/{verb}", key=key, method="POST", said={"llm": llm}).body
    except BrokerRefused as error:
        if error.code == "forbidden" and verb != "drain":
            hint = f"For a model of this machine's publisher: `wakecall {verb} --llm {printable(llm)}`."
            raise type(error)(f"{error.message} {hint}", error.status, error.code) from error
        raise
    rows = _decoded(body, _Rows, address).data
    if as_json:
        click.echo(json.dumps(json.loads(body)["data"], indent=2))
    return rows


# This machine's own -------------------------------------------------------------------------------------------------


def change_pause(
    verb: str,
    *,
    broker: str | None,
    key: str | None,
    llms: Sequence[str],
    engine: str | None,
    session: str | None,
    as_json: bool,
) -> list[str]:
    """`pause` or `resume` a publisher of this machine: the names of the models that this was about.

    Raises:
        ConfigurationError: there are several.
        click.ClickException: there is none, the broker does not know it, or see `ask`.
    """
    chosen = _choose(known_publishers(), broker, engine, session)
    address = broker or chosen.broker
    said = {"llms": list(llms)} if llms else {}
    path = f"/publisher/v1/sessions/{chosen.session_id}/{verb}"
    try:
        body = ask(address, path, key=key, role="publisher", method="POST", said=said).body
    except BrokerRefused as error:
        if error.code == "session_not_found":
            raise click.ClickException(
                f"The broker at {printable(shown(address))} does not know this machine's publisher of"
                f" {printable(chosen.engine or chosen.session_id)}: does it run, and with this API key?"
            ) from error
        if error.code == "forbidden":
            hint = f"An operator names the model: `wakecall {verb} LLM`."
            raise type(error)(f"{error.message} {hint}", error.status, error.code) from error
        raise
    rows = _decoded(body, _Paused, address).llms
    if as_json:
        click.echo(json.dumps(json.loads(body), indent=2))
    return [name for name in rows if not llms or name in llms]


def _choose(
    known: Iterable[KnownPublisher], broker: str | None, engine: str | None, session: str | None
) -> KnownPublisher:
    with_broker = None if broker is None else _plain(broker, "--broker").rstrip("/")
    with_engine = None if engine is None else api_base(_plain(engine, "--engine"))
    found = [
        each
        for each in known
        if with_broker in (None, each.broker)
        and with_engine in (None, each.engine)
        and (session is None or each.session_id == session)
    ]
    # One that is over leaves its file behind, for it may come back.
    found = [each for each in found if each.is_running] or found
    if len(found) == 1:
        return found[0]
    if found:
        lines = [f"--broker {each.broker} --engine {each.engine} --session {each.session_id}" for each in found]
        raise ConfigurationError(
            "\n  ".join(
                ["There are several publishers on this machine; say which one is meant:", *map(printable, lines)]
            )
        )
    named = any(value is not None for value in (broker, engine, session))
    raise click.ClickException(
        f"No publisher{' like that' if named else ''} is known on this machine, to this user: see `wakecall publish --help`."
        " A model of a broker is named without a dash: see --help."
    )


def _plain(url: str, name: str) -> str:
    try:
        return shown(url)
    except ValueError as error:
        raise click.BadParameter("this is no http:// or https:// URL", param_hint=name) from error


def _decoded(body: bytes, kind: type[_T], broker: str) -> _T:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        raise click.ClickException(no_broker(broker)) from error


def listed(names: Iterable[str]) -> str:
    """Names in a sentence."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
