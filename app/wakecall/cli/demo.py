"""`wakecall demo`: a broker, a publisher, an engine that sleeps and a client, all on this machine, all gone afterwards.

Nothing is pretended. The broker is served on a socket, the publisher speaks the wire protocol, the engine is a process that
is not there until it is woken, and the client is an HTTP client; only the engine's words are not a model's.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import textwrap
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
import httpx2
import msgspec
import trio

from ..broker import open_broker
from ..models import Event, WakeSettled
from ..publisher import (
    Awake,
    ChannelOpen,
    EngineUnreachable,
    InferStarted,
    PublishedModel,
    PublisherConfig,
    PublisherError,
    PublisherEvent,
    Registered,
    Waking,
    run_publisher,
)
from ..serving import ServeConfig, serve
from . import VERBS
from .common import SectionedCommand, handle_signals, option
from .demo_replies import MODEL
from .demo_screen import Screen, open_screen
from .logs import configure_logging

__all__ = ["command"]

_NAME: Final = "demo"
_PROMPT: Final = "How did this message reach you?"
_USUAL_PORTS: Final = {"ollama": "http://127.0.0.1:11434", "llama.cpp": "http://127.0.0.1:8080"}

_DELAY_S: Final = 0.035
"""What the demo's engine thinks about each word."""
_LOOK_S: Final = 0.8
"""Long enough to read that the model sleeps, before it is called."""
_WAKE_S: Final = 30.0
_ENGINE_LIFETIME_S: Final = 300.0
"""If we are killed, and can end nothing any more."""
_TICK_S: Final = 1 / 12
_MAX_TOKENS: Final = 512

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DemoFailed(Exception):
    """It did not come to its end; the message says why."""


