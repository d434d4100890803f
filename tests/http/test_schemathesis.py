"""Schemathesis over `/openapi.json`, against a broker that is a process of its own with a live publisher.

No answer is a 500, and every one is as documented: its status, content type, headers and schema, its error's code; what the
schemas have is accepted, what they have not is refused. The inputs are the same at each run.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import requests
import schemathesis
import trio
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.http.described import description_of
from tests.http.live import LAPTOP, ROWS, SPARE, Live, open_live
from wakecall.broker import open_broker
from wakecall.http import create_app
from wakecall.models import is_llm_name

CONFIG = {
    "seed": 1,
    "generation": {"deterministic": True, "max-examples": 10, "no-shrink": True, "with-security-parameters": False},
    "checks": {
        # Those that say who is to try again; a 500 never is documented as anything but ours.
        "not_a_server_error": {"expected-statuses": ["2xx", "3xx", "4xx", "502", "503", "504"]},
        # 410: the task is over. 413, 429: bounds.
        "positive_data_acceptance": {
            "expected-statuses": ["2xx", "3xx", "401", "403", "404", "405", "409", "410", "413", "429", "503"]
        },
    },
}
LIVE_TASK = "a-task-that-is-live"
SPARE_KEY = "a-key-that-is-there"
SPARE_ALIAS = "an-alias-that-is-there"
SPARE_PUBLIC = "a-public-row"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with open_live(tmp_path_factory.mktemp("state")) as each:
        yield each


@pytest.fixture(scope="module")
def statuses() -> Iterator[dict[str, Counter[int]]]:
    """What each operation answered. In the end: not only 404s, everyone of them succeeded too."""
    each: dict[str, Counter[int]] = {}
    yield each
    assert [label for label, seen in each.items() if not any(200 <= status < 300 for status in seen)] == []


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as each:
        yield each


async def document() -> dict[str, Any]:
    async with open_broker() as broker:
        return description_of(create_app(broker)).document


# Tests are made of it when they are collected; the first one sees to it that it is the one that is served.
api = schemathesis.openapi.from_dict(trio.run(document), config=SchemathesisConfig.from_dict(CONFIG))


def test_the_document_is_the_one_that_is_served_and_is_valid(live: Live) -> None:
    status, served = live.ask("GET", "/openapi.json")
    assert (status, served) == (200, api.raw_schema)
    api.validate()


def half(value: object) -> bool:
    """Of all values one half, and the same one at each run."""
    return zlib.crc32(repr(value).encode()) % 2 == 0


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    """Half of them name something that is there."""
    if path_parameters is None:
        return None
    known = {"name": ROWS[0], "session_id": LAPTOP, "task_id": LIVE_TASK, "key_id": SPARE_KEY}
    if context.operation.path.endswith("/frames"):
        known["session_id"] = SPARE  # a channel of the publisher's own would be ended by it
    if context.operation.method.upper() == "PUT" and "/admin/v1/llms/" in context.operation.path:
        known["name"] = SPARE_PUBLIC  # the others are publishers'
    if "/aliases/" in context.operation.path:
        known["name"] = SPARE_ALIAS
    return {name: known[name] if half(value) else value for name, value in path_parameters.items()}


def within_64_bits(value: Any) -> Any:
    """As it is, but for integers that JSON has and we do not: a schema of what is ignored cannot say so."""
    if isinstance(value, dict):
        return {key: within_64_bits(each) for key, each in value.items()}
    if isinstance(value, list):
        return [within_64_bits(each) for each in value]
    return value % 2**63 if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63 else value


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Half of the calls are for a model that answers, now or when it is awake.

    No row is registered twice: that a schema cannot say.
    """
    if not isinstance(body, dict):
        return body
    body = within_64_bits(body)
    if context.operation.path.startswith("/v1/") and isinstance(body.get("model"), str) and half(body):
        return {**body, "model": ROWS[0] if half(body["model"]) else ROWS[2]}
    if isinstance(body.get("llm"), str) and is_llm_name(body["llm"]) and half(body):
        return {**body, "llm": ROWS[0]}
    rows = body.get("llms")
    if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
        return {**body, "llms": list({repr(row.get("name")): row for row in rows}.values())}
    return body


@api.parametrize()
def test_no_500_and_every_answer_is_as_documented(case: Any, live: Live, statuses: Any, session: Any) -> None:
    live.ready()
    in_path = case.path_parameters or {}
    if in_path.get("task_id") == LIVE_TASK:
        case.path_parameters = {**in_path, "task_id": live.task()}
    if in_path.get("key_id") == SPARE_KEY:
        case.path_parameters = {**in_path, "key_id": live.spare_key()}
    if in_path.get("name") == SPARE_ALIAS:
        live.ask("PUT", f"/admin/v1/aliases/{SPARE_ALIAS}", {"target": ROWS[0]})
    # Which limits which role may have, that no name stands for an alias twice, what a record is: the schema says not.
    results = "POST /publisher/v1/sessions/{session_id}/results"
    unsaid = "POST /admin/v1/keys", "PUT /admin/v1/aliases/{name}", results
    excluded = [positive_data_acceptance] if case.operation.label in unsaid else []
    role = next(iter(case.operation.definition.raw["security"]), {}).get("bearer", [None])[0]
    headers = {"x-api-key": live.keys[role]} if role else {}
    seen = statuses.setdefault(case.operation.label, Counter())
    if in_path.get("session_id") == SPARE and case.method == "GET":
        # Its answer has no end.
        with closing(
            session.request(**case.as_transport_kwargs(base_url=live.url, headers=headers), stream=True)
        ) as response:
            assert any(line == b"event: hello" for line in response.iter_lines(chunk_size=1))
    else:
        response = case.call_and_validate(
            base_url=live.url, session=session, headers=headers, excluded_checks=excluded, timeout=30
        )
    seen[response.status_code] += 1
