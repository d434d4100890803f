"""Any ASGI app, served behind the barrier: Hypercorn's worker on sockets of ours, with an end that always comes."""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config, Sockets
from hypercorn.trio.run import worker_serve

from .barrier import Barrier, BarrierSettings, barrier_of, install_barrier
from .capacity import calm_shortages
from .cors import Cors
from .sockets import format_url
from .tls import Certificates

__all__ = ["hypercorn_config", "serve_app"]

# Hypercorn's own: that it runs, and where, is ours to say.
hypercorn_logger = logging.getLogger("wakecall.server.hypercorn")
hypercorn_logger.setLevel(logging.WARNING)


def hypercorn_config(
    settings: BarrierSettings | None = None, certificates: Certificates | None = None, cors: Cors | None = None
) -> Config:
    """Hypercorn's configuration for one server, with a `Barrier` of its own at `config.wakecall`.

    Args:
        settings: what one connection may do.
        certificates: to serve TLS with; None: cleartext.
        cors: the app's own, for what is refused before the app sees it.
    """
    settings = settings or BarrierSettings()
    config = Config()
    # TLS is the barrier's, not Hypercorn's, which would read the files once, and late.
    config.wakecall = Barrier(settings, certificates, cors)  # type: ignore[attr-defined]
    # It would run while we answer, too; what a peer may take is bounded elsewhere.
    config.read_timeout = None
    config.keep_alive_timeout = settings.keep_alive_s
    config.keep_alive_max_requests = 2**63
    config.h11_max_incomplete_size = settings.max_header_bytes
    config.graceful_timeout = settings.grace_s
    config.include_server_header = False
    config.accesslog = None
    config.errorlog = hypercorn_logger
    return config


async def serve_app(
    app: Callable[..., Awaitable[Any]],
    config: Config,
    sockets: Sequence[socket.socket],
    *,
    shutdown_trigger: Callable[[], Awaitable[Any]] | None = None,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until `shutdown_trigger` returns or this is cancelled.

    Once triggered: the listeners close, idle connections end, requests under way have `grace_s` and are then cancelled,
    and every socket still open is reset, which frees whatever is stuck in a write. Cancelled: the last two at once.

    Args:
        app: the ASGI app; its lifespan is run.
        config: from `hypercorn_config`; its barrier serves one run.
        sockets: listening, as `sockets.bind` returns them; closed at the end.
        shutdown_trigger: awaited; its return ends the server.
        task_status: started with the listeners' URLs, once connections are accepted.

    Raises:
        hypercorn.utils.LifespanFailureError: the app did not start.
    """
    install_barrier()
    barrier = barrier_of(config)
    closing = trio.Event()
    # Hypercorn hands back what it was given; these are addresses that a client can use.
    urls = [format_url(sock, is_tls=barrier.certificates is not None) for sock in sockets]

    async def wait_trigger() -> None:
        await (shutdown_trigger or trio.sleep_forever)()
        # Before Hypercorn knows: from here on no connection is kept for another request.
        barrier.start_closing()
        closing.set()

    async def abort_in_the_end() -> None:
        try:
            await closing.wait()
            await trio.sleep(config.graceful_timeout)
        finally:
            barrier.abort_all()

    try:
        with calm_shortages():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(abort_in_the_end)
                await worker_serve(
                    ASGIWrapper(app),
                    config,
                    sockets=Sockets(secure_sockets=[], insecure_sockets=list(sockets), quic_sockets=[]),
                    shutdown_trigger=wait_trigger,
                    task_status=_Translated(task_status, urls),
                )
                nursery.cancel_scope.cancel()
    finally:
        for sock in sockets:
            sock.close()


@dataclass(frozen=True, slots=True)
class _Translated(trio.TaskStatus[list[str]]):
    """A task status that starts with these URLs, whatever it is started with."""

    status: trio.TaskStatus[list[str]]
    urls: list[str]

    def started(self, value: list[str] | None = None) -> None:
        self.status.started(self.urls)
