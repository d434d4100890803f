"""The parts of the documentation that are made from the code. `python -m tests.docs.generate` writes them.

In a page such a part stands between two comments; what is around it is written by hand:

    <!-- generated: errors -->
    …
    <!-- end -->
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import trio
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.docs import cli_options
from tests.docs.pages import DOCS
from wakecall import ServeConfig, errors, lifecycle
from wakecall.broker import open_broker
from wakecall.config import BrokerConfig
from wakecall.errors import WakecallError
from wakecall.http.metrics import Metrics
from wakecall.models import InferRequest, LLMSpec, Status
from wakecall.testing import FakePublisher

_PART = re.compile(r"(<!-- generated: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_KIB = 1024
_RETRY_HEADERS = ("x-should-retry", "Retry-After")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n" + "".join("| " + " | ".join(cells) + " |\n" for cells in lines) + "\n"


# Configuration ------------------------------------------------------------------------------------------------------


def amount(value: float, unit: str) -> str:
    """A value as a person would say it, after the number that a program is given."""
    if unit == "bytes":
        for size, name in ((_KIB**3, "GiB"), (_KIB**2, "MiB"), (_KIB, "KiB")):
            if value % size == 0:
                return f"{value:d} ({value // size:d} {name})"
    if unit == "s":
        spoken = f" ({value / 3600:g} h)" if value >= 3600 else ""
        return f"{value:g} s{spoken}"
    return f"{value:d} {unit}".strip()


def settings(of_times: bool) -> str:
    rows = []
    for each in dataclasses.fields(BrokerConfig):
        unit = each.metadata["unit"]
        if (unit == "s") is of_times:
            rows.append([f"`{each.name}`", amount(each.default, unit), each.metadata["doc"]])
    return table(["setting", "default", "what it is"], rows)


def argument_docs(documented: Any) -> dict[str, str]:
    """What a docstring's `Args` section says of each argument."""
    text = inspect.getdoc(documented) or ""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.DOTALL | re.MULTILINE)
    assert section is not None, documented
    found = re.findall(r"^(\w+): (.*?)(?=^\w|\Z)", textwrap.dedent(section[1]), re.DOTALL | re.MULTILINE)
    return {name: " ".join(said.split()) for name, said in found}


def listening() -> str:
    said = argument_docs(ServeConfig)
    rows = [
        [f"`{each.name}`", "none" if each.default is None else f"`{each.default}`", said[each.name]]
        for each in dataclasses.fields(ServeConfig)
    ]
    return table(["setting", "default", "what it is"], rows)


# Errors -------------------------------------------------------------------------------------------------------------


def concrete_errors(base: type[WakecallError]) -> Iterator[type[WakecallError]]:
    """The errors below `base`, parents first."""
    for child in base.__subclasses__():
        # Others define errors of their own (the server's); this page is about the tree in errors.py.
        if child.__module__ == errors.__name__:
            yield child
            yield from concrete_errors(child)


def error_table(base: type[WakecallError]) -> str:
    rows = []
    for each in concrete_errors(base):
        retry = {None: "", True: "true", False: "false"}[each.should_retry]
        after = "" if each.default_retry_after_s is None else f"{each.default_retry_after_s:g}"
        code, kind, name = f"`{each.code}`", f"`{each.type}`", f"`{each.__name__}`"
        rows.append([code, str(each.default_status), each.default_message, retry, after, kind, name])
    return table(["code", "status", "message, if there is no better one", *_RETRY_HEADERS, "type", "in Python"], rows)


def abstract_errors() -> list[type[WakecallError]]:
    return [errors.RequestError, errors.TaskOver, errors.InferFailed, errors.Unavailable]


# Lifecycle ----------------------------------------------------------------------------------------------------------


def state_name(state: lifecycle.RowState | None) -> str:
    if state is None:
        return "—"
    if state.status is None:
        return "(none)"
    if state.status is not lifecycle.Status.INACTIVE:
        return str(state.status)
    return f"inactive, was {state.remembers}" if state.remembers else "inactive, withdrawn"


def transitions() -> str:
    states = list(lifecycle.TRANSITIONS)
    rows = [
        [event.value, *(state_name(lifecycle.TRANSITIONS[state][event]) for state in states)]
        for event in lifecycle.RowEvent
    ]
    return table(["", *(state_name(state) for state in states)], rows)


# Metrics ------------------------------------------------------------------------------------------------------------


async def work_and_render() -> str:
    """What a broker exports that has woken a row, served an infer and lost a channel: every label has a value then."""
    async with open_broker() as broker:
        exporter = Metrics(broker)
        rows = [LLMSpec("row", status=Status.HIBERNATING)]
        async with FakePublisher(broker, "publisher", rows) as publisher, trio.open_nursery() as nursery:

            async def publish() -> None:
                await publisher.answer(await publisher.next("wake"))
                await publisher.answer(await publisher.next("infer"), b"{}")

            nursery.start_soon(publish)
            async with broker.infer("row", InferRequest("/v1/completions", b"{}")) as reply:
                await reply.wait_done()
        return exporter.render().decode()


def families() -> list[Metric]:
    """Every family of metrics that a broker at work exports."""
    found = text_string_to_metric_families(trio.run(work_and_render))
    # When a series began: the client library's own, beside every one of ours.
    return [family for family in found if not family.name.endswith("_created")]


def metrics() -> str:
    rows = []
    for family in sorted(families(), key=lambda each: each.name):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        rows.append([f"`{name}`", family.type, ", ".join(f"`{label}`" for label in labels), family.documentation])
    return table(["metric", "type", "labels", "what it is"], rows)


PARTS: dict[str, Callable[[], str]] = {
    "times": lambda: settings(of_times=True),
    "bounds": lambda: settings(of_times=False),
    "listening": listening,
    "request_errors": lambda: error_table(errors.RequestError),
    "task_errors": lambda: error_table(errors.TaskOver),
    "infer_errors": lambda: error_table(errors.InferFailed),
    "broker_errors": lambda: error_table(errors.Unavailable),
    "transitions": transitions,
    "metrics": metrics,
    **cli_options.PARTS,
}


def parts_of(text: str) -> list[str]:
    return [match[2] for match in _PART.finditer(text)]


def generated(text: str) -> str:
    """A page's text with every generated part made anew."""
    return _PART.sub(lambda match: match[1] + PARTS[match[2]]() + match[4], text)


def pages() -> list[Path]:
    return [page for page in sorted(DOCS.rglob("*.md")) if parts_of(page.read_text())]


if __name__ == "__main__":
    for page in pages():
        page.write_text(generated(page.read_text()))
