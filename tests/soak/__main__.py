"""`python -m tests.soak [MINUTES]`: traffic for so long, a table, and exit 1 if anything is left over.

    start                                →  what there is when nothing is
    a short warm-up, everybody leaves    →  at rest: is it the same? And: what Python holds
    MINUTES of traffic                   →  resident memory, once a second
    everybody leaves                     →  at rest: the same again

The broker is a real `wakecall serve` with a file of its own and times that let a session expire within seconds. Callers and
publishers live in this process, one `wakecall publish` in another.
"""

from __future__ import annotations

import argparse
import logging
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from tests.e2e.stack import BrokerProcess, open_broker_process
from tests.soak import measure, publishers
from tests.soak.clients import Callers

WARM_UP_S = 5.0
#: From the last request to a broker that is empty again: rows and then sessions are forgotten, slow peers given up.
REST_S = 45.0
CALLERS = 64
SETTINGS = {
    "heartbeat_timeout_s": 4,
    "heartbeat_interval_s": 1,
    "inactive_retention_s": 2,
    "sweep_interval_s": 0.5,
    "keepalive_s": 1,
    "wake_s": 3,
    "queue_s": 3,
    "first_byte_s": 4,
    "idle_s": 3,
    "total_s": 6,
    "peer_stall_s": 3,
    "waiting_s": 1,
    "settled_memory_s": 5,
}
AGENTS = ["live-0", "live-1", "live-2"]
PROCESS = "own-process"
BY_HAND = {"hand-0": ["sleepy-0", "sleepy-1"], "hand-1": ["sleepy-2"]}


async def run_traffic(
    broker: BrokerProcess, state: Path, seconds: float, dice: random.Random, outcomes: Counter[str]
) -> list[measure.Sample]:
    """All of it for so long; what the broker weighed meanwhile. Afterwards nobody is connected any more."""
    rows = [row for each in BY_HAND.values() for row in each]
    models = [*AGENTS, *AGENTS, PROCESS, *rows, "passing-0", "public"]
    callers = Callers(broker, models, dice)
    samples: list[measure.Sample] = []
    with trio.move_on_after(seconds):
        async with publishers.open_engine() as engine, trio.open_nursery() as nursery:
            for name in AGENTS:
                nursery.start_soon(publishers.run_agents, broker, engine, state, name, dice)
            nursery.start_soon(publishers.run_processes, broker, engine, state, PROCESS, dice)
            for session_id, hand_rows in BY_HAND.items():
                nursery.start_soon(publishers.ByHand(broker, session_id, hand_rows, dice).run)
            nursery.start_soon(publishers.run_strangers, broker, dice)
            nursery.start_soon(publishers.run_operator, broker, [*AGENTS, *BY_HAND], dice)
            for _ in range(CALLERS):
                nursery.start_soon(callers.run)
            while True:
                await trio.sleep(min(1.0, seconds / 20))
                samples.append(measure.Sample(trio.current_time(), broker.resident_bytes))
    outcomes.update(callers.outcomes)
    return samples


async def come_to_rest(broker: BrokerProcess, census: Path, start: dict[str, float]) -> measure.Rest:
    """Wait until the broker is as it was at the start, then count; after REST_S as it is."""
    await broker.http.delete("/admin/v1/llms/public")
    with trio.move_on_after(REST_S):
        while not await _is_at_rest(broker, start):
            await trio.sleep(0.25)
    census.unlink(missing_ok=True)
    broker.send(signal.SIGUSR1)
    while not census.exists():
        await trio.sleep(0.05)
    return measure.rest(await broker.metrics(), census, broker.resident_bytes)


async def _quiet(broker: BrokerProcess) -> dict[str, float]:
    """`/metrics` without what the request before it has not quite let go yet."""
    # What a first request opens for good is open with the second.
    await broker.metrics()
    seen = []
    for _ in range(5):
        await trio.sleep(0.1)
        seen.append(await broker.metrics())
    return min(seen, key=lambda metrics: metrics["wakecall_trio_tasks"])


