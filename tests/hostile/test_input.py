"""JSON that was written to break somebody, in every field of every route that takes any.

Whatever it is, the caller gets an answer in the usual shape and may go on on the same connection; nothing is logged as an
error, and a sibling's stream goes on.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.hostile.inputs import (
    GOOD,
    MALFORMED_BODIES,
    MALFORMED_VALUES,
    OTHER_TYPES,
    RELAYED_ALL_THE_SAME,
    ROUTES,
    TEXTS,
    Field,
    Line,
    is_too_long,
    written,
)
from tests.hostile.sibling import sibling
from tests.http.served import JSON, Served, open_served
from tests.http.wire import Answer
from wakecall.http.client import RELAYED
from wakecall.models import is_id, is_llm_name
from wakecall.store.sqlite import open_sqlite_store


@pytest.fixture
async def served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Served]:
    """A broker on a file, with a sibling; a row `offline` without a channel. No error is logged, and nothing that could
    pass for a line of its own."""
    caplog.set_level(logging.DEBUG)
    async with open_sqlite_store(tmp_path / "w.db") as store, open_served(store=store) as served, sibling(served):
        assert (await served.register("elsewhere", {"name": "offline"})).status == 200
        yield served
    for record in caplog.records:
        if record.name.startswith("wakecall"):
            assert record.levelno < logging.WARNING, record
            assert record.exc_info is None
            assert record.getMessage().isprintable(), record


#: Those that fit into one message, and are something.
SMALL = [text for text in TEXTS.values() if text and not is_too_long(text)]


def said(answer: Any) -> tuple[int, str | None, str | None]:
    if answer.status < 400:
        return answer.status, None, None
    return answer.status, answer.code, answer.json["error"]["param"]


def test_no_hostile_text_is_a_name_or_an_id() -> None:
    """On which the table leans."""
    assert not [text for text in TEXTS.values() if is_llm_name(text) or is_id(text)]


@pytest.mark.parametrize("fields", ROUTES.values(), ids=ROUTES)
async def test_a_value_that_is_no_json_is_400_in_every_field(served: Served, fields: list[Field]) -> None:
    """It changes nothing, and the next request on the connection is served."""
    before = served.broker.llms(), served.broker.session_views()
    async with Line(served) as line:
        for field, (what, value) in itertools.product(fields, MALFORMED_VALUES.items()):
            relays = field.route == "client" and not field.is_key
            if not (relays and what in RELAYED_ALL_THE_SAME):
                answer = await line.ask(field.method, field.target, body=field.fill(value))
                assert said(answer) == (400, "invalid_json", None), (field.where, what)
        assert line.connections == 1
    assert (served.broker.llms(), served.broker.session_views()) == before
    assert served.broker.statistics().accepted == 1, "only the sibling's"


@pytest.mark.parametrize("fields", ROUTES.values(), ids=ROUTES)
async def test_a_text_is_taken_or_refused_as_its_field_says(served: Served, fields: list[Field]) -> None:
    """Taken, it is kept letter for letter; refused, the answer names the field."""
    async with Line(served) as line:
        await line.ask("PUT", "/publisher/v1/sessions/laptop", body=b'{"llms": [{"name": "row"}]}')
        for field, (what, text) in itertools.product(fields, TEXTS.items()):
            answer = await line.ask(field.method, field.target, body=field.fill(written(text)))
            assert said(answer) == field.expected(text), (field.where, what)
            if answer.status == 200 and field.shown is not None:
                target, look = field.shown
                assert look((await line.ask("GET", target)).json) == text, (field.where, what)
        assert line.connections == 1
    assert {llm.name for llm in served.broker.llms()} <= {"sibling", "offline", "row", "upstream"}


@pytest.mark.parametrize("fields", ROUTES.values(), ids=ROUTES)
async def test_a_value_of_another_type_is_taken_or_refused_by_name(served: Served, fields: list[Field]) -> None:
    """What is refused is refused for that field; a wake of 1.8e308 s, say, is."""
    async with Line(served) as line:
        await line.ask("PUT", "/publisher/v1/sessions/laptop", body=b'{"llms": [{"name": "row"}]}')
        for field, value in itertools.product((each for each in fields if not each.is_key), OTHER_TYPES):
            _, code, param = said(await line.ask(field.method, field.target, body=field.fill(value)))
            if code == "invalid_request":
                # Of an object it may name a member; of a name's value the object that it stands in.
                assert param, (field.where, value)
                assert param.startswith(field.where) or field.where.startswith(param), (field.where, value)
            elif code is not None:
                assert code in ("model_required", "task_not_found", "model_offline", "forbidden"), (field.where, value)
        assert line.connections == 1


async def test_a_body_that_is_no_json_is_400_on_every_route(served: Served) -> None:
    async with Line(served) as line:
        for (method, target), good in GOOD.items():
            for what, spoil in MALFORMED_BODIES.items():
                answer = await line.ask(method, target, body=spoil(good))
                # A client's is looked at no further than that it is no object.
                code = "invalid_request" if spoil(good)[:1] == b"[" and target.startswith("/v1/") else "invalid_json"
                assert said(answer) == (400, code, None), (target, what)
            assert (await line.ask(method, target, body=good)).status in (200, 403, 404, 503)
        assert line.connections == 1


async def test_every_relayed_path_refuses_what_is_no_json(served: Served) -> None:
    """In the error's shape that its SDK knows."""
    async with Line(served) as line:
        for path, what in itertools.product(
            RELAYED,
            (
                "arrays 100,000 deep",
                "an integer of 5,000 digits",
                "NaN",
                "1e999",
                "a lone high surrogate",
                "a bare NUL",
            ),
        ):
            answer = await line.ask("POST", path, body=b'{"model": "offline", "x": %b}' % MALFORMED_VALUES[what])
            assert said(answer) == (400, "invalid_json", None), what
            assert set(answer.json) == ({"type", "error"} if path == "/v1/messages" else {"error"})


