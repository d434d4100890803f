"""`/admin/v1/usage`: who used how much."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Final, get_args

import msgspec

from ..broker import Broker
from ..errors import InvalidRequest, StoreUnavailable
from ..ledger import HOUR_S, UsageBy, hour_of
from .answers import Answer, json_answer
from .calls import Call
from .routes import Query, Routes
from .shown import Instant

__all__ = ["add_usage_routes", "parse_since"]

_SPAN: Final = re.compile(r"([0-9]{1,5})([hd])")
_DATE: Final = r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
_INSTANT: Final = re.compile(rf"{_DATE}(?:[Tt][0-9:]{{8}}(?:\.[0-9]+)?(?:[Zz]|[+-][0-9]{{2}}:[0-9]{{2}}))?")

_BY: Final = Query("by", {"enum": list(get_args(UsageBy)), "default": "key"}, "What it is summed by.")
_SINCE: Final = Query(
    "since",
    {
        "anyOf": [
            {"type": "string", "pattern": f"^{_SPAN.pattern}$"},
            {"type": "string", "format": "date"},
            {"type": "string", "format": "date-time"},
        ],
        "default": "24h",
    },
    "From when on: so many hours (`24h`) or days (`7d`) ago, a date (UTC) or an instant; from the full hour before it.",
)

_COUNTS: Final = ("requests", "completed", "failed", "cancelled", "unknown", "tokens_in", "tokens_out")

_Count = Annotated[int, msgspec.Meta(extra_json_schema={"minimum": 0})]
_Seconds = Annotated[float, msgspec.Meta(extra_json_schema={"minimum": 0})]


class Used(msgspec.Struct, frozen=True):
    """What was used with one key, or of one model: the other of the two is null. `*` stands for what went beyond a bound."""

    key_id: str | None
    key_name: str | None
    llm: str | None
    requests: _Count
    completed: _Count
    failed: _Count
    cancelled: _Count
    unknown: _Count
    tokens_in: _Count
    tokens_out: _Count
    seconds: _Seconds


class UsageList(msgspec.Struct, frozen=True):
    """Usage from an instant on, in the order of ids or names."""

    by: UsageBy
    since: Annotated[str, Instant]
    data: list[Used]


def add_usage_routes(routes: Routes, broker: Broker) -> None:
    """Put it there."""

    @routes.add(
        "GET", "/admin/v1/usage", role="admin", query=(_BY, _SINCE), answer=UsageList, errors=(StoreUnavailable,)
    )
    async def show_usage(call: Call) -> Answer:
        """Show what was used, by key or by model."""
        now = broker.now()
        by: Any = _BY.read(call)
        if by is None:
            by = "key"
        elif by not in get_args(UsageBy):
            raise InvalidRequest("Usage is summed by `key` or by `llm`.", param="by")
        text = _SINCE.read(call)
        since = parse_since("24h" if text is None else text, now)
        names = {view.key.key_id: view.key.name for view in broker.key_views()}
        data = [
            Used(
                key_id=(name or None) if by == "key" else None,
                key_name=names.get(name) if by == "key" else None,
                llm=name if by == "llm" else None,
                **{each: getattr(used, each) for each in _COUNTS},
                seconds=round(used.seconds, 3),
            )
            for name, used in (await broker.usage(by, since)).items()
        ]
        start = datetime.fromtimestamp(hour_of(since) * HOUR_S, UTC)
        return json_answer(UsageList(by, start.isoformat(timespec="milliseconds").replace("+00:00", "Z"), data))


def parse_since(text: str, now: float) -> float:
    """What `since` says, as an instant: not before 1970, and not after `now` (seconds since the epoch).

    Raises:
        InvalidRequest: it is none of what it may be.
    """
    if span := _SPAN.fullmatch(text):
        hours = int(span[1]) * (24 if span[2] == "d" else 1)
        return max(now - hours * HOUR_S, 0.0)
    if _INSTANT.fullmatch(text):
        try:
            found = datetime.fromisoformat(text.upper())
            return min(max((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp(), 0.0), now)
        except (ValueError, OverflowError):
            pass
    raise InvalidRequest(
        "This is neither a span (24h, 7d) nor a date (2026-11-01) or an instant (2026-11-01T12:00:00Z).", param="since"
    )
