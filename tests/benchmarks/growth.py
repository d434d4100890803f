"""How cost grows, as two plots: infers a second over callers, and a chunk's delay over streams; the floor beside ours."""

from __future__ import annotations

from pathlib import Path

from . import pace, svg, tool
from .servers import server, server_core
from .traffic import plain_sides

__all__ = ["CALLERS", "STREAMS", "callers", "draw", "streams"]

CALLERS = (1, 2, 4, 8, 16, 32, 64)
STREAMS = (10, 25, 50, 100, 150, 200)


def draw(folder: Path, seconds: float) -> None:
    """Measure both, and write `infers-over-callers.svg` and `delay-over-streams.svg`."""
    folder.mkdir(parents=True, exist_ok=True)
    plot = svg.line_plot("Plain infers over callers", "callers", "requests/s", callers(seconds), is_log_x=True)
    (folder / "infers-over-callers.svg").write_text(plot)
    title = f"Delay of a chunk over streams at {pace.RATE:g} chunks/s"
    plot = svg.line_plot(title, "streams at once", "99th percentile, ms", streams(seconds), is_log_y=True)
    (folder / "delay-over-streams.svg").write_text(plot)


def callers(seconds: float, counts: tuple[int, ...] = CALLERS) -> dict[str, list[tuple[float, float]]]:
    """Points of each line: callers, answers a second."""
    core = server_core()
    lines: dict[str, list[tuple[float, float]]] = {}
    names = {"guarded": "floor", "agent": "Wakecall, agent's path", "by post": "Wakecall, one result POST each"}
    with server("floor-guarded", core) as guarded, server("floor-bare", core) as bare, server("wakecall", core) as ours:
        is_shared = tool.offers_shared(ours)
        for count in counts:
            sides = plain_sides(guarded, bare, ours, count, is_shared=is_shared)
            del sides["bare"]
            for name, side in sides.items():
                side.take_turn(seconds)
                lines.setdefault(names[name], []).append((count, side.rate("answers")))
    return lines


def streams(seconds: float, counts: tuple[int, ...] = STREAMS) -> dict[str, list[tuple[float, float]]]:
    """Points of each line: streams, their chunks' 99th percentile of delay in milliseconds."""
    core = server_core()
    lines: dict[str, list[tuple[float, float]]] = {"floor": [], "Wakecall": []}
    with server("floor-guarded", core) as floor, server("wakecall", core) as ours:
        for count in counts:
            lines["floor"].append((count, pace.paced_floor(floor, count, seconds)["delay_p99_ms"]))
            lines["Wakecall"].append((count, pace.paced_ours(ours, count, seconds)["delay_p99_ms"]))
    return lines