async def test_a_key_that_stands_twice_is_refused_where_it_could_be_read_two_ways(served: Served) -> None:
    """Publishers' and operators' bodies are read here, and must be plain; of a client's only what it calls is read."""
    session = "/publisher/v1/sessions/laptop"
    cases: list[tuple[str, str, bytes, tuple[int, str, str | None]]] = [
        ("PUT", session, body, (400, "invalid_json", None))
        for body in (
            b'{"llms": [], "llms": []}',
            b'{"llms": [{"name": "a", "name": "b"}]}',
            b'{"llms": [{"name": "a", "n\\u0061me": "b"}]}',
            b'{"llms": [], "agent": {"name": "a", "name": "b"}}',
            b'{"llms": [], "unknown": {"a": 1, "a": 2}}',
        )
    ]
    cases += [
        (
            "POST",
            f"{session}/heartbeat",
            b'{"llms": {"row": "active", "row": "hibernating"}}',
            (400, "invalid_json", None),
        ),
        ("POST", f"{session}/heartbeat", b'{"tasks": [], "tasks": ["a"]}', (400, "invalid_json", None)),
        ("POST", "/publisher/v1/tasks/t/failure", b'{"message": "a", "message": "b"}', (400, "invalid_json", None)),
        (
            "PUT",
            "/admin/v1/llms/upstream",
            b'{"type": "t", "model": "m", "url": "http://127.0.0.1", "url": "http://127.0.0.2"}',
            (400, "invalid_json", None),
        ),
    ]
    for body, param in (
        (b'{"model": "offline", "model": "row"}', "model"),
        (b'{"model": "offline", "mod\\u0065l": "offline"}', "model"),
        (b'{"model": "offline", "MODEL": "row"}', "model"),
        ('{"model": "offline", "ſtream": true}'.encode(), "stream"),
        (b'{"stream": true, "stream": false, "model": "offline"}', "stream"),
    ):
        cases.append(("POST", "/v1/chat/completions", body, (400, "ambiguous_model", param)))
    async with Line(served) as line:
        for method, target, body, expected in cases:
            assert said(await line.ask(method, target, body=body)) == expected, body


async def test_what_a_client_writes_is_relayed_byte_for_byte(served: Served) -> None:
    """As a key and as a value that nobody here looks into, escaped or not, once or twice; and so is its answer."""
    keys = ", ".join(f"{msgspec.json.encode(text).decode()}: {msgspec.json.encode(text).decode()}" for text in SMALL)
    escaped = b", ".join(written(text) for text in SMALL)
    twice = b", ".join(b'"twice": %b' % MALFORMED_VALUES[what] for what in RELAYED_ALL_THE_SAME)
    body = b'{"model": "qwen", "x": {%b}, "y": [%b], %b}' % (keys.encode(), escaped, twice)
    async with served.publishing({"name": "qwen"}, session_id="box") as publisher, Line(served) as line:
        for padding in (b"", b" " * 70_000):  # in its frame, and fetched
            async with served.calling(padding + body) as client:
                frame = await publisher.next("infer")
                target = f"/publisher/v1/tasks/{frame.task_id}/body"
                assert (await line.ask("GET", target)).body == padding + body
                assert frame.data.get("body", "").encode() == (b"" if padding else body)
                await publisher.answer(frame, body)
                await client.read_head()
                assert await client.rest() == (body, False)


