"""The meter: what an answer says of its tokens is found however it is cut, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from wakecall.usage import MOST_TOKENS, PlainMeter, StreamMeter, Tokens, UsageMeter, meter_for

UNKNOWN = Tokens(None, None)


def fed(meter: UsageMeter, pieces: Iterable[bytes]) -> Tokens:
    for piece in pieces:
        meter.feed(piece)
    return meter.tokens()


def whole(meter: UsageMeter, text: bytes) -> Tokens:
    return fed(meter, [text])


def event(data: Any, name: str = "") -> bytes:
    text = data if isinstance(data, str) else json.dumps(data)
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


def delta(text: str, **members: Any) -> bytes:
    return event({"object": "chat.completion.chunk", "choices": [{"delta": {"content": text}}], **members})


CHAT_USAGE = {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}
CHAT = delta("Hi") + delta("!", usage=None) + event({"choices": [], "usage": CHAT_USAGE}) + event("[DONE]")
RESPONSES = (
    event({"type": "response.created", "response": {"id": "r", "usage": None}}, "response.created")
    + event({"type": "response.output_text.delta", "delta": 'say "usage"'})
    + event(
        {
            "type": "response.completed",
            "response": {
                "tools": [{"parameters": {"properties": {"usage": {"input_tokens": 99, "output_tokens": 99}}}}],
                "usage": {"input_tokens": 7, "input_tokens_details": {"cached_tokens": 4}, "output_tokens": 5},
            },
        }
    )
)
MESSAGES = (
    event(
        {
            "type": "message_start",
            "message": {
                "usage": {
                    "input_tokens": 10,
                    "cache_creation_input_tokens": 20,
                    "cache_read_input_tokens": 30,
                    "output_tokens": 1,
                }
            },
        },
        "message_start",
    )
    + event({"type": "content_block_delta", "delta": {"text": "Hello"}})
    + event({"type": "message_delta", "usage": {"output_tokens": 4}})
    + event({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 9}})
    + event({"type": "message_stop"})
)
STREAMS = {"chat": (CHAT, Tokens(12, 3)), "responses": (RESPONSES, Tokens(7, 5)), "messages": (MESSAGES, Tokens(60, 9))}

PLAIN = {
    "chat": ({"choices": [{"message": {"content": "x"}}], "usage": CHAT_USAGE, "id": "1"}, Tokens(12, 3)),
    "embeddings": ({"data": [{"embedding": [0.5, -1e-3]}], "usage": {"prompt_tokens": 8}}, Tokens(8, 0)),
    "responses": (
        {"output": [], "tools": [{"usage": {"input_tokens": 1}}], "usage": {"input_tokens": 7, "output_tokens": 5}},
        Tokens(7, 5),
    ),
    "messages": (
        {"type": "message", "usage": {"input_tokens": 1, "cache_read_input_tokens": 2, "output_tokens": 3}},
        Tokens(3, 3),
    ),
    "escapes": (
        {"a": 'say "usage": {"prompt_tokens": 9}, \\', "b\\": ['"', "\\\\"], "usage": {"prompt_tokens": 8}},
        Tokens(8, 0),
    ),
    "a value of that name": ({"object": "usage", "a": [{"x": 1}], "usage": {"prompt_tokens": 8}}, Tokens(8, 0)),
    "none": ({"choices": [], "usage": None}, UNKNOWN),
    "a duration": ({"text": "x", "usage": {"type": "duration", "seconds": 3}}, UNKNOWN),
}


# What is found ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stream", "tokens"), STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_a_streams_usage_is_found_wherever_it_is_cut(stream: bytes, tokens: Tokens, line_end: bytes) -> None:
    """Byte by byte, and at each place in two; with every line end that events may have."""
    stream = stream.replace(b"\n", line_end)
    assert fed(StreamMeter(), (stream[at : at + 1] for at in range(len(stream)))) == tokens
    for at in range(len(stream) + 1):
        assert fed(StreamMeter(), [stream[:at], stream[at:]]) == tokens


@pytest.mark.parametrize(("answer", "tokens"), PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_plain_answers_usage_is_found_wherever_it_is_cut(
    answer: dict[str, Any], tokens: Tokens, indent: int | None
) -> None:
    text = json.dumps(answer, indent=indent).encode()
    assert fed(PlainMeter(), (text[at : at + 1] for at in range(len(text)))) == tokens
    for at in range(len(text) + 1):
        assert fed(PlainMeter(), [text[:at], text[at:]]) == tokens


def test_the_last_usage_counts() -> None:
    """vLLM can say it in every event, as far as it has come."""
    running = b"".join(delta("x", usage={"prompt_tokens": 5, "completion_tokens": n}) for n in range(1, 40))
    assert whole(StreamMeter(), running) == Tokens(5, 39)
    twice = b'{"usage": {"prompt_tokens": 1, "completion_tokens": 2}, "usage": {"prompt_tokens": 3, "completion_tokens": 4}}'
    assert whole(PlainMeter(), twice) == Tokens(3, 4)


def test_a_stream_of_anthropics_that_is_cut_has_its_input_alone() -> None:
    """What `message_start` says of the output is only its beginning."""
    assert whole(StreamMeter(), MESSAGES[: MESSAGES.index(b'{"type": "message_delta"')]) == Tokens(60, None)


def test_a_stream_may_lack_its_last_line_end() -> None:
    assert whole(StreamMeter(), CHAT[: CHAT.rindex(b"}") + 1]) == Tokens(12, 3)


def test_a_plain_answer_has_no_bound() -> None:
    """Embeddings are megabytes in one line, with their usage at the end."""
    vector = [0.12345678] * 200_000
    text = json.dumps({"data": [{"embedding": vector}], "usage": {"prompt_tokens": 8, "total_tokens": 8}}).encode()
    assert len(text) > 2_000_000
    meter = PlainMeter()
    assert fed(meter, (text[at : at + 65_536] for at in range(0, len(text), 65_536))) == Tokens(8, 0)


def test_the_last_event_of_a_response_may_be_as_long_as_requests_are() -> None:
    long = {"type": "response.completed", "response": {"instructions": "x" * 200_000, "usage": {"input_tokens": 3}}}
    assert whole(StreamMeter(), event(long)) == Tokens(3, None)


# What is not --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"choices": [{"message": {"usage": {"prompt_tokens": 1, "completion_tokens": 1}}}]}',
        '[{"usage": {"prompt_tokens": 1, "completion_tokens": 1}}]',
        '{"content": "\\"usage\\": {\\"prompt_tokens\\": 1, \\"completion_tokens\\": 1}"}',
        '{"content": "\\\\\\"usage\\": {\\"prompt_tokens\\": 1}"}',
        '{"a": "usage", "prompt_tokens": 1}',
        '{"a": ["usage", {"prompt_tokens": 1}]}',
        '{"usage": [{"prompt_tokens": 1}]}',
        '{"usage": "x", "a": {"prompt_tokens": 1}}',
        '"usage": {"prompt_tokens": 1}',
        '{"message": {"usage": {"prompt_tokens": 1}}}',
    ],
)
def test_a_usage_that_is_none_of_the_answers_own_is_not_taken_for_it(text: str) -> None:
    assert whole(PlainMeter(), text.encode()) == UNKNOWN


def test_a_stream_is_looked_into_only_where_its_api_says_it() -> None:
    said = {"prompt_tokens": 1, "completion_tokens": 1}
    for nested in ({"choices": [{"usage": said}]}, {"error": {"usage": said}}, [{"usage": said}], {"response": [said]}):
        assert whole(StreamMeter(), event(nested)) == UNKNOWN
    assert whole(StreamMeter(), b": " + json.dumps({"usage": said}).encode() + b"\n\n") == UNKNOWN
    assert whole(StreamMeter(), delta(json.dumps({"usage": said}))) == UNKNOWN


@pytest.mark.parametrize(
    "value",
    ["-1", "1.5", "1.0", "true", '"7"', "null", "{}", "[1]", "1e3", "NaN", "1" * 30, "9" * 5000, str(MOST_TOKENS + 1)],
)
def test_what_is_no_count_was_not_said(value: str) -> None:
    """And does not undo what was."""
    bad = f'{{"usage": {{"prompt_tokens": {value}, "completion_tokens": {value}}}}}'
    assert whole(PlainMeter(), bad.encode()) == UNKNOWN
    assert whole(StreamMeter(), event(bad)) == UNKNOWN
    assert whole(StreamMeter(), CHAT + event(bad)) == Tokens(12, 3)


@pytest.mark.parametrize(
    ("meter", "text"),
    [
        (PlainMeter, b'{"usage": ' + b'{"a":' * 100_000),
        (PlainMeter, b'{"usage": ' + b"[" * 100_000),
        (PlainMeter, b'{"usage": {"a": ' + b"[" * 5000 + b"}"),
        (PlainMeter, b"{" + b'"usage": {' * 10_000),
        (PlainMeter, b'{"usage": {"prompt_tokens": 1, "a": "' + b"x" * 20_000 + b'"}}'),
        (PlainMeter, b"}" * 100 + b'{"usage": {"prompt_tokens": 1}}'),
        (PlainMeter, b'{"usage"' * 50_000),
        (PlainMeter, b'"' * 100_001),
        (PlainMeter, b'"\\' * 100_001),
        (PlainMeter, b'{"usage":' + b" " * 100_000),
        (StreamMeter, b'data: {"usage": ' + b'{"a":' * 30_000 + b"\n\n"),
        (StreamMeter, b'data: {"usage": ' + b"[" * 100_000 + b"\n\n"),
        (StreamMeter, b'data: {"usage": {"prompt_tokens": 1}, "x": "' + b"x" * 300_000 + b'"}\n\n'),
        (StreamMeter, b'data: "usage": {\xff\x00\n\n'),
        (StreamMeter, b"data: " + b"x" * 1_000_000),
    ],
)
def test_junk_is_held_within_bounds_and_is_no_usage(meter: type[UsageMeter], text: bytes) -> None:
    """Whole, and in pieces: the same, no exception, and no more in memory than a line or an object may have."""
    whole_meter, cut_meter = meter(), meter()
    assert whole(whole_meter, text) == UNKNOWN
    assert fed(cut_meter, (text[at : at + 1000] for at in range(0, len(text), 1000))) == UNKNOWN
    for each in (whole_meter, cut_meter):
        held = each._line if isinstance(each, StreamMeter) else each._held + (each._object or b"")
        assert len(held) <= 256 * 1024


def test_a_usage_that_is_too_long_spoils_no_other() -> None:
    text = b'{"usage": {"x": "' + b'{\\"' * 10_000 + b'"}, "usage": {"prompt_tokens": 3, "completion_tokens": 4}}'
    for size in (1000, 1_000_000):
        assert fed(PlainMeter(), (text[at : at + size] for at in range(0, len(text), size))) == Tokens(3, 4)


def test_a_line_that_is_too_long_spoils_no_other() -> None:
    long = b"data: " + b"x" * 300_000 + b"\n\n"
    for size in (1000, 1_000_000):
        text = long + CHAT + long
        assert fed(StreamMeter(), (text[at : at + size] for at in range(0, len(text), size))) == Tokens(12, 3)


# Any answer, cut anyhow ---------------------------------------------------------------------------------------------

counts = st.integers(0, 2000) | st.sampled_from([-1, 10**40, 1.5, True, None, "7", {"a": 1}, [3]])
MEMBERS = ["prompt_tokens", "completion_tokens", "input_tokens", "output_tokens", "cache_read_input_tokens", "x"]
usages = st.dictionaries(st.sampled_from(MEMBERS), counts, max_size=4) | st.sampled_from([None, 3, "usage", [], "{"])
names = st.sampled_from(["usage", "message", "response", "a", 'u"', "usag", "\\", '"usage"', "\\usage"])
values = st.recursive(
    usages | names | st.text(max_size=8) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
documents = st.lists(st.tuples(names, values), max_size=5)
SOUP = [b'"usage"', b'"', b"\\", b"{", b"}", b"[", b"]", b":", b",", b" ", b"\n", b"\r", b"data: ", b'{"usage":', b"1"]
soups = st.lists(st.sampled_from([*SOUP, b'"prompt_tokens"', b'{"prompt_tokens":1}', b'"usage":{']), max_size=30)


def written(members: list[tuple[str, Any]], indent: int | None) -> bytes:
    """An object with these members in this order, repeated names and all."""
    each = (f"{json.dumps(name)}: {json.dumps(value, indent=indent)}" for name, value in members)
    return ("{" + ", ".join(each) + "}").encode()


def cut(data: st.DataObject, text: bytes) -> list[bytes]:
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def good(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST_TOKENS


def expected_of(said: list[dict[str, Any]], *, out_may_be_missing: bool) -> Tokens:
    """The same by a reader that has it all: an oracle."""
    last: dict[str, int] = {}
    for usage in said:
        last |= {name: value for name, value in usage.items() if good(value)}
    into = last.get("prompt_tokens")
    if into is None and "input_tokens" in last:
        into = last["input_tokens"] + last.get("cache_read_input_tokens", 0)
    out = last.get("completion_tokens", last.get("output_tokens"))
    if out_may_be_missing and into is not None:
        out = out if any(usage.keys() & {"completion_tokens", "output_tokens"} for usage in said) else 0
    return Tokens(into, out)


@settings(deadline=None)
@given(members=documents, indent=st.sampled_from([None, 1]), data=st.data())
@example(members=[("usage", {"prompt_tokens": 1}), ("usage", {})], indent=None, data=None)
def test_a_plain_answer_is_read_as_a_parser_would(members: Any, indent: int | None, data: st.DataObject | None) -> None:
    """Whatever it holds and however it is cut."""
    text = written(members, indent)
    said = [value for name, value in members if name == "usage" and isinstance(value, dict)]
    expected = expected_of(said, out_may_be_missing=True)
    assert whole(PlainMeter(), text) == expected
    if data is not None:
        assert fed(PlainMeter(), cut(data, text)) == expected


@settings(deadline=None)
@given(events=st.lists(st.dictionaries(names, values, max_size=3), max_size=4), data=st.data())
def test_a_stream_is_read_as_a_parser_would(events: list[dict[str, Any]], data: st.DataObject) -> None:
    said: list[dict[str, Any]] = []
    for each in events:
        response, message = each.get("response"), each.get("message")
        found = [each.get("usage"), response.get("usage") if isinstance(response, dict) else None]
        if isinstance(message, dict) and isinstance(message.get("usage"), dict):
            found.append({name: value for name, value in message["usage"].items() if name != "output_tokens"})
        said += [usage for usage in found if isinstance(usage, dict)]
    expected = expected_of(said, out_may_be_missing=False)
    text = b"".join(map(event, events))
    assert whole(StreamMeter(), text) == expected
    assert fed(StreamMeter(), cut(data, text)) == expected


@settings(deadline=None)
@given(parts=soups, data=st.data())
def test_how_an_answer_is_cut_makes_no_difference(parts: list[bytes], data: st.DataObject) -> None:
    """Nor does anything raise, whatever the bytes are."""
    text = b"".join(parts)
    pieces = cut(data, text)
    for meter in (PlainMeter, StreamMeter):
        assert fed(meter(), pieces) == whole(meter(), text)


# Which answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "content_type", "kind"),
    [
        (200, "application/json", PlainMeter),
        (200, "Application/JSON; charset=utf-8", PlainMeter),
        (201, "application/vnd.api+json", PlainMeter),
        (200, "text/event-stream;charset=utf-8", StreamMeter),
        (200, "audio/mpeg", None),
        (200, "application/x-ndjson", None),
        (200, "text/plain", None),
        (200, None, None),
        (429, "application/json", None),
        (500, "text/event-stream", None),
        (302, "application/json", None),
    ],
)
def test_only_a_good_answer_of_a_known_kind_is_metered(status: int, content_type: str | None, kind: Any) -> None:
    assert type(meter_for(status, content_type)) is (kind or type(None))
