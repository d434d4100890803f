"""Secrets that a test sends down every path, and a search for what is left of them, in any encoding."""

from __future__ import annotations

import base64
import binascii
import json
import secrets
from collections.abc import Iterator
from urllib.parse import quote

__all__ = ["SHORTEST", "forms_of", "leaks_of", "new_sentinel"]

#: So many characters of a secret side by side are part of it by no chance.
SHORTEST = 12


def new_sentinel(what: str) -> str:
    """A text that stands nowhere else. Letters and digits alone, so that no escaping changes it by accident."""
    return f"{what}{secrets.token_hex(16)}"


def forms_of(text: str) -> Iterator[bytes]:
    """`text` as something might write it down by mistake."""
    data = text.encode()
    yield data
    yield data[::-1]
    yield from (text.encode(encoding) for encoding in ("utf-16-le", "utf-16-be", "utf-32-le"))
    yield from (binascii.hexlify(data), binascii.hexlify(data).upper(), binascii.hexlify(data, " "))
    yield " ".join(str(byte) for byte in data).encode()
    yield ", ".join(str(byte) for byte in data).encode()
    yield "".join(f"\\u{ord(each):04x}" for each in text).encode()
    yield "".join(f"\\x{ord(each):02x}" for each in text).encode()
    yield "".join(f"%{byte:02X}" for byte in data).encode()
    yield from (quote(text).encode(), json.dumps(text)[1:-1].encode(), repr(data)[2:-1].encode())
    for before in range(3):
        # Base64 of a text that it stands in, wherever that begins: the characters at both ends depend on its neighbours.
        encoded = base64.b64encode(b"x" * before + data)
        yield encoded[4 if before else 0 : len(encoded) // 4 * 4 - 4]
        yield encoded[4 if before else 0 : len(encoded) // 4 * 4 - 4].translate(bytes.maketrans(b"+/", b"-_"))
    yield base64.b32encode(data).rstrip(b"=")
    yield base64.b85encode(data)


def leaks_of(haystack: bytes, secret: str) -> list[bytes]:
    """What of `secret` stands in `haystack`: any twelve characters of it, as they are, or all of it in another form."""
    folded = haystack.lower()
    found = [
        part
        for start in range(len(secret) - SHORTEST + 1)
        if (part := secret[start : start + SHORTEST].lower().encode()) in folded
    ]
    return found[:1] + [form for form in forms_of(secret) if form in haystack]
