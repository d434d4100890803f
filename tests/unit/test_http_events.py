"""Where one event ends and the next begins; what an error is as an event; what a content type becomes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wakecall.errors import DeadlineExceeded, ModelOffline, PublisherError, QueueFull, WakecallError
from wakecall.http.errors import (
    describe,
    engine_retry_headers,
    error_document,
    error_event,
    retry_headers,
    type_of_status,
)
from wakecall.http.relay import passage_of, safe_content_type
from wakecall.http.sse import EventTail


def boundaries(text: bytes) -> set[int]:
    """Where an error event could be put: at the start, and behind each empty line. Line by line, as the standard says."""
    found, start, at = {0}, 0, 0
    while at < len(text):
        if text[at] not in b"\r\n":
            at += 1
            continue
        end = at + (2 if text[at : at + 2] == b"\r\n" else 1)
        if at == start:
            found.add(end)
        start = at = end
    return found


@given(
    st.lists(st.lists(st.sampled_from([b"a", b"b", b"\n", b"\r", b"\r\n", b"\n\n"]), max_size=6).map(b"".join)),
    st.sampled_from([2, 3, 5, 1000]),
)
def test_what_goes_out_ends_at_a_boundary_or_says_that_it_does_not(pieces: list[bytes], limit: int) -> None:
    """However lines end and wherever the pieces are cut; nothing is lost, and never more than the limit is held."""
    tail = EventTail(limit)
    fed = sent = b""
    for piece in pieces:
        if not piece:
            continue
        fed += piece
        sent += tail.feed(piece)
        assert fed.startswith(sent)
        assert len(fed) - len(sent) <= limit
        if tail.at_boundary:
            assert len(sent) in boundaries(sent)
        else:
            assert limit < 1000
    assert sent + tail.rest() == fed


def test_the_unfinished_event_is_held_back() -> None:
    tail = EventTail(1000)
    assert tail.feed(b"data: 1\n\ndata: 2") == b"data: 1\n\n"
    assert tail.feed(b"\n") == b""
    assert tail.feed(b"\ndata: 3\r\n\r") == b"data: 2\n\ndata: 3\r\n\r"
    assert tail.feed(b"\ndata: 4\n\n") == b"\ndata: 4\n\n"


def test_an_event_beyond_the_limit_goes_out_until_it_ends() -> None:
    tail = EventTail(8)
    assert tail.feed(b"data: 123") == b"data: 123"
    assert not tail.at_boundary
    assert tail.feed(b"4\n") == b"4\n"
    assert not tail.at_boundary
    assert tail.feed(b"\nda") == b"\n"
    assert tail.at_boundary
    assert tail.rest() == b"da"


def event_data(event: bytes) -> dict[str, object]:
    lines = event.split(b"\n")
    assert lines[0] == b"event: error"
    assert lines[2:] == [b"", b""]
    data: dict[str, object] = json.loads(lines[1].removeprefix(b"data: "))
    return data


def test_an_error_event_has_the_shape_that_each_api_knows() -> None:
    inner = describe(DeadlineExceeded(phase="idle"))
    assert inner == {
        "message": "The request's time is up.",
        "type": "api_error",
        "param": None,
        "code": "deadline_exceeded",
        "phase": "idle",
    }
    assert event_data(error_event(inner, "/v1/chat/completions", 7)) == {"type": "error", "error": inner}
    assert event_data(error_event(inner, "/v1/responses", 7)) == {
        "type": "error",
        "error": inner,
        "code": "deadline_exceeded",
        "message": "The request's time is up.",
        "param": None,
        "sequence_number": 7,
    }


def test_an_error_body_has_the_shape_that_each_api_knows() -> None:
    inner = describe(ModelOffline())
    assert error_document(ModelOffline(), "/v1/chat/completions") == {"error": inner}
    assert error_document(ModelOffline(), "/v1/messages") == {"type": "error", "error": inner}


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        (ModelOffline(), {"Retry-After": "2"}),
        (QueueFull(retry_after_s=3.2), {"Retry-After": "4"}),
        (PublisherError(status=429), {"x-should-retry": "false"}),
        (WakecallError(), {}),
    ],
)
def test_retry_headers_follow_the_table(error: WakecallError, headers: dict[str, str]) -> None:
    assert retry_headers(error) == headers


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (200, {}),
        (400, {}),
        (408, {"x-should-retry": "false"}),
        (409, {"x-should-retry": "false"}),
        (429, {"Retry-After": "1"}),
        (500, {"x-should-retry": "false"}),
        (503, {"Retry-After": "1"}),
        (504, {"x-should-retry": "false"}),
        (599, {"x-should-retry": "false"}),
    ],
)
def test_an_engines_own_error_says_whether_to_try_again(status: int, headers: dict[str, str]) -> None:
    assert engine_retry_headers(status) == headers


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (418, "invalid_request_error"),
        (429, "rate_limit_error"),
        (302, "api_error"),
        (503, "api_error"),
    ],
)
def test_an_unknown_error_has_the_type_of_its_status(status: int, kind: str) -> None:
    assert type_of_status(status) == kind


@pytest.mark.parametrize(
    ("given", "safe", "passage"),
    [
        ("application/json", "application/json", "held"),
        ("Application/JSON; charset=utf-8", "application/json; charset=utf-8", "held"),
        ("application/problem+json", "application/problem+json", "held"),
        ("text/plain", "text/plain", "held"),
        ("text/event-stream", "text/event-stream", "events"),
        ("text/event-stream;charset=utf-8", "text/event-stream;charset=utf-8", "events"),
        ("application/x-ndjson", "application/x-ndjson", "raw"),
        ("audio/mpeg", "audio/mpeg", "raw"),
        ("image/png", "image/png", "raw"),
        ("text/html", "application/octet-stream", "held"),
        ("text/vtt", "application/octet-stream", "held"),
        ("application/javascript", "application/octet-stream", "raw"),
        ("application/xhtml+xml", "application/octet-stream", "raw"),
        ("application/json, text/html", "application/octet-stream", "raw"),
        ("application/json\r\nset-cookie: x=y", "application/octet-stream", "raw"),
        ("application/json; x=\r\nset-cookie: y", "application/json", "held"),
        ("application/json; charset=é", "application/json", "held"),
        ("nonsense", "application/octet-stream", "raw"),
        ("", "application/octet-stream", "raw"),
        (None, "application/octet-stream", "raw"),
    ],
)
def test_a_content_type_is_made_safe_and_decides_how_an_answer_travels(
    given: str | None, safe: str, passage: str
) -> None:
    assert safe_content_type(given) == safe
    assert passage_of(given) == passage
