"""The model's value is replaced, and every other byte stays as the client wrote it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wakecall.rewrite import find_json_model, replace_model

JSON = "application/json"
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.just("model"), inner, max_size=4),
    max_leaves=12,
)
members = st.dictionaries(st.text().filter(lambda key: key.lower() != "model"), values, max_size=5)
spaces = st.text(alphabet=" \t\r\n", max_size=3)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[bytes, bytes, str]:
    """A body in three parts: before the model's value, after it, and the value."""
    others = list(draw(members).items())
    place = draw(st.integers(0, len(others)))
    old = draw(st.text())
    escape = draw(st.booleans())
    key = draw(st.sampled_from(['"model"', '"\\u006dodel"', '"mo\\u0064e\\u006C"']))

    def space() -> str:
        return draw(spaces)

    def dump(value: object) -> str:
        return json.dumps(value, ensure_ascii=escape)

    def member(item: tuple[str, object]) -> str:
        return f"{space()}{dump(item[0])}{space()}:{space()}{dump(item[1])}{space()}"

    before = ",".join(member(item) for item in others[:place]) + ("," if place else "")
    after = ("," if others[place:] else "") + ",".join(member(item) for item in others[place:])
    head = f"{space()}{{{before}{space()}{key}{space()}:{space()}"
    tail = f"{space()}{after}}}{space()}"
    return head.encode("utf-8", "surrogatepass"), tail.encode("utf-8", "surrogatepass"), dump(old)


@given(bodies(), st.text(st.characters(exclude_categories=["Cs"])))
def test_only_the_value_of_the_top_level_model_changes(body: tuple[bytes, bytes, str], model: str) -> None:
    head, tail, old = body
    whole = head + old.encode("utf-8", "surrogatepass") + tail
    if json.loads(old) == model:
        assert replace_model(whole, JSON, model) is whole
    else:
        assert replace_model(whole, JSON, model) == head + json.dumps(model).encode() + tail


@given(members, st.text(min_size=1))
def test_a_rewritten_body_means_the_same_but_for_its_model(others: dict[str, object], model: str) -> None:
    parsed = json.loads(replace_model(json.dumps({**others, "model": "old"}).encode(), JSON, model))
    assert parsed == {**others, "model": model}


@given(st.binary(max_size=80) | st.text(alphabet='{}[]",:\\model 1', max_size=60).map(str.encode))
def test_no_input_makes_it_fail(body: bytes) -> None:
    """Bodies come from anybody: whatever they are, the answer is a span inside them or None."""
    span = find_json_model(body)
    assert span is None or 0 <= span[0] < span[1] <= len(body)


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages": [{"model": "inner"}], "x": {"model": "inner"}}',
        b'["model", "x"]',
        b'{"a": "\\"model\\": \\"x\\""}',
        b'{"model": 3}',
        b'{"model": {"model": "x"}}',
        b"",
        b'{"a"',
        b'{"a": [1, 2',
        b'{"model": "unfinished',
    ],
)
def test_without_a_top_level_model_the_body_is_untouched(body: bytes) -> None:
    assert replace_model(body, JSON, "new") is body


def test_one_that_is_it_already_stays_as_it_is_written() -> None:
    body = b'{"model":"caf\\u00e9:\\u0037b","x":1.0}'
    assert replace_model(body, JSON, "caf\u00e9:7b") is body


def test_a_model_below_the_top_level_is_left_alone() -> None:
    body = b'{"x":{"model":"a"},"model" : "b","y":[{"model":"c"}],"f":1.50e+3}'
    assert replace_model(body, JSON, "q:7b") == b'{"x":{"model":"a"},"model" : "q:7b","y":[{"model":"c"}],"f":1.50e+3}'


def form(*parts: tuple[str, bytes]) -> bytes:
    return (
        b"".join(b"--B\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n" for head, content in parts) + b"--B--\r\n"
    )


FILE = 'Content-Disposition: form-data; name="file"; filename="model"\r\nContent-Type: audio/wav'


@pytest.mark.parametrize("disposition", ['name="model"', "name=model", 'charset=x; NAME="model"'])
def test_the_form_field_model_is_replaced(disposition: str) -> None:
    def body(model: bytes) -> bytes:
        return form(
            (FILE, b"\x00\xff\r\n--Bx\r\n--b\r\n\r\nmodel"),
            (f"content-disposition: form-data; {disposition}", model),
            ('Content-Disposition: form-data; name="language"', b"model"),
        )

    assert replace_model(body(b"old"), 'multipart/form-data; boundary="B"', "new:7b") == body(b"new:7b")
    assert replace_model(body(b""), "Multipart/Form-Data; boundary=B", "new:7b") == body(b"new:7b")


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (
            form((FILE, b"x"), ('Content-Disposition: form-data; name="models"', b"x")),
            "multipart/form-data; boundary=B",
        ),
        (form(('Content-Disposition: form-data; name="model"; filename="m"', b"x")), "multipart/form-data; boundary=B"),
        (form(('Content-Disposition: form-data; name="model"', b"x")), "multipart/form-data; boundary=C"),
        (form(('Content-Disposition: form-data; name="model"', b"x")), "multipart/form-data"),
        (b"--B\r\n\r\nx\r\n--B--", "multipart/form-data; boundary=B"),
        (
            b'--B--\r\n--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nx\r\n--B',
            "multipart/form-data; boundary=B",
        ),
    ],
)
def test_a_form_without_the_field_is_untouched(body: bytes, content_type: str) -> None:
    assert replace_model(body, content_type, "new") is body


@given(st.binary(max_size=200), st.text(alphabet="B-", min_size=1, max_size=3))
def test_no_form_makes_it_fail(body: bytes, boundary: str) -> None:
    replace_model(b"--" + boundary.encode() + body, f"multipart/form-data; boundary={boundary}", "new")
