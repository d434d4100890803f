"""Listening sockets that notice a peer gone silent. Accepted sockets inherit every option that is set here."""

from __future__ import annotations

import contextlib
import errno
import math
import socket

from ..addresses import is_loopback

__all__ = ["CannotBind", "bind", "format_url", "is_loopback"]

_BACKLOG = 4096
_PROBES = 3


class CannotBind(OSError):
    """An address cannot be listened on; the message says which and why."""


def bind(host: str, port: int, *, peer_stall_s: float = 60.0) -> list[socket.socket]:
    """Listen on every address of `host`. With port 0 all of them get the same free one.

    A peer that vanishes without a word is noticed within `peer_stall_s`: by keep-alive probes while nothing is sent, by
    TCP_USER_TIMEOUT while something is. That one also ends a live peer that reads nothing for so long, as the writes'
    own deadline does. Both are Linux's; elsewhere only what the system has is set.

    Args:
        host: a name or an IPv4 or IPv6 address, brackets allowed; empty for every interface.
        port: 0 to 65535.
        peer_stall_s: seconds.

    Returns:
        Listening, non-blocking sockets; the caller closes them.

    Raises:
        CannotBind: the name is unknown, or an address is taken or not ours.
    """
    name = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        found = socket.getaddrinfo(name or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise CannotBind(f"cannot listen on {host}: the name is not known") from error
    listening: list[socket.socket] = []
    with contextlib.ExitStack() as on_failure:
        for family, _, _, _, address in dict.fromkeys(found):
            bound_port = listening[0].getsockname()[1] if listening else port
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
                on_failure.callback(sock.close)
                _set_options(sock, peer_stall_s)
                sock.bind((address[0], bound_port, *address[2:]))
                sock.listen(_BACKLOG)
            except OSError as error:
                # A machine without IPv6 may still resolve `localhost` to it.
                if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and len(found) > 1:
                    continue
                raise CannotBind(error.errno, f"cannot listen on {host}:{port}: {_reason(error)}") from error
            listening.append(sock)
        if not listening:
            raise CannotBind(f"cannot listen on {host}:{port}: no address of it is this machine's")
        on_failure.pop_all()
    return listening


def format_url(sock: socket.socket, *, is_tls: bool = False) -> str:
    """The http or https URL of a listening socket, with an address that a client on this machine can use."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    scheme = "https" if is_tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _set_options(sock: socket.socket, peer_stall_s: float) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if sock.family == socket.AF_INET6:
        # So that `::` and `0.0.0.0` do not get in each other's way.
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    # Silence for a part of the time, then as many probes as fill the rest. Whole seconds are the finest there is.
    probe_s = max(1, math.floor(peer_stall_s / (_PROBES + 2)))
    options = {
        "TCP_KEEPIDLE": max(1, math.floor(peer_stall_s - _PROBES * probe_s)),
        "TCP_KEEPINTVL": probe_s,
        "TCP_KEEPCNT": _PROBES,
        "TCP_USER_TIMEOUT": max(1, round(peer_stall_s * 1000)),
    }
    for name, value in options.items():
        option = getattr(socket, name, None)
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _reason(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is in use"
    if error.errno == errno.EACCES:
        return "this port needs privileges"
    return error.strerror or "it failed"
