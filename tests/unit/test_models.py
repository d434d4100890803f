"""Names and ids: what the protocol allows on the wire, and nothing else."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wakecall.models import Kind, Status, is_id, is_llm_name

ALNUM = string.ascii_letters + string.digits
SEGMENT = st.builds(str.__add__, st.sampled_from(ALNUM), st.text(st.sampled_from(ALNUM + "._:@-"), max_size=20))
NAMES = st.lists(SEGMENT, min_size=1, max_size=5).map("/".join)
IDS = st.text(st.sampled_from(ALNUM + "_-"), min_size=1, max_size=128)


@given(NAMES)
def test_what_the_grammar_makes_is_a_name(name: str) -> None:
    """Segments of letters, digits and `._:@-`, each beginning with a letter or digit, joined by `/`."""
    assert is_llm_name(name) is (len(name) <= 128)


def by_hand(name: str) -> bool:
    """The grammar once more, without a regular expression."""
    return len(name) <= 128 and all(
        segment != "" and segment[0] in ALNUM and all(character in ALNUM + "._:@-" for character in segment)
        for segment in name.split("/")
    )


@given(st.text(st.sampled_from("aZ0/._:@-é \n\0٣ａ"), max_size=8) | st.text(max_size=140))
def test_nothing_else_is_a_name(name: str) -> None:
    assert is_llm_name(name) is by_hand(name)


@given(IDS)
def test_what_the_grammar_makes_is_an_id(text: str) -> None:
    assert is_id(text)


@given(st.text(st.sampled_from("aZ0_-./ \n\0é٣"), max_size=8) | st.text(max_size=140))
def test_nothing_else_is_an_id(text: str) -> None:
    assert is_id(text) is (1 <= len(text) <= 128 and all(character in ALNUM + "_-" for character in text))


@pytest.mark.parametrize(
    "name",
    ["qwen2.5:7b", "a", "0", "org/model", "hf.co/bartowski/Llama-3.2-1B-GGUF:Q4_K_M", "m@2026-01", "a--b", "x" * 128],
)
def test_names_that_engines_have_are_names(name: str) -> None:
    assert is_llm_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "", "/", "/a", "a/", "a//b", ".a", "-a", "_a", "a/.b", "a/../b", "..", "a b", "a\n", "\na", "a\0", "é", "٣",
        "a\\b", "a?b", "a#b", "a%2fb", "x" * 129, "C:\\models\\qwen.gguf", "/models/qwen.gguf", "a\u2028",
    ],
)  # fmt: skip
def test_paths_and_tricks_are_no_names(name: str) -> None:
    """Nothing that could climb out of a path, split a header or end a line."""
    assert not is_llm_name(name)


@pytest.mark.parametrize(("text", "fine"), [("x" * 128, True), ("x" * 129, False), ("", False), ("a\n", False)])
def test_an_ids_bounds(text: str, fine: bool) -> None:
    assert is_id(text) is fine


def test_statuses_and_kinds_are_spelt_as_on_the_wire() -> None:
    assert [str(each) for each in Status] == ["active", "hibernating", "inactive"]
    assert [str(each) for each in Kind] == ["virtual", "public"]
