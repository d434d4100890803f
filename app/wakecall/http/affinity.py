"""What calls that begin alike have in common, so that they may meet the same prefix cache.

An engine that has worked on the beginning of a prompt still has it in memory, so the next call of a conversation is best
served by the publisher that served the last one. What tells a conversation is the first of these that a body has:

1. `prompt_cache_key`, which is there for this;
2. `user`, or on Anthropic's path `metadata.user_id`;
3. how `messages`, `input` or `prompt` begins: its first element, and the one behind it if the first is a system prompt,
   which many conversations share. What comes later differs from call to call. Where that is not to be had within 4 KiB, or
   it is a text, its first 4 KiB.

It is a hint between equals and nothing else, so bytes are compared and not what they mean, and whatever is odd is left out.
It costs a few KiB's work, whatever the body.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Final

import msgspec

__all__ = ["HINTS", "affinity_of"]

_BEGINNINGS: Final = ("messages", "input", "prompt")
#: The members of a body that are looked at.
HINTS: Final = frozenset({"prompt_cache_key", "user", "metadata", *_BEGINNINGS})

_WINDOW_BYTES: Final = 4096
_DIGEST_BYTES: Final = 8
_EMPTY: Final = frozenset({b"null", b'""', b""})
_SYSTEM: Final = ("system", "developer")
_SPACE: Final = re.compile(r"[ \t\n\r]*")
#: Reads one value at a place of a text, in C, and says where it ends.
_scan: Final = json.JSONDecoder().raw_decode


class _Metadata(msgspec.Struct):
    user_id: msgspec.Raw = msgspec.Raw()


_metadata: Final = msgspec.json.Decoder(_Metadata)


def affinity_of(found: Mapping[str, msgspec.Raw], key: bytes) -> bytes | None:
    """A digest of what tells the conversation; None: nothing does.

    Args:
        found: those of the body's `HINTS` that there are. They are well-formed, and nested no deeper than bodies may be.
        key: whose call it is: what two callers say alike is not alike. At most 64 bytes of it count.
    """
    name, said = _first_of(found)
    if said in _EMPTY:
        return None
    return blake2b(said, digest_size=_DIGEST_BYTES, key=key[:64], person=name.encode()).digest()


def _first_of(found: Mapping[str, msgspec.Raw]) -> tuple[str, bytes]:
    for name in ("prompt_cache_key", "user"):
        if name in found and (said := _window(found[name])) not in _EMPTY:
            return name, said
    if "metadata" in found and (said := _user_of(found["metadata"])) not in _EMPTY:
        return "user_id", said
    for name in _BEGINNINGS:
        if name in found and (said := _beginning(_window(found[name]))) not in _EMPTY:
            return name, said
    return "", b""


def _window(value: msgspec.Raw) -> bytes:
    return bytes(memoryview(value)[:_WINDOW_BYTES])


def _user_of(value: msgspec.Raw) -> bytes:
    if memoryview(value).nbytes > _WINDOW_BYTES:
        return b""
    try:
        return bytes(_metadata.decode(value).user_id)
    except msgspec.DecodeError:
        return b""  # no object


def _beginning(window: bytes) -> bytes:
    """What of a conversation's beginning stays as it is while it goes on."""
    if not window.startswith(b"["):
        return window
    # A byte each, so that places in the text are places in the bytes; what is read of it is looked at for `role` alone.
    text = window.decode("latin-1")
    start = _skip(text, 1)
    if text[start : start + 1] == "]":
        return b""
    try:
        first, end = _scan(text, start)
        if isinstance(first, dict) and first.get("role") in _SYSTEM:
            behind = _skip(text, end)
            if text[behind : behind + 1] != "]":
                _, end = _scan(text, _skip(text, behind + 1))
    except (ValueError, RecursionError):
        return window  # it goes on behind the window
    return window[start:end]


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return at if found is None else found.end()
