"""What tells a conversation: the same from its first call to its last, another for another, and cheap whatever the body."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wakecall.http.sniff import sniff

SYSTEM = {"role": "system", "content": "You are terse."}


def affinity(said: dict[str, Any], caller: bytes = b"key_1", **how: Any) -> bytes | None:
    return sniff(json.dumps({"model": "qwen", **said}, **how).encode(), "application/json", caller).affinity


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


texts = st.text(max_size=40)
messages = st.lists(st.builds(user, texts) | st.builds(assistant, texts), max_size=6)


@given(texts, messages, st.sampled_from(["none", "system", "developer"]), st.sampled_from([None, 1]))
def test_a_conversation_has_one_from_its_first_call_to_its_last(
    first: str, later: list[Any], role: str, indent: int | None
) -> None:
    """Whatever else the body says, and wherever it says it."""
    begins = [user(first)] if role == "none" else [{"role": role, "content": "Be terse."}, user(first)]
    one = affinity({"messages": begins}, indent=indent)
    assert one is not None
    assert affinity({"temperature": 1, "messages": begins + later, "stream": True}, indent=indent) == one


def test_another_conversation_has_another_one() -> None:
    """Also behind the same system prompt, which many share."""
    said = [
        {"messages": [user("a")]},
        {"messages": [user("b")]},
        {"messages": [SYSTEM]},
        {"messages": [SYSTEM, user("a")]},
        {"messages": [SYSTEM, user("b")]},
        {"input": [user("a")]},
        {"input": "a"},
        {"prompt": "a"},
        {"prompt": ["c", "b"]},
        {"prompt": ["b", "c"]},
    ]
    assert len({affinity(each) for each in said}) == len(said)


def test_what_two_callers_say_alike_is_not_alike() -> None:
    for said in ({"prompt_cache_key": "a"}, {"user": "a"}, {"messages": [user("a")]}):
        assert affinity(said, b"key_1") != affinity(said, b"key_2")
        assert affinity(said, b"key_1") == affinity(said, b"key_1")
        assert affinity(said, b"k" * 64 + b"1") == affinity(said, b"k" * 64 + b"2")  # no more of it counts


def test_the_first_of_the_hints_that_is_there_decides() -> None:
    hints: list[dict[str, Any]] = [
        {"prompt_cache_key": "k"},
        {"user": "u"},
        {"metadata": {"user_id": "m", "other": [1]}},
        {"messages": [user("a")]},
        {"input": "i"},
        {"prompt": "p"},
    ]
    for number, hint in enumerate(hints):
        rest: dict[str, Any] = {}
        for each in reversed(hints[number:]):
            rest |= each
        assert affinity(rest) == affinity(hint) is not None


@pytest.mark.parametrize(
    "nothing",
    [
        {"prompt_cache_key": None},
        {"prompt_cache_key": ""},
        {"user": None},
        {"user": ""},
        {"metadata": None},
        {"metadata": {}},
        {"metadata": []},
        {"metadata": "user_id"},
        {"metadata": {"user_id": None}},
        {"metadata": {"user_id": ""}},
        {"metadata": {"x": "x" * 5000, "user_id": "u"}},
        {"messages": []},
        {"messages": None},
        {"messages": ""},
        {"input": None},
    ],
)
def test_what_says_nothing_leaves_it_to_the_next(nothing: dict[str, Any]) -> None:
    assert affinity(nothing) is None
    assert affinity(nothing | {"prompt": "p"}) == affinity({"prompt": "p"})


@pytest.mark.parametrize("said", [7, True, ["a"], {"a": 1}, 1e300])
@pytest.mark.parametrize("name", ["prompt_cache_key", "user", "messages", "input", "prompt"])
def test_a_hint_of_another_type_is_an_engines_to_refuse(name: str, said: Any) -> None:
    assert affinity({name: said}) == affinity({name: said}) is not None


@pytest.mark.parametrize(
    "begins",
    [
        [user("long " * 2000)],
        [{"role": "system", "content": "long " * 2000}, user("a")],
        [SYSTEM, user("é" * 3000)],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:" + "A" * 100_000}}]}],
    ],
)
def test_of_a_long_beginning_the_first_bytes_count(begins: list[Any]) -> None:
    one = affinity({"messages": begins})
    assert one is not None
    assert affinity({"messages": [*begins, assistant("b"), user("c")]}) == one
    other = json.loads(json.dumps(begins).replace("AAAA", "BBBB").replace("long ", "Long ").replace("\u00e9", "e"))
    other[0]["content"] = "x"
    assert affinity({"messages": other}) != one


def test_a_long_text_counts_with_its_first_bytes() -> None:
    assert affinity({"prompt": "a" * 5000}) == affinity({"prompt": "a" * 5000 + "b"})
    assert affinity({"prompt": "a" * 4000}) != affinity({"prompt": "a" * 4000 + "b"})


def test_it_is_short_and_tells_nothing_of_what_was_said() -> None:
    found = affinity({"messages": [user("a")]})
    assert found is not None
    assert len(found) == 8


def test_a_form_has_none() -> None:
    form = b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n'
    form += b'--B\r\nContent-Disposition: form-data; name="user"\r\n\r\nu\r\n--B--\r\n'
    assert sniff(form, "multipart/form-data; boundary=B", b"key_1").affinity is None


@pytest.mark.parametrize(
    "elements",
    [
        b"[" * 60 + b"]" * 60,
        b"[1, 2]",
        b'"a\\"\\\\\\u00e9"',
        b'{"role":"system"}, {"role": "user"}',
        b"-1.5e-30, true",
        '"é模"'.encode(),
    ],
)
def test_the_window_may_end_within_anything(elements: bytes) -> None:
    """And then it is not looked for behind it."""
    for pad in range(4096 - len(elements) - 4, 4100):
        body = b'{"model": "q", "messages": [' + b" " * pad + elements + b"]}"
        assert sniff(body, "application/json").affinity is not None
