"""TLS on the command line: `serve --certfile --keyfile`, and those who call it by `https://`."""

from __future__ import annotations

import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import httpx2
import pytest
import trio

from tests.certificates import Authority
from tests.cli.processes import PATIENCE_S, call, run_wakecall
from wakecall import BadCertificate, Broker, LLMSpec, ServeConfig, open_broker, serve
from wakecall.cli.demo_engine import serve_demo_engine

MEMORY = ("serve", "--port", "0", "--db", ":memory:")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def serial_of(url: str, trust: ssl.SSLContext) -> str:
    """Of the certificate that a new connection is shown."""
    host, _, port = url.removeprefix("https://").partition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as sock:
        with trust.wrap_socket(sock, server_hostname=host) as tls:
            certificate = tls.getpeercert()
            assert certificate is not None
            return str(certificate["serialNumber"])


async def test_it_serves_tls_and_reads_a_renewed_certificate_on_sighup(authority: Authority, tmp_path: Path) -> None:
    """The line says https://; a bad new pair is one line of the log, and the old one stays; then a good one counts."""
    certfile, keyfile = authority.issue()
    options = ("--certfile", certfile)
    async with run_wakecall(*MEMORY, *options, state=tmp_path, WAKECALL_KEYFILE=keyfile) as running:
        url = await running.url()
        assert url.startswith("https://127.0.0.1:")
        async with httpx2.AsyncClient(base_url=url, verify=authority.trust, timeout=PATIENCE_S) as http:
            assert (await http.get("/healthz")).json() == {"status": "ok"}
            first = await trio.to_thread.run_sync(serial_of, url, authority.trust)

            Path(certfile).write_text("nothing")
            running.send(signal.SIGHUP)
            said = await running.err.wait("holds no certificate")
            assert "the certificate that was read before stays" in said
            assert await trio.to_thread.run_sync(serial_of, url, authority.trust) == first

            authority.issue()
            running.send(signal.SIGHUP)
            await running.err.wait("was read again")
            assert await trio.to_thread.run_sync(serial_of, url, authority.trust) != first
            # The connection from before is still the same one.
            assert (await http.get("/readyz")).status_code == 200
        running.send(signal.SIGTERM)
        assert await running.wait() == 0
        assert running.out.text == f"Wakecall listens on {url}\n"
        assert "Traceback" not in running.err.text


Spoil = Callable[[Path, Path], object]

BAD: dict[str, tuple[Spoil, str]] = {
    "missing": (lambda cert, _: cert.unlink(), "The certificate {cert} cannot be read: No such file or directory."),
    "no-key": (lambda _, key: key.write_text("x"), "{key} holds no private key in PEM form."),
}


@pytest.mark.parametrize(("spoil", "said"), BAD.values(), ids=BAD.keys())
def test_a_pair_that_cannot_be_used_is_refused(spoil: Spoil, said: str, authority: Authority, tmp_path: Path) -> None:
    """78 and one sentence; it never listened."""
    certfile, keyfile = authority.issue()
    spoil(Path(certfile), Path(keyfile))
    run = call(*MEMORY, "--certfile", certfile, "--keyfile", keyfile, state=tmp_path)
    assert (run.returncode, run.stdout) == (78, "")
    assert run.stderr == f"Error: {said.format(cert=certfile, key=keyfile)}\n"


@pytest.mark.parametrize("given", ["certfile", "keyfile"])
def test_one_without_the_other_is_refused(given: str, authority: Authority, tmp_path: Path) -> None:
    said = f"TLS needs a certificate and its key: {given} is given, and"
    path = dict(zip(("certfile", "keyfile"), authority.issue(), strict=True))[given]
    with pytest.raises(BadCertificate, match=said):
        ServeConfig(**{given: path})
    if given == "certfile":
        run = call(*MEMORY, "--certfile", path, state=tmp_path)
        assert (run.returncode, run.stdout) == (78, "")
        assert run.stderr == f"Error: {said} keyfile is not.\n"


async def test_a_pair_that_cannot_be_used_leaves_nothing_listening(authority: Authority) -> None:
    """In a program too: `serve` raises before it binds."""
    certfile, keyfile = authority.issue()
    Path(keyfile).write_text("x")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with open_broker() as broker:
        with pytest.raises(ValueError, match="no private key"):
            await serve(broker, ServeConfig(port=port, certfile=certfile, keyfile=keyfile))
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


# Those who call it ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def serve_tls(authority: Authority, *names: str, expired: bool = False) -> AsyncIterator[tuple[Broker, str]]:
    """A broker of this process, and its address by a name that is in the usual certificate."""
    not_after = datetime(2021, 1, 1, tzinfo=UTC) if expired else datetime(2090, 1, 1, tzinfo=UTC)
    certfile, keyfile = authority.issue(*names, not_after=not_after)
    async with open_broker() as broker, trio.open_nursery() as nursery:
        config = ServeConfig(port=0, certfile=certfile, keyfile=keyfile)
        urls = await nursery.start(partial(serve, broker, config))
        yield broker, urls[0].replace("127.0.0.1", "localhost")
        nursery.cancel_scope.cancel()


