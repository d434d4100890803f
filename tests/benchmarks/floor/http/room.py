"""Who may be there: the connections of one server, what each may do, and who gives way when there is no room.

A connection is its peer's own until others need its place. Then those give way first who have their answer or ask nothing,
and after them *strangers*, who have shown no key, with an answer that they do not take: for such answers cost nothing to
ask for, and who reads none of them would hold his place for as long as he likes.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypercorn.config import Config

from ..errors import Unavailable, WakecallError
from .cors import Cors
from .tls import Certificates

if TYPE_CHECKING:
    from .barrier import Connection

__all__ = ["Barrier", "BarrierSettings", "TooManyConnections", "barrier_of"]

# One in so many connections is for publishers, operators and probes alone.
_SHARE_OF_OTHERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BarrierSettings:
    """What one connection may do.

    Args:
        peer_stall_s: seconds in which a peer that is written to must take a byte.
        stranger_s: seconds in which one who has shown no key yet must take what is written to him at a time.
        keep_alive_s: seconds that a connection may be idle between requests.
        head_s: seconds from a head's first byte to its last; over TLS also for the handshake.
        close_drain_s: seconds, and
        close_drain_bytes: bytes, that are read and dropped after an answer that came before its request's end.
        max_header_bytes: a request's head, in all.
        max_headers: header lines of a request.
        max_connections: connections at a time; None for no bound but the descriptors'. Beyond it, who has been idle for
            the longest makes room, then a stranger who does not take his answer; if there is neither, the newcomer is told
            so.
        max_turned_away: how many may be told so at one time; the rest of a flood is reset.
        grace_s: seconds that requests may go on once the server is told to stop.
    """

    peer_stall_s: float = 60.0
    stranger_s: float = 2.0
    keep_alive_s: float = 75.0
    head_s: float = 60.0
    close_drain_s: float = 1.0
    close_drain_bytes: int = 1 << 20
    max_header_bytes: int = 64 * 1024
    max_headers: int = 100
    max_connections: int | None = None
    max_turned_away: int = 64
    grace_s: float = 2.0


class Barrier:
    """What the connections of one server share: their settings, the set of them, and whether they are to end.

    Args:
        settings: the defaults when left out.
        certificates: to speak TLS with; None: cleartext.
        cors: what browsers are told with a refusal; None: nothing.
    """

    def __init__(
        self,
        settings: BarrierSettings | None = None,
        certificates: Certificates | None = None,
        cors: Cors | None = None,
    ) -> None:
        self.settings = settings or BarrierSettings()
        self.certificates = certificates
        self.cors = cors
        self.connections: set[Connection] = set()
        # Those without a request under way, the longest so first: they have their last answer, or ask nothing.
        self.leaving: OrderedDict[Connection, None] = OrderedDict()
        self.idle: OrderedDict[Connection, None] = OrderedDict()
        # Strangers to whom something is being written, the longest so first.
        self.unread: OrderedDict[Connection, None] = OrderedDict()
        self.turned_away = 0
        self.closing = False

    def make_room(self) -> bool:
        """Whether one more connection may come. If there are too many, one ends that can be spared, if there is one.

        1. One that has its last answer.
        2. One that asks nothing, the longest so first.
        3. A stranger's, with an answer that waits for him to take it: nothing can be said to him behind that.
        """
        bound = self.settings.max_connections
        if bound is None or len(self.connections) < bound:
            return True
        for dispensable in (self.leaving, self.idle):
            if dispensable:
                connection, _ = dispensable.popitem(last=False)
                connection.make_way()
                return True
        if self.unread:
            stranger, _ = self.unread.popitem(last=False)
            stranger.abort()
            return True
        return False

    def objection_to(self, path: str) -> WakecallError | None:
        """Why a request for this path is not served now, or None.

        The last eighth of the connections is not for clients: they wait for answers, and publishers, who bring those on
        connections of their own, must not find that the waiting have taken all the room.
        """
        bound = self.settings.max_connections
        if bound is None or not path.startswith("/v1/"):
            return None
        busy = len(self.connections) - len(self.idle) - len(self.leaving) - len(self.unread)
        return TooManyConnections() if busy > bound - bound // _SHARE_OF_OTHERS else None

    def start_closing(self) -> None:
        """End idle connections now, and every other one with the answer that it is busy with."""
        self.closing = True
        for connection in list(self.connections):
            connection.end_if_idle()

    def abort_all(self) -> None:
        """Reset every live connection at once: stuck writes and reads end."""
        for connection in list(self.connections):
            connection.abort()


class TooManyConnections(Unavailable):
    """The server has as many connections as it may have."""

    code = "too_many_connections"
    default_message = "This server has as many connections as it takes."
    default_retry_after_s = 1.0


def barrier_of(config: Config) -> Barrier:
    """The barrier of the server that runs with this config; one with the defaults if it has none yet."""
    barrier = getattr(config, "wakecall", None)
    if barrier is None:
        barrier = Barrier()
        config.wakecall = barrier  # type: ignore[attr-defined]
    assert isinstance(barrier, Barrier)
    return barrier
