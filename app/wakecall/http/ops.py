"""What stands beside the API: whether it lives, whether it can be used, what it counts, and what it is."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST
from quart import Quart, request

from ..broker import Broker
from ..errors import ShuttingDown, StoreUnavailable, WakecallError
from .answers import Answer, json_answer
from .calls import begin
from .errors import error_document, retry_headers
from .metrics import Metrics

__all__ = ["add_ops_routes"]

_ABOUT = """Wakecall: virtual LLMs behind one OpenAI-compatible address.

clients      /v1/models, /v1/chat/completions, ...
publishers   /publisher/v1/sessions/...
operators    /admin/v1/llms, /admin/v1/sessions, /admin/v1/tasks, /admin/v1/keys
state        /healthz, /readyz, /metrics
"""


def add_ops_routes(app: Quart, broker: Broker) -> None:
    """Put the routes of supervisors and of the curious into `app`."""
    metrics = Metrics(broker)

    async def index() -> Answer:
        return Answer(_ABOUT, content_type="text/plain; charset=utf-8")

    async def healthz() -> Answer:
        return json_answer({"status": "ok"})

    async def readyz() -> Answer:
        failures: list[WakecallError] = []
        if broker.stopping:
            failures.append(ShuttingDown())
        if not broker.store_ok:
            failures.append(StoreUnavailable())
        if not failures:
            return json_answer({"status": "ready"})
        document = error_document(failures[0], request.path) | {
            "status": "not ready",
            "reasons": [failure.code for failure in failures],
        }
        return json_answer(document, 503, retry_headers(failures[0]))

    async def show_metrics() -> Answer:
        begin(broker, "admin")  # how busy it is, is its operator's business
        return Answer(metrics.render(), content_type=CONTENT_TYPE_LATEST)

    app.add_url_rule("/", "index", index)
    app.add_url_rule("/healthz", "healthz", healthz)
    app.add_url_rule("/readyz", "readyz", readyz)
    app.add_url_rule("/metrics", "metrics", show_metrics)