async def test_a_private_ca_is_trusted_by_ssl_cert_file(authority: Authority, tmp_path: Path) -> None:
    """On loopback too, where nothing else is taken from the environment: `publish` publishes, `ls` lists."""
    async with serve_tls(authority) as (broker, url), trio.open_nursery() as nursery:
        port = await nursery.start(partial(serve_demo_engine, delay_s=0.0))
        trusted = {"SSL_CERT_FILE": authority.file, "HTTPS_PROXY": "http://127.0.0.1:1"}
        args = ("publish", "--broker", url, "--engine", f"http://127.0.0.1:{port}")
        async with run_wakecall(*args, state=tmp_path, **trusted) as publish:
            await publish.err.wait("channel open")
            async with httpx2.AsyncClient(base_url=url, verify=authority.trust, trust_env=False) as http:
                body = {"model": "wakecall-demo", "messages": [{"role": "user", "content": "hi"}]}
                assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
            run = await trio.to_thread.run_sync(lambda: call("ls", "--broker", url, state=tmp_path, **trusted))
            assert (run.returncode, run.stderr) == (0, "")
            assert "wakecall-demo" in run.stdout
            publish.send(signal.SIGTERM)
            assert await publish.wait() == 0
        assert broker.session_views() == []
        nursery.cancel_scope.cancel()


NOT_TRUSTED = "its certificate is not trusted here; SSL_CERT_FILE can name the file of its CA"


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("stranger", NOT_TRUSTED),
        ("name", "its certificate is for another name"),
        ("expired", "its certificate has expired"),
        ("cleartext", "it does not speak TLS; is its address http://?"),
    ],
)
async def test_what_is_wrong_with_a_certificate_is_said(
    trouble: str, said: str, authority: Authority, tmp_path: Path
) -> None:
    """By both, in words; `publish` tries again, for a certificate can be renewed. A password in the address is not shown."""
    trusted = {} if trouble == "stranger" else {"SSL_CERT_FILE": authority.file}
    names = ["example.org"] if trouble == "name" else []
    async with serve_tls(authority, *names, expired=trouble == "expired") as (broker, url):
        async with trio.open_nursery() as nursery:
            if trouble == "cleartext":
                (plain,) = await nursery.start(partial(serve, broker, ServeConfig(port=0)))
                url = plain.replace("http://", "https://")
            url = url.replace("https://", "https://laptop:secret@")
            if trouble == "stranger":
                args = ("publish", "--broker", url, "--engine", "http://127.0.0.1:1", "--name", "m")
                async with run_wakecall(*args, state=tmp_path, **trusted) as publish:
                    line = await publish.err.wait("cannot be reached")
                    assert f"{said}; trying again" in line
                    assert "secret" not in publish.err.text
            run = await trio.to_thread.run_sync(lambda: call("ls", "--broker", url, state=tmp_path, **trusted))
            nursery.cancel_scope.cancel()
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == f"Error: There is no secure way to {url.replace('laptop:secret@', '')}: {said}.\n"


@pytest.mark.parametrize(
    ("content", "why"), [(None, "No such file or directory"), ("not a certificate", "it holds no certificate")]
)
@pytest.mark.parametrize("verb", ["publish", "ls"])
def test_a_ca_file_that_cannot_be_used_is_said(verb: str, content: str | None, why: str, tmp_path: Path) -> None:
    """78: no second try would go better."""
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    args = (verb, "--broker", "https://localhost:1")
    if verb == "publish":
        args += ("--engine", "http://127.0.0.1:1", "--name", "m")
    run = call(*args, state=tmp_path, SSL_CERT_FILE=str(path))
    assert (run.returncode, run.stdout) == (78, "")
    assert run.stderr == f"Error: SSL_CERT_FILE names {path}, which cannot be used: {why}.\n"


async def test_a_cleartext_broker_on_loopback_needs_no_cas(tmp_path: Path) -> None:
    """A variable that is wrong for others does not keep two processes of one machine apart."""
    async with open_broker() as broker, trio.open_nursery() as nursery:
        (url,) = await nursery.start(partial(serve, broker, ServeConfig(port=0)))
        await broker.register("laptop", [LLMSpec("m")])
        variables = {"SSL_CERT_FILE": os.devnull + "/none"}
        run = await trio.to_thread.run_sync(lambda: call("ls", "--broker", url, state=tmp_path, **variables))
        assert (run.returncode, run.stderr) == (0, "")
        nursery.cancel_scope.cancel()
