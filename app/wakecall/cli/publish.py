"""`wakecall publish`."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import asdict
from itertools import zip_longest
from typing import Any, Final

import click
import trio

from ..publisher import (
    Asleep,
    Awake,
    BrokerUnreachable,
    ChannelLost,
    ChannelOpen,
    Drained,
    Draining,
    Evicted,
    GoingToSleep,
    InferFinished,
    InferStarted,
    InvalidConfig,
    KeyRefused,
    PublishedModel,
    PublisherConfig,
    PublisherError,
    PublisherEvent,
    Registered,
    RegistrationRefused,
    SleepFailed,
    StateLocked,
    StopReason,
    Superseded,
    WakeFailed,
    Waking,
    name_for,
    run_publisher,
)
from . import VERBS
from .common import (
    ConfigurationError,
    F,
    SectionedCommand,
    broker_option,
    handle_signals,
    key_option,
    log_options,
    option,
    printable,
)
from .logs import configure_logging, log_event

__all__ = ["command", "sentence"]

logger = logging.getLogger("wakecall.publisher")

_ENGINE: Final = "the engine"
_TIMES: Final = "Times, instead of the broker's own"
_SLEEP: Final = "An engine that sleeps"
_TWO_ON_PURPOSE: Final = "Stop it; to run two on purpose, give each of them a --session of its own."
_ANOTHER_NAME: Final = "Publish yours under another --name, with --model for the engine's own id of it"
# For the code with which a broker refuses to register; none at all is somebody else's answer.
_REMEDIES: Final = {
    "llm_name_taken": f"{_ANOTHER_NAME}, or stop the publisher that has it.",
    "llm_is_public": f"{_ANOTHER_NAME}.",
    "session_taken": "Choose another --session.",
    "too_many": "Publish fewer: one model with --name.",
    "not_found": "Is --broker the address of a Wakecall broker?",
    "": "Is --broker the address of a Wakecall broker?",
}
_A_KEY: Final = (
    "Have one of role publisher in WAKECALL_KEY. Whoever operates the broker makes it with"
    " `wakecall keys create publisher`."
)
_A_PROXY: Final = "If a proxy wants a password, it stands in the address: --broker https://USER:PASSWORD@HOST."
_ANOTHER_KEY: Final = (
    "Publish it under another --name, with --model for the engine's own id of it, or with a key for this name."
)
_ANOTHER_POOL: Final = "Choose another --pool: one whose name no model has, and no other owner's pool."
_A_POOL_FOR_THE_KEY: Final = "Choose another --pool, or publish with a key for this one."
_EVICTED: Final = "An operator of the broker evicted this publisher. Ask there before you start it again."
_EVICTED_OR_REVOKED: Final = (
    "The broker ended this publisher's session: its API key has been revoked or has expired, or an operator evicted it."
    " Ask there for a new key, put it into WAKECALL_KEY, and start it again."
)


class _EngineId(click.types.StringParamType):
    """Text in which spaces may stand: in a variable, several are told apart by their lines."""

    def split_envvar_value(self, rv: str) -> list[str]:
        return [line.strip() for line in rv.splitlines() if line.strip()]


def _budget(phase: str, what: str) -> Callable[[F], F]:
    """An option that bounds one phase of a request for what is published here."""
    return option(
        f"--{phase}-s",
        envvar=f"WAKECALL_{phase.upper().replace('-', '_')}_S",
        type=float,
        metavar="SECONDS",
        help=f"The most that a request may {what}.",
        section=_TIMES,
    )


@click.command("publish", cls=SectionedCommand, short_help=VERBS["publish"])
@broker_option
@key_option("publisher")
@option(
    "--engine",
    envvar="WAKECALL_ENGINE",
    required=True,
    metavar="URL",
    help="The engine's address, with or without /v1; Ollama's is http://127.0.0.1:11434.",
)
@option(
    "--name",
    "names",
    envvar="WAKECALL_NAME",
    multiple=True,
    show_default=False,
    help="Publish one model under this name; without it, all that the engine has. May be given more than once; in the"
    " variable, with spaces between.",
)
@option(
    "--model",
    "ids",
    envvar="WAKECALL_MODEL",
    multiple=True,
    type=_EngineId(),
    show_default=False,
    metavar="ENGINE_ID",
    help="The engine's own id of that model, if not the name. Beside several names as often as these, in their order; in"
    " the variable, a line each.",
)
@option(
    "--type", "kind", envvar="WAKECALL_TYPE", metavar="TYPE", help="The engine's kind, such as ollama: for listings."
)
@option(
    "--pool",
    envvar="WAKECALL_POOL",
    metavar="NAME",
    help="A second name for all of them, which models of your other publishers may have too: whichever is free takes a"
    " request for it.",
)
@option(
    "--session",
    envvar="WAKECALL_SESSION",
    metavar="ID",
    help="A session id of your own, instead of one made up and kept for this broker and engine; for two publishers of"
    " one engine, say.",
)
@option(
    "--max-concurrency",
    envvar="WAKECALL_MAX_CONCURRENCY",
    type=int,
    metavar="N",
    help="Requests at a time, for each model.",
)
@option(
    "--upload",
    envvar="WAKECALL_UPLOAD",
    type=click.Choice(["stream", "chunks"]),
    default="stream",
    help="Each answer as one upload, or in pieces: for a proxy on the way that buffers uploads.",
)
@option(
    "--cancel",
    envvar="WAKECALL_CANCEL",
    type=click.Choice(["abort", "drain"]),
    default="abort",
    help="When a client leaves: stop the engine's work, or let it finish and throw it away.",
)
@option(
    "--engine-key-env",
    envvar="WAKECALL_ENGINE_KEY_ENV",
    metavar="VAR",
    help="The variable that holds the engine's API key.",
)
@option(
    "--health-path",
    envvar="WAKECALL_HEALTH_PATH",
    metavar="PATH",
    help="Ask the engine for this instead of /health, then /v1/models.",
)
@log_options
@_budget("queue", "wait for a free slot")
@_budget("first-byte", "wait for its first byte, if it streams")
@_budget("idle", "wait within its answer")
@_budget("total", "take in all")
@option(
    "--hibernating",
    envvar="WAKECALL_HIBERNATING",
    is_flag=True,
    help="It sleeps now. Needs --name, or --group.",
    section=_SLEEP,
)
@option(
    "--group",
    envvar="WAKECALL_GROUP",
    metavar="NAME",
    help="There is room for one of the models at a time: to wake one, the other is put to sleep first. The first is awake"
    " now.",
    section=_SLEEP,
)
@option(
    "--wake-command", envvar="WAKECALL_WAKE_COMMAND", metavar="CMD", help="What starts it; run with sh.", section=_SLEEP
)
@option(
    "--wake-s",
    envvar="WAKECALL_WAKE_S",
    type=float,
    default=120,
    metavar="SECONDS",
    help="The most that waking it may take; in a group, what goes to sleep for it included.",
    section=_SLEEP,
)
@option(
    "--hibernate-command",
    envvar="WAKECALL_HIBERNATE_COMMAND",
    metavar="CMD",
    help="What stops it; run with sh.",
    section=_SLEEP,
)
@option(
    "--hibernate-after",
    envvar="WAKECALL_HIBERNATE_AFTER_S",
    type=float,
    metavar="SECONDS",
    help="Put it to sleep after so long without a request.",
    section=_SLEEP,
)
def command(
    broker: str,
    key: str | None,
    engine: str,
    names: tuple[str, ...],
    ids: tuple[str, ...],
    kind: str | None,
    session: str | None,
    hibernate_after: float | None,
    hibernating: bool,
    group: str | None,
    log_level: str,
    log_format: str,
    **settings: Any,
) -> None:
    """Publish the models of an OpenAI-compatible engine on a broker.

    Runs until it is stopped, and only ever dials out: it needs no open port. SIGINT and SIGTERM end it: what is under way
    is finished, and the broker told goodbye. A second one drops everything at once.
    """
    if hibernating and not (names or ids or group):
        raise click.UsageError("An engine that sleeps cannot be asked for its models: --hibernating needs --name.")
    if names and ids and len(names) != len(ids):
        raise click.UsageError("--model is given as often as --name, in the same order, or not at all.")
    try:
        models = tuple(
            PublishedModel(name or name_for(engine_id or ""), engine_id) for name, engine_id in zip_longest(names, ids)
        )
        config = PublisherConfig(
            broker_url=broker,
            broker_key=key,
            engine_url=engine,
            models=models,
            type=kind,
            session_id=session,
            hibernating=hibernating,
            group=group,
            hibernate_after_s=hibernate_after,
            **settings,
        )
    except InvalidConfig as error:
        raise ConfigurationError(_said(error)) from error
    configure_logging(log_level, log_format)
    try:
        reason = trio.run(_run, config)
    except PublisherError as error:
        kind_of_failure = (
            ConfigurationError if error.exit_code == ConfigurationError.exit_code else click.ClickException
        )
        raise kind_of_failure(_said(error, had_key=key is not None)) from error
    if reason is StopReason.SUPERSEDED:
        raise click.ClickException(
            "Another process publishes with this session id, and took its place. Stop one of the two, or give this one"
            " a --session of its own."
        )
    if reason is StopReason.EVICTED:
        raise click.ClickException(_EVICTED if key is None else _EVICTED_OR_REVOKED)


def _said(error: PublisherError, *, had_key: bool = False) -> str:
    """What went wrong, as a sentence, and which option helps."""
    text = printable(str(error))
    text = f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"
    if isinstance(error, StateLocked):
        remedy = _TWO_ON_PURPOSE
    elif isinstance(error, KeyRefused):
        remedy = _key_remedy(error, had_key)
    else:
        remedy = _registration_remedy(error) if isinstance(error, RegistrationRefused) else ""
    return f"{text} {remedy}".rstrip()


def _registration_remedy(error: RegistrationRefused) -> str:
    if error.member == "pool" and error.code == "llm_name_taken":
        return _ANOTHER_POOL
    return _REMEDIES.get(error.code, "")


def _key_remedy(error: KeyRefused, had_key: bool) -> str:
    if not error.code:
        return _A_PROXY
    if error.name is not None:
        return _A_POOL_FOR_THE_KEY if error.member == "pool" else _ANOTHER_KEY
    # Who has no key and is forbidden has come to an open broker by a foreign name: the broker says so.
    return _A_KEY if had_key or error.code == "invalid_api_key" else ""


async def _run(config: PublisherConfig) -> StopReason | None:
    """Publish until it ends or is told to. Returns why, or None after a second signal."""
    stop = trio.Event()
    reason: StopReason | None = None
    with trio.CancelScope() as everything:

        def on_signal(_: int) -> None:
            if stop.is_set():
                logger.info("stopping at once")
                everything.cancel()
            stop.set()

        async with handle_signals(on_signal):
            reason = await run_publisher(config, on_event=_report, stop=stop)
    return reason


def _report(event: PublisherEvent) -> None:
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(event).__name__).lower()
    failed = isinstance(event, BrokerUnreachable | ChannelLost | WakeFailed | SleepFailed | Superseded | Evicted) or (
        isinstance(event, InferFinished) and event.outcome not in ("completed", "cancelled")
    )
    fields = {key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(event).items()}
    log_event(logger, logging.WARNING if failed else logging.INFO, name, fields, sentence(event))


def sentence(event: PublisherEvent) -> str:
    """An event for people."""
    match event:
        case Registered():
            rows = ", ".join(f"{row.name} ({row.status}, {row.outcome})" for row in event.models)
            return f"registered{' again' if event.again else ''} as session {event.session_id}: {rows or 'no model'}"
        case BrokerUnreachable():
            return f"the broker cannot be reached: {event.message}; trying again in {event.retry_in_s:.1f} s"
        case ChannelOpen():
            return f"channel open (epoch {event.epoch}): the broker can send requests now"
        case ChannelLost():
            return f"channel lost: {event.reason}; opening it again in {event.retry_in_s:.1f} s"
        case InferStarted():
            return f"request {event.task_id} for {event.llm}"
        case InferFinished():
            status = "" if event.status is None else f", engine said {event.status}"
            why = "" if event.message is None else f": {event.message}"
            took = f"in {event.seconds:.2f} s, {event.uploaded} bytes"
            return f"request {event.task_id} for {event.llm} {event.outcome} {took}{status}{why}"
        case Waking():
            return f"waking {event.llm or _ENGINE}"
        case Awake():
            how = "" if event.ran_command else " already: the command was not needed"
            return f"{event.llm or _ENGINE} is awake{how} ({event.seconds:.2f} s)"
        case WakeFailed():
            return f"{event.llm or _ENGINE} could not be woken: {event.message}"
        case GoingToSleep():
            return f"idle for long enough: putting {event.llm or _ENGINE} to sleep"
        case Asleep():
            return f"{event.llm or _ENGINE} sleeps"
        case SleepFailed():
            return f"{event.llm or _ENGINE} does not sleep: {event.message}"
        case Draining():
            return f"stopping: {event.in_flight} requests under way"
        case Drained():
            left = f", {event.abandoned} requests abandoned" if event.abandoned else ""
            return f"stopped{left}"
        case Superseded():
            return "another process took this session"
        case Evicted():
            return "evicted by an operator"
