"""What holds on cleartext holds inside TLS: ends are noticed, stuck peers end, streams stream, a cut is a cut."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.certificates import Authority
from tests.http.served import SSE, open_served, wait_until
from tests.http.test_barrier import H2_GET, MIB, Pouring, answer, early, h2_bytes, hello, leap, start_stream
from tests.http.wire import Server, TlsWire, http_app, open_server, request_bytes, send_until_stuck
from wakecall.http import tls
from wakecall.http.barrier import BarrierSettings
from wakecall.http.tls import BadCertificate, Certificates

Open = Callable[..., AbstractAsyncContextManager[Server]]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def open_tls_server(authority: Authority) -> Open:
    """`open_server` over TLS; its clients trust it."""
    return partial(open_server, certificates=authority.certificates(), trust=authority.trust)


@asynccontextmanager
async def connect_with(server: Server, context: ssl.SSLContext) -> AsyncIterator[TlsWire]:
    """A connection with another client's settings."""
    async with await trio.open_tcp_stream("127.0.0.1", server.port) as tcp:
        stream = trio.SSLStream(tcp, context, server_hostname="localhost", https_compatible=True)
        await stream.do_handshake()
        yield TlsWire(stream)


# The handshake --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offered", "chosen"), [(["h2", "http/1.1"], "http/1.1"), (["http/1.1"], "http/1.1"), (["h2"], None), ([], None)]
)
async def test_http_1_1_is_all_that_is_agreed_on(
    offered: list[str], chosen: str | None, authority: Authority, open_tls_server: Open
) -> None:
    """A client that offers only h2 is promised nothing, and gets HTTP/1.1 if it can speak it."""
    context = authority.trust
    context.set_alpn_protocols(offered)
    async with open_tls_server(hello) as server, connect_with(server, context) as wire:
        assert wire.stream.selected_alpn_protocol() == chosen
        assert (await wire.ask("GET", "/")).body == b"GET /"


async def test_http_2_all_the_same_is_refused_in_words(authority: Authority, open_tls_server: Open) -> None:
    async with open_tls_server(hello) as server:
        async with server.connect() as wire:
            await wire.send(h2_bytes(*H2_GET))
            refusal = await wire.read_answer()
            assert (refusal.status, refusal.code) == (505, "invalid_request")
            assert await wire.read_to_end() == b""
        assert (await server.ask("GET", "/")).status == 200


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_tls_1_2_and_1_3_are_spoken(version: ssl.TLSVersion, authority: Authority, open_tls_server: Open) -> None:
    """With forward secrecy and authenticated encryption."""
    context = authority.trust
    context.minimum_version = context.maximum_version = version
    async with open_tls_server(hello) as server, connect_with(server, context) as wire:
        cipher, spoken, _ = wire.stream.cipher()
        assert spoken == {ssl.TLSVersion.TLSv1_2: "TLSv1.2", ssl.TLSVersion.TLSv1_3: "TLSv1.3"}[version]
        assert "GCM" in cipher or "CHACHA20" in cipher
        assert (await wire.ask("GET", "/")).status == 200


@pytest.mark.parametrize("weakness", ["version", "cipher"])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1:DeprecationWarning")
async def test_less_is_not_agreed_on(weakness: str, authority: Authority, open_tls_server: Open) -> None:
    """TLS 1.1, or 1.2 without authenticated encryption: the handshake fails, and nobody else notices."""
    context = authority.trust
    if weakness == "version":
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")
    else:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        context.set_ciphers("ECDHE+AES:!AESGCM:!AESCCM")
    async with open_tls_server(hello) as server:
        with pytest.raises(trio.BrokenResourceError):
            async with connect_with(server, context):
                pass
        assert (await server.ask("GET", "/")).status == 200


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"\x00" * 5000])
@pytest.mark.parametrize("end", ["fin", "rst"])
async def test_whoever_speaks_no_tls_just_ends(sent: bytes, end: str, open_tls_server: Open) -> None:
    """Without an answer, without a trace, and without a word in the log; others are served meanwhile."""
    async with open_tls_server(hello) as server, server.connect(raw=True) as wire:
        await wire.send(sent)
        assert (await server.ask("GET", "/")).status == 200
        if end == "fin":
            await wire.half_close()
            await wire.read_to_end()
        else:
            wire.reset()
        await wait_until(lambda: not server.barrier.connections)


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01"], ids=["silent", "half-a-hello"])
async def test_a_handshake_that_stands_still_is_cut(
    sent: bytes, open_tls_server: Open, mock_clock: trio.testing.MockClock
) -> None:
    """After `head_s`, and not before; meanwhile everybody else shakes hands and is served."""
    mock_clock.rate = 1
    async with open_tls_server(hello, BarrierSettings(head_s=50, keep_alive_s=500), patience_s=300) as server:
        async with server.connect(raw=True) as wire:
            await wire.send(sent)
            await leap(mock_clock, 45)
            assert len(server.barrier.connections) == 1
            assert (await server.ask("GET", "/")).status == 200
            await leap(mock_clock, 6)
            assert await wire.read_to_end() == b""
            await wait_until(lambda: not server.barrier.connections)


