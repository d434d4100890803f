"""How long a write waits for a peer who takes nothing, a little, or all of it while our own loop stands still."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import trio
import trio.testing

from wakecall.http.transport import PeerStream

STALL_S = 8.0
PATIENCE_S = 2.0
LOOK_S = PATIENCE_S / 8
MUCH = bytes(8 * 1024 * 1024)
CUT = "the peer did not take all in time"


@contextlib.contextmanager
def connected() -> Iterator[tuple[PeerStream, socket.socket]]:
    """A stream whose peer reads only when a test does it for him."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()) as peer, listener.accept()[0] as ours:
            peer.setblocking(False)
            ours.setblocking(False)
            stream = PeerStream(trio.socket.from_stdlib_socket(ours), STALL_S)
            stream.patience_s = PATIENCE_S
            yield stream, peer


def take_all(peer: socket.socket) -> int:
    """Bytes that have arrived by now, read without a turn of the loop."""
    taken = 0
    with contextlib.suppress(BlockingIOError):
        while piece := peer.recv(1024 * 1024):
            taken += len(piece)
    return taken


async def send(stream: PeerStream, results: list[str]) -> None:
    try:
        await stream.send_all(MUCH)
    except trio.BrokenResourceError as error:
        results.append(str(error))
    else:
        results.append("sent")


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked(0.05)


async def test_who_takes_nothing_is_cut_when_patience_ends(
    mock_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    with connected() as (stream, _):
        results: list[str] = []
        nursery.start_soon(send, stream, results)
        await settle()
        mock_clock.jump(PATIENCE_S - 0.1)
        await settle()
        assert not results
        mock_clock.jump(0.2)
        await settle()
        assert results == [CUT]


async def test_who_takes_a_little_has_one_more_look(mock_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    """Then it ends, however well it goes: many who take a byte a second hold as much as many who take none."""
    with connected() as (stream, peer):
        results: list[str] = []
        nursery.start_soon(send, stream, results)
        for seconds in (PATIENCE_S - 0.1, 0.2):
            await settle()
            mock_clock.jump(seconds)
            assert peer.recv(64 * 1024)
        await settle()
        assert not results
        mock_clock.jump(LOOK_S)
        assert peer.recv(64 * 1024)
        await settle()
        assert results == [CUT]


async def test_a_late_loop_is_not_the_peers_fault(mock_clock: trio.testing.MockClock, nursery: trio.Nursery) -> None:
    """In one pass that takes longer than he had, he reads all that there is: his answer goes on."""
    with connected() as (stream, peer):
        results: list[str] = []
        nursery.start_soon(send, stream, results)
        await settle()
        mock_clock.jump(10 * PATIENCE_S)
        while take_all(peer):
            await settle()
        await settle()
        assert results == ["sent"]
