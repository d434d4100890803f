"""A broker on the network: sockets, barrier, app, and an end that always comes.

The order of the end is the point (design.md, "What cancels what"): the broker drains while the listeners are still open, so
that publishers can post the results of what is in flight on new connections; then Hypercorn stops; then every socket that
is still open is closed, which frees whatever is stuck in a write.
"""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field

import trio

from .broker import Broker
from .faults import stacks_of
from .http import create_app
from .http.barrier import BarrierSettings
from .http.capacity import measure_capacity
from .http.cors import Cors, InvalidOrigin
from .http.server import hypercorn_config, serve_app
from .http.sockets import CannotBind, bind, is_loopback
from .http.tls import BadCertificate, Certificates

__all__ = ["BadCertificate", "CannotBind", "InvalidOrigin", "KeysRequired", "Reload", "ServeConfig", "Stop", "serve"]

logger = logging.getLogger("wakecall.server")

#: After the drain everybody has been answered: what is still being written has this long to leave.
_LAST_WRITES_S = 1.0


class KeysRequired(Exception):
    """Without keys whoever reaches the address may do everything: so it has to be this machine alone.

    Args:
        address: that is not.
    """

    def __init__(self, address: str) -> None:
        super().__init__(
            f"refusing to listen on {address or 'every address'}: there are no API keys, so anybody who reaches it could"
            " use, replace and delete every model"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Where and how to listen.

    Args:
        host: a name or address of this machine; empty: every address it has.
        port: 0 to 65535; 0: a free one.
        keep_alive_s: seconds that a connection may be idle between requests.
        head_s: seconds from the first byte of a request's head to its last, and for a TLS handshake.
        body_s: seconds for all of a request's body, a publisher's upload of an answer excepted.
        max_connections: connections at a time; None: as many as there are descriptors for. Never more than those.
        open: listen without keys on addresses that others can reach, and answer to any `Host`.
        certfile: path of a certificate in PEM form, with those between it and the root behind it; None: no TLS.
        keyfile: path of the certificate's key in PEM form, without a password.
        cors: origins whose web pages may call what is under `/v1`, such as `https://chat.example.com`; `*` for all, but
            without keys each has to be named. Empty: none.

    Raises:
        BadCertificate: a certificate without its key, or a key without its certificate.
        InvalidOrigin: what is in `cors` is none.
        ValueError: a time or a bound that is not finite and positive, or a bound that is not whole.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    keep_alive_s: float = 75.0
    head_s: float = 60.0
    body_s: float = 900.0
    max_connections: int | None = None
    open: bool = False
    certfile: str | None = None
    keyfile: str | None = None
    cors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.certfile is None) != (self.keyfile is None):
            given, missing = ("certfile", "keyfile") if self.keyfile is None else ("keyfile", "certfile")
            raise BadCertificate(f"TLS needs a certificate and its key: {given} is given, and {missing} is not")
        Cors.of(self.cors)
        for name in ("keep_alive_s", "head_s", "body_s"):
            if not 0 < (seconds := getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be a positive number, not {seconds!r}")
        bound = self.max_connections
        if bound is not None and not (type(bound) is int and bound > 0):
            raise ValueError(f"max_connections must be a positive whole number, not {bound!r}")


@dataclass(slots=True)
class Stop:
    """How a server is told to stop: `request` once, and it drains; once more, and it skips the grace."""

    _asked: trio.Event = field(default_factory=trio.Event)
    _at_once: trio.Event = field(default_factory=trio.Event)

    @property
    def requested(self) -> bool:
        """Whether stopping has been asked for."""
        return self._asked.is_set()

    def request(self) -> None:
        (self._at_once if self._asked.is_set() else self._asked).set()

    async def wait(self) -> None:
        """Return once stopping has been asked for."""
        await self._asked.wait()

    async def wait_at_once(self) -> None:
        """Return once it has been asked for twice."""
        await self._at_once.wait()


@dataclass(slots=True)
class Reload:
    """How a server is told that its certificate was renewed: `request`, as often as it is."""

    _asked: trio.Event = field(default_factory=trio.Event)

    def request(self) -> None:
        self._asked.set()

    async def wait(self) -> None:
        """Return once it has been asked for since the last time that this returned."""
        await self._asked.wait()
        self._asked = trio.Event()


async def serve(
    broker: Broker,
    config: ServeConfig | None = None,
    *,
    stop: Stop | None = None,
    reload: Reload | None = None,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve an open broker over HTTP until stopped or cancelled.

    Stopped, it drains the broker (`Broker.drain`, with its config's grace), answers what is left, and returns; the broker
    stays open, and takes nothing any more. Cancelled, it closes every connection at once.

    Args:
        broker: from `open_broker`.
        config: where; the defaults when left out.
        stop: how to stop it; None: only by cancelling.
        reload: how to have it read its certificate and key again, for the handshakes from then on. A pair that cannot be
            used is logged, and the one before stays.
        task_status: started with the URLs that it listens on, once connections are accepted.

    Raises:
        CannotBind: the address is taken, or is not this machine's.
        KeysRequired: others can reach the address, and the broker has no keys.
        BadCertificate: there is no TLS with this certificate and key.
    """
    config = config or ServeConfig()
    stop = stop or Stop()
    certificates: Certificates | None = None
    if config.certfile is not None and config.keyfile is not None:
        certificates = await trio.to_thread.run_sync(Certificates, config.certfile, config.keyfile)
    stall_s = broker.config.peer_stall_s
    needs_loopback = broker.is_open and not config.open
    if needs_loopback and not is_loopback(config.host):
        raise KeysRequired(config.host)
    listening = bind(config.host, config.port, peer_stall_s=stall_s)
    for sock in listening:
        # A name says what it should lead to; where it does is for this machine's resolver to say.
        if needs_loopback and not is_loopback(address := sock.getsockname()[0]):
            _close(listening)
            raise KeysRequired(f"{config.host} ({address})")
    if config.open:
        _warn_of_open(broker, config.host)
    capacity = measure_capacity()
    cors = Cors.of(config.cors)
    most = [bound for bound in (capacity.connections, config.max_connections) if bound is not None]
    settings = BarrierSettings(
        peer_stall_s=stall_s,
        keep_alive_s=config.keep_alive_s,
        head_s=config.head_s,
        max_connections=min(most, default=None),
        max_turned_away=capacity.turned_away,
        grace_s=_LAST_WRITES_S,
    )

    async def wait_drained() -> None:
        await stop.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_skip_grace, stop, nursery.cancel_scope)
            await broker.drain()
            nursery.cancel_scope.cancel()
        await broker.drain(0)  # what the second signal cut short

    async with trio.open_nursery() as nursery:
        if reload is not None and certificates is not None:
            nursery.start_soon(_reload_when_asked, reload, certificates)
        await serve_app(
            create_app(broker, loopback_only=not config.open, cors=cors or (), body_s=config.body_s),
            hypercorn_config(settings, certificates, cors),
            listening,
            shutdown_trigger=wait_drained,
            task_status=task_status,
        )
        nursery.cancel_scope.cancel()


async def _reload_when_asked(reload: Reload, certificates: Certificates) -> None:
    while True:
        await reload.wait()
        try:
            await trio.to_thread.run_sync(certificates.reload)
        except BadCertificate as error:
            logger.error("%s; the certificate that was read before stays", error)
        except Exception as error:
            # A signal must not end the server: what it has works.
            logger.error("the certificate that was read before stays, for reading failed with %s", stacks_of(error))
        else:
            logger.info("the certificate in %s was read again", certificates.certfile)


def _warn_of_open(broker: Broker, host: str) -> None:
    if broker.is_open:
        logger.warning(
            "the broker is open: there are no API keys, and whoever reaches %s may use, replace and delete every model",
            host or "this machine",
        )
    else:
        logger.warning("there are API keys, so the broker is not open, whatever it was told: every call needs one")


def _close(sockets: Iterable[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


async def _skip_grace(stop: Stop, grace: trio.CancelScope) -> None:
    await stop.wait_at_once()
    grace.cancel()
