"""Frames and their bytes, read back by the rules of the standard and not by our own parser."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from wakecall import frames
from wakecall.frames import Frame
from wakecall.models import InferRequest

MAX_DATA_BYTES = 512 * 1024
INLINE = 64 * 1024


def interpret(stream: bytes) -> list[dict[str, str]]:
    """WHATWG HTML, 9.2.6, word for word: the events that a client dispatches for a whole stream."""
    events = []
    data, event, last_id = "", "", ""
    lines = re.split("\r\n|\n|\r", stream.decode("utf-8").removeprefix("\ufeff"))
    for line in lines[:-1]:
        if line == "":
            if data != "":
                events.append({"event": event or "message", "data": data.removesuffix("\n"), "id": last_id})
            data, event = "", ""
        elif line.startswith(":"):
            pass
        else:
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                event = value
            elif field == "data":
                data += value + "\n"
            elif field == "id" and "\0" not in value:
                last_id = value
    return events


def read_back(frame: Frame) -> dict[str, Any]:
    """The one event that a frame is, its data parsed."""
    (event,) = interpret(frames.encode(frame))
    assert event["event"] == frame.event
    assert event["id"] == frame.id
    parsed = json.loads(event["data"])
    assert isinstance(parsed, dict)
    return parsed


def infer(body: bytes, **changes: Any) -> Frame:
    request = InferRequest("/v1/chat/completions", body, **changes)
    return frames.infer("7-2", "t1", "qwen", "qwen2.5:7b", request, 12.3456, INLINE)


texts = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=20,
)


@given(st.dictionaries(texts, values))
@example({"line": "a\u2028b\u2029c\u0085d\r\n\ve\0f\x7f"})
@example({"\n\ndata: x": "\nevent: cancel\n"})
@example({"beyond": "\U0001f999"})
def test_a_frame_is_one_event_of_three_ascii_lines(data: dict[str, Any]) -> None:
    """Whatever a body, a name or a message holds, it neither ends the line nor begins another."""
    encoded = frames.encode(Frame("infer", data, "7-2"))
    assert encoded.isascii()
    assert encoded.endswith(b"\n\n")
    lines = encoded.decode("ascii").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["id", "event", "data", ""]
    assert not re.search(rb"[\x00-\x09\x0b-\x1f]", encoded)
    assert read_back(Frame("infer", data, "7-2")) == data


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_no_frame_holds_what_json_does_not_have(number: float) -> None:
    """It is a bug of ours, and shouts: a publisher's parser would choke on it."""
    with pytest.raises(ValueError, match="JSON"):
        frames.encode(Frame("infer", {"deadline_s": number}, "7-2"))


@given(st.lists(st.sampled_from(["hello", "infer", "wake", "cancel", "bye", "comment"]), max_size=8))
def test_frames_that_are_joined_stay_apart(kinds: list[str]) -> None:
    """What is queued goes out in one write; comments between dispatch nothing and disturb nothing."""
    made = {
        "hello": frames.hello("7-1", "laptop", 7, 30.0, 15.0),
        "infer": infer(b"{}"),
        "wake": frames.wake("7-3", "w1", "qwen", "qwen", 120.0),
        "cancel": frames.cancel("7-4", "t1", "client_disconnected"),
        "bye": frames.bye("7-5", "shutdown"),
    }
    stream = b"".join(frames.KEEPALIVE if kind == "comment" else frames.encode(made[kind]) for kind in kinds)
    expected = [kind for kind in kinds if kind != "comment"]
    assert [event["event"] for event in interpret(stream)] == expected
    assert [event["id"] for event in interpret(stream)] == [made[kind].id for kind in expected]


def test_the_keep_alive_is_a_comment() -> None:
    """It dispatches nothing."""
    assert frames.KEEPALIVE.startswith(b":")
    assert frames.KEEPALIVE.endswith(b"\n\n")
    assert interpret(frames.KEEPALIVE * 3) == []


