"""How many connections there are descriptors for, and what is said when they run out all the same."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Final

import trio

resource: ModuleType | None
try:
    import resource
except ImportError:  # not a POSIX system
    resource = None

__all__ = ["Capacity", "calm_shortages", "measure_capacity"]

# For what this process opens beside connections: SQLite's files, a module that loads on first use, sockets that are not
# counted yet.
_SPARE: Final = 32
# What may be told to leave at one time; the rest of a flood is reset.
_MOST_TURNED_AWAY: Final = 64

# An accept that fails for these is tried again by Trio, ten times a second.
_SHORTAGES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
#: Accepting has gone well for so long when a shortage counts as a new one, in seconds.
_CALM_S: Final = 10.0

logger = logging.getLogger("wakecall.server")


@dataclass(frozen=True, slots=True)
class Capacity:
    """How many connections a server may have.

    Args:
        connections: at a time; None for no bound.
        turned_away: how many beyond that may be told so at a time.
    """

    connections: int | None
    turned_away: int


def measure_capacity() -> Capacity:
    """What this process's limit of descriptors leaves, as things stand, for connections.

    A connection that we have no descriptor for can be told nothing: it waits in the kernel until another one ends. So some
    are kept back, to say no with.
    """
    if resource is None:
        return Capacity(None, _MOST_TURNED_AWAY)
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return Capacity(None, _MOST_TURNED_AWAY)
    left = max(limit - _count_open() - _SPARE, 2)
    turned_away = min(_MOST_TURNED_AWAY, left // 4 or 1)
    return Capacity(left - turned_away, turned_away)


def _count_open() -> int:
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return _SPARE


class _Calm(logging.Filter):
    """Lets the first of Trio's complaints about failing accepts pass, in one line, and none that follows close behind."""

    def __init__(self) -> None:
        super().__init__()
        self._complained_at = -_CALM_S

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, OSError) or error.errno not in _SHORTAGES:
            return True
        now = trio.current_time()
        is_new = now - self._complained_at >= _CALM_S
        self._complained_at = now
        if is_new:
            logger.error(
                "no connection can be accepted (%s): those that knock wait until others have left",
                os.strerror(error.errno),
            )
        return False


@contextmanager
def calm_shortages() -> Iterator[None]:
    """While the block runs, a shortage of descriptors is one line of the log, not a traceback ten times a second."""
    calm = _Calm()
    trios = logging.getLogger("trio.serve_listeners")
    trios.addFilter(calm)
    try:
        yield
    finally:
        trios.removeFilter(calm)
