"""An open broker answers to this machine's own names, and to no page of another origin."""

from __future__ import annotations

import pytest

from wakecall.errors import Forbidden
from wakecall.http.auth import refuse_foreign

OURS = [
    "127.0.0.1",
    "127.0.0.1:8080",
    "localhost",
    "LOCALHOST:1",
    "[::1]:8080",
    "[::1]",
    "[::1%lo]:80",
    "127.8.9.1:80",
    "a.localhost:3",
]
FOREIGN = [
    "evil.example",
    "evil.example:8080",
    "10.0.0.1:8080",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "localhost:8080@evil.example",
    "localhost:8080/x",
    "localhost:x",
    "127.0.0.1:8080.evil.example",
    "0.0.0.0:8080",
    "[::2]:8080",
    "127.0.0.1:8080127.0.0.1:8080",
    "127.0.0.1:evil.example:80",
    "localhost:٣",
    "[127.0.0.1]",
    "[::1%]",
    "localhost:",
    "127.0.0.1:123456",
    "",
]


@pytest.mark.parametrize("host", OURS)
def test_a_loopback_name_is_ours(host: str) -> None:
    refuse_foreign(host, [])
    refuse_foreign(host, [f"http://{host}"])
    refuse_foreign(None, [f"https://{host}"])


@pytest.mark.parametrize("host", FOREIGN)
def test_any_other_host_is_refused(host: str) -> None:
    with pytest.raises(Forbidden):
        refuse_foreign(host, [])


@pytest.mark.parametrize(
    "origin", ["null", "", "file://localhost", "localhost", *(f"http://{each}" for each in FOREIGN)]
)
def test_any_other_origin_is_refused(origin: str) -> None:
    with pytest.raises(Forbidden):
        refuse_foreign("localhost", [origin])
