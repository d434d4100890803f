"""`wakecall serve`."""

from __future__ import annotations

import gc
import logging
import os
import shlex
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import fields
from functools import partial
from typing import Any, Final

import click
import trio

from ..broker import Broker, open_broker
from ..config import BrokerConfig
from ..serving import BadCertificate, CannotBind, InvalidOrigin, KeysRequired, Reload, ServeConfig, Stop, serve
from ..store import StoreError
from ..store.sqlite import open_sqlite_store
from ..upstream import open_httpx_upstream
from . import VERBS
from .common import (
    ConfigurationError,
    F,
    SectionedCommand,
    handle_signals,
    log_options,
    option,
    printable,
    program,
)
from .database import DEFAULT_DB, IN_MEMORY, default_db
from .logs import configure_logging, log_broker_event

__all__ = ["command"]

logger = logging.getLogger("wakecall.server")

_SERVING: Final = ServeConfig()


def _setting_options(command: F) -> F:
    """One option and one variable for each setting of the broker, made from what its record says of it."""
    for each in reversed(fields(BrokerConfig)):
        unit = each.metadata["unit"]
        of_times = unit == "s"
        name = "--grace" if each.name == "grace_s" else f"--{each.name.replace('_', '-')}"
        doc = each.metadata["doc"]
        command = option(
            name,
            each.name,
            envvar=f"WAKECALL_{each.name.upper()}",
            type=float if of_times else int,
            # A whole number without its ".0" in the help; click makes a float of it.
            default=int(each.default) if each.default == int(each.default) else each.default,
            metavar="SECONDS" if of_times else (unit.upper() or "COUNT"),
            help=f"{doc[0].upper()}{doc[1:]}.",
            section="" if each.name == "grace_s" else "Times, in seconds" if of_times else "Bounds",
        )(command)
    return command


def _connection_options(command: F) -> F:
    """What one connection may take, and how many there may be: the settings of `ServeConfig` that are no addresses."""
    for name, what in reversed(
        (
            ("keep_alive_s", "A connection may be idle between two requests for so long."),
            ("head_s", "A request's head has so long from its first byte to its last, and so has a TLS handshake."),
            ("body_s", "All of a request's body has so long, a publisher's upload of an answer excepted."),
        )
    ):
        command = option(
            f"--{name.replace('_', '-')}",
            envvar=f"WAKECALL_{name.upper()}",
            type=float,
            default=int(getattr(_SERVING, name)),
            metavar="SECONDS",
            help=what,
            section="Times, in seconds",
        )(command)
    return option(
        "--max-connections",
        envvar="WAKECALL_MAX_CONNECTIONS",
        type=int,
        metavar="COUNT",
        show_default="as many as there are descriptors for",
        help="Connections at a time. Beyond it the idle make room.",
        section="Bounds",
    )(command)


@click.command("serve", cls=SectionedCommand, short_help=VERBS["serve"])
@option(
    "--host",
    envvar="WAKECALL_HOST",
    default="127.0.0.1",
    help="Where to listen. Where others can reach it there must be a key: see `wakecall keys`.",
)
@option("--port", envvar="WAKECALL_PORT", type=click.IntRange(0, 65535), default=8080, help="0 takes a free one.")
@option(
    "--db",
    envvar="WAKECALL_DB",
    metavar="PATH",
    default=default_db,
    show_default=DEFAULT_DB,
    help=f"The SQLite file in which rows, sessions and keys outlive the broker; {IN_MEMORY} for none.",
)
@option(
    "--open",
    "is_open",
    envvar="WAKECALL_OPEN",
    is_flag=True,
    help="Listen without keys wherever that is: whoever reaches it may use, replace and delete every model.",
)
@option(
    "--certfile",
    envvar="WAKECALL_CERTFILE",
    metavar="PATH",
    help="Speak TLS, with the certificate (PEM, its chain behind it) in this file. Read again on SIGHUP.",
)
@option("--keyfile", envvar="WAKECALL_KEYFILE", metavar="PATH", help="The certificate's key (PEM, without a password).")
@option(
    "--cors",
    envvar="WAKECALL_CORS",
    multiple=True,
    metavar="ORIGIN",
    help="Let web pages of this origin, such as https://chat.example.com, call what is under /v1; * for all. May be given"
    " more than once; in the variable, with spaces between.",
)
@log_options
@_setting_options
@_connection_options
def command(
    host: str,
    port: int,
    db: str,
    is_open: bool,
    certfile: str | None,
    keyfile: str | None,
    cors: tuple[str, ...],
    log_level: str,
    log_format: str,
    keep_alive_s: float,
    head_s: float,
    body_s: float,
    max_connections: int | None,
    **settings: Any,
) -> None:
    """Run a broker: one OpenAI-compatible address for all that publishers publish on it.

    The address is printed on stdout as soon as it can be called; what happens then is told on stderr, one line each.
    SIGINT and SIGTERM stop it: nothing new is taken, what is under way has the grace to end. A second one skips that. With
    --certfile, SIGHUP has it read the certificate and its key again; without, it does nothing.
    """
    try:
        config = BrokerConfig(**settings)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    try:
        where = ServeConfig(
            host=host,
            port=port,
            open=is_open,
            certfile=_expanded(certfile),
            keyfile=_expanded(keyfile),
            cors=cors,
            keep_alive_s=keep_alive_s,
            head_s=head_s,
            body_s=body_s,
            max_connections=max_connections,
        )
    except InvalidOrigin as error:
        raise click.BadParameter(printable(f"{error}."), param_hint="--cors") from error
    except BadCertificate as error:
        raise ConfigurationError(_sentence(error)) from error
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    configure_logging(log_level, log_format)
    _raise_descriptor_limit()
    try:
        trio.run(_run, where, config, os.path.expanduser(db))
    except CannotBind as error:
        # Not 78: a port that is taken now may be free in a moment.
        hint = "" if port == 0 else " Give it another --port, or --port 0 for a free one."
        raise click.ClickException(f"{error.strerror or error}.{hint}") from error
    except KeysRequired as error:
        raise ConfigurationError(f"{_sentence(error)} {_first_key_of(db)}, or listen on 127.0.0.1.") from error
    except BadCertificate as error:
        raise ConfigurationError(_sentence(error)) from error
    except StoreError as error:
        raise click.ClickException(str(error)) from error


