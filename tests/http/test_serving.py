"""Where a broker without keys listens: on this machine's loopback, and nowhere else."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import trio

from wakecall import open_broker
from wakecall.serving import NotLoopback, ServeConfig, serve


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "", "example.org"])
def test_a_host_that_others_can_reach_is_refused(host: str) -> None:
    with pytest.raises(NotLoopback, match="no API keys yet"):
        ServeConfig(host=host)


async def test_a_loopback_name_that_leads_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver may answer what it likes for names below `localhost`; nothing stays open."""
    opened: list[socket.socket] = []
    real_socket = socket.socket

    def resolve(*_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("0.0.0.0", 0))]

    def opening(*arguments: Any, **options: Any) -> socket.socket:
        opened.append(real_socket(*arguments, **options))
        return opened[-1]

    async with open_broker() as broker:
        monkeypatch.setattr("wakecall.http.sockets.socket.getaddrinfo", resolve)
        monkeypatch.setattr("wakecall.http.sockets.socket.socket", opening)
        with pytest.raises(NotLoopback, match=r"odd\.localhost \(0\.0\.0\.0\)"), trio.fail_after(5):
            await serve(broker, ServeConfig(host="odd.localhost", port=0))
        monkeypatch.undo()
    assert [each.fileno() for each in opened] == [-1]