async def test_a_connection_too_many_is_cut_before_its_handshake(open_tls_server: Open) -> None:
    """Words would cost a handshake. When the one that is busy has its answer, there is room again."""
    busy, release = trio.Event(), trio.Event()

    @http_app
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/wait":
            busy.set()
            await release.wait()
        await hello(scope, receive, send)

    async with open_tls_server(app, BarrierSettings(max_connections=1)) as server:
        async with server.connect() as first:
            await first.send(request_bytes("GET", "/wait"))
            await busy.wait()
            async with server.connect(raw=True) as wire:
                assert await wire.read_to_end() == b""
            release.set()
            assert (await first.read_answer()).status == 200
        assert (await server.ask("GET", "/")).status == 200


# Ends -----------------------------------------------------------------------------------------------------------------


async def leave(wire: TlsWire, end: str) -> None:
    if end == "fin":
        await wire.half_close()
    elif end == "rst":
        wire.reset()
    else:
        await wire.say_goodbye()


@pytest.mark.parametrize("behind", [b"", b"\r\n", request_bytes("GET", "/2")], ids=["nothing", "crlf", "pipelined"])
@pytest.mark.parametrize("end", ["fin", "rst", "close_notify"])
async def test_a_peer_that_leaves_is_noticed(behind: bytes, end: str, open_tls_server: Open) -> None:
    """At once, by whichever of the three ends, also behind bytes that came after its request."""
    started, disconnected = trio.Event(), trio.Event()

    @http_app
    async def app(scope: Any, receive: Any, send: Any) -> None:
        started.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        disconnected.set()

    async with open_tls_server(app) as server, server.connect() as wire, trio.open_nursery() as nursery:
        await wire.send(request_bytes("GET", "/") + behind)
        await started.wait()
        nursery.start_soon(leave, wire, end)
        await disconnected.wait()
        await wait_until(lambda: not server.barrier.connections)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("end", ["fin", "rst", "close_notify"])
async def test_a_peers_end_frees_a_stuck_write(end: str, open_tls_server: Open) -> None:
    """It reads nothing and leaves: no deadline is needed for that."""
    app = Pouring()
    settings = BarrierSettings(close_drain_s=600)
    async with open_tls_server(http_app(app), settings) as server, server.connect(receive_buffer=4096) as wire:
        await wire.send(request_bytes("GET", "/"))
        await trio.testing.wait_all_tasks_blocked(0.02)
        await leave(wire, end)
        await app.disconnected.wait()
        await wait_until(lambda: not server.barrier.connections)


async def test_a_peer_that_reads_nothing_is_cut(open_tls_server: Open, mock_clock: trio.testing.MockClock) -> None:
    """Not before `peer_stall_s`."""
    mock_clock.rate = 1
    app = Pouring()
    async with open_tls_server(http_app(app), BarrierSettings(peer_stall_s=60), patience_s=400) as server:
        async with server.connect(receive_buffer=4096) as wire:
            await wire.send(request_bytes("GET", "/"))
            for _ in range(7):
                await leap(mock_clock, 8)
            assert not app.disconnected.is_set()
            # Its time begins with the last byte that it took, and that may have been a leap or two later.
            for _ in range(12):
                await leap(mock_clock, 8)
            assert app.disconnected.is_set()
            await wait_until(lambda: not server.barrier.connections)


