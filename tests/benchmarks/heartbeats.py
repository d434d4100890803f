"""Heartbeats of 32 sessions, each committed before it is acknowledged."""

from __future__ import annotations

import http.client
import json

from . import tool
from .report import Bar, Figure
from .servers import Server, server, server_core
from .sizes import post
from .traffic import Side, compare, take_turns

__all__ = ["GROUP", "measure"]

GROUP = "heartbeats"

_SESSIONS = 32


def measure(seconds: float) -> list[Figure]:
    core = server_core()
    with server("floor-guarded", core) as guarded, server("floor-bare", core) as bare, server("wakecall", core) as ours:
        names = [f"beat-{number}" for number in range(_SESSIONS)]
        _register(ours, names)
        asked = [post(f"/publisher/v1/sessions/{name}/heartbeat", b"{}", ours.publisher) for name in names]

        def side(of: Server) -> Side:
            return Side(of, lambda part: tool.requests(of.port, asked, _SESSIONS, part))

        sides = {"guarded": side(guarded), "bare": side(bare), "ours": side(ours)}
        take_turns(sides, seconds)
        name = f"heartbeats, {_SESSIONS} sessions, committed"
        return compare(name, "requests/s", "answers", sides, "ours", Bar("≥", 0.8))


def _register(ours: Server, names: list[str]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", ours.port, timeout=10)
    headers = {"Authorization": f"Bearer {ours.publisher}", "Content-Type": "application/json"}
    try:
        for name in names:
            connection.request("PUT", f"/publisher/v1/sessions/{name}", json.dumps({"llms": [{"name": name}]}), headers)
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                raise RuntimeError(f"register was answered {answer.status}")
    finally:
        connection.close()
