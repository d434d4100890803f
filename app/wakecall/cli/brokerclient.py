"""What verbs ask a broker over HTTP, and what went wrong when no answer comes of it."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import click
import httpx2
import msgspec

from ..addresses import is_loopback, shown
from ..keys import header_for, role_of
from ..models import Role
from ..outbound import describe_tls
from ..publisher.errors import InvalidConfig
from ..publisher.trust import trust_for
from .common import ConfigurationError, printable

__all__ = ["BrokerAnswer", "BrokerRefused", "ask", "no_broker"]

_PATIENCE_S: Final = 10.0


class _Error(msgspec.Struct):
    message: str
    code: str | None = None


class _ErrorBody(msgspec.Struct):
    error: _Error


class BrokerAnswer(NamedTuple):
    """A body, and the broker's own time: ages are wrong by whatever two clocks differ."""

    body: bytes
    now: datetime


class BrokerRefused(click.ClickException):
    """The broker answered with an error.

    Args:
        message: for a person.
        status: of the response.
        code: the protocol's; empty if it is not a broker's answer.
    """

    def __init__(self, message: str, status: int, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class LastingRefusal(BrokerRefused):
    """One that another key or another value would change, and time would not."""

    exit_code = ConfigurationError.exit_code


def ask(
    broker: str,
    path: str,
    *,
    key: str | None = None,
    role: Role = "admin",
    method: str = "GET",
    said: dict[str, Any] | None = None,
) -> BrokerAnswer:
    """One request to a broker.

    Args:
        broker: its address.
        path: below that.
        key: None: without.
        role: the one that the key has to have.
        method: the HTTP method.
        said: the request's JSON; None: it has no body.

    Raises:
        click.BadParameter: this is no address.
        ConfigurationError: the CAs to trust cannot be read.
        BrokerRefused: it does not do it.
        click.ClickException: nobody answers there, or no broker does.
    """
    where, host = _shown(broker)
    headers = {} if key is None else header_for(key, broker)
    try:
        verify = trust_for(broker)
    except InvalidConfig as error:
        raise ConfigurationError(f"{printable(str(error))}.") from error
    try:
        # A proxy from the environment has no business between two processes of one machine.
        with httpx2.Client(timeout=_PATIENCE_S, trust_env=not is_loopback(host), verify=verify) as client:
            answer = client.request(method, broker.rstrip("/") + path, headers=headers, json=said)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        if (tls := describe_tls(error)) is not None:
            raise click.ClickException(f"There is no secure way to {where}: {tls}.") from error
        why = "it took too long" if isinstance(error, httpx2.TimeoutException) else printable(str(error))
        raise click.ClickException(
            f"No broker answers at {where} ({why}). Start one with `wakecall serve`, or name another with --broker."
        ) from error
    if not 200 <= answer.status_code < 300:
        raise _refused(answer, where, broker, key, role)
    try:
        now = parsedate_to_datetime(answer.headers["date"])
    except (KeyError, ValueError):
        now = datetime.now(UTC)
    return BrokerAnswer(answer.content, now)


def no_broker(broker: str) -> str:
    """What to say of an answer that is none of a broker's."""
    return f"What answers at {_shown(broker)[0]} is no Wakecall broker. Name one with --broker."


def _shown(broker: str) -> tuple[str, str]:
    """An address without its password, fit for a terminal, and its host. Raises click.BadParameter: it is none."""
    try:
        parts = urlsplit(broker)
        host = parts.hostname if parts.scheme in ("http", "https") else None
        if host:
            return printable(shown(broker)), host
    except ValueError:
        pass
    raise click.BadParameter("this is no http:// or https:// URL", param_hint="--broker")


def _refused(answer: httpx2.Response, where: str, broker: str, key: str | None, role: Role) -> BrokerRefused:
    status = answer.status_code
    try:
        error = msgspec.json.decode(answer.content, type=_ErrorBody).error
    except msgspec.MsgspecError:
        return BrokerRefused(f"{no_broker(broker)} (HTTP {status})", status, "")
    code, message = error.code or "", f"{printable(error.message)} (HTTP {status})"
    if code == "invalid_api_key":
        if key is None:
            message = f"The broker at {where} wants an API key. Put one of role {role} into WAKECALL_KEY."
        else:
            message += ". That is about what WAKECALL_KEY or --key says."
    elif code == "forbidden" and key is not None and (given := role_of(key)) not in (None, role):
        message = f"The broker at {where} takes a key of role {role} for this, and it was given one of role {given}."
    kind = LastingRefusal if code and status in (400, 401, 403, 409) else BrokerRefused
    return kind(message, status, code)
