"""The comparison: every policy on the same arrivals, and its waits as one line of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple

from .policies import POLICIES
from .world import Job, Publisher, poisson, simulate

Fleet = Literal["one slot each", "one to four slots each"]
Service = Literal["exponential", "lognormal"]

ARRIVALS = 20_000
LOAD = 0.8
SEED = 2026
#: Seconds that a mean answer takes on the slowest publisher.
MEAN_WORK = 8.0

FLEETS: dict[Fleet, tuple[Publisher, ...]] = {
    "one slot each": tuple(Publisher(f"publisher{speed}", speed) for speed in range(1, 9)),
    "one to four slots each": tuple(
        Publisher(f"publisher{speed}", speed, slots)
        for speed, slots in zip(range(1, 9), (4, 3, 2, 1, 4, 3, 2, 1), strict=True)
    ),
}
SERVICES: tuple[Service, ...] = ("exponential", "lognormal")

HEAD = (
    "| slots | service | policy | mean wait | p50 wait | p99 wait | p99, ideal = 1 | mean response |",
    "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
)


class Waits(NamedTuple):
    """Seconds."""

    mean: float
    p50: float
    p99: float
    response: float


def quantile(values: Sequence[float], part: float) -> float:
    """The least value that so great a part of them does not exceed."""
    return sorted(values)[math.ceil(part * len(values)) - 1]


def waits_of(jobs: Sequence[Job]) -> Waits:
    waits = [job.wait for job in jobs]
    mean = math.fsum(waits) / len(jobs)
    response = math.fsum(job.response for job in jobs) / len(jobs)
    return Waits(mean, quantile(waits, 0.5), quantile(waits, 0.99), response)


@cache
def compare(fleet: Fleet, service: Service) -> dict[str, Waits]:
    """What each policy makes of the same jobs, by its name."""
    publishers = FLEETS[fleet]
    jobs = poisson(publishers, ARRIVALS, seed=SEED, load=LOAD, service=service, mean_work=MEAN_WORK)
    return {name: waits_of(simulate(policy, publishers, jobs)) for name, policy in POLICIES.items()}


def table(fleet: Fleet, service: Service) -> list[str]:
    """Its lines, in Markdown, without the head."""
    compared = compare(fleet, service)
    ideal = compared["ideal single queue"].p99
    return [
        f"| {fleet} | {service} | {name} | {_seconds(waits.mean)} | {_seconds(waits.p50)} | {_seconds(waits.p99)}"
        f" | {waits.p99 / ideal:.{0 if waits.p99 > 100 * ideal else 2}f} | {_seconds(waits.response)} |"
        for name, waits in compared.items()
    ]


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 100 else f"{value:.2f} s"
