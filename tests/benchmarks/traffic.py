"""Plain infers of many callers and of one, and streams as fast as they go."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import tool
from .report import Bar, Figure
from .servers import Server, server, server_core
from .sizes import chat, post

__all__ = ["GROUP", "Side", "compare", "measure"]

GROUP = "traffic"

_CALLERS = 32
_STREAMS = 64
#: Floor and ours take turns so often within a round: a neighbour's minute of work then falls on both.
_TURNS = 3

Load = Callable[[float], dict[str, Any]]


@dataclass(slots=True)
class Side:
    """What one server did in its turns.

    Args:
        server: whose processor time is read.
        load: one turn of so many seconds.
    """

    server: Server
    load: Load
    found: list[dict[str, Any]] = field(default_factory=list)
    cpu_s: float = 0.0

    def take_turn(self, seconds: float) -> None:
        before = self.server.cpu_s()
        self.found.append(self.load(seconds))
        self.cpu_s += self.server.cpu_s() - before

    def rate(self, what: str) -> float:
        """`answers` or `events` a second."""
        counted = sum(each[what] for each in self.found)
        if counted:
            return float(counted / sum(each["seconds"] for each in self.found))
        # Too short a run for anything to be counted: what it did to its end.
        return float(sum(each[f"all_{what}"] for each in self.found) / sum(each["all_s"] for each in self.found))

    def per_cpu_s(self, what: str) -> float:
        """The same for each second of the server's processor time, which neighbours cannot take away."""
        return float(sum(each[f"all_{what}"] for each in self.found) / max(self.cpu_s, 0.01))

    def median_ms(self) -> float:
        return statistics.median(each["latency_median_ms"] for each in self.found)


def compare(name: str, unit: str, what: str, sides: dict[str, Side], ours: str, bar: Bar | None) -> list[Figure]:
    """The ratio of rates to the guarded floor's, which has the bar; beside it to the bare one's, and by processor time."""
    mine, guarded, bare = sides[ours], sides["guarded"], sides["bare"]
    figures = [Figure(name, unit, mine.rate(what), guarded.rate(what), mine.rate(what) / guarded.rate(what), bar)]
    figures.append(
        Figure(
            f"{name}, to a floor without the guard",
            unit,
            mine.rate(what),
            bare.rate(what),
            mine.rate(what) / bare.rate(what),
        )
    )
    cpu = mine.per_cpu_s(what), guarded.per_cpu_s(what)
    figures.append(Figure(f"{name}, by processor time", f"{what}/CPU s", *cpu, cpu[0] / cpu[1]))
    return figures


def take_turns(sides: dict[str, Side], seconds: float) -> None:
    for _ in range(_TURNS):
        for side in sides.values():
            side.take_turn(seconds / _TURNS)


def measure(seconds: float) -> list[Figure]:
    core = server_core()
    with server("floor-guarded", core) as guarded, server("floor-bare", core) as bare, server("wakecall", core) as ours:
        is_shared = tool.offers_shared(ours)
        return [
            *_plain(guarded, bare, ours, seconds, is_shared=is_shared),
            *_one_caller(guarded, bare, ours, seconds, is_shared=is_shared),
            *_streams(guarded, bare, ours, seconds),
        ]


def plain_sides(guarded: Server, bare: Server, ours: Server, callers: int, *, is_shared: bool) -> dict[str, Side]:
    """Plain infers on every server: the same bytes to each."""
    request = [post("/v1/chat/completions", chat(), ours.client)]

    def load(port: int, publisher: tool.Publisher | None = None) -> Load:
        return lambda seconds: tool.requests(port, request, callers, seconds, publisher)

    sides = {
        "guarded": Side(guarded, load(guarded.port)),
        "bare": Side(bare, load(bare.port)),
        "by post": Side(ours, load(ours.port, tool.Publisher(server=ours))),
    }
    if is_shared:
        sides["agent"] = Side(ours, load(ours.port, tool.Publisher(server=ours, is_shared=True)))
    return sides


def _plain(guarded: Server, bare: Server, ours: Server, seconds: float, *, is_shared: bool) -> list[Figure]:
    sides = plain_sides(guarded, bare, ours, _CALLERS, is_shared=is_shared)
    take_turns(sides, seconds)
    name, unit = f"plain infers, {_CALLERS} callers", "requests/s"
    agents = "agent" if is_shared else "by post"
    return [
        *compare(f"{name}, agent's path", unit, "answers", sides, agents, Bar("≥", 0.42)),
        *compare(f"{name}, one result POST each", unit, "answers", sides, "by post", Bar("≥", 0.33)),
    ]


def _one_caller(guarded: Server, bare: Server, ours: Server, seconds: float, *, is_shared: bool) -> list[Figure]:
    sides = plain_sides(guarded, bare, ours, 1, is_shared=is_shared)
    take_turns(sides, seconds)
    floor_ms, bare_ms = sides["guarded"].median_ms(), sides["bare"].median_ms()
    figures = []
    for path, side in (("agent's path", "agent" if is_shared else "by post"), ("one result POST each", "by post")):
        ms = sides[side].median_ms()
        bar = Bar("≤", 3.3) if path == "agent's path" else None
        name = f"plain infers, one caller's median, {path}"
        figures.append(Figure(name, "ms", ms, floor_ms, ms / floor_ms, bar))
        figures.append(Figure(f"{name}, to a floor without the guard", "ms", ms, bare_ms, ms / bare_ms))
    return figures


def _streams(guarded: Server, bare: Server, ours: Server, seconds: float) -> list[Figure]:
    body = chat(stream=True)

    def load(port: int, path: str, publisher: tool.Publisher | None = None) -> Load:
        return lambda part: tool.streams(port, post(path, body, ours.client), _STREAMS, part, publisher)

    sides = {
        "guarded": Side(guarded, load(guarded.port, "/stream")),
        "bare": Side(bare, load(bare.port, "/stream")),
        "ours": Side(ours, load(ours.port, "/v1/chat/completions", tool.Publisher(server=ours))),
    }
    take_turns(sides, seconds)
    return compare(f"streams, {_STREAMS} as fast as they go", "chunks/s", "events", sides, "ours", Bar("≥", 0.6))
