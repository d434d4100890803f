"""Which origins are origins, which pages are admitted, and what their browsers are told."""

from __future__ import annotations

import pytest

from wakecall.http.cors import Cors, InvalidOrigin

PAGE = "https://chat.example.com"


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (PAGE, PAGE),
        ("HTTPS://Chat.Example.COM", PAGE),
        ("https://chat.example.com:443", PAGE),
        ("http://chat.example.com:80", "http://chat.example.com"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("https://chat.example.com:80", "https://chat.example.com:80"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("https://xn--bcher-kva.example", "https://xn--bcher-kva.example"),
        ("app://obsidian.md", "app://obsidian.md"),
        ("chrome-extension://abcdefghij", "chrome-extension://abcdefghij"),
    ],
)
def test_an_origin_is_admitted_as_a_browser_writes_it(given: str, sent: str) -> None:
    """Whatever its case was, and without a port that goes without saying."""
    cors = Cors.of([given])
    assert cors is not None
    assert cors.names("/v1/models", [sent])
    assert (b"access-control-allow-origin", sent.encode()) in cors.marks("/v1/models", [(b"origin", sent.encode())])


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("chat.example.com", "no scheme"),
        ("localhost:3000", "no scheme"),
        ("null", "no scheme"),
        ("", "no scheme"),
        ("https://chat.example.com/", "not even a slash"),
        ("https://chat.example.com/v1", "not even a slash"),
        ("https://", "its host is none"),
        ("https://*.example.com", "its host is none"),
        ("https://a b", "its host is none"),
        ("https://user@chat.example.com", "its host is none"),
        ("https://bücher.example", "its host is none"),
        ("https://chat.example.com?x", "its host is none"),
        ("https://chat.example.com:", "its host is none"),
        ("https://chat.example.com:0", "its port is none"),
        ("https://chat.example.com:65536", "its port is none"),
        ("https://chat.example.com\r\nx: y", "its host is none"),
    ],
)
def test_what_is_no_origin_is_refused_with_the_reason(given: str, why: str) -> None:
    with pytest.raises(InvalidOrigin, match=why):
        Cors.of([PAGE, given])


def test_without_an_origin_there_is_no_policy() -> None:
    assert Cors.of([]) is None


@pytest.mark.parametrize(
    ("path", "origins"),
    [
        ("/v1/models", ["https://evil.example"]),
        ("/v1/models", ["http://chat.example.com"]),
        ("/v1/models", ["https://chat.example.com:8443"]),
        ("/v1/models", ["https://chat.example.com.evil.example"]),
        ("/v1/models", ["null"]),
        ("/v1/models", []),
        ("/v1/models", [PAGE, "https://evil.example"]),
        ("/v1/models", [PAGE, PAGE]),
        ("/admin/v1/llms", [PAGE]),
        ("/publisher/v1/sessions/x", [PAGE]),
        ("/v1x", [PAGE]),
        ("//v1/models", [PAGE]),
        ("/", [PAGE]),
    ],
)
@pytest.mark.parametrize("any_too", [False, True])
def test_only_a_named_page_is_named_and_only_under_v1(path: str, origins: list[str], any_too: bool) -> None:
    """`*` names nobody."""
    cors = Cors.of([PAGE, *(["*"] if any_too else [])])
    assert cors is not None
    assert not cors.names(path, origins)


@pytest.mark.parametrize("origin", ["https://evil.example", "app://x", "http://127.0.0.1:1"])
def test_a_star_admits_every_origin_and_nothing_that_is_none(origin: str) -> None:
    cors = Cors.of(["*"])
    assert cors is not None
    assert (b"access-control-allow-origin", origin.encode()) in cors.marks("/v1", [(b"origin", origin.encode())])
    for none in (b"null", b"", b"https://x/", b"\xff", b"https://a b"):
        assert cors.marks("/v1", [(b"origin", none)]) == [(b"vary", b"Origin")]


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [
        (b"authorization", "authorization"),
        (b"authorization,content-type, x-stainless-os", "authorization,content-type, x-stainless-os"),
        (b"a\tb", None),
        (b"authorization,", None),
        (b"x\xff", None),
        (b"", None),
        (b"a" * 4097, None),
        (b"a,b;c", None),
        (b"a: b", None),
    ],
)
def test_the_headers_that_a_page_wants_to_send_are_allowed_if_they_are_some(asked: bytes, allowed: str | None) -> None:
    cors = Cors.of([PAGE])
    assert cors is not None
    headers = [
        (b"origin", PAGE.encode()),
        (b"access-control-request-method", b"POST"),
        (b"access-control-request-headers", asked),
    ]
    answer = cors.preflight("OPTIONS", "/v1/chat/completions", headers)
    assert answer is not None
    assert answer.get("Access-Control-Allow-Headers") == allowed
