"""`python -m tests.benchmarks [--seconds S] [--rounds N]`: a table of ratios to the floor, median and spread."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import trio

from .load import Connection, connect, post, run_callers, run_publisher, with_key
from .server import EVENTS

CHAT = {"model": "bench", "messages": [{"role": "user", "content": "z" * 330}]}
PLAIN = post("/v1/chat/completions", json.dumps(CHAT).encode())
STREAM = post("/v1/chat/completions", json.dumps({**CHAT, "stream": True}).encode())
FLOOR_PLAIN = PLAIN
FLOOR_STREAM = STREAM.replace(b"/v1/chat/completions", b"/stream", 1)
HEARTBEAT = post("/publisher/v1/sessions/beat-%d/heartbeat", b"{}")


@contextmanager
def server(kind: str, core: int | None) -> Iterator[list[str]]:
    """A server in a process of its own, on a core of its own where there are two. Yields its port and keys."""
    command = [sys.executable, "-m", "tests.benchmarks.server", kind]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        if core is not None:
            os.sched_setaffinity(process.pid, {core})
        assert process.stdout is not None
        yield process.stdout.readline().split()
    finally:
        process.terminate()
        process.wait()


async def plain(port: int, request: bytes, callers: int, seconds: float) -> float:
    async def work(connection: Connection) -> None:
        await connection.ask(request)

    done, took = await run_callers(port, callers, seconds, work)
    return done / took


async def streams(port: int, request: bytes, seconds: float) -> float:
    async def work(connection: Connection) -> None:
        assert await connection.count_events(request) == EVENTS

    done, took = await run_callers(port, 64, seconds, work)
    return done * EVENTS / took


async def heartbeats(port: int, seconds: float) -> float:
    names = iter(range(32))
    spec = '{"llms": [{"name": "beat-%d"}]}'
    async with connect(port) as connection:
        for number in range(32):
            register = post(f"/publisher/v1/sessions/beat-{number}", (spec % number).encode())
            await connection.ask(register.replace(b"POST", b"PUT", 1))
    requests: dict[Connection, bytes] = {}

    async def work(connection: Connection) -> None:
        if connection not in requests:
            requests[connection] = HEARTBEAT.replace(b"%d", b"%d" % next(names), 1)
        await connection.ask(requests[connection])

    done, took = await run_callers(port, 32, seconds, work)
    return done / took


async def one_round(
    floor: int, broker: int, keyed: tuple[int, str, str], seconds: float
) -> dict[str, tuple[float, float]]:
    """Floor and broker in turn, so that both see the same machine."""
    found = {}
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(run_publisher, broker, 64))
        for callers in (32, 1):
            name = f"plain infers, {callers} callers, requests/s"
            found[name] = (
                await plain(floor, FLOOR_PLAIN, callers, seconds),
                await plain(broker, PLAIN, callers, seconds),
            )
        port, client, publisher = keyed
        await nursery.start(partial(run_publisher, port, 64, publisher))
        name = "plain infers, 32 callers, with keys and limits, requests/s"
        found[name] = (
            await plain(floor, FLOOR_PLAIN, 32, seconds),
            await plain(port, with_key(PLAIN, client), 32, seconds),
        )
        found["64 streams, events/s"] = (
            await streams(floor, FLOOR_STREAM, seconds),
            await streams(broker, STREAM, seconds),
        )
        found["heartbeats, 32 sessions, requests/s"] = (
            await plain(floor, FLOOR_PLAIN, 32, seconds),
            await heartbeats(broker, seconds),
        )
        nursery.cancel_scope.cancel()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("--seconds", type=float, default=3.0, help="of load for each figure")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    apart = len(cores) > 1
    with ExitStack() as stack:
        floor, broker, keyed = (
            stack.enter_context(server(kind, cores[0] if apart else None)) for kind in ("floor", "wakecall", "keyed")
        )
        ports = int(floor[0]), int(broker[0]), (int(keyed[0]), keyed[1], keyed[2])
        if apart:
            os.sched_setaffinity(0, set(cores[1:]))
        rounds = [trio.run(one_round, *ports, options.seconds) for _ in range(options.rounds)]
    print("| what | floor | Wakecall | ratio (median) | min | max |\n| --- | --- | --- | --- | --- | --- |")
    for name in rounds[0]:
        pairs = [each[name] for each in rounds]
        ratios = [ours / theirs for theirs, ours in pairs]
        middle = [statistics.median(side) for side in zip(*pairs, strict=True)]
        row = [name, f"{middle[0]:,.0f}", f"{middle[1]:,.0f}", f"{statistics.median(ratios):.2f}"]
        print("| " + " | ".join([*row, f"{min(ratios):.2f}", f"{max(ratios):.2f}"]) + " |")


if __name__ == "__main__":
    main()