class _Piece(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Piece = msgspec.field(default_factory=_Piece)


class _Error(msgspec.Struct):
    message: str = "the answer broke off"


class _Chunk(msgspec.Struct):
    """What is looked at in an event of a stream, and in the body of an error."""

    choices: list[_Choice] = []
    error: _Error | None = None


@click.command("demo", cls=SectionedCommand, short_help=VERBS["demo"])
@option(
    "--engine",
    envvar="WAKECALL_ENGINE",
    metavar="URL",
    help="Use an engine that is running, instead of a small one of our own: its address, or `ollama` or `llama.cpp` for "
    "their usual ports.",
)
@option(
    "--model",
    envvar="WAKECALL_MODEL",
    metavar="ENGINE_ID",
    help="Which of that engine's models; the first, if left out.",
)
@option("--prompt", envvar="WAKECALL_PROMPT", default=_PROMPT, help="What to ask.")
def command(engine: str | None, model: str | None, prompt: str) -> None:
    """See everything work, in one go, on this machine.

    Starts a broker on a free port, and a publisher with an engine that sleeps; calls the engine's model through the broker;
    and shows the answer as it comes, beside what happens meanwhile. Nothing is left afterwards.
    """
    if model is not None and engine is None:
        raise click.UsageError("--model is for --engine: the demo's own engine has only one.")
    configure_logging("error", "text")
    demo = Demo(prompt, _USUAL_PORTS.get(engine, engine) if engine else None, model)
    failure: Exception | None = None
    try:
        trio.run(demo.run)
    except* (DemoFailed, PublisherError) as group:
        failure = _first(group)
    if failure is not None:
        raise click.ClickException(_explained(failure, demo)) from failure
    if demo.interrupted:
        click.get_current_context().exit(128 + demo.interrupted)
    click.echo(_next_steps(demo))


def _first(error: BaseException) -> Exception:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error


def _explained(error: Exception, demo: Demo) -> str:
    if isinstance(error, EngineUnreachable):
        return f"{error}. Without --engine the demo brings an engine of its own."
    return str(error)


def _next_steps(demo: Demo) -> str:
    engine = demo.engine_url or _USUAL_PORTS["ollama"]
    whose = "that engine" if demo.engine_url else "an engine of yours (here Ollama)"
    width = shutil.get_terminal_size().columns
    said = [demo.summary, f"Now for real: a broker, {whose} behind it, and a call."]
    prose = "\n\n".join(textwrap.fill(paragraph, width) for paragraph in said)
    return f"""
{prose}

  wakecall serve
  wakecall publish --engine {engine}
  curl http://127.0.0.1:8080/v1/chat/completions \\
    -d '{{"model": "NAME", "messages": [{{"role": "user", "content": "Hi"}}]}}'
"""


class Demo:
    """One run.

    Args:
        prompt: what the client asks.
        engine_url: of a running engine; None: our own, asleep.
        model: the engine's id of the model to ask; None: the first.
    """

    def __init__(self, prompt: str, engine_url: str | None, model: str | None) -> None:
        self.prompt = prompt
        self.engine_url = engine_url
        self.model = model
        self.interrupted = 0
        self.summary = ""
        self._name = _NAME
        self._wakes = 0
        self._woken_s = 0.0
        self._ready = trio.Event()
        self._screen: Screen

    async def run(self) -> None:
        """The whole of it, until it ends or is interrupted; nothing is left of it either way.

        Raises:
            DemoFailed, PublisherError: alone or in a group.
        """
        start = trio.current_time()
        with tempfile.TemporaryDirectory(prefix="wakecall-demo-") as folder, trio.CancelScope() as everything:

            def on_signal(number: int) -> None:
                self.interrupted = number
                everything.cancel()

            pid_file = Path(folder) / "engine.pid"
            async with handle_signals(on_signal, *_SIGNALS):
                try:
                    with open_screen(lambda: trio.current_time() - start) as self._screen:
                        try:
                            await self._play(Path(folder), pid_file)
                        finally:
                            self._screen.finish()
                finally:
                    # After the publisher's end: it has ended the wake command, so that nobody starts an engine any more.
                    await _end_engine(pid_file)

    async def _play(self, folder: Path, pid_file: Path) -> None:
        screen = self._screen
        stop = trio.Event()
        async with open_broker() as broker:
            broker.add_observer(self._on_broker)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tick)
                urls: list[str] = await nursery.start(partial(serve, broker, ServeConfig(port=0)))
                screen.note(f"a broker listens on :{urls[0].rpartition(':')[2]}")
                config = self._publisher_config(urls[0], folder, pid_file)
                async with trio.open_nursery() as publishing:
                    publishing.start_soon(partial(run_publisher, config, on_event=self._on_publisher, stop=stop))
                    await self._ready.wait()
                    if self.engine_url is None:
                        await trio.sleep(_LOOK_S)
                    await self._call(urls[0])
                    stop.set()
                nursery.cancel_scope.cancel()

    def _publisher_config(self, broker_url: str, folder: Path, pid_file: Path) -> PublisherConfig:
        config = partial(PublisherConfig, broker_url=broker_url, state_dir=folder, health_interval_s=0.05)
        if self.engine_url is not None:
            models = () if self.model is None else (PublishedModel(_NAME, self.model),)
            return config(engine_url=self.engine_url, models=models, drain_grace_s=1.0)
        port = _free_port()
        wake = [sys.executable, "-m", "wakecall.cli.demo_engine", "--background", "--port", str(port)]
        wake += ["--delay-s", str(_DELAY_S), "--lifetime-s", str(_ENGINE_LIFETIME_S), "--pid-file", str(pid_file)]
        return config(
            engine_url=f"http://127.0.0.1:{port}",
            models=(PublishedModel(_NAME, MODEL),),
            type="demo",
            hibernating=True,
            wake_command=shlex.join(wake),
            wake_s=_WAKE_S,
        )

    async def _tick(self) -> None:
        while True:
            await trio.sleep(_TICK_S)
            self._screen.tick()

    # What happens ---------------------------------------------------------------------------------------------------

    def _on_publisher(self, event: PublisherEvent) -> None:
        screen = self._screen
        match event:
            case Registered():
                self._name = event.models[0].name
                status = event.models[0].status
                screen.note(f"a publisher registered {self._name}")
                asleep = status == "hibernating"
                screen.note(f"{self._name} is {status}", "sleep" if asleep else "good")
                screen.engine("asleep" if asleep else "awake")
            case ChannelOpen():
                screen.note("its channel is open", "quiet")
                self._ready.set()
            case Waking():
                screen.note("one wake goes out", "sleep")
                screen.engine("waking")
                screen.flow("wake")
            case Awake():
                screen.note(f"the engine is up ({event.seconds:.2f} s)", "good")
                screen.engine("awake")
            case InferStarted():
                screen.note("the request follows", "quiet")
                screen.flow("request")
            case _:
                pass

    def _on_broker(self, event: Event) -> None:
        if isinstance(event, WakeSettled):
            self._wakes += 1
            self._woken_s = event.seconds

    # The client -----------------------------------------------------------------------------------------------------

    async def _call(self, broker_url: str) -> None:
        """One streaming chat completion, as any OpenAI client would ask for it."""
        screen = self._screen
        request: dict[str, Any] = {"model": self._name, "stream": True, "max_tokens": _MAX_TOKENS}
        request["messages"] = [{"role": "user", "content": self.prompt}]
        screen.ask(self.prompt)
        screen.note(f"you call {self._name}")
        screen.flow("call")
        started = trio.current_time()
        first: float | None = None
        tokens = 0
        # A proxy from the environment has no business here; and no patience is too much for a model that loads.
        async with httpx2.AsyncClient(timeout=None, trust_env=False) as client:
            async with client.stream("POST", f"{broker_url}/v1/chat/completions", json=request) as answer:
                if answer.status_code != 200:
                    raise DemoFailed(_failure(await answer.aread(), answer.status_code))
                try:
                    async for line in answer.aiter_lines():
                        text = _text_of(line)
                        if text is None:
                            continue
                        if first is None:
                            first = trio.current_time() - started
                            screen.note(f"first byte ({first:.2f} s)", "good")
                            screen.flow("answer")
                        if text:
                            tokens += 1
                            screen.write(text)
                except httpx2.HTTPError as error:
                    raise DemoFailed(f"the answer broke off: {error}") from error
        if first is None:
            raise DemoFailed("the engine's answer was empty")
        took = trio.current_time() - started
        screen.note(f"done ({tokens / max(took - first, 0.01):.0f} tokens a second)", "good")
        woken = f"one wake, {self._woken_s:.2f} s" if self._wakes == 1 else f"{self._wakes} wakes"
        self.summary = f"One call: {woken}; first byte after {first:.2f} s; all of it after {took:.2f} s."