async def test_shutdown_frees_a_stuck_write(open_tls_server: Open) -> None:
    """A peer that reads nothing does not hold the server past its grace."""
    app = Pouring()
    async with open_tls_server(http_app(app), BarrierSettings(grace_s=0.1)) as server:
        async with server.connect(receive_buffer=4096) as wire:
            await wire.send(request_bytes("GET", "/"))
            await trio.testing.wait_all_tasks_blocked(0.02)
            server.stop()
            with trio.fail_after(2):
                await server.wait_stopped()
            assert not server.barrier.connections


async def test_shutdown_waits_for_nobody_who_has_nothing_to_say(open_tls_server: Open) -> None:
    """Idle, in the middle of a head or of a handshake: over at once. What is under way is answered first."""
    started, release = trio.Event(), trio.Event()

    @http_app
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/wait":
            started.set()
            await release.wait()
        await answer(send, b"ok")

    async with open_tls_server(app, BarrierSettings(grace_s=600, close_drain_s=600, head_s=600)) as server:
        async with server.connect() as used, server.connect() as half, server.connect(raw=True) as silent:
            async with server.connect() as busy:
                assert (await used.ask("GET", "/")).status == 200
                await half.send(b"GET / HT")
                await busy.send(request_bytes("GET", "/wait"))
                await started.wait()
                await wait_until(lambda: len(server.barrier.connections) == 4)
                server.stop()
                for idle in (used, half, silent):
                    assert await idle.read_to_end() == b""
                release.set()
                last = await busy.read_answer()
                assert (last.body, last.headers["connection"]) == (b"ok", "close")
                with trio.fail_after(1):
                    await server.wait_stopped()


async def test_an_idle_connection_is_told_that_it_ends(
    authority: Authority, open_tls_server: Open, mock_clock: trio.testing.MockClock
) -> None:
    """close_notify comes before the FIN (RFC 9112, 9.8): a client that is strict about it sees a clean end."""
    mock_clock.rate = 1
    async with open_tls_server(hello, BarrierSettings(keep_alive_s=75), patience_s=200) as server:
        async with await trio.open_tcp_stream("127.0.0.1", server.port) as tcp:
            strict = trio.SSLStream(tcp, authority.trust, server_hostname="localhost")
            assert (await TlsWire(strict).ask("GET", "/")).status == 200
            await leap(mock_clock, 76)
            assert await strict.receive_some() == b""


# Bytes ----------------------------------------------------------------------------------------------------------------


