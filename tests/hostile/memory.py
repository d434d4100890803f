"""How much a block makes this process hold."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["MIB", "holding_less_than"]

MIB = 1 << 20


@contextmanager
def holding_less_than(limit_bytes: int) -> Iterator[None]:
    """Assert that at no instant of the block Python holds so many bytes more than before it: server and test together.

    What lies in the kernel does not count: that is bounded by the sockets' buffers.
    """
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < limit_bytes, f"{peak / MIB:.1f} MiB"
