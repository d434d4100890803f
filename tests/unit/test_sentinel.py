"""The search for leaked secrets finds them."""

from __future__ import annotations

import base64
import json

import pytest
from tests.sentinel import leaks_of, new_sentinel

SECRET = new_sentinel("prompt")


@pytest.mark.parametrize(
    "written",
    [
        SECRET.encode(),
        SECRET[:12].encode(),
        SECRET[5:20].upper().encode(),
        base64.b64encode(SECRET.encode()),
        base64.b64encode(f'{{"x": "{SECRET}"}}'.encode()),
        base64.urlsafe_b64encode(f"?{SECRET}".encode()),
        SECRET.encode().hex().encode(),
        SECRET.encode("utf-16-le"),
        repr(list(SECRET.encode())).encode(),
        json.dumps({"x": SECRET}).encode(),
        repr(SECRET.encode()).encode(),
    ],
    ids=range(11),
)
def test_a_secret_is_found_however_it_is_written(written: bytes) -> None:
    assert leaks_of(b"before " + written + b" after", SECRET) != []


def test_what_is_not_there_is_not_found() -> None:
    assert leaks_of(b"before after " + new_sentinel("prompt").encode() + SECRET[:11].encode(), SECRET) == []
