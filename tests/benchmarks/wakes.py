"""Ten thousand callers wait for one model's wake: what each of them holds, and how long until the last has his answer."""

from __future__ import annotations

import time

from . import tool
from .death import floor_ms
from .plainly import call, register
from .report import Bar, Figure
from .servers import Server, server, server_core
from .sizes import ANSWER, chat, post

__all__ = ["GROUP", "measure", "wake"]

GROUP = "wakes"

_CALLERS = 10_000
_LIMIT_S = 120


def measure(seconds: float) -> list[Figure]:
    """One round. It takes what it takes, however many `seconds` others have."""
    core = server_core()
    figures = []
    with server("floor-guarded", core) as floor:
        floors = [floor_ms(floor, _CALLERS)]
        with server("wakecall-wide", core) as ours:
            is_shared = tool.offers_shared(ours)
        for path in ("one result POST each", "agent's path") if is_shared else ("one result POST each",):
            with server("wakecall-wide", core) as ours:
                ms, kib = wake(ours, _CALLERS, is_shared=path == "agent's path")
            floors.append(floor_ms(floor, _CALLERS))
            floor_took = (floors[-1] + floors[-2]) / 2
            is_agents = path == "agent's path" or not is_shared
            name = f"{_CALLERS:,} callers of one wake, its result to the last answer, {path}"
            figures.append(Figure(name, "ms", ms, floor_took, ms / floor_took, Bar("≤", 2) if is_agents else None))
            if is_agents:
                figures.append(
                    Figure(
                        f"{_CALLERS:,} callers of one wake, each while it waits", "KiB", kib, None, kib, Bar("≤", 40)
                    )
                )
    return figures


def wake(ours: Server, callers: int, *, is_shared: bool) -> tuple[float, float]:
    """Ms from the wake's result to the last answer, and KiB for each caller while all wait.

    Raises:
        RuntimeError: there was another number of wakes than one, or somebody was not answered.
    """
    with tool.publishing(tool.Publisher(server=ours, is_shared=is_shared), _LIMIT_S) as said:
        # Once awake and once asked, so that what is made once is made.
        status, answer = call(ours, "POST", "/v1/chat/completions", chat(), ours.client)
        if status != 200:
            raise RuntimeError(f"an infer was answered {status}: {answer[:200]!r}")
        register(ours, "bench", status="hibernating", wake_s=_LIMIT_S)
        without = ours.memory_kib()
        with tool.crowd(ours.port, post("/v1/chat/completions", chat(), ours.client), callers, _LIMIT_S) as crowd:
            crowd.ask()
            task = said.get(timeout=_LIMIT_S)["wake"]
            _wait_until_all_wait(ours, callers)
            kib = (ours.memory_kib() - without) / callers
            woken = time.monotonic_ns()
            status, answer = call(ours, "POST", f"/publisher/v1/tasks/{task}/result", b"")
            if status != 200:
                raise RuntimeError(f"the wake's result was answered {status}: {answer[:200]!r}")
            found = crowd.wait()
    if not said.empty():
        raise RuntimeError("there was more than one wake")
    if found["statuses"] != {"200": callers} or found["bytes"] < callers * len(ANSWER):
        raise RuntimeError(f"not all were answered: {found['statuses']}, {found['bytes']} bytes")
    return (found["last"] - woken) / 1e6, kib


def _wait_until_all_wait(ours: Server, callers: int) -> None:
    until = time.monotonic() + _LIMIT_S
    while time.monotonic() < until:
        status, body = call(ours, "GET", "/metrics", key=ours.admin)
        if status != 200:
            raise RuntimeError(f"/metrics was answered {status}")
        if b"\nwakecall_infers_waiting %.1f\n" % callers in body:
            return
        time.sleep(0.2)  # a process that can only be asked
    raise RuntimeError("not all of them came to wait")
