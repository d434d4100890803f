"""Four ways to share work out: the ideal, two that are common, and Wakecall's own rules.

Wakecall's are driven through its pure modules. What stands here is only what the dispatcher does between them: ask at an
arrival, and let whoever waits go when a slot is free.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from wakecall.fairness import FairLine, Lane
from wakecall.health import Health
from wakecall.models import Status
from wakecall.placement import LineLoad, Placement, RowLoad, choose

from .world import Job, Machines, Policy


class SingleQueue:
    """One queue over all slots, first come first served, the fastest free slot first. It is told how fast each is."""

    def __init__(self, machines: Machines) -> None:
        self._machines = machines
        self._waiting: deque[Job] = deque()
        self._fastest_first = sorted(
            range(len(machines.publishers)), key=lambda index: -machines.publishers[index].speed
        )

    def arrive(self, job: Job) -> None:
        for index in self._fastest_first:
            if self._machines.free[index]:
                self._machines.start(job, index)
                return
        self._waiting.append(job)

    def end(self, job: Job) -> None:
        assert job.publisher is not None
        if self._waiting:
            self._machines.start(self._waiting.popleft(), job.publisher)


class _OwnQueues:
    """A job is bound to a publisher when it arrives, and waits there."""

    def __init__(self, machines: Machines) -> None:
        self._machines = machines
        self._waiting: list[deque[Job]] = [deque() for _ in machines.publishers]
        self._arrived = 0

    def arrive(self, job: Job) -> None:
        index = self._choose()
        self._arrived += 1
        if self._machines.free[index]:
            self._machines.start(job, index)
        else:
            self._waiting[index].append(job)

    def end(self, job: Job) -> None:
        assert job.publisher is not None
        if self._waiting[job.publisher]:
            self._machines.start(self._waiting[job.publisher].popleft(), job.publisher)

    def _choose(self) -> int:
        raise NotImplementedError


class RoundRobin(_OwnQueues):
    """To each in turn."""

    def _choose(self) -> int:
        return self._arrived % len(self._waiting)


class LeastConnections(_OwnQueues):
    """To the one with the fewest that wait and are at work, relative to its slots; among equals in turn."""

    def _choose(self) -> int:
        machines, count = self._machines, len(self._waiting)

        def connections(index: int) -> tuple[float, int]:
            slots = machines.publishers[index].slots
            open_ = slots - machines.free[index] + len(self._waiting[index])
            return open_ / slots, (index - self._arrived) % count

        return min(range(count), key=connections)


class Wakecall:
    """`placement.choose` at an arrival, `fairness.FairLine` while one waits, `health.Health` for what has been measured."""

    def __init__(self, machines: Machines) -> None:
        self._machines = machines
        self._line: FairLine[Job] = FairLine()
        self._health = [Health() for _ in machines.publishers]
        self._last_sent = [float("-inf")] * len(machines.publishers)
        self._names = {publisher.name: index for index, publisher in enumerate(machines.publishers)}
        self._sent = 0
        self._probe_at = math.inf

    def arrive(self, job: Job) -> None:
        line = self._line
        before = max(line.ahead_of_next(job.key, "interactive"), 1) if line else 0
        load = LineLoad(before=before, waiting=len(line), room=10_000)
        decision = choose([self._load_of(index) for index in range(len(self._health))], load)
        if decision.row is not None:
            line.note_unwaited(job.key, "interactive")
            self._send(job, self._names[decision.row])
        else:
            assert decision.placement is Placement.QUEUE
            line.add(job, key=job.key, lane=Lane.ANY, priority="interactive")
            self._probe_avoided()

    def end(self, job: Job) -> None:
        assert job.publisher is not None
        health, now = self._health[job.publisher], self._machines.now
        if job.failed:
            health.note_failure(now, self._sent)
        else:
            held_s = job.service
            health.note_first_byte(job.first_byte)
            if health.service_s:
                self._line.charge(job.key, "interactive", held_s / health.service_s - 1.0)
            health.note_success(now, held_s)
        self._pump(job.publisher)

    def _load_of(self, index: int) -> RowLoad:
        publisher, health, now = self._machines.publishers[index], self._health[index], self._machines.now
        return RowLoad(
            publisher.name,
            Status.ACTIVE,
            taken=self._taken(index),
            max_concurrency=publisher.slots,
            avoided=health.is_avoided(now, self._sent),
            on_trial=health.is_on_trial(now),
            first_byte_s=health.first_byte_s,
            service_s=health.service_s,
            last_sent_at=self._last_sent[index],
        )

    def _send(self, job: Job, index: int) -> None:
        self._last_sent[index] = self._machines.now
        self._sent += 1
        self._machines.start(job, index)

    def _pump(self, index: int) -> None:
        """The slots that a publisher has free, to those who wait: as `Infers.pump` has it."""
        machines, health, line = self._machines, self._health[index], self._line
        if not line:
            return
        now = machines.now
        alone = all(each.is_avoided(now, self._sent) or each.is_on_trial(now) for each in self._health)
        if not alone and health.is_avoided(now, self._sent):
            self._probe_avoided()
            return
        publisher = machines.publishers[index]
        while machines.free[index] and not (not alone and health.is_on_trial(now) and self._taken(index)):
            job = line.pop(publisher.name, _nothing_moved)
            if job is None:
                break
            self._send(job, index)

    def _taken(self, index: int) -> int:
        return self._machines.publishers[index].slots - self._machines.free[index]

    def _probe_avoided(self) -> None:
        """Look again when one that is avoided may be tried."""
        now = self._machines.now
        for health in self._health:
            if health.is_avoided(now, self._sent):
                at = max(health.avoided_until, now + 1.0)
                if at < self._probe_at:
                    self._probe_at = at
                    self._machines.at(at, self._probe)

    def _probe(self) -> None:
        if self._machines.now >= self._probe_at:
            self._probe_at = math.inf
            for index in range(len(self._health)):
                self._pump(index)


def _nothing_moved(job: Job) -> bool:
    raise AssertionError("nothing moves here")


POLICIES: dict[str, Callable[[Machines], Policy]] = {
    "ideal single queue": SingleQueue,
    "round robin": RoundRobin,
    "least connections": LeastConnections,
    "Wakecall": Wakecall,
}