async def _is_at_rest(broker: BrokerProcess, start: dict[str, float]) -> bool:
    metrics = await broker.metrics()
    return all(metrics[name] == start[name] for name in measure.GAUGES) and not await broker.list("tasks")


def missing(before: measure.Rest, after: measure.Rest) -> list[str]:
    """What did not happen at all, though a soak without it proves little."""
    wanted = [
        f"wakecall_channels_ended_total{{reason={reason}}}" for reason in ("disconnected", "superseded", "goodbye")
    ]
    wanted += [f"wakecall_infers_ended_total{{outcome={outcome}}}" for outcome in ("completed", "failed", "cancelled")]
    wanted += [f"wakecall_wakes_total{{state={state}}}" for state in ("succeeded", "failed")]
    return [name for name in wanted if after.metrics.get(name, 0) <= before.metrics.get(name, 0)]


@asynccontextmanager
async def open_soaked_broker(directory: Path, census: Path) -> AsyncIterator[BrokerProcess]:
    program = [sys.executable, "-m", "tests.soak.broker", str(census)]
    async with open_broker_process(
        directory / "soak.db", program=program, arguments=("--log-level", "error"), **SETTINGS
    ) as broker:
        yield broker


async def soak(minutes: float, seed: int) -> bool:
    """Run it and print it; whether nothing was left over."""
    dice = random.Random(seed)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        directory, census = Path(folder), Path(folder) / "census"
        async with open_soaked_broker(directory, census) as broker:
            start = await _quiet(broker)
            await run_traffic(broker, directory, WARM_UP_S, dice, Counter())
            before = await come_to_rest(broker, census, start)
            started = time.monotonic()
            samples = await run_traffic(broker, directory, minutes * 60, dice, outcomes)
            took = time.monotonic() - started
            after = await come_to_rest(broker, census, start)
            complaints = list(broker.err)
            code, _ = await broker.end()
    found = measure.findings(start, before, after, samples)
    is_good = all(each.is_good for each in found)
    infers = after.count("wakecall_infers_accepted_total") - before.count("wakecall_infers_accepted_total")
    print(f"{minutes:g} min, seed {seed}: {infers:,} infers accepted, {infers / took:.0f}/s")
    print("calls:", ", ".join(f"{outcome}: {count:,}" for outcome, count in outcomes.most_common()))
    for counter in ("wakecall_channels_ended_total", "wakecall_wakes_total"):
        labels = {name: int(value) for name, value in after.metrics.items() if name.startswith(f"{counter}{{")}
        print(", ".join(f"{name.removeprefix('wakecall_')}: {count:,}" for name, count in labels.items()))
    weights = [
        f"{samples[int(part * (len(samples) - 1))].resident / measure.MIB:.1f}" for part in (0, 0.25, 0.5, 0.75, 1)
    ]
    at_rest = [f"{each.resident / measure.MIB:.1f}" for each in (before, after)]
    print(f"resident, MiB: at rest {at_rest[0]}, in traffic {' → '.join(weights)}, at rest {at_rest[1]}")
    print(measure.table(found))
    if not is_good:
        print("types that grew most:", ", ".join(f"{kind} +{more:,}" for kind, more in measure.grown(before, after)))
    if never := missing(before, after):
        print("never happened:", *never)
    if complaints or code:
        print(f"the broker ended with {code}, and complained:", *complaints[:40], sep="\n")
    return is_good and not never and not complaints and not code


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Traffic, then: is anything left over?")
    parser.add_argument("minutes", type=float, nargs="?", default=10.0)
    parser.add_argument("--seed", type=int, default=20240607, help="of everything that is left to chance here")
    options = parser.parse_args()
    # Agents that are cut off all the time have much to say.
    logging.getLogger("wakecall").addHandler(logging.NullHandler())
    sys.exit(0 if trio.run(soak, options.minutes, options.seed) else 1)


if __name__ == "__main__":
    main()