def _text_of(line: str) -> str | None:
    """The text in one line of an event stream; None where there is none to look for.

    Raises:
        DemoFailed: it is an error event.
    """
    if not line.startswith("data:") or line.removeprefix("data:").strip() == "[DONE]":
        return None
    try:
        chunk = msgspec.json.decode(line.removeprefix("data:"), type=_Chunk)
    except msgspec.MsgspecError:
        return None
    if chunk.error is not None:
        raise DemoFailed(chunk.error.message)
    if not chunk.choices:
        return ""
    delta = chunk.choices[0].delta
    return delta.content or delta.reasoning_content or ""


def _failure(body: bytes, status: int) -> str:
    with suppress(msgspec.MsgspecError):
        error = msgspec.json.decode(body, type=_Chunk).error
        if error is not None:
            return f"{error.message} (HTTP {status})"
    return f"the broker answers {status}"


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


async def _end_engine(pid_file: Path) -> None:
    """End the engine, if it was ever started, and return when it is gone. Finishes even when cancelled."""
    try:
        pid = int(pid_file.read_text())  # noqa: ASYNC240 - a few bytes, on the way out
    except (OSError, ValueError):
        return
    with trio.CancelScope(shield=True), suppress(ProcessLookupError):
        if not hasattr(os, "pidfd_open"):
            os.kill(pid, signal.SIGTERM)
            return
        # Its parent is gone, so nobody here can wait for it; a descriptor of it tells of its end all the same.
        process = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(process, signal.SIGTERM)
            with trio.move_on_after(2):
                await trio.lowlevel.wait_readable(process)
                return
            signal.pidfd_send_signal(process, signal.SIGKILL)
            await trio.lowlevel.wait_readable(process)
        finally:
            os.close(process)
