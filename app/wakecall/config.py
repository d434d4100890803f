"""Every time and every bound of the broker, in one frozen record.

A field's metadata says what it is for: `serve --help`, the environment (`WAKECALL_` and the field's name in capitals)
and `docs/reference/configuration.md` are made from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

__all__ = ["BrokerConfig"]

_KIB = 1024
_MIB = 1024 * _KIB

# A byte of a body may become six in a frame's JSON, and a frame's line is at most 512 KiB (protocol.md).
_MOST_INLINE_BYTES = 64 * _KIB
_FRAME_ROOM_BYTES = 8 * _KIB


def _seconds(default: float, doc: str) -> float:
    return field(default=default, metadata={"doc": doc, "unit": "s"})


def _count(default: int, doc: str, unit: str = "") -> int:
    return field(default=default, metadata={"doc": doc, "unit": unit})


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerConfig:
    """Times in seconds, sizes in bytes, bounds in items.

    Raises:
        ValueError: a value that is not finite and positive, or a bound that is not whole.
    """

    heartbeat_timeout_s: float = _seconds(90.0, "a row without a heartbeat for so long goes inactive")
    inactive_retention_s: float = _seconds(4 * 3600.0, "a row inactive for so long is deleted")
    sweep_interval_s: float = _seconds(15.0, "time between two sweeps")
    heartbeat_interval_s: float = _seconds(30.0, "how often publishers are asked to heartbeat")
    keepalive_s: float = _seconds(15.0, "a silent channel carries a comment so often")
    wake_s: float = _seconds(120.0, "the most that a wake may take, where its row does not say")
    queue_s: float = _seconds(60.0, "the most that an infer waits for a free slot")
    first_byte_s: float = _seconds(300.0, "the most that a streaming infer waits for its first byte")
    idle_s: float = _seconds(120.0, "the most that an answer may pause")
    total_s: float = _seconds(3600.0, "the most that an infer may take in all")
    peer_stall_s: float = _seconds(60.0, "a peer that takes no byte for so long, while bytes wait, is cut")
    grace_s: float = _seconds(2.0, "what is in flight at a shutdown may go on for so long")
    cancel_lease_s: float = _seconds(
        10.0, "a slot whose infer was cancelled is free after so long without a confirmation"
    )
    residence_s: float = _seconds(30.0, "a row of a swap group stays awake for at least so long")
    waiting_s: float = _seconds(10.0, "a streaming caller hears `: waiting` so often before its first byte")
    settled_memory_s: float = _seconds(300.0, "how long the outcome of a task is remembered for its publisher")
    usage_flush_s: float = _seconds(5.0, "usage that is not in the store yet is written after so long")
    usage_retention_s: float = _seconds(400 * 86400.0, "usage is kept for so long")

    max_body_bytes: int = _count(32 * _MIB, "the largest body of a client or publisher, results excepted", "bytes")
    max_held_bytes: int = _count(1024 * _MIB, "all bodies held at once, at most half of it for one key", "bytes")
    max_inline_body_bytes: int = _count(64 * _KIB, "a larger body is fetched by the publisher", "bytes")
    max_plain_bytes: int = _count(_MIB, "an answer of a JSON or text type is held until whole up to here", "bytes")
    max_event_tail_bytes: int = _count(64 * _KIB, "how much of an unfinished event is held back", "bytes")
    max_message_bytes: int = _count(4 * _KIB, "the longest message of a publisher", "bytes")
    max_text_bytes: int = _count(512, "the longest text of a row or an agent that is kept", "bytes")
    max_untaken_frame_bytes: int = _count(4 * _MIB, "a channel whose untaken frames exceed this ends", "bytes")
    reply_buffer_bytes: int = _count(256 * _KIB, "what is held between one upload and its client", "bytes")
    max_llms_per_session: int = _count(256, "rows of one session", "rows")
    max_llms_per_owner: int = _count(20_000, "rows of one owner, withdrawn ones included", "rows")
    max_sessions_per_owner: int = _count(1000, "sessions of one owner", "sessions")
    max_heartbeat_tasks: int = _count(10_000, "task ids in one heartbeat", "ids")
    max_waiting_per_llm: int = _count(
        2000, "infers waiting for one row or pool, at most half of them of one key", "infers"
    )
    max_waiting_per_key: int = _count(2000, "infers of one key waiting", "infers")
    max_waiting: int = _count(10_000, "infers waiting in all, at most half of them of one key", "infers")
    max_llms_per_pool: int = _count(256, "rows of one pool", "rows")
    max_aliases: int = _count(1000, "aliases", "aliases")
    max_settled_per_session: int = _count(1000, "outcomes remembered for one session", "outcomes")
    max_keys: int = _count(10_000, "API keys", "keys")
    max_readers_per_reply: int = _count(64, "readers of one answer", "readers")
    max_usage_cells: int = _count(50_000, "sums of one hour, key and model held at once", "sums")

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            kinds, what = ((int,), "whole number") if isinstance(each.default, int) else ((int, float), "number")
            # A bool is an int to Python, and a slip here.
            good = isinstance(value, kinds) and not isinstance(value, bool) and 0 <= value < math.inf
            if not good or (value == 0 and each.name != "grace_s"):
                raise ValueError(f"{each.name} must be a positive {what}, not {value!r}")
        if self.heartbeat_timeout_s <= self.heartbeat_interval_s:
            raise ValueError(
                "heartbeat_timeout_s must be more than heartbeat_interval_s, or live publishers would go stale"
            )
        if self.max_inline_body_bytes > _MOST_INLINE_BYTES:
            raise ValueError(
                f"max_inline_body_bytes must be at most {_MOST_INLINE_BYTES}, or a frame would be too long"
            )
        if self.max_untaken_frame_bytes < 2 * (self.max_inline_body_bytes + _FRAME_ROOM_BYTES):
            raise ValueError("max_untaken_frame_bytes must hold two infers of max_inline_body_bytes, and 16 KiB more")