@pytest.mark.parametrize("waking", [False, True], ids=["infer", "wake"])
async def test_a_failure_is_told_in_its_own_words_whatever_they_are(
    served: Served, waking: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As one JSON string, cut at 4 KiB of whole letters. The publisher's own code is not the client's, and is logged only
    where it looks like one: it might quote a prompt, or a line of the log."""
    row = {"name": "qwen", "status": "hibernating" if waking else "active"}
    async with served.publishing(row, session_id="box") as publisher:
        for text in TEXTS.values():
            async with served.calling({"model": "qwen"}, "/v1/messages") as client:
                frame = await publisher.next("wake" if waking else "infer")
                assert (await publisher.fail(frame, message=text, code=text)).status == 200
                answer = await client.wire.read_answer("POST")
                assert (answer.status, answer.code) == ((503, "wake_failed") if waking else (502, "publisher_error"))
                told = answer.json["error"]["message"]
                if text:
                    assert told == text.encode()[:4096].decode(errors="ignore")
                assert b"\n" not in answer.body
        shown = [record.args[1] for record in caplog.records if record.name == "wakecall.broker" and record.args]
        assert shown == ["no plain code"] * len(TEXTS)
        async with served.calling({"model": "qwen"}):
            frame = await publisher.next("wake" if waking else "infer")
            await publisher.fail(frame, message="m", code="out_of_memory")
        assert "(out_of_memory)" in caplog.text


async def test_a_failures_words_stay_within_one_event(served: Served) -> None:
    """No line separator of any kind ends it early."""
    async with served.publishing({"name": "qwen"}, session_id="box") as publisher:
        for text in SMALL:
            async with served.calling({"model": "qwen", "stream": True}) as client:
                frame = await publisher.next("infer")
                async with publisher.upload(frame, "content-type: text/event-stream") as upload:
                    await upload.send(b"data: 1\n\n")
                    await client.read_head()
                    await client.until(b"data: 1\n\n")
                    assert (await publisher.fail(frame, message=text)).status == 200
                    got, cut = await client.rest()
            assert cut
            assert re.fullmatch(rb"event: error\ndata: [^\n\r]*\n\n", got), got
            event = msgspec.json.decode(got.removeprefix(b"event: error\ndata: "))
            assert not text or event["error"]["message"] == text


async def test_a_keys_texts_are_taken_or_refused_and_kept(tmp_path: Path) -> None:
    """Once there is an operator's key, whose broker no sibling without one can use."""
    kept = {text for text in TEXTS.values() if len(text) <= 128} | {""}
    async with open_sqlite_store(tmp_path / "w.db") as store, open_served(store=store) as served, Line(served) as line:
        secret = (await served.broker.create_key("admin")).secret

        async def make(**members: Any) -> Answer:
            body = msgspec.json.encode({"role": "client", **members})
            return await line.ask("POST", "/admin/v1/keys", f"authorization: Bearer {secret}", body=body)

        for what, text in TEXTS.items():
            answer = await make(name=text)
            assert said(answer) == ((201, None, None) if len(text) <= 128 else (400, "invalid_request", "name")), what
            assert answer.status != 201 or answer.json["name"] == text, what
            assert said(await make(owner=text)) == (400, "invalid_request", "owner"), what
            answer = await make(llms=["*", text])
            plain = re.fullmatch(r"[A-Za-z0-9._:@/*-]{1,128}", text) is not None
            assert said(answer) == ((201, None, None) if plain else (400, "invalid_request", "llms[1]")), what
        for member, value in itertools.product(("rpm", "max_in_flight", "expires_in_s"), OTHER_TYPES):
            body = b'{"role": "client", "%b": %b}' % (member.encode(), value)
            answer = await line.ask("POST", "/admin/v1/keys", f"authorization: Bearer {secret}", body=body)
            assert said(answer) in ((201, None, None), (400, "invalid_request", member)), (member, value)
        listed = await line.ask("GET", "/admin/v1/keys", f"authorization: Bearer {secret}")
        assert {each["name"] for each in listed.json["data"]} == kept
        assert line.connections == 1
    async with open_sqlite_store(tmp_path / "w.db") as store, open_served(store=store) as served:
        assert {view.key.name for view in served.broker.key_views()} == kept


async def test_a_store_keeps_hostile_texts_and_stays_sound(tmp_path: Path) -> None:
    """Letter for letter over a restart; the tables are those that were there, and SQLite finds nothing wrong."""
    path = tmp_path / "w.db"
    texts = [text for text in TEXTS.values() if not is_too_long(text)]
    rows = [{"name": f"row-{n}", "type": text, "model": text} for n, text in enumerate(texts)]
    async with open_sqlite_store(path) as store, open_served(store=store) as served, sibling(served):
        tables = schema(path)
        for n, text in enumerate(texts):
            body = {"llms": [rows[n]], "agent": {"name": text, "version": text}}
            answer = await served.ask("PUT", f"/publisher/v1/sessions/s-{n}", JSON, body=msgspec.json.encode(body))
            assert answer.status == 200, text
        before = {llm.name: llm for llm in served.broker.llms()}
    async with open_sqlite_store(path) as store, open_served(store=store) as served:
        after = {llm.name: llm for llm in served.broker.llms()}
        assert len(after) == len(texts) + 1
        for n, text in enumerate(texts):
            row = after[f"row-{n}"]
            assert (row.type, row.model) == (text, before[row.name].model)
        agents = {view.record.session_id: view.record for view in served.broker.session_views()}
        assert [agents[f"s-{n}"].agent_name for n in range(len(texts))] == texts
        assert [agents[f"s-{n}"].agent_version for n in range(len(texts))] == texts
    assert schema(path) == tables


def schema(path: Path) -> list[Any]:
    """What there is in the file, and what SQLite has to say against it."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        (fault,) = connection.execute("PRAGMA integrity_check").fetchone()
        assert fault == "ok"
        return connection.execute("SELECT type, name, sql FROM sqlite_master ORDER BY name").fetchall()