async def _run(where: ServeConfig, config: BrokerConfig, db: str) -> None:
    stop, reload, everything, is_open = Stop(), Reload(), trio.CancelScope(), False
    failure: CannotBind | KeysRequired | BadCertificate | None = None
    signals = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP"):
        # Without a certificate too: one hook for all services must not end this one.
        signals.append(signal.SIGHUP)

    def on_signal(number: int) -> None:
        if number not in (signal.SIGINT, signal.SIGTERM):
            if where.certfile is None:
                logger.info("SIGHUP: there is no certificate that could be read again")
            reload.request()
            return
        if stop.requested:
            logger.info("stopping at once")
        else:
            logger.info("stopping: what is under way has %g s", config.grace_s)
        stop.request()
        if not is_open:
            everything.cancel()  # a database with very many rows takes a while to be read; there is nothing to drain yet

    async with AsyncExitStack() as stack:
        stack.enter_context(everything)
        start = stack.enter_context(ExitStack())
        start.enter_context(_frozen_start())
        await stack.enter_async_context(handle_signals(on_signal, *signals))
        broker = await stack.enter_async_context(_open_broker(db, config))
        is_open = True
        broker.add_observer(log_broker_event)
        async with trio.open_nursery() as nursery:
            try:
                urls = await nursery.start(partial(serve, broker, where, stop=stop, reload=reload))
            except (CannotBind, KeysRequired, BadCertificate) as error:
                failure = error
            else:
                start.close()
                click.echo(f"Wakecall listens on {' and '.join(urls)}")
    if failure is not None:
        raise failure


@contextmanager
def _frozen_start() -> Iterator[None]:
    """What is made in the block stays, so the collector neither runs meanwhile nor ever goes through it again: with very
    many rows it would take half of the start, and then a tenth of a second now and then. This process is ours to decide
    on; in an embedder's nothing of the kind is done."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _sentence(error: Exception) -> str:
    text = printable(str(error))
    return f"{text[:1].upper()}{text[1:]}."


def _first_key_of(db: str) -> str:
    if db == IN_MEMORY:
        return f"Keys are kept in the file that --db names, and {IN_MEMORY} is none: name one"
    return f"Make the first with `{program()} keys create admin --db {shlex.quote(db)}`"


@asynccontextmanager
async def _open_broker(db: str, config: BrokerConfig) -> AsyncIterator[Broker]:
    """A broker on the store that `--db` names. Raises ConfigurationError: the store cannot be opened or read."""
    async with AsyncExitStack() as stack:
        try:
            store = None
            if db != IN_MEMORY:
                store = await stack.enter_async_context(open_sqlite_store(db))
            upstream = await stack.enter_async_context(open_httpx_upstream())
            broker = await stack.enter_async_context(open_broker(store, config, upstream))
        except StoreError as error:
            raise ConfigurationError(str(error)) from error
        yield broker


def _expanded(path: str | None) -> str | None:
    return path and os.path.expanduser(path)


def _raise_descriptor_limit() -> None:
    """As many descriptors as we may have: each client and each publisher holds one, and the usual 1,024 are few."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError) as error:
            # macOS says that there is no limit, and then has one.
            logger.debug("the limit of %d descriptors stays: %s", soft, error)
