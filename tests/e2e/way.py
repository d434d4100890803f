"""What lies between an agent and its broker: nothing, or with `pytest tests/e2e --through-faults` a bad network.

There every agent of these tests, `wakecall publish` or one by hand, reaches its broker through a fault proxy whose toxics
are mild: all is late and jittery, heads, frames and pieces arrive in crumbs, big bodies at a rate, ends after a while. No
outcome that a test checks may change by that. Faults that do change outcomes are in test_faults.py, each with the outcome
that it has to have.

A pass of its own, and not a parameter of every test: it takes as long as the suite without it, and shows the same on each
interpreter, so `.ci/run` makes it on one.
"""

from __future__ import annotations

import contextlib
from urllib.parse import urlsplit

import trio

from tests.faultproxy import FaultProxy, Toxics

#: Enough to separate whatever could be separated; 32 MiB of a body still take half a second.
MILD = Toxics(
    latency_s=0.002, jitter_s=0.004, bandwidth=64 * 1024 * 1024, fragment=60, fragments=4, close_s=0.02
)  # fmt: skip


class Way:
    """Whether this run goes through faults, and what has come through.

    Attributes:
        is_bad: set once, before the first test.
        connections, passed: of all proxies that have ended.
    """

    is_bad = False
    connections = 0
    passed = 0


WAY = Way()
# One for each broker of a test: an agent that is started again has to find the address that it knows.
_proxies: trio.lowlevel.RunVar[dict[int, FaultProxy]] = trio.lowlevel.RunVar("proxies")


async def agents_way(broker_url: str) -> str:
    """The address at which an agent reaches the broker (or a tap) at `broker_url`."""
    if not WAY.is_bad:
        return broker_url
    parts = urlsplit(broker_url)
    port = parts.port
    assert port is not None
    proxies = _proxies.get({})
    _proxies.set(proxies)
    if port not in proxies:
        proxies[port] = FaultProxy(port, up=MILD, down=MILD, seed=port)
        started = trio.Event()
        # A test and its fixtures are one run and have no nursery in common: this ends with the run.
        trio.lowlevel.spawn_system_task(_serve, proxies[port], started)
        await started.wait()
    return parts._replace(netloc=f"{parts.hostname}:{proxies[port].port}").geturl()


async def _serve(proxy: FaultProxy, started: trio.Event) -> None:
    class Started(trio.TaskStatus[None]):
        def started(self, value: None = None) -> None:
            started.set()

    with contextlib.ExitStack() as stack:
        stack.callback(_count, proxy)
        await proxy.run(task_status=Started())


def _count(proxy: FaultProxy) -> None:
    WAY.connections += proxy.connections
    WAY.passed += proxy.passed
