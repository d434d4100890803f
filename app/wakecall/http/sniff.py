"""What a client's body says of `model` and `stream`, what tells its conversation (`affinity`), and nothing else.

The body goes on byte for byte, so it is looked into, never rebuilt. JSON: msgspec walks it once, skipping every value, and
hands each top-level key to a hook of ours, repeated ones too. Multipart (RFC 7578): the parts' headers are found between
their delimiters, and only the two fields are read. Since an engine's parser reads the body again, whatever two parsers
might read differently is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgspec

from ..errors import AmbiguousModel, InvalidRequest, ModelRequired, TooMany
from .affinity import HINTS, affinity_of
from .parsing import check_bounds, json_error

__all__ = ["FLAG_PATTERN", "MAX_FIELD_BYTES", "Asked", "sniff"]

_SMALL_BYTES: Final = 1 << 20
_MAX_MEMBERS: Final = 10_000
_TOO_MANY: Final = f"The body has more than {_MAX_MEMBERS} members."
_MAX_PARTS: Final = 1_000
_MAX_PART_HEAD_BYTES: Final = 8 * 1024
MAX_FIELD_BYTES: Final = 1024

_LOOKED_FOR: Final = ("model", "stream")
_TRUE: Final = frozenset({"true", "1", "t", "yes", "y", "on"})
_FALSE: Final = frozenset({"false", "0", "f", "no", "n", "off", ""})
#: What a form's `stream` may be, spaces around it left out.
FLAG_PATTERN: Final = "|".join(
    "".join(f"[{each.upper()}{each}]" if each.isalpha() else each for each in word) for word in sorted(_TRUE | _FALSE)
)

_BOUNDARY: Final = re.compile(
    r""";[ \t]*boundary[ \t]*=[ \t]*(?:"([^"\\]{1,70})"|([^\s;",]{1,70}))[ \t]*(?=;|$)""", re.IGNORECASE
)
_ENCODING: Final = re.compile(rb"^content-transfer-encoding", re.IGNORECASE | re.MULTILINE)
#: A header in one line. Of lines that go on, lone CRs and LFs, and lines without a colon readers make different things.
_HEADER: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\r\n]*")
_PARAMETER: Final = re.compile(r""";[ \t]*([^\s=;"]+)=("(?:[^"\\]|\\.)*"|[^\s;"]*)[ \t]*(?=;|$)""")
#: A Content-Disposition with nothing between its parameters that might be taken for one.
_DISPOSITION: Final = re.compile(rf"[ \t]*form-data[ \t]*(?:{_PARAMETER.pattern})*;?[ \t]*", re.IGNORECASE)


class Asked(NamedTuple):
    """The name that a client calls, whether it wants a stream, and what its calls of one conversation have in common."""

    model: str
    stream: bool
    affinity: bytes | None = None


def sniff(body: bytes, content_type: str, caller: bytes = b"") -> Asked:
    """Find `model`, `stream`, and in JSON what tells the conversation.

    Args:
        body: the client's, whole.
        content_type: `multipart/form-data` is read as such; anything else as JSON, as engines do.
        caller: whose body it is, for `affinity.affinity_of`.

    Raises:
        InvalidJson: not well-formed.
        InvalidRequest: not an object; a multipart body that does not hold together; a value of the wrong type.
        ModelRequired: no `model`.
        AmbiguousModel: `model` or `stream` twice, or beside a key that differs from it in case alone.
        TooMany: more members or parts than anything sensible has.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        return _sniff_multipart(body, content_type)
    return _sniff_json(body, caller)


# JSON ---------------------------------------------------------------------------------------------------------------


class _Key:
    """A top-level key as it was met. No two are equal, so that a dict keeps them all."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


def _make_key(_: type, text: Any) -> _Key:
    return _Key(text)


def _count_keys() -> Callable[[type, Any], _Key]:
    met = 0

    def make(_: type, text: Any) -> _Key:
        nonlocal met
        met += 1
        if met > _MAX_MEMBERS:
            raise TooMany(_TOO_MANY)
        return _Key(text)

    return make


_members: Final = msgspec.json.Decoder(dict[_Key, msgspec.Raw], dec_hook=_make_key)
_text: Final = msgspec.json.Decoder(str)
_flag: Final = msgspec.json.Decoder(bool | None)


def _sniff_json(body: bytes, caller: bytes) -> Asked:
    try:
        if len(body) <= _SMALL_BYTES:
            members = _members.decode(body)
        else:
            # Each member costs memory, and so many more fit in here.
            members = msgspec.json.decode(body, type=dict[_Key, msgspec.Raw], dec_hook=_count_keys())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise json_error(error, body) from None
    if len(members) > _MAX_MEMBERS:
        raise TooMany(_TOO_MANY)
    check_bounds(body)
    found: dict[str, msgspec.Raw] = {}
    hints: dict[str, msgspec.Raw] = {}
    for key, value in members.items():
        if key.text in HINTS:
            hints[key.text] = value
        else:
            _note(found, key.text, value)
    if "model" not in found or bytes(found["model"]) == b"null":
        raise ModelRequired(param="model")
    model = _decoded(_text, found["model"], "model")
    stream = bool(_decoded(_flag, found.get("stream"), "stream"))
    return Asked(model, stream, affinity_of(hints, caller))


def _note(found: dict[str, Any], key: str, value: Any) -> None:
    """Keep what is looked for; refuse what might be taken for it by somebody else."""
    if len(key) > 16:
        return
    folded = key.casefold()
    if folded in _LOOKED_FOR:
        if folded in found or key != folded:
            raise AmbiguousModel(param=folded)
        found[key] = value


def _decoded(decoder: msgspec.json.Decoder[Any], value: msgspec.Raw | None, param: str) -> Any:
    if value is None:
        return None
    try:
        return decoder.decode(value)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{error}.", param=param) from None


# Multipart ----------------------------------------------------------------------------------------------------------


def _sniff_multipart(body: bytes, content_type: str) -> Asked:
    boundaries = _BOUNDARY.findall(content_type)
    if len(boundaries) != 1:
        raise InvalidRequest("The Content-Type of a multipart body names one boundary.", param="Content-Type")
    try:
        delimiter = b"--" + "".join(boundaries[0]).encode("ascii")
    except UnicodeEncodeError:
        raise InvalidRequest("A multipart body's boundary is ASCII.", param="Content-Type") from None
    _refuse_stray_delimiters(body, delimiter)
    found: dict[str, str | None] = {}
    position = _find_delimiter(body, delimiter, 0)
    for _ in range(_MAX_PARTS):
        start = _end_of_line(body, position + len(delimiter))
        if start is None:
            break
        end = _find_delimiter(body, delimiter, start)
        _read_part(body, start, end, found)
        position = end + 2  # its line break belongs to the delimiter
    else:
        raise TooMany(f"The body has more than {_MAX_PARTS} parts.")
    model = found.get("model")
    if model is None:
        raise ModelRequired(param="model")
    stream = (found.get("stream") or "").strip().lower()
    if stream not in _TRUE and stream not in _FALSE:
        raise InvalidRequest("`stream` is true or false.", param="stream")
    return Asked(model, stream in _TRUE)


def _refuse_stray_delimiters(body: bytes, delimiter: bytes) -> None:
    """Some readers take a lone CR or LF for a line break, or need none before the first delimiter: they would find parts
    that we do not."""
    line_feeds = body.count(b"\n" + delimiter)
    first = body.find(delimiter)
    if (
        b"\r" + delimiter in body
        or line_feeds != body.count(b"\r\n" + delimiter)
        or (first > 0 and body[first - 2 : first] != b"\r\n")
    ):
        raise InvalidRequest("The multipart body has a delimiter within a line.")


def _find_delimiter(body: bytes, delimiter: bytes, start: int) -> int:
    """Where the next delimiter's line break is; for the first one, which may do without, where it begins itself."""
    if start == 0 and body.startswith(delimiter):
        return 0
    position = body.find(b"\r\n" + delimiter, max(0, start - 2))
    if position < 0:
        raise InvalidRequest("The multipart body ends too early.")
    return position if start else position + 2


def _end_of_line(body: bytes, position: int) -> int | None:
    """Where a delimiter's part begins; None if it is the last delimiter."""
    is_last = body.startswith(b"--", position)
    if is_last:
        position += 2
    while body[position : position + 1] in (b" ", b"\t"):
        position += 1
    if not body.startswith(b"\r\n", position) and not (is_last and position == len(body)):
        raise InvalidRequest("The multipart body has a broken delimiter.")
    return None if is_last else position + 2


def _read_part(body: bytes, start: int, end: int, found: dict[str, str | None]) -> None:
    head_end = body.find(b"\r\n\r\n", start, min(end, start + _MAX_PART_HEAD_BYTES) + 4)
    if head_end < 0 or head_end > end:
        raise InvalidRequest("A part of the multipart body has no headers, or too many.")
    head = body[start:head_end]
    name, is_file = _name_of(head)
    value: str | None = None
    if name.casefold() in _LOOKED_FOR:
        raw = body[head_end + 4 : end]
        if is_file or _ENCODING.search(head) or len(raw) > MAX_FIELD_BYTES:
            raise InvalidRequest("This field is a short text.", param=name.casefold())
        try:
            value = raw.decode()
        except UnicodeDecodeError:
            raise InvalidRequest("This field is not UTF-8.", param=name.casefold()) from None
    _note(found, name, value)


def _name_of(head: bytes) -> tuple[str, bool]:
    """A part's name, and whether it is a file."""
    lines = head.split(b"\r\n")
    if not all(map(_HEADER.fullmatch, lines)):
        raise InvalidRequest("A header of a part is a name, a colon and a value, in one line.")
    dispositions = [
        line.partition(b":")[2] for line in lines if line.partition(b":")[0].strip().lower() == b"content-disposition"
    ]
    if len(dispositions) != 1:
        raise InvalidRequest("Each part of a multipart body has one Content-Disposition.")
    try:
        text = dispositions[0].decode()
    except UnicodeDecodeError:
        text = dispositions[0].decode("latin-1")
    if not _DISPOSITION.fullmatch(text):
        raise InvalidRequest("The Content-Disposition of a part is not well-formed.")
    parameters = [(key.lower(), value) for key, value in _PARAMETER.findall(text)]
    names = [value for key, value in parameters if key.partition("*")[0] == "name"]  # `name*0` too, of RFC 2231
    if len(names) != 1 or not any(key == "name" for key, _ in parameters):
        raise InvalidRequest("Each part of a multipart body has one name.")
    name = names[0]
    if name.startswith('"'):
        name = re.sub(r"\\(.)", r"\1", name[1:-1])
    return name, any(key.partition("*")[0] == "filename" for key, _ in parameters)
