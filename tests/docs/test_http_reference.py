"""The table of paths in `docs/reference/http.md` is that of `/openapi.json`."""

from __future__ import annotations

import json
import re

from tests.docs.pages import DOCS
from wakecall.broker import open_broker
from wakecall.http import create_app
from wakecall.http.client import RELAYED
from wakecall.http.openapi import document_of

PAGE = (DOCS / "reference/http.md").read_text()


def documented() -> set[tuple[str, str]]:
    """Methods and paths of the table. `…/x` stands for the path before it with another end."""
    found = set()
    for cells in re.findall(r"^\| (`/.*?) \| ([A-Z, ]+) \|", PAGE, re.MULTILINE):
        path = ""
        for each in re.findall(r"`([^`]+)`", cells[0]):
            path = path.rpartition("/")[0] + each.removeprefix("…") if each.startswith("…") else each
            found |= {(method, path) for method in cells[1].split(", ")}
    return found


async def test_the_table_has_every_operation_and_no_other() -> None:
    async with open_broker() as broker:
        document = json.loads(document_of(create_app(broker).extensions["wakecall.routes"].all))
    described = {
        (method.upper(), re.sub(r"\{(session|task|key)_id\}", "{id}", path))
        for path, item in document["paths"].items()
        for method in item
    }
    eleven_more = {("POST", path) for path in RELAYED[1:]}
    assert documented() == described - eleven_more
    assert f"{RELAYED[0]}` and [eleven more]" in PAGE
    assert len(eleven_more) == 11
    assert all(f"`{path.removeprefix('/v1/')}`" in PAGE for _, path in eleven_more)
