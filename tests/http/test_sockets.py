"""Listening sockets: where they listen, what accepted ones inherit, and that a peer gone silent is noticed."""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
from typing import Any

import pytest
import trio

from tests.http.wire import http_app, open_server, request_bytes
from wakecall.http.barrier import BarrierSettings
from wakecall.http.sockets import CannotBind, bind, format_url, is_loopback

SO_ATTACH_FILTER = 26
linux_only = pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the options are Linux's")


def close(sockets: list[socket.socket]) -> None:
    for each in sockets:
        each.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]"])
def test_every_address_of_a_host_is_listened_on_at_one_port(host: str) -> None:
    """Also where port 0 leaves the choice to the system; what is bound accepts at its URL."""
    try:
        sockets = bind(host, 0)
    except CannotBind:
        if ":" not in host:
            raise
        pytest.skip("this machine has no IPv6")
    try:
        assert len({sock.getsockname()[1] for sock in sockets}) == 1
        for sock in sockets:
            assert sock.getblocking() is False
            assert is_loopback(sock.getsockname()[0])
            address, port = format_url(sock).removeprefix("http://").rsplit(":", 1)
            socket.create_connection((address.strip("[]"), int(port)), timeout=5).close()
    finally:
        close(sockets)


def test_a_url_names_an_address_that_can_be_called() -> None:
    """Not the wildcard that is listened on."""
    sockets = bind("0.0.0.0", 0)
    try:
        assert format_url(sockets[0]) == f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
    finally:
        close(sockets)


def test_a_taken_port_is_said_in_words() -> None:
    """With the address; and nothing stays open."""
    taken = bind("127.0.0.1", 0)
    port = taken[0].getsockname()[1]
    try:
        with pytest.raises(CannotBind, match=rf"cannot listen on 127\.0\.0\.1:{port}: the port is in use") as raised:
            bind("127.0.0.1", port)
        assert raised.value.errno == errno.EADDRINUSE
        assert isinstance(raised.value, OSError)
    finally:
        close(taken)
    close(bind("127.0.0.1", port))


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 70 + ".example", "192.0.2.1"])
def test_an_address_that_is_not_ours_is_said_in_words(host: str) -> None:
    """An unknown name, one that is no name, another machine's address."""
    with pytest.raises(CannotBind, match="cannot listen on "):
        bind(host, 0)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("LocalHost", True),
        ("a.localhost", True),
        ("::ffff:127.0.0.1", True),
        ("", False),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.1", False),
        ("::ffff:192.168.0.1", False),
        ("localhost.example", False),
        ("127.0.0.1.example", False),
    ],
)
def test_loopback_is_told_from_everything_else(host: str, loopback: bool) -> None:
    """An open broker binds only there."""
    assert is_loopback(host) is loopback


@linux_only
def test_accepted_sockets_inherit_what_notices_a_silent_peer() -> None:
    """Probes and the user timeout together stay within the time that was asked for."""
    sockets = bind("127.0.0.1", 0, peer_stall_s=60)
    try:
        with socket.create_connection(sockets[0].getsockname()):
            sockets[0].settimeout(5)
            accepted, _ = sockets[0].accept()
            with accepted:
                assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
                idle, interval, count = (
                    accepted.getsockopt(socket.IPPROTO_TCP, option)
                    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
                )
                assert 30 <= idle + interval * count <= 60
    finally:
        close(sockets)


def fall_silent(sock: Any) -> None:
    """Drop every segment that arrives at this socket, without a word: as a machine does whose cable was pulled."""
    drop_all = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    program = struct.pack("HL", 1, ctypes.addressof(drop_all))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)


@linux_only
@pytest.mark.parametrize("while_sending", [False, True])
async def test_a_peer_gone_silent_is_noticed(while_sending: bool) -> None:
    """Real time, for the kernel's timers are: about 2 s, whether the app is sending or only waiting."""
    started, disconnected = trio.Event(), trio.Event()

    async def tick(send: Any) -> None:
        while while_sending:
            await send({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})
            await trio.sleep(0.1)

    @http_app
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        started.set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tick, send)
            while (await receive())["type"] != "http.disconnect":
                pass
            disconnected.set()
            nursery.cancel_scope.cancel()

    async with open_server(app, BarrierSettings(peer_stall_s=2)) as server, server.connect() as wire:
        await wire.send(request_bytes("GET", "/"))
        await started.wait()
        fall_silent(wire.stream.socket)
        with trio.fail_after(8):
            await disconnected.wait()
