"""A publisher dies with a thousand infers at work: how long until the last of their callers knows it."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

from . import tool
from .plainly import Channel, register
from .report import Bar, Figure
from .servers import Server, server, server_core
from .sizes import chat, post

__all__ = ["GROUP", "death_ms", "floor_ms", "measure"]

GROUP = "death"

_CALLERS = 1000
_TURNS = 3


def measure(seconds: float) -> list[Figure]:
    """One round. It takes what it takes, however many `seconds` others have."""
    core = server_core()
    with server("floor-guarded", core) as floor, server("wakecall", core) as ours:
        register(ours, "bench")
        floors, mine = [], []
        for _ in range(_TURNS):
            floors.append(floor_ms(floor, _CALLERS))
            mine.append(death_ms(ours, _CALLERS))
    ms, floor_took = sum(mine) / _TURNS, sum(floors) / _TURNS
    name = f"a publisher's death with {_CALLERS:,} infers, FIN to the last answer"
    return [Figure(name, "ms", ms, floor_took, ms / floor_took, Bar("≤", 1.5))]


def floor_ms(floor: Server, callers: int) -> float:
    """How long the floor takes for so many requests at once, on connections that are open."""
    with tool.crowd(floor.port, post("/v1/chat/completions", chat()), callers) as crowd:
        sent = crowd.ask()
        return _took_ms(crowd.wait(), sent, callers, "200")


def death_ms(ours: Server, callers: int) -> float:
    """From the publisher's FIN to the last answer."""
    with closing(Channel(ours, "bench")) as channel:
        with tool.crowd(ours.port, post("/v1/chat/completions", chat(), ours.client), callers) as crowd:
            crowd.ask()
            channel.read_events("infer", callers)
            died = time.monotonic_ns()
            channel.close()
            return _took_ms(crowd.wait(), died, callers, "503")


def _took_ms(found: dict[str, Any], since: int, callers: int, status: str) -> float:
    if found["statuses"] != {status: callers}:
        raise RuntimeError(f"not all were answered {status}: {found['statuses']}")
    return float(found["last"] - since) / 1e6
