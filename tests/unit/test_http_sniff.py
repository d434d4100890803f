"""What a client's body says of `model` and `stream`."""

from __future__ import annotations

from typing import Any

import pytest

from wakecall.errors import AmbiguousModel, InvalidRequest, ModelRequired, RequestError, TooMany
from wakecall.http.sniff import Asked, sniff

JSON = "application/json"
FORM = "multipart/form-data; boundary=B"


def form(*parts: tuple[str, bytes], end: bytes = b"--B--\r\n") -> bytes:
    """A multipart body out of Content-Dispositions and contents."""
    return (
        b"".join(b"--B\r\nContent-Disposition: %b\r\n\r\n%b\r\n" % (head.encode(), content) for head, content in parts)
        + end
    )


MODEL = ('form-data; name="model"', b"whisper")
SECOND = b'Content-Disposition: form-data; name="model"\r\n\r\nother'
FILE = ('form-data; name="file"; filename="model"', bytes(range(256)) * 40 + b"\r\n--A\r\n--b--")


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b'{"model": "qwen"}', Asked("qwen", False)),
        (b'{"messages": [{"model": "inner", "stream": 1}], "model": "a/b", "stream": true}', Asked("a/b", True)),
        (b'{"mod\\u0065l": "q\\u0077en", "stream": false}', Asked("qwen", False)),
        (b' \n{"stream" : null , "model" : "qwen" }\r\n', Asked("qwen", False)),
        ('{"é": "模", "model": "qwen", "modell": 1, "models": 2}'.encode(), Asked("qwen", False)),
    ],
)
def test_json_names_its_model_and_whether_it_streams(body: bytes, found: Asked) -> None:
    assert sniff(body, JSON)[:2] == found[:2]


def test_any_other_content_type_is_read_as_json() -> None:
    """As engines do: curl calls every body a form."""
    assert sniff(b'{"model": "qwen"}', "application/x-www-form-urlencoded") == Asked("qwen", False)


@pytest.mark.parametrize(
    ("body", "error", "param"),
    [
        (b"{}", ModelRequired, "model"),
        (b'{"model": null}', ModelRequired, "model"),
        (b'{"a": {"model": "x"}}', ModelRequired, "model"),
        (b'{"model": "a", "model": "a"}', AmbiguousModel, "model"),
        (b'{"model": "a", "mod\\u0065l": "b"}', AmbiguousModel, "model"),
        (b'{"model": "a", "Model": "b"}', AmbiguousModel, "model"),
        (b'{"MODEL": "b"}', AmbiguousModel, "model"),
        (b'{"model": "a", "stream": true, "STREAM": false}', AmbiguousModel, "stream"),
        (b'{"model": "a", "stream": true, "stream": true}', AmbiguousModel, "stream"),
        ('{"model": "a", "ſtream": true}'.encode(), AmbiguousModel, "stream"),
        (b'{"model": 1}', InvalidRequest, "model"),
        (b'{"model": ["a"]}', InvalidRequest, "model"),
        (b'{"model": "a", "stream": 1}', InvalidRequest, "stream"),
        (b'{"model": "a", "stream": "true"}', InvalidRequest, "stream"),
        (b'["model"]', InvalidRequest, None),
    ],
)
def test_json_that_does_not_name_one_model_is_refused(
    body: bytes, error: type[RequestError], param: str | None
) -> None:
    with pytest.raises(error) as caught:
        sniff(body, JSON)
    assert type(caught.value) is error
    assert caught.value.param == param


def test_a_body_has_at_most_so_many_members() -> None:
    """Large or small."""
    for pad in (b"", b"b" * (1 << 20)):
        start = b'{"model": "a", "b": "' + pad + b'"'
        assert sniff(start + b', "c": 1' * 9_998 + b"}", JSON).model == "a"
        with pytest.raises(TooMany):
            sniff(start + b', "c": 1' * 9_999 + b"}", JSON)


def test_a_large_body_of_many_members_is_not_taken_apart() -> None:
    """Each member costs a hundred bytes: 32 MiB of them would be hundreds of mebibytes."""
    with pytest.raises(TooMany):
        sniff(b'{"model": "a", "b": "' + b"b" * (1 << 20) + b'"' + b', "c": 1' * 20_000 + b"}", JSON)


@pytest.mark.parametrize(
    ("body", "content_type", "found"),
    [
        (form(FILE, MODEL), FORM, Asked("whisper", False)),
        (form(MODEL, FILE), 'Multipart/Form-Data; charset=utf-8; boundary="B"', Asked("whisper", False)),
        (form(MODEL, ('form-data; name="stream"', b"True")), FORM, Asked("whisper", True)),
        (form(MODEL, ("form-data; name=stream", b"false")), FORM, Asked("whisper", False)),
        (form(("form-data; name=model", b"a/b:c")), FORM, Asked("a/b:c", False)),
        (b"a preamble\r\n" + form(MODEL), FORM, Asked("whisper", False)),
        (form(MODEL).replace(b"--B\r\n", b"--B \t\r\n"), FORM, Asked("whisper", False)),
        (form(MODEL, ('form-data; name="empty"', b"")), FORM, Asked("whisper", False)),
        (form(MODEL, end=b"--B-- \r\nan epilogue\r\n--B\r\nmodel"), FORM, Asked("whisper", False)),
    ],
)
def test_a_form_names_its_model_and_whether_it_streams(body: bytes, content_type: str, found: Asked) -> None:
    assert sniff(body, content_type) == found