async def test_bytes_pass_whole_both_ways_and_connections_are_kept(open_tls_server: Open) -> None:
    @http_app
    async def echo(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message.get("more_body", False)
        await answer(send, body)

    data = bytes(range(256)) * (3 * MIB // 256)
    async with open_tls_server(echo) as server, server.connect() as wire, trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(wire.send, request_bytes("POST", "/", body=data))
            assert (await wire.read_answer("POST")).body == data


@pytest.mark.parametrize("how", ["cut", "abort", "return", "raise"])
async def test_an_unfinished_answer_never_looks_whole(how: str, open_tls_server: Open) -> None:
    """And what was sent before a cut arrives."""

    @http_app
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await start_stream(send)
        await send({"type": "http.response.body", "body": b"x" * 300_000, "more_body": True})
        connection = scope["extensions"]["wakecall.connection"]
        if how in ("cut", "abort"):
            getattr(connection, how)()
            await trio.sleep_forever()
        elif how == "raise":
            raise RuntimeError("half way")

    async with open_tls_server(app, BarrierSettings(grace_s=0.1)) as server, server.connect() as wire:
        await wire.send(request_bytes("GET", "/"))
        broken = await wire.read_answer()
        assert broken.is_cut
        if how != "abort":
            assert len(broken.body) == 300_000


@pytest.mark.parametrize("framing", ["content-length: 200000", "transfer-encoding: chunked"])
async def test_an_early_answer_reaches_a_peer_that_is_still_sending(framing: str, open_tls_server: Open) -> None:
    """No reset overtakes it: the upload is read on for a while."""
    piece = b"1000\r\n" + b"x" * 0x1000 + b"\r\n" if "chunked" in framing else b"x" * 4096
    async with open_tls_server(early) as server:
        for _ in range(10):
            async with server.connect() as wire:
                await wire.send(request_bytes("POST", "/", framing) + piece)
                await trio.testing.wait_all_tasks_blocked()
                for _ in range(30):
                    await wire.send(piece)
                refusal = await wire.read_answer()
                assert (refusal.status, refusal.body, refusal.is_cut) == (413, b"no", False)
                assert refusal.headers["connection"] == "close"
                assert await wire.read_to_end() == b""


# The broker behind it -------------------------------------------------------------------------------------------------


async def test_a_stream_streams_and_a_client_that_leaves_cancels_it(authority: Authority) -> None:
    """Each event arrives before the next is sent; close_notify alone is a client's leaving."""
    async with open_served(certificates=authority.certificates(), trust=authority.trust) as served:
        async with served.publishing() as publisher:
            async with served.calling({"model": "qwen", "stream": True}) as reading:
                frame = await publisher.next("infer")
                async with publisher.upload(frame, SSE) as upload:
                    for n in range(3):
                        await upload.send(b"data: %d\n\n" % n)
                        if n == 0:
                            await reading.read_head()
                            assert reading.headers["content-type"] == "text/event-stream"
                        assert await reading.until(b"\n\n") == b"data: %d\n\n" % n
                    async with trio.open_nursery() as nursery:
                        assert isinstance(reading.wire, TlsWire)
                        nursery.start_soon(reading.wire.say_goodbye)
                        cancel = await publisher.next("cancel")
                        assert (cancel.task_id, cancel.data["reason"]) == (frame.task_id, "client_disconnected")
                        nursery.cancel_scope.cancel()
            assert served.broker.statistics().in_flight == 0


async def test_an_upload_is_held_back_by_a_client_that_reads_nothing(authority: Authority) -> None:
    """TLS keeps no more of it than the sockets do; the client's FIN then frees everything."""
    body = json.dumps({"model": "qwen", "stream": True}).encode()
    event = b"data: %b\n\n" % (b"x" * 65528)
    async with open_served(certificates=authority.certificates(), trust=authority.trust) as served:
        async with served.publishing() as publisher, served.server.connect(receive_buffer=4096) as client:
            await client.send(request_bytes("POST", "/v1/completions", body=body, host="localhost"))
            frame = await publisher.next("infer")
            async with publisher.upload(frame, SSE) as upload:
                sent = 0

                async def send() -> None:
                    nonlocal sent
                    await upload.send(event)
                    sent += len(event)
                    assert sent < 64 * MIB

                await send_until_stuck(send)
                await client.half_close()
                assert (await publisher.next("cancel")).task_id == frame.task_id
                assert served.broker.statistics().in_flight == 0


@pytest.mark.parametrize("end", ["fin", "rst", "close_notify"])
async def test_a_publisher_that_leaves_fails_what_it_was_sent(end: str, authority: Authority) -> None:
    async with open_served(certificates=authority.certificates(), trust=authority.trust) as served:
        async with served.publishing() as publisher, trio.open_nursery() as nursery:

            async def call() -> None:
                assert (await served.call({"model": "qwen"})).code == "publisher_disconnected"
                nursery.cancel_scope.cancel()

            nursery.start_soon(call)
            await publisher.next("infer")
            assert isinstance(publisher.reading.wire, TlsWire)
            await leave(publisher.reading.wire, end)


# Files ----------------------------------------------------------------------------------------------------------------


def encrypted(key: bytes) -> bytes:
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
        load_pem_private_key,
    )

    loaded = load_pem_private_key(key, None)
    return loaded.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))


BAD_PAIRS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "no-certificate": (lambda cert, _: cert.unlink(), "the certificate {cert} cannot be read: No such file"),
    "no-key": (lambda _, key: key.unlink(), "the key {key} cannot be read: No such file"),
    "directory": (lambda cert, _: (cert.unlink(), cert.mkdir()), "the certificate {cert} cannot be read: it is no"),
    "empty": (lambda cert, _: cert.write_bytes(b""), "{cert} holds no certificate in PEM form"),
    "der": (
        lambda cert, _: cert.write_bytes(ssl.PEM_cert_to_DER_cert(cert.read_text().partition("-----END")[0] + END)),
        "{cert} holds no certificate in PEM form",
    ),
    "cut-short": (lambda cert, _: cert.write_bytes(cert.read_bytes()[:300]), "{cert} holds no certificate in PEM"),
    "swapped": (lambda cert, key: cert.write_bytes(key.read_bytes()), "{cert} holds no certificate in PEM form"),
    "no-key-in-it": (lambda _, key: key.write_bytes(b"key"), "{key} holds no private key in PEM form"),
    "certificate-for-key": (lambda cert, key: key.write_bytes(cert.read_bytes()), "{key} holds no private key in PEM"),
    "encrypted": (lambda _, key: key.write_bytes(encrypted(key.read_bytes())), "the key in {key} is encrypted"),
}
END = "-----END CERTIFICATE-----\n"


