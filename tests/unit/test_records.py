"""The records of a shared upload: how bytes are cut into them, wherever the pieces end."""

from __future__ import annotations

import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wakecall.errors import InvalidRequest
from wakecall.records import MAX_ANSWER_BYTES, Head, RecordParser, encode_record

LONGEST_HEAD = 4096
ID = "4Yw2bJ1xQkKf0sVn3mT7cA"


def raw(head: bytes, answer: bytes = b"") -> bytes:
    return struct.pack(">IH", 2 + len(head) + len(answer), len(head)) + head + answer


def parsed(*pieces: bytes) -> tuple[list[tuple[Head, bytes]], bool]:
    """The records in these pieces, and whether all of it was well-formed, its end too."""
    found: list[tuple[Head, bytes]] = []
    parser = RecordParser(lambda head, answer: found.append((head, answer)))
    try:
        for piece in pieces:
            parser.feed(piece)
        parser.finish()
    except InvalidRequest:
        return found, False
    return found, True


def padded_head(size: int) -> bytes:
    head = b'{"task_id":"t","x":"'
    return head + b"y" * (size - len(head) - 2) + b'"}'


def test_a_record_is_a_head_and_an_answer() -> None:
    head = b'{"task_id": "t_1-A", "status": 418, "content_type": "text/plain; charset=utf-8", "later": [1, {}]}'
    assert parsed(raw(head, b"I'm a teapot")) == (
        [(Head("t_1-A", 418, "text/plain; charset=utf-8"), b"I'm a teapot")],
        True,
    )


def test_only_the_id_has_to_be_said() -> None:
    assert parsed(raw(b'{"task_id":"t"}')) == ([(Head("t", 200, None), b"")], True)
    assert parsed(raw(b'{"task_id":"t","content_type":null}', b"x")) == ([(Head("t"), b"x")], True)


def test_what_is_encoded_is_what_protocol_md_says() -> None:
    assert encode_record("t", 200, None, b"ab") == b"\x00\x00\x00\x13" + b"\x00\x0f" + b'{"task_id":"t"}' + b"ab"
    record = encode_record("t", 503, "text/plain", b"")
    assert msgspec.json.decode(record[6:]) == {"task_id": "t", "status": 503, "content_type": "text/plain"}


def test_bounds_are_inclusive() -> None:
    largest = raw(padded_head(LONGEST_HEAD), bytes(MAX_ANSWER_BYTES))
    records, well = parsed(largest, largest[:7], largest[7:])
    assert well
    assert [len(answer) for _, answer in records] == [MAX_ANSWER_BYTES] * 2


@pytest.mark.parametrize(
    "bad",
    [
        raw(padded_head(LONGEST_HEAD + 1)),
        raw(b'{"task_id":"t"}', bytes(MAX_ANSWER_BYTES + 1)),
        struct.pack(">IH", 1, 0),
        struct.pack(">IH", 0, 0),
        struct.pack(">IH", 16, 15),  # the head is longer than the record
        struct.pack(">IH", 0xFFFFFFFF, 15),
        raw(b""),
        raw(b"{"),
        raw(b"[]"),
        raw(b"{}"),
        raw(b"[" * LONGEST_HEAD),
        raw(b'{"task_id":"t","x":' + b"[" * (LONGEST_HEAD - 19)),
        raw(b'{"task_id":"\xff"}'),
        raw(b'{"task_id":"\\ud800"}'),
        raw(b'{"task_id":7}'),
        raw(b'{"task_id":""}'),
        raw(b'{"task_id":"a/b"}'),
        raw(b'{"task_id":"' + b"a" * 129 + b'"}'),
        raw(b'{"task_id":"t","status":199}'),
        raw(b'{"task_id":"t","status":600}'),
        raw(b'{"task_id":"t","status":"200"}'),
        raw(b'{"task_id":"t","status":true}'),
        raw(b'{"task_id":"t","status":null}'),
        raw(b'{"task_id":"t","status":1e400}'),
        raw(b'{"task_id":"t","content_type":7}'),
        raw(b'{"task_id":"t","content_type":"a\\r\\nset-cookie: b"}'),
        raw(b'{"task_id":"t","content_type":"\\u0000"}'),
        raw('{"task_id":"t","content_type":"ä"}'.encode()),
    ],
)
def test_what_is_malformed_is_refused_and_what_came_before_it_is_taken(bad: bytes) -> None:
    good = raw(b'{"task_id":"good"}', b"answer")
    assert parsed(good + bad + good) == ([(Head("good"), b"answer")], False)
    assert parsed(good, *(bytes([byte]) for byte in bad)) == ([(Head("good"), b"answer")], False)


@pytest.mark.parametrize("kept", range(1, 24))
def test_an_end_within_a_record_is_malformed(kept: int) -> None:
    record = raw(b'{"task_id":"t"}', b"abc")
    assert len(record) == 24
    assert parsed(record, record[:kept]) == ([(Head("t"), b"abc")], False)


def test_what_waits_for_its_end_is_one_record_at_the_most() -> None:
    """A length that nobody may say is refused with its sixth byte, before anything is kept for it."""
    parser = RecordParser(lambda head, answer: None)
    parser.feed(struct.pack(">IH", 1 << 30, 15)[:5])
    with pytest.raises(InvalidRequest):
        parser.feed(b"\x0f")


@pytest.mark.parametrize(
    ("content_type", "answer"), [("x" * LONGEST_HEAD, b""), (None, bytes(MAX_ANSWER_BYTES + 1))], ids=["head", "answer"]
)
def test_no_record_is_made_that_a_broker_refuses(content_type: str | None, answer: bytes) -> None:
    with pytest.raises(ValueError, match="too long"):
        encode_record(ID, 200, content_type, answer)


ids = st.text("abcXYZ019_-", min_size=1, max_size=128)
types = st.none() | st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=40)
records = st.tuples(st.builds(Head, ids, st.integers(200, 599), types), st.binary(max_size=300))


@given(st.lists(records, max_size=6), st.binary(max_size=12), st.data())
def test_pieces_may_end_anywhere(said: list[tuple[Head, bytes]], junk: bytes, data: st.DataObject) -> None:
    """The same records, and the same end, whatever the pieces."""
    stream = b"".join(encode_record(head.task_id, head.status, head.content_type, answer) for head, answer in said)
    stream += junk
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    whole = parsed(stream)
    assert parsed(*pieces) == whole
    assert parsed(*(bytes([byte]) for byte in stream)) == whole
    assert whole[0][: len(said)] == said
    if not junk:
        assert whole == (said, True)
