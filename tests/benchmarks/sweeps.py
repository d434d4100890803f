"""What a sweep costs: 1,000 stale rows among a million, beside 1,000 that are all there is.

In a process of its own, for a million rows are a gigabyte: `python -m tests.benchmarks.sweeps ROWS STALE SWEEPS` prints
what it found as JSON. The rows are registered, some of their sessions hold a channel, and what is swept is committed to
SQLite. Trio's virtual clock is moved by hand, so that nobody waits 90 s; what is measured is real time. One broker is swept
several times: each of its cohorts of rows is stale a second after the one before it.

A *slice* is from where a task was resumed to where it yields, the collector's part taken out.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.benchmarks.report import Bar, Figure
from wakecall import Broker, BrokerConfig, Channel, LLMSpec, open_broker, open_sqlite_store

GROUP = "sweep"

_ROWS = 1_000_000
_STALE = 1000
_SWEEPS = 5
_PER_SESSION = 100
_ROOT = Path(__file__).resolve().parents[2]

_CONFIG = BrokerConfig(
    sweep_interval_s=1e9,  # by hand alone
    peer_stall_s=1e9,  # nobody reads the channels
    keepalive_s=1e9,
    max_llms_per_session=_PER_SESSION,
    max_llms_per_owner=10**9,
    max_sessions_per_owner=10**9,
)


class Slices(trio.abc.Instrument):
    """The longest slice since `begin`, in seconds of this thread's processor time, for another program that has the core
    meanwhile is none of ours; and the seconds that the collector took, by the clock."""

    def __init__(self) -> None:
        self.longest = self.collected = 0.0
        self._thread = threading.get_ident()
        self._began = self._collecting_since = self._collecting_from = self._collected_here = 0.0

    def begin(self) -> None:
        self.longest = self.collected = 0.0
        self._resume()  # this slice has been going on since before

    def _resume(self) -> None:
        self._began, self._collected_here = time.thread_time(), 0.0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._resume()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.longest = max(self.longest, time.thread_time() - self._began - self._collected_here)

    def on_collector(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._collecting_since, self._collecting_from = time.perf_counter(), time.thread_time()
            return
        self.collected += time.perf_counter() - self._collecting_since
        if threading.get_ident() == self._thread:
            self._collected_here += time.thread_time() - self._collecting_from


@dataclass(frozen=True, slots=True)
class Sweeps:
    """Of several sweeps of as many rows: the median, the longest slice, and all that the collector took; in seconds.

    `seconds` is without the collector's. `full` and `frozen`: one full collection, before and after `gc.freeze`.
    """

    seconds: float
    slice: float
    collected: float
    full: float
    frozen: float


async def _register(broker: Broker, session_id: str, rows: int) -> None:
    await broker.register(session_id, [LLMSpec(f"{session_id}/{number}") for number in range(rows)])


async def _sweep(rows: int, stale: int, sweeps: int, clock: MockClock) -> Sweeps:
    """Sweep `sweeps` times, `stale` rows each, among `rows` in all."""
    per_session = min(_PER_SESSION, stale)
    assert stale % per_session == 0
    slices = Slices()
    with tempfile.TemporaryDirectory() as folder:
        async with (
            open_sqlite_store(Path(folder) / "bench.db") as store,
            open_broker(store, _CONFIG) as broker,
            AsyncExitStack() as channels,
        ):
            for cohort in range(sweeps):
                opened: list[Channel] = []
                for number in range(stale // per_session):
                    session_id = f"stale-{cohort}-{number}"
                    await _register(broker, session_id, per_session)
                    if number % 2:
                        opened.append(await channels.enter_async_context(broker.open_channel(session_id)))
                await wait_all_tasks_blocked()  # a channel's rows count as alive from when it is current
                clock.jump(1)
            clock.jump(_CONFIG.heartbeat_timeout_s / 2)
            left = rows - sweeps * stale
            for number in range(0, left, per_session):
                await _register(broker, f"fresh-{number}", min(per_session, left - number))
            clock.jump(_CONFIG.heartbeat_timeout_s / 2 - sweeps - 0.5)
            took, longest, collected = [], 0.0, 0.0
            trio.lowlevel.add_instrument(slices)
            gc.callbacks.append(slices.on_collector)
            gc.enable()
            for _ in range(sweeps):
                clock.jump(1)
                await trio.lowlevel.checkpoint()
                slices.begin()
                began = time.perf_counter()
                report = await broker.sweep()
                seconds = time.perf_counter() - began
                await trio.lowlevel.checkpoint()  # the last slice, too
                took.append(seconds - slices.collected)
                longest = max(longest, slices.longest)
                collected += slices.collected
                assert len(report.inactivated) == stale, len(report.inactivated)
            trio.lowlevel.remove_instrument(slices)
            gc.callbacks.remove(slices.on_collector)
            began = time.perf_counter()
            gc.collect()
            full = time.perf_counter() - began
            gc.freeze()
            began = time.perf_counter()
            gc.collect()
            frozen = time.perf_counter() - began
            gc.unfreeze()
            return Sweeps(statistics.median(took), longest, collected, full, frozen)


def sweep(rows: int, stale: int, sweeps: int) -> Sweeps:
    """As `_sweep`. The collector rests until all rows are there: that is not what is measured."""
    clock = MockClock()
    gc.disable()
    try:
        return trio.run(_sweep, rows, stale, sweeps, clock, clock=clock)
    finally:
        gc.enable()


def compare(rows: int, stale: int, sweeps: int) -> tuple[Sweeps, list[Sweeps]]:
    """Of very many rows, and as often of none but those that are stale."""
    alone = [sweep(stale, stale, 1) for _ in range(sweeps)]
    return sweep(rows, stale, sweeps), alone


def figures(rows: int, many: Sweeps, alone: list[Sweeps], stale: int) -> list[Figure]:
    """Times in ms."""
    among = f"{stale:,} stale rows among {rows:,}"
    ours, floor = many.seconds * 1e3, statistics.median(each.seconds for each in alone) * 1e3

    def absolute(name: str, seconds: float, bar: Bar | None = None) -> Figure:
        return Figure(name, "ms", seconds * 1e3, None, seconds * 1e3, bar)

    return [
        Figure(f"sweep of {among}, committed", "ms", ours, floor, ours / floor, Bar("≤", 2.0)),
        absolute(f"sweep of {among}, the longest slice", many.slice, Bar("≤", 10.0)),
        absolute(f"sweep of {among}, garbage collection in it", many.collected),
        absolute(f"one full garbage collection, {rows:,} rows", many.full),
        absolute(f"one full garbage collection, {rows:,} rows, frozen", many.frozen),
    ]


def measure(seconds: float) -> list[Figure]:
    """One round. It takes as long as it takes to register a million rows, whatever `seconds` says.

    Raises:
        RuntimeError: it did not go through.
    """
    command = [sys.executable, "-m", "tests.benchmarks.sweeps", str(_ROWS), str(_STALE), str(_SWEEPS)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=_ROOT, timeout=900)
    if run.returncode:
        raise RuntimeError(f"the sweeps ended with {run.returncode}")
    found = json.loads(run.stdout)
    return figures(_ROWS, Sweeps(**found["many"]), [Sweeps(**each) for each in found["alone"]], _STALE)


def main() -> None:
    many, alone = compare(*map(int, sys.argv[1:4]))
    print(json.dumps({"many": asdict(many), "alone": [asdict(each) for each in alone]}))


if __name__ == "__main__":
    main()
