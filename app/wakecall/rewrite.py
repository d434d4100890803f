"""Put another model id into a request's body and leave every other byte as the client wrote it.

Parsing and dumping would not do: floats, key order, white space and unknown fields have to arrive as they were. So the
value is found by its place and cut out. Only the top level counts, and a key may be written with escapes.
"""

from __future__ import annotations

import json
import re
from email.message import Message

# Possessive, so that a body of 32 MiB in one string costs one pass and an unterminated one no backtracking.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_STRING_OR_BRACKET = re.compile(rb'[{}\[\]]|"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_SCALAR = re.compile(rb"[^\s,}\]]+")
_SPACE = re.compile(rb"[ \t\r\n]*")


def replace_model(body: bytes, content_type: str, model: str) -> bytes:
    """Replace the value of `model` in a JSON object or a multipart form.

    Args:
        body: the client's body.
        content_type: its content type; anything but `multipart/form-data` is taken for JSON.
        model: the engine's own id.

    Returns:
        The new body, or `body` itself when there is no such value to replace: the engine will say what is wrong.
    """
    parts = split_at_model(body, content_type, model)
    return b"".join(parts) if len(parts) > 1 else body


def split_at_model(body: bytes, content_type: str, model: str) -> tuple[memoryview, ...]:
    """The same body in parts, of which none is a copy."""
    if content_type.partition(";")[0].strip().lower() == "multipart/form-data":
        span, value = find_form_model(body, content_type), model.encode()
    else:
        span, value = find_json_model(body), json.dumps(model).encode()
    whole = memoryview(body)
    if span is None:
        return (whole,)
    start, end = span
    if _says(body[start:end], model, value):
        return (whole,)
    return whole[:start], memoryview(value), whole[end:]


def _says(found: bytes, model: str, value: bytes) -> bool:
    """Whether what stands there is this model already, however it is written."""
    if found == value:
        return True
    try:
        return bool(found[:1] == b'"' and value[:1] == b'"' and json.loads(found) == model)
    except ValueError:
        return False


def find_json_model(body: bytes) -> tuple[int, int] | None:
    """Where the string value of the top-level key `model` stands, quotes included (RFC 8259); None without one."""
    position = _skip_space(body, 0)
    if body[position : position + 1] != b"{":
        return None
    position = _skip_space(body, position + 1)
    while (key := _STRING.match(body, position)) is not None:
        position = _skip_space(body, key.end())
        if body[position : position + 1] != b":":
            return None
        position = _skip_space(body, position + 1)
        if _is_model(key[0]):
            value = _STRING.match(body, position)
            return value.span() if value is not None else None
        end = _skip_value(body, position)
        if end is None:
            return None
        position = _skip_space(body, end)
        if body[position : position + 1] != b",":
            return None
        position = _skip_space(body, position + 1)
    return None


def _is_model(token: bytes) -> bool:
    if b"\\" not in token:
        return token == b'"model"'
    try:
        return bool(json.loads(token) == "model")
    except ValueError:
        return False


def _skip_space(body: bytes, position: int) -> int:
    space = _SPACE.match(body, position)
    return space.end() if space is not None else position


def _skip_value(body: bytes, position: int) -> int | None:
    first = body[position : position + 1]
    if first == b'"':
        string = _STRING.match(body, position)
        return string.end() if string is not None else None
    if first not in (b"{", b"["):
        scalar = _SCALAR.match(body, position)
        return scalar.end() if scalar is not None else None
    depth = 0
    for token in _STRING_OR_BRACKET.finditer(body, position):
        match token[0]:
            case b"{" | b"[":
                depth += 1
            case b"}" | b"]":
                depth -= 1
                if depth == 0:
                    return token.end()
    return None


def find_form_model(body: bytes, content_type: str) -> tuple[int, int] | None:
    """Where the content of the form field `model` stands (RFC 7578); None without one."""
    boundary = _header(content_type).get_param("boundary", header="content-type", unquote=True)
    if not isinstance(boundary, str) or not boundary:
        return None
    # The line break before a delimiter belongs to it, the one after it to the part (RFC 2046, 5.1.1).
    mark = re.escape(boundary.encode("utf-8", "surrogateescape"))
    delimiter = re.compile(rb"(?:\A|\r\n)--" + mark + rb"(--)?[ \t]*(?=\r\n|\Z)")
    start: int | None = None
    for found in delimiter.finditer(body):
        if start is not None:
            # Sought from the line break that ends the delimiter, so that a part without headers is seen as one.
            head_end = body.find(b"\r\n\r\n", start, found.start())
            if head_end >= 0 and _is_model_field(body[start:head_end]):
                return head_end + 4, found.start()
        if found[1]:
            return None
        start = found.end()
    return None


def _is_model_field(head: bytes) -> bool:
    for line in head.decode("utf-8", "replace").split("\r\n"):
        field, _, value = line.partition(":")
        if field.strip().lower() == "content-disposition":
            disposition = _header(value.strip(), "content-disposition")
            name = disposition.get_param("name", header="content-disposition", unquote=True)
            filename = disposition.get_param("filename", header="content-disposition")
            return name == "model" and filename is None
    return False


def _header(value: str, name: str = "content-type") -> Message:
    message = Message()
    message[name] = value.replace("\r", " ").replace("\n", " ")
    return message
