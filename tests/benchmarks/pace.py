"""Streams at the pace of real engines: what is delivered, and how late."""

from __future__ import annotations

import sys
from typing import Any

from . import tool
from .report import Bar, Figure
from .servers import Server, server, server_core
from .sizes import chat, post

__all__ = ["GROUP", "compare", "measure", "paced_floor", "paced_ours"]

GROUP = "pace"

#: Chunks a second of each stream.
RATE = 40.0
TRIM = (2.0, 1.0)


def measure(seconds: float) -> list[Figure]:
    core = server_core()
    with server("floor-guarded", core) as floor, server("wakecall", core) as ours:
        return [
            *compare(floor, ours, 200, seconds, median=Bar("≤", 0.25), p99=Bar("≤", 1.5), delivered=Bar("≥", 0.98)),
            *compare(floor, ours, 50, seconds, p99=Bar("≤", 0.2)),
        ]


def compare(
    floor: Server,
    ours: Server,
    streams: int,
    seconds: float,
    trim: tuple[float, float] = TRIM,
    *,
    median: Bar | None = None,
    p99: Bar | None = None,
    delivered: Bar | None = None,
) -> list[Figure]:
    """So many streams at once on each server, one after the other, for at least about so many seconds that count."""
    theirs, mine = paced_floor(floor, streams, seconds, trim), paced_ours(ours, streams, seconds, trim)
    name, offered = f"{streams} streams at {RATE:g} chunks/s", streams * RATE
    for who, found in (("the floor's", theirs), ("our", mine)):
        if found["is_short"]:
            print(f"{name}: {who} streams were never all there at once; measured is all of it", file=sys.stderr)
    rates = mine["delivered_per_s"], theirs["delivered_per_s"]
    figures = [Figure(f"{name}, share of the offered", "chunks/s", *rates, rates[0] / offered, delivered)]
    for what, shown, bar in (
        ("delay_median_ms", "median delay over the floor's, in intervals", median),
        ("delay_p99_ms", "99th percentile over the floor's, in intervals", p99),
        # A floor that is behind writes late: this counts that too.
        ("due_p99_ms", "99th percentile from when it was due, in intervals", None),
    ):
        over = (mine[what] - theirs[what]) * RATE / 1000
        figures.append(Figure(f"{name}, {shown}", "ms", mine[what], theirs[what], over, bar))
    return figures


def paced_floor(floor: Server, streams: int, seconds: float, trim: tuple[float, float] = TRIM) -> dict[str, Any]:
    """What the floor does; see `load.c`."""
    request = post(f"/paced?rate={RATE:g}&events={_events(streams, seconds, trim)}", chat(stream=True))
    return tool.paced(floor.port, request, streams, limit_s=_limit_s(seconds), trim=trim)


def paced_ours(ours: Server, streams: int, seconds: float, trim: tuple[float, float] = TRIM) -> dict[str, Any]:
    """What the broker does; see `load.c`."""
    request = post("/v1/chat/completions", chat(stream=True), ours.client)
    events = _events(streams, seconds, trim)
    publisher = tool.Publisher(server=ours, pace=RATE, events=events, kept=streams)
    return tool.paced(ours.port, request, streams, publisher, limit_s=_limit_s(seconds), trim=trim)


def _events(streams: int, seconds: float, trim: tuple[float, float]) -> int:
    """Enough that the streams, which cannot all begin at once, have so many seconds in common."""
    return round(RATE * (sum(trim) + seconds + 0.3 + streams / 50))


def _limit_s(seconds: float) -> float:
    return seconds + 30
