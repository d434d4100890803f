"""A discrete-event simulation: publishers of different speed, and whoever decides which of them gets what, and when.

There is no clock but the heap of what happens next, and no chance but the seed: every policy meets the same arrivals with
the same work. A policy is told of each arrival and of each end, and starts jobs where slots are free; the machines hold it
to that. What it can know of a job is what a broker knows: nothing of its work before its end.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

FAILS_AFTER_S = 0.001


class Publisher(NamedTuple):
    """`speed`: work that each of its slots does in a second. From `fails_from` until `fails_until` it fails all that it
    gets, at once."""

    name: str
    speed: float
    slots: int = 1
    fails_from: float = float("inf")
    fails_until: float = float("inf")


@dataclass(eq=False, slots=True)
class Job:
    """One infer. `work`: seconds that it takes on a publisher of speed 1; `first_work`: until its first byte."""

    key: str | None
    arrived: float
    work: float
    first_work: float
    started: float | None = None
    ended: float | None = None
    publisher: int | None = None
    speed: float = 1.0
    failed: bool = False

    @property
    def wait(self) -> float:
        assert self.started is not None
        return self.started - self.arrived

    @property
    def service(self) -> float:
        return self.work / self.speed

    @property
    def first_byte(self) -> float:
        return self.first_work / self.speed

    @property
    def response(self) -> float:
        assert self.ended is not None
        return self.ended - self.arrived


class Policy(Protocol):
    """Who decides. `Machines.start` is how it says so."""

    def arrive(self, job: Job) -> None: ...

    def end(self, job: Job) -> None:
        """The job is over, and its slot is free."""


@dataclass
class Machines:
    """The publishers' slots, and the heap of what happens next."""

    publishers: Sequence[Publisher]
    now: float = 0.0
    free: list[int] = field(init=False)
    on_end: Callable[[Job], None] = field(init=False)
    _events: list[tuple[float, int, Callable[[], None]]] = field(init=False, default_factory=list)
    _order: itertools.count[int] = field(init=False, default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.free = [publisher.slots for publisher in self.publishers]

    def start(self, job: Job, index: int) -> None:
        """It begins on this publisher, now."""
        assert self.free[index] > 0, "no slot is free"
        assert job.started is None, "it has been started before"
        self.free[index] -= 1
        publisher = self.publishers[index]
        job.started, job.publisher, job.speed = self.now, index, publisher.speed
        job.failed = publisher.fails_from <= self.now < publisher.fails_until
        self.at(self.now + (FAILS_AFTER_S if job.failed else job.service), lambda: self._end(job, index))

    def at(self, instant: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (instant, next(self._order), happen))

    def run(self, policy: Policy, jobs: Iterable[Job]) -> None:
        """Until all of them are over, or nothing happens any more."""
        self.on_end = policy.end
        for job in jobs:
            self._run_until(job.arrived)
            self.now = job.arrived
            policy.arrive(job)
        self._run_until(float("inf"))

    def _run_until(self, instant: float) -> None:
        while self._events and self._events[0][0] <= instant:
            self.now, _, happen = heapq.heappop(self._events)
            happen()

    def _end(self, job: Job, index: int) -> None:
        job.ended = self.now
        self.free[index] += 1
        self.on_end(job)


def simulate(policy: Callable[[Machines], Policy], publishers: Sequence[Publisher], jobs: Sequence[Job]) -> list[Job]:
    """Have a policy see to jobs of its own, which come and weigh as these do. All of them are over in the end."""
    machines = Machines(publishers)
    own = [Job(job.key, job.arrived, job.work, job.first_work) for job in jobs]
    machines.run(policy(machines), own)
    assert all(job.ended is not None for job in own), "one was forgotten"
    return own


def poisson(
    publishers: Sequence[Publisher],
    count: int,
    *,
    seed: int,
    load: float,
    service: Literal["exponential", "lognormal"],
    mean_work: float,
) -> list[Job]:
    """So many jobs, whose arrivals keep the publishers busy for `load` of the time.

    A lognormal service is like an answer's length: most are short, one in twenty is three times the mean and more.
    """
    random_ = random.Random(seed)
    capacity = sum(publisher.speed * publisher.slots for publisher in publishers)
    rate = load * capacity / mean_work
    now = 0.0
    jobs = []
    for _ in range(count):
        now += random_.expovariate(rate)
        if service == "exponential":
            work = random_.expovariate(1 / mean_work)
        else:
            # Of sigma 1 the mean is exp(1/2).
            work = mean_work * random_.lognormvariate(-0.5, 1.0)
        # A prompt is as long as it is, whatever becomes of the answer.
        first_work = 0.1 * mean_work * random_.lognormvariate(-0.5, 1.0)
        jobs.append(Job(None, now, work, min(first_work, work)))
    return jobs
