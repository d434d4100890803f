"""Rows at work, the pools that they stand in, and what an infer may go to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, NamedTuple

from .fairness import FairLine, Lane
from .health import Health
from .models import LLM
from .task import Infer
from .wake import Wake

if TYPE_CHECKING:
    from .deadlines import Deadline
    from .session import Session

__all__ = ["Pool", "Row", "Target"]


class Pool:
    """Rows that answer to one name, and the line of those who wait for any of them, or for one of them by its own name.

    A row without a pool has one to itself, which has no name.
    """

    __slots__ = ("line", "name", "owner", "probe", "rows", "sent")

    def __init__(self, name: str | None, owner: str) -> None:
        self.name: Final = name
        self.owner = owner
        self.rows: dict[str, Row] = {}
        self.line: Final[FairLine[Infer]] = FairLine()
        self.sent = 0  # infers that have gone to any of its rows
        self.probe: Deadline | None = None  # when one that is avoided may be tried again

    @property
    def waiting(self) -> int:
        """How many wait for any of its rows."""
        return self.line.count(Lane.ANY) + self.line.count(Lane.MOVED)


class Row:
    """A row at work: its record, its pool, what it has in flight and how it has been doing.

    Its pool, if it has none with a name, and its health are made when somebody first asks for them: most rows of a broker
    that has just started, or has very many, are never asked.

    Attributes:
        in_flight: infers that it works on.
        stopping: slots of infers that are over and whose engine has not stopped, as far as is known.
        wanted: those who wait for its pool would have it woken, once its group lets it.
        yielding: it takes no more infers, for another row of its group is to be woken.
        woken_at, last_sent_at: `trio.current_time()`.
    """

    __slots__ = (
        "_health",
        "_pool",
        "in_flight",
        "last_sent_at",
        "llm",
        "session",
        "stopping",
        "wake",
        "wanted",
        "woken_at",
        "yielding",
    )

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._pool: Pool | None = None
        self._health: Health | None = None
        self.session: Session | None = None
        self.in_flight = 0
        self.stopping = 0
        self.wake: Wake | None = None
        self.yielding = False
        self.wanted = False
        self.woken_at = -math.inf
        self.last_sent_at = -math.inf

    @property
    def pool(self) -> Pool:
        pool = self._pool
        if pool is None:
            pool = self._pool = Pool(None, self.llm.owner)
            pool.rows[self.llm.name] = self
        return pool

    @property
    def pool_if_made(self) -> Pool | None:
        """None: nobody has asked for it, so nobody waits in it, either."""
        return self._pool

    @property
    def health(self) -> Health:
        health = self._health
        if health is None:
            health = self._health = Health()
        return health

    @property
    def waiting(self) -> int:
        """How many wait for it by name."""
        return 0 if self._pool is None else self._pool.line.count(self.llm.name)

    def join(self, pool: Pool) -> None:
        """It is in this pool, and was in none with a name."""
        self._pool = pool
        pool.rows[self.llm.name] = self

    def leave(self) -> Pool:
        """It is in none with a name any more. Returns where it was.

        Of a row that goes there must be no circle left: in a process that has frozen its start it would stay for ever.
        """
        pool, self._pool = self.pool, None
        del pool.rows[self.llm.name]
        return pool


class Target(NamedTuple):
    """What an infer may go to: every row of a pool, or the one that it named."""

    pool: Pool
    only: str | None

    @property
    def rows(self) -> Iterable[Row]:
        return self.pool.rows.values() if self.only is None else (self.pool.rows[self.only],)
