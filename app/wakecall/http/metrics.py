"""What Prometheus is told: the counters of the broker's first invariant, what is under way, and how long things take.

Gauges and counters are read from `Broker.statistics` when somebody asks; only times are collected as they come. No label has
a value that a peer can choose: models and sessions are not labels, and codes are those of our own errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import trio
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .. import errors
from ..broker import Broker
from ..models import ChannelEvent, Event, InferSettled, SlotReleased, WakeSettled

__all__ = ["Metrics"]

_BUCKETS_S: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
_CODES: Final = frozenset(
    {"completed"} | {getattr(errors, name).code for name in errors.__all__ if isinstance(getattr(errors, name), type)}
)
_RELEASES: Final = ("confirmed", "reported", "lost", "expired")
_REASONS: Final = frozenset({"disconnected", "superseded", "stale", "goodbye", "evicted", "shutdown"})


class Metrics:
    """One broker's. It observes the broker from here on.

    Args:
        broker: whose.
    """

    def __init__(self, broker: Broker) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Standing(broker))
        # Prometheus' own names for what every process has; Linux only, elsewhere they are not there.
        ProcessCollector(registry=self._registry)
        self._outcomes = Counter(
            "wakecall_infer_outcomes", "Infers by outcome and code.", ("outcome", "code"), registry=self._registry
        )
        self._seconds = Histogram(
            "wakecall_infer_seconds",
            "From an infer's acceptance to its outcome.",
            ("outcome",),
            buckets=_BUCKETS_S,
            registry=self._registry,
        )
        self._first_byte = Histogram(
            "wakecall_infer_first_byte_seconds",
            "From an infer's acceptance to the first byte of its answer.",
            buckets=_BUCKETS_S,
            registry=self._registry,
        )
        self._attempts = Counter(
            "wakecall_infer_attempts",
            "How often infers that have ended were sent to a publisher.",
            registry=self._registry,
        )
        self._moves = Counter(
            "wakecall_infer_moves",
            "How often they went on to another publisher.",
            registry=self._registry,
        )
        self._cancels = Histogram(
            "wakecall_cancel_seconds",
            "From the end of an infer that its publisher had not ended to the release of its slot.",
            ("how",),
            buckets=_BUCKETS_S,
            registry=self._registry,
        )
        self._unwanted = Counter(
            "wakecall_unwanted_seconds",
            "For how long engines may have generated for nobody.",
            registry=self._registry,
        )
        self._tokens = Counter(
            "wakecall_tokens", "Tokens, as far as answers say how many.", ("direction",), registry=self._registry
        )
        self._wakes = Histogram(
            "wakecall_wake_seconds",
            "From a wake's frame to its outcome.",
            ("outcome",),
            buckets=_BUCKETS_S,
            registry=self._registry,
        )
        self._channels = Counter(
            "wakecall_channels_ended", "Channels by why they ended.", ("reason",), registry=self._registry
        )
        # The broker has just begun, so what there is of it has not been missed; series exist before anything happened.
        for outcome in ("completed", "failed", "cancelled"):
            self._seconds.labels(outcome)
        self._series: dict[tuple[str, str], tuple[Counter, Histogram]] = {}  # as many as outcomes and codes allow
        self._tokens_in, self._tokens_out = self._tokens.labels("in"), self._tokens.labels("out")
        for outcome in ("succeeded", "failed", "timed_out", "lost"):
            self._wakes.labels(outcome)
        for how in _RELEASES:
            self._cancels.labels(how)
        broker.add_observer(self._observe)

    def render(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)

    def _observe(self, event: Event) -> None:
        if isinstance(event, InferSettled):
            code = event.code if event.code in _CODES else "other"
            ended = event.outcome, code
            if (series := self._series.get(ended)) is None:
                # To look these up by their labels costs as much as to count in them.
                series = self._series[ended] = self._outcomes.labels(*ended), self._seconds.labels(event.outcome)
            outcomes, seconds = series
            outcomes.inc()
            seconds.observe(event.seconds)
            if event.first_byte_s is not None:
                self._first_byte.observe(event.first_byte_s)
            self._attempts.inc(event.attempts)
            if event.attempts > 1:
                self._moves.inc(event.attempts - 1)
            if event.tokens_in:
                self._tokens_in.inc(event.tokens_in)
            if event.tokens_out:
                self._tokens_out.inc(event.tokens_out)
        elif isinstance(event, SlotReleased):
            self._cancels.labels(event.how).observe(event.seconds)
            self._unwanted.inc(max(event.seconds, 0.0))
        elif isinstance(event, WakeSettled):
            self._wakes.labels(event.outcome).observe(event.seconds)
        elif isinstance(event, ChannelEvent) and event.event == "ended":
            self._channels.labels(event.reason if event.reason in _REASONS else "other").inc()


class _Standing(Collector):
    """The broker's own statistics, read when they are asked for."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    def collect(self) -> Iterator[Metric]:
        now = self._broker.statistics()
        yield CounterMetricFamily("wakecall_infers_accepted", "Infers taken on.", value=now.accepted)
        ended = CounterMetricFamily("wakecall_infers_ended", "Infers by outcome.", labels=("outcome",))
        ended.add_metric(("completed",), now.completed)
        ended.add_metric(("failed",), now.failed)
        ended.add_metric(("cancelled",), now.cancelled)
        yield ended
        yield GaugeMetricFamily("wakecall_infers_waiting", "Infers waiting for a wake or a slot.", value=now.waiting)
        yield GaugeMetricFamily("wakecall_infers_in_flight", "Infers sent to a publisher.", value=now.in_flight)
        yield GaugeMetricFamily(
            "wakecall_slots_stopping",
            "Slots of infers that are over, until their engines have stopped.",
            value=now.stopping,
        )
        wakes = CounterMetricFamily("wakecall_wakes", "Wakes by how far they came.", labels=("state",))
        wakes.add_metric(("started",), now.wakes_started)
        wakes.add_metric(("succeeded",), now.wakes_succeeded)
        wakes.add_metric(("failed",), now.wakes_failed)
        yield wakes
        yield GaugeMetricFamily("wakecall_wakes_in_flight", "Wakes under way.", value=now.wakes_in_flight)
        yield GaugeMetricFamily("wakecall_sessions", "Registered publishers.", value=now.sessions)
        yield GaugeMetricFamily("wakecall_channels", "Open control channels.", value=now.channels)
        llms = GaugeMetricFamily("wakecall_llms", "Publishers' models by status.", labels=("status",))
        for status, count in now.llms.items():
            llms.add_metric((status.value,), count)
        yield llms
        yield GaugeMetricFamily("wakecall_public_llms", "Operators' own models.", value=now.public_llms)
        trio_tasks = trio.lowlevel.current_statistics().tasks_living
        yield GaugeMetricFamily("wakecall_trio_tasks", "Tasks of the Trio run that the broker is in.", value=trio_tasks)
