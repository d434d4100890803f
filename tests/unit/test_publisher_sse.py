"""The event stream parser, against WHATWG HTML 9.2.6 and its examples."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wakecall.publisher.sse import EventStreamParser, EventTooLarge, ServerSentEvent


def parse(*chunks: bytes) -> list[ServerSentEvent]:
    parser = EventStreamParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


def test_examples_of_the_standard() -> None:
    assert [event.data for event in parse(b"data: YHOO\ndata: +2\ndata: 10\n\n")] == ["YHOO\n+2\n10"]
    events = parse(b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event\n\n")
    assert [(event.data, event.id) for event in events] == [
        ("first event", "1"),
        ("second event", ""),
        (" third event", ""),
    ]
    assert [event.data for event in parse(b"data\n\ndata\ndata\n\ndata:")] == ["", "\n"]
    assert [event.data for event in parse(b"data:test\n\ndata: test\n\n")] == ["test", "test"]


def test_an_event_has_its_name_and_the_last_id() -> None:
    events = parse(b"\xef\xbb\xbfid: 7-1\r\nevent: hello\r\ndata: {}\r\n\r\nid: a\0b\ndata: x\n\nevent: lost\n\n")
    assert events == [ServerSentEvent("hello", "{}", "7-1"), ServerSentEvent("message", "x", "7-1")]


STREAM = (
    "\ufeff: keep\r\rid: 1\r\nevent: infer\r\ndata: é\n\ndata: b\r\ndata: c\r\n\r\n\n\nretry: 3\rdata: 𝛼\r\r".encode()
)


@given(st.lists(st.integers(0, len(STREAM)), max_size=12).map(sorted))
def test_where_the_stream_is_cut_into_reads_does_not_matter(cuts: list[int]) -> None:
    bounds = [0, *cuts, len(STREAM)]
    pieces = [STREAM[start:end] for start, end in pairwise(bounds)]
    assert parse(*pieces) == parse(STREAM)
    assert [event.data for event in parse(STREAM)] == ["é", "b\nc", "𝛼"]


@pytest.mark.parametrize("chunks", [[b"data: " + b"x" * 50] * 3, [b"data: 0123456789\n"] * 20, [b"x" * 101 + b"\n"]])
def test_a_line_or_an_event_beyond_the_bound_is_refused(chunks: list[bytes]) -> None:
    parser = EventStreamParser(max_bytes=100)
    with pytest.raises(EventTooLarge):
        [parser.feed(chunk) for chunk in chunks]


def test_the_bound_is_for_one_event_and_not_for_the_stream() -> None:
    parser = EventStreamParser(max_bytes=100)
    assert sum(len(parser.feed(b"data: " + b"x" * 60 + b"\n\n")) for _ in range(50)) == 50
