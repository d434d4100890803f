"""What is measured of a broker, and what of it is a leak.

Two questions. *At rest*, with everybody gone: is it back where it was? Descriptors, Trio tasks, sessions, channels and what
is under way are whole numbers, and have to be those of a broker that has just started. Python's memory blocks, after a
collection, are compared with those at rest after a warm-up: they may grow by what fills up once and for all (`BLOCKS`) and
by a fraction of a block an infer (`BLOCKS_PER_INFER`), for whatever is kept of each infer is one block at least.

*Under load*: has memory flattened? A straight line through the resident memory of the second half may rise by `GROWTH_BYTES`
in all. Resident memory swings by what is held at a moment (bodies of up to 2 MiB, several at a time, and what the
allocator keeps of them), so a rise below that is no news; a leak goes on, and passes it in time. What does not pass it in
thirty seconds, the blocks show.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
#: The most that resident memory may rise by over the second half of the traffic.
GROWTH_BYTES = 8 * MIB
#: The same where that half is shorter than a minute: a swing, of bodies that are held at the moment, fills it then.
SHORT_S, SHORT_GROWTH_BYTES = 60.0, 24 * MIB
#: The most blocks that may be more at rest, whatever was done: 500 to 1,000 were seen, after 90,000 infers too.
BLOCKS = 1500
#: And for each infer.
BLOCKS_PER_INFER = 0.05

#: Of `/metrics`, what has to be the same at rest before and after; what is under way is nothing.
GAUGES = (
    "process_open_fds",
    "wakecall_trio_tasks",
    "wakecall_sessions",
    "wakecall_channels",
    "wakecall_infers_in_flight",
    "wakecall_infers_waiting",
    "wakecall_wakes_in_flight",
    "wakecall_llms{status=active}",
    "wakecall_llms{status=hibernating}",
    "wakecall_llms{status=inactive}",
)


@dataclass(frozen=True, slots=True)
class Sample:
    """Resident bytes at a moment (seconds)."""

    at: float
    resident: int


@dataclass(frozen=True, slots=True)
class Rest:
    """A broker at rest: what `/metrics` says, and its objects after a collection."""

    metrics: dict[str, float]
    blocks: int
    kinds: dict[str, int]
    resident: int

    def count(self, counter: str) -> int:
        """A counter, all its labels together."""
        return int(sum(value for name, value in self.metrics.items() if name.partition("{")[0] == counter))


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table."""

    what: str
    before: str
    after: str
    allowed: str
    is_good: bool


def rest(metrics: dict[str, float], census: Path, resident: int) -> Rest:
    """Put together from `/metrics`, the file of a census and the kernel's word."""
    counted = json.loads(census.read_text())
    return Rest(metrics, counted["blocks"], counted["kinds"], resident)


def rise(samples: Sequence[Sample]) -> float:
    """How much the second half rises by, in bytes: Theil and Sen's line, which a few high points do not move."""
    half = [each for each in samples if each.at >= (samples[0].at + samples[-1].at) / 2]
    slopes = [
        (late.resident - early.resident) / (late.at - early.at)
        for index, early in enumerate(half)
        for late in half[index + 1 :]
    ]
    return statistics.median(slopes) * (half[-1].at - half[0].at) if slopes else 0.0


def grown(before: Rest, after: Rest, count: int = 8) -> list[tuple[str, int]]:
    """The types of which there are more, those that grew most first."""
    more = [(kind, number - before.kinds.get(kind, 0)) for kind, number in after.kinds.items()]
    return sorted([each for each in more if each[1] > 0], key=lambda each: -each[1])[:count]


def findings(start: dict[str, float], before: Rest, after: Rest, samples: Sequence[Sample]) -> list[Finding]:
    """Everything that is looked at, good or not.

    Args:
        start: `/metrics` of the broker when it had just started.
        before, after: at rest before the traffic, but warm, and after it.
        samples: taken during the traffic.
    """
    found = []
    for name in GAUGES:
        was, now = start[name], after.metrics[name]
        found.append(Finding(name, f"{was:g}", f"{now:g}", f"{was:g}", now == was))
    accepted, ended = after.count("wakecall_infers_accepted_total"), after.count("wakecall_infers_ended_total")
    found.append(Finding("infers ended", "", f"{ended:,}", f"{accepted:,}", ended == accepted))
    infers = accepted - before.count("wakecall_infers_accepted_total")
    allowed = before.blocks + BLOCKS + int(BLOCKS_PER_INFER * infers)
    found.append(
        Finding("memory blocks", f"{before.blocks:,}", f"{after.blocks:,}", f"{allowed:,}", after.blocks <= allowed)
    )
    risen = rise(samples)
    is_short = samples[-1].at - samples[0].at < 2 * SHORT_S
    most = SHORT_GROWTH_BYTES if is_short else GROWTH_BYTES
    found.append(
        Finding("resident, second half", "", f"{risen / MIB:+.1f} MiB", f"{most / MIB:+.1f} MiB", risen <= most)
    )
    return found


def table(found: Sequence[Finding]) -> str:
    """For people."""
    rows = [("", "at the start", "at the end", "allowed", "")]
    rows += [(each.what, each.before, each.after, each.allowed, "" if each.is_good else "LEFT OVER") for each in found]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}  {row[4]}".rstrip()
        for row in rows
    )