def test_every_frame_carries_what_the_protocol_lists() -> None:
    """Member by member."""
    assert read_back(frames.hello("7-1", "laptop", 7, 30.0, 15.0)) == {
        "session_id": "laptop",
        "epoch": 7,
        "heartbeat_interval_s": 30.0,
        "keepalive_s": 15.0,
        "features": ["results"],
    }
    assert read_back(infer(b'{"model":"qwen"}', stream=True, accept="application/json")) == {
        "task_id": "t1",
        "llm": "qwen",
        "model": "qwen2.5:7b",
        "method": "POST",
        "path": "/v1/chat/completions",
        "headers": {"content-type": "application/json", "accept": "application/json"},
        "stream": True,
        "deadline_s": 12.346,
        "body": '{"model":"qwen"}',
    }
    assert read_back(frames.wake("7-3", "w1", "qwen", "qwen2.5:7b", 119.98765)) == {
        "task_id": "w1",
        "llm": "qwen",
        "model": "qwen2.5:7b",
        "deadline_s": 119.988,
    }
    assert read_back(frames.cancel("7-4", "t1", "deadline_exceeded")) == {
        "task_id": "t1",
        "reason": "deadline_exceeded",
    }
    assert read_back(frames.bye("7-5", "superseded")) == {"reason": "superseded"}


def test_the_request_id_is_not_sent_on() -> None:
    """It is the client's and ours."""
    assert b"req-1" not in frames.encode(infer(b"{}", request_id="req-1"))


@given(texts)
@example("\ufeff{}")
@example("a\r\nb\0\u2028")
def test_a_text_body_rides_along_to_the_byte(text: str) -> None:
    """Encoded again it is the client's body, byte order mark, line ends and all."""
    assert read_back(infer(text.encode()))["body"].encode() == text.encode()


@given(st.binary())
@example(b"\xff")
@example(b"\xed\xa0\x80")
@example(b"\xc0\x80")
def test_a_body_that_is_not_text_is_left_to_be_fetched(body: bytes) -> None:
    """Present if and only if it is UTF-8, and then exact."""
    data = read_back(infer(body))
    try:
        body.decode("utf-8", "strict")
    except UnicodeDecodeError:
        assert "body" not in data
    else:
        assert data["body"].encode() == body


@pytest.mark.parametrize(("size", "inline"), [(0, True), (INLINE, True), (INLINE + 1, False)])
def test_a_body_rides_along_up_to_the_bound(size: int, inline: bool) -> None:
    """Bytes count, not characters; an empty body is a body."""
    assert ("body" in read_back(infer(b"x" * size))) is inline
    assert ("body" in read_back(infer("é".encode() * (size // 2) + b"x" * (size % 2)))) is inline


@pytest.mark.parametrize("character", ["\0", "\x7f", '"', "\\", "é", "\u2028", "\U0001f999"])
def test_the_longest_inline_body_keeps_within_the_bound_of_a_frame(character: str) -> None:
    """64 KiB of what JSON writes longest, with the longest names that there can be."""
    body = character.encode() * (INLINE // len(character.encode()))
    request = InferRequest("/v1/audio/transcriptions", body, content_type="x" * 8192, accept="\0" * 8192)
    frame = frames.infer("999999999-999999999", "t" * 128, "q" * 128, character * 128, request, 3600.0, INLINE)
    data = next(line for line in frames.encode(frame).split(b"\n") if line.startswith(b"data: "))
    assert len(data) <= MAX_DATA_BYTES
    assert read_back(frame)["body"] == body.decode()


def test_a_frame_weighs_what_it_holds() -> None:
    """The bound on untaken frames counts bodies; a frame without one still counts for something."""
    large, small = infer(b"x" * INLINE), infer(b"x")
    assert large.weight - small.weight == INLINE - 1
    assert infer(b"x" * (INLINE + 1)).weight < small.weight
    assert frames.wake("7-3", "w1", "qwen", "qwen", 120.0).weight > 0
