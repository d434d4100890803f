"""What a key looks like, what is kept of it, and which names it opens."""

from __future__ import annotations

import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wakecall.keys import (
    ROLES,
    digest_of,
    format_key,
    header_for,
    is_owner,
    is_pattern,
    is_presentable,
    matcher_of,
    role_of,
)

NAME_CHARACTERS = "aB9._:@/-"


@pytest.mark.parametrize("role", ROLES)
def test_a_key_names_its_role_and_holds_all_its_bits(role: str) -> None:
    keys = {format_key(role, bytes([first, *[0] * 30, last])) for first in (0, 1, 255) for last in (0, 1, 255)}  # type: ignore[arg-type]
    assert len(keys) == 9
    for key in keys:
        assert re.fullmatch(rf"wakecall_{role}_[a-z2-7]{{52}}", key)


def test_a_key_of_too_few_bits_is_not_made() -> None:
    with pytest.raises(ValueError, match="32 random bytes, not 16"):
        format_key("client", bytes(16))


def test_what_is_kept_is_the_sha_256_of_the_whole_key() -> None:
    key = format_key("client", bytes(range(32)))
    assert digest_of(key) == hashlib.sha256(key.encode()).hexdigest()
    assert digest_of(key[:-1]) != digest_of(key) != digest_of(key + " ")


def test_whatever_is_presented_has_a_digest() -> None:
    """What a peer sends is no key, and no reason to fail."""
    for presented in ("", "\udc80", "\0", "é" * 100_000):
        assert len(digest_of(presented)) == 64


@pytest.mark.parametrize(
    ("patterns", "matching", "others"),
    [
        (None, ["a", "a/b", "x" * 128], []),
        ([], [], ["a", ""]),
        (["qwen"], ["qwen"], ["qwen2", "Qwen", "aqwen", "qwen/b", ""]),
        (["qwen*"], ["qwen", "qwen2.5:7b", "qwen/org"], ["Qwen", "my-qwen"]),
        (["*"], ["a", "a/b"], []),
        (["org/*"], ["org/a", "org/a/b"], ["org", "other/a"]),
        (["*/*-7b"], ["a/b-7b", "a/b/c-7b"], ["b-7b", "a/b-7b-q4"]),
        (["a.c"], ["a.c"], ["abc"]),
        (["a*b*c"], ["abc", "aXbYc", "abbcc"], ["ac", "acb", "abcd"]),
        (["ab*ba"], ["abba", "abXba"], ["aba", "ab"]),
        (["**a**"], ["a", "bab"], ["b"]),
        (["one", "two*"], ["one", "two", "two3"], ["one2", "three"]),
    ],
)
def test_a_pattern_opens_what_it_says(patterns: list[str] | None, matching: list[str], others: list[str]) -> None:
    matches = matcher_of(patterns)
    assert [name for name in matching if not matches(name)] == []
    assert [name for name in others if matches(name)] == []


@given(st.text("ab*", max_size=8), st.text("ab", max_size=8))
def test_a_star_is_any_number_of_characters(pattern: str, name: str) -> None:
    """The same verdict as the plainest definition of it."""

    def plainly(pattern: str, name: str) -> bool:
        if not pattern:
            return not name
        if pattern[0] == "*":
            return plainly(pattern[1:], name) or (name != "" and plainly(pattern, name[1:]))
        return name != "" and name[0] == pattern[0] and plainly(pattern[1:], name[1:])

    assert matcher_of([pattern])(name) is plainly(pattern, name)


def test_a_name_that_nearly_matches_many_stars_is_not_tried_in_every_way() -> None:
    """There are more ways to share it out between the stars than could ever be tried: this would not end."""
    assert not matcher_of(["*a" * 63 + "*b"])("a" * 128)
    assert matcher_of(["*a" * 63 + "*b"])("a" * 127 + "b")


def test_what_may_be_a_pattern_or_an_owner() -> None:
    assert all(is_pattern(text) for text in ("*", "a/b-*", NAME_CHARACTERS))
    assert not any(is_pattern(text) for text in ("", "a b", "a?", "[a]", "é", "a\n", "a" * 129))
    assert all(is_owner(text) for text in ("local", "key_0a", "anna@example.org", "9"))
    assert not any(is_owner(text) for text in ("", "-a", "a/b", "a b", "é", "a\n", "a" * 129))


@pytest.mark.parametrize(
    ("url", "header"),
    [
        ("https://broker.example.com", {"authorization": "Bearer k"}),
        ("https://user:password@broker.example.com", {"x-api-key": "k"}),
        ("https://user@broker.example.com/below", {"x-api-key": "k"}),
        ("https://broker.example.com/a@b", {"authorization": "Bearer k"}),
    ],
)
def test_a_key_goes_where_a_proxys_password_does_not(url: str, header: dict[str, str]) -> None:
    assert header_for("k", url) == header


def test_a_key_says_its_role_and_another_says_none() -> None:
    assert [role_of(format_key(role, bytes(32))) for role in ROLES] == list(ROLES)
    assert [role_of(key) for key in ("sk-123", "wakecall_", "wakecall_client", "")] == [None] * 4


@pytest.mark.parametrize(
    ("text", "can"), [("k", True), ("~" * 1024, True), ("~" * 1025, False), ("a b", False), ("é", False)]
)
def test_what_can_be_sent_as_a_key(text: str, can: bool) -> None:
    assert is_presentable(text) is can
