"""What stands beside the API: whether it lives, whether it can be used, what it counts, and what it is."""

from __future__ import annotations

from typing import Final, Literal

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from quart import request

from ..broker import Broker
from ..errors import ShuttingDown, StoreUnavailable, WakecallError
from .answers import Answer, bytes_answer, json_answer
from .calls import Call
from .errors import error_document, retry_headers
from .metrics import Metrics
from .routes import Media, Routes

__all__ = ["add_ops_routes"]

_ABOUT = """Wakecall: virtual LLMs behind one OpenAI-compatible address.

clients      /v1/models, /v1/chat/completions, ...
publishers   /publisher/v1/sessions/...
operators    /admin/v1/llms, /admin/v1/sessions, /admin/v1/tasks, /admin/v1/keys, /admin/v1/usage
state        /healthz, /readyz, /metrics
description  /openapi.json
"""


class Healthy(msgspec.Struct, frozen=True):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Ready(msgspec.Struct, frozen=True):
    """It takes work."""

    status: Literal["ready"] = "ready"


class NotReady(msgspec.Struct, frozen=True):
    """It takes no work; the usual error stands beside."""

    reasons: list[Literal["shutting_down", "store_unavailable"]]
    status: Literal["not ready"] = "not ready"


_TEXT: Final = Media("A few lines for people.", {"text/plain": str})
_METRICS: Final = Media("Prometheus' text format.", {"text/plain": str})
_DOCUMENT: Final = Media("OpenAPI 3.1.", {"application/json": dict})


def add_ops_routes(routes: Routes, broker: Broker) -> None:
    """Put the routes of supervisors and of the curious there."""
    metrics = Metrics(broker)
    document = b""

    @routes.add("GET", "/", role=None, answer=_TEXT)
    async def index() -> Answer:
        """Say what this is."""
        return Answer(_ABOUT, content_type="text/plain; charset=utf-8")

    @routes.add("GET", "/healthz", role=None, answer=Healthy)
    async def healthz() -> Answer:
        """Say that the process lives."""
        return json_answer(Healthy())

    @routes.add(
        "GET", "/readyz", role=None, answer={"200": Ready, "503": NotReady}, errors=(ShuttingDown, StoreUnavailable)
    )
    async def readyz() -> Answer:
        """Say whether it takes work."""
        failures: list[WakecallError] = []
        if broker.stopping:
            failures.append(ShuttingDown())
        if not broker.store_ok:
            failures.append(StoreUnavailable())
        if not failures:
            return json_answer(Ready())
        document = error_document(failures[0], request.path) | {
            "status": "not ready",
            "reasons": [failure.code for failure in failures],
        }
        return json_answer(document, 503, retry_headers(failures[0]))

    # How busy it is, is its operator's business. Whoever collects that for him need not be able to do what he can.
    @routes.add("GET", "/metrics", role="monitor", answer=_METRICS, name="metrics")
    async def show_metrics(call: Call) -> Answer:
        """Show what is counted."""
        return Answer(metrics.render(), content_type=CONTENT_TYPE_LATEST)

    @routes.add("GET", "/openapi.json", role=None, answer=_DOCUMENT, name="openapi")
    async def show_openapi() -> Answer:
        """Show this description."""
        nonlocal document
        if not document:
            from .openapi import document_of

            document = document_of(routes.all)
        return bytes_answer(document, content_type="application/json")
