"""Ours beside LiteLLM and FastChat: the same constant answers, the same load, a key each, the server on one core.

All of them stand ready at once and are asked in turn, figure by figure, so that they see the same machine. In the
floor's place stands the peer's own figure. Ours has to find its publisher and hear back from it; the engine is straight
behind the peers.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import tool
from .peer_servers import Peer, open_engine, open_fastchat, open_litellm
from .report import Bar, Figure
from .servers import load_core, server, server_core
from .sizes import chat, post

__all__ = ["GROUP", "measure"]

GROUP = "peers"

WARM_S = 1.0
# Long, for LiteLLM has begun the last stream seconds after the first.
PACED_S = 15.0
PACE = 40
PROMPT = b"pace=%d events=%d " % (PACE, PACE * PACED_S)


def measure(seconds: float) -> list[Figure]:
    """One round.

    Args:
        seconds: of load for each figure; the paced streams take longer.
    """
    with ExitStack() as stack:
        engine = stack.enter_context(open_engine(load_core()))
        ours = stack.enter_context(server("wakecall", server_core()))
        litellm = stack.enter_context(open_litellm(engine, server_core()))
        fastchat = stack.enter_context(open_fastchat(engine, server_core()))
        publisher = partial(tool.Publisher, server=ours)
        mine = Peer("ours", ours.port, ours.client or "", (ours.pid,), "")
        everybody = ((mine, publisher(is_shared=tool.offers_shared(ours))), (litellm, None), (fastchat, None))
        print(f"beside {litellm.versions}; {fastchat.versions}", file=sys.stderr)
        for each, its in everybody:
            _plain(each, 32, WARM_S, its)
            _streams(each, WARM_S, its)
        plain = [_plain(each, 32, seconds, its) for each, its in everybody]
        medians = [_plain(each, 1, seconds, its).median_ms for each, its in everybody]
        streams = [_streams(each, seconds, its) for each, its in everybody]
        # FastChat's protocol sends the whole text again with each chunk: no pace to hold it to.
        paced = publisher(pace=PACE, events=int(PACE * PACED_S))
        delays = [_delay(mine, paced), _delay(litellm, None)]
    name = "plain infers, one caller's median, agent's path"
    return [
        *_compare("plain infers, 32 callers, agent's path", "requests", litellm, plain[0], plain[1], Bar("≥", 6)),
        *_compare("plain infers, 32 callers, agent's path", "requests", fastchat, plain[0], plain[2], Bar("≥", 2.5)),
        _beside(name, litellm, "ms", medians[0], medians[1], Bar("≤", 0.25)),
        _beside(name, fastchat, "ms", medians[0], medians[2]),
        *_compare("streams, 64 at once", "chunks", litellm, streams[0], streams[1], Bar("≥", 10)),
        *_compare("streams, 64 at once", "chunks", fastchat, streams[0], streams[2]),
        _beside(f"50 streams at {PACE} chunks/s, 99th percentile", litellm, "ms", delays[0], delays[1], Bar("≤", 0.1)),
    ]


@dataclass(frozen=True, slots=True)
class _Found:
    per_s: float
    per_cpu_s: float
    median_ms: float


def _compare(what: str, unit: str, peer: Peer, ours: _Found, theirs: _Found, bar: Bar | None = None) -> list[Figure]:
    return [
        _beside(what, peer, f"{unit}/s", ours.per_s, theirs.per_s, bar),
        # Steadier than the other where the machine has more to do.
        _beside(f"{what}, by processor time", peer, f"{unit}/CPU s", ours.per_cpu_s, theirs.per_cpu_s),
    ]


def _beside(what: str, peer: Peer, unit: str, ours: float, theirs: float, bar: Bar | None = None) -> Figure:
    return Figure(f"{what}, beside {peer.name}'s", unit, ours, theirs, ours / theirs, bar)


def _asked(peer: Peer, *, stream: bool = False, prompt: bytes = b"") -> bytes:
    body = chat(stream=stream)
    return post("/v1/chat/completions", body.replace(b"z" * len(prompt), prompt, 1), peer.key)


def _plain(peer: Peer, callers: int, seconds: float, publisher: tool.Publisher | None) -> _Found:
    before = peer.cpu_s()
    found = tool.requests(peer.port, [_asked(peer)], callers, seconds, publisher)
    return _as_found(found, "answers", peer.cpu_s() - before)


def _streams(peer: Peer, seconds: float, publisher: tool.Publisher | None) -> _Found:
    before = peer.cpu_s()
    found = tool.streams(peer.port, _asked(peer, stream=True), 64, seconds, publisher)
    return _as_found(found, "events", peer.cpu_s() - before)


def _as_found(found: dict[str, Any], what: str, cpu_s: float) -> _Found:
    per_cpu_s = found[f"all_{what}"] / max(cpu_s, 0.01)
    return _Found(found[what] / found["seconds"], per_cpu_s, found["latency_median_ms"])


def _delay(peer: Peer, publisher: tool.Publisher | None) -> float:
    asked = _asked(peer, stream=True, prompt=PROMPT)
    found = tool.paced(peer.port, asked, 50, publisher, limit_s=PACED_S + 60)
    if found["is_short"]:
        print(f"{peer.name}'s streams were never all there at once; measured is the middle half", file=sys.stderr)
    return float(found["delay_p99_ms"])
