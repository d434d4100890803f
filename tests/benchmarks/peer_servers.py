"""What people use today, each before the same constant engine: LiteLLM's proxy, and FastChat.

They come from PyPI into environments of their own, pinned, under the user's cache directory: a second run installs
nothing. Then no process of theirs talks to anything but this machine. Each is set up as its documentation has it for
one machine: one worker process, a key (ours has keys too), access logs off. What its documentation leaves open is
decided in its favour. A peer's own processes are on the server's core, the engine on the load's.
"""

from __future__ import annotations

import ctypes
import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from .servers import Server

__all__ = ["Peer", "open_engine", "open_fastchat", "open_litellm"]

SOURCE = Path(__file__).with_name("engine.c")
KEY = "sk-bench"
READY_S = 180.0
# By default 5: so long one turn of LiteLLM's loop may take with 64 streams, and then it closes those that wait for it.
KEEP_ALIVE_S = "75"

LITELLM = ("litellm[proxy]==1.108.7", "uvicorn==0.54.0", "uvloop==0.23.0")
# FastChat itself without what it requires (its web pages): what its two servers import comes beside it, and no torch.
# With Pydantic 2 its plain answers are 5 % faster, but each stream breaks off; 0.125 is the last FastAPI that takes 1.
FASTCHAT = ("fschat==0.2.36",)
FASTCHAT_IMPORTS = (
    *("aiohttp==3.14.5", "fastapi==0.125.0", "httpx==0.28.1", "numpy==2.4.6", "pydantic==1.10.27"),
    *("requests==2.34.2", "shortuuid==1.0.13", "starlette==0.50.0", "tiktoken==0.14.0", "uvicorn==0.54.0"),
)

_LITELLM_ENVIRONMENT = {
    # Else it asks GitHub for prices when it starts.
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    # What its page on production says; the second also turns the access log off.
    "LITELLM_MODE": "PRODUCTION",
    "LITELLM_LOG": "ERROR",
}

# Its controller and API server have no option for their logs, and write three lines a request.
_QUIET = """
import logging, runpy, sys, uvicorn
logging.disable(logging.INFO)
run = uvicorn.run
uvicorn.run = lambda app, **options: run(app, **options | {"log_level": "warning", "access_log": False})
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer that answers `POST /v1/chat/completions` for the model `bench`.

    Args:
        port: on 127.0.0.1.
        key: a client's.
        pids: its processes.
        versions: of itself, and of what its speed stands on.
    """

    name: str
    port: int
    key: str
    pids: tuple[int, ...]
    versions: str

    def cpu_s(self) -> float:
        """The processor time that it has used, all its processes together."""
        return sum(Server(self.port, pid).cpu_s() for pid in self.pids)


def compile_engine(folder: Path) -> Path:
    """Build the engine. Raises CalledProcessError."""
    program = folder / "engine"
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, SOURCE], check=True)
    return program