@pytest.mark.parametrize(
    ("body", "content_type", "error"),
    [
        (form(FILE), FORM, ModelRequired),
        (form(MODEL, MODEL), FORM, AmbiguousModel),
        (form(MODEL, ('form-data; name="Model"', b"x")), FORM, AmbiguousModel),
        (form(MODEL, ('form-data; name="\\m\\odel"', b"x")), FORM, AmbiguousModel),
        (form(MODEL, ('form-data; name="stream"', b"1"), ('form-data; name="stream"', b"1")), FORM, AmbiguousModel),
        (form(MODEL, ('form-data; name="stream"', b"maybe")), FORM, InvalidRequest),
        (form(('form-data; name="model"; filename="x"', b"x")), FORM, InvalidRequest),
        (form(('form-data; name="a"; name="model"', b"x")), FORM, InvalidRequest),
        (form(("form-data; name*=utf-8''model", b"x")), FORM, InvalidRequest),
        (form(("form-data", b"x")), FORM, InvalidRequest),
        (form(('form-data; name="model"\r\nContent-Disposition: form-data; name="x"', b"x")), FORM, InvalidRequest),
        (form(('form-data; name="model"', b"\xff")), FORM, InvalidRequest),
        (form(('form-data; name="model"', b"x" * 2000)), FORM, InvalidRequest),
        (form(MODEL, end=b""), FORM, InvalidRequest),
        (form(MODEL).replace(b"\r\n\r\n", b"\r\n", 1), FORM, InvalidRequest),
        (form(MODEL).replace(b"--B\r\n", b"--Bx\r\n", 1), FORM, InvalidRequest),
        (b"--B\r\n" + b"x: y\r\n" * 3000 + b"\r\nx\r\n--B--\r\n", FORM, InvalidRequest),
        (b"", FORM, InvalidRequest),
        (form(MODEL), "multipart/form-data", InvalidRequest),
        (form(MODEL), "multipart/form-data; boundary=B; boundary=C", InvalidRequest),
        (form(*[('form-data; name="x"', b"")] * 1001), FORM, TooMany),
        (form(MODEL, end=b"--B--an epilogue"), FORM, InvalidRequest),
        # What Werkzeug, or a reader of mail, would find another model in.
        (b"x--B\r\n" + form(MODEL), FORM, InvalidRequest),
        (form(MODEL, ('form-data; name="a"', b"\n--B\n" + SECOND)), FORM, InvalidRequest),
        (form(MODEL, ('form-data; name="a"', b"\r--B\r" + SECOND)), FORM, InvalidRequest),
        (form(('form-data; name="a"\r\n ; name="model"', b"x"), MODEL), FORM, InvalidRequest),
        (
            form(('form-data; name="a"\nContent-Disposition: form-data; name="model"', b"x"), MODEL),
            FORM,
            InvalidRequest,
        ),
        (form(('form-data; name="a"\n\nx', b"x"), MODEL), FORM, InvalidRequest),
        (form(('form-data; name="a"\r\nno header', b"x"), MODEL), FORM, InvalidRequest),
        (form(('form-data; name="a"; name*0="model"', b"x"), MODEL), FORM, InvalidRequest),
        (form(('form-data; name="a; name="model"', b"x")), FORM, InvalidRequest),
        (form(('form-data;\x1fname="model"', b"x")), FORM, InvalidRequest),
        (form(('form-data; name= "model"', b"x")), FORM, InvalidRequest),
        (form(('file; name="model"', b"x")), FORM, InvalidRequest),
        (form(MODEL).replace(b"Disposition:", b"Disposition :"), FORM, InvalidRequest),
        (form(MODEL), "multipart/form-data;\x85boundary=B", InvalidRequest),
        (form(('form-data; name="model"\r\nContent-Transfer-Encoding: base64', b"eA==")), FORM, InvalidRequest),
    ],
)
def test_a_form_that_two_parsers_could_read_differently_is_refused(
    body: bytes, content_type: str, error: type[RequestError]
) -> None:
    with pytest.raises(error) as caught:
        sniff(body, content_type)
    assert type(caught.value) is error


@pytest.mark.parametrize("cut", range(0, len(form(MODEL)) - 4, 3))
def test_a_form_that_is_cut_anywhere_is_a_request_error(cut: int) -> None:
    """Never an exception of ours."""
    with pytest.raises(RequestError):
        sniff(form(MODEL)[:cut], FORM)


def test_what_is_found_has_the_types_it_claims() -> None:
    found: Any = sniff(b'{"model": "qwen", "stream": true}', JSON)
    assert (type(found.model), type(found.stream)) == (str, bool)
