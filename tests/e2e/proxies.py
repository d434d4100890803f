"""Debian's nginx and Caddy between a broker and everybody else, configured as the documentation says."""

from __future__ import annotations

import getpass
import os
import re
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import trio

from tests.certificates import Authority
from tests.docs.pages import DOCS, read
from tests.http.wire import TlsWire
from tests.programs import program

#: What the pages write where a real site has something else.
_BROKER = "127.0.0.1:8080"


@dataclass
class Proxy:
    """A running proxy.

    Attributes:
        url: where it is, by a name that its certificate has.
    """

    url: str
    authority: Authority

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[TlsWire]:
        """A connection whose handshake is done; left, it ends."""
        port = urlsplit(self.url).port
        assert port is not None
        async with await trio.open_tcp_stream("127.0.0.1", port) as tcp:
            stream = trio.SSLStream(tcp, self.authority.trust, server_hostname="localhost", https_compatible=True)
            await stream.do_handshake()
            yield TlsWire(stream)


def blocks_of(page: str, language: str) -> list[str]:
    return [block.text for block in read(DOCS / "how-to" / page)[1] if block.language == language]


def substitute(text: str, **real: tuple[str, str]) -> str:
    """`text` with what the page shows as an example replaced; each has to be there."""
    for shown, instead in real.values():
        assert shown in text, shown
        text = text.replace(shown, instead)
    return text


def nginx_with_keys() -> str:
    return blocks_of("behind-nginx.md", "nginx")[0]


def nginx_without_keys() -> str:
    """The page's other way, put together as it says."""
    server, condition, locations = blocks_of("behind-nginx.md", "nginx")
    replaced, count = re.subn(r"    location /v1/ .*\n    location /publisher/v1/ .*\n", lambda _: locations, server)
    assert count == 1
    return condition + replaced


@asynccontextmanager
async def _running(command: list[str], log: Path, **options: object) -> AsyncIterator[trio.Process]:
    """A process for the block; what it wrote is printed when the block ends."""
    with log.open("wb") as sink:
        process = await trio.lowlevel.open_process(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True, **options
        )
    try:
        yield process
    finally:
        process.terminate()
        with trio.move_on_after(5, shield=True):
            await process.wait()
        if process.returncode is None:
            process.kill()
        print(log.read_text(errors="replace"))


@asynccontextmanager
async def run_nginx(
    site: str, broker_url: str, directory: Path, authority: Authority, users: str = ""
) -> AsyncIterator[Proxy]:
    """nginx with this site, on a free port of 127.0.0.1.

    Args:
        site: from the page.
        broker_url: of the broker behind it.
        directory: for all that it writes.
        authority: issues its certificate.
        users: the password file's content.
    """
    certfile, keyfile = authority.issue(to="proxy")
    (directory / "users").write_text(users)
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)
    port = listening.getsockname()[1]
    site = substitute(
        site,
        listen=("listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;"),
        certfile=("/etc/ssl/llm.example.com.pem", certfile),
        keyfile=("/etc/ssl/llm.example.com.key", keyfile),
        broker=(_BROKER, urlsplit(broker_url).netloc),
        **({"users": ("/etc/nginx/wakecall-publishers", str(directory / "users"))} if users else {}),
    )
    temporary = [
        f"{kind}_temp_path {directory}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    ]
    lines = [
        "daemon off;",
        "worker_processes 1;",
        f"user {getpass.getuser()};" if os.geteuid() == 0 else "",
        f"pid {directory}/nginx.pid;",
        "error_log stderr info;",
        "events { worker_connections 256; }",
        "http {",
        *temporary,
        "access_log off;",
        site,
        "}",
    ]
    config = directory / "nginx.conf"
    config.write_text("\n".join(lines))
    # A listening socket that it inherits, as from its own predecessor at an upgrade: its port is nobody else's, and whoever
    # connects before it is up waits in the queue.
    command = [program("nginx", "nginx"), "-p", str(directory), "-e", "stderr", "-c", str(config)]
    os.set_inheritable(listening.fileno(), True)
    env = {**os.environ, "NGINX": f"{listening.fileno()};"}
    async with _running(command, directory / "nginx.log", pass_fds=[listening.fileno()], env=env):
        listening.close()
        yield Proxy(f"https://localhost:{port}", authority)


@asynccontextmanager
async def run_caddy(broker_url: str, directory: Path, authority: Authority) -> AsyncIterator[Proxy]:
    """Caddy with the page's site, on a free port."""
    certfile, keyfile = authority.issue("llm.example.com", "localhost", to="proxy")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = f"https://llm.example.com:{port}, https://localhost:{port}"
    site = substitute(
        blocks_of("behind-caddy.md", "caddyfile")[0],
        address=("llm.example.com {", f"{names} {{\n    bind 127.0.0.1\n    tls {certfile} {keyfile}"),
        broker=(_BROKER, urlsplit(broker_url).netloc),
    )
    config = directory / "Caddyfile"
    # It is to ask nobody for a certificate: nothing here leaves this machine.
    config.write_text(f"{{\n    admin off\n    auto_https off\n}}\n{site}")
    env = {**os.environ, "HOME": str(directory), "XDG_DATA_HOME": str(directory), "XDG_CONFIG_HOME": str(directory)}
    command = [program("caddy", "caddy"), "run", "--config", str(config), "--adapter", "caddyfile"]
    async with _running(command, directory / "caddy.log", env=env) as process:
        proxy = Proxy(f"https://localhost:{port}", authority)
        while process.poll() is None:
            try:
                async with proxy.connect():
                    break
            except (OSError, trio.BrokenResourceError):
                await trio.sleep(0.02)  # there is no event for it
        yield proxy