@pytest.mark.parametrize(("spoil", "said"), BAD_PAIRS.values(), ids=BAD_PAIRS.keys())
def test_a_pair_that_cannot_be_used_is_told_by_file(
    spoil: Callable[[Path, Path], object], said: str, authority: Authority
) -> None:
    """And never asks for a password, on whatever terminal this runs."""
    certfile, keyfile = authority.issue()
    spoil(Path(certfile), Path(keyfile))
    with pytest.raises(BadCertificate) as raised:
        Certificates(certfile, keyfile)
    assert str(raised.value).startswith(said.format(cert=certfile, key=keyfile))


@pytest.mark.parametrize("gone", ["certificate", "key"])
def test_a_file_that_goes_while_it_is_read_is_told(
    gone: str, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As whoever renews it may have it: there when we looked, and not when OpenSSL did."""
    certificates = authority.certificates()
    before = certificates.context
    path = certificates.certfile if gone == "certificate" else certificates.keyfile

    def check_and_lose(what: str, checked: str) -> None:
        if checked == path:
            Path(checked).unlink()

    monkeypatch.setattr(tls, "_check_readable", check_and_lose)
    with pytest.raises(BadCertificate, match=r"cannot be read: No such file"):
        certificates.reload()
    assert certificates.context is before


@pytest.mark.parametrize("kind", ["same", "other"])
def test_a_key_that_is_another_certificates_is_told(kind: str, authority: Authority) -> None:
    """Of the same kind or not: OpenSSL says it in other words."""
    import trustme

    certfile, _ = authority.issue()
    other = authority.issue(to="other")[1]
    if kind == "other":
        issued = trustme.CA(key_type=trustme.KeyType.RSA).issue_cert("localhost", key_type=trustme.KeyType.RSA)
        issued.private_key_pem.write_to_path(other)
    with pytest.raises(BadCertificate, match="is not that of the first certificate in"):
        Certificates(certfile, other)


def test_a_pipe_is_not_waited_for(authority: Authority) -> None:
    import os

    certfile, keyfile = authority.issue()
    os.unlink(keyfile)
    os.mkfifo(keyfile)
    with pytest.raises(BadCertificate, match="no regular file"):
        Certificates(certfile, keyfile)


def test_both_may_stand_in_one_file(authority: Authority) -> None:
    certfile, keyfile = authority.issue()
    Path(certfile).write_bytes(Path(keyfile).read_bytes() + Path(certfile).read_bytes())
    Certificates(certfile, certfile)


async def test_a_renewed_certificate_is_for_handshakes_from_then_on(authority: Authority) -> None:
    """Connections go on with the one that they began with; a bad pair changes nothing."""
    certificates = authority.certificates()

    def serial(wire: TlsWire) -> str:
        return str(wire.stream.getpeercert()["serialNumber"])

    async with open_server(hello, certificates=certificates, trust=authority.trust) as server:
        async with server.connect() as before:
            assert isinstance(before, TlsWire)
            first = serial(before)
            authority.issue()
            certificates.reload()
            async with server.connect() as after:
                assert isinstance(after, TlsWire)
                second = serial(after)
                assert second != first
                assert (await after.ask("GET", "/")).status == 200
            assert (await before.ask("GET", "/")).status == 200
        authority.issue(to="other")
        Path(certificates.certfile).write_bytes(Path(authority.directory / "other.pem").read_bytes())
        with pytest.raises(BadCertificate):
            certificates.reload()
        async with server.connect() as still:
            assert isinstance(still, TlsWire)
            assert serial(still) == second