@contextmanager
def open_engine(core: int | None = None) -> Iterator[int]:
    """The constant engine, on one core. Yields its port."""
    with tempfile.TemporaryDirectory() as folder:
        with _running([compile_engine(Path(folder))], core, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            yield int(process.stdout.readline())


def install(*steps: Sequence[str]) -> Path:
    """An environment with what the steps name, each one `pip install`. One that is whole is used again."""
    wanted = "\n".join([sys.version, *(" ".join(step) for step in steps)])
    folder = platformdirs.user_cache_path("wakecall-bench") / hashlib.sha256(wanted.encode()).hexdigest()[:16]
    whole = folder / "whole"
    if not whole.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for step in steps:
            subprocess.run([folder / "bin/python", "-m", "pip", "install", "-qq", *step], check=True)
        whole.write_text(wanted)
    return folder / "bin"


@contextmanager
def open_litellm(engine: int, core: int | None = None) -> Iterator[Peer]:
    """LiteLLM's proxy: one model, a master key, no database."""
    programs = install(LITELLM)
    (port,) = _free_ports(1)
    address = f"http://127.0.0.1:{engine}/v1"
    settings = {
        "model_list": [
            {
                "model_name": "bench",
                "litellm_params": {"model": "openai/bench", "api_base": address, "api_key": "none"},
            }
        ],
        "general_settings": {"master_key": KEY},
    }
    with tempfile.TemporaryDirectory() as folder:
        # JSON is YAML.
        Path(folder, "config.yaml").write_text(json.dumps(settings))
        command: list[str | Path] = [
            *(programs / "litellm", "--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port)),
            *("--num_workers", "1", "--telemetry", "False", "--keepalive_timeout", KEEP_ALIVE_S),
        ]
        with _running(command, core, folder, _LITELLM_ENVIRONMENT) as process:
            versions = _versions(programs, "litellm", "uvicorn", "uvloop", "aiohttp")
            peer = Peer("LiteLLM", port, KEY, (process.pid,), versions)
            _wait_ready(lambda: _answers(peer), process)
            yield peer


@contextmanager
def open_fastchat(engine: int, core: int | None = None) -> Iterator[Peer]:
    """FastChat: its controller and its API server, both on the core; the engine is its worker."""
    programs = install(FASTCHAT_IMPORTS, ("--no-deps", *FASTCHAT))
    controller_port, port = _free_ports(2)
    controller = f"http://127.0.0.1:{controller_port}"
    host = ("--host", "127.0.0.1")
    start = (programs / "python", "-c", _QUIET)
    with tempfile.TemporaryDirectory() as folder:
        with (
            _running(
                [*start, "fastchat.serve.controller", *host, "--port", str(controller_port)],
                core,
                folder,
                {"LOGDIR": ""},
            ) as first,
            _running(
                [
                    *(*start, "fastchat.serve.openai_api_server", *host, "--port", str(port)),
                    *("--controller-address", controller, "--api-keys", KEY),
                ],
                core,
                folder,
                {"LOGDIR": ""},
            ) as second,
        ):
            versions = _versions(programs, "fschat", "uvicorn", "fastapi", "aiohttp")
            peer = Peer("FastChat", port, KEY, (first.pid, second.pid), versions)
            _wait_ready(lambda: _registers(controller_port, engine), first)
            _wait_ready(lambda: _answers(peer), second)
            yield peer


def _registers(controller: int, engine: int) -> bool:
    worker = {
        "worker_name": f"http://127.0.0.1:{engine}",
        "check_heart_beat": False,
        "worker_status": {"model_names": ["bench"], "speed": 1, "queue_length": 0},
    }
    return _status(controller, "/register_worker", worker) == 200


def _answers(peer: Peer) -> bool:
    chat = {"model": "bench", "messages": [{"role": "user", "content": "Ready?"}]}
    return _status(peer.port, "/v1/chat/completions", chat) == 200


def _status(port: int, path: str, body: object) -> int | None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(
            "POST", path, json.dumps(body), {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        )
        return connection.getresponse().status
    except OSError:
        return None
    finally:
        connection.close()


def _wait_ready(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + READY_S
    while not ready():
        if process.poll() is not None:
            raise RuntimeError(f"a peer ended with {process.returncode} before it answered: {process.args!r}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"a peer did not answer within {READY_S:.0f} s: {process.args!r}")
        time.sleep(0.2)  # a process that can only be asked


def _free_ports(count: int) -> list[int]:
    listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in listening]
    for each in listening:
        each.close()
    return ports


def _versions(programs: Path, *names: str) -> str:
    code = (
        "import sys; from importlib.metadata import version as v; print(', '.join(f'{n} {v(n)}' for n in sys.argv[1:]))"
    )
    return subprocess.run(
        [programs / "python", "-c", code, *names], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()


@contextmanager
def _running(
    command: Sequence[str | Path],
    core: int | None,
    folder: str | None = None,
    environment: dict[str, str] | None = None,
    stdout: int = subprocess.DEVNULL,
) -> Iterator[subprocess.Popen[str]]:
    """A process and all that it starts, until the block is left. A peer that fails says so on stderr."""
    libc = ctypes.CDLL(None)

    def prepare() -> None:
        # Before it has threads: a thread keeps the cores that it was born with.
        if core is not None:
            os.sched_setaffinity(0, {core})
        # PR_SET_PDEATHSIG: nothing is left over when we are killed.
        libc.prctl(1, signal.SIGKILL)

    process = subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        text=True,
        cwd=folder,
        # Nothing of ours: a PYTHONPATH or a key that lies about would change what is measured.
        env={"PATH": os.defpath, "HOME": folder or "/", **(environment or {})},
        # Its own group: Ctrl-C is for us, who then end it.
        start_new_session=True,
        preexec_fn=prepare,
    )
    try:
        yield process
    finally:
        # Nothing that it holds is wanted, and FastChat's controller ends by nothing else.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
