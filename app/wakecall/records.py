"""The records of a shared upload: whole answers, one behind the other on one stream of bytes.

    4 bytes L | 2 bytes H | H bytes of JSON: {"task_id", "status"?, "content_type"?} | L - 2 - H bytes: the answer

Numbers are big-endian; L counts what follows it. The bytes come in pieces that have nothing to do with where a record ends,
so what is left of a piece waits for the next one: never more than one record, for its length is looked at first.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Final

import msgspec

from .errors import InvalidRequest
from .models import is_id

__all__ = ["MAX_ANSWER_BYTES", "Head", "RecordParser", "Take", "encode_record"]

#: The longest answer that goes this way. A task in flight can hold one of them at the most, so all are bounded.
MAX_ANSWER_BYTES: Final = 64 * 1024
_MAX_HEAD_BYTES: Final = 4096

_LENGTHS: Final = Struct(">IH")


class Head(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Whose answer it is, and what its engine said before it."""

    task_id: str
    status: int = 200
    content_type: str | None = None


#: What is called with each record: its head, and the answer.
Take = Callable[[Head, bytes], None]

_decoder: Final = msgspec.json.Decoder(Head)
_encoder: Final = msgspec.json.Encoder()


def encode_record(task_id: str, status: int, content_type: str | None, answer: bytes) -> bytes:
    """One record. Raises ValueError: it is none that a broker takes."""
    head = _encoder.encode(Head(task_id, status, content_type))
    if len(head) > _MAX_HEAD_BYTES or len(answer) > MAX_ANSWER_BYTES:
        raise ValueError("too long for a record")
    return _LENGTHS.pack(2 + len(head) + len(answer), len(head)) + head + answer


class RecordParser:
    """Cuts pieces into records.

    Args:
        take: called with each, in their order, as soon as its last byte is here; it must not raise.
    """

    __slots__ = ("_rest", "_take")

    def __init__(self, take: Take) -> None:
        self._take = take
        self._rest = bytearray()  # the beginning of a record whose end has not come

    def feed(self, data: bytes) -> None:
        """The next piece. What comes before a record that is malformed is taken; from then on nothing more may come.

        Raises:
            InvalidRequest: it is malformed.
        """
        rest, take, at, end = self._rest, self._take, 0, len(data)
        if rest:
            if len(rest) < 6:
                at = 6 - len(rest)
                rest += data[:at]
                if len(rest) < 6:
                    return
            length, head_length = _LENGTHS.unpack_from(rest)
            _check(length, head_length)
            missing = 4 + length - len(rest)
            if end - at < missing:
                rest += data[at:] if at else data
                return
            rest += data[at : at + missing]
            at += missing
            record = bytes(rest)
            rest.clear()
            take(_head_of(record[6 : 6 + head_length]), record[6 + head_length :])
        while end - at >= 6:
            length, head_length = _LENGTHS.unpack_from(data, at)
            _check(length, head_length)
            after = at + 4 + length
            if after > end:
                break
            answer_at = at + 6 + head_length
            take(_head_of(data[at + 6 : answer_at]), data[answer_at:after])
            at = after
        if at < end:
            rest += data[at:]

    def finish(self) -> None:
        """Nothing more comes. Raises InvalidRequest: but a record has begun."""
        if self._rest:
            raise InvalidRequest("The upload ends in the middle of a record.")


def _check(length: int, head_length: int) -> None:
    # Before anything is waited for: what is kept of a record is bounded by what one may be.
    if not (head_length <= _MAX_HEAD_BYTES and 2 + head_length <= length <= 2 + head_length + MAX_ANSWER_BYTES):
        raise InvalidRequest(
            f"A record has a head of at most {_MAX_HEAD_BYTES} bytes and an answer of at most {MAX_ANSWER_BYTES}."
        )


def _head_of(data: bytes) -> Head:
    try:
        head = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # What it says is not quoted: it may be anything that the peer has.
        raise InvalidRequest("This is no record's head.") from None
    if not (is_id(head.task_id) and 200 <= head.status <= 599):
        raise InvalidRequest("A record has a task's id, and a status of 200 to 599.")
    content_type = head.content_type
    # It goes out as a header.
    if content_type is not None and not (content_type.isascii() and content_type.isprintable()):
        raise InvalidRequest("A record's content type is printable ASCII.")
    return head
